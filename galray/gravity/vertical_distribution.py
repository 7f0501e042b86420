"""Vertical potential by maximum likelihood: a mixture of isothermal populations in one potential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from galray.errors import GalrayError
from galray.gravity.vertical_moments import FOUR_PI_G, DensityBasis
from galray.gravity.vertical_selection import VerticalSample
from galray.gravity.vertical_velocity import VelocityEstimate

__all__ = ["DistributionFit", "fit_distribution"]

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class DistributionFit:
    """Maximum of the likelihood.

    Attributes:
        theta: (P,) density parameters, Msun/pc³.
        covariance: (P, P) by the sandwich estimator with one score per cell.
        sun_height: kpc, and its error.
        mean_velocity: Mean W with respect to the Sun, km/s.
        dispersions: (K,) σ_z of the components, km/s.
        fractions: (groups, K) share of the density in the plane.
        log_likelihood: At the maximum.
        iterations: Of the optimiser.
        converged: Whether the optimiser says so.
        basis: Density basis.
    """

    theta: Array
    covariance: Array
    sun_height: tuple[float, float]
    mean_velocity: float
    dispersions: Array
    fractions: Array
    log_likelihood: float
    iterations: int
    converged: bool
    basis: DensityBasis

    def value(self, row: Array) -> tuple[float, float]:
        """Value and error of a linear function of θ."""
        return float(row @ self.theta), float(np.sqrt(max(float(row @ self.covariance @ row), 0.0)))

    @property
    def central(self) -> tuple[float, float]:
        """ρ(0) and its error, Msun/pc³."""
        return self.value(self.basis.centre)

    def mean_within(self, z: float) -> tuple[float, float]:
        """Mean density within |z| and its error, Msun/pc³."""
        return self.value(self.basis.column(np.array([z]))[0] / z)


class _Likelihood:
    """Σ_i log[n_g(z_i) S_c(z_i) / ∫ n_g S_c dz] + Σ_i ω_i log p_g(W_i | z_i) of each cell's stars.

    n_g = Σ_k c_gk exp(−Φ/σ_k²) and p_g(W|z) = Σ_k c_gk exp(−Φ/σ_k²) N(W; W̄, σ_k² + τ_i²) / n_g(z), with
    ω the weights and τ² the error variances of `VelocityEstimate`. Parameters, all of order one:
    θ/0.05, z☉/0.02 kpc, W̄/10, log σ_k, log c_gk (k ≥ 1).
    """

    def __init__(
        self,
        sample: VerticalSample,
        velocity: VelocityEstimate,
        basis: DensityBasis,
        components: int,
        range_: float,
    ) -> None:
        self.k, self.p = components, basis.matrix.shape[1]
        self.groups = len(sample.group_names)
        inside = np.abs(sample.height) < range_
        cell, group = sample.cell[inside], sample.group[inside]
        grid = np.linspace(-range_, range_, 361)
        self.cells, cell = np.unique(cell, return_inverse=True)
        self.grid = torch.as_tensor(grid)
        area = np.stack([np.interp(grid, sample.area_height, sample.area[c]) for c in self.cells])
        self.area = torch.as_tensor(area / area.mean(1, keepdims=True))
        blocks, index = np.unique(np.stack([cell, group], 1), axis=0, return_inverse=True)
        self.norm_cell, self.norm_group = torch.as_tensor(blocks[:, 0]), torch.as_tensor(blocks[:, 1])
        self.norm_count = torch.as_tensor(np.bincount(index.ravel(), minlength=len(blocks)).astype(float))
        # Φ = 4πG Σ_p θ_p ∫₀^z (∫₀^z' B_p) on a fine grid
        fine = np.linspace(0, range_ + 0.1, 1200)
        column = basis.column(fine)
        slope = np.vstack(
            [np.zeros(self.p), np.cumsum(0.5 * (column[1:] + column[:-1]) * (fine[1] - fine[0]), 0)]
        )
        self.step = float(fine[1])
        self.table = torch.as_tensor(FOUR_PI_G * slope)
        self.height = torch.as_tensor(sample.height[inside])
        self.cell, self.group = torch.as_tensor(cell), torch.as_tensor(group)
        weight = velocity.weight[inside]
        self.moving = torch.as_tensor(np.flatnonzero(weight > 0))
        self.weight = torch.as_tensor(weight[weight > 0])
        self.w = torch.as_tensor(velocity.value[inside][weight > 0])
        self.w_variance = torch.as_tensor(velocity.variance[inside][weight > 0])

    def unpack(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        p, k, g = self.p, self.k, self.groups
        theta, sun, w0, s, c = torch.split(x, [p, 1, 1, k, g * (k - 1)])
        logits = torch.cat([torch.zeros(g, 1, dtype=x.dtype), c.reshape(g, k - 1)], 1)
        return {
            "theta": 0.05 * theta, "sun": 0.02 * sun, "w0": 10 * w0, "sigma": s.exp(),
            "log_c": torch.log_softmax(logits, 1),
        }  # fmt: skip

    def potential(self, z: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        table = self.table @ theta
        position = (z.abs() / self.step).clamp(max=len(table) - 1.001)
        low = position.floor().long().detach()
        part = position - low
        return table[low] * (1 - part) + table[low + 1] * part

    def cell_values(self, x: torch.Tensor) -> torch.Tensor:
        """(cells,) log-likelihood of each cell's stars."""
        q = self.unpack(x)
        sigma2, log_c = q["sigma"] ** 2, q["log_c"]
        phi_grid = self.potential(self.grid + q["sun"], q["theta"])
        density = torch.exp(-phi_grid[:, None] / sigma2) @ log_c.exp().T  # (grid, groups)
        total = torch.einsum("bz,zb->b", self.area[self.norm_cell], density[:, self.norm_group])
        out = torch.zeros(len(self.cells), dtype=x.dtype)
        out = out.index_add(0, self.norm_cell, -self.norm_count * total.log())
        phi = self.potential(self.height + q["sun"], q["theta"])
        terms = log_c[self.group] - phi[:, None] / sigma2
        log_n = torch.logsumexp(terms, 1)
        out = out.index_add(0, self.cell, log_n)
        variance = sigma2 + self.w_variance[:, None]
        joint = terms[self.moving] - 0.5 * ((self.w - q["w0"])[:, None] ** 2 / variance + variance.log())
        conditional = torch.logsumexp(joint, 1) - log_n[self.moving]
        return out.index_add(0, self.cell[self.moving], self.weight * conditional)

    def start(self, sun_height: float, theta: Array) -> Array:
        sigma = np.geomspace(7.0, 45.0, self.k)
        weights = np.zeros(self.groups * (self.k - 1))
        return np.concatenate([theta / 0.05, [sun_height / 0.02], [0.0], np.log(sigma), weights])


