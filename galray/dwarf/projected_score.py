"""The score of the projected density of a sphere, s(R, v_los), and what it says of gravity: not much alone.

With sky positions and line-of-sight velocities only, the stars' density is P(ln R, v). Its score, learned as
in three dimensions, gives without bins or derivatives of noisy profiles

    E[∂_u ln P | R] = dln(R² Σ)/dln R,        σ_los²(R), kurtosis(R) and their slopes,

radius by radius. It does not give a(r): integrating the collisionless Boltzmann equation over z, v_x and v_y
leaves ∂_v(⟨a_z⟩ P) = 0, which symmetry already grants. What remains is global, the projected virial theorem
⟨GM/r⟩ = 3 ⟨v_los²⟩ over all stars, whatever the anisotropy; and with an isotropic velocity distribution
(or any given β) the Jeans equation, whose Abel inversion asks for just these slopes:

    ν σ²(r) = −(1/π) ∫_r^∞ d(Σ σ_los²)/dR dR/√(R² − r²),      GM/r = −σ² dln(ν σ²)/dln r      (β = 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galray.dwarf.invariant_score import InvariantScore, train_score
from galray.dwarf.spherical_settings import SphericalScoreSettings
from galray.errors import GalrayError
from galray.units import G

__all__ = ["ProjectedScore", "fit_projected_score", "projected_virial"]

Array = NDArray[np.float64]

_REACH = 6.0  # of the velocity spread: the range of the quadrature
_TURN = 0.12  # the step of R = r cosh t in the Abel inversion


@dataclass
class ProjectedScore:
    """A trained score of P(ln R, v_los).

    Attributes:
        network: The score in (ln R, v).
        training: What the training did.
        velocity_error: Of the stars' velocities, km/s; taken out of the dispersions.
    """

    network: InvariantScore
    training: Any
    velocity_error: float

    def score(self, R: Array, v: Array) -> tuple[Array, Array]:
        """(∂ ln P/∂ ln R, ∂ ln P/∂v) at projected radii in kpc and velocities in km/s, shape (n,) each."""
        s = self.network.score(np.log(R), np.abs(v)[:, None])
        return s[:, 0], s[:, 1] * np.sign(v)

    def surface_slope(self, R: Array) -> Array:
        """Give dln Σ/dln R, shape (n,)."""
        return self._means(R)[0] - 2

    def dispersion(self, R: Array) -> Array:
        """σ_los(R) in km/s without the velocity errors, shape (n,)."""
        return np.sqrt(np.maximum(self._means(R)[1] - self.velocity_error**2, 0.0))

    def dispersion_slope(self, R: Array) -> Array:
        """Give dln σ_los²/dln R, shape (n,)."""
        _, square, _, slope = self._means(R)
        return slope / np.maximum(square - self.velocity_error**2, 1e-12)

    def kurtosis(self, R: Array) -> Array:
        """⟨v⁴⟩/σ_los⁴ without the velocity errors (3 for a Gaussian), shape (n,)."""
        _, square, fourth, _ = self._means(R)
        clean = square - self.velocity_error**2
        return (fourth - 6 * clean * self.velocity_error**2 - 3 * self.velocity_error**4) / clean**2

    def isotropic_mass(self, r: Array) -> Array:
        """M(<r) in Msun if the velocities are isotropic, shape (n,): the Jeans equation by Abel inversion.

        Wrong by a factor that grows towards both ends if they are not: the score cannot tell.
        """
        low, high = 0.8 * r.min(), 400 * r.max()
        grid = np.geomspace(low, high, 500)
        slope, square, _, square_slope = self._means(grid)
        clean = np.maximum(square - self.velocity_error**2, 1e-12)
        surface = np.exp(_cumulative(slope - 2, grid))
        # −d(Σσ²)/dln R
        fall = -surface * (clean * (slope - 2) + square_slope)
        t = np.arange(0.0, 6.0, _TURN)
        weight = np.full(len(t), _TURN)
        weight[0] *= 0.5
        step = math.log(high / low) / 499
        centre = grid[: np.searchsorted(grid, 1.25 * r.max()) + 2]
        R = centre[:, None] * np.cosh(t)
        values = np.interp(np.log(R), np.log(grid), fall, right=0.0)
        # dR/√(R²−r²) = dt, and the integrand d/dR = (d/dln R)/R
        pressure = (values / R) @ weight / np.pi
        surface_values = np.interp(np.log(R), np.log(grid), -surface * (slope - 2), right=0.0)
        density = (surface_values / R) @ weight / np.pi
        speed2 = -(pressure / density) * np.gradient(np.log(pressure), step)
        return np.asarray(np.interp(np.log(r), np.log(centre), speed2) * r / G)

    def _means(self, R: Array) -> tuple[Array, Array, Array, Array]:
        """⟨s_u⟩, ⟨v²⟩, ⟨v⁴⟩ and d⟨v²⟩/dln R under exp ψ at each radius, shape (n,) each."""
        u = np.log(R)
        node, weight = np.polynomial.legendre.leggauss(64)
        v = 0.5 * (node + 1) * _REACH * self.network.velocity_reach(u)  # (n, nodes)
        place, speeds = np.repeat(u, len(node)), v.reshape(-1, 1)
        psi = self.network.log_density(place, speeds).reshape(v.shape)
        s_u = self.network.score(place, speeds)[:, 0].reshape(v.shape)
        p = weight * np.exp(psi - psi.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        mean, square = (p * s_u).sum(1), (p * v**2).sum(1)
        return mean, square, (p * v**4).sum(1), (p * s_u * v**2).sum(1) - mean * square


def fit_projected_score(
    x: Any,
    y: Any,
    v: Any,
    velocity_error: float = 0.0,
    settings: SphericalScoreSettings | None = None,
    *,
    seed: int = 0,
) -> ProjectedScore:
    """Train the score of the projected density of a sphere.

    Arguments:
        x: Offsets from the centre on the sky in kpc, shape (n,).
        y: The other offset, shape (n,).
        v: Line-of-sight velocities about the systemic one, km/s, shape (n,).
        velocity_error: Standard deviation of their Gaussian noise, km/s.
        settings: Network and training.
        seed: Of initial weights, held-out stars and batches.

    Raises:
        GalrayError: Values that are not finite, a star at the centre, or too few stars.
    """
    R, v = _sky(x, y, v)
    if len(R) < 300:
        raise GalrayError(f"{len(R)} stars are too few to train a score", "use galray.dwarf.fit_halo")
    settings = settings or SphericalScoreSettings()
    network, training = train_score(np.log(R), np.abs(v)[:, None], (1,), settings, seed)
    return ProjectedScore(network, training, float(velocity_error))


def projected_virial(x: Any, y: Any, v: Any, velocity_error: float | Array = 0.0) -> tuple[float, float]:
    """⟨GM/r⟩ over the stars in (km/s)², with its standard error: 3 ⟨v_los² − σ²⟩, for any anisotropy.

    Arguments:
        x: Offsets on the sky in kpc, shape (n,).
        y: The other offset, shape (n,).
        v: Line-of-sight velocities about the systemic one, km/s, shape (n,).
        velocity_error: Standard deviation of their noise, km/s, one or (n,).
    """
    _, v = _sky(x, y, v)
    square = 3 * (v**2 - np.asarray(velocity_error) ** 2)
    return float(square.mean()), float(square.std() / math.sqrt(len(v)))


def _sky(x: Any, y: Any, v: Any) -> tuple[Array, Array]:
    R, v = np.hypot(np.asarray(x, dtype=float), np.asarray(y, dtype=float)), np.asarray(v, dtype=float)
    bad = np.flatnonzero(~(np.isfinite(R) & np.isfinite(v) & (R > 0)))
    if bad.size:
        raise GalrayError(
            f"star {bad[0]} has no finite place and velocity, or stands at the centre", "remove such rows"
        )
    return R, v


def _cumulative(slope: Array, grid: Array) -> Array:
    step = np.diff(np.log(grid))
    return np.concatenate([[0.0], np.cumsum(0.5 * step * (slope[1:] + slope[:-1]))])
