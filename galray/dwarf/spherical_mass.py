"""A positive, smooth ρ(r) from moment equations that are linear in the enclosed mass.

Both estimators for stars with known radii, the weak-form moments and the score, end in equations

    b_k = E[c_k(r) G M(r) / r],    k = 1 … K,

averaged over the stars. ρ is positive by construction: ln ρ has a slope −γ(r) that is piecewise linear in
ln r, with a Gaussian prior on γ at the first knot and on its growth from knot to knot; so M = ∫ 4π r² ρ dr
rises, and noise is not differentiated twice. The fit is iterated generalised least squares, weighted by
the inverse scatter of the stars' own moments; its posterior is Gaussian in (ln ρ, γ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse
from scipy.interpolate import BSpline

from galray.dwarf.profiles import SlopeProfile
from galray.dwarf.spherical_settings import SphericalMassSettings
from galray.errors import GalrayError
from galray.units import G

__all__ = ["RadialMass", "RadialMoments", "TestFunctions", "interpolation", "radial_grid", "solve_mass"]

Array = NDArray[np.float64]

_GRID = 400  # radii of the quadrature of M
_RIDGE = 1e-8  # of the unit diagonal of the scaled scatter


class TestFunctions:
    """Cubic B-splines in ln r over the stars, constant beyond the outer quantiles; they add up to one.

    Arguments:
        r: Radii of stars in kpc, shape (n,): knots stand at their quantiles.
        count: Number K of functions, at least 4.
    """

    __test__ = False  # not a test case

    def __init__(self, r: Array, count: int) -> None:
        x = np.log(r)
        # quantiles and equidistant knots in equal parts: enough stars everywhere, and reach
        share = np.linspace(0.0, 1.0, count - 2)
        low, high = np.quantile(x, [0.002, 0.998])
        inner = 0.5 * np.quantile(x, 0.002 + 0.996 * share) + 0.5 * (low + (high - low) * share)
        self.knots = np.concatenate([[inner[0]] * 3, inner, [inner[-1]] * 3])
        self.count = count
        self._low, self._high = inner[0], inner[-1]

    def __call__(self, r: Array) -> tuple[Array, Array]:
        """B_k and dB_k/dln r at radii (n,): shape (n, K) each."""
        x = np.log(r)
        inside = (x > self._low) & (x < self._high)
        basis = BSpline(self.knots, np.eye(self.count), 3)
        clipped = np.clip(x, self._low, self._high)
        return basis(clipped), basis(clipped, 1) * inside[:, None]


@dataclass
class RadialMoments:
    """What the stars say: b_k = Σ_i target_ik and the weights of GM/r on a grid of radii.

    The contribution of star i to the right-hand side is Σ_j (occupancy @ spread)_ij weight_jk G M(r_j)/r_j:
    its own radius where that is known, and where not, what its projected radius says of radii on average.

    Attributes:
        target: Left-hand sides per star, shape (n, K).
        grid: Radii in kpc, rising geometrically, shape (J,).
        weight: c_k at the grid, shape (J, K).
        occupancy: Sparse, shape (n, m).
        spread: Shape (m, J); none if m = J and it is the identity.
        radii: Radii (or their projections) for quantiles, kpc, shape (n,).
    """

    target: Array
    grid: Array
    weight: Array
    occupancy: Any
    spread: Array | None
    radii: Array

    def predict(self, mass: Array) -> Array:
        """Each star's right-hand side under masses (J,) in Msun at the grid: shape (n, K)."""
        on_grid = (G * mass / self.grid)[:, None] * self.weight
        return np.asarray(self.occupancy @ (on_grid if self.spread is None else self.spread @ on_grid))

    def sums(self, rows: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Σ target (K,) of some stars, and the matrix (K, J) that takes M(grid) to Σ c_k GM/r."""
        share = np.asarray(self.occupancy[rows].sum(0)).reshape(-1)
        share = share if self.spread is None else share @ self.spread
        return self.target[rows].sum(0), (self.weight * (share * G / self.grid)[:, None]).T


def radial_grid(r: Array) -> Array:
    """Radii in kpc for the quadrature of M, reaching beyond all stars (n,)."""
    return np.geomspace(0.5 * r.min(), 2 * r.max(), _GRID)


def interpolation(grid: Array, r: Array) -> Any:
    """Sparse (n, J): linear interpolation in ln r from a geometric grid (J,) to radii (n,)."""
    position = np.log(r / grid[0]) / np.log(grid[1] / grid[0])
    cell = np.clip(position.astype(int), 0, len(grid) - 2)
    part = position - cell
    rows = np.arange(len(r))
    return sparse.csr_array(
        (
            np.concatenate([1 - part, part]),
            (np.concatenate([rows, rows]), np.concatenate([cell, cell + 1])),
        ),
        shape=(len(r), len(grid)),
    )


@dataclass
class RadialMass:
    """A halo from moment equations, with its posterior.

    Attributes:
        profile: The form of ln ρ.
        parameters: (ln ρ at the reference radius, γ at the knots), shape (p,).
        covariance: Of the posterior, shape (p, p).
        replicas: Solutions without one block of stars at a time, shape (blocks, p).
        chi2: Of the moments at the solution.
        num_moments: Moments used.
        growth_sd: Prior standard deviation of γ from knot to knot that was used.
        range_kpc: Radii between which the stars speak (2nd and 98th percentile).
    """

    profile: SlopeProfile
    parameters: Array
    covariance: Array
    replicas: Array
    chi2: float
    num_moments: int
    growth_sd: float
    range_kpc: tuple[float, float]

    def density(self, r: Array) -> Array:
        """ρ(r) in Msun/kpc³ at radii in kpc, shape (*)."""
        return np.exp(self.profile.basis(r).numpy() @ self.parameters)

    def log_density_error(self, r: Array) -> Array:
        """Standard deviation of ln ρ(r), shape (*)."""
        basis = self.profile.basis(r).numpy()
        return np.sqrt(np.einsum("...i,ij,...j->...", basis, self.covariance, basis))

    def slope(self, r: Array) -> Array:
        """−γ(r) = d ln ρ / d ln r, shape (*)."""
        return -(self.profile.slope_basis(r).numpy() @ self.parameters[1:])

    def mass(self, r: Array) -> Array:
        """M(<r) in Msun, shape (*)."""
        return self._mass(np.asarray(r, dtype=float), self.parameters[None])[0]

    def draws(self, n: int, seed: int) -> Array:
        """Draw n parameters from the posterior, shape (n, p)."""
        rng = np.random.default_rng(seed)
        root = linalg.cholesky(self.covariance + 1e-12 * np.eye(len(self.covariance)), lower=True)
        return self.parameters + rng.standard_normal((n, len(self.parameters))) @ root.T

    def density_band(self, r: Array, level: float = 0.95) -> tuple[Array, Array]:
        """Lower and upper limit of ρ(r) in Msun/kpc³ at a probability, shape (*) each."""
        from scipy.stats import norm

        half = norm.ppf(0.5 + 0.5 * level) * self.log_density_error(r)
        centre = np.log(self.density(r))
        return np.exp(centre - half), np.exp(centre + half)

    def mass_band(self, r: Array, level: float = 0.95, *, seed: int = 0) -> tuple[Array, Array]:
        """Lower and upper limit of M(<r) in Msun at a probability, from 1000 draws, shape (*) each."""
        masses = self._mass(np.asarray(r, dtype=float), self.draws(1000, seed))
        low, high = np.quantile(masses, [0.5 - 0.5 * level, 0.5 + 0.5 * level], axis=0)
        return low, high

    def jackknife_error(self, r: Array) -> Array:
        """Standard deviation of ln ρ(r) from sample to sample, by the jackknife over blocks, shape (*)."""
        values = np.moveaxis(self.profile.basis(r).numpy() @ self.replicas.T, -1, 0)
        n = len(values)
        return np.sqrt((n - 1) / n * ((values - values.mean(0)) ** 2).sum(0))

    def _mass(self, r: Array, parameters: Array) -> Array:
        grid = np.geomspace(min(1e-3, 0.1 * r.min()), 1.01 * r.max(), 600)
        quadrature = _mass_matrix(grid)
        density = np.exp(parameters @ self.profile.basis(grid).numpy().T)
        masses = density @ quadrature.T
        return np.array([np.exp(np.interp(np.log(r), np.log(grid), np.log(m))) for m in masses])


def solve_mass(moments: RadialMoments, settings: SphericalMassSettings, *, seed: int = 0) -> RadialMass:
    """Fit ρ(r) to the moments of all stars.

    Arguments:
        moments: Left-hand sides and weights per star.
        settings: Knots, prior, blocks.
        seed: Of the deal of stars into blocks.

    Returns:
        The halo with posterior and jackknife.

    Raises:
        GalrayError: Fewer stars than the moments need, or values that are not finite.
    """
    n, count = moments.target.shape
    if n < 10 * count:
        raise GalrayError(
            f"{n} stars for {count} moments", "take more stars or fewer spherical test_functions"
        )
    system = _System(moments, settings, seed)
    if settings.growth_sd == "cv":
        scores = [(system.cross_validate(s), s) for s in settings.growth_sd_grid]
        growth = min(scores)[1]
    else:
        growth = float(settings.growth_sd)
    return system.solution(growth)


class _System:
    def __init__(self, moments: RadialMoments, settings: SphericalMassSettings, seed: int) -> None:
        self.settings, self.moments = settings, moments
        low, high = np.quantile(moments.radii, [settings.inner_quantile, settings.outer_quantile])
        reference = float(np.median(moments.radii))
        self.profile = SlopeProfile(np.geomspace(low, high, settings.knots), reference)
        self.log_basis = self.profile.basis(moments.grid).numpy()
        self.quadrature = _mass_matrix(moments.grid)
        self.block = np.random.default_rng(seed).permutation(len(moments.radii)) % settings.blocks
        pieces = [moments.sums(self.block == b) for b in range(settings.blocks)]
        self.targets = np.array([target for target, _ in pieces])
        self.matrices = np.array([matrix @ self.quadrature for _, matrix in pieces])
        self.counts = np.bincount(self.block, minlength=settings.blocks)

    def _start(self, target: Array, matrix: Array) -> Array:
        """The prior's own shape, scaled to the sum of all moments: the virial theorem."""
        parameters = self._prior_mean()
        shape = np.exp(self.log_basis @ parameters)
        parameters[0] += np.log(max(target.sum(), 1e-12) / (matrix @ shape).sum())
        return parameters

    def _prior_mean(self) -> Array:
        s = self.settings
        slopes = s.inner_slope + s.growth * np.arange(s.knots)
        return np.concatenate([[0.0], slopes])

    def _prior_precision(self, growth_sd: float) -> Array:
        k = self.settings.knots
        differences = np.zeros((k, k + 1))
        differences[0, 1] = 1 / self.settings.inner_slope_sd
        for i in range(1, k):
            differences[i, i], differences[i, i + 1] = -1 / growth_sd, 1 / growth_sd
        return differences.T @ differences

    def _scatter(self, parameters: Array) -> Array:
        mass = self.quadrature @ np.exp(self.log_basis @ parameters)
        residual = self.moments.target - self.moments.predict(mass)
        # fast stars at rare places would set the weights of whole moments: their pull is bounded
        scale = 1.4826 * np.median(np.abs(residual - residual.mean(0)), axis=0) + residual.std(0)
        limit = 12 * scale
        residual = np.clip(residual, -limit, limit)
        return residual.T @ residual

    def _fit(
        self, target: Array, matrix: Array, scatter: Array, growth_sd: float, start: Array
    ) -> tuple[Array, Array, float]:
        """Damped Gauss–Newton: parameters, Hessian and χ²."""
        scale = 1 / np.sqrt(np.diag(scatter))
        correlation = scatter * np.outer(scale, scale) + _RIDGE * np.eye(len(scale))
        root = linalg.cholesky(correlation, lower=True)

        def whiten(a: Array) -> Array:
            return np.asarray(linalg.solve_triangular(root, (a.T * scale).T, lower=True))

        white_target, white_matrix = whiten(target), whiten(matrix)
        precision, mean = self._prior_precision(growth_sd), self._prior_mean()

        def evaluate(p: Array) -> tuple[float, Array, Array]:
            density = np.exp(np.clip(self.log_basis @ p, -50, 60))
            residual = white_target - white_matrix @ density
            jacobian = (white_matrix * density) @ self.log_basis
            return float(residual @ residual), residual, jacobian

        parameters, damping = start.copy(), 1e-3
        chi2, residual, jacobian = evaluate(parameters)
        cost = chi2 + (parameters - mean) @ precision @ (parameters - mean)
        for _ in range(100):
            gradient = jacobian.T @ residual - precision @ (parameters - mean)
            hessian = jacobian.T @ jacobian + precision
            step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
            trial = parameters + np.clip(step, -1.0, 1.0)
            new = evaluate(trial)
            new_cost = new[0] + (trial - mean) @ precision @ (trial - mean)
            if new_cost < cost:
                done = cost - new_cost < 1e-9 * (1 + cost)
                parameters, cost, damping = trial, new_cost, max(0.3 * damping, 1e-9)
                chi2, residual, jacobian = new
                if done:
                    break
            else:
                damping *= 5
                if damping > 1e9:
                    break
        return parameters, jacobian.T @ jacobian + precision, chi2

    def _solve(
        self, keep: NDArray[np.bool_], growth_sd: float, start: Array | None = None
    ) -> tuple[Array, Array, float, Array]:
        target, matrix = self.targets[keep].sum(0), self.matrices[keep].sum(0)
        share = self.counts[keep].sum() / self.counts.sum()
        parameters = self._start(target, matrix) if start is None else start
        for _ in range(3 if start is None else 1):
            scatter = share * self._scatter(parameters)
            parameters, hessian, chi2 = self._fit(target, matrix, scatter, growth_sd, parameters)
        return parameters, hessian, chi2, scatter / share

    def cross_validate(self, growth_sd: float) -> float:
        """χ² of each block's moments under the fit to the others."""
        everything = np.ones(len(self.counts), dtype=bool)
        best, _, _, scatter = self._solve(everything, growth_sd)
        total = 0.0
        for b in range(len(self.counts)):
            keep = everything.copy()
            keep[b] = False
            parameters = self._solve(keep, growth_sd, best)[0]
            residual = self.targets[b] - self.matrices[b] @ np.exp(self.log_basis @ parameters)
            covariance = scatter * (self.counts[b] / self.counts.sum())
            total += float(residual @ np.linalg.solve(covariance, residual))
        return total

    def solution(self, growth_sd: float) -> RadialMass:
        everything = np.ones(len(self.counts), dtype=bool)
        parameters, hessian, chi2, _ = self._solve(everything, growth_sd)
        replicas = []
        for b in range(len(self.counts)):
            keep = everything.copy()
            keep[b] = False
            replicas.append(self._solve(keep, growth_sd, parameters)[0])
        low, high = np.quantile(self.moments.radii, [0.02, 0.98])
        return RadialMass(
            self.profile,
            parameters,
            np.asarray(np.linalg.inv(hessian), dtype=np.float64),
            np.array(replicas),
            chi2,
            self.targets.shape[1],
            growth_sd,
            (float(low), float(high)),
        )


def _mass_matrix(grid: Array) -> Array:
    """Q with M(grid) = Q ρ(grid): trapezia of 4π r³ ρ in ln r, and a core inside the first radius."""
    step = np.log(grid[1] / grid[0])
    shell = 4 * np.pi * grid**3 * step
    matrix = np.tril(np.tile(shell, (len(grid), 1)))
    matrix[np.diag_indices(len(grid))] *= 0.5
    matrix[:, 0] = 0.5 * shell[0]
    matrix[0, 0] = 0.0
    matrix[:, 0] += 4 * np.pi * grid[0] ** 3 / 3
    return matrix
