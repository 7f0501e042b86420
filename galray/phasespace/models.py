"""Build, save and load a model of either kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.flow import flow
from galray.phasespace.score import ScoreNetwork
from galray.phasespace.selection import SelectionEfficiency
from galray.phasespace.settings import FlowSettings, ScoreSettings
from galray.phasespace.transforms import Ball

__all__ = ["build_model", "empty_model", "load_model", "save_model"]

_KINDS: dict[str, tuple[Any, Any]] = {
    "flow": (flow, FlowSettings),
    "score": (ScoreNetwork, ScoreSettings),
}


def empty_model(kind: str, settings: Any, ball: Ball, seed: int = 0) -> Any:
    """A model with random weights and no standardisation: what weights are loaded into.

    Raises:
        GalrayError: An unknown kind.
    """
    if kind not in _KINDS:
        raise GalrayError(f"no phase-space model of kind '{kind}'", f"use one of: {', '.join(_KINDS)}")
    with torch.random.fork_rng(devices=[]):  # layers draw from the global generator: leave it as it was
        torch.manual_seed(seed)
        return _KINDS[kind][0](settings, ball)


def build_model(
    kind: Literal["flow", "score"] | str,
    settings: FlowSettings | ScoreSettings,
    ball: Ball,
    states: Tensor,
    *,
    seed: int | None = None,
    selection: SelectionEfficiency | None = None,
) -> Any:
    """A model ready for training: standardised, its analytic base fitted, its networks untrained.

    Arguments:
        kind: ``flow`` or ``score``.
        settings: `FlowSettings` or `ScoreSettings`.
        ball: The ball the stars were cut at.
        states: Training stars inside the ball, shape (n, 6), in kpc and km/s; with their errors, (n, 27), for
            a score network whose base is to be deconvolved.
        seed: Of the initial weights and of the base fit; None takes one from torch's global generator.
        selection: Known selection of the stars: a score network is then one of f, not of ε f.

    Raises:
        GalrayError: Too few stars, stars outside the ball, values that are not finite, or a selection
            for a flow.
    """
    if seed is None:
        seed = int(torch.randint(2**62, (), dtype=torch.int64))
    states = torch.as_tensor(states).to(torch.float64)
    finite = torch.isfinite(states).all(-1)
    outside = finite & ~ball.contains(states[:, :3])
    if not bool(finite.all()) or bool(outside.any()):
        raise GalrayError(
            f"of {len(states)} stars, {int((~finite).sum())} are not finite and {int(outside.sum())} lie "
            f"outside the ball of {ball.radius} kpc around {ball.center}",
            "cut the stars at the model's ball",
        )
    model = empty_model(kind, settings, ball, seed)
    generator = torch.Generator().manual_seed(seed)
    if selection is None:
        model.fit_base(states[:, :6] if kind == "flow" else states, generator)
    elif kind == "score":
        model.fit_base(states, generator, selection)
    else:
        raise GalrayError(
            f"a model of kind '{kind}' does not correct for a selection",
            "use a score network; or the flow's p(v|x) alone, which no selection of positions can bias",
        )
    return model


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write a model as ``model.json`` (kind, settings, ball) and ``model.safetensors`` (all numbers)."""
    net: Any = model
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: t.detach().cpu().clone().contiguous() for k, t in net.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    described = {
        "format": 1,
        "kind": net.kind,
        "settings": net.settings.model_dump(mode="json"),
        "ball": {"center": list(net.ball.center), "radius": net.ball.radius},
    }
    (folder / "model.json").write_text(json.dumps(described, indent=1) + "\n")


def load_model(folder: str | Path) -> Any:
    """Read what `save_model` wrote, on the CPU, ready for evaluation.

    Raises:
        GalrayError: The folder does not hold a readable model.
    """
    folder = Path(folder)
    try:
        described = json.loads((folder / "model.json").read_text())
        ball = Ball(tuple(described["ball"]["center"]), described["ball"]["radius"])
        settings = _KINDS[described["kind"]][1].model_validate(described["settings"])
        tensors = load_file(folder / "model.safetensors")
        model = empty_model(described["kind"], settings, ball)
        own = dict(model.state_dict())
        if any(tensors[name].dtype == torch.float64 != t.dtype for name, t in own.items()):
            model = model.to(torch.float64)
        model.load_state_dict(tensors)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise GalrayError(
            f"{folder} does not hold a readable model: {error}", "name a folder written by galray"
        ) from error
    return model.eval()
