"""What is minimised: likelihood for flows, score matching for score networks."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.score_matching import ImplicitScoreMatching, score_matching
from galray.phasespace.selection import SelectionEfficiency
from galray.phasespace.settings import FlowSettings

__all__ = ["FlowLikelihood", "ImplicitScoreMatching", "Objective", "objective"]

_CHUNK = 16_384


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


def objective(kind: str, settings: Any = None, *, selection: SelectionEfficiency | None = None) -> Objective:
    """The objective that trains a kind of model.

    Arguments:
        kind: ``flow`` or ``score``.
        settings: The model's settings: its ``noise`` says whether the stars' errors are deconvolved.
        selection: Known selection of the stars, for score networks.

    Raises:
        GalrayError: An unknown kind, or a selection that the objective does not correct for.
    """
    noise = getattr(settings, "noise", None)
    deconvolves = noise is not None and noise.treatment == "deconvolve"
    if selection is not None and (kind != "score" or deconvolves):
        what = "an objective that deconvolves errors" if deconvolves else f"a model of kind '{kind}'"
        raise GalrayError(f"{what} does not correct for a selection", "use a score network without it")
    if deconvolves:
        assert noise is not None
        from galray.phasespace.noise_objectives import ConvolvedLikelihood, PosteriorScoreMatching

        if kind == "flow":
            return ConvolvedLikelihood(noise)
        if kind == "score":
            return PosteriorScoreMatching(noise, settings)
    if kind == "flow" and getattr(settings, "missing_rv", "") == "marginalise":
        from galray.phasespace.sightlines import SightlineLikelihood

        if settings.sun_position is None:
            raise GalrayError(
                "flow.missing_rv = 'marginalise' without flow.sun_position", "give the Sun's place"
            )
        return SightlineLikelihood(settings.sun_position)
    if kind == "flow":
        return FlowLikelihood(settings)
    if kind == "score":
        return score_matching(settings, selection)
    raise GalrayError(f"no objective for a model of kind '{kind}'", 'use "flow" or "score"')
