"""Flows: the cost of a training step, the score without an ODE, and stars without radial velocity."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import Bench
from benchmarks._phasespace_common import BALL, median_error, part, stars
from benchmarks._phasespace_flow import KINDS, trained
from galray.gravity import least_squares
from galray.phasespace import (
    FlowPart,
    FlowSettings,
    SightlineLikelihood,
    build_model,
    objective,
    project_out,
)
from galray.training import TrainingSettings, fit, split

__all__ = ["field_score", "sightlines", "step"]

OBSERVER = (-2.0, 0.0, 0.0)


def step(bench: Bench) -> None:
    """CPU time of an epoch of our loop over that of the barest loop on the same zuko flow and batches."""
    batch, epochs = TrainingSettings().batch_size, 3 if bench.quick else 5
    _, w, _ = stars(2**15 + 64, 1)
    for kind in ("mixture",):  # the cheapest step, on which a loop weighs most
        settings = FlowSettings(**_same_zuko(kind))
        with bench.cpu():
            ratios = [_overhead(settings, w, batch, epochs, kind) for _ in range(3)]
        bench.row(
            f"flow training step, {kind}, batch {batch}: time over a bare zuko loop's",
            statistics.median(ratios),
            bar=1.10,
            peer="1: zuko 1.6, Adam, no clipping, no average of weights",
        )


def _same_zuko(kind: str) -> dict[str, FlowPart]:
    one = FlowPart(kind=kind, transforms=2 if kind == "nsf" else 0, rotate=False)
    return {"position": one, "velocity": one}


def _overhead(settings: FlowSettings, w: torch.Tensor, batch: int, epochs: int, kind: str) -> float:
    """Median CPU time of an epoch, ours over the bare loop's; the two take turns."""
    train, held = w[:-64], w[-64:]
    model = build_model("flow", settings, BALL, train, seed=1)
    goal = objective("flow", settings)
    bare = build_model("flow", settings, BALL, train, seed=1)
    rows = goal.prepare(bare, train)
    density, conditional = bare.density.flow, bare.conditional.flow
    optimizer = torch.optim.Adam(bare.parameters(), lr=1e-3, fused=True)
    times: dict[str, list[float]] = {"own": [], "bare": []}

    def bare_epoch() -> None:
        order = torch.randperm(len(rows)).split(batch)
        for index in order:
            b = rows[index]
            optimizer.zero_grad()
            log_f = density().log_prob(b[:, 7:10]) + conditional(b[:, :3]).log_prob(b[:, 3:6])
            (-log_f.mean()).backward()
            optimizer.step()

    last = time.process_time()

    def turn(_: Any) -> None:
        nonlocal last
        times["own"].append(time.process_time() - last)
        begin = time.process_time()
        bare_epoch()
        times["bare"].append(time.process_time() - begin)
        last = time.process_time()

    training = TrainingSettings(epochs=epochs + 1, batch_size=batch)
    fit(model, goal, train.float(), held.float(), training, seed=1, on_epoch=turn)
    # the first epoch holds the preparation of the rows, and the first steps of both
    return statistics.median(times["own"][1:]) / statistics.median(times["bare"][1:])


def field_score(bench: Bench) -> None:
    """A continuous flow's ∂ log p/∂v by the gradient through its ODE, and by its field at t = 1."""

    def do(task: dict[str, Any]) -> dict[str, Any]:
        sphere, w, held = stars(task["stars"], 100)
        held = held[:4096]
        truth = sphere.score(held)[:, 3:]
        model = trained(w, "continuous", 1, task["passes"])
        begin = time.process_time()
        through = model.score(held)[:, 3:]
        ode = time.process_time() - begin
        u = model.chart(held).float()
        found = {"through the ODE": [median_error(through, truth), ode]}
        for t in (1.0, 0.9, 0.8):
            begin = time.process_time()
            with torch.no_grad():
                field = model.conditional.field.field_score(u[:, 3:], u[:, :3], time=t)
            error = median_error(field.double() / model.chart.scale[3:], truth)
            found[f"of the field at t = {t}"] = [error, time.process_time() - begin]
        return {"found": found}

    task = {
        "stars": 2**13 if bench.quick else 2**15,
        "passes": 2 if bench.quick else 16,
        "settings": KINDS["continuous"].model_dump(mode="json", exclude_unset=True),
    }
    found = part(bench, "flow-field", task, do)["found"]
    for name, (value, seconds) in found.items():
        bench.row(
            f"Plummer, {task['stars']} stars: continuous flow, d log p/dv {name}", value, cpu_seconds=seconds
        )


def sightlines(bench: Bench) -> None:
    """a(x) of a Plummer sphere seen from an off-centre place, 80 % of the radial velocities missing."""
    count, epochs = (2**12, 6) if bench.quick else (2**15, 20)
    # The bar is for the kind that integrates along the line of sight in closed form.
    for kind, bar in (("gaussians", 0.70), ("mixture", None)):
        for missing in ("at random", "for faint stars"):
            task = {"stars": count, "epochs": epochs, "kind": kind, "missing": missing}
            label = f"Plummer, {count} stars, 80 % of RV missing {missing}, {kind}: error of a(x)"
            found = {}
            for use in ("radial velocities alone", "all stars"):
                found[use] = part(bench, "flow-5d", {**task, "use": use}, _with_missing)
                error, seconds = found[use]["acceleration"], found[use]["cpu_seconds"]
                bench.row(f"{label}, {use}", error, cpu_seconds=seconds)
            alone, both = (one["acceleration"] for one in found.values())
            total = sum(one["cpu_seconds"] for one in found.values())
            bar = None if bench.quick else bar
            bench.row(f"{label}, all over alone", both / alone, bar=bar, cpu_seconds=total)


def _with_missing(task: dict[str, Any]) -> dict[str, Any]:
    sphere, w, held = stars(task["stars"], 100)
    generator = torch.Generator().manual_seed(3)
    if task["missing"] == "at random":
        known = torch.rand(len(w), generator=generator) < 0.2
    else:
        distance = (w[:, :3] - torch.tensor(OBSERVER, dtype=torch.float64)).norm(dim=-1)
        absolute = 1.5 * torch.randn(len(w), generator=generator, dtype=torch.float64)
        apparent = absolute + 5.0 * distance.log10()
        known = apparent < apparent.quantile(0.2)
    one = FlowPart(kind=task["kind"], hidden=(32, 32))
    settings = FlowSettings(position=one, velocity=one)
    goal: Any
    if task["use"] == "all stars":
        rows, goal = project_out(w, known, OBSERVER), SightlineLikelihood(OBSERVER, nodes=16, reach=6.0)
        training = TrainingSettings(epochs=task["epochs"], batch_size=512)
    else:  # a fifth of the stars: smaller batches and more passes, so that training is as long
        rows, goal = w[known], objective("flow", settings)
        training = TrainingSettings(epochs=2 * task["epochs"], batch_size=256, patience=15)
    train, val = split(len(rows), 0.1, 1)
    model = build_model("flow", settings, BALL, w[known], seed=1)
    fit(model, goal, rows[train].float(), rows[val].float(), training, seed=1)
    x = held[held[:, :3].norm(dim=-1) < 4.0][:500, :3]
    truth = sphere.potential_field.acceleration(x)
    draw: Callable[[], torch.Generator] = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    a = least_squares(model, x, num_velocities=500, generator=draw())
    return {"acceleration": median_error(a, truth), "stars_with_rv": int(known.sum())}
