"""Stein's identities: what ∇ log f fulfils exactly, whatever f, tested on held-out stars.

For any smooth g that vanishes where the stars end, E[g ∇ log f + ∇g] = 0 (integration by parts). Each choice
of g tests something: constants and coordinates the overall mean and scale, kernels the same place by place,
the score itself whether it has learnt noise by heart.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from galray.phasespace.findings import Finding
from galray.phasespace.transforms import Ball

__all__ = ["curl_and_noise", "local_identities", "stein_identities"]

AXES = ("x", "y", "z")
PLACES = 24
"""Kernels of the local identities."""
LOCAL_TOLERANCE = 0.1
"""A local bias of a tenth of the score is no fault yet."""


def _mean(values: Tensor, expected: float, tolerance: float = 0.05) -> Finding:
    return Finding(
        float(values.mean()), float(values.std()) / math.sqrt(len(values)), expected, tolerance=tolerance
    )


def stein_identities(model: Any, w: Tensor, ball: Ball | None = None) -> dict[str, Finding]:
    """The identities of the first moments, each with its standard error.

    Velocities have no border: E[s_v] = 0 and E[(v − v̄) s_vᵀ] = −I. Positions stop at the ball's, where
    the weight h = 1 − (d/r_max)² vanishes: E[h s_x + ∇h] = 0. Everything in units of each coordinate's
    standard deviation.

    Arguments:
        model: Anything with ``score``.
        w: Held-out stars, shape (n, 6).
        ball: The ball; None takes the model's.
    """
    w = w.to(torch.float64)
    ball = ball if ball is not None else model.ball
    scale = w.std(0)
    s, u = model.score(w).to(torch.float64) * scale, (w - w.mean(0)) / scale
    h, gradient = ball.edge_weight(w[:, :3])
    edge = h.unsqueeze(-1) * s[:, :3] + gradient * scale[:3]
    found = {f"E[s_v{axis}]": _mean(s[:, 3 + i], 0.0) for i, axis in enumerate(AXES)}
    for i, row in enumerate(AXES):
        for j, column in enumerate(AXES):
            found[f"E[v_{row} s_v{column}]"] = _mean(u[:, 3 + i] * s[:, 3 + j], -1.0 if i == j else 0.0)
    return found | {f"E[h s_{axis} + dh/d{axis}]": _mean(edge[:, i], 0.0) for i, axis in enumerate(AXES)}


def local_identities(
    model: Any, w: Tensor, ball: Ball | None = None, *, seed: int = 0, places: int = PLACES
) -> dict[str, Finding]:
    """The identities around places in the ball: errors of opposite sign in two places do not cancel.

    With a kernel k(x) around a place, E[k s_x]/E[k] = −E[∇k]/E[k], the mean of the score's spatial part there
    against ∇ log n of the kernel estimate of the density, made of the same stars: the smoothing cancels. In
    velocity E[k s_v] = 0 and E[k (v − v̄) s_vᵀ] = −E[k] I. Each figure is the root mean square over places of
    the deviation, relative to the score's own mean square, with the stars' noise taken off by its covariance.

    Arguments:
        model: Anything with ``score``.
        w: Held-out stars, shape (n, 6).
        ball: The ball; None takes the model's.
        seed: Of the places.
        places: Number of places, at held-out stars whose kernel lies in the ball.

    Returns:
        Three findings by name; none where the stars are too few for a kernel of 50.
    """
    w = w.to(torch.float64)
    ball = ball if ball is not None else model.ball
    kernels = _kernels(w[:, :3], ball, seed, places)
    if kernels is None:
        return {}
    k, gradient = kernels  # (n, K), (n, K, 3)
    weight = k.mean(0)
    s = model.score(w).to(torch.float64)
    share = k / k.sum(0)
    spread = share.t() @ w[:, 3:].square() - (share.t() @ w[:, 3:]).square()
    sigma = spread.clamp_min(1e-12).sqrt()  # (K, 3)
    u = (w[:, None, 3:] - share.t() @ w[:, 3:]) / sigma
    # In units of the spread of positions and, place by place, of velocities.
    length = w[:, :3].std(0)
    sx, sv = s[:, None, :3] * length, s[:, None, 3:] * sigma
    k = k.unsqueeze(-1)
    identity = torch.eye(3, dtype=torch.float64)
    tensor = k.unsqueeze(-1) * (u.unsqueeze(-1) * sv.unsqueeze(-2) + identity)
    parts = {
        "local E[s_x] − ∇ log n": (k * sx + gradient * length, (k * sx.square()).mean(0).sum(-1) / weight),
        "local E[s_v]": (k * sv, (k * sv.square()).mean(0).sum(-1) / weight),
        "local E[v s_v] + 1": (tensor.flatten(2), torch.full_like(weight, 3.0)),
    }
    return {
        name: _mean_square(terms / weight[:, None] / square.sqrt()[:, None])
        for name, (terms, square) in parts.items()
    }


def _kernels(x: Tensor, ball: Ball, seed: int, places: int) -> tuple[Tensor, Tensor] | None:
    """Kernels (1 − r²/b²)³ around stars, (n, K), and gradients, (n, K, 3); b holds 1/30 of the stars."""
    neighbours = max(len(x) // 30, 50)
    if len(x) < 4 * neighbours:
        return None
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: 4 * places]
    center = torch.as_tensor(ball.center, dtype=x.dtype)
    distance = torch.cdist(x[order], x)
    width = distance.kthvalue(neighbours, dim=1).values
    inside = width < ball.radius - (x[order] - center).norm(dim=-1)
    chosen, width = order[inside][:places], width[inside][:places]
    if len(chosen) < 4:
        return None
    offset = x.unsqueeze(1) - x[chosen]
    bump = (1.0 - offset.square().sum(-1) / width.square()).clamp_min(0.0)
    return bump**3, -6.0 * (bump.square() / width.square()).unsqueeze(-1) * offset


def _mean_square(terms: Tensor) -> Finding:
    """Mean over places of |mean over stars of terms|², terms (n, K, c), without the stars' own noise.

    With d ~ N(δ, C), |d|² exceeds |δ|² by tr C, and has the variance 2 tr C² + 4 δᵀC δ.
    """
    n, places = terms.shape[:2]
    flat = terms.flatten(1)
    d = flat.mean(0)
    covariance = (flat - d).t() @ (flat - d) / (n * (n - 1.0))
    excess = float(d.square().sum() - covariance.trace())
    noise = float(covariance.square().sum())
    variance = 2.0 * noise + 4.0 * max(float(d @ covariance @ d) - noise, 0.0)
    return Finding(excess / places, math.sqrt(variance) / places, 0.0, tolerance=LOCAL_TOLERANCE, square=True)


def curl_and_noise(
    model: Any, w: Tensor, ball: Ball | None = None, *, step: float = 1e-2
) -> dict[str, Finding]:
    """What the Jacobian J of the score tells: whether it is a gradient, and what it has learnt by heart.

    The curl is |J − Jᵀ| / |J + Jᵀ|, rms over stars; zero for a flow up to rounding. The noise is Stein's
    identity with the score itself for g: E[h (|s|² + ∇·s) + ∇h·s] = E[h s·(s − ∇ log f)], in units of
    E[h |s|²]. Errors that have nothing to do with the truth add their mean square, an overall factor 1 + a
    adds a / (1 + a); it needs no truth, and no figure of the training stars.

    Central differences in units of each coordinate's standard deviation, within 0.95 of the ball's radius.

    Arguments:
        model: Anything with ``score``.
        w: Held-out stars, shape (n, 6).
        ball: The ball; None takes the model's.
        step: Step of the differences in standard deviations.

    Returns:
        Two findings by name; none where fewer than 20 stars are that deep in the ball.
    """
    ball = ball if ball is not None else model.ball
    inner = Ball(ball.center, 0.95 * ball.radius)
    w = w.to(torch.float64)
    scale = w.std(0)
    w = w[inner.contains(w[:, :3])]
    if len(w) < 20:
        return {}
    s = model.score(w).to(torch.float64) * scale
    jacobian = torch.empty(len(w), 6, 6, dtype=torch.float64)
    for j in range(6):
        shift = torch.zeros(6, dtype=torch.float64)
        shift[j] = step * scale[j]
        jacobian[:, :, j] = (model.score(w + shift) - model.score(w - shift)) * scale / (2.0 * step)
    odd = (jacobian - jacobian.mT).square().sum((-1, -2))
    even = (jacobian + jacobian.mT).square().sum((-1, -2))
    ratio = float((odd.mean() / even.mean()).sqrt())
    deviation = (odd - ratio**2 * even) / even.mean()  # of the squared ratio, star by star
    error = 0.5 * float(deviation.std()) / math.sqrt(len(w)) / max(ratio, 1e-12)

    h, gradient = inner.edge_weight(w[:, :3])
    square = h * s.square().sum(-1)
    own = square + h * jacobian.diagonal(dim1=-1, dim2=-2).sum(-1) + (gradient * scale[:3] * s[:, :3]).sum(-1)
    level = square.mean()
    noise = float(own.mean() / level)
    spread = (own - noise * square).std() / level
    return {
        "curl of the score": Finding(ratio, error, 0.0, tolerance=0.2),
        "noise in the score": Finding(noise, float(spread) / math.sqrt(len(w)), 0.0),
    }
