"""The mock Milky Way, 10⁶ stars in a ball of 4 kpc: gravity and dark matter by all three inversions.

Networks of three seeds are trained on all stars; their mean score gives the value. Its error has two parts,
both from four networks more, each trained on a quarter of the stars by the same recipe and inverted with
them: the scatter of the four, which holds the noise of the sample and of the networks, and how far their mean
is from the value, which is what networks smooth away where stars are few. The moments' error is their
jackknife. No network sees the symmetry of the mock; the moments and the splines of Φ assume it. ρ_DM is the
average over 0.5 < |z| < 2 kpc near the Sun's radius, smoothed, with the mock's true baryons taken off. The
models' settings were chosen on draws that no row uses (2, and for the penalty of Φ 21 too); the first draw's
rows had been looked at before, so a fresh draw has its own. Four draws, each with one network of a kind, make
the 4·10⁶ stars of the last rows: there the scatter is that of the draws, and what networks smooth away is the
first draw's, since each network still sees 10⁶ stars.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._gravity_moments import disc_stars
from benchmarks._gravity_parts import part, recipe
from galray.ensemble import Estimate, Term, combine_methods
from galray.gravity import (
    HaloSettings,
    Kernel,
    Moments,
    MomentsSettings,
    PotentialSettings,
    averaging_points,
    fit_potential,
    smooth,
    smoothed_density,
)
from galray.mocks import MilkyWay, MilkyWaySettings
from galray.phasespace import (
    Ball,
    BaseSettings,
    FlowPart,
    FlowSettings,
    ScoreSettings,
    build_model,
    objective,
)
from galray.training import ScoreTrainingSettings, TrainingSettings, fit, split
from galray.units import MSUN_PC3

__all__ = ["measure"]

QUARTERS = 4
MEMBERS = 3
DRAWS = (1, 3, 4, 11)
FRESH = 31  # of the rows that no settings were chosen after
# Vertical motion is nearly a motion of its own: a flow along the chart's axes needs few stars to see that,
# one along turned axes many. Two Gaussians in velocity (disc and halo) leave the score network less to learn.
_MIXTURE = FlowPart(kind="mixture", bins=8, rotate=False)
_VELOCITY = FlowPart(hidden=(64, 64, 64), bins=4, rotate=False)
MODELS: dict[str, Any] = {
    "flow": FlowSettings(coordinates="cylindrical", position=_MIXTURE, velocity=_VELOCITY),
    "score": ScoreSettings(coordinates="cylindrical", base=BaseSettings(components=2, star_passes=2e6)),
}
TRAINING: dict[str, Any] = {
    "score": ScoreTrainingSettings(epochs=5, validation_fraction=0.02),
    "flow": TrainingSettings(epochs=4, batch_size=1024, learning_rate=6e-3, validation_fraction=0.02),
}
# Held-out stars cannot choose the penalty: they share the ripples of the network's n(z), alike in all draws.
POTENTIAL = PotentialSettings(basis="spline", base_splines=(8, 15), penalty=0.03)
BARS = {"score": 0.03, "flow": 0.05}
GALAXY = MilkyWay(MilkyWaySettings(ball_radius_kpc=4.0))
BALL = Ball(GALAXY.frame.sun_position, 4.0)
KERNEL = Kernel()
POINTS = averaging_points(HaloSettings(), BALL, KERNEL, GALAXY.frame)


def dark_matter(field: Any) -> float:
    """The averaged ρ_DM of a field in Msun/pc³, true baryons taken off."""
    total = smoothed_density(field, POINTS.x, KERNEL).detach()
    return POINTS.average(total - smooth(GALAXY.baryons.mass_density, POINTS.x, KERNEL))[0] / MSUN_PC3


def truth() -> float:
    """The same of the mock's halo."""
    return POINTS.average(smooth(GALAXY.halo.mass_density, POINTS.x, KERNEL))[0] / MSUN_PC3


def errors(field: Any, w: Tensor) -> dict[str, float]:
    """Root mean squares of Δa, Δa_R and Δa_z at stars within 0.8 of the radius, over those of the truth."""
    deep = (w[:, :3] - torch.tensor(BALL.center)).norm(dim=1) < 0.8 * BALL.radius
    x = w[deep][:8192, :3]
    true = GALAXY.potential.acceleration(x)
    wrong = field.acceleration(x).detach() - true
    outward = x[:, :2] / x[:, :2].norm(dim=1, keepdim=True)

    def size(a: Tensor) -> dict[str, Tensor]:
        return {"a": a.norm(), "a_R": (a[:, :2] * outward).sum(1).norm(), "a_z": a[:, 2].norm()}

    return {name: float(value / size(true)[name]) for name, value in size(wrong).items()}


