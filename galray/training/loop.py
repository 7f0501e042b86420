"""One epoch loop for every objective; it knows nothing of Ray."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.objectives import Objective
from galray.training.settings import TrainingSettings
from galray.training.store import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer

__all__ = ["Communicator", "TrainingResult", "fit", "split"]


class Communicator(Protocol):
    """What ranks of one training run say to each other."""

    rank: int
    world_size: int

    def average_(self, flat: Tensor) -> None:
        """Replace a tensor by its mean over ranks, in place."""
        ...


class _Alone:
    rank, world_size = 0, 1

    def average_(self, flat: Tensor) -> None:
        pass


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did.

    Attributes:
        curve: One row per epoch: epoch, train, validation, learning_rate, seconds, stars_per_second.
        best: Best held-out loss; the model holds its weights.
        best_epoch: Where it was reached, counted from 0.
        epochs: Epochs done in all, before and after a resume.
        seconds: Wall seconds in all.
        stars_per_second: Training stars per second over all workers, without validation.
        stopped: ``epochs`` or ``patience``.
    """

    curve: list[dict[str, Any]]
    best: float
    best_epoch: int
    epochs: int
    seconds: float
    stars_per_second: float
    stopped: str

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


@dataclass
class _State:
    epoch: int = 0
    best: float = math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    skipped: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


def split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and of held-out stars; at least one of each.

    Raises:
        GalrayError: Fewer than two stars.
    """
    if n < 2:
        raise GalrayError(f"{n} stars cannot be split into training and validation", "select more stars")
    order = np.random.default_rng(np.random.SeedSequence([seed, 0x5B117])).permutation(n)
    held = min(max(round(fraction * n), 1), n - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def _learning_rate(settings: TrainingSettings, step: int, total: int) -> float:
    """The learning rate of a step: a function of its number alone, so a resume needs no scheduler state."""
    if settings.schedule == "constant":
        return settings.learning_rate
    rise = int(settings.warmup * total) if settings.schedule == "onecycle" else 0
    if step < rise:
        return settings.learning_rate * (0.04 + 0.96 * (step + 1) / rise)
    progress = (step - rise) / max(total - rise, 1)
    return settings.learning_rate * (0.5 * (1.0 + math.cos(math.pi * progress)) + 1e-4)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise GalrayError("training.device = 'cuda', but torch sees no GPU", "use device = 'auto' or 'cpu'")
    return torch.device(name)


def _fingerprint(settings: TrainingSettings, seed: int, objective: Objective, sizes: list[int]) -> str:
    # Workers, device, threads and the checkpoint interval do not change what is computed.
    fixed = settings.model_dump(exclude={"workers", "device", "threads", "checkpoint_every"}, mode="json")
    return hashlib.sha256(repr((sorted(fixed.items()), seed, objective.name, sizes)).encode()).hexdigest()[
        :16
    ]


class _Stripes:
    """Draws batches by index: the stars dealt into equal stripes, each batch as many from each.

    Stripe s holds every stripes-th star; rank r of W holds stripes r·S/W … (r+1)·S/W − 1, so the global
    batch of a step is the same set of stars for every W, and every rank takes as many steps.
    """

    def __init__(self, n: int, settings: TrainingSettings, seed: int, rank: int, world_size: int) -> None:
        self.seed = seed
        self.count = min(settings.stripes, max(n // 2, 1))
        if self.count % world_size:
            raise GalrayError(f"{n} stars are too few for {world_size} workers", "use fewer workers")
        self.length = n // self.count
        self.take = min(settings.batch_size // settings.stripes, self.length)
        self.steps = self.length // self.take
        share = self.count // world_size
        self.mine = range(rank * share, (rank + 1) * share)

    def rows(self, n: int) -> np.ndarray:
        """The stars this rank needs, in the order `batches` counts them."""
        return np.concatenate([np.arange(s, n, self.count)[: self.length] for s in self.mine])

    def batches(self, epoch: int) -> Tensor:
        """Indices into this rank's rows: shape (steps, batch on this rank)."""
        parts = []
        for local, stripe in enumerate(self.mine):
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, 1, epoch, stripe]))
            order = rng.permutation(self.length)[: self.steps * self.take]
            parts.append(torch.from_numpy(order.reshape(self.steps, self.take) + local * self.length))
        return torch.cat(parts, 1)


