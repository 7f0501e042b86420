"""Normalizing flows: f(x, v) = n(x) p(v|x), or p(v|x) alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.flow_parts import PartDensity, build_part
from galray.phasespace.settings import FlowSettings
from galray.phasespace.transforms import Ball, Chart

__all__ = ["ConditionalFlow", "PhaseSpaceFlow", "flow"]

_CHUNK = 16_384
_CHUNK_ODE = 2_048  # the graph of a whole ODE is kept for its gradient


class ConditionalFlow(nn.Module):
    """p(v|x): normalised over velocities, differentiable, and sampled exactly.

    A flow of the standardised internal velocity, given the internal position. Stars that a selection ε(x)
    left out change how well it is known at each place, not what it is.

    Arguments:
        settings: Its form.
        ball: The ball of positions.
    """

    kind = "flow"

    def __init__(self, settings: FlowSettings, ball: Ball) -> None:
        super().__init__()
        self.settings = settings
        self.ball = ball
        self.chart = Chart(ball, settings.coordinates)
        self.conditional = build_part(settings.velocity, 3, 3)

    def fit_base(self, w: Tensor, generator: torch.Generator) -> None:
        """Fit the standardisations to stars w, shape (n, 6)."""
        if len(w) < 100:
            raise GalrayError(f"{len(w)} stars are too few to fit a phase-space model", "select 100 or more")
        self.chart.fit(w.to(torch.float64))

    @property
    def matched(self) -> bool:
        """Whether any part is trained by flow matching; its log density is then the solution of an ODE."""
        return any(part.matched for part in self.children() if isinstance(part, PartDensity))

    @property
    def dtype(self) -> torch.dtype:
        """The networks' precision."""
        return next(self.parameters()).dtype

    def prepare(self, w: Tensor) -> Tensor:
        """Stars (n, 6) to rows (n, 7): u_x, u_v and the log Jacobian, for training."""
        u = self.chart(w)
        log_det = -self.chart.scale[3:].log().sum().to(w.dtype).expand(len(w), 1)
        return torch.cat([u, log_det], -1).to(self.dtype)

    def log_prob_rows(self, rows: Tensor) -> Tensor:
        """Log p(v|x) of rows from `prepare`: shape (n,)."""
        return self.conditional.log_prob(rows[:, 3:6], rows[:, :3]) + self.log_position_rows(rows)

    def log_position_rows(self, rows: Tensor) -> Tensor:
        """What `log_prob_rows` has beside the density of u_v: here the log Jacobian, shape (n,)."""
        return rows[:, 6]

    def training_loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """What training minimises, of each row: shape (n,)."""
        return self.conditional.loss(rows[:, 3:6], rows[:, :3], generator) - rows[:, 6]

    def held_out_loss(self, rows: Tensor) -> Tensor:
        """The same without noise of its own: shape (n,)."""
        return self.conditional.held_out_loss(rows[:, 3:6], rows[:, :3]) - rows[:, 6]

    def log_conditional(self, w: Tensor) -> Tensor:
        """Log p(v|x) at w (*, 6), in log[(km/s)⁻³]: shape (*,); gradients flow through."""
        u = self.chart(w)
        log_p = self.conditional.log_prob(u[..., 3:].to(self.dtype), u[..., :3].to(self.dtype))
        # The velocity part of the chart is a rotation and a scaling: no 1/R in p(v|x).
        return log_p.to(w.dtype) - self.chart.scale[3:].log().sum().to(w.dtype)

    def conditional_score(self, w: Tensor) -> Tensor:
        """∇ log p(v|x) at w (*, 6): what a selection in position cannot bias; shape and dtype of w."""
        return _gradient(self.log_conditional, w, _CHUNK_ODE if self.matched else _CHUNK)

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
            uv = self.conditional.draw(len(ux), ux, generator).to(torch.float64)
            out[start : start + _CHUNK] = self.chart.velocity_inverse(part, uv)
        return out.reshape(wide.shape).to(x.dtype)


