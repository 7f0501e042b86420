"""A continuous flow, trained by flow matching: a smooth field carries a Gaussian to the data."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ContinuousField"]


class _FieldNetwork(nn.Module):
    """A smooth network R^(d + rest) → R^d that gives the divergence in its first d inputs with its value."""

    def __init__(self, features: int, rest: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.features = features
        widths = (features + rest, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths))
        self.out = nn.Linear(widths[-1], features)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.hidden:
            z = F.silu(layer(z))
        return self.out(z)

    def value_and_divergence(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The value (n, d) and Σ_{i<d} ∂ᵢ valueᵢ (n,); d unit tangents are pushed through the layers."""
        first, *more = (cast(nn.Linear, layer) for layer in self.hidden)
        tangents: Tensor = first.weight[:, : self.features].t()  # (d, width), then (n, d, width)
        a = first(z)
        for layer in (*more, self.out):
            gate = torch.sigmoid(a)
            slope = gate * (1.0 + a * (1.0 - gate))
            tangents = (slope.unsqueeze(1) * tangents) @ layer.weight.t()
            a = layer(a * gate)
        return a, tangents.diagonal(dim1=-1, dim2=-2).sum(-1)


class ContinuousField(nn.Module):
    """dy/dt = u(t, y; c) from y(0) ~ N(0, 1) to y(1) ~ p(y|c).

    Conditional flow matching (Lipman et al. 2023, arXiv 2210.02747) on the straight lines y_t = (1−t) ε + t y
    makes u the mean of y − ε at (t, y_t). Base and line being Gaussian, u and the score s_t = ∇ log p_t are
    tied by u = [y_t + (1−t) s_t]/t. Here u is written as that of a unit Gaussian, known exactly, and a
    network b:

        u(t, y) = y (2t − 1)/V + (1−t) b(t, y),      s_t(y) = −y/V + t b(t, y),      V = (1−t)² + t²,

    so that the score at t = 1 is −y + b(1, y): one pass, and no division by 1 − t.

    Arguments:
        features: Number of dimensions of y.
        context: Number of dimensions of c, 0 for none.
        hidden: Hidden widths of b.
        steps: Steps of the fourth-order Runge-Kutta solver from 0 to 1.
    """

    def __init__(self, features: int, context: int, hidden: tuple[int, ...], steps: int) -> None:
        super().__init__()
        self.features, self.steps = features, steps
        self.network = _FieldNetwork(features, context + 1, hidden)

    def _inputs(self, t: Tensor, y: Tensor, c: Tensor | None) -> Tensor:
        given = [] if c is None else [c.expand(*y.shape[:-1], c.shape[-1])]
        return torch.cat([y, *given, 2.0 * t.expand(*y.shape[:-1], 1) - 1.0], -1)

    def velocity(self, t: Tensor, y: Tensor, c: Tensor | None = None) -> Tensor:
        """The field at times (*, 1): shape of y."""
        variance = (1.0 - t).square() + t.square()
        return y * (2.0 * t - 1.0) / variance + (1.0 - t) * self.network(self._inputs(t, y, c))

    def field_score(self, y: Tensor, c: Tensor | None = None, *, time: float = 1.0) -> Tensor:
        """∇_y log p(y|c) as the field at one time has it, t s_t(t y): shape of y; no ODE is solved.

        At t < 1 it is the score of the data smoothed by (1 − t)/t. At t = 1 it is not smoothed, but the
        weight (1 − t)² of flow matching leaves the network without guidance there: a large network, trained
        long, can be far off. The gradient of `log_prob`, which uses the field at all times, is not.
        """
        t = torch.full_like(y[..., :1], time)
        variance = (1.0 - time) ** 2 + time**2
        return time * (time * self.network(self._inputs(t, time * y, c)) - time * y / variance)

    def _velocity_and_divergence(self, t: float, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        variance = (1.0 - t) ** 2 + t**2
        z = self._inputs(torch.full_like(y[..., :1], t), y, c)
        value, divergence = self.network.value_and_divergence(z)
        pull = (2.0 * t - 1.0) / variance
        return y * pull + (1.0 - t) * value, self.features * pull + (1.0 - t) * divergence

    def matching_loss(self, y: Tensor, c: Tensor | None, generator: torch.Generator) -> Tensor:
        """|u(t, y_t) − (y − ε)|² of each row at a random time, stratified over the rows: shape (n,)."""
        n = len(y)
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        order = torch.randperm(n, generator=generator, device=y.device).unsqueeze(1)
        t = (order + torch.rand(n, 1, generator=generator, dtype=y.dtype, device=y.device)) / n
        return (self.velocity(t, torch.lerp(noise, y, t), c) - (y - noise)).square().sum(-1)

    def log_prob(self, y: Tensor, c: Tensor | None = None) -> Tensor:
        """Log p(y|c) = log N(y(0)) − ∫₀¹ ∇·u dt along the line that ends in y, exact trace: shape (*,)."""
        shape = y.shape
        y = y.reshape(-1, shape[-1])
        c = None if c is None else c.expand(*shape[:-1], c.shape[-1]).reshape(len(y), -1)
        step = -1.0 / self.steps
        total = torch.zeros_like(y[:, 0])
        for i in range(self.steps):
            t = 1.0 + i * step
            k1, d1 = self._velocity_and_divergence(t, y, c)
            k2, d2 = self._velocity_and_divergence(t + 0.5 * step, y + 0.5 * step * k1, c)
            k3, d3 = self._velocity_and_divergence(t + 0.5 * step, y + 0.5 * step * k2, c)
            k4, d4 = self._velocity_and_divergence(t + step, y + step * k3, c)
            y = y + step / 6.0 * (k1 + 2.0 * (k2 + k3) + k4)
            total = total + step / 6.0 * (d1 + 2.0 * (d2 + d3) + d4)
        log_base = -0.5 * y.square().sum(-1) - 0.5 * self.features * math.log(2.0 * math.pi)
        return (log_base + total).reshape(shape[:-1])

    def draw(self, n: int, c: Tensor | None, generator: torch.Generator) -> Tensor:
        """Samples (n, d), one for each row of c (n, context)."""
        dtype = next(self.parameters()).dtype
        y = torch.randn(n, self.features, generator=generator, dtype=torch.float64).to(dtype)
        step = 1.0 / self.steps
        for i in range(self.steps):
            t, half, end = (torch.full((1,), (i + part) * step, dtype=dtype) for part in (0.0, 0.5, 1.0))
            k1 = self.velocity(t, y, c)
            k2 = self.velocity(half, y + 0.5 * step * k1, c)
            k3 = self.velocity(half, y + 0.5 * step * k2, c)
            k4 = self.velocity(end, y + step * k3, c)
            y = y + step / 6.0 * (k1 + 2.0 * (k2 + k3) + k4)
        return y
