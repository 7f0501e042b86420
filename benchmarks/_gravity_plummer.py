"""Plummer sphere, 2¹⁷ stars: acceleration and density from score networks, beside the exact score's.

G = M = b = 1, stars with r < 10, three realisations. Judged at 8192 points, r uniform in 0.5–3 b in random
directions: "a rms" is √⟨|a−a_t|²/|a_t|²⟩, "density rms" the same of ρ, "density L2" √(Σ(ρ−ρ_t)²/Σρ_t²). The
CPU time is all in: training of every network, their scores at the stars, and the inversion. No feature of the
networks or of the potential knows the sphere, its centre or its scale. The width of the masses was settled on
the first realisation with its truth in sight; the networks' training, and that eight of them take the mean of
three forms of the equation, on others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._gravity_parts import part, recipe
from galray.gravity import PotentialSettings, fit_potential
from galray.mocks import PlummerSphere
from galray.phasespace import Ball, ScoreSettings, build_model, load_model, objective, save_model
from galray.training import ScoreTrainingSettings, fit, split
from galray.units import G

__all__ = ["BEST", "HIGH", "averaged", "invert", "judge", "measure", "member", "rows", "stars"]

BALL = Ball((0.0, 0.0, 0.0), 10.0)
SCORE = ScoreSettings()
TRAINING = ScoreTrainingSettings()
POTENTIAL = PotentialSettings(basis="masses")
MEMBERS = 8
REALISATIONS = (0, 1, 2, 6, 7, 8)  # the last three are fresh: nothing was settled after them


def stars(count: int, realisation: int) -> tuple[PlummerSphere, Tensor]:
    """The sphere and its stars within the ball."""
    sphere = PlummerSphere(1.0 / G, 1.0)
    w = sphere.sample(int(1.05 * (count + 8192)), 100 + realisation)
    return sphere, w[BALL.contains(w[:, :3])][:count]


def places(count: int = 8192) -> Tensor:
    """Where the fields are judged: r uniform in 0.5–3 b, random directions."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    radius = 0.5 + 2.5 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return radius * direction / direction.norm(dim=1, keepdim=True)


def judge(field: Any, sphere: PlummerSphere) -> dict[str, float]:
    """The figures of a field."""
    x = places()
    a, density = field.acceleration(x), field.mass_density(x)
    true_a, true_density = sphere.potential_field.acceleration(x), sphere.potential_field.mass_density(x)
    error, missed = (a - true_a).norm(dim=1) / true_a.norm(dim=1), density - true_density
    along = ((a - true_a) * true_a).sum(1) / true_a.square().sum(1)
    return {
        "a rms": float(error.square().mean().sqrt()),
        "a bias": float(along.mean()),
        "density rms": float((missed / true_density).square().mean().sqrt()),
        "density L2": float((missed.square().sum() / true_density.square().sum()).sqrt()),
        "negative density": float((density < 0).double().mean()),
    }


