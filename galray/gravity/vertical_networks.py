"""Vertical acceleration of local stars from a flow and from a score network of f(z, v_z).

The same one-dimensional equation as the vertical moments, v ∂_z f + a(z) ∂_v f = 0, by the two other ways.
Known selections are undone by weights, so the weighted stars are draws of f itself; a sum of tracer groups
with any constant factors is stationary where each of them is, and one model serves them all.

    flow   n(z) p(v|z): n by maximum likelihood on |z| < L, p a conditional spline flow
    score  ∇g of a network g, minimising E[h (½|s|² + ∇·s) + h' s_z] with h = (1 − z⁴/L⁴)² (no border term)

From either, with the window w(v) = v exp(−v²/2s²) as instrument (Stein: E[w s_v] = −E[w']),

    a(z) = E[v w s_z | z] / E[w' | z].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.gravity.vertical_moments import FOUR_PI_G, DensityBasis
from galray.gravity.vertical_selection import VerticalSample
from galray.gravity.vertical_settings import VerticalNetworkSettings
from galray.gravity.vertical_velocity import VelocityEstimate

__all__ = [
    "VerticalFlow",
    "VerticalScore",
    "VerticalStars",
    "density_from_force",
    "fit_vertical_flow",
    "fit_vertical_score",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class VerticalStars:
    """Stars as weighted draws from f(z, v_z).

    Attributes:
        z: Height above the plane, kpc, (N,).
        v: Vertical velocity about the mean, km/s, (N,).
        weight: 1 / (selection) with mean 1, (N,).
        cell: Cell of each star, for errors, (N,).
        limit: L: the stars end at |z| = L, kpc.
    """

    z: Array
    v: Array
    weight: Array
    cell: NDArray[np.int64]
    limit: float

    def __len__(self) -> int:
        return len(self.z)

    @classmethod
    def from_sample(
        cls,
        sample: VerticalSample,
        velocity: VelocityEstimate,
        *,
        sun_height: float,
        limit: float,
        area_floor: float = 0.2,
    ) -> VerticalStars:
        """The stars of a local sample, its effective areas and missing radial velocities undone.

        Velocities from proper motion alone carry an error τ that the others do not; they are drawn
        together to v √(σ²/(σ² + τ²)), which gives them the right variance σ² at their height.

        Arguments:
            sample: The stars.
            velocity: Their vertical velocities and weights.
            sun_height: Of the Sun above the plane, kpc.
            limit: L, kpc.
            area_floor: Cells whose area falls below this part of its median are left out.

        Raises:
            GalrayError: No star is left.
        """
        z = sample.height + sun_height
        in_range = np.abs(sample.area_height + sun_height) < limit
        within = sample.area[:, in_range]
        keep = within.min(1) > area_floor * np.median(within, 1)
        use = (np.abs(z) < limit) & (velocity.weight > 0) & keep[sample.cell]
        if not use.any():
            raise GalrayError("no star of a usable cell lies within the height limit", "lower the limit")
        middle = np.median(within, 1)[sample.cell]
        weight = (velocity.weight / (sample.star_area() / middle))[use]
        z, v, tau2 = z[use], velocity.value[use], velocity.variance[use]
        variance = _variance_at(z, v, tau2, weight)
        v = v * np.sqrt(variance / (variance + tau2))
        return cls(z, v, weight / weight.mean(), sample.cell[use], limit)

    def resampled(self, cells: NDArray[np.int64]) -> VerticalStars:
        """Stars of the given cells, each as often as it is named: a bootstrap over cells."""
        count = np.bincount(cells, minlength=int(self.cell.max()) + 1)[self.cell]
        rows = np.repeat(np.arange(len(self)), count)
        return replace(self, z=self.z[rows], v=self.v[rows], weight=self.weight[rows], cell=self.cell[rows])


def _variance_at(z: Array, v: Array, tau2: Array, weight: Array) -> Array:
    """σ² of the velocities without their errors at every star's height, from bins in |z|."""
    edges = np.quantile(np.abs(z), np.linspace(0, 1, 13))
    index = np.clip(np.searchsorted(edges, np.abs(z), side="right") - 1, 0, 11)
    near = np.abs(v) < 80.0
    total = np.bincount(index[near], weight[near], minlength=12)
    square = np.bincount(index[near], (weight * (v**2 - tau2))[near], minlength=12)
    return np.maximum(square / np.maximum(total, 1e-9), 25.0)[index]


