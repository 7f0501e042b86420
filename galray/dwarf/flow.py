"""Equivariant flows of a sphere: the radial ODE of the method's paper, and its fast form without a solver.

A field dx/dt = r̂ g(r, t) moves points along their own directions, so its flow is x → x r(s)/s, with r(s) a
monotone function of the base radius s = |x|. Whoever writes r(s) down directly needs no solver. With a
Gaussian base of unit width, u = ln s and W = dln r/du,

    ln n(r) = −s²/2 − (3/2) ln 2π + 3 (u − ln r) − ln W,

and the centre is a power law, r ∝ s^{1+c} and n ∝ r^{−3c/(1+c)}: c = 0 keeps the Gaussian's flat core.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from galray.dwarf.profiles import SmoothLogProfile

__all__ = ["OdeRadialFlow", "RadialFlow", "RadialMap", "SphereFlow"]

_LOG_2PI = math.log(2 * math.pi)


class RadialFlow(Protocol):
    """A rotation-equivariant flow of positions from the unit Gaussian."""

    def forward_radius(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Radius r(s) and ln dr/ds, each of the shape of s."""
        ...

    def log_density(self, r: Tensor) -> Tensor:
        """Give ln n(r), one star in all, any shape."""
        ...

    def sample(self, z: Tensor) -> Tensor:
        """Positions of base points z (*, 3), same shape."""
        ...