def fit(
    model: nn.Module,
    objective: Objective,
    train: Tensor,
    validation: Tensor,
    settings: TrainingSettings,
    *,
    seed: int,
    checkpoint_dir: str | Path | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    communicator: Communicator | None = None,
) -> TrainingResult:
    """Train a model; it ends with the weights of the best held-out loss.

    Everything random follows from the seed and the epoch's number. With `checkpoint_dir` a killed run
    goes on at its last checkpoint and gives the same curve as one that was not killed.

    Arguments:
        model: Built by `galray.phasespace.build_model`; trained in place.
        objective: From `objective`.
        train: Training stars, shape (n, 6), in kpc and km/s.
        validation: Held-out stars, shape (m, 6).
        settings: How to train.
        seed: Of the batches.
        checkpoint_dir: Folder for the checkpoint.
        on_epoch: Called with each epoch's row of the curve.
        communicator: Joins the ranks of one run; none for a run alone.

    Raises:
        GalrayError: The loss is not finite, too few stars, or a checkpoint of another run.
    """
    comm = communicator or _Alone()
    device = _device(settings.device)
    threads = torch.get_num_threads()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        return _fit(
            model.to(device), objective, train, validation, settings, seed, checkpoint_dir, on_epoch, comm
        )
    finally:
        torch.set_num_threads(threads)


