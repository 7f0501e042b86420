"""Gaussian mixtures that vary smoothly with what they are conditioned on."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import zuko
from torch import Tensor, nn

__all__ = ["AutoregressiveMixture", "GaussianMixture"]

_LOG_2PI = math.log(2.0 * math.pi)
_NEIGHBOUR = 6  # whose distance is the width at the start


class AutoregressiveMixture(zuko.lazy.LazyDistribution):
    """p(x|c) = Π_i Σ_k π_ik N(x_i; μ_ik, σ_ik), each i conditioned on x_<i and c by a masked network.

    The base density of a MAF-MoG (Papamakarios et al. 2017, arXiv 1705.07057); log p is smooth wherever
    the activation is.
    """

    def __init__(self, features: int, context: int, components: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.features, self.components = features, components
        order = torch.arange(features)
        adjacency = torch.cat(
            [order[:, None] > order, torch.ones(features, context, dtype=torch.bool)], 1
        ).repeat_interleave(3 * components, 0)
        self.constant_first = context == 0
        if self.constant_first:
            # The first coordinate depends on nothing; a constant input gives the masks something to hold.
            adjacency = torch.cat([adjacency, torch.ones(len(adjacency), 1, dtype=torch.bool)], 1)
        self.hyper = zuko.nn.MaskedMLP(adjacency, hidden, activation=nn.SiLU)
        last = self.hyper[-1]
        with torch.no_grad():
            last.weight.mul_(0.1)
            bias = last.bias.view(features, components, 3)
            bias.zero_()
            bias[:, :, 1] = torch.linspace(-1.5, 1.5, components)
            bias[:, :, 2] = math.log(0.8)

    def forward(self, c: Tensor | None = None) -> Any:
        """The distribution given c."""
        return _AutoregressiveMixture(self, c)


class _AutoregressiveMixture(torch.distributions.Distribution):
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (torch's own interface)

    def __init__(
        self, lazy: AutoregressiveMixture, context: Tensor | None, shape: torch.Size | None = None
    ) -> None:
        self.lazy, self.context = lazy, context
        batch = shape if shape is not None else torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch, torch.Size([lazy.features]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _AutoregressiveMixture:
        return _AutoregressiveMixture(self.lazy, self.context, torch.Size(batch_shape))

    def _parameters_at(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [x]
        if self.context is not None:
            parts.append(self.context.expand(*x.shape[:-1], self.context.shape[-1]))
        if self.lazy.constant_first:
            parts.append(torch.ones_like(x[..., :1]))
        raw = self.lazy.hyper(torch.cat(parts, -1)).unflatten(
            -1, (self.lazy.features, self.lazy.components, 3)
        )
        weight, mean, log_width = raw.unbind(-1)
        return torch.log_softmax(weight, -1), mean, 7.0 * torch.tanh(log_width / 7.0)

    def log_prob(self, x: Tensor) -> Tensor:
        log_weight, mean, log_width = self._parameters_at(x)
        t = (x.unsqueeze(-1) - mean) * torch.exp(-log_width)
        log_normal = -0.5 * t * t - log_width - 0.5 * _LOG_2PI
        return torch.logsumexp(log_weight + log_normal, -1).sum(-1)

    def draw(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """Samples from given uniform and normal numbers, both (*, features), coordinate by coordinate."""
        x = torch.zeros_like(normal)
        for i in range(self.lazy.features):
            log_weight, mean, log_width = (p[..., i, :] for p in self._parameters_at(x))
            cumulative = log_weight.exp().cumsum(-1)
            k = (uniform[..., i : i + 1] > cumulative[..., :-1]).sum(-1, keepdim=True)
            value = mean.gather(-1, k) + log_width.gather(-1, k).exp() * normal[..., i : i + 1]
            x = torch.cat([x[..., :i], value, x[..., i + 1 :]], -1)
        return x


class GaussianMixture(nn.Module):
    """p(y|c) = Σ_k π_k(c) N(y; m_k(c), (A_kᵀA_k)⁻¹(c)), A_k lower triangular with positive diagonal.

    A mixture density network (Bishop 1994) with full covariances: no order of the coordinates is preferred,
    and the integral along any line is another mixture, in closed form.

    Arguments:
        features: Number of dimensions of y.
        context: Number of dimensions of c; 0 for none, the parameters are then plain numbers.
        components: Number K of Gaussians.
        hidden: Hidden widths of the network of c.
    """

    def __init__(self, features: int, context: int, components: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.features, self.components = features, components
        self.below = torch.tril_indices(features, features, -1)
        each = 1 + 2 * features + self.below.shape[1]
        layers: list[nn.Module] = []
        widths = (context, *hidden) if context else (1,)
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], components * each))
        last: Any = self.net[-1]
        with torch.no_grad():
            last.weight.mul_(0.1)
            bias = last.bias.view(components, each)
            bias.zero_()
            # Different from the start in place and width, or they would stay alike for long.
            bias[:, 1 : 1 + features].normal_(std=0.3)
            bias[:, 1 + features : 1 + 2 * features] = torch.linspace(0.7, -0.7, components)[:, None]

    @torch.no_grad()
    def start_at(self, y: Tensor, generator: torch.Generator) -> None:
        """Place Gaussians that depend on nothing at random rows of y (n, d), as wide as their spacing.

        Started together in the middle they would be slow to reach where the rows are few.
        """
        last: Any = self.net[-1]
        bias = last.bias.view(self.components, -1)
        chosen = y[torch.randperm(len(y), generator=generator)[: self.components]]
        distance = torch.cdist(chosen, chosen).sort(1).values
        width = distance[:, min(_NEIGHBOUR, len(chosen) - 1)].clamp_min(1e-3)
        last.weight.zero_()
        bias[: len(chosen), 1 : 1 + self.features] = chosen.to(bias)
        bias[: len(chosen), 1 + self.features : 1 + 2 * self.features] = -width.log().to(bias)[:, None]

    def parameters_at(self, c: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log π (*, K), m (*, K, d) and A (*, K, d, d) at c (*, context); without c, one set of them.

        Without c they are (K), (K, d) and (K, d, d), in the precision of `like`.
        """
        d = self.features
        given = c if c is not None else like.new_zeros(1)
        raw = self.net(given).unflatten(-1, (self.components, -1))
        log_weight, mean, log_diagonal, below = raw.split([1, d, d, raw.shape[-1] - 1 - 2 * d], -1)
        factor = torch.diag_embed((7.0 * torch.tanh(log_diagonal / 7.0)).exp())
        i, j = self.below
        factor[..., i, j] = below
        return torch.log_softmax(log_weight.squeeze(-1), -1), mean, factor

    def log_prob(self, y: Tensor, c: Tensor | None = None) -> Tensor:
        """Log p(y|c): shape (*,)."""
        log_weight, mean, factor = self.parameters_at(c, y)
        z = torch.einsum("...kij,...kj->...ki", factor, y.unsqueeze(-2) - mean)
        log_det = factor.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        log_normal = log_det - 0.5 * z.square().sum(-1) - 0.5 * self.features * _LOG_2PI
        return torch.logsumexp(log_weight + log_normal, -1)

    def log_line_integral(self, y: Tensor, direction: Tensor, c: Tensor | None = None) -> Tensor:
        """Log ∫ p(y + s e|c) ds along the lines through y (*, d) with unit direction e (*, d): shape (*,).

        With z = A(y − m) and g = A e the exponent is a parabola in s, so each Gaussian gives
        √(2π)/|g| exp[−½(|z|² − (z·g)²/|g|²)].
        """
        log_weight, mean, factor = self.parameters_at(c, y)
        z = torch.einsum("...kij,...kj->...ki", factor, y.unsqueeze(-2) - mean)
        g = torch.einsum("...kij,...j->...ki", factor, direction)
        g2 = g.square().sum(-1)
        log_det = factor.diagonal(dim1=-1, dim2=-2).log().sum(-1)
        square = z.square().sum(-1) - (z * g).sum(-1).square() / g2
        log_normal = log_det - 0.5 * square - 0.5 * g2.log() - 0.5 * (self.features - 1) * _LOG_2PI
        return torch.logsumexp(log_weight + log_normal, -1)

    def draw(self, n: int, c: Tensor | None, generator: torch.Generator) -> Tensor:
        """Samples (n, d), one for each row of c (n, context)."""
        dtype = next(self.parameters()).dtype
        normal = torch.randn(n, self.features, generator=generator, dtype=torch.float64).to(dtype)
        uniform = torch.rand(n, 1, generator=generator, dtype=torch.float64).to(dtype)
        log_weight, mean, factor = self.parameters_at(c, normal)
        cumulative = log_weight.exp().cumsum(-1)
        k = (uniform > cumulative[..., :-1]).sum(-1)
        chosen = k if c is None else (torch.arange(n), k)
        z = torch.linalg.solve_triangular(factor[chosen], normal.unsqueeze(-1), upper=False).squeeze(-1)
        return mean[chosen] + z
