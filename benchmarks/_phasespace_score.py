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
    """Stars per second of one training step: tangents pushed forward against autograd of the score."""
    net = GradientMLP(6, (64, 64, 64))
    torch.nn.init.normal_(net.out.weight, std=0.1)
    u = torch.randn(1024, 6)

    def pushed() -> Tensor:
        score, divergence = net.value_and_divergence(u)
        return (0.5 * score.square().sum(-1) + divergence).mean()

    def autograd() -> Tensor:
        score = torch.func.grad(lambda p: net.potential(p))
        jacobian = torch.func.vmap(torch.func.jacrev(score))(u)
        return (
            0.5 * torch.func.vmap(score)(u).square().sum(-1) + jacobian.diagonal(dim1=-1, dim2=-2).sum(-1)
        ).mean()

    def rate(loss: Callable[[], Tensor]) -> float:
        repeats = 5 if bench.quick else 20
        for timed in (False, True):
            begin = time.process_time()
            for _ in range(repeats if timed else 2):
                net.zero_grad()
                loss().backward()
        return repeats * len(u) / (time.process_time() - begin)

    fast, slow = rate(pushed), rate(autograd)
    bench.row("score-matching step: forward Laplacian", fast, "stars/s", cpu_seconds=0.0)
    bench.row(
        "score-matching step: ratio to torch.func.jacrev",
        fast / slow,
        at_least=True,
        bar=3.0,
        cpu_seconds=0.0,
    )