class RadialMap(nn.Module):
    """The fast form: W(u) = dln r/dln s a positive mix of sigmoids, so that r(s) is a closed form.

    W = (1 + c) [1 + Σ_k (W_k − W_{k−1}) sigmoid((u − u_k)/δ) + a s²] with W_0 = 1, W_k, a > 0: a partition of
    unity, hence positive, smooth to all orders, with ∫ sigmoid = softplus.

    Arguments:
        scale: Radius in kpc that the base radius 1 has before training.
        knots: Number of knots u_k.
        knot_range: Base radii of the first and last knot, between which u_k are equidistant.
        cusp: c, the inner slope being 3c/(1+c).
        learn_cusp: Train c, from this start.
    """

    u_knots: Tensor

    def __init__(
        self,
        scale: float,
        knots: int = 8,
        cusp: float = 0.0,
        learn_cusp: bool = False,
        knot_range: tuple[float, float] = (0.25, 3.2),
    ) -> None:
        super().__init__()
        if cusp < 0:
            raise ValueError(f"cusp = {cusp} is negative")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))
        self.log_plateaus = nn.Parameter(torch.zeros(knots, dtype=torch.float64))
        self.log_growth = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        start = math.log(math.expm1(max(cusp, 1e-3))) if learn_cusp else cusp
        raw = torch.tensor(start, dtype=torch.float64)
        self.learn_cusp = learn_cusp
        self.raw_cusp: Tensor
        if learn_cusp:
            self.raw_cusp = nn.Parameter(raw)
        else:
            self.register_buffer("raw_cusp", raw)
        edges = torch.linspace(math.log(knot_range[0]), math.log(knot_range[1]), knots).double()
        self.register_buffer("u_knots", edges)
        self.width = 0.6 * float(edges[1] - edges[0])

    @property
    def cusp(self) -> Tensor:
        """The exponent c ≥ 0."""
        return nn.functional.softplus(self.raw_cusp) if self.learn_cusp else self.raw_cusp

    def inner_slope(self) -> Tensor:
        """γ* = 3c/(1+c)."""
        return 3 * self.cusp / (1 + self.cusp)

    def _steps(self) -> Tensor:
        plateaus = torch.cat([torch.ones(1, dtype=torch.float64), torch.exp(self.log_plateaus)])
        return plateaus[1:] - plateaus[:-1]

    def log_radius(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Give ln r and W at u = ln s, each of the shape of u."""
        t = (u[..., None] - self.u_knots) / self.width
        steps, growth = self._steps(), torch.exp(self.log_growth)
        s2 = torch.exp(2 * u)
        stretch = 1 + self.cusp
        # from softplus(−u_k/δ) at u = 0, so that r(1) is the scale whatever the plateaus are
        level = (nn.functional.softplus(t) - nn.functional.softplus(-self.u_knots / self.width)) @ steps
        log_r = self.log_scale + stretch * (u + self.width * level + 0.5 * growth * (s2 - 1))
        return log_r, stretch * (1 + torch.sigmoid(t) @ steps + growth * s2)

    def forward_radius(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Radius r(s) in kpc and ln dr/ds."""
        u = torch.log(s)
        log_r, w = self.log_radius(u)
        return torch.exp(log_r), log_r + torch.log(w) - u

    def inverse(self, r: Tensor) -> Tensor:
        """Give u = ln s of radii r, differentiable, any shape: a table's value polished by Newton steps."""
        target = torch.log(r)
        with torch.no_grad():
            table = torch.linspace(-14.0, math.log(9.0), 800, dtype=torch.float64)
            heights, _ = self.log_radius(table)
            i = torch.searchsorted(heights, target.contiguous()).clamp(1, len(table) - 1)
            share = (target - heights[i - 1]) / (heights[i] - heights[i - 1])
            u = table[i - 1] + share.clamp_max(1.0) * (table[i] - table[i - 1])
            for _ in range(3):
                value, w = self.log_radius(u)
                u = u + (target - value) / w
        value, w = self.log_radius(u)  # one more step carries the gradient with respect to r and parameters
        return u + (target - value) / w

    def log_density(self, r: Tensor) -> Tensor:
        """Give ln n(r) in ln kpc⁻³, any shape."""
        u = self.inverse(r)
        _, w = self.log_radius(u)
        return -0.5 * torch.exp(2 * u) - 1.5 * _LOG_2PI + 3 * (u - torch.log(r)) - torch.log(w)

    def log_slope(self, r: Tensor) -> Tensor:
        """Dln n/dln r in closed form, any shape."""
        u = self.inverse(r)
        _, w = self.log_radius(u)
        gate = torch.sigmoid((u[..., None] - self.u_knots) / self.width)
        bend = (gate * (1 - gate) / self.width) @ self._steps() + 2 * torch.exp(self.log_growth + 2 * u)
        return (3 - torch.exp(2 * u) - (1 + self.cusp) * bend / w) / w - 3

    def sample(self, z: Tensor) -> Tensor:
        """Positions of base points z (*, 3) in kpc."""
        s = z.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return z * (self.forward_radius(s)[0] / s)


class OdeRadialFlow(nn.Module):
    """The paper's form: dx/dt = r̂ tanh(r/r0) g(r, t) for 0 < t < 1 from the unit Gaussian, then r → r^{1+c}.

    g is a two-layer tanh network; the classical fourth-order Runge-Kutta method carries x and the
    divergence ∂ᵣv + 2v/r, v = tanh(r/r0) g. Lengths are in units of the scale.

    Arguments:
        scale: Unit of length in kpc.
        hidden: Width of the network.
        core: r0 in units of the scale.
        steps: Runge-Kutta steps.
        cusp: c.
        seed: Of the network's start.
    """

    def __init__(
        self,
        scale: float,
        hidden: int = 64,
        core: float = 0.3,
        steps: int = 16,
        cusp: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def start(rows: int, columns: int) -> nn.Parameter:
            weights = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            return nn.Parameter(weights / math.sqrt(columns))

        self.first, self.second, self.last = start(hidden, 2), start(hidden, hidden), start(1, hidden)
        self.bias_first = nn.Parameter(torch.zeros(hidden, dtype=torch.float64))
        self.bias_second = nn.Parameter(torch.zeros(hidden, dtype=torch.float64))
        with torch.no_grad():
            self.last.mul_(0.3)
        self.scale, self.core, self.steps, self.cusp = float(scale), core, steps, cusp

    def field(self, r: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Give v = tanh(r/r0) g(r, t) and ∂v/∂r by forward differentiation, shape (n,) each."""
        x = 0.5 * torch.log1p(r * r)  # even in r, so that the field is smooth through the centre
        slope = r / (1 + r * r)
        a = torch.tanh(torch.stack([x, torch.full_like(x, t)], -1) @ self.first.T + self.bias_first)
        da = (1 - a * a) * (slope[..., None] * self.first[:, 0])
        b = torch.tanh(a @ self.second.T + self.bias_second)
        db = (1 - b * b) * (da @ self.second.T)
        g, dg = (b @ self.last.T)[..., 0], (db @ self.last.T)[..., 0]
        gate = torch.tanh(r / self.core)
        return gate * g, (1 - gate * gate) / self.core * g + gate * dg

    def _rates(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        r = x.norm(dim=-1).clamp_min(1e-12)
        v, slope = self.field(r, t)
        return x * (v / r)[..., None], slope + 2 * v / r

    def integrate(self, x: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
        """Carry points (n, 3), in units of the scale, through the flow; and ln |det ∂x_out/∂x_in|, (n,)."""
        h = (-1.0 if backward else 1.0) / self.steps
        t = 1.0 if backward else 0.0
        total = torch.zeros_like(x[..., 0])
        for _ in range(self.steps):
            k1, d1 = self._rates(x, t)
            k2, d2 = self._rates(x + 0.5 * h * k1, t + 0.5 * h)
            k3, d3 = self._rates(x + 0.5 * h * k2, t + 0.5 * h)
            k4, d4 = self._rates(x + h * k3, t + h)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
            t += h
        return x, total

    def sample(self, z: Tensor) -> Tensor:
        """Positions of base points z (*, 3) in kpc."""
        x, _ = self.integrate(z.reshape(-1, 3))
        r = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return (self.scale * x * r**self.cusp).reshape(z.shape)

    def forward_radius(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Radius r(s) in kpc and ln dr/ds, s of shape (n,)."""
        x, log_det = self.integrate(_along(s))
        r = x[:, 0]
        # the 3D determinant of a radial map is (r/s)² dr/ds
        log_slope = log_det - 2 * torch.log(r / s)
        stretched = self.scale * r ** (1 + self.cusp)
        return stretched, log_slope + math.log(self.scale * (1 + self.cusp)) + self.cusp * torch.log(r)

    def log_density(self, r: Tensor) -> Tensor:
        """Give ln n(r) in ln kpc⁻³, any shape, by integrating back to the base."""
        inner = (r.reshape(-1) / self.scale) ** (1 / (1 + self.cusp))
        z, log_det = self.integrate(_along(inner), backward=True)
        log_base = -0.5 * z.square().sum(-1) - 1.5 * _LOG_2PI
        # the full factor of r → r^{1+c}: n_new(r') = n(r) r^{−3c}/(1+c)
        jacobian = -3 * self.cusp * torch.log(inner) - math.log(1 + self.cusp) - 3 * math.log(self.scale)
        return (log_base + log_det + jacobian).reshape(r.shape)


def _along(radius: Tensor) -> Tensor:
    """Points at the given radii on the x axis, shape (n, 3)."""
    return torch.stack([radius, torch.zeros_like(radius), torch.zeros_like(radius)], -1)


class SphereFlow(nn.Module):
    """A flow of (x, v): a radial flow of positions, and velocities of σ_r(r) and given anisotropy.

    v = σ_r e_r q_1 + σ_t (e_θ q_2 + e_φ q_3), σ_t² = (1 − β) σ_r², q of unit variance per axis: Gaussian, or
    q = ζ y h(|y|), an isotropic map of a Gaussian y, which gives all velocities one excess kurtosis.

    Arguments:
        positions: The radial flow.
        scale: Radius in kpc about which σ_r(r) bends.
        dispersion: σ_r in km/s before training.
        anisotropy: β as a function of r (a callable of tensors); none is isotropic.
        non_gaussian: Learn the velocities' shape.
    """

    def __init__(
        self,
        positions: RadialFlow,
        scale: float,
        dispersion: float,
        anisotropy: object | None = None,
        non_gaussian: bool = False,
    ) -> None:
        super().__init__()
        self.positions = positions
        self.sigma = SmoothLogProfile(scale * np.geomspace(0.25, 8.0, 6), math.log(dispersion))
        self.anisotropy = anisotropy
        self.shape = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=non_gaussian)
        x, w = np.polynomial.hermite_e.hermegauss(64)
        self.register_buffer("_nodes", torch.from_numpy(np.abs(x)))
        self.register_buffer("_weights", torch.from_numpy(w * x**2 / math.sqrt(2 * math.pi)))

    _nodes: Tensor
    _weights: Tensor

    def beta(self, r: Tensor) -> Tensor:
        """β(r), same shape."""
        return torch.zeros_like(r) if self.anisotropy is None else self.anisotropy(r)  # type: ignore[operator]

    def _shape_factor(self, y2: Tensor) -> Tensor:
        # |q| = |y| (1 + y²/6)^a up to the norm: monotone for a > −½, peaked above 0 and flat-topped below
        return (1 + y2 / 6) ** (0.45 * torch.tanh(self.shape))

    def _shape_moments(self) -> tuple[Tensor, Tensor]:
        y2 = self._nodes**2
        q2 = y2 * self._shape_factor(y2) ** 2
        return (self._weights * q2).sum() / 3, (self._weights * q2 * q2).sum() / 5

    def excess_kurtosis(self) -> Tensor:
        """Excess kurtosis of every velocity component at a point, scalar."""
        second, fourth = self._shape_moments()
        return fourth / second**2 - 3

    def dispersions(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """σ_r and σ_t (one component) in km/s, shape of r."""
        sigma = torch.exp(self.sigma(r))
        return sigma, sigma * torch.sqrt((1 - self.beta(r)).clamp_min(1e-9))

    def sample(self, z: Tensor) -> Tensor:
        """Phase-space states (*, 6) in kpc and km/s of base points z (*, 6), unit Gaussian.

        One z gives one state, smoothly in the parameters: common random numbers.
        """
        x = self.positions.sample(z[..., :3])
        r = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        radial = x / r
        y = z[..., 3:]
        q = y * self._shape_factor(y.square().sum(-1, keepdim=True)) / self._shape_moments()[0].sqrt()
        sigma_r, sigma_t = self.dispersions(r)
        along = (q * radial).sum(-1, keepdim=True) * radial
        return torch.cat([x, sigma_r * along + sigma_t * (q - along)], -1)