def scores(method: str, count: int, draw: int, seed: int, quarter: bool = False) -> tuple[Tensor, float]:
    """Scores of a network at the stars it is trained on, and the CPU-seconds of both.

    Arguments:
        method: ``score`` or ``flow``.
        count: Stars of the draw.
        draw: Of the mock.
        seed: Of the network.
        quarter: Take every `QUARTERS`-th star from the `seed`-th on, not all.
    """
    settings, training = MODELS[method], TRAINING[method]
    task = {
        "what": f"disc mock, {method}",
        "stars": count,
        "draw": draw,
        "seed": seed,
        "quarter": quarter,
        "model": recipe(settings),
        "training": recipe(training),
    }

    def work(folder: Path) -> dict[str, Any]:
        own = _stars(count, draw, seed if quarter else None)
        train, held = split(len(own), training.validation_fraction, seed)
        model = build_model(method, settings, BALL, own[train], seed=seed)
        goal = objective(method, settings)
        done = fit(model, goal, own[train].float(), own[held].float(), training, seed=seed)
        found = torch.cat([model.score(chunk).detach() for chunk in own.split(32_768)])
        np.save(folder / "scores.npy", found.numpy().astype(np.float32))
        return {"best": done.best, "curve": [row["validation"] for row in done.curve]}

    found, folder = part(task, work)
    return torch.from_numpy(np.load(folder / "scores.npy").astype(float)), found["cpu_seconds"]


def _stars(count: int, draw: int, quarter: int | None = None) -> Tensor:
    w = torch.from_numpy(disc_stars(count, draw))
    return w if quarter is None else w[quarter::QUARTERS]


def by_networks(method: str, count: int, draw: int, members: int) -> dict[str, Any]:
    """Errors and ρ_DM of one draw by the mean score of some networks, with the CPU-seconds."""
    seeds = range(draw, draw + members)  # draws share none

    def work(folder: Path) -> dict[str, Any]:
        w = _stars(count, draw)
        mean = torch.stack([scores(method, count, draw, seed)[0] for seed in seeds]).mean(0)
        field = fit_potential(mean, w, POTENTIAL, seed=0, ball=BALL)
        return {"value": dark_matter(field), **errors(field, w)}

    spent = sum(scores(method, count, draw, seed)[1] for seed in seeds)
    found, _ = part(_task(method, count, draw, {"members": members}), work)
    return {**found, "cpu_seconds": spent + found["cpu_seconds"]}


def by_quarters(method: str, count: int, draw: int) -> dict[str, Any]:
    """ρ_DM of each quarter of a draw by a network of its own, with the CPU-seconds."""

    def work(folder: Path) -> dict[str, Any]:
        parts = []
        for k in range(QUARTERS):
            w = _stars(count, draw, k)
            found = scores(method, count, draw, k, True)[0]
            parts.append(dark_matter(fit_potential(found, w, POTENTIAL, seed=0, ball=BALL)))
        return {"parts": parts}

    spent = sum(scores(method, count, draw, k, True)[1] for k in range(QUARTERS))
    found, _ = part(_task(method, count, draw, {"quarters": QUARTERS}), work)
    return {**found, "cpu_seconds": spent + found["cpu_seconds"]}


def by_moments(count: int, draw: int) -> dict[str, Any]:
    """Errors and ρ_DM of one draw by the moments, its jackknife replicas, the CPU-seconds."""

    def work(folder: Path) -> dict[str, Any]:
        w = disc_stars(count, draw)
        moments = Moments(MomentsSettings(), BALL)
        field, replicas = moments.jackknife(moments.fit(w)[1])
        parts = [dark_matter(field.with_parameters(r)) for r in replicas]
        return {"value": dark_matter(field), "parts": parts, **errors(field, torch.from_numpy(w))}

    task = {"what": "disc mock, gravity by moments", "stars": count, "draw": draw}
    return part({**task, "settings": MomentsSettings().model_dump(mode="json")}, work)[0]


def _task(method: str, count: int, draw: int, more: dict[str, Any]) -> dict[str, Any]:
    settings = [recipe(s) for s in (MODELS[method], TRAINING[method], POTENTIAL)]
    task = {
        "what": f"disc mock, gravity by {method}",
        "stars": count,
        "draw": draw,
        "settings": settings,
    }
    return {**task, **more}