def member(count: int, realisation: int, number: int, half: str, epochs: int) -> tuple[Tensor, float]:
    """Scores at all stars of one trained network, from the disk where it was trained before.

    Arguments:
        count: Stars.
        realisation: Of the stars.
        number: Of the member: its split, start and batches.
        half: ``""`` for all stars, ``"first"`` or ``"second"`` for the disjoint halves of a shuffle.
        epochs: Passes over its stars.

    Returns:
        Scores (n, 6), and the CPU-seconds of training and scoring.
    """
    training = TRAINING.model_copy(update={"epochs": epochs})
    task = {
        "what": "score network of a Plummer sphere",
        "stars": count,
        "realisation": realisation,
        "member": number,
        "half": half,
        "score": recipe(SCORE),
        "training": {"epochs": epochs, "batch_size": training.batch_size, "rate": training.learning_rate},
    }

    def work(folder: Path) -> dict[str, Any]:
        _, w = stars(count, realisation)
        order = torch.from_numpy(np.random.default_rng([77, number]).permutation(count))
        own = {"": w, "first": w[order[: count // 2]], "second": w[order[count // 2 :]]}[half]
        seed = 1000 * realisation + 10 * number + ["", "first", "second"].index(half)
        train, held = split(len(own), training.validation_fraction, seed)
        model = build_model("score", SCORE, BALL, own[train], seed=seed)
        fit(model, objective("score"), own[train].float(), own[held].float(), training, seed=seed)
        save_model(model, folder / "model")
        torch.save(load_model(folder / "model").score(w), folder / "scores.pt")
        return {}

    found, folder = part(task, work)
    return torch.load(folder / "scores.pt", weights_only=True), found["cpu_seconds"]


def averaged(count: int, realisation: int, members: int, epochs: int) -> tuple[Tensor, float]:
    """The mean score of several networks on the same stars, and the CPU-seconds of them all."""
    found = [member(count, realisation, number, "", epochs) for number in range(members)]
    mean = torch.stack([scores for scores, _ in found]).mean(0)
    return mean, sum(seconds for _, seconds in found)


def invert(
    label: str, sphere: PlummerSphere, w: Tensor, scores: Tensor, **update: Any
) -> tuple[dict[str, float], float]:
    """Figures of the potential fitted to scores, and the CPU-seconds of the fit.

    Arguments:
        label: Names the stars and the scores, by which the figures are kept on the disk.
        sphere: The truth.
        w: Stars (n, 6).
        scores: At the stars, (n, 6).
        update: Settings that differ from `POTENTIAL`, and ``partner``.
    """
    partner = update.pop("partner", None)
    settings = POTENTIAL.model_copy(update=update)
    models = [recipe(SCORE), recipe(TRAINING)]
    task = {"what": label, "potential": settings.model_dump(mode="json"), "stars": len(w), "recipe": models}

    def work(folder: Path) -> dict[str, Any]:
        field = fit_potential(scores, w, settings, seed=0, ball=BALL, partner=partner)
        return {"figures": judge(field, sphere)}

    found, _ = part(task, work)
    return found["figures"], found["cpu_seconds"]


def _mean(figures: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}


_CHEAP = "25 %, 95 %, 30 % (a, density rms, L2): FFJORD, 20 CPU-min"
BEST = "2.4 %, 22 %, 3.7 % (a, density rms, L2): 960 flows, GPU"
_LOW = {"a rms": 0.04, "density rms": 0.4, "density L2": 0.08, "CPU time": 1200.0}
HIGH = {"a rms": 0.023, "density rms": 0.2, "density L2": 0.037, "CPU time": 10_800.0}


def rows(
    bench: Bench,
    text: str,
    found: list[tuple[dict[str, float], float]],
    peer: str = "",
    bars: dict[str, float] | None = None,
) -> None:
    """The rows of figures and seconds, the mean over what was found."""
    seconds = sum(t for _, t in found) / len(found)
    figures = {**_mean([f for f, _ in found]), "CPU time": seconds}
    for quantity in ("a rms", "a bias", "density rms", "density L2", "CPU time"):
        bench.row(
            f"Plummer, {text}: {quantity}",
            figures[quantity],
            "s" if quantity == "CPU time" else "",
            bar=None if bench.quick else (bars or {}).get(quantity),
            peer=peer,
            cpu_seconds=seconds,
        )


def measure(bench: Bench) -> None:
    torch.set_num_threads(1)
    count, epochs, members = (2**14, 8, 2) if bench.quick else (2**17, 12, MEMBERS)
    label = f"{count} stars"
    one, many = [], []
    realisations = REALISATIONS[:1] if bench.quick else REALISATIONS
    for realisation in realisations[:3]:
        sphere, w = stars(count, realisation)
        score, spent = member(count, realisation, 0, "", epochs)
        figures, more = invert(f"one network, realisation {realisation}", sphere, w, score)
        one.append((figures, spent + more))
    rows(bench, f"{label}, one network, mean of {len(one)}", one, _CHEAP, _LOW)
    for realisation in realisations:
        sphere, w = stars(count, realisation)
        mean, spent = averaged(count, realisation, members, epochs)
        name = f"{members} networks, realisation {realisation}"
        figures, more = invert(name, sphere, w, mean, form="mean")
        many.append((figures, spent + more))
    for kind, some in (("first 3", many[:3]), ("fresh 3", many[3:]), ("all 6", many)):
        if some:
            text = f"{label}, mean score of {members} networks, mean of {kind}"
            rows(bench, text, some, BEST, HIGH)

    # what the form of the equation does, on the first realisation
    sphere, w = stars(count, 0)
    mean, spent = averaged(count, 0, members, epochs)
    halves = [member(count, 0, 0, half, epochs) for half in ("first", "second")]
    (first, second), pair = (s for s, _ in halves), sum(t for _, t in halves)
    exact = sphere.score(w)

    def row(
        text: str,
        source: str,
        scores: Tensor,
        training: float,
        peer: str = "",
        bars: dict[str, float] | None = None,
        **update: Any,
    ) -> None:
        figures, more = invert(source, sphere, w, scores, **update)
        rows(bench, f"{label}, {text}", [(figures, training + more)], peer, bars)

    both, name = f"{members} networks", "two networks on halves"
    row(f"mean of {both}, plain form", both, mean, spent)
    row("exact score", "exact score", exact, 0.0)
    row("exact score, Stein form (sampling noise)", "exact score", exact, 0.0, form="stein")
    row("network on half the stars", "half", first, pair / 2, "7.0 %, bias -4.9 %: first trial")
    row(f"{name}, crossed", "halves", first, pair, "6.3 %, bias -3.9 %: first trial", partner=second)
    row(f"{name}, Stein", "halves", first, pair, "5.2 %, bias -0.5 %: trial", partner=second, form="stein")
    row(f"mean of {both}, instrument", both, mean, spent, form="instrument")
    row(f"mean of {both}, Stein form", both, mean, spent, form="stein")
