"""Ray Train around the loop: the same training on several workers."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.catalog.mirror import Mirror, Place, scratch_folder
from galray.cluster import TaskNeeds, is_connected, resources
from galray.errors import GalrayError
from galray.phasespace.objectives import objective
from galray.training.batches import Stripes
from galray.training.communication import ProcessGroup
from galray.training.loop import TrainingResult, fit
from galray.training.settings import TrainingSettings

__all__ = ["fit_distributed"]


def _load_states(paths: list[Path]) -> Tensor:
    """States of .npy files, in order: shape (n, 6)."""
    return torch.from_numpy(np.concatenate([np.load(p, allow_pickle=False) for p in paths]))


class _Desk:
    """Where a rank works: in the training's folder, or at a URL in a copy of what it reads on its own node.

    Arguments:
        place: The training's.
        reads: Names, and folders with a slash behind them, that are brought.
    """

    def __init__(self, place: Place, *reads: str) -> None:
        self.place = place
        self.folder = place.folder
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        if not isinstance(place, Mirror):
            return
        scratch_folder().mkdir(parents=True, exist_ok=True)
        self._copy = tempfile.TemporaryDirectory(prefix="training-", dir=scratch_folder())
        self.folder = Path(self._copy.name)
        folders = tuple(name for name in reads if name.endswith("/"))
        for name in place.sizes():
            if name in reads or name.startswith(folders):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(place.read(name) or b"")

    def __enter__(self) -> _Desk:
        return self

    def __exit__(self, *_: object) -> None:
        if self._copy is not None:
            self._copy.cleanup()

    def send(self, name: str) -> None:
        """Send a folder to the URL, where the training is at one."""
        if self._copy is not None:
            for path in sorted((self.folder / name).rglob("*")):
                if path.is_file():
                    self.place.write(str(path.relative_to(self.folder)), path.read_bytes())


class _EpochEnd:
    """What the first rank does after every epoch: the curve is written, a new checkpoint sent to its URL.

    Epochs that are done again after a kill replace the first. A store that fails for a while ends nothing:
    the next epoch comes.

    Arguments:
        desk: Where the rank works.
        storage: Where the curve is.
        curve: Its name there; none is written where it is empty.
        every: Epochs from one checkpoint to the next.
    """

    def __init__(self, desk: _Desk, storage: Place, curve: str, every: int) -> None:
        self.desk, self.storage, self.curve, self.every = desk, storage, curve, every
        self.rows = json.loads((storage.read(curve) if curve else None) or b"[]")

    def __call__(self, row: dict[str, Any]) -> None:
        self.rows = [r for r in self.rows if r["epoch"] < row["epoch"]] + [row]
        with contextlib.suppress(GalrayError):
            if (row["epoch"] + 1) % self.every == 0:
                self.desk.send("checkpoint")
            if self.curve:
                self.storage.write(self.curve, json.dumps(self.rows, indent=1).encode())


def _train_loop(config: dict[str, Any]) -> None:
    """What every rank runs: the model and its own stripes of the stars, which the driver dealt.

    Nothing goes through `ray.train.report` before the end: it waits for the controller's next look, seconds
    away, and a checkpoint that is reported there just before a crash is lost. Checkpoints are files of the
    run's own, which the first rank replaces as a whole; whatever group of ranks comes next starts from them.
    """
    import ray.train
    import ray.train.torch

    from galray.phasespace.models import load_model, save_model

    settings = TrainingSettings.model_validate(config["settings"])
    storage: Place = config["storage"]
    if settings.device == "cuda":
        # The ranks of a node see all of its GPUs: each takes its own.
        torch.cuda.set_device(ray.train.torch.get_device())
    group = ProcessGroup()
    mine = [
        f"train/{stripe:04d}.npy" for stripe in Stripes.share(config["stripes"], group.rank, group.world_size)
    ]
    place = storage.below(config["name"])
    with _Desk(place, "initial/", "checkpoint/", "validation.npy", *mine) as desk:
        model = load_model(desk.folder / "initial")
        every = settings.checkpoint_every
        result = fit(
            model,
            objective(config["kind"], model.settings),
            _load_states([desk.folder / name for name in mine]),
            _load_states([desk.folder / "validation.npy"]),
            settings,
            seed=config["seed"],
            checkpoint_dir=desk.folder,
            on_epoch=_EpochEnd(desk, storage, config["curve"], every) if group.rank == 0 else None,
            communicator=group,
            dealt=config["stars"],
        )
        if group.rank == 0:
            save_model(model, desk.folder / "result" / "model")
            (desk.folder / "result" / "result.json").write_text(json.dumps(result.as_dict()))
            desk.send("result")
    ray.train.report({"best": result.best, "epochs": result.epochs})


def fit_distributed(
    kind: str,
    model: Any,
    train: Tensor,
    validation: Tensor,
    settings: TrainingSettings,
    *,
    seed: int,
    storage: str | Path | Place,
    name: str = "training",
    curve: str = "",
    labels: Mapping[str, str] | None = None,
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
        storage: Where stars, checkpoints and the result lie: a folder that all workers reach, or the place
            of a URL, through which everything then goes.
        name: Name of the training inside `storage`.
        curve: Name in `storage` of a file for the rows of the curve, written anew after every epoch.
        labels: Labels of the nodes for workers, as Ray's label selectors have them.
        max_failures: Restarts of the worker group.
        local: Run in this process, without Ray processes (one rank).

    Raises:
        GalrayError: Training failed on the workers.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from galray.phasespace.models import load_model

    top = storage if isinstance(storage, Place) else Place(Path(storage).resolve())
    place = top.below(name)
    gpu = _on_gpu(settings, labels or {}, local)
    config = {
        "kind": kind,
        # What "auto" means is decided here, once for all ranks.
        "settings": settings.model_dump(mode="json") | {"device": "cuda" if gpu else "cpu"},
        "seed": seed,
        "storage": top,
        "name": name,
        "curve": curve,
        "stars": len(train),
        "stripes": _deal(place, model, train, validation, settings),
    }
    # A pair makes Ray Train elastic.
    workers: Any = (settings.min_workers, settings.max_workers) if settings.elastic else settings.max_workers
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=0 if local else workers,
            use_gpu=gpu and not local,
            label_selector=dict(labels) if labels else None,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            name="ray", **place.ray_storage(), failure_config=FailureConfig(max_failures=max_failures)
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
    with _Desk(place, "result/") as desk:
        found = json.loads((desk.folder / "result" / "result.json").read_text())
        model.load_state_dict(load_model(desk.folder / "result" / "model").state_dict())
    model.eval()
    return TrainingResult(**found)


def _deal(place: Place, model: Any, train: Tensor, validation: Tensor, settings: TrainingSettings) -> int:
    """Write what the ranks read: the model, the held-out stars, the training stars; the number of stripes."""
    from galray.phasespace.models import save_model

    folder = place.folder
    (folder / "train").mkdir(parents=True, exist_ok=True)
    save_model(model, folder / "initial")
    np.save(folder / "validation.npy", torch.as_tensor(validation).cpu().numpy())
    states = torch.as_tensor(train).cpu().numpy()
    count = Stripes.number(len(states), settings)
    for stripe in range(count):
        np.save(folder / "train" / f"{stripe:04d}.npy", states[stripe::count][: len(states) // count])
    shutil.rmtree(folder / "result", ignore_errors=True)
    place.remove("result")
    place.push("initial/**/*", "train/*.npy", "validation.npy")
    return count


def _on_gpu(settings: TrainingSettings, labels: Mapping[str, str], local: bool) -> bool:
    """Whether workers train on GPUs; ``auto`` asks the nodes that they may go to, not this one."""
    if settings.device != "auto":
        return settings.device == "cuda"
    if local or not is_connected():
        return torch.cuda.is_available()
    return resources(TaskNeeds(labels=dict(labels))).num_gpus >= settings.min_workers