def fit_distribution(
    sample: VerticalSample,
    velocity: VelocityEstimate,
    basis: DensityBasis,
    *,
    components: int = 6,
    range_kpc: float = 0.34,
    sun_height: float = 0.018,
    theta: Array | None = None,
    iterations: int = 250,
) -> DistributionFit:
    """Fit n(z) of all stars and p(W|z) of those with a velocity: f = Σ_k c_gk exp(−(Φ + W²/2)/σ_k²).

    A composite likelihood: the density is that of all stars under the known area, the velocities enter
    conditioned on height and reweighted, so the selection of velocities never shapes the density. All
    groups share Φ and σ_k (in the spirit of Kuijken & Gilmore 1989 and Holmberg & Flynn 2000).

    Arguments:
        sample: The stars.
        velocity: Their vertical velocities.
        basis: Density basis (its bins must reach `range_kpc` + |z☉| for a strict result).
        components: Isothermal components K.
        range_kpc: Heights above the Sun used, |z| below this.
        sun_height: Start of the Sun's height, kpc.
        theta: Start of the density parameters, Msun/pc³.
        iterations: Most L-BFGS iterations.

    Raises:
        GalrayError: Fewer than 1000 stars, or the likelihood is not finite.
    """
    if len(sample) < 1000:
        raise GalrayError(
            f"{len(sample)} stars are too few for the distribution function", "take a larger sample"
        )
    model = _Likelihood(sample, velocity, basis, components, range_kpc)
    count = float(len(sample))

    first = (
        np.full(basis.matrix.shape[1], 0.08 / basis.matrix.shape[1]) if theta is None else np.asarray(theta)
    )
    start = model.start(sun_height, first)
    # a weak prior keeps the components apart and the flat directions of a mixture finite
    width = np.full(len(start), np.inf)
    width[len(first) + 2 : len(first) + 2 + components] = 0.3
    width[len(first) + 2 + components :] = 2.0
    precision, centre = torch.as_tensor(width**-2), torch.as_tensor(start)

    def objective(x: Array) -> tuple[float, Array]:
        t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        value = (0.5 * (precision * (t - centre) ** 2).sum() - model.cell_values(t).sum()) / count
        (gradient,) = torch.autograd.grad(value, t)
        if not torch.isfinite(value):
            return 1e10, np.zeros_like(x)
        return float(value.detach()), gradient.numpy()

    found = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "ftol": 1e-10, "gtol": 1e-6},
    )
    x = found.x
    if not np.isfinite(found.fun) or found.fun >= 1e9:
        raise GalrayError(
            "the likelihood of the vertical distribution function is not finite", "check the velocities"
        )
    covariance = _sandwich(model, objective, x, count)
    p = len(first)
    q = model.unpack(torch.as_tensor(x))
    order = np.argsort(q["sigma"].numpy())
    return DistributionFit(
        theta=q["theta"].numpy(),
        covariance=covariance[:p, :p] * 0.05**2,
        sun_height=(float(q["sun"]), float(0.02 * np.sqrt(covariance[p, p]))),
        mean_velocity=velocity.mean_motion[2] + float(q["w0"]),
        dispersions=q["sigma"].numpy()[order],
        fractions=q["log_c"].exp().numpy()[:, order],
        log_likelihood=-float(found.fun) * count,
        iterations=int(found.nit),
        converged=bool(found.success),
        basis=basis,
    )


def _sandwich(model: _Likelihood, objective: object, x: Array, count: float) -> Array:
    """H⁻¹ (Σ_c s_c s_cᵀ) H⁻¹ with one score per cell; H⁻¹ where the cells are few."""
    size = len(x)
    hessian = np.zeros((size, size))
    for i in range(size):
        step = np.zeros(size)
        step[i] = 1e-4
        hessian[i] = (objective(x + step)[1] - objective(x - step)[1]) / 2e-4  # type: ignore[operator]
    hessian = 0.5 * (hessian + hessian.T) * count
    values, vectors = np.linalg.eigh(hessian)
    values = np.maximum(values, 0.1)  # no direction is worse known than the prior says
    inverse = (vectors / values) @ vectors.T
    if len(model.cells) < 8:
        return np.asarray(inverse)
    t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    per_cell = model.cell_values(t)
    scores = np.stack([torch.autograd.grad(v, t, retain_graph=True)[0].numpy() for v in per_cell])
    cells = len(scores)
    middle = cells / (cells - 1) * scores.T @ scores
    # never smaller than the curvature says: few cells make the sandwich noisy
    sandwich = inverse @ middle @ inverse
    scale = np.sqrt(np.maximum(np.diag(inverse) / np.maximum(np.diag(sandwich), 1e-300), 1.0))
    return np.asarray(sandwich * np.outer(scale, scale))
