"""Ray Train around the loop: the same training on several workers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.phasespace.objectives import objective
from galray.provenance import write_atomic
from galray.training.batches import Stripes
from galray.training.communication import ProcessGroup
from galray.training.loop import TrainingResult, fit
from galray.training.settings import TrainingSettings

__all__ = ["fit_distributed"]


def _load_states(paths: list[Path]) -> Tensor:
    """States of .npy files, in order: shape (n, 6)."""
    return torch.from_numpy(np.concatenate([np.load(p, allow_pickle=False) for p in paths]))


class _CurveFile:
    """Writes every epoch's row to a file; epochs that are done again after a kill replace the first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, row: dict[str, Any]) -> None:
        rows = json.loads(self.path.read_text()) if self.path.is_file() else []
        write_atomic(self.path, [r for r in rows if r["epoch"] < row["epoch"]] + [row])


def _train_loop(config: dict[str, Any]) -> None:
    """What every rank runs: the model and its own stripes of the stars from the folder the driver wrote.

    Nothing goes through `ray.train.report` before the end: it waits for the controller's next look, seconds
    away, and a checkpoint that is reported there just before a crash is lost. Checkpoints are files of the
    run's own, which the first rank replaces as a whole; whatever group of ranks comes next starts from them.
    """
    import ray.train
    import ray.train.torch

    from galray.phasespace.models import load_model, save_model

    settings = TrainingSettings.model_validate(config["settings"])
    folder = Path(config["folder"])
    if settings.device == "cuda":
        # The ranks of a node see all of its GPUs: each takes its own.
        torch.cuda.set_device(ray.train.torch.get_device())
    group = ProcessGroup()
    model = load_model(folder / "initial")
    mine = Stripes.share(config["stripes"], group.rank, group.world_size)
    curve = _CurveFile(Path(config["curve"])) if config["curve"] and group.rank == 0 else None
    result = fit(
        model,
        objective(config["kind"], model.settings),
        _load_states([folder / "train" / f"{stripe:04d}.npy" for stripe in mine]),
        _load_states([folder / "validation.npy"]),
        settings,
        seed=config["seed"],
        checkpoint_dir=folder,
        on_epoch=curve,
        communicator=group,
        dealt=config["stars"],
    )
    if group.rank == 0:
        save_model(model, folder / "result" / "model")
        (folder / "result" / "result.json").write_text(json.dumps(result.as_dict()))
    ray.train.report({"best": result.best, "epochs": result.epochs})


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
    curve: str | Path | None = None,
    max_failures: int = 2,
    local: bool = False,
) -> TrainingResult:
    """Train a model on ``settings.workers`` ranks with Ray Train; the model gets the best weights.

    The stars are dealt into stripes, a file each; every rank loads those that fall to it, draws its share of
    the same global batches (see `TrainingSettings.stripes`), and gradients are averaged, so the curve is that
    of one worker with the same batch size, within rounding. gloo carries the gradients on CPUs, nccl on GPUs.

    A killed worker restarts the group from the last checkpoint; with a pair of workers the new group may be
    smaller or larger, and the curve stays the same. Calling again with the same storage, name and settings
    goes on where the last call stopped.

    Arguments:
        kind: ``flow`` or ``score``.
        model: From `build_model`; its standardisation and base are the same on every rank.
        train: Training stars, shape (n, 6).
        validation: Held-out stars, shape (m, 6).
        settings: How to train; ``workers`` ranks.
        seed: Of the batches.
        storage: Folder that all workers reach: stars, checkpoints and the result.
        name: Name of the training inside `storage`.
        curve: File for the rows of the curve, written anew after every epoch; its folder must exist.
        max_failures: Restarts of the worker group.
        local: Run in this process, without Ray processes (one rank).

    Raises:
        GalrayError: Training failed on the workers.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from galray.phasespace.models import load_model

    folder = Path(storage).resolve() / name
    gpu = _on_gpu(settings, local)
    config = {
        "kind": kind,
        # What "auto" means is decided here, once for all ranks.
        "settings": settings.model_dump(mode="json") | {"device": "cuda" if gpu else "cpu"},
        "seed": seed,
        "folder": str(folder),
        "curve": str(Path(curve).resolve()) if curve is not None else None,
        "stars": len(train),
        "stripes": _deal(folder, model, train, validation, settings),
    }
    # A pair makes Ray Train elastic.
    workers: Any = (settings.min_workers, settings.max_workers) if settings.elastic else settings.max_workers
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=0 if local else workers, use_gpu=gpu and not local),
        run_config=RunConfig(
            name="ray", storage_path=str(folder), failure_config=FailureConfig(max_failures=max_failures)
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


def _deal(folder: Path, model: Any, train: Tensor, validation: Tensor, settings: TrainingSettings) -> int:
    """Write what the ranks read: the model, the held-out stars, the training stars; the number of stripes."""
    from galray.phasespace.models import save_model

    (folder / "train").mkdir(parents=True, exist_ok=True)
    save_model(model, folder / "initial")
    np.save(folder / "validation.npy", torch.as_tensor(validation).cpu().numpy())
    states = torch.as_tensor(train).cpu().numpy()
    count = Stripes.number(len(states), settings)
    for stripe in range(count):
        np.save(folder / "train" / f"{stripe:04d}.npy", states[stripe::count][: len(states) // count])
    shutil.rmtree(folder / "result", ignore_errors=True)
    return count


def _on_gpu(settings: TrainingSettings, local: bool) -> bool:
    """Whether workers train on GPUs; ``auto`` asks the cluster, which may have some that this node lacks."""
    if settings.device != "auto":
        return settings.device == "cuda"
    import ray

    if local or not ray.is_initialized():
        return torch.cuda.is_available()
    return bool(ray.cluster_resources().get("GPU", 0) >= settings.min_workers)
