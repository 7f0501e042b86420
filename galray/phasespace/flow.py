"""Normalizing flows: f(x, v) = n(x) p(v|x), with zuko."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import zuko
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.settings import FlowPart, FlowSettings
from galray.phasespace.transforms import Ball, Chart

__all__ = ["PhaseSpaceFlow"]

_CHUNK = 16_384


class _MixtureBase(zuko.lazy.LazyDistribution):
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
        return _AutoregressiveMixture(self, c)


class _AutoregressiveMixture(torch.distributions.Distribution):
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (torch's own interface)

    def __init__(self, lazy: _MixtureBase, context: Tensor | None, shape: torch.Size | None = None) -> None:
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
        log_normal = -0.5 * t * t - log_width - 0.5 * math.log(2.0 * math.pi)
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


def _build(part: FlowPart, features: int, context: int) -> zuko.lazy.Flow:
    """A zuko flow of one part."""
    transforms: list[Any] = []
    for i in range(part.transforms):
        order = torch.arange(features) if i % 2 == 0 else torch.arange(features).flip(0)
        options: dict[str, Any] = {
            "features": features,
            "context": context,
            "order": order,
            "hidden_features": part.hidden,
            "activation": nn.SiLU,
        }
        if part.kind == "nsf":
            options["univariate"] = partial(zuko.transforms.MonotonicRQSTransform, bound=8.0, slope=1e-3)
            options["shapes"] = [(part.bins,), (part.bins,), (part.bins - 1,)]
        transforms.append(zuko.flows.MaskedAutoregressiveTransform(**options))
    if not transforms:
        transforms.append(zuko.lazy.UnconditionalTransform(zuko.transforms.IdentityTransform))
    if part.kind == "mixture":
        base: Any = _MixtureBase(features, context, part.bins, part.hidden)
    else:
        base = zuko.lazy.UnconditionalDistribution(
            zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
        )
    return zuko.lazy.Flow(transforms, base)


class PhaseSpaceFlow(nn.Module):
    """f(x, v) = n(x) p(v|x): normalised, differentiable, and sampled exactly.

    n(x) is a flow of y, the ball stretched to R³ and standardised; p(v|x) is a flow of the standardised
    internal velocity, given the internal position. The ball's border is at infinity in y.

    Arguments:
        settings: Its form.
        ball: The ball of positions.
    """

    kind = "flow"
    shift_y: Tensor
    scale_y: Tensor

    def __init__(self, settings: FlowSettings, ball: Ball) -> None:
        super().__init__()
        self.settings = settings
        self.ball = ball
        self.chart = Chart(ball, settings.coordinates)
        self.register_buffer("shift_y", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("scale_y", torch.ones(3, dtype=torch.float64))
        self.density = _build(settings.position, 3, 0)
        self.conditional = _build(settings.velocity, 3, 3)

    def _apply(self, fn, recurse=True):
        shift, scale = self.shift_y, self.scale_y
        super()._apply(fn, recurse)
        self.shift_y, self.scale_y = shift.to(self.shift_y.device), scale.to(self.scale_y.device)
        return self

    def fit_base(self, w: Tensor, generator: torch.Generator) -> None:
        """Fit the standardisations to stars w, shape (n, 6)."""
        if len(w) < 100:
            raise GalrayError(f"{len(w)} stars are too few to fit a phase-space model", "select 100 or more")
        w = w.to(torch.float64)
        self.chart.fit(w)
        y = self._stretched(w[:, :3])
        self.shift_y.copy_(y.mean(0))
        self.scale_y.copy_(y.std(0))

    def _stretched(self, x: Tensor) -> Tensor:
        return self.ball.to_unbounded(x)

    @property
    def dtype(self) -> torch.dtype:
        """The networks' precision."""
        return next(self.parameters()).dtype

    def _split(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(y, u_x, u_v, log |∂y/∂x|, log |∂u_v/∂v|) at w (n, 6), in w's precision."""
        x = w[..., :3]
        y = (self._stretched(x) - self.shift_y.to(w.dtype)) / self.scale_y.to(w.dtype)
        log_det_y = self.ball.log_det(x) - self.scale_y.log().sum().to(w.dtype)
        u = self.chart(w)
        # The velocity part of the chart is a rotation and a scaling: no 1/R in p(v|x).
        log_det_v = -self.chart.scale[3:].log().sum().to(w.dtype).expand(log_det_y.shape)
        return y, u[..., :3], u[..., 3:], log_det_y, log_det_v

    def prepare(self, w: Tensor) -> Tensor:
        """Stars (n, 6) to rows (n, 10): y, u_x, u_v and the log Jacobian, for training."""
        y, ux, uv, log_det_y, log_det_v = self._split(w)
        return torch.cat([y, ux, uv, (log_det_y + log_det_v).unsqueeze(-1)], -1).to(self.dtype)

    def log_prob_rows(self, rows: Tensor) -> Tensor:
        """Log f of rows from `prepare`: shape (n,)."""
        y, ux, uv = rows[:, :3], rows[:, 3:6], rows[:, 6:9]
        return self.density().log_prob(y) + self.conditional(ux).log_prob(uv) + rows[:, 9]

    def log_prob(self, w: Tensor) -> Tensor:
        """Log f(w), normalised over the ball and all velocities.

        Arguments:
            w: Points inside the ball, shape (*, 6), in kpc and km/s; gradients flow through.

        Returns:
            log f in log[kpc⁻³ (km/s)⁻³], shape (*,).
        """
        return self.log_density(w[..., :3]) + self.log_conditional(w)

    def log_density(self, x: Tensor) -> Tensor:
        """Log n(x) at positions (*, 3): shape (*,), ∫ n d³x = 1."""
        y = (self._stretched(x) - self.shift_y.to(x.dtype)) / self.scale_y.to(x.dtype)
        log_det = self.ball.log_det(x) - self.scale_y.log().sum().to(x.dtype)
        return self.density().log_prob(y.to(self.dtype)).to(x.dtype) + log_det

    def log_conditional(self, w: Tensor) -> Tensor:
        """Log p(v|x) at w (*, 6): shape (*,)."""
        u = self.chart(w)
        log_p = self.conditional(u[..., :3].to(self.dtype)).log_prob(u[..., 3:].to(self.dtype))
        return log_p.to(w.dtype) - self.chart.scale[3:].log().sum().to(w.dtype)

    def _gradient(self, function, w: Tensor) -> Tensor:
        flat = w.reshape(-1, 6)
        parts = []
        for part in flat.split(_CHUNK):
            with torch.enable_grad():
                p = part.detach().to(torch.float64).requires_grad_(True)
                parts.append(torch.autograd.grad(function(p).sum(), p)[0].to(w.dtype))
        return torch.cat(parts).reshape(w.shape) if parts else torch.empty_like(w)

    def score(self, w: Tensor) -> Tensor:
        """∇ log f at w (*, 6), in 1/kpc and 1/(km/s): shape and dtype of w."""
        return self._gradient(self.log_prob, w)

    def conditional_score(self, w: Tensor) -> Tensor:
        """∇ log p(v|x) at w (*, 6): what a selection in position cannot bias; shape and dtype of w."""
        return self._gradient(self.log_conditional, w)

    @torch.no_grad()
    def sample_velocity(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draw n velocities at each position.

        Arguments:
            x: Positions inside the ball, shape (*, 3), in kpc.
            n: Velocities per position.
            generator: Source of the random numbers.

        Returns:
            Velocities in km/s, shape (n, *, 3), dtype of x.
        """
        wide = x.to(torch.float64).expand(n, *x.shape)
        flat = wide.reshape(-1, 3)
        out = torch.empty_like(flat)
        for start in range(0, len(flat), _CHUNK):
            part = flat[start : start + _CHUNK]
            ux = self.chart.position(part).to(self.dtype)
            uv = _sample(self.conditional(ux), ux.shape[:-1], self.dtype, generator).to(torch.float64)
            out[start : start + _CHUNK] = self.chart.velocity_inverse(part, uv)
        return out.reshape(wide.shape).to(x.dtype)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n stars: shape (n, 6), float64, in kpc and km/s."""
        parts = []
        for start in range(0, n, _CHUNK):
            count = min(_CHUNK, n - start)
            y = _sample(self.density(), torch.Size([count]), self.dtype, generator).to(torch.float64)
            x = self.ball.from_unbounded(y * self.scale_y + self.shift_y)
            parts.append(torch.cat([x, self.sample_velocity(x, 1, generator)[0]], -1))
        return torch.cat(parts)


def _sample(flow: Any, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Samples of a flow from one generator; torch's distributions would use the global one."""
    features = flow.event_shape[0]
    normal = torch.randn(*shape, features, generator=generator, dtype=torch.float64).to(dtype)
    if isinstance(flow.base, _AutoregressiveMixture):
        uniform = torch.rand(*shape, features, generator=generator, dtype=torch.float64).to(dtype)
        z = flow.base.draw(uniform, normal)
    else:
        z = normal
    return flow.transform.inv(z)
