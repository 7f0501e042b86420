"""What is minimised: likelihood for flows, implicit score matching for score networks."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.settings import FlowSettings

__all__ = ["FlowLikelihood", "ImplicitScoreMatching", "Objective", "objective"]

_CHUNK = 16_384
_BASE_SAMPLE = 4_096  # stars that fix the constant of the training curve


class Objective(Protocol):
    """A loss that the training loop can minimise without knowing what it is.

    `prepare` turns stars into rows of one tensor, once; the loop then draws batches of rows by index.
    """

    name: str

    def prepare(self, model: nn.Module, w: Tensor, *, validation: bool = False) -> Tensor:
        """Stars (n, 6) in kpc and km/s to rows (n, c) in float32, on the model's device."""
        ...

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean loss of a batch of rows: a scalar with gradient."""
        ...

    def validate(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Held-out loss of each row, without noise of its own: shape (n,)."""
        ...


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


class ImplicitScoreMatching:
    """Implicit score matching with an edge weight (Hyvärinen 2005).

    With the weight h(x), zero on the border of the ball, integration by parts leaves no border term:

        L = E[h (½|s|² + ∇·s) + ∇h·s].

    In standardised internal coordinates, s = b + c with the fixed base b and the network's correction c:

        L = L_base + E[h (½|c|² + b·c + ∇·c) + ∇h·c],

    so each star's b, h, ∇h and base loss are computed once. The divergence of c is exact.
    """

    name = "implicit score matching"

    def prepare(self, model: nn.Module, w: Tensor, *, validation: bool = False) -> Tensor:
        """Rows (u, b, h, ∇h, base loss): shape (n, 17).

        The base's own loss is a constant: exact for validation stars, for training stars the mean over
        the first 4,096 of them (it only sets the level of the training curve).
        """
        device, dtype = _device_and_dtype(model)
        net: Any = model
        rows = torch.empty(len(w), 17, dtype=dtype, device=device)
        for start in range(0, len(w), _CHUNK):
            part = w[start : start + _CHUNK].to(device=device, dtype=torch.float64)
            out = rows[start : start + _CHUNK]
            h, gradient = net.chart.edge_weight(part)
            u = net.chart(part).to(dtype)
            out[:, :6], out[:, 12], out[:, 13:16] = u, h.to(dtype), gradient.to(dtype)
            if validation or start < _BASE_SAMPLE:
                b, divergence = net.base.score_and_divergence(u)
                out[:, 16] = _weighted(b, divergence, out[:, 12], out[:, 13:16])
            else:
                b = net.base.score(u)
            out[:, 6:12] = b
        if not validation:
            rows[:, 16] = rows[:_BASE_SAMPLE, 16].mean()
        return rows

    def per_star(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The loss of each row: shape (n,)."""
        net: Any = model
        u, b, h, gradient, base = rows[:, :6], rows[:, 6:12], rows[:, 12], rows[:, 13:16], rows[:, 16]
        c, divergence = net.correction.value_and_divergence(u)
        square = ((0.5 * c + b) * c).sum(-1)
        return h * (square + divergence) + (gradient * c[:, :3]).sum(-1) + base

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean of `per_star`."""
        return self.per_star(model, rows).mean()

    @torch.no_grad()
    def validate(self, model: nn.Module, rows: Tensor) -> Tensor:
        """`per_star` without gradient."""
        return torch.cat([self.per_star(model, part) for part in rows.split(_CHUNK)])


def _weighted(s: Tensor, divergence: Tensor, h: Tensor, gradient: Tensor) -> Tensor:
    return h * (0.5 * s.square().sum(-1) + divergence) + (gradient * s[:, :3]).sum(-1)


class FlowLikelihood:
    """Negative log likelihood per star of a flow; for a continuous flow, its flow matching loss.

    In natural units of the flow's own coordinates, plus the constant log Jacobian.

    Arguments:
        settings: The flow's settings, from which the loss has its name; None for a likelihood.
    """

    def __init__(self, settings: FlowSettings | None = None) -> None:
        parts = () if settings is None else (settings.velocity, settings.position)[: 2 - settings.conditional]
        matched = [part.kind == "continuous" for part in parts]
        names = ("negative log likelihood",) * (not matched or not all(matched))
        self.name = " + ".join(names + ("flow matching loss",) * any(matched))

    def prepare(self, model: nn.Module, w: Tensor, *, validation: bool = False) -> Tensor:
        """Rows of the flow's own coordinates and the constant log Jacobian."""
        device, _ = _device_and_dtype(model)
        net: Any = model
        return torch.cat(
            [net.prepare(part.to(device=device, dtype=torch.float64)) for part in w.split(_CHUNK)]
        )

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean loss of a batch."""
        net: Any = model
        return net.training_loss(rows, generator).mean()

    @torch.no_grad()
    def validate(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Held-out loss of each row."""
        net: Any = model
        return torch.cat([net.held_out_loss(part) for part in rows.split(_CHUNK)])


def objective(kind: str, settings: Any = None) -> Objective:
    """The objective that trains a kind of model.

    Arguments:
        kind: ``flow`` or ``score``.
        settings: The model's settings: its ``noise`` says whether the stars' errors are deconvolved.

    Raises:
        GalrayError: An unknown kind.
    """
    noise = getattr(settings, "noise", None)
    if noise is not None and noise.treatment == "deconvolve":
        from galray.phasespace.noise_objectives import ConvolvedLikelihood, PosteriorScoreMatching

        if kind == "flow":
            return ConvolvedLikelihood(noise)
        if kind == "score":
            return PosteriorScoreMatching(noise)
    if kind == "flow":
        return FlowLikelihood(settings)
    if kind == "score":
        return ImplicitScoreMatching()
    raise GalrayError(f"no objective for a model of kind '{kind}'", 'use "flow" or "score"')
