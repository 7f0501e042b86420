"""The solution of a quadratic problem with a density that is nowhere negative."""

from __future__ import annotations

import numpy as np
from scipy import linalg, optimize

from galray.errors import GalrayError
from galray.gravity.splines import Array

__all__ = ["nonnegative"]

_ROUNDS = 30
_TOLERANCE = 1e-6  # of the typical density, by which a node may stay below zero


def nonnegative(hessian: Array, free: Array, rows: Array) -> tuple[Array, int]:
    """Minimise (θ − θ̂)ᵀ H (θ − θ̂) subject to Lθ ≥ 0.

    Lawson & Hanson's least-distance programming (Solving Least Squares Problems, ch. 23) in the metric of H;
    only the nodes at which some iterate went negative become constraints.

    Arguments:
        hessian: H, shape (n, n).
        free: The unconstrained minimum θ̂, shape (n,).
        rows: L, shape (nodes, n).

    Returns:
        The constrained minimum, and the number of nodes where it touches zero.

    Raises:
        GalrayError: No solution is found that is nowhere negative.
    """
    root = linalg.cholesky(hessian, lower=True, check_finite=False)
    metric = linalg.solve_triangular(root, rows.T, lower=True, check_finite=False).T  # L R⁻ᵀ
    length = np.linalg.norm(metric, axis=1)
    seen = length > 1e-12 * length.max()
    metric, start = metric[seen] / length[seen, None], (rows[seen] @ free) / length[seen]
    tolerance = _TOLERANCE * float(np.abs(start).mean())
    step = np.zeros(len(free))
    chosen = np.zeros(len(metric), dtype=bool)
    for _ in range(_ROUNDS):
        violated = metric @ step + start < -tolerance
        if not violated.any():
            change = linalg.solve_triangular(root, step, lower=True, trans="T", check_finite=False)
            touching = int((np.abs(metric @ step + start) <= tolerance).sum()) if chosen.any() else 0
            return free + change, touching
        chosen |= violated
        system = np.concatenate([metric[chosen].T, -start[None, chosen]])
        target = np.zeros(len(system))
        target[-1] = 1.0
        multipliers, _ = optimize.nnls(system, target, maxiter=20 * int(chosen.sum()) + 100)
        residual = system @ multipliers - target
        if not abs(residual[-1]) > 1e-14:
            break
        step = -residual[:-1] / residual[-1]
    raise GalrayError(
        "no solution within its bounds (positive mass, ε that falls with distance) fits the moments",
        "set positive_mass and selection_monotone (or monotone) = false, and look where they do not hold",
    )
