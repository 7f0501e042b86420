"""How good a model is, without knowing the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.objectives import objective

__all__ = ["agreement", "curl", "held_out", "run_checks", "stein_identities", "two_sample"]

_TOLERANCE = 0.05
"""A deviation below this is no fault, however small its standard error: a 5 % error in a moment."""


def _row(value: float, error: float, expected: float | None, tolerance: float = _TOLERANCE) -> dict[str, Any]:
    ok = None
    if expected is not None:
        ok = bool(abs(value - expected) <= 4.0 * error + tolerance)
    return {"value": float(value), "error": float(error), "expected": expected, "ok": ok}


def _coordinate_scales(w: Tensor) -> Tensor:
    return w.std(0)


def stein_identities(model: Any, w: Tensor, ball: Any | None = None) -> dict[str, dict[str, Any]]:
    """Identities that ∇ log f fulfils exactly, whatever f: each with its standard error.

    Velocities have no border: E[s_v] = 0 and E[(v − v̄) s_vᵀ] = −I. Positions stop at the ball's, where
    the weight h = 1 − (d/r_max)² vanishes: E[h s_x + ∇h] = 0. Everything in units of each coordinate's
    standard deviation.

    Arguments:
        model: Anything with ``score``.
        w: Held-out stars, shape (n, 6).
        ball: The ball; None takes the model's.

    Returns:
        Rows {value, error, expected, ok} by name; ok when within 4 standard errors and 5 %.
    """
    w = w.to(torch.float64)
    ball = ball if ball is not None else model.ball
    s = model.score(w).to(torch.float64)
    scale = _coordinate_scales(w)
    s, u = s * scale, (w - w.mean(0)) / scale
    root = math.sqrt(len(w))
    found: dict[str, dict[str, Any]] = {}
    h, gradient = ball.edge_weight(w[:, :3])
    edge = h.unsqueeze(-1) * s[:, :3] + gradient * scale[:3]
    axes = ("x", "y", "z")
    for i, axis in enumerate(axes):
        found[f"E[s_v{axis}]"] = _row(s[:, 3 + i].mean(), s[:, 3 + i].std() / root, 0.0)
    for i, row in enumerate(axes):
        for j, column in enumerate(axes):
            product = u[:, 3 + i] * s[:, 3 + j]
            found[f"E[v_{row} s_v{column}]"] = _row(
                product.mean(), product.std() / root, -1.0 if i == j else 0.0
            )
    for i, axis in enumerate(axes):
        found[f"E[h s_{axis} + dh/d{axis}]"] = _row(edge[:, i].mean(), edge[:, i].std() / root, 0.0)
    return found


def held_out(model: Any, w: Tensor, *, seed: int, num_bootstrap: int = 200) -> dict[str, Any]:
    """The objective's own figure on held-out stars, with its bootstrap error.

    Arguments:
        model: A trained flow or score network.
        w: Held-out stars, shape (n, 6).
        seed: Of the bootstrap.
        num_bootstrap: Resamplings.

    Returns:
        A row {value, error, expected, ok} without expectation; name of the figure under ``name``.
    """
    goal = objective(model.kind, model.settings)
    losses = goal.validate(model, goal.prepare(model, w, validation=True)).to(torch.float64).cpu().numpy()
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    means = [losses[rng.integers(len(losses), size=len(losses))].mean() for _ in range(num_bootstrap)]
    return {**_row(losses.mean(), float(np.std(means, ddof=1)), None), "name": goal.name}


def curl(model: Any, w: Tensor, *, step: float = 1e-2) -> dict[str, Any]:
    """How far the score is from a gradient: |J − Jᵀ| / |J + Jᵀ| of its Jacobian, rms over stars.

    Central differences in units of each coordinate's standard deviation; zero for a flow up to rounding.

    Arguments:
        model: Anything with ``score``.
        w: Stars well inside the ball, shape (n, 6); a few hundred suffice.
        step: Step of the differences in standard deviations.
    """
    w = w.to(torch.float64)
    scale = _coordinate_scales(w)
    jacobian = torch.empty(len(w), 6, 6, dtype=torch.float64)
    for j in range(6):
        shift = torch.zeros(6, dtype=torch.float64)
        shift[j] = step * scale[j]
        jacobian[:, :, j] = (model.score(w + shift) - model.score(w - shift)) * scale / (2.0 * step)
    odd = (jacobian - jacobian.mT).square().sum((-1, -2))
    even = (jacobian + jacobian.mT).square().sum((-1, -2))
    ratio = (odd.mean() / even.mean()).sqrt()
    halves = [(odd[k::2].mean() / even[k::2].mean()).sqrt() for k in (0, 1)]
    return _row(float(ratio), abs(float(halves[0] - halves[1])) / 2.0, 0.0, tolerance=0.2)


def two_sample(model: Any, w: Tensor, *, seed: int, steps: int = 400) -> dict[str, Any]:
    """A classifier between the model's samples and held-out stars: its area under the ROC curve.

    A small network is trained on one half of both and judged on the other; 0.5 means it cannot tell them
    apart.

    Arguments:
        model: A flow with ``sample(n, generator)``.
        w: Held-out stars, shape (n, 6).
        seed: Of samples, weights and batches.
        steps: Training steps of 512 stars.

    Raises:
        GalrayError: The model cannot sample.
    """
    if not hasattr(model, "sample"):
        raise GalrayError("a two-sample test needs a model that samples", "use a flow")
    generator = torch.Generator().manual_seed(seed)
    real = w.to(torch.float64)
    fake = model.sample(len(real), generator).to(torch.float64)
    shift, scale = real.mean(0), real.std(0)
    u = ((torch.cat([real, fake]) - shift) / scale).to(torch.float32).clamp(-20, 20)
    label = torch.cat([torch.ones(len(real)), torch.zeros(len(fake))])
    order = torch.randperm(len(u), generator=generator)
    train, test = order[::2], order[1::2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (512,), generator=generator)]
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(u[batch]).squeeze(-1), label[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        logit = net(u[test]).squeeze(-1)
    positive, negative = label[test] > 0.5, label[test] < 0.5
    rank = torch.empty(len(logit), dtype=torch.float64)
    rank[logit.argsort()] = torch.arange(1, len(logit) + 1, dtype=torch.float64)
    n1, n0 = int(positive.sum()), int(negative.sum())
    area = (float(rank[positive].sum()) - n1 * (n1 + 1) / 2) / (n1 * n0)
    error = math.sqrt((n1 + n0 + 1) / (12.0 * n1 * n0))
    return _row(area, error, 0.5)


def agreement(first: Any, second: Any, w: Tensor) -> dict[str, Any]:
    """Median over stars of |s₁ − s₂| / |½(s₁ + s₂)|, components in units of the coordinates' scales."""
    w = w.to(torch.float64)
    scale = _coordinate_scales(w)
    a, b = first.score(w) * scale, second.score(w) * scale
    ratio = (a - b).norm(dim=-1) / (0.5 * (a + b)).norm(dim=-1)
    median = ratio.median()
    error = 1.2533 * float(ratio.clamp_max(float(4 * median)).std()) / math.sqrt(len(ratio))
    return _row(float(median), error, None)


def run_checks(model: Any, w: Tensor, *, seed: int, max_stars: int = 20_000) -> dict[str, dict[str, Any]]:
    """Every check that applies to a trained model.

    Arguments:
        model: A flow or a score network.
        w: Held-out stars, shape (n, 6), in kpc and km/s.
        seed: Of bootstrap, samples and classifier.
        max_stars: Most stars used.

    Returns:
        Rows {value, error, expected, ok} by name; ``expected`` and ``ok`` are None where nothing is expected.
    """
    w = w.to(torch.float64)
    if len(w) > max_stars:
        order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
        w = w[order[:max_stars]]
    found = stein_identities(model, w)
    figure = held_out(model, w, seed=seed)
    found[f"held-out {figure.pop('name')}"] = figure
    deep = w[(model.ball.edge_weight(w[:, :3])[0] > 0.2)][:500]
    if len(deep) >= 20:
        found["curl of the score"] = curl(model, deep)
    if hasattr(model, "sample"):
        found["two-sample classifier (AUC)"] = two_sample(model, w, seed=seed)
    return found
