"""Checkpoints: safetensors with JSON in its header, written atomically; nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from galray.errors import GalrayError

__all__ = ["load_checkpoint", "pack_optimizer", "save_checkpoint", "unpack_optimizer"]


FILE = "state.safetensors"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one.

    Arguments:
        folder: The checkpoint's folder; replaced as a whole.
        tensors: Named tensors.
        state: What JSON can hold.
    """
    folder = Path(folder)
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    # safetensors refuses tensors that share memory, so each is copied to memory of its own.
    save_file(
        {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()},
        fresh / FILE,
        # One file: a copy of it elsewhere is of one moment too.
        metadata={"state": json.dumps(state)},
    )
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The checkpoint in a folder, or None when there is none.

    Raises:
        GalrayError: A checkpoint is there but cannot be read.
    """
    folder = Path(folder)
    if not folder.exists():
        folder = folder.with_name(folder.name + ".old")  # killed between the two renames
        if not folder.exists():
            return None
    try:
        with safe_open(folder / FILE, "pt") as file:
            state = json.loads(file.metadata()["state"])
        return load_file(folder / FILE), state
    except Exception as error:
        raise GalrayError(
            f"the checkpoint {folder} cannot be read: {error}", "delete it to train from the start"
        ) from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors."""
    packed: dict[str, Tensor] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            packed[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    return packed


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `pack_optimizer` took out."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
