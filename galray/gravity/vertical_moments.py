"""Weak-form vertical moments: linear in the density of thin horizontal bins, additive over cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import BSpline

from galray.errors import GalrayError
from galray.gravity.vertical_selection import VerticalSample
from galray.gravity.vertical_velocity import VelocityEstimate
from galray.units import MSUN_PC3, G

__all__ = [
    "DensityBasis",
    "MomentFit",
    "MomentSums",
    "hat_basis",
    "layer_basis",
    "moment_sums",
    "solve_moments",
]

Array = NDArray[np.floating[Any]]

FOUR_PI_G = 4 * np.pi * G * MSUN_PC3
"""4πG in (km/s)²/kpc² per Msun/pc³: inside this room densities are in Msun/pc³."""


@dataclass(frozen=True)
class DensityBasis:
    """ρ(z) = Σ_p θ_p B_p(|z|), θ in Msun/pc³.

    Attributes:
        name: For the report.
        edges: (J+1,) edges of the thin bins in |z|, kpc, from 0.
        matrix: (J, P) mean of each function in each bin.
        centre: (P,) value of each function at z = 0.
    """

    name: str
    edges: Array
    matrix: Array
    centre: Array

    def density(self, z: Array) -> Array:
        """(Z, P) value of each function at |z|, linear between bin centres."""
        middle = 0.5 * (self.edges[1:] + self.edges[:-1])
        grid = np.concatenate([[0.0], middle])
        rows = np.vstack([self.centre, self.matrix])
        return np.stack([np.interp(np.abs(z), grid, column) for column in rows.T], -1)

    def column(self, z: Array) -> Array:
        """(Z, P) ∫₀^z of each function, kpc; odd in z."""
        total = np.vstack(
            [np.zeros(len(self.centre)), np.cumsum(self.matrix * np.diff(self.edges)[:, None], 0)]
        )
        return np.stack([np.sign(z) * np.interp(np.abs(z), self.edges, column) for column in total.T], -1)


def layer_basis(edges: Array, heights: Sequence[float]) -> DensityBasis:
    """Layers ρ ∝ sech²(z/h); h much larger than the range is a uniform density.

    Arguments:
        edges: (J+1,) bin edges in |z|, kpc.
        heights: h of each layer, kpc.
    """
    h = np.asarray(heights, dtype=np.float64)
    integral = h * np.tanh(edges[:, None] / h)
    name = " + ".join(
        "uniform" if value > 5 * edges[-1] else f"sech²(z/{1000 * value:.0f} pc)" for value in h
    )
    return DensityBasis(name, edges, np.diff(integral, axis=0) / np.diff(edges)[:, None], np.ones(len(h)))


def hat_basis(edges: Array, knots: Sequence[float]) -> DensityBasis:
    """Density linear between `knots` in |z| (kpc) and constant beyond the last."""
    k = np.asarray(knots, dtype=np.float64)
    middle = 0.5 * (edges[1:] + edges[:-1])
    matrix = np.stack([np.interp(middle, k, row) for row in np.eye(len(k))], 1)
    name = "linear between " + ", ".join(f"{1000 * value:.0f}" for value in k) + " pc"
    return DensityBasis(name, edges, matrix, np.eye(len(k))[0])


@dataclass(frozen=True)
class MomentSums:
    """Sums over the stars of each block (one tracer group in one cell): additive.

    For g = v exp(−v²/2s²) h_k(z), stationarity of f says
    Σ_i w_i [v² e h_k'(z) + a(z) (1 − v²/s²) e h_k(z)] = 0, e = exp(−v²/2s²).

    Attributes:
        source: (blocks, K) Σ w v² e h'.
        response: (blocks, K, J) the second sum per Msun/pc³ in each bin.
        noise: (blocks, K, K) Σ_i r_i r_iᵀ, r_i the star's term at the pilot density.
        block_cell: (blocks,) cell of each block.
        block_group: (blocks,) group of each block.
        stars: (blocks,) stars used.
        test_centre: (K,) centre of each test function, kpc from the plane.
        edges: (J+1,) bin edges, kpc.
    """

    source: Array
    response: Array
    noise: Array
    block_cell: NDArray[np.int64]
    block_group: NDArray[np.int64]
    stars: NDArray[np.int64]
    test_centre: Array
    edges: Array


def window_estimates(y: Array, variance: Array, window: float) -> tuple[Array, Array]:
    """Unbiased estimates, from noisy velocities, of (1 − v²/s²) exp(−v²/2s²) and v² exp(−v²/2s²).

    exp(−v²/2s²) ← (s/s') exp(−y²/2s'²), s'² = s² − τ² (Gaussian deconvolution of an error of variance τ²),
    and v² exp(−v²/2s²) ← s³ ∂/∂s of the same; for s → ∞ that is y² − τ². s'² is kept above s²/5.

    Arguments:
        y: Observed v, km/s, (N,).
        variance: τ² of each, (km/s)², (N,).
        window: s, km/s.
    """
    narrow2 = np.maximum(window**2 - variance, 0.2 * window**2)
    narrow = np.sqrt(narrow2)
    factor = np.exp(-(y**2) / (2 * narrow2))
    square = window**3 * factor * (1 / narrow + (window**2 / narrow**3) * (y**2 / narrow2 - 1))
    return window / narrow * factor - square / window**2, square


def moment_sums(
    sample: VerticalSample,
    velocity: VelocityEstimate,
    *,
    sun_height: float,
    height_limit: float,
    num_tests: int,
    window: float,
    pilot: Array,
    edges: Array,
    area_floor: float,
    use_area: bool = True,
) -> MomentSums:
    """One pass over the stars.

    Arguments:
        sample: The stars.
        velocity: Their velocities and weights.
        sun_height: Height of the Sun above the plane, kpc.
        height_limit: The test functions vanish beyond this |z| from the plane, kpc.
        num_tests: Number of cubic B-splines h_k.
        window: s, km/s.
        pilot: (J,) density of the noise estimate, Msun/pc³.
        edges: (J+1,) bin edges in |z|, kpc.
        area_floor: A cell whose area falls below this fraction of its median anywhere in range is left out.
        use_area: False pretends that the selection is complete (to show what it does).

    Raises:
        GalrayError: No cell is left, or a cell's area does not reach the limit.
    """
    z = sample.height + sun_height
    usable = (np.abs(z) < height_limit) & (velocity.weight > 0)
    in_range = np.abs(sample.area_height + sun_height) < height_limit
    if in_range.sum() < 10:
        raise GalrayError("the effective areas do not cover the heights asked for", "lower height_limit_kpc")
    within = sample.area[:, in_range]
    keep = within.min(1) > area_floor * np.median(within, 1) if use_area else np.ones(len(within), dtype=bool)
    if not keep.any():
        raise GalrayError(
            "no cell has a usable effective area over the whole range", "lower height_limit_kpc"
        )
    usable &= keep[sample.cell]
    weight = velocity.weight / (sample.star_area() / np.median(within) if use_area else 1.0)
    knots = np.linspace(-height_limit, height_limit, num_tests + 4)
    splines = [BSpline.basis_element(knots[k : k + 5], extrapolate=False) for k in range(num_tests)]
    slopes = [spline.derivative() for spline in splines]
    blocks = np.unique(np.stack([sample.cell[usable], sample.group[usable]], 1), axis=0)
    if len(blocks) == 0:
        raise GalrayError("no star with a vertical velocity lies within the height limit", "check the cuts")
    order = np.flatnonzero(usable)
    shape = (len(blocks), num_tests)
    source, response = np.zeros(shape), np.zeros((*shape, len(edges) - 1))
    noise, stars = np.zeros((*shape, num_tests)), np.zeros(len(blocks), dtype=np.int64)
    pilot_force = np.concatenate([[0.0], np.cumsum(pilot * np.diff(edges))])
    for index, (cell, group) in enumerate(blocks):
        own = order[(sample.cell[order] == cell) & (sample.group[order] == group)]
        height, y, tau2, w = z[own], velocity.value[own], velocity.variance[own], weight[own]
        flat, square = window_estimates(y, tau2, window)
        h = np.stack([np.nan_to_num(spline(height)) for spline in splines], 1)
        dh = np.stack([np.nan_to_num(slope(height)) for slope in slopes], 1)
        # a(z) per unit density in a bin |z| ∈ [e_j, e_j+1]: −4πG sign(z) times the part of the bin below |z|
        inside = np.clip(np.abs(height)[:, None] - edges[:-1], 0, np.diff(edges))
        force = -FOUR_PI_G * np.sign(height)
        source[index] = (w * square) @ dh
        response[index] = (h * (w * flat * force)[:, None]).T @ inside
        own_pull = w * flat * force * np.interp(np.abs(height), edges, pilot_force)
        terms = dh * (w * square)[:, None] + h * own_pull[:, None]
        noise[index] = terms.T @ terms
        stars[index] = len(own)
    return MomentSums(
        source=source,
        response=response,
        noise=noise,
        block_cell=blocks[:, 0].astype(np.int64),
        block_group=blocks[:, 1].astype(np.int64),
        stars=stars,
        test_centre=knots[2:-2],
        edges=edges,
    )


@dataclass(frozen=True)
class MomentFit:
    """Solution of the moment equations by the generalised method of moments.

    Attributes:
        theta: (P,) Msun/pc³.
        covariance: (P, P) from the stars' own scatter.
        jackknife: (P, P) from leaving out one cell at a time; the star scatter where cells are few.
        chi2: χ² of the residual moments.
        dof: Degrees of freedom.
        group_chi2: (groups,) the part of each group.
        kernel: (P, J) response of θ to a unit density in each bin.
        basis: The density basis.
        residual: (groups, K) residual moments over their standard errors.
    """

    theta: Array
    covariance: Array
    jackknife: Array
    chi2: float
    dof: int
    group_chi2: Array
    kernel: Array
    basis: DensityBasis
    residual: Array

    def value(self, row: Array) -> tuple[float, float]:
        """Value and jackknife error of a linear function of θ."""
        return float(row @ self.theta), float(np.sqrt(max(float(row @ self.jackknife @ row), 0.0)))

    @property
    def central(self) -> tuple[float, float]:
        """ρ(0) and its jackknife error, Msun/pc³."""
        return self.value(self.basis.centre)

    def mean_within(self, z: float) -> tuple[float, float]:
        """Mean density within |z|, −a_z(z)/4πGz, and its jackknife error, Msun/pc³."""
        return self.value(self.basis.column(np.array([z]))[0] / z)


def solve_moments(
    sums: MomentSums,
    basis: DensityBasis,
    *,
    groups: Sequence[int] | None = None,
    tests: NDArray[np.bool_] | None = None,
) -> MomentFit:
    """Solve for the density, with weight = inverse covariance of the residual moments of each group.

    Arguments:
        sums: The sums.
        basis: Density basis on the same bins.
        groups: Only these tracer groups.
        tests: (K,) which test functions to use.

    Raises:
        GalrayError: Fewer moments than parameters.
    """
    names = np.unique(sums.block_group) if groups is None else np.asarray(groups)
    chosen = np.ones(len(sums.test_centre), dtype=bool) if tests is None else tests
    if len(names) * chosen.sum() <= basis.matrix.shape[1]:
        raise GalrayError("fewer vertical moments than parameters", "use fewer layers or more test functions")
    used = np.isin(sums.block_group, names)
    source = sums.source[used][:, chosen]
    fine = sums.response[used][:, chosen]
    response = fine @ basis.matrix
    noise = sums.noise[used][:, chosen][:, :, chosen]
    block_group, block_cell = sums.block_group[used], sums.block_cell[used]
    weights = []
    for name in names:
        total = noise[block_group == name].sum(0)
        weights.append(np.linalg.inv(total + 1e-9 * np.trace(total) / len(total) * np.eye(len(total))))

    def solution(without: int | None) -> tuple[Array, Array]:
        normal, right = np.zeros((basis.matrix.shape[1],) * 2), np.zeros(basis.matrix.shape[1])
        for name, inverse in zip(names, weights, strict=True):
            own = (block_group == name) & (block_cell != (-1 if without is None else without))
            a, y = response[own].sum(0), source[own].sum(0)
            normal += a.T @ inverse @ a
            right -= a.T @ inverse @ y
        return np.asarray(np.linalg.solve(normal, right)), normal

    theta, normal = solution(None)
    covariance = np.linalg.inv(normal)
    kernel = np.zeros((len(theta), fine.shape[-1]))
    chi2, residual = [], []
    for name, inverse in zip(names, weights, strict=True):
        own = block_group == name
        a, y = response[own].sum(0), source[own].sum(0)
        r = y + a @ theta
        chi2.append(float(r @ inverse @ r))
        residual.append(r / np.sqrt(np.diag(noise[own].sum(0))))
        kernel += covariance @ a.T @ inverse @ fine[own].sum(0)
    cells = np.unique(block_cell)
    jackknife = covariance
    if len(cells) >= 8:
        left_out = np.array([solution(int(cell))[0] for cell in cells])
        spread = left_out - left_out.mean(0)
        jackknife = (len(cells) - 1) / len(cells) * spread.T @ spread
    return MomentFit(
        theta=theta,
        covariance=covariance,
        jackknife=jackknife,
        chi2=float(np.sum(chi2)),
        dof=int(len(names) * chosen.sum() - len(theta)),
        group_chi2=np.array(chi2),
        kernel=kernel,
        basis=basis,
        residual=np.array(residual),
    )
