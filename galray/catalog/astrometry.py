"""Observables ↔ Galactocentric 6D: distances, the transformation, its Jacobian, and draws of errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl

from galray.catalog.columns import ASTROMETRY, CORRELATIONS, OBSERVABLES, STATE
from galray.frame import GalacticFrame
from galray.units import K_PROPER_MOTION

__all__ = [
    "add_states",
    "correlation_matrices",
    "draw_observables",
    "galactocentric",
    "galactocentric_covariance",
    "jacobian",
    "state_expressions",
]

_BLOCK = 8192
"""Stars that are transformed at a time."""

_MAS = math.pi / 180 / 3.6e6  # rad


def state_expressions(
    frame: GalacticFrame, zero_point: float | pl.Expr = 0.0, distance: pl.Expr | None = None
) -> list[pl.Expr]:
    """The 6D state as Polars expressions over Gaia's columns.

    With d = 1 / (ϖ − ϖ₀), the ICRS unit vectors r̂, α̂, δ̂ at the star and the rotation B = H A of
    `GalacticFrame`,

        x = B d r̂ − H (d₀, 0, 0),
        v = B [v_r r̂ + k d (μ_α* α̂ + μ_δ δ̂)] + v_⊙,    k = 4.74047 km/s per mas/yr kpc,

    which is astropy's ``Galactocentric``.

    Arguments:
        frame: The frame's numbers.
        zero_point: Parallax zero point ϖ₀ in mas: one number, or each star's.
        distance: d in kpc, where it is not the inverse of the parallax.

    Returns:
        Expressions named x, y, z (kpc), vx, vy, vz (km/s), float64.
    """
    ra, dec = pl.col("ra").cast(pl.Float64).radians(), pl.col("dec").cast(pl.Float64).radians()
    ca, sa, cd, sd = ra.cos(), ra.sin(), dec.cos(), dec.sin()
    if distance is None:
        distance = 1.0 / (pl.col("parallax").cast(pl.Float64) - zero_point)
    rv = pl.col("radial_velocity").cast(pl.Float64)
    v_ra = K_PROPER_MOTION * distance * pl.col("pmra").cast(pl.Float64)
    v_dec = K_PROPER_MOTION * distance * pl.col("pmdec").cast(pl.Float64)
    position = [distance * cd * ca, distance * cd * sa, distance * sd]
    velocity = [
        rv * cd * ca - v_ra * sa - v_dec * sd * ca,
        rv * cd * sa + v_ra * ca - v_dec * sd * sa,
        rv * sd + v_dec * cd,
    ]
    rotation, offset = _rotation_and_offset(frame)
    result = []
    for name, row, zero in zip(
        STATE, [*rotation, *rotation], [*offset, *frame.sun_velocity_km_s], strict=True
    ):
        vector = position if name in STATE[:3] else velocity
        total = vector[0] * row[0] + vector[1] * row[1] + vector[2] * row[2] + zero
        result.append(total.alias(name))
    return result


def add_states(
    table: pl.DataFrame,
    frame: GalacticFrame,
    zero_point: float | pl.Expr = 0.0,
    distance: pl.Expr | None = None,
) -> pl.DataFrame:
    """The table with the 6D states as columns, by the formulas of `state_expressions`, several times faster.

    Stars go through in blocks that fit the processor's cache, and each angle costs one tangent:
    sin a = 2t / (1 + t²), cos a = (1 − t²) / (1 + t²) with t = tan(a / 2).

    Arguments:
        table: Has Gaia's columns.
        frame: The frame's numbers.
        zero_point: Parallax zero point ϖ₀ in mas: one number, or each star's.
        distance: d in kpc, where it is not the inverse of the parallax.

    Returns:
        The table and x, y, z (kpc), vx, vy, vz (km/s), float64; missing where an observable is, and NaN
        or missing where they make no number.
    """
    if distance is None:
        distance = 1.0 / (pl.col("parallax").cast(pl.Float64) - zero_point)
    wanted = [pl.col(n).cast(pl.Float64) for n in ("ra", "dec", "pmra", "pmdec", "radial_velocity")]
    observed = table.select(*wanted, distance.cast(pl.Float64).alias("distance"))
    columns = [column.to_numpy() for column in observed]
    states = np.empty((6, table.height))
    rotation, offset = (np.asarray(values) for values in _rotation_and_offset(frame))
    motion = np.asarray(frame.sun_velocity_km_s)
    with np.errstate(all="ignore"):  # what comes of impossible observables is the caller's rule
        for start in range(0, table.height, _BLOCK):
            block = slice(start, start + _BLOCK)
            position, velocity = _equatorial([column[block] for column in columns])
            np.matmul(rotation, position, out=states[:3, block])
            np.matmul(rotation, velocity, out=states[3:, block])
            states[:3, block] += offset[:, None]
            states[3:, block] += motion[:, None]
    series = [pl.Series(name, values) for name, values in zip(STATE, states, strict=True)]
    if any(observed.null_count().row(0)):
        series = [values.fill_nan(None) for values in series]
    return table.with_columns(series)


def _equatorial(columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Place and motion in ICRS axes, (3, n) each, of ra, dec, pmra, pmdec, velocity and distance, (n,)."""
    ra, dec, pmra, pmdec, rv, distance = columns
    sa, ca = _sine_cosine(ra)
    sd, cd = _sine_cosine(dec)
    v_ra, v_dec = K_PROPER_MOTION * distance * pmra, K_PROPER_MOTION * distance * pmdec
    across, inward = distance * cd, rv * cd - v_dec * sd
    position = np.stack([across * ca, across * sa, distance * sd])
    velocity = np.stack([inward * ca - v_ra * sa, inward * sa + v_ra * ca, rv * sd + v_dec * cd])
    return position, velocity


