"""Score networks and a flow on the mock Milky Way: its f has no closed form, its gravity is exact."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._phasespace_common import PARTS, part
from galray.gravity import PotentialSettings, fit_potential
from galray.mocks import MilkyWay, MilkyWaySettings
from galray.phasespace import Ball, FlowSettings, ScoreSettings, build_model, objective
from galray.training import ScoreTrainingSettings, TrainingSettings, fit, split

__all__ = ["measure"]

RADIUS = 4.0  # kpc, of the ball of stars
PLACES = 4096
DRAWN, BEYOND, SEED = 400_000, 4.5, 7  # stars of the draw, its radius in kpc, its seed
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gradient form": ({}, {}),
    "gradient form, base of 3 Gaussians": ({"base": {"components": 3}}, {}),
    "vector form, rich base": (
        {
            "form": "vector",
            "hidden": (128, 128),
            "base": {"components": 6, "hidden": (64, 64), "star_passes": 4e6},
        },
        {"batch_size": 2048, "learning_rate": 3e-3},
    ),
}


def disc_stars(count: int) -> tuple[MilkyWay, Ball, Tensor]:
    """The mock Galaxy, its ball, and so many of its stars without measurement errors.

    They are the first of one draw, which takes minutes and is kept.
    """
    galaxy = MilkyWay(MilkyWaySettings(num_stars=DRAWN, ball_radius_kpc=BEYOND))
    path = PARTS / f"disc-{DRAWN}-{BEYOND:g}-{SEED}.parquet"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(galaxy.sample(SEED), path)
    table = pq.read_table(path)
    w = torch.from_numpy(np.stack([table[name].to_numpy() for name in ("x", "y", "z", "vx", "vy", "vz")], 1))
    ball = Ball(galaxy.frame.sun_position, RADIUS)
    return galaxy, ball, w[ball.contains(w[:, :3])][:count]


def disc_part(task: dict[str, Any]) -> dict[str, Any]:
    """Train one model on the disc, solve for the potential, and compare its gravity with the truth.

    Arguments:
        task: ``stars``, ``seed``, ``score`` or ``flow``, and ``training`` (settings as JSON values).

    Returns:
        Root mean square of Δa_R and Δa_z at stars within 0.8 of the radius, each over the rms of the truth,
        for the least-squares form and for the instrument's; the held-out loss.
    """
    galaxy, ball, w = disc_stars(task["stars"])
    begin = time.process_time()
    kind = "score" if "score" in task else "flow"
    settings: Any = (ScoreSettings if kind == "score" else FlowSettings).model_validate(task[kind])
    training = TrainingSettings.model_validate(task["training"])
    train, other = split(len(w), training.validation_fraction, task["seed"])
    model = build_model(kind, settings, ball, w[train], seed=task["seed"])
    goal = objective(kind, settings)
    result = fit(model, goal, w[train].float(), w[other].float(), training, seed=task["seed"])
    seconds = time.process_time() - begin
    scores = model.score(w)
    deep = (w[:, :3] - torch.tensor(ball.center)).norm(dim=-1) < 0.8 * ball.radius
    places = w[deep][:PLACES, :3]
    truth = _meridional(places, galaxy.potential.acceleration(places))
    found: dict[str, Any] = {"cpu_seconds": seconds, "loss": result.best}
    for form in ("plain", "instrument"):
        options = PotentialSettings(basis="spline", form=form)
        field = fit_potential(scores, w, options, seed=1, ball=ball)
        error = _meridional(places, field.acceleration(places)) - truth
        for i, name in enumerate(("a_R", "a_z")):
            found[f"{form} {name}"] = float(
                (error[:, i].square().mean() / truth[:, i].square().mean()).sqrt()
            )
    return found


def _meridional(x: Tensor, a: Tensor) -> Tensor:
    """(a_R, a_z), shape (n, 2)."""
    radius = torch.hypot(x[:, 0], x[:, 1])
    return torch.stack([(a[:, 0] * x[:, 0] + a[:, 1] * x[:, 1]) / radius, a[:, 2]], -1)


def measure(bench: Bench) -> None:
    """Errors of gravity from the score, for the free form, the gradient form and a flow."""
    count, epochs = (2**14, 3) if bench.quick else (2**17, 10)
    for name, (score, training) in FORMS.items():
        task = {
            "stars": count,
            "seed": 1,
            "score": ScoreSettings.model_validate(score | {"coordinates": "cylindrical"}).model_dump(
                mode="json"
            ),
            "training": ScoreTrainingSettings(**training, epochs=epochs).model_dump(mode="json"),
        }
        rows_of(bench, f"disc mock, {count} stars, {name}", task)
    flow = {
        "stars": count,
        "seed": 1,
        "flow": {"coordinates": "cylindrical"},
        "training": TrainingSettings(epochs=3 if bench.quick else 16).model_dump(mode="json"),
    }
    rows_of(bench, f"disc mock, {count} stars, flow", flow)


def rows_of(bench: Bench, label: str, task: dict[str, Any]) -> None:
    """The rows of one model."""
    found = part(bench, "disc", task, disc_part)
    for form in ("plain", "instrument"):
        for component in ("a_R", "a_z"):
            bench.row(
                f"{label}: rms error of {component}, {form} least squares",
                found[f"{form} {component}"],
                cpu_seconds=found["cpu_seconds"],
            )
    bench.row(f"{label}: held-out loss", found["loss"], cpu_seconds=found["cpu_seconds"])
