"""Tests of equilibrium by the stars alone: motions that no steady, axisymmetric Galaxy has.

Run backwards in time, with its rotation turned round, a steady axisymmetric Galaxy is the same Galaxy:
f(x, v_R, v_φ, v_z) = f(x, −v_R, v_φ, −v_z). So the mean of every function that is odd under that flip
vanishes at every place, whatever the gravity and whatever the selection of places: no potential and no
density is fitted. The functions live in the (z, v_z) plane, where a blow to the disc winds up into a spiral:
θ is the angle and A the radius there, and every bin of A and of angular momentum L_z (its winding differs)
has its own mean of sin θ (vertical) and of v_R (radial). A Galaxy that is its own mirror image in the plane,
seen alike on both sides, has no mean of cos θ either: the other half of the spiral. A third test compares
the velocities ahead of the Sun in azimuth with those behind.

Errors of distance mix the motion of the Sun and of rotation into velocities and break the flip a little.
With redrawn states the bias is measured on the same stars and taken off to first order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from galray.errors import GalrayError
from galray.frame import cylindrical
from galray.gravity.splines import Array, to_numpy

__all__ = ["StellarTest", "stellar_tests"]

_AMPLITUDES, _MOMENTA = 4, 10  # bins of A and of L_z, at equal numbers of stars
_RADII, _HEIGHTS = 6, 4  # bins of R and of |z| for ahead against behind
_MIN_STARS = 20 * _AMPLITUDES * _MOMENTA
_CHUNK = 100_000


@dataclass(frozen=True)
class StellarTest:
    """χ² of means that vanish in equilibrium.

    Attributes:
        chi2: Their χ².
        dof: How many they are.
        p_value: Chance of a larger χ² in equilibrium.
        amplitude: Root of the excess (χ² − dof)/N: the part of f that breaks the symmetry, as the functions
            see it, free of the number of stars; 0 where there is no excess.
        amplitude_error: Half its difference between excess plus and minus one standard deviation.
    """

    chi2: float
    dof: int
    p_value: float
    amplitude: float
    amplitude_error: float


def stellar_tests(w: Any, *, mirror: bool = True, redraws: Sequence[Any] = ()) -> dict[str, StellarTest]:
    """Test stars for equilibrium: ``vertical`` and ``radial`` streaming, and ``azimuth``.

    Arguments:
        w: States (n, 6) of stars around the Sun in kpc and km/s.
        mirror: Stars north and south of the plane were selected alike, so that cos θ may be tested too. Dust
            does not do that; without it a spiral is seen by half of itself.
        redraws: The same stars, row by row, redrawn from their errors, each (n, 6); NaN for a star whose
            redraw is no star. Their mean difference from `w` is taken off.

    Raises:
        GalrayError: Too few stars, or redraws that do not match.
    """
    states = to_numpy(w)
    if states.ndim != 2 or states.shape[1] != 6:
        raise GalrayError(f"states of shape {states.shape}", "give (x, y, z, vx, vy, vz), shape (n, 6)")
    if len(states) < _MIN_STARS:
        raise GalrayError(f"{len(states)} stars", f"tests of equilibrium need {_MIN_STARS:,} or more")
    others = [to_numpy(r) for r in redraws]
    for other in others:
        if other.shape != states.shape:
            raise GalrayError(
                f"redrawn states of shape {other.shape} for stars of shape {states.shape}",
                "redraw the same stars, row by row, with NaN for those that are lost",
            )
    bins = _Bins(cylindrical(states), mirror)
    sums = {"vertical": _Sums((1 + mirror) * bins.count), "radial": _Sums(bins.count)}
    sides = _Sums(3 * 2 * _RADII * _HEIGHTS)
    for start in range(0, len(states), _CHUNK):
        rows = slice(start, start + _CHUNK)
        parts = [bins.functions(cylindrical(s[rows])) for s in (states, *others)]
        for name, total in sums.items():
            total.add(_unbiased([p[name] for p in parts]))
        sides.add(_unbiased([bins.sides(cylindrical(s[rows])) for s in (states, *others)]))
    found = {name: total.test(len(states)) for name, total in sums.items()}
    return {**found, "azimuth": _ahead_and_behind(sides, bins, cylindrical(states))}


class _Sums:
    """Σψ and ΣψψT over stars."""

    def __init__(self, size: int) -> None:
        self.vector = np.zeros(size)
        self.matrix = np.zeros((size, size))

    def add(self, psi: Array) -> None:
        self.vector += psi.sum(0)
        self.matrix += psi.T @ psi

    def test(self, num_stars: int) -> StellarTest:
        return _chi2(self.vector, self.matrix, num_stars)


class _Bins:
    """Bin edges and scales, from the stars as they are."""

    def __init__(self, c: Array, mirror: bool) -> None:
        self.mirror = mirror
        radius, z, v_radius, v_z = c[:, 0], c[:, 2], c[:, 3], c[:, 5]
        self.height, self.speed = float(np.median(np.abs(z))), float(np.median(np.abs(v_z)))
        self.radial_speed2 = float(np.median(np.abs(v_radius))) ** 2
        amplitude, _ = self._polar(c)
        momentum = radius * c[:, 4]
        self.amplitudes = _edges(amplitude, _AMPLITUDES)
        self.momenta = _edges(momentum, _MOMENTA)
        self.count = _AMPLITUDES * _MOMENTA
        self.radii, self.heights = _edges(radius, _RADII), _edges(np.abs(z), _HEIGHTS)
        # velocities relative to their means at the place keep the noise of the third test small
        self.mean_rotation = float(c[:, 4].mean())

    def _polar(self, c: Array) -> tuple[Array, Array]:
        across, along = c[:, 2] / self.height, c[:, 5] / self.speed
        return np.hypot(across, along), np.arctan2(along, across)

    def functions(self, c: Array) -> dict[str, Array]:
        """ψ of the flip tests at states in cylindrical coordinates."""
        amplitude, theta = self._polar(c)
        cell = np.searchsorted(self.amplitudes, amplitude) * _MOMENTA
        cell = cell + np.searchsorted(self.momenta, c[:, 0] * c[:, 4])
        v_radius = c[:, 3]
        radial = v_radius / np.sqrt(v_radius**2 + self.radial_speed2)
        halves = (np.sin(theta), np.cos(theta)) if self.mirror else (np.sin(theta),)
        vertical = [_placed(half, cell, self.count) for half in halves]
        return {
            "vertical": np.concatenate(vertical, 1),
            "radial": _placed(radial, cell, self.count),
        }

    def sides(self, c: Array) -> Array:
        """Velocities and counts per cell of (side, R, |z|): 1, v_R and v_φ of each."""
        cell = self.side_cells(c)
        count = 2 * _RADII * _HEIGHTS
        values = (np.where(np.isfinite(c[:, 0]), 1.0, np.nan), c[:, 3], c[:, 4] - self.mean_rotation)
        return np.concatenate([_placed(f, cell, count) for f in values], 1)

    def side_cells(self, c: Array) -> NDArray[np.intp]:
        ahead = (c[:, 1] > 0).astype(np.intp)
        cell = ahead * _RADII + np.searchsorted(self.radii, c[:, 0])
        return cell * _HEIGHTS + np.searchsorted(self.heights, np.abs(c[:, 2]))


def _ahead_and_behind(sums: _Sums, bins: _Bins, c: Array) -> StellarTest:
    """Mean v_R and v_φ ahead of the Sun against behind, cell by cell, with the covariance of the sums."""
    cells = _RADII * _HEIGHTS
    number, *values = sums.vector.reshape(3, 2, cells)
    enough = (number > 30).all(0)
    jacobian = np.zeros((2 * cells, 6 * cells))
    difference = np.zeros(2 * cells)
    for k, total in enumerate(values):
        mean = total / np.maximum(number, 1)
        difference[k * cells : (k + 1) * cells] = mean[1] - mean[0]
        for side, sign in ((0, -1.0), (1, 1.0)):
            rows = k * cells + np.arange(cells)
            weight = sign / np.maximum(number[side], 1)
            jacobian[rows, ((k + 1) * 2 + side) * cells + np.arange(cells)] = weight
            jacobian[rows, side * cells + np.arange(cells)] = -weight * mean[side]
    covariance = jacobian @ sums.matrix @ jacobian.T
    use = np.tile(enough, 2)
    return _chi2(difference[use], covariance[np.ix_(use, use)], len(c))


def _chi2(vector: Array, covariance: Array, num_stars: int) -> StellarTest:
    scale = np.sqrt(np.diag(covariance))
    use = scale > 0
    scale = scale[use]
    correlation = covariance[np.ix_(use, use)] / np.outer(scale, scale)
    scaled = vector[use] / scale
    chi2 = float(scaled @ np.linalg.solve(correlation + 1e-9 * np.eye(len(scaled)), scaled))
    dof = len(scaled)
    excess = chi2 - dof
    spread = np.sqrt(2 * dof + 4 * max(excess, 0.0))
    high, low = (np.sqrt(max(e, 0.0) / num_stars) for e in (excess + spread, excess - spread))
    return StellarTest(
        chi2,
        dof,
        float(stats.chi2.sf(chi2, dof)),
        float(np.sqrt(max(excess, 0.0) / num_stars)),
        float((high - low) / 2),
    )


def _unbiased(parts: list[Array]) -> Array:
    """2 ψ(w) − mean ψ(redraws): free of the bias of measurement errors to first order."""
    first, *others = parts
    return first if not others else 2 * first - np.mean(others, axis=0)


def _placed(values: Array, cell: NDArray[np.intp], count: int) -> Array:
    out = np.zeros((len(values), count))
    good = np.isfinite(values)
    out[np.flatnonzero(good), cell[good]] = values[good]
    return out


def _edges(values: Array, count: int) -> Array:
    return np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])