class VerticalFlow(nn.Module):
    """f(z, v) = n(z) p(v|z).

    n is the one-dimensional flow whose map is the cumulative of exp(polynomial) on |z| < L, so the border of
    the sample is exact and the likelihood has one maximum, found by Newton's steps; p is a spline flow
    (zuko's NSF) given z.

    Arguments:
        stars: Their heights give n, their limit L.
        settings: Sizes and units.
    """

    _log_n_coefficients: Tensor

    def __init__(self, stars: VerticalStars, settings: VerticalNetworkSettings) -> None:
        import zuko

        super().__init__()
        self.limit, self.settings = stars.limit, settings
        self.velocity = zuko.flows.NSF(
            1, 1, bins=settings.bins, transforms=1, hidden_features=settings.hidden, activation=nn.Tanh
        )
        self.register_buffer("_log_n_coefficients", torch.from_numpy(_height_density(stars, settings.degree)))
        self.double()

    def log_prob(self, z: Tensor, v: Tensor) -> Tensor:
        """The logarithm of f at heights (n,) in kpc and velocities (n,) in km/s, per kpc and km/s."""
        powers = (z / self.limit)[:, None] ** torch.arange(len(self._log_n_coefficients), dtype=z.dtype)
        return powers @ self._log_n_coefficients + self.log_prob_velocity(z, v)

    def log_prob_velocity(self, z: Tensor, v: Tensor) -> Tensor:
        """The logarithm of p(v|z), per km/s, at the same places."""
        unit = self.settings.velocity_scale
        given = self.velocity((z / self.settings.height_scale_kpc)[:, None])
        return given.log_prob((v / unit)[:, None]) - math.log(unit)

    def acceleration(self, z: Any) -> Array:
        """a(z) in (km/s)²/kpc at heights (k,), velocities summed on a grid."""
        window = self.settings.velocity_window
        grid = torch.linspace(-4 * window, 4 * window, 801, dtype=torch.float64)
        out = []
        for height in np.atleast_1d(np.asarray(z, dtype=np.float64)):
            place = torch.full_like(grid, float(height)).requires_grad_(True)
            log_f = self.log_prob(place, grid)
            (s_z,) = torch.autograd.grad(log_f.sum(), place)
            f = log_f.detach().exp()
            pull, response = _instrument(grid, window)
            out.append(float((f * pull * s_z).sum() / (f * response).sum()))
        return np.array(out)


def _height_density(stars: VerticalStars, degree: int, steps: int = 50) -> Array:
    """Coefficients of log n(z), a polynomial in z/L, normalised per kpc: maximum likelihood by Newton.

    An exponential family: at the maximum the model's mean Legendre polynomials are the stars'.
    """
    legendre = np.polynomial.legendre
    nodes, weights = legendre.leggauss(96)
    basis = legendre.legvander(nodes, degree)[:, 1:]
    target = np.average(
        legendre.legvander(stars.z / stars.limit, degree)[:, 1:], axis=0, weights=stars.weight
    )
    c = np.zeros(degree)
    for _ in range(steps):
        p = weights * np.exp(basis @ c - (basis @ c).max())
        p /= p.sum()
        mean = p @ basis
        change = np.linalg.solve((basis * p[:, None]).T @ basis - np.outer(mean, mean), target - mean)
        c = c + np.clip(change, -1.0, 1.0)
        if np.abs(change).max() < 1e-10:
            break
    log_norm = np.log(np.sum(weights * np.exp(basis @ c)) * stars.limit)
    power = legendre.leg2poly(np.concatenate([[-log_norm], c]))
    return np.pad(power, (0, degree + 1 - len(power)))


