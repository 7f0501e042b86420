"""Where the error of the models of Hernquist's sphere with β = 1/2 sits: f ∝ E²/L diverges as L → 0.

The exact score is checked by finite differences of log f and by a Stein identity. With v_t the tangential
velocity f ∝ 1/v_t: as many stars in every interval of v_t down to none, and ∫ f |∂ᵥ log f|² d³v, which goes
as ∫ v_t⁻² dv_t, is infinite. No smooth model can follow that, at any radius.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from benchmarks import RESULTS, Bench
from benchmarks._phasespace_common import median_error, part, stars
from benchmarks._phasespace_score import averaged, task, train_part

__all__ = ["measure"]

RADII = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
TURNS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Edges of v_t / |v|."""


def measure(bench: Bench) -> None:
    """Checks of the exact score, and errors of one score network by radius and by v_t / |v|; a figure."""
    count, epochs = (2**14, 6) if bench.quick else (2**17, 12)
    truth, _, w = stars(count, 100, "Hernquist")
    exact = truth.score(w)
    with bench.cpu():
        steps = torch.eye(6, dtype=torch.float64) * 1e-6
        by_differences = torch.stack([truth.log_prob(w + h) - truth.log_prob(w - h) for h in steps], 1) / 2e-6
        identity = (exact[:, 3:] * w[:, 3:]).sum(1) + 3.0
    label = "Hernquist, beta = 1/2"
    bench.row(f"{label}: exact score against finite differences", median_error(by_differences, exact))
    bench.row(
        f"{label}: E[v·s_v] + 3 of the exact score",
        float(identity.mean()),
        peer=f"± {float(identity.std()) / len(w) ** 0.5:.3f}",
    )
    found = part(bench, "score", task(count, 0, 0, sphere="Hernquist", epochs=epochs), train_part)
    score = averaged([found])
    radius = w[:, :3].norm(dim=-1)
    radial = (w[:, :3] * w[:, 3:]).sum(-1) / radius
    speed = w[:, 3:].norm(dim=-1)
    turn = (speed.square() - radial.square()).clamp_min(0).sqrt() / speed
    curves = {}
    for name, value, edges in (("r", radius, RADII), ("v_t / |v|", turn, TURNS)):
        bins = [(value >= a) & (value < b) for a, b in itertools.pairwise(edges)]
        curves[name] = [median_error(score[some], exact[some]) for some in bins]
        for (a, b), some, error in zip(itertools.pairwise(edges), bins, curves[name], strict=True):
            share = f"{100 * float(some.double().mean()):.0f} % of the stars"
            bench.row(f"{label}, {count} stars: one score network, {name} {a:g} to {b:g}", error, peer=share)
    if not bench.quick:
        draw(curves, radius, turn, (score - exact).norm(dim=-1) / exact.norm(dim=-1))


def draw(curves: dict[str, list[float]], radius: Tensor, turn: Tensor, error: Tensor) -> None:
    """The error of every held-out star by radius and by v_t / |v|, with the medians."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9.0, 3.6), sharey=True, layout="constrained")
    for axes, (name, medians), value, edges in zip(
        panels, curves.items(), (radius, turn), (RADII, TURNS), strict=True
    ):
        axes.plot(value, error, ".", color="#0b6e99", alpha=0.15, markersize=2)
        axes.stairs(medians, np.maximum(edges, 0.02), color="#c05a1e", linewidth=2, baseline=None)
        axes.set_yscale("log")
        axes.set_ylim(0.01, 10)
        axes.set_xlabel(name)
    panels[0].set_xscale("log")
    panels[0].set_ylabel("error of the score")
    figure.suptitle("Hernquist, f ∝ E²/L: the error by radius and by direction of motion", fontsize=10)
    figure.savefig(RESULTS / "phasespace_hernquist.png", dpi=110)
    plt.close(figure)