class PhaseSpaceFlow(ConditionalFlow):
    """f(x, v) = n(x) p(v|x): normalised, differentiable, and sampled exactly.

    n(x) is a flow of y, the ball stretched to R³ and standardised; p(v|x) is a flow of the standardised
    internal velocity, given the internal position. The ball's border is at infinity in y.

    Arguments:
        settings: Its form.
        ball: The ball of positions.
    """

    shift_y: Tensor
    scale_y: Tensor

    def __init__(self, settings: FlowSettings, ball: Ball) -> None:
        super().__init__(settings, ball)
        self.register_buffer("shift_y", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("scale_y", torch.ones(3, dtype=torch.float64))
        self.density = build_part(settings.position, 3, 0)

    def _apply(self, fn, recurse=True):
        shift, scale = self.shift_y, self.scale_y
        super()._apply(fn, recurse)
        self.shift_y, self.scale_y = shift.to(self.shift_y.device), scale.to(self.scale_y.device)
        return self

    def fit_base(self, w: Tensor, generator: torch.Generator) -> None:
        """Fit the standardisations to stars w, shape (n, 6)."""
        super().fit_base(w, generator)
        y = self.ball.to_unbounded(w[:, :3].to(torch.float64))
        self.shift_y.copy_(y.mean(0))
        self.scale_y.copy_(y.std(0))

    def start_at(self, w: Tensor, generator: torch.Generator) -> None:
        """Start the Gaussians of n(x) at random ones of the stars w (n, 6), where n is made of Gaussians.

        They then find structure as fine as dust leaves it, and sooner. Those that start together in the
        middle give the smoother score.
        """
        self.density.start_at(self._standardised(w[:, :3].to(torch.float64))[0], generator)

    def _standardised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, log |∂y/∂x|) at positions (*, 3), in x's precision."""
        y = (self.ball.to_unbounded(x) - self.shift_y.to(x.dtype)) / self.scale_y.to(x.dtype)
        return y, self.ball.log_det(x) - self.scale_y.log().sum().to(x.dtype)

    def prepare(self, w: Tensor) -> Tensor:
        """Stars (n, 6) to rows (n, 10): u_x, u_v, the log Jacobian and y, for training."""
        y, log_det = self._standardised(w[:, :3])
        rows = super().prepare(w)
        rows[:, 6] += log_det.to(self.dtype)
        return torch.cat([rows, y.to(self.dtype)], -1)

    def log_position_rows(self, rows: Tensor) -> Tensor:
        """Log density of y and the log Jacobian: shape (n,)."""
        return self.density.log_prob(rows[:, 7:10]) + rows[:, 6]

    def training_loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """What training minimises, of each row: shape (n,)."""
        return self.density.loss(rows[:, 7:10], None, generator) + super().training_loss(rows, generator)

    def held_out_loss(self, rows: Tensor) -> Tensor:
        """The same without noise of its own: shape (n,)."""
        return self.density.held_out_loss(rows[:, 7:10], None) + super().held_out_loss(rows)

    def log_density(self, x: Tensor) -> Tensor:
        """Log n(x) at positions (*, 3): shape (*,), ∫ n d³x = 1."""
        y, log_det = self._standardised(x)
        return self.density.log_prob(y.to(self.dtype)).to(x.dtype) + log_det

    def log_prob(self, w: Tensor) -> Tensor:
        """Log f(w), normalised over the ball and all velocities.

        Arguments:
            w: Points inside the ball, shape (*, 6), in kpc and km/s; gradients flow through.

        Returns:
            log f in log[kpc⁻³ (km/s)⁻³], shape (*,).
        """
        return self.log_density(w[..., :3]) + self.log_conditional(w)

    def score(self, w: Tensor) -> Tensor:
        """∇ log f at w (*, 6), in 1/kpc and 1/(km/s): shape and dtype of w."""
        return _gradient(self.log_prob, w, _CHUNK_ODE if self.matched else _CHUNK)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n stars: shape (n, 6), float64, in kpc and km/s."""
        parts = []
        for start in range(0, n, _CHUNK):
            y = self.density.draw(min(_CHUNK, n - start), None, generator).to(torch.float64)
            x = self.ball.from_unbounded(y * self.scale_y + self.shift_y)
            parts.append(torch.cat([x, self.sample_velocity(x, 1, generator)[0]], -1))
        return torch.cat(parts)


def flow(settings: FlowSettings, ball: Ball) -> ConditionalFlow:
    """The flow that settings describe: of f(x, v), or of p(v|x) alone."""
    return (ConditionalFlow if settings.conditional else PhaseSpaceFlow)(settings, ball)


def _gradient(function: Callable[[Tensor], Tensor], w: Tensor, chunk: int) -> Tensor:
    """∇ function at w (*, 6), in float64 outside the networks: shape and dtype of w."""
    parts = []
    for part in w.reshape(-1, 6).split(chunk):
        with torch.enable_grad():
            p = part.detach().to(torch.float64).requires_grad_(True)
            parts.append(torch.autograd.grad(function(p).sum(), p)[0].to(w.dtype))
    return torch.cat(parts).reshape(w.shape) if parts else torch.empty_like(w)
