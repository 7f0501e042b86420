"""Ray Train around the loop: the same training on several workers."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.phasespace.objectives import objective
from galray.training.loop import TrainingResult, fit
from galray.training.settings import TrainingSettings

__all__ = ["fit_distributed"]


class _Group:
    """The ranks of a torch.distributed process group, gloo or nccl."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.dist = dist if dist.is_available() and dist.is_initialized() else None
        self.rank = self.dist.get_rank() if self.dist else 0
        self.world_size = self.dist.get_world_size() if self.dist else 1

    def average_(self, flat: Tensor) -> None:
        if self.dist and self.world_size > 1:
            self.dist.all_reduce(flat)
            flat /= self.world_size


def _load_states(paths: Sequence[str]) -> Tensor:
    """States of .npy files, in order: shape (n, 6)."""
    return torch.from_numpy(np.concatenate([np.load(p, allow_pickle=False) for p in paths]))


def _train_loop(config: dict[str, Any]) -> None:
    """What every rank runs. The model is read from the folder the driver wrote, so all ranks start equal."""
    import ray.train

    from galray.phasespace.models import load_model, save_model

    settings = TrainingSettings.model_validate(config["settings"])
    group = _Group()
    model = load_model(config["model"])
    train, validation = _load_states(config["train"]), _load_states(config["validation"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as found:
                source = Path(found) / "checkpoint"
                if source.exists():
                    shutil.copytree(source, folder / "checkpoint", dirs_exist_ok=True)

        def on_epoch(row: dict[str, Any]) -> None:
            # Every rank reports as often: report() is a barrier. Rank 0 brings the checkpoint.
            if group.rank == 0 and (folder / "checkpoint").exists():
                ray.train.report(row, checkpoint=ray.train.Checkpoint.from_directory(folder))
            else:
                ray.train.report(row)

        result = fit(
            model,
            objective(config["kind"], model.settings),
            train,
            validation,
            settings,
            seed=config["seed"],
            checkpoint_dir=folder,
            on_epoch=on_epoch,
            communicator=group,
        )
    if group.rank == 0:
        target = Path(config["result"])
        save_model(model.cpu(), target / "model")
        (target / "result.json").write_text(json.dumps(result.as_dict()))


def fit_distributed(
    kind: str,
    model: Any,
    train: Tensor,
    validation: Tensor,
    settings: TrainingSettings,
    *,
    seed: int,
    storage: str | Path,
    name: str = "training",
    max_failures: int = 2,
    local: bool = False,
) -> TrainingResult:
    """Train a model on ``settings.workers`` ranks with Ray Train; the model gets the best weights.

    Every rank draws its share of the same global batches (see `TrainingSettings.stripes`) and gradients are
    averaged, so the curve is that of one worker with the same batch size, within rounding. gloo carries
    the gradients on CPUs, nccl on GPUs. A killed worker restarts the group from the last reported
    checkpoint; calling again with the same storage, name and settings goes on where the last call stopped.

    Arguments:
        kind: ``flow`` or ``score``.
        model: From `build_model`; its standardisation and base are the same on every rank.
        train: Training stars, shape (n, 6).
        validation: Held-out stars, shape (m, 6).
        settings: How to train; ``workers`` ranks.
        seed: Of the batches.
        storage: Folder that all workers reach: stars, checkpoints and the result.
        name: Name of the training inside `storage`.
        max_failures: Restarts of the worker group.
        local: Run in this process, without Ray processes (one rank).

    Raises:
        GalrayError: Training failed on the workers.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from galray.phasespace.models import load_model, save_model

    folder = Path(storage).resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder / "initial")
    for part, states in (("train", train), ("validation", validation)):
        np.save(folder / f"{part}.npy", torch.as_tensor(states).cpu().numpy())
    shutil.rmtree(folder / "result", ignore_errors=True)
    use_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={
            "kind": kind,
            "settings": settings.model_dump(mode="json"),
            "seed": seed,
            "model": str(folder / "initial"),
            "train": [str(folder / "train.npy")],
            "validation": [str(folder / "validation.npy")],
            "result": str(folder / "result"),
        },
        scaling_config=ScalingConfig(
            num_workers=0 if local else settings.workers, use_gpu=use_gpu and not local
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, GalrayError) else error
        raise GalrayError(
            f"training '{name}' on {settings.workers} workers failed: {cause}",
            "see the message above; `galray doctor` looks at the cluster",
        ) from error
    found = json.loads((folder / "result" / "result.json").read_text())
    model.load_state_dict(load_model(folder / "result" / "model").state_dict())
    model.eval()
    return TrainingResult(**found)
