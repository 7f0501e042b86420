"""Flows: error of their score on spheres where it is known, by kind, by number of stars, and averaged.

The score is averaged over the members of an ensemble: differentiate inside a member, combine after. Members
have other seeds: of weights, axes and batches, and of which tenth of the stars is held out.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._phasespace_common import BALL, mean, median_error, part, stars
from galray.phasespace import FlowPart, FlowSettings, build_model, objective
from galray.training import TrainingSettings, fit, split

__all__ = ["KINDS", "measure", "trained"]

ONE = "31 % one spline flow, 11 CPU-min"
MANY = "8.6 % sixteen flows, 3 CPU-h"

_GAUSSIANS = FlowPart(kind="gaussians", bins=24)
_AFFINE = FlowPart(kind="maf", transforms=4)
_SPLINES = FlowPart(kind="nsf", transforms=2)
_CONTINUOUS = FlowPart(kind="continuous", hidden=(128, 128, 128))
KINDS = {
    "mixture": FlowSettings(position=_GAUSSIANS, velocity=FlowPart(hidden=(64, 64, 64), bins=4)),
    "gaussians": FlowSettings(position=_GAUSSIANS, velocity=FlowPart(kind="gaussians")),
    "maf": FlowSettings(position=_AFFINE, velocity=_AFFINE),
    "nsf": FlowSettings(position=_SPLINES, velocity=_SPLINES),
    "continuous": FlowSettings(position=_CONTINUOUS, velocity=_CONTINUOUS),
}
BEST = "mixture"
MEMBERS, REALISATIONS = 6, 3
PASSES = {"nsf": 8}
"""Passes over 2^17 stars, where not 16: a step of the splines costs four times as much."""


SHORTER = (4, 8)
"""Passes over 2^17 stars that the time curve adds to those of the table."""


def trained(w: Tensor, kind: str, seed: int, passes: int) -> Any:
    """A flow of a kind, trained on stars (n, 6) of the benchmark's ball.

    Arguments:
        w: Stars in kpc and km/s.
        kind: Of `KINDS`.
        seed: Of everything random.
        passes: Epochs for 2^17 stars; twice as many for a quarter of them.
    """
    settings = KINDS[kind]
    training = TrainingSettings(
        epochs=max(1, round(passes * math.sqrt(2**17 / len(w)))),
        batch_size=1024 if len(w) >= 2**16 else 512,
    )
    train, held = split(len(w), training.validation_fraction, seed)
    model = build_model("flow", settings, BALL, w[train], seed=seed)
    goal = objective("flow", settings)
    fit(model, goal, w[train].float(), w[held].float(), training, seed=seed)
    return model


def _members(task: dict[str, Any]) -> dict[str, Any]:
    """The error of every member, and of the running average."""
    truth_of, w, held = stars(task["stars"], 100 + task["realisation"], task["sphere"])
    truth = truth_of.score(held)
    total = torch.zeros_like(truth)
    found: dict[str, list[float]] = {"single": [], "average": [], "seconds": []}
    for member in range(task["members"]):
        begin = time.process_time()
        model = trained(w, task["kind"], 1000 * task["realisation"] + member, task["passes"])
        score = model.score(held)
        found["seconds"].append(time.process_time() - begin)
        total += score
        found["single"].append(median_error(score, truth))
        found["average"].append(median_error(total / (member + 1), truth))
    return found


def _errors(
    bench: Bench,
    kind: str,
    count: int,
    members: int,
    realisation: int,
    sphere: str = "Plummer",
    passes: int | None = None,
) -> dict[str, Any]:
    task = {
        "kind": kind,
        "settings": KINDS[kind].model_dump(mode="json", exclude_unset=True),
        "stars": count,
        "members": members,
        "realisation": realisation,
        "sphere": sphere,
        "passes": passes or (2 if bench.quick else PASSES.get(kind, 16)),
    }
    return part(bench, "flow", task, _members)


def measure(bench: Bench) -> None:
    """Every row of the group."""
    from benchmarks import _phasespace_flow_extras as extras

    full = 2**14 if bench.quick else 2**17
    extras.sightlines(bench)
    extras.step(bench)
    _best(bench, full)
    _by_number(bench, full)
    _other_kinds(bench, 2**13 if bench.quick else 2**15)
    extras.field_score(bench)


def _best(bench: Bench, full: int) -> None:
    members, realisations = (2, 1) if bench.quick else (MEMBERS, REALISATIONS)
    found = [_errors(bench, BEST, full, members, r) for r in range(realisations)]
    suffix = f" ({realisations} realisations)"
    bench.row(
        f"Plummer, {full} stars: one flow, {BEST}{suffix}",
        mean([f["single"][0] for f in found]),
        bar=None if bench.quick else 0.20,
        peer=ONE,
        cpu_seconds=mean([f["seconds"][0] for f in found]),
    )
    for some in sorted({2, members}):
        last = some == members
        bench.row(
            f"Plummer, {full} stars: {some} flows averaged, {BEST}{suffix}",
            mean([f["average"][some - 1] for f in found]),
            bar=0.08 if last and not bench.quick else None,
            peer=MANY if last else "",
            cpu_seconds=mean([sum(f["seconds"][:some]) for f in found]),
        )
    members = 2
    one = _errors(bench, BEST, full, members, 0, "Hernquist")
    label = f"Hernquist, beta = 1/2, {full} stars (1 realisation)"
    bench.row(f"{label}: one flow, {BEST}", mean(one["single"]), cpu_seconds=mean(one["seconds"]))
    bench.row(
        f"{label}: {members} flows averaged, {BEST}", one["average"][-1], cpu_seconds=sum(one["seconds"])
    )


def _by_number(bench: Bench, full: int) -> None:
    """How the error of one flow and of a few falls with the number of stars."""
    for count in (full // 8, full // 4, full // 2, 2 * full, 4 * full, 8 * full):
        found = _errors(bench, BEST, count, 2, 0)
        label = f"Plummer, {count} stars"
        bench.row(
            f"{label}: one flow, {BEST} (1 realisation)",
            mean(found["single"]),
            cpu_seconds=mean(found["seconds"]),
        )
        bench.row(
            f"{label}: 2 flows averaged, {BEST} (1 realisation)",
            found["average"][-1],
            cpu_seconds=sum(found["seconds"]),
        )
    for passes in () if bench.quick else SHORTER:
        one = _errors(bench, BEST, full, 1, 0, passes=passes)
        label = f"Plummer, {full} stars, {passes} epochs: one flow, {BEST} (1 realisation)"
        bench.row(label, one["single"][0], cpu_seconds=one["seconds"][0])


def _other_kinds(bench: Bench, count: int) -> None:
    for kind in KINDS:
        if kind != BEST:
            found = _errors(bench, kind, count, 1, 0)
            label = f"Kinds of flow, Plummer, {count} stars: {kind} (1 realisation)"
            bench.row(label, found["single"][0], peer=ONE, cpu_seconds=found["seconds"][0])
