"""Scores in rotation-invariant coordinates: an analytic base and the gradient of a small scalar network.

A density p(u, v₁ … v_m) with u = ln r that depends on each velocity group only through its length (the radial
velocity, the two tangential ones together) has the score

    s_u = ∂ψ/∂u,   s_a = ∂ψ/∂v_a (v_a/|v_a|),   ψ = ln p,

and the divergence of its correction is the Laplacian with its volume term, for a group of d components

    ∇²_v ψ = ∂²ψ/∂v² + (d − 1)/v ∂ψ/∂v = 2d ψ_q + 4q ψ_qq,   q = v².

ψ is a function of u and of the q alone, so it is even in the velocities and smooth where they vanish, the
score is a gradient, and its Laplacian is exact: second derivatives are pushed through the layers beside the
values (no autograd graph of a graph). It is learned in (u, y) with y_a = v_a/σ_a(u), in which every radius
looks alike and the base is n(u) times a unit Gaussian; back in the velocities

    ∂_{v_a} ln p = s_{y_a}/σ_a,      ∂_u ln p = s_u − Σ_a (dln σ_a/du) (y_a s_{y_a} + d_a).
"""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.optimize import minimize
from torch import Tensor, nn

from galray.dwarf.spherical_settings import SphericalScoreSettings

__all__ = ["InvariantScore", "InvariantScoreMatching", "train_score"]

Array = NDArray[np.float64]


