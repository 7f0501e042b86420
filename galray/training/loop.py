"""One epoch loop for every objective; it knows nothing of Ray."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.objectives import Objective
from galray.training.arithmetic import StepLoss, arithmetic, choose_device, memory_in_use
from galray.training.batches import Stripes
from galray.training.communication import Alone, Communicator, average_gradients
from galray.training.settings import TrainingSettings
from galray.training.store import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer

__all__ = ["TrainingResult", "fit"]


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did.

    Attributes:
        curve: One row per epoch: ``epoch``, ``train``, ``validation``, ``learning_rate``, ``seconds`` of wall
            time so far, ``stars_per_second`` of all workers, ``cpu_seconds`` of the first worker's steps,
            ``all_reduce_seconds`` it spent on sums over workers (waiting included), ``workers`` and
            ``memory_gb`` of the first.
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


def _learning_rate(settings: TrainingSettings, step: int, total: int) -> float:
    """The learning rate of a step: a function of its number alone, so a resume needs no scheduler state."""
    if settings.schedule == "constant":
        return settings.learning_rate
    rise = int(settings.warmup * total) if settings.schedule == "onecycle" else 0
    if step < rise:
        return settings.learning_rate * (0.04 + 0.96 * (step + 1) / rise)
    progress = (step - rise) / max(total - rise, 1)
    return settings.learning_rate * (0.5 * (1.0 + math.cos(math.pi * progress)) + 1e-4)


def _fingerprint(
    settings: TrainingSettings, seed: int, objective: Objective, count: int, validation: Tensor
) -> str:
    """A hash of what decides the curve; the held-out stars stand for all, since every rank has them."""
    stars = hashlib.sha256(validation.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    # These do not change what is computed, beyond rounding.
    free = {"workers", "device", "threads", "compile", "checkpoint_every"}
    fixed = settings.model_dump(exclude=free, mode="json")
    content = repr((sorted(fixed.items()), seed, objective.name, count, stars))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


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
    dealt: int | None = None,
) -> TrainingResult:
    """Train a model; it ends with the weights of the best held-out loss, on the device it came from.

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
        dealt: Number of training stars of all ranks, where `train` holds this rank's stripes alone, one
            after the other; None where it holds all stars.

    Raises:
        GalrayError: The loss is not finite, too few stars, or a checkpoint of another run.
    """
    origin = next(model.parameters()).device
    with arithmetic(settings):
        try:
            return _fit(
                model.to(choose_device(settings.device)),
                objective,
                train,
                validation,
                settings,
                seed,
                checkpoint_dir,
                on_epoch,
                communicator or Alone(),
                dealt,
            )
        finally:
            model.to(origin)


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
    dealt: int | None,
) -> TrainingResult:
    count = len(train) if dealt is None else dealt
    if count < 2 or len(validation) < 1:
        raise GalrayError(
            f"{count} training and {len(validation)} held-out stars are too few", "select more stars"
        )
    ball: Any = getattr(model, "ball", None)
    outside = 0 if ball is None else sum(int((~ball.contains(w[:, :3])).sum()) for w in (train, validation))
    if outside:
        raise GalrayError(
            f"{outside} of {len(train) + len(validation)} stars lie nowhere or outside the ball of "
            f"{ball.radius} kpc around {ball.center}",
            "cut the stars at the model's ball",
        )
    stripes = Stripes(count, settings, seed, comm.rank, comm.world_size)
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
    mark = _fingerprint(settings, seed, objective, count, validation)
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
    mine = train if dealt is not None else train[torch.from_numpy(stripes.rows(count))]
    # Stripe by stripe: what an objective takes from the stars it prepares is the same for every sharing.
    rows = torch.cat([objective.prepare(model, stripe) for stripe in mine.split(stripes.length)])
    # Each rank judges its share of the held-out stars; the figure is the mean over all of them.
    held = objective.prepare(model, validation[comm.rank :: comm.world_size], validation=True)
    if not (torch.isfinite(rows).all() and torch.isfinite(held).all()):
        raise GalrayError(
            "some stars have coordinates that are not finite", "check the selection and its distances"
        )

    step_loss = StepLoss(objective, model, settings, device)
    stopped = "epochs"
    while state.epoch < settings.epochs:
        if settings.patience and state.epoch - 1 - state.best_epoch >= settings.patience:
            stopped = "patience"
            break
        began, began_cpu, began_sums = time.perf_counter(), time.process_time(), comm.seconds
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
            loss = step_loss(rows[order[i]], noise)
            (loss if stripes.weight == 1.0 else stripes.weight * loss).backward()
            average_gradients(parameters, comm)
            norm = nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf)
            if not bool(torch.isfinite(norm)):
                state.skipped += 1  # one wild batch is passed over; many end the run below
                continue
            optimizer.step()
            if settings.ema_decay:
                decay = min(settings.ema_decay, (1.0 + step) / (10.0 + step))
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - decay)
            sums += stripes.weight * torch.stack([loss.detach().double(), torch.ones_like(sums[1])])
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
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
            "cpu_seconds": cpu_seconds,
            "all_reduce_seconds": comm.seconds - began_sums,
            "workers": comm.world_size,
            "memory_gb": memory_in_use(device),
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