def _jackknifed(found: list[dict[str, Any]]) -> Estimate:
    """The moments' mean over draws."""
    num = len(found)
    spreads = [np.array(f["parts"]) for f in found]
    variance = sum((len(s) - 1) / len(s) * ((s - s.mean()) ** 2).sum() for s in spreads) / num**2
    dof = sum(len(s) - 1.0 for s in spreads)
    count = sum(map(len, spreads))
    value = np.array([np.mean([f["value"] for f in found])])
    return Estimate("moments", value, {"statistics": Term(np.array([[variance]]), count, np.array([dof]))})


def _learned(method: str, found: list[dict[str, Any]], quarters: dict[str, Any]) -> Estimate:
    """The networks' mean over draws: scatter of the quarters, or of the draws, and what networks smooth."""
    value = np.array([np.mean([f["value"] for f in found])])
    several = [f["value"] for f in found] if len(found) > 1 else quarters["parts"]
    scatter = np.var(several, ddof=1) / len(several)
    shift = np.mean(quarters["parts"]) - quarters["value"]
    variance = np.array([[scatter + shift**2]])
    dof = np.array([len(several) - 1.0])
    return Estimate(method, value, {"network": Term(variance, len(several), dof)})


def measure(bench: Bench) -> None:
    torch.set_num_threads(1)
    count = 10**5 if bench.quick else 10**6
    found = _one_draw(bench, f"disc mock, {count:,} stars", count, DRAWS[0])
    if bench.quick:
        return
    label = f"disc mock, {len(DRAWS) * count:,} stars"
    many = {method: [by_networks(method, count, draw, 1) for draw in DRAWS] for method in MODELS}
    many["moments"] = [by_moments(count, draw) for draw in DRAWS]
    spent = sum(f["cpu_seconds"] for f in (*found.values(), *(f for parts in many.values() for f in parts)))
    estimates = [_learned(method, many[method], found[method]) for method in MODELS]
    estimates.append(_jackknifed(many["moments"]))
    for estimate in (*estimates, combine_methods(estimates)):
        bar = 0.2 if estimate.method == "combined" else None
        _density_rows(bench, f"{label}: {estimate.method}", estimate, spent, bar)
    _one_draw(bench, f"disc mock, {count:,} stars, fresh draw", count, FRESH)


def _one_draw(bench: Bench, label: str, count: int, draw: int) -> dict[str, dict[str, Any]]:
    """Rows of one draw by all three inversions; what the quarters of each kind of network found."""
    found = by_moments(count, draw)
    _density_rows(bench, f"{label}: moments", _jackknifed([found]), found["cpu_seconds"], 0.35)
    quarters = {}
    for method in MODELS:
        found = by_networks(method, count, draw, MEMBERS)
        quarters[method] = {**by_quarters(method, count, draw), "value": found["value"]}
        spent = found["cpu_seconds"] + quarters[method]["cpu_seconds"]
        bar = None if bench.quick else BARS[method]
        bench.row(f"{label}: {method}: a(x)", found["a"], "rms", bar=bar, cpu_seconds=spent)
        for name in ("a_R", "a_z"):
            bench.row(f"{label}: {method}: {name}", found[name], "rms", cpu_seconds=spent)
        bar = None if bench.quick else 3600.0
        bench.row(f"{label}: {method}: cost", spent, "CPU-s", bar=bar, cpu_seconds=spent)
        _density_rows(bench, f"{label}: {method}", _learned(method, [found], quarters[method]), spent, 0.35)
    return quarters


def _density_rows(bench: Bench, label: str, estimate: Estimate, spent: float, bar: float | None) -> None:
    """ρ_DM, how far it is from the truth, and that in its errors."""
    true, value, error = truth(), float(estimate.value[0]), float(estimate.error[0])
    peer = f"truth {true:.5f}"
    where = f"{label}: rho_DM at 0.5 < |z| < 2 kpc"
    bench.row(where, value, "Msun/pc3", peer=peer, cpu_seconds=spent)
    bench.row(f"{where}, error", error, "Msun/pc3", cpu_seconds=spent)
    limit = None if bench.quick else bar
    bench.row(f"{where}, off by", abs(value / true - 1), bar=limit, cpu_seconds=spent)
    limit = None if bench.quick or bar is None else 2.0
    bench.row(f"{where}, pull", abs(value - true) / error, "sigma", bar=limit, cpu_seconds=spent)
