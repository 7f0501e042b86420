"""Penalised generalised least squares for spline coefficients, with the penalty chosen from the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from galray.gravity.splines import Array

__all__ = ["LinearSystem", "Solution", "solve"]

_RIDGE = 1e-10  # of the mean diagonal: makes coefficients that no star sees finite
_SCATTER_RIDGE = 1e-7  # of the unit diagonal of the scaled scatter matrix


@dataclass(frozen=True)
class LinearSystem:
    """What does not depend on the data.

    Attributes:
        reduction: Free parameters to spline coefficients, shape (splines, free).
        roughness: One penalty matrix (splines, splines) per direction.
    """

    reduction: Array
    roughness: list[Array]


@dataclass(frozen=True)
class Solution:
    """Spline coefficients and how well they are known.

    Attributes:
        parameters: θ, shape (splines,).
        covariance: H⁻¹AᵀΩ⁻¹A H⁻¹, H = AᵀΩ⁻¹A + λP: the scatter of θ from sample to sample.
        posterior: H⁻¹, which holds the squared bias of the penalty too, on average over potentials as
            rough as the penalty expects (Wahba 1983, Nychka 1988).
        penalty: λ per direction.
        chi2: (b − Aθ)ᵀ Ω⁻¹ (b − Aθ).
        num_moments: Moments used.
        effective_dof: trace(H⁻¹AᵀΩ⁻¹A): the parameters that the data and not the penalty decide.
    """

    parameters: Array
    covariance: Array
    posterior: Array
    penalty: tuple[float, ...]
    chi2: float
    num_moments: int
    effective_dof: float


def solve(
    system: LinearSystem,
    matrix: Array,
    vector: Array,
    scatter: Array,
    usable: NDArray[np.bool_],
    *,
    penalty: str | tuple[float, ...],
    folds: Sequence[tuple[Array, Array]] | None = None,
    steps: int = 7,
) -> Solution:
    """Minimise (b − Aθ)ᵀΩ⁻¹(b − Aθ) + Σ_d λ_d θᵀP_dθ.

    The strengths are in units in which each penalty has the trace of AᵀΩ⁻¹A, so λ = 1 is as much penalty
    as data. The constant potential, which no moment sees, is fixed by Σθ = 0.

    Arguments:
        system: Reduction and roughness.
        matrix: A, shape (moments, splines).
        vector: b, shape (moments,).
        scatter: Ω, shape (moments, moments).
        usable: Moments to use, shape (moments,).
        penalty: λ (one, or one per direction), or the rule that chooses it: ``evidence``, ``cp``, ``cv``.
        folds: (A, b) of each block, for ``cv``.
        steps: Strengths tried per direction: half decades are refined after a coarse scan.
    """
    scale = 1.0 / np.sqrt(np.diag(scatter)[usable])
    correlation = scatter[np.ix_(usable, usable)] * np.outer(scale, scale)
    correlation[np.diag_indices_from(correlation)] += _SCATTER_RIDGE
    factor = linalg.cholesky(correlation, lower=True, check_finite=False)

    def whiten(a: Array) -> Array:
        scaled = a[usable] * (scale if a.ndim == 1 else scale[:, None])
        return linalg.solve_triangular(factor, scaled, lower=True, check_finite=False)

    reduction = system.reduction
    design, target = whiten(matrix @ reduction), whiten(vector)
    gram, moment = design.T @ design, design.T @ target
    size = len(gram)
    level = np.trace(gram) / size
    constant = np.full((size, size), level / size)  # Σθ = 0
    constant += np.eye(size) * level * _RIDGE
    roughness = []
    for r in system.roughness:
        reduced = reduction.T @ r @ reduction
        roughness.append(reduced * (np.trace(gram) / np.trace(reduced)))

    def hessian(strength: tuple[float, ...]) -> Array:
        return gram + constant + sum(s * r for s, r in zip(strength, roughness, strict=True))

    num = len(roughness)
    if isinstance(penalty, str):
        held_out = [(whiten(a @ reduction), whiten(b)) for a, b in folds] if folds else []
        rest = [((design - d).T @ (design - d), (design - d).T @ (target - t)) for d, t in held_out]

        def score(strength: tuple[float, ...]) -> float:
            h = hessian(strength)
            if penalty == "cv":
                total = 0.0
                for (d, t), (train_gram, train_moment) in zip(held_out, rest, strict=True):
                    theta = linalg.solve(
                        train_gram + (h - gram), train_moment, assume_a="pos", check_finite=False
                    )
                    total += float(((t - d @ theta) ** 2).sum())
                return total
            low = linalg.cho_factor(h, lower=True, check_finite=False)
            theta = linalg.cho_solve(low, moment, check_finite=False)
            chi2 = float(((target - design @ theta) ** 2).sum())
            if penalty == "cp":
                return chi2 + 2 * float(np.trace(linalg.cho_solve(low, gram, check_finite=False)))
            prior = h - gram
            return (
                chi2
                + float(theta @ prior @ theta)
                + 2 * float(np.log(np.diag(low[0])).sum())
                - float(np.linalg.slogdet(prior)[1])
            )

        strength = _search(score, num, steps)
    else:
        strength = penalty * num if len(penalty) == 1 else penalty
        if len(strength) != num:
            raise ValueError(f"{len(strength)} penalty strengths for {num} directions")
    h = hessian(strength)
    low = linalg.cho_factor(h, lower=True, check_finite=False)
    theta = linalg.cho_solve(low, moment, check_finite=False)
    posterior = linalg.cho_solve(low, np.eye(size), check_finite=False)
    shrink = posterior @ gram
    return Solution(
        parameters=reduction @ theta,
        covariance=reduction @ (shrink @ posterior) @ reduction.T,
        posterior=reduction @ posterior @ reduction.T,
        penalty=strength,
        chi2=float(((target - design @ theta) ** 2).sum()),
        num_moments=len(target),
        effective_dof=float(np.trace(shrink)),
    )


def _search(score: Callable[[tuple[float, ...]], float], num: int, steps: int) -> tuple[float, ...]:
    """Coordinate-wise search of log λ: a coarse scan of equal strengths, then each direction on its own."""
    grid = np.linspace(-9.0, 1.0, max(steps, 2))
    width = grid[1] - grid[0]
    best = min(((score((10.0**g,) * num), (g,) * num) for g in grid), key=lambda pair: pair[0])
    for _ in range(3):
        candidates = set()
        for offset in itertools.product((-1, 0, 1), repeat=min(num, 2)):
            # x and y share a strength: nothing tells them apart beforehand
            shift = (offset[0],) * (num - len(offset) + 1) + offset[1:]
            candidates.add(tuple(b + width / 2 * s for b, s in zip(best[1], shift, strict=True)))
        best = min(
            [best] + [(score(tuple(10.0**g for g in c)), c) for c in sorted(candidates)],
            key=lambda pair: pair[0],
        )
        width /= 1.6
    return tuple(float(10.0**g) for g in best[1])