class VerticalScore(nn.Module):
    """(s_z, s_v) = ∇g, g a quadratic in both plus a network.

    Arguments:
        stars: Give the quadratic its variances.
        settings: Sizes and units.
    """

    _curvature: Tensor

    def __init__(self, stars: VerticalStars, settings: VerticalNetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        self.net = _network(2, settings.hidden)
        near = np.abs(stars.v) < 80.0
        variance = np.average(stars.v[near] ** 2, weights=stars.weight[near]) / settings.velocity_scale**2
        self.register_buffer("_curvature", torch.tensor([0.0, 1.0 / variance]))
        self.double()

    def scaled(self, u: Tensor, *, create_graph: bool = False) -> Tensor:
        """The score in the networks' units at u (n, 2)."""
        if not u.requires_grad:
            u = u.detach().requires_grad_(True)
        g = self.net(u)[:, 0] - 0.5 * (u.square() @ self._curvature)
        return torch.autograd.grad(g.sum(), u, create_graph=create_graph)[0]

    def acceleration(self, z: Any, stars: VerticalStars) -> Array:
        """The acceleration in (km/s)²/kpc around knots z (k,): means over the stars with linear hats."""
        z = np.asarray(z, dtype=np.float64)
        units = np.array([self.settings.height_scale_kpc, self.settings.velocity_scale])
        u = torch.from_numpy(np.stack([stars.z, stars.v], 1) / units)
        s_z = torch.cat([self.scaled(part)[:, 0].detach() for part in u.split(65536)]).numpy() / units[0]
        pull, response = (
            t.numpy() for t in _instrument(torch.from_numpy(stars.v), self.settings.velocity_window)
        )
        hats = np.stack([np.interp(stars.z, z, row, left=0, right=0) for row in np.eye(len(z))])
        return (hats @ (stars.weight * pull * s_z)) / (hats @ (stars.weight * response))


def fit_vertical_flow(
    stars: VerticalStars, settings: VerticalNetworkSettings | None = None, seed: int = 0
) -> VerticalFlow:
    """Train the flow by maximum likelihood."""
    settings = settings or VerticalNetworkSettings()
    torch.manual_seed(seed)
    model = VerticalFlow(stars, settings)

    def loss(z: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return -(weight * model.log_prob_velocity(z, v)).mean()

    _train(model, loss, stars, settings, seed)
    return model


def fit_vertical_score(
    stars: VerticalStars, settings: VerticalNetworkSettings | None = None, seed: int = 0
) -> VerticalScore:
    """Train the score by score matching with a window that vanishes at the border of the sample."""
    settings = settings or VerticalNetworkSettings()
    torch.manual_seed(seed)
    model = VerticalScore(stars, settings)
    units = torch.tensor([settings.height_scale_kpc, settings.velocity_scale], dtype=torch.float64)

    def loss(z: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        u = (torch.stack([z, v], 1) / units).requires_grad_(True)
        s = model.scaled(u, create_graph=True)
        divergence = sum(torch.autograd.grad(s[:, i].sum(), u, create_graph=True)[0][:, i] for i in range(2))
        t = z / stars.limit
        h = (1 - t**4).square()
        slope = -8 * t**3 * (1 - t**4) * (settings.height_scale_kpc / stars.limit)
        return (weight * (h * (0.5 * s.square().sum(1) + divergence) + slope * s[:, 0])).mean()

    _train(model, loss, stars, settings, seed)
    return model


def density_from_force(
    z: Array, a: Array, error: Array, basis: DensityBasis
) -> tuple[Array, Callable[[Array], Array]]:
    """The layers whose pull fits accelerations at heights z best, by weighted least squares.

    Arguments:
        z: Heights from the plane, kpc, (k,).
        a: Accelerations there, (km/s)²/kpc, (k,).
        error: Their standard errors, (k,).
        basis: The layers.

    Returns:
        Their densities θ in Msun/pc³, and a(z) of the fit, which is odd in z.
    """
    rows = -FOUR_PI_G * basis.column(z)
    theta: Array = np.linalg.lstsq(rows / error[:, None], a / error, rcond=None)[0].astype(np.float64)

    def force(heights: Array) -> Array:
        return np.asarray(-FOUR_PI_G * basis.column(heights) @ theta, dtype=np.float64)

    return theta, force


def _instrument(v: Tensor, window: float) -> tuple[Tensor, Tensor]:
    """The pull v w(v) and the response w'(v) of w = v exp(−v²/2s²)."""
    t = (v / window).square()
    shape = torch.exp(-0.5 * t)
    return v.square() * shape, (1 - t) * shape


def _network(inputs: int, hidden: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 1))


def _train(
    model: nn.Module, loss: Callable[..., Tensor], stars: VerticalStars, settings: Any, seed: int
) -> None:
    data = torch.from_numpy(np.stack([stars.z, stars.v, stars.weight], 1))
    generator = torch.Generator().manual_seed(seed)
    steps = settings.epochs * math.ceil(len(data) / settings.batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(data), generator=generator).split(settings.batch_size):
            optimizer.zero_grad()
            z, v, weight = data[rows].T
            value = loss(z, v, weight)
            if not torch.isfinite(value):
                raise GalrayError("the training of a vertical network diverged", "lower learning_rate")
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