def _fit(
    model: nn.Module,
    objective: Objective,
    train: Tensor,
    validation: Tensor,
    settings: TrainingSettings,
    seed: int,
    checkpoint_dir: str | Path | None,
    on_epoch: Callable[[dict[str, Any]], None] | None,
    comm: Communicator,
) -> TrainingResult:
    if len(train) < 2 or len(validation) < 1:
        raise GalrayError(
            f"{len(train)} training and {len(validation)} held-out stars are too few", "select more stars"
        )
    ball: Any = getattr(model, "ball", None)
    outside = 0 if ball is None else sum(int((~ball.contains(w[:, :3])).sum()) for w in (train, validation))
    if outside:
        raise GalrayError(
            f"{outside} of {len(train) + len(validation)} stars lie nowhere or outside the ball of "
            f"{ball.radius} kpc around {ball.center}",
            "cut the stars at the model's ball",
        )
    stripes = _Stripes(len(train), settings, seed, comm.rank, comm.world_size)
    total = stripes.steps * settings.epochs
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    average = [p.detach().clone() for p in parameters]
    best = [p.detach().clone() for p in parameters]
    state = _State()
    checkpoint = Path(checkpoint_dir) / "checkpoint" if checkpoint_dir is not None else None
    mark = _fingerprint(settings, seed, objective, [len(train), len(validation)])
    if checkpoint is not None and (found := load_checkpoint(checkpoint)) is not None:
        tensors, saved = found
        if saved.pop("fingerprint") != mark:
            raise GalrayError(
                f"the checkpoint {checkpoint} belongs to a run with other settings, seed or stars",
                "delete it, or train into another folder",
            )
        model.load_state_dict({k[6:]: t for k, t in tensors.items() if k.startswith("model/")})
        for name, values in (("average", average), ("best", best)):
            for i, value in enumerate(values):
                value.copy_(tensors[f"{name}/{i}"])
        unpack_optimizer(optimizer, tensors)
        state = _State(**saved)
    rows = objective.prepare(model, train[torch.from_numpy(stripes.rows(len(train)))])
    # Each rank judges its share of the held-out stars; the figure is the mean over all of them.
    held = objective.prepare(model, validation[comm.rank :: comm.world_size], validation=True)
    if not (torch.isfinite(rows).all() and torch.isfinite(held).all()):
        raise GalrayError(
            "some stars have coordinates that are not finite", "check the selection and its distances"
        )

    stopped = "epochs"
    while state.epoch < settings.epochs:
        if settings.patience and state.epoch - 1 - state.best_epoch >= settings.patience:
            stopped = "patience"
            break
        began = time.perf_counter()
        order = stripes.batches(state.epoch).to(device)
        noise = torch.Generator(device).manual_seed(
            int(
                np.random.SeedSequence([seed, 2, state.epoch, comm.rank]).generate_state(1, np.uint64)[0] >> 1
            )
        )
        model.train()
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for i in range(stripes.steps):
            step = state.epoch * stripes.steps + i
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(settings, step, total)
            optimizer.zero_grad(set_to_none=True)
            loss = objective.loss(model, rows[order[i]], noise)
            loss.backward()
            _average_gradients(parameters, comm)
            norm = nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf)
            if not bool(torch.isfinite(norm)):
                state.skipped += 1  # one wild batch is passed over; many end the run below
                continue
            optimizer.step()
            if settings.ema_decay:
                decay = min(settings.ema_decay, (1.0 + step) / (10.0 + step))
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - decay)
            sums += torch.stack([loss.detach().double(), torch.ones((), dtype=torch.float64, device=device)])
        seconds = time.perf_counter() - began
        kept = average if settings.ema_decay else [p.detach() for p in parameters]
        held_out = _held_out(model, objective, held, parameters, kept, comm)
        comm.average_(sums)
        train_loss = float(sums[0] / sums[1].clamp_min(1.0))
        state.seconds += time.perf_counter() - began
        if not math.isfinite(train_loss + held_out) or state.skipped > max(0.05 * (step + 1), 10):
            raise GalrayError(
                f"training diverged in epoch {state.epoch}: train loss {train_loss:.4g}, held-out loss "
                f"{held_out:.4g}, {state.skipped} steps without a finite gradient",
                "lower training.learning_rate, or raise the number of stars",
            )
        if held_out < state.best:
            state.best, state.best_epoch = held_out, state.epoch
            for b, k in zip(best, kept, strict=True):
                b.copy_(k)
        row = {
            "epoch": state.epoch,
            "train": train_loss,
            "validation": held_out,
            "learning_rate": _learning_rate(settings, step, total),
            "seconds": state.seconds,
            "stars_per_second": stripes.steps * stripes.take * stripes.count / max(seconds, 1e-9),
        }
        state.curve.append(row)
        state.epoch += 1
        last = state.epoch == settings.epochs
        if (
            checkpoint is not None
            and comm.rank == 0
            and (last or state.epoch % settings.checkpoint_every == 0)
        ):
            tensors = {f"model/{k}": t for k, t in model.state_dict().items()}
            for name, values in (("average", average), ("best", best)):
                tensors |= {f"{name}/{i}": t for i, t in enumerate(values)}
            tensors |= pack_optimizer(optimizer)
            save_checkpoint(checkpoint, tensors, {**asdict(state), "fingerprint": mark})
        if on_epoch is not None:
            on_epoch(row)
    with torch.no_grad():
        for p, b in zip(parameters, best, strict=True):
            p.copy_(b)
    model.eval()
    speeds = [row["stars_per_second"] for row in state.curve]
    return TrainingResult(
        curve=state.curve,
        best=state.best,
        best_epoch=state.best_epoch,
        epochs=state.epoch,
        seconds=state.seconds,
        stars_per_second=float(np.mean(speeds)),
        stopped=stopped,
    )


def _average_gradients(parameters: list[nn.Parameter], comm: Communicator) -> None:
    """One flat all-reduce per step: small networks are bound by latency, not by bytes."""
    if comm.world_size == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    comm.average_(flat)
    for p, g in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        p.grad = g.view_as(p)


def _held_out(
    model: nn.Module,
    objective: Objective,
    held: Tensor,
    parameters: list[nn.Parameter],
    kept: list[Tensor],
    comm: Communicator,
) -> float:
    """Mean held-out loss with the kept weights; the training weights are put back."""
    current = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, k in zip(parameters, kept, strict=True):
            p.copy_(k)
        model.eval()
        losses = objective.validate(model, held) if len(held) else held.new_zeros(0)
        sums = torch.stack(
            [losses.double().sum(), losses.new_tensor(float(len(losses)), dtype=torch.float64)]
        )
        for p, c in zip(parameters, current, strict=True):
            p.copy_(c)
    comm.average_(sums)
    return float(sums[0] / sums[1])
