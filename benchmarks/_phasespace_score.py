"""Score networks: error on spheres whose score is known, and the speed of one training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._phasespace_common import BALL, median_error, stars
from galray.phasespace import ScoreSettings, build_model, objective
from galray.phasespace.gradient_mlp import GradientMLP
from galray.phasespace.mlp import DivergenceMLP
from galray.training import TrainingSettings, fit, split

__all__ = ["measure", "trained"]

MEMBERS = 6


def trained(w: Tensor, settings: ScoreSettings, training: TrainingSettings, seed: int) -> Any:
    """A fresh model as built, and trained."""
    train, held = split(len(w), training.validation_fraction, seed)
    model = build_model("score", settings, BALL, w[train], seed=seed)
    fit(model, objective("score"), w[train].float(), w[held].float(), training, seed=seed)
    return model


def measure(bench: Bench) -> None:
    count, epochs, realisations, members = (2**14, 8, 1, 2) if bench.quick else (2**17, 20, 3, MEMBERS)
    training = TrainingSettings(epochs=epochs)
    forms = {
        "gradient": ScoreSettings(),
        "vector": ScoreSettings(form="vector", hidden=(64, 64, 64, 64)),
    }
    single: dict[str, list[float]] = {form: [] for form in forms}
    averaged: list[float] = []
    seconds: dict[str, float] = dict.fromkeys(forms, 0.0)
    label = f"Plummer, {count} stars"
    for realisation in range(realisations):
        sphere, w, held = stars(count, 100 + realisation)
        truth = sphere.score(held)
        total = torch.zeros_like(truth)
        for member in range(members):
            seed = 1000 * realisation + member
            for form, settings in forms.items():
                if form == "vector" and member:
                    continue
                begin = time.process_time()
                score = trained(w, settings, training, seed).score(held)
                seconds[form] += time.process_time() - begin
                if member == 0:
                    single[form].append(median_error(score, truth))
                if form == "gradient":
                    total += score
        averaged.append(median_error(total / members, truth))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    one = "31 % one spline flow, 11 CPU-min"
    for form, values in single.items():
        runs = realisations * (members if form == "gradient" else 1)
        bar = 0.09 if form == "gradient" and not bench.quick else None
        bench.row(
            f"{label}: one score network, {form} form",
            mean(values),
            bar=bar,
            peer=one,
            cpu_seconds=seconds[form] / runs,
        )
    bar = None if bench.quick else 0.07
    bench.row(
        f"{label}: {members} score networks averaged",
        mean(averaged),
        bar=bar,
        peer="8.6 % sixteen flows, 3 CPU-h",
        cpu_seconds=seconds["gradient"] / realisations,
    )
    _step(bench)


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
