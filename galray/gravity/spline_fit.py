"""Spline potentials fitted to scores at the stars, or to accelerations at positions."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy import linalg

from galray.errors import GalrayError
from galray.gravity.equations import Equations
from galray.gravity.region import as_region
from galray.gravity.settings import PotentialSettings
from galray.gravity.spline_field import SplineField
from galray.gravity.splines import Array, TensorBasis, ball_axes, cell_groups, to_numpy

__all__ = ["fit_spline_to_accelerations", "fit_spline_to_residuals", "spline_basis"]

_FOLDS = 5
_STRENGTHS = 10.0 ** np.arange(-8.0, 1.0)


def spline_basis(settings: PotentialSettings, ball: Any) -> TensorBasis:
    """The spline basis of a potential fit on a ball."""
    region = as_region(ball)
    kind: Literal["Rz", "xyz"] = "Rz" if settings.base == "Rz" else "xyz"
    axes = ball_axes(kind, region.center, region.radius, settings.splines, settings.concentrations)
    return TensorBasis(kind, axes)


def fit_spline_to_residuals(
    equations: Equations, basis: TensorBasis, ball: Any, penalty: float | None = None
) -> SplineField:
    """Solve Σ_stars weight (z·∇B_p) (v·sₓ − sᵥ·∇Φ) = 0 for Φ = Σθ_p B_p: two-stage least squares.

    Arguments:
        equations: What the stars say.
        basis: The splines.
        ball: The ball of the field.
        penalty: Strength of the penalty of third differences, 1 where its trace is that of the equations'
            matrix; None takes what predicts held-out fifths of the stars best. That choice sees the noise of
            the stars alone, not the errors of the model that gave all of them their scores, and so follows
            every ripple of the model.
    """
    x, z, score_v = equations.x, equations.z, equations.slope
    streaming, weight = equations.streaming, equations.weight
    fold = equations.star % _FOLDS
    matrix = np.zeros((_FOLDS, basis.size, basis.size))
    vector = np.zeros((_FOLDS, basis.size))
    cell = basis.locate(basis.coordinates(x))
    for c, rows in cell_groups(cell):
        index = basis.indices(c)
        _, gradient = basis.gradient(x[rows])
        left = np.einsum("nj,njp->np", z[rows] * weight[rows, None], gradient)
        right = np.einsum("nj,njp->np", score_v[rows], gradient)
        for k in range(_FOLDS):
            part = fold[rows] == k
            matrix[k][np.ix_(index, index)] += left[part].T @ right[part]
            vector[k, index] += left[part].T @ streaming[rows][part]
    return _penalised(-matrix, -vector, basis, ball, penalty)  # ⟨z slopeᵀ⟩ is negative definite


def fit_spline_to_accelerations(
    x: Any, a: Any, settings: PotentialSettings, ball: Any, *, weight: Any = None
) -> SplineField:
    """The spline potential whose −∇Φ is closest to accelerations a(x): curl-free and easy to store.

    Arguments:
        x: Positions (n, 3) in kpc.
        a: Accelerations (n, 3) in (km/s)²/kpc.
        settings: The spline's size.
        ball: The ball of the field.
        weight: Inverse variances, (n,) or (n, 3); None for equal ones.

    Raises:
        GalrayError: Fewer numbers than splines.
    """
    positions, target = to_numpy(x).reshape(-1, 3), to_numpy(a).reshape(-1, 3)
    basis = spline_basis(settings, ball)
    if target.size < basis.size:
        raise GalrayError(
            f"{len(target)} accelerations for {basis.size} splines",
            "give more positions or fewer base_splines",
        )
    factor = np.ones_like(target) if weight is None else to_numpy(weight)
    factor = np.broadcast_to(factor.reshape(len(target), -1), target.shape)
    matrix = np.zeros((_FOLDS, basis.size, basis.size))
    vector = np.zeros((_FOLDS, basis.size))
    for c, rows in cell_groups(basis.locate(basis.coordinates(positions)), 4096):
        index = basis.indices(c)
        _, gradient = basis.gradient(positions[rows])
        for k in range(_FOLDS):
            part = rows % _FOLDS == k
            g = -gradient[part].reshape(-1, gradient.shape[2])
            scaled = g * factor[rows[part]].reshape(-1, 1)
            matrix[k][np.ix_(index, index)] += scaled.T @ g
            vector[k, index] += scaled.T @ target[rows[part]].reshape(-1)
    return _penalised(matrix, vector, basis, ball)


def _penalised(
    matrix: Array, vector: Array, basis: TensorBasis, ball: Any, strength: float | None = None
) -> SplineField:
    """Solve (Σ_k M_k + λP) θ = Σ_k m_k, λ as given or from the held-out value of ½θᵀMθ − mᵀθ."""
    reduction = basis.reduction(north_south=False)
    matrix = np.einsum("ai,kab,bj->kij", reduction, matrix, reduction, optimize=True)
    vector = vector @ reduction
    total, right = matrix.sum(0), vector.sum(0)
    size = len(total)
    level = np.trace(total) / size
    if not level > 0:
        raise GalrayError(
            "the scores do not determine a potential: E[(v−u)·sᵥ] has the wrong sign",
            "the score is far from ∇log f: train it longer, or check that it belongs to these stars",
        )
    fixed = np.full((size, size), level / size) + np.eye(size) * level * 1e-9
    penalty = np.zeros((size, size))
    for rough in basis.roughness():
        reduced = reduction.T @ rough @ reduction
        penalty += reduced * (level * size / np.trace(reduced))
    if strength is None:
        held_out = []
        for tried in _STRENGTHS:
            value = 0.0
            for m, g in zip(matrix, vector, strict=True):
                theta = linalg.solve(total - m + fixed + tried * penalty, right - g, check_finite=False)
                value += float(theta @ m @ theta / 2 - g @ theta)
            held_out.append(value)
        strength = float(_STRENGTHS[int(np.argmin(held_out))])
    theta = reduction @ linalg.solve(total + fixed + strength * penalty, right)
    return SplineField(basis, as_region(ball), theta, penalty=(strength,) * len(basis.axes))
