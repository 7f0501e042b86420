"""What the groups of the phase-space benchmark share: stars, errors, and parts that are kept on disk.

Stars are drawn from the exact distribution function with G = M = scale = 1 and r < 10; the error of a model
is |Δs| / |s_true| over the six components, its median over 8192 held-out stars.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import Bench
from galray.mocks import EddingtonSphere, PlummerSphere
from galray.phasespace import Ball
from galray.potentials import Hernquist
from galray.provenance import content_hash, write_atomic
from galray.units import G

__all__ = ["BALL", "HELD_OUT", "PARTS", "mean", "median_error", "part", "sphere", "stars"]

BALL = Ball((0.0, 0.0, 0.0), 10.0)
HELD_OUT = 8192
PARTS = Path(__file__).parents[1] / "runs" / "benchmarks" / "phasespace"


def sphere(name: str = "Plummer") -> Any:
    """A sphere of known f with G = M = scale = 1.

    Arguments:
        name: ``Plummer`` (isotropic) or ``Hernquist`` (β = 1/2 everywhere: f ∝ E²/L).
    """
    if name == "Plummer":
        return PlummerSphere(1.0 / G, 1.0)
    potential = Hernquist(1.0 / G, 1.0)
    return EddingtonSphere(potential, potential, beta=0.5)


def stars(count: int, seed: int, name: str = "Plummer") -> tuple[Any, Tensor, Tensor]:
    """A sphere, its stars and the held-out stars that models are judged on: shapes (count, 6), (8192, 6)."""
    truth = sphere(name)
    w = truth.sample(int(1.3 * (count + HELD_OUT)), seed)
    w = w[BALL.contains(w[:, :3])]
    return truth, w[:count], w[count : count + HELD_OUT]


def median_error(score: Tensor, truth: Tensor) -> float:
    """Median of |s − s_true| / |s_true|."""
    return float(((score - truth).norm(dim=-1) / truth.norm(dim=-1)).median())


def mean(values: list[float]) -> float:
    """The mean of a few figures."""
    return sum(values) / len(values)


def part(
    bench: Bench, what: str, task: dict[str, Any], do: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """A part from the disk, or done now and kept there.

    Arguments:
        bench: Its option ``again`` measures anew.
        what: Name of the kind of part.
        task: What decides the result, as JSON values.
        do: Does it; gives JSON values, to which ``cpu_seconds`` is added.
    """
    path = PARTS / f"{what}-{content_hash(task)}.json"
    if path.is_file() and not getattr(bench.options, "again", False):
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    begin = time.process_time()
    found = do(task)
    found = {"cpu_seconds": time.process_time() - begin, **found, "task": task}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, found)
    return found