class InvariantScore(nn.Module):
    """The score of p(u, v-groups), u = ln r, whose base is n(u) ∏ Gaussians with dispersions σ_a(u).

    Arguments:
        dimensions: Number of velocity components of each group, e.g. (1, 2) for (v_r, v_t) or (1,) for v_los.
        settings: Its form.
    """

    def __init__(self, dimensions: tuple[int, ...], settings: SphericalScoreSettings) -> None:
        super().__init__()
        self.dimensions, self.settings = dimensions, settings
        widths = (1 + len(dimensions), *settings.hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(widths[-1], 1, bias=False)
        nn.init.zeros_(self.out.weight)  # an untrained model is its base
        self._mean, self._spread = 0.0, 1.0  # of u

    # -- the analytic base -----------------------------------------------------------------------------

    def fit_base(self, u: Array, speeds: Array) -> None:
        """Fit standardisation, ln n(u) and ln σ_a(u) by penalised likelihood to (n,) and (n, groups)."""
        self._mean, self._spread = float(u.mean()), float(u.std())
        low, high = np.quantile(u, [0.002, 0.998])
        count, degree = self.settings.base_splines, 3
        inner = np.linspace(low, high, count - degree + 1)
        self._knots = np.concatenate([[inner[0]] * degree, inner, [inner[-1]] * degree])
        self._range = (float(low), float(high))
        differences = np.diff(np.eye(count), 3, axis=0)
        rough = self.settings.base_roughness * differences.T @ differences
        self._density = _fit_density(u, self._basis, count, rough)
        basis = self._basis(u, 0)
        self._dispersions = [
            _fit_dispersion(basis, speeds[:, a] ** 2, d, rough) for a, d in enumerate(self.dimensions)
        ]

    def _basis(self, u: Array, order: int) -> Array:
        """B-splines in u, straight lines beyond the outer knots."""
        spline = BSpline(self._knots, np.eye(self.settings.base_splines), 3)
        inside = np.clip(u, *self._range)
        beyond = (u - inside)[:, None]
        if order == 0:
            return np.asarray(spline(inside) + beyond * spline(inside, 1))
        if order == 1:
            return np.asarray(spline(inside, 1))
        return np.asarray(spline(inside, 2) * (beyond == 0))

    def standardise(self, u: Array, speeds: Array) -> tuple[Array, Array, Array]:
        """U in standard units (n,), y_a = v_a/σ_a(u) and dln σ_a/du, shape (n, groups) each."""
        values, slopes = self._basis(u, 0), self._basis(u, 1)
        dispersions = np.stack(self._dispersions, 1)
        return (u - self._mean) / self._spread, speeds * np.exp(-values @ dispersions), slopes @ dispersions

    def base(self, u: Array, y: Array) -> tuple[Array, Array]:
        """The base's score (n, 1 + groups) and its divergence (n,) in standard units (u, y)."""
        slope = self._basis(u, 1) @ self._density * self._spread
        bend = self._basis(u, 2) @ self._density * self._spread**2
        return np.column_stack([slope, -y]), bend - sum(self.dimensions)

    # -- the network -----------------------------------------------------------------------------------

    def correction(self, features: Tensor, speeds: Tensor) -> tuple[Tensor, Tensor]:
        """The network's part of the score (n, 1 + groups) and its divergence (n,), in standard units.

        Arguments:
            features: (u, q …) standardised, shape (n, 1 + groups).
            speeds: y of each group, shape (n, groups).
        """
        layers = [cast(nn.Linear, layer) for layer in self.layers]
        z = layers[0](features)
        first = layers[0].weight.t().unsqueeze(1)  # (inputs, 1, width): tangents of the inputs
        second = torch.zeros_like(first)
        for layer in layers[1:]:
            hidden, first, second = _activate(z, first, second)
            z, first, second = layer(hidden), first @ layer.weight.t(), second @ layer.weight.t()
        _, first, second = _activate(z, first, second)
        weight = self.out.weight[0]
        gradient, curvature = (first @ weight), (second @ weight)  # (inputs, n)
        score = torch.cat([gradient[:1].t(), 2 * speeds * gradient[1:].t()], 1)
        divergence = curvature[0]
        # the inputs are compressed, t = ln(1 + v²/4d): chain rule of ∂ψ/∂v and of 2d ψ_q + 4q ψ_qq
        compress = []
        for k, d in enumerate(self.dimensions):
            square = speeds[:, k] ** 2
            by_q = 1 / (4.0 * d + square)
            compress.append(by_q)
            slope_weight = 2 * d * by_q - 4 * square * by_q**2
            divergence = divergence + slope_weight * gradient[1 + k] + 4 * square * by_q**2 * curvature[1 + k]
        score = torch.cat([score[:, :1], score[:, 1:] * torch.stack(compress, 1)], 1)
        return score, divergence

    def features(self, u: Tensor, y: Tensor) -> Tensor:
        """Inputs of the network from standardised u (n,) and y (n, groups): shape (n, 1 + groups)."""
        room = 4.0 * torch.tensor(self.dimensions, dtype=y.dtype)
        return torch.cat([u[:, None], torch.log1p(y**2 / room)], 1)

    @torch.no_grad()
    def score(self, u: Array, speeds: Array) -> Array:
        """(∂ ln p/∂u, ∂ ln p/∂v …) of p(u, v-groups), shape (n, 1 + groups), in 1 and 1/(km/s)."""
        t, y, growth = self.standardise(u, speeds)
        base, _ = self.base(u, y)
        standard, room = torch.from_numpy(t).float(), torch.from_numpy(y).float()
        correction, _ = self.correction(self.features(standard, room), room)
        s = base + correction.double().numpy()
        along = s[:, 0] / self._spread - (growth * (y * s[:, 1:] + np.array(self.dimensions))).sum(1)
        sigma = np.exp(self._basis(u, 0) @ np.stack(self._dispersions, 1))
        return np.column_stack([along, s[:, 1:] / sigma])

    @torch.no_grad()
    def log_density(self, u: Array, speeds: Array) -> Array:
        """ψ = ln p(u, v-groups) up to one constant, whose gradient is `score`: shape (n,)."""
        t, y, _ = self.standardise(u, speeds)
        log_sigma = self._basis(u, 0) @ np.stack(self._dispersions, 1)
        psi = self._basis(u, 0) @ self._density - 0.5 * (y**2).sum(1) - log_sigma @ np.array(self.dimensions)
        z = self.features(torch.from_numpy(t).float(), torch.from_numpy(y).float())
        for layer in self.layers:
            z = nn.functional.silu(layer(z))
        return np.asarray(psi + self.out(z)[:, 0].double().numpy())

    def velocity_reach(self, u: Array) -> Array:
        """σ_a(u) of the base in km/s, shape (n, groups): the scale on which ψ falls."""
        return np.asarray(np.exp(self._basis(u, 0) @ np.stack(self._dispersions, 1)))


class InvariantScoreMatching:
    """Implicit score matching L = E[½|c|² + b·c + ∇·c] of the correction c on the base b (Hyvärinen 2005).

    Stars arrive as rows (u, v of each group).
    """

    name = "implicit score matching in invariant coordinates"

    def prepare(self, model: nn.Module, w: Tensor, *, validation: bool = False) -> Tensor:
        """Rows of network inputs, y, the base's score and its own loss, all in standard units."""
        net: Any = model
        u = w[:, 0].double().numpy()
        t, y, _ = net.standardise(u, w[:, 1:].double().numpy())
        base, divergence = net.base(u, y)
        own = 0.5 * (base**2).sum(1) + divergence
        standard, room = torch.from_numpy(t).float(), torch.from_numpy(y).float()
        rest = torch.from_numpy(np.column_stack([base, own])).float()
        return torch.cat([net.features(standard, room), room, rest], 1)

    def per_star(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The loss of each row, shape (n,)."""
        net: Any = model
        groups = len(net.dimensions)
        inputs, v, base, own = rows.split([1 + groups, groups, 1 + groups, 1], 1)
        c, divergence = net.correction(inputs, v)
        return ((0.5 * c + base) * c).sum(1) + divergence + own[:, 0]

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean of `per_star`."""
        return self.per_star(model, rows).mean()

    @torch.no_grad()
    def validate(self, model: nn.Module, rows: Tensor) -> Tensor:
        """`per_star` without gradient."""
        return self.per_star(model, rows)


def _activate(z: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of z (n, width), and the first and second derivatives along each input, (inputs, n, width)."""
    gate = torch.sigmoid(z)
    slope = gate * (1 + z * (1 - gate))
    bend = gate * (1 - gate) * (2 + z * (1 - 2 * gate))
    return z * gate, slope * first, bend * first.square() + slope * second


def train_score(
    u: Array, speeds: Array, dimensions: tuple[int, ...], settings: SphericalScoreSettings, seed: int
) -> tuple[InvariantScore, Any]:
    """Fit base and network to stars (n,) and (n, groups); the model and what its training did."""
    from galray.training import TrainingSettings, fit, split

    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = InvariantScore(dimensions, settings)
    torch.random.set_rng_state(state)
    keep, held = split(len(u), settings.validation_fraction, seed)
    model.fit_base(u[keep], speeds[keep])
    rows = torch.from_numpy(np.column_stack([u, speeds])).float()
    training = TrainingSettings(
        epochs=math.ceil(settings.steps / max(len(keep) // settings.batch_size, 1)),
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        device="cpu",
    )
    result = fit(model, InvariantScoreMatching(), rows[keep], rows[held], training, seed=seed)
    return model, result


def _fit_density(u: Array, basis: Any, count: int, rough: Array) -> Array:
    """Coefficients of ln n(u): penalised maximum likelihood (logspline), by Newton steps."""
    margin = 1.5
    grid = np.linspace(u.min() - margin, u.max() + margin, 2000)
    design = basis(grid, 0)
    observed = basis(u, 0).mean(0)
    step = grid[1] - grid[0]
    penalty = rough + 1e-9 * np.eye(count)

    def cost(c: Array) -> tuple[float, Array]:
        exponent = design @ c
        top = exponent.max()
        p = np.exp(exponent - top)
        total = p.sum() * step
        mean = (p * step / total) @ design
        value = top + np.log(total) - observed @ c + 0.5 * c @ penalty @ c
        return float(value), mean - observed + penalty @ c

    start = np.linspace(0, 1, count)
    start = -8 * (start - 0.5) ** 2  # falls on both sides, so that the straight tails can be integrated
    return np.asarray(minimize(cost, start, jac=True, method="BFGS", options={"maxiter": 500}).x)


def _fit_dispersion(basis: Array, square: Array, d: int, rough: Array) -> Array:
    """Coefficients of ln σ(u) of a d-dimensional Gaussian from squared speeds (n,)."""
    start = np.full(basis.shape[1], 0.5 * np.log(square.mean() / d))

    def cost(c: Array) -> tuple[float, Array]:
        log_sigma = basis @ c
        q = square * np.exp(-2 * log_sigma)
        value = (d * log_sigma + 0.5 * q).mean() + 0.5 * c @ rough @ c
        return float(value), basis.T @ (d - q) / len(q) + rough @ c

    return np.asarray(minimize(cost, start, jac=True, method="BFGS", options={"maxiter": 300}).x)