def _sine_cosine(degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = np.tan(degrees * (math.pi / 360))
    square = half * half
    inverse = 1.0 / (1.0 + square)
    return 2.0 * half * inverse, (1.0 - square) * inverse


def galactocentric(observables: Any, frame: GalacticFrame, zero_point: Any = 0.0) -> Any:
    """The same transformation for arrays.

    Arguments:
        observables: (*, 6) numpy array or torch tensor in the order of `OBSERVABLES`: ra, dec in deg,
            parallax in mas, proper motions in mas/yr, radial velocity in km/s.
        frame: The frame's numbers.
        zero_point: Parallax zero point in mas, one or each star's (*,).

    Returns:
        (*, 6) states of the same kind, kpc and km/s.
    """
    if type(observables).__module__.startswith("torch"):
        import torch

        xp: Any = torch
        as_array = observables.new_tensor
    else:
        xp = np
        as_array = np.asarray
    ra, dec = observables[..., 0] * (math.pi / 180), observables[..., 1] * (math.pi / 180)
    ca, sa, cd, sd = xp.cos(ra), xp.sin(ra), xp.cos(dec), xp.sin(dec)
    distance = 1.0 / (observables[..., 2] - zero_point)
    v_ra = K_PROPER_MOTION * distance * observables[..., 3]
    v_dec = K_PROPER_MOTION * distance * observables[..., 4]
    rv = observables[..., 5]
    x = xp.stack([distance * cd * ca, distance * cd * sa, distance * sd], -1)
    v = xp.stack(
        [
            rv * cd * ca - v_ra * sa - v_dec * sd * ca,
            rv * cd * sa + v_ra * ca - v_dec * sd * sa,
            rv * sd + v_dec * cd,
        ],
        -1,
    )
    rotation, offset = _rotation_and_offset(frame)
    turn = as_array(rotation)
    x = x @ turn.T + as_array(offset)
    v = v @ turn.T + as_array(frame.sun_velocity_km_s)
    return xp.concatenate([x, v], -1)


def shift_states(
    w: np.ndarray, frame: GalacticFrame, zero_point: float, sun_velocity: tuple[float, float, float]
) -> np.ndarray:
    """States as another parallax zero point and another motion of the Sun would give them.

    A zero point that is larger by δ makes every parallax smaller: 1/d' = 1/d − δ. Distances and tangential
    velocities scale with it, radial velocities do not; then the Sun's motion is added. Distances that are no
    inverse parallaxes are moved the same way.

    Arguments:
        w: States (n, 6) in kpc and km/s.
        frame: Their frame.
        zero_point: Shift δ of the zero point in mas.
        sun_velocity: Shift of the Sun's velocity in km/s.

    Returns:
        (n, 6); a star whose parallax would not be positive is NaN.
    """
    sun = np.asarray(frame.sun_position)
    offset, v = w[:, :3] - sun, w[:, 3:] - np.asarray(frame.sun_velocity_km_s)
    distance = np.sqrt(np.sum(offset**2, -1, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 1.0 / (1.0 - zero_point * distance)
        direction = np.where(distance > 0, offset / distance, 0.0)
    scale = np.where(scale > 0, scale, np.nan)
    radial = np.sum(v * direction, -1, keepdims=True) * direction
    velocity = radial + scale * (v - radial) + np.asarray(frame.sun_velocity_km_s) + np.asarray(sun_velocity)
    return np.concatenate([sun + scale * offset, velocity], -1)


def _rotation_and_offset(frame: GalacticFrame) -> tuple[list[list[float]], list[float]]:
    """B = H A, and −H (d₀, 0, 0): the Sun's place."""
    tilt = frame.tilt()
    return frame.icrs_to_galactocentric(), [-row[0] * frame.sun_galcen_distance_kpc for row in tilt]


def jacobian(
    observables: np.ndarray, frame: GalacticFrame, zero_point: float | np.ndarray = 0.0
) -> np.ndarray:
    """Derivatives of the state by the observables.

    Arguments:
        observables: (n, 6), as in `galactocentric`.
        frame: The frame's numbers.
        zero_point: Parallax zero point in mas, one or (n,).

    Returns:
        (n, 6, 6): rows x, y, z, vx, vy, vz; columns (α*, δ) in mas on the sky, parallax, μ_α*, μ_δ, v_r, so
        that they fit Gaia's standard errors.
    """
    ra, dec = np.radians(observables[:, 0]), np.radians(observables[:, 1])
    ca, sa, cd, sd = np.cos(ra), np.sin(ra), np.cos(dec), np.sin(dec)
    zero = np.zeros_like(ra)
    r = np.stack([cd * ca, cd * sa, sd], -1)
    east = np.stack([-sa, ca, zero], -1)
    north = np.stack([-sd * ca, -sd * sa, cd], -1)
    d = (1.0 / (observables[:, 2] - zero_point))[:, None]
    mu_ra, mu_dec, rv = (observables[:, i, None] for i in (3, 4, 5))
    k = K_PROPER_MOTION
    # ∂r̂ = α̂ dα* + δ̂ dδ;  ∂α̂ = (tan δ δ̂ − r̂) dα*;  ∂δ̂ = −tan δ α̂ dα* − r̂ dδ.
    tan = (sd / np.where(cd == 0, np.finfo(float).tiny, cd))[:, None]
    result = np.zeros((len(ra), 6, 6))
    result[:, :3, 0] = _MAS * d * east
    result[:, :3, 1] = _MAS * d * north
    result[:, :3, 2] = -(d**2) * r
    result[:, 3:, 0] = _MAS * (rv * east + k * d * (mu_ra * (tan * north - r) - mu_dec * tan * east))
    result[:, 3:, 1] = _MAS * (rv * north - k * d * mu_dec * r)
    result[:, 3:, 2] = -k * d**2 * (mu_ra * east + mu_dec * north)
    result[:, 3:, 3] = k * d * east
    result[:, 3:, 4] = k * d * north
    result[:, 3:, 5] = r
    turn = np.asarray(frame.icrs_to_galactocentric())
    result[:, :3] = turn @ result[:, :3]
    result[:, 3:] = turn @ result[:, 3:]
    return result


def correlation_matrices(correlations: np.ndarray) -> np.ndarray:
    """The 5×5 correlation matrices of ra*, dec, parallax, pmra, pmdec.

    Arguments:
        correlations: (n, 10) in the order of `CORRELATIONS`; NaN counts as none.

    Returns:
        (n, 5, 5).
    """
    result = np.zeros((len(correlations), 5, 5))
    result[:, range(5), range(5)] = 1.0
    rows, columns = np.triu_indices(5, 1)
    assert len(rows) == len(CORRELATIONS)
    result[:, rows, columns] = result[:, columns, rows] = np.nan_to_num(correlations)
    return result


def galactocentric_covariance(
    observables: np.ndarray,
    errors: np.ndarray,
    correlations: np.ndarray,
    frame: GalacticFrame,
    zero_point: float | np.ndarray = 0.0,
    distance: np.ndarray | None = None,
    distance_error: np.ndarray | None = None,
) -> np.ndarray:
    """Covariance of the 6D states to first order, J C Jᵀ.

    With a distance d ± σ_d of another kind the parallax that it stands for, 1/d ± s with s = σ_d / d², takes
    the measured one's place, and what the measured one's error shares with the others goes with it:
    C' = C + g gᵀ (s² − σ_ϖ²), g = C_·ϖ / σ_ϖ².

    Arguments:
        observables: (n, 6), as in `galactocentric`.
        errors: (n, 6) standard errors: mas, mas, mas, mas/yr, mas/yr, km/s.
        correlations: (n, 10) in the order of `CORRELATIONS`.
        frame: The frame's numbers.
        zero_point: Parallax zero point in mas, one or (n,).
        distance: (n,) in kpc, where it is not the inverse of the parallax.
        distance_error: (n,) in kpc.

    Returns:
        (n, 6, 6) in kpc², kpc km/s and (km/s)².
    """
    covariance = np.zeros((len(observables), 6, 6))
    covariance[:, :5, :5] = correlation_matrices(correlations)
    covariance[:, 5, 5] = 1.0
    if distance is not None:
        assert distance_error is not None
        # In units of the errors g is the column of correlations, and s counts in σ_ϖ.
        sigma = np.where(errors[:, 2] > 0, errors[:, 2], 1.0)
        shared = covariance[:, :, 2].copy()
        ratio = (distance_error / distance**2 / sigma) ** 2 - (errors[:, 2] > 0)
        covariance += shared[:, :, None] * shared[:, None, :] * ratio[:, None, None]
        errors = errors.copy()
        errors[:, 2] = sigma
        observables = observables.copy()
        observables[:, 2] = 1 / distance + zero_point
    covariance *= errors[:, :, None] * errors[:, None, :]
    derivative = jacobian(observables, frame, zero_point)
    return np.asarray(derivative @ covariance @ derivative.transpose(0, 2, 1))


def draw_observables(
    observables: np.ndarray,
    errors: np.ndarray,
    correlations: np.ndarray,
    generator: np.random.Generator,
    parallax: np.ndarray | None = None,
) -> np.ndarray:
    """One draw of every star's observables from its errors, with all correlations of the astrometry.

    The draw is y' = y + S L ξ, with S the standard errors, L Lᵀ the 5×5 correlation matrix (radial velocity
    apart, uncorrelated) and ξ standard normal. Rounded correlations that are not quite positive definite
    have their negative pivots set to zero. Where the parallax has been drawn already, as from a distance's
    posterior, the others are drawn from their distribution given that parallax.

    Arguments:
        observables: (n, 6), as in `galactocentric`.
        errors: (n, 6) standard errors; an error of zero leaves the observable as it is.
        correlations: (n, 10) in the order of `CORRELATIONS`; NaN counts as none.
        generator: The random stream.
        parallax: (n,) drawn parallaxes in mas, with the zero point in them as the measured ones have.

    Returns:
        (n, 6). Parallaxes may be negative: what to do with them is the caller's rule.
    """
    normal = generator.standard_normal((len(observables), len(OBSERVABLES)))
    size = len(ASTROMETRY)
    # The parallax comes first where it is given: the others' factors then follow from it.
    order = list(range(size)) if parallax is None else [2, 0, 1, 3, 4]
    matrices = correlation_matrices(correlations)[:, order][:, :, order]
    first = normal[:, order]
    if parallax is not None:
        measured = errors[:, 2] > 0
        first[:, 0] = np.where(measured, parallax - observables[:, 2], 0) / np.where(
            measured, errors[:, 2], 1
        )
    normal[:, order] = np.einsum("nij,nj->ni", _cholesky(matrices), first)
    shift = normal * errors
    shift[:, :2] *= 1 / 3.6e6  # mas → deg
    # α* = α cos δ; at the very pole the right ascension does not matter.
    shift[:, 0] /= np.maximum(np.cos(np.radians(observables[:, 1])), 1e-9)
    drawn = observables + shift
    drawn[:, 0] %= 360.0
    if parallax is not None:
        drawn[:, 2] = parallax
    return np.asarray(drawn)


def _cholesky(matrices: np.ndarray) -> np.ndarray:
    """Lower Cholesky factors of many small matrices, column by column; negative pivots become zero."""
    size = matrices.shape[-1]
    factor = np.zeros_like(matrices)
    for j in range(size):
        pivot = np.sqrt(np.maximum(matrices[:, j, j] - np.sum(factor[:, j, :j] ** 2, -1), 0.0))
        factor[:, j, j] = pivot
        safe = np.where(pivot > 1e-7, pivot, np.inf)
        for i in range(j + 1, size):
            inner = np.sum(factor[:, i, :j] * factor[:, j, :j], -1)
            factor[:, i, j] = (matrices[:, i, j] - inner) / safe
    return factor
