"""The mock Milky Way, 10⁶ stars in a ball of 4 kpc: gravity and dark matter by all three inversions.

Score networks and flows are trained on disjoint quarters of the stars. Their mean score, at the stars, gives
the value; the four inversions of one quarter by its own network give the error, which so holds the noise of
the sample and of the networks. The moments' error is their jackknife. No network sees the symmetry of the
mock; the moments assume it. ρ_DM is the average over 0.5 < |z| < 2 kpc near the Sun's radius, smoothed, with
the mock's true baryons taken off. The models' settings are the package's own, the splines are those of the
moments: nothing was chosen on these stars. Four such draws make the 4·10⁶ stars of the last rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._gravity_moments import disc_stars
from benchmarks._gravity_parts import part
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
from galray.phasespace import Ball, FlowSettings, ScoreSettings, build_model, objective
from galray.training import ScoreTrainingSettings, TrainingSettings, fit, split
from galray.units import MSUN_PC3

__all__ = ["measure"]

QUARTERS = 4
DRAWS = (1, 11, 12, 13)
MODELS: dict[str, Any] = {
    "score": ScoreSettings(coordinates="cylindrical"),
    "flow": FlowSettings(coordinates="cylindrical"),
}
TRAINING: dict[str, Any] = {"score": ScoreTrainingSettings(epochs=8), "flow": TrainingSettings(epochs=8)}
POTENTIAL = PotentialSettings(basis="spline", base_splines=(8, 15))
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


def scores(method: str, count: int, draw: int, quarter: int) -> tuple[Tensor, float]:
    """Scores at all stars of a draw by the network of one quarter, and the CPU-seconds of both."""
    settings, training = MODELS[method], TRAINING[method]
    task = {
        "what": f"disc mock, {method}",
        "stars": count,
        "draw": draw,
        "quarter": quarter,
        "model": settings.model_dump(mode="json"),
        "training": {"epochs": training.epochs, "batch": training.batch_size, "rate": training.learning_rate},
    }

    def work(folder: Path) -> dict[str, Any]:
        w = torch.from_numpy(disc_stars(count, draw))
        own = w[quarter::QUARTERS]
        train, held = split(len(own), training.validation_fraction, quarter)
        model = build_model(method, settings, BALL, own[train], seed=quarter)
        goal = objective(method, settings)
        done = fit(model, goal, own[train].float(), own[held].float(), training, seed=quarter)
        found = torch.cat([model.score(chunk).detach() for chunk in w.split(32_768)])
        np.save(folder / "scores.npy", found.numpy().astype(np.float32))
        return {"best": done.best}

    found, folder = part(task, work)
    return torch.from_numpy(np.load(folder / "scores.npy").astype(float)), found["cpu_seconds"]


def inversion(method: str, count: int, draw: int) -> dict[str, Any]:
    """Errors and ρ_DM of one draw by one method: value, standard error, CPU-seconds."""

    def by_network(folder: Path) -> dict[str, Any]:
        w = torch.from_numpy(disc_stars(count, draw))
        found = [scores(method, count, draw, q)[0] for q in range(QUARTERS)]
        whole = fit_potential(torch.stack(found).mean(0), w, POTENTIAL, seed=0, ball=BALL)
        parts = [
            fit_potential(s[q::QUARTERS], w[q::QUARTERS], POTENTIAL, seed=0, ball=BALL)
            for q, s in enumerate(found)
        ]
        return {"value": dark_matter(whole), "parts": [dark_matter(f) for f in parts], **errors(whole, w)}

    def by_moments(folder: Path) -> dict[str, Any]:
        w = disc_stars(count, draw)
        moments = Moments(MomentsSettings(), BALL)
        blocks = moments.fit(w)[1]
        field, replicas = moments.jackknife(blocks)
        parts = [dark_matter(field.with_parameters(r)) for r in replicas]
        return {"value": dark_matter(field), "parts": parts, **errors(field, torch.from_numpy(w))}

    task: dict[str, Any] = {"what": f"disc mock, gravity by {method}", "stars": count, "draw": draw}
    if method == "moments":
        task["settings"] = MomentsSettings().model_dump(mode="json")
        found, _ = part(task, by_moments)
        spread, num = np.array(found["parts"]), len(found["parts"])
        error = np.sqrt((num - 1) / num * ((spread - spread.mean()) ** 2).sum())
        return {**found, "error": float(error), "dof": num - 1}
    spent = sum(scores(method, count, draw, q)[1] for q in range(QUARTERS))
    task["settings"] = [s.model_dump(mode="json") for s in (MODELS[method], TRAINING[method], POTENTIAL)]
    found, _ = part(task, by_network)
    return {
        **found,
        "error": float(np.std(found["parts"], ddof=1) / np.sqrt(QUARTERS)),
        "dof": QUARTERS - 1,
        "cpu_seconds": spent + found["cpu_seconds"],
    }


def measure(bench: Bench) -> None:
    torch.set_num_threads(1)
    count = 10**5 if bench.quick else 10**6
    methods = ("moments", "score", "flow")
    label = f"disc mock, {count:,} stars"
    one = {method: inversion(method, count, DRAWS[0]) for method in methods}
    for method, found in one.items():
        spent = found["cpu_seconds"]
        if method in BARS:
            strict = None if bench.quick else BARS[method]
            bench.row(f"{label}: {method}: a(x)", found["a"], "rms", bar=strict, cpu_seconds=spent)
            for name in ("a_R", "a_z"):
                bench.row(f"{label}: {method}: {name}", found[name], "rms", cpu_seconds=spent)
            bar = None if bench.quick else 3600.0
            bench.row(f"{label}: {method}: cost", spent, "CPU-s", bar=bar, cpu_seconds=spent)
        _density_rows(bench, f"{label}: {method}", _estimate(method, [found]), spent, 0.35)
    if bench.quick:
        return
    label = f"disc mock, {len(DRAWS) * count:,} stars"
    many = {method: [inversion(method, count, draw) for draw in DRAWS] for method in methods}
    spent = sum(f["cpu_seconds"] for found in many.values() for f in found)
    estimates = [_estimate(method, found) for method, found in many.items()]
    for estimate in (*estimates, combine_methods(estimates)):
        bar = 0.2 if estimate.method == "combined" else None
        _density_rows(bench, f"{label}: {estimate.method}", estimate, spent, bar)


def _estimate(method: str, found: list[dict[str, Any]]) -> Estimate:
    """The mean over draws, its error from each draw's own."""
    num = len(found)
    variance = np.array([[sum(f["error"] ** 2 for f in found) / num**2]])
    name = "statistics" if method == "moments" else "network"
    dof = np.array([float(num * found[0]["dof"])])
    value = np.array([np.mean([f["value"] for f in found])])
    return Estimate(method, value, {name: Term(variance, num * len(found[0]["parts"]), dof)})


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
