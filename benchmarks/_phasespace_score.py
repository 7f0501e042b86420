"""Score networks: error on spheres whose score is known, and the speed of one training step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._phasespace_common import BALL, PARTS, mean, median_error, part, sphere, stars
from galray.phasespace import ScoreSettings, build_model, objective
from galray.phasespace.gradient_mlp import GradientMLP
from galray.phasespace.mlp import DivergenceMLP
from galray.provenance import content_hash
from galray.training import ScoreTrainingSettings, TrainingSettings, fit, split

__all__ = ["averaged", "errors", "measure", "task", "train_part"]

MEMBERS = 4
VECTOR = {"form": "vector", "hidden": (64, 64, 64, 64)}


def train_part(task: dict[str, Any]) -> dict[str, Any]:
    """Train one score network on a realisation of a sphere and compare it with the truth.

    Arguments:
        task: ``sphere``, ``stars``, ``realisation``, ``seed``, ``score`` and ``training`` (settings as JSON
            values), and ``half`` (0 or 1: that half of the stars alone; None: all).

    Returns:
        The error, that of its position and velocity parts and in shells of radius, the held-out loss, and
        where the scores of the held-out stars are kept.
    """
    truth, w, held = stars(task["stars"], 100 + task["realisation"], task["sphere"])
    if task["half"] is not None:
        w = w[task["half"] :: 2]
    begin = time.process_time()
    settings = ScoreSettings.model_validate(task["score"])
    training = TrainingSettings.model_validate(task["training"])
    seed = task["seed"]
    train, other = split(len(w), training.validation_fraction, seed)
    model = build_model("score", settings, BALL, w[train], seed=seed)
    built = time.process_time()
    start = model.score(held)
    result = fit(model, objective("score", settings), w[train].float(), w[other].float(), training, seed=seed)
    seconds = time.process_time() - begin
    score, exact = model.score(held), truth.score(held)
    path = PARTS / "scores" / f"{content_hash(task)}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, score.float().numpy())
    return {
        "cpu_seconds": seconds,
        "base_seconds": built - begin,
        "base_error": median_error(start, exact),
        **errors(score, exact, held),
        "loss": result.best,
        "best_epoch": result.best_epoch,
        "scores": path.name,
    }


def errors(score: Tensor, exact: Tensor, held: Tensor) -> dict[str, Any]:
    """The median error, that of its two parts, and that in shells of radius 0-0.5-1-2-4-10."""
    radius = held[:, :3].norm(dim=-1)
    edges = (0.0, 0.5, 1.0, 2.0, 4.0, 10.0)
    shells = [(radius >= a) & (radius < b) for a, b in itertools.pairwise(edges)]
    return {
        "error": median_error(score, exact),
        "position": median_error(score[:, :3], exact[:, :3]),
        "velocity": median_error(score[:, 3:], exact[:, 3:]),
        "shells": [median_error(score[shell], exact[shell]) for shell in shells],
    }


def averaged(found: list[dict[str, Any]]) -> Tensor:
    """The mean of the scores of several parts: shape (8192, 6)."""
    # By name: the folder of parts may have moved since.
    paths = [PARTS / "scores" / one["scores"] for one in found]
    return torch.stack([torch.from_numpy(np.load(path)).double() for path in paths]).mean(0)


def task(
    stars: int,
    realisation: int,
    seed: int,
    *,
    sphere: str = "Plummer",
    half: int | None = None,
    score: dict[str, Any] | None = None,
    **training: Any,
) -> dict[str, Any]:
    """The task of one network, with every setting written out."""
    return {
        "sphere": sphere,
        "stars": stars,
        "realisation": realisation,
        "seed": seed,
        "half": half,
        "score": ScoreSettings.model_validate(score or {}).model_dump(mode="json"),
        "training": ScoreTrainingSettings(**training).model_dump(mode="json"),
    }


def measure(bench: Bench) -> None:
    """All rows of this group."""
    _step(bench)
    _spheres(bench)


def _spheres(bench: Bench) -> None:
    """One network, several averaged, the free form and halves of the stars, on two spheres."""
    count, epochs, members = (2**14, 6, 2) if bench.quick else (2**17, 12, MEMBERS)
    whole = not bench.quick
    for name, realisations in (("Plummer", 1 if bench.quick else 3), ("Hernquist", 1)):
        label = f"{name}, {count} stars" if name == "Plummer" else f"{name}, beta = 1/2, {count} stars"
        options: dict[str, Any] = {"sphere": name, "epochs": epochs}
        runs = [
            [
                part(bench, "score", task(count, r, 1000 * r + m, **options), train_part)
                for m in range(members)
            ]
            for r in range(realisations)
        ]
        exact = [sphere(name).score(stars(count, 100 + r, name)[2]) for r in range(realisations)]
        flat = [one for run in runs for one in run]
        spent = mean([one["cpu_seconds"] for one in flat])
        of_plummer = name == "Plummer"
        bench.row(
            f"{label}: one score network",
            mean([one["error"] for one in flat]),
            bar=0.09 if whole and of_plummer else None,
            peer="31 % one spline flow, 11 CPU-min" if of_plummer else "",
            cpu_seconds=spent,
        )
        bench.row(
            f"{label}: {members} score networks averaged",
            mean([median_error(averaged(run), s) for run, s in zip(runs, exact, strict=True)]),
            bar=0.07 if whole and of_plummer else None,
            peer="8.6 % sixteen flows, 3 CPU-h" if of_plummer else "",
            cpu_seconds=members * spent,
        )
        if not of_plummer:
            continue
        halves = [
            part(bench, "score", task(count, 0, 50 + h, half=h, **options), train_part) for h in range(2)
        ]
        bench.row(
            f"{label}: score networks of two halves of the stars averaged",
            median_error(averaged(halves), exact[0]),
            peer="10 % two half-data networks, 9 CPU-min",
            cpu_seconds=sum(one["cpu_seconds"] for one in halves),
        )
        vector = part(bench, "score", task(count, 0, 0, score=VECTOR, **options), train_part)
        bench.row(
            f"{label}: one score network, vector form", vector["error"], cpu_seconds=vector["cpu_seconds"]
        )


def _step(bench: Bench) -> None:
    """Stars per second of one training step: tangents pushed through the layers against autograd."""
    count = 2048
    u = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    for form, network, hidden in (
        ("gradient", GradientMLP, (64, 64, 64)),
        ("vector", DivergenceMLP, (128, 128)),
        ("vector", DivergenceMLP, (64, 64, 64)),
    ):
        net = network(6, hidden)
        torch.nn.init.normal_(net.out.weight, std=0.1)

        def own(net: Any = net) -> Tensor:
            score, divergence = net.value_and_divergence(u)
            return (0.5 * score.square().sum(-1) + divergence).mean()

        def by_jacrev(net: Any = net, form: str = form) -> Tensor:
            score = torch.func.grad(net.potential) if form == "gradient" else net
            jacobian = torch.func.vmap(torch.func.jacrev(score))(u)
            square = torch.func.vmap(score)(u).square().sum(-1)
            return (0.5 * square + jacobian.diagonal(dim1=-1, dim2=-2).sum(-1)).mean()

        def by_vjp(net: Any = net, form: str = form) -> Tensor:
            point = u.clone().requires_grad_(True)
            if form == "gradient":
                score = torch.autograd.grad(net.potential(point).sum(), point, create_graph=True)[0]
            else:
                score = net(point)
            divergence = torch.zeros(count)
            for i in range(6):
                divergence = divergence + _vjp(score[:, i], point)[:, i]
            return (0.5 * score.square().sum(-1) + divergence).mean()

        with bench.cpu():
            fast, jacrev, vjp = _rates((own, by_jacrev, by_vjp), net, count, bench.quick)
        label = f"score-matching step, {form} form {'x'.join(map(str, hidden))}"
        bench.row(label, fast, "stars/s")
        bar = 3.0 if (form, hidden) != ("vector", (64, 64, 64)) else None
        bench.row(f"{label}: ratio to torch.func.jacrev", fast / jacrev, at_least=True, bar=bar)
        bench.row(f"{label}: ratio to a loop of vjp", fast / vjp, at_least=True, bar=bar)


def _vjp(component: Tensor, point: Tensor) -> Tensor:
    return torch.autograd.grad(component.sum(), point, create_graph=True)[0]


def _rates(
    losses: tuple[Callable[[], Tensor], ...], net: torch.nn.Module, count: int, quick: bool
) -> list[float]:
    """Stars per CPU-second of loss and gradient, the best of several turns: others share the caches."""
    best = [0.0] * len(losses)
    repeats = 3 if quick else 6
    for turn in range(3 if quick else 8):
        for i, loss in enumerate(losses):
            begin = time.process_time()
            for _ in range(repeats):
                net.zero_grad()
                loss().backward()
            if turn:
                best[i] = max(best[i], repeats * count / (time.process_time() - begin))
    return best
