"""Score matching: the exact implicit loss, its sliced form, and denoising; for stars seen in part, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from galray.phasespace.selection import SelectionEfficiency
from galray.phasespace.settings import ScoreSettings

__all__ = ["DenoisingScoreMatching", "ImplicitScoreMatching", "SlicedScoreMatching", "score_matching"]

_CHUNK = 16_384
_BASE_SAMPLE = 4_096  # stars that fix the constant of the training curve
_U, _B, _H, _DH, _LOSS = slice(0, 6), slice(6, 12), 12, slice(13, 19), 19  # columns of the rows


class ImplicitScoreMatching:
    """Implicit score matching with an edge weight (Hyvärinen 2005).

    With a weight h(x, v), zero on the border of the ball, integration by parts leaves no border term:

        L = E[h (½|s|² + ∇·s) + ∇h·s].

    In standardised internal coordinates, s = b + c with the fixed base b and the network's correction c:

        L = L_base + E[h (½|c|² + b·c + ∇·c) + ∇h·c],

    so each star's b, h, ∇h and base loss are computed once. The divergence of c is exact. Stars seen with a
    known efficiency ε(x) have the score s + ∇ log ε: the second term joins the base in this loss and is no
    part of the model, which stays that of f. (The constant ∇² log ε is left out of L_base.)

    Arguments:
        settings: The model's settings.
        selection: The known selection; None where every star is seen.
    """

    name = "implicit score matching"

    def __init__(
        self, settings: ScoreSettings | None = None, selection: SelectionEfficiency | None = None
    ) -> None:
        self.settings = settings or ScoreSettings()
        self.selection = selection

    def weight(self, model: Any, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The weight h (n,) and its gradient by internal coordinates (n, 6) at stars w (n, 6), internal u."""
        h, by_position = model.chart.edge_weight(w)
        if self.selection is not None and self.selection.weight is not None:
            k, gradient = self.selection.weight_and_gradient(w[..., :3])
            by_position = k.unsqueeze(-1) * by_position
            by_position = by_position + h.unsqueeze(-1) * model.chart.position_covector(w, gradient)
            h = h * k
        tail = self.settings.velocity_weight
        if tail is None:
            return h, torch.cat([by_position, torch.zeros_like(by_position)], -1)
        v = u[..., 3:].to(w.dtype)
        k = 1.0 / (1.0 + v.square().sum(-1) / tail**2)
        by_velocity = (-2.0 / tail**2 * h * k.square()).unsqueeze(-1) * v
        return h * k, torch.cat([k.unsqueeze(-1) * by_position, by_velocity], -1)

    def seen(self, model: Any, w: Tensor) -> Tensor:
        """∇ log ε by internal coordinates at stars w (n, 6): shape (n, 6), zero for velocities."""
        assert self.selection is not None
        gradient = self.selection.log_and_gradient(w[:, :3])[1]
        return nn.functional.pad(model.chart.position_covector(w, gradient), (0, 3))

    def prepare(self, model: nn.Module, w: Tensor, *, validation: bool = False) -> Tensor:
        """Rows (u, b, h, ∇h, base loss): shape (n, 20).

        The base's own loss is a constant: exact for validation stars, for training stars the mean over
        the first 4,096 of them (it only sets the level of the training curve).
        """
        net: Any = model
        parameter = next(model.parameters())
        device, dtype = parameter.device, parameter.dtype
        rows = torch.empty(len(w), 20, dtype=dtype, device=device)
        for start in range(0, len(w), _CHUNK):
            part = w[start : start + _CHUNK].to(device=device, dtype=torch.float64)
            out = rows[start : start + _CHUNK]
            u = net.chart(part)
            h, gradient = self.weight(net, part, u)
            u = u.to(dtype)
            out[:, _U], out[:, _H], out[:, _DH] = u, h.to(dtype), gradient.to(dtype)
            b = net.base.score(u)
            if self.selection is not None:
                b = b + self.seen(net, part).to(dtype)
            out[:, _B] = b
        sample = rows if validation else rows[:_BASE_SAMPLE]
        for part in sample.split(_CHUNK):
            divergence = net.base.score_and_divergence(part[:, _U])[1]
            part[:, _LOSS] = _weighted(part[:, _B], divergence, part[:, _H], part[:, _DH])
        if not validation:
            rows[:, _LOSS] = sample[:, _LOSS].mean()
        return rows

    def per_star(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The loss of each row: shape (n,)."""
        net: Any = model
        return _correction_loss(rows, *net.correction.value_and_divergence(rows[:, _U]))

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean of `per_star`."""
        return self.per_star(model, rows).mean()

    @torch.no_grad()
    def validate(self, model: nn.Module, rows: Tensor) -> Tensor:
        """`per_star` without gradient."""
        return torch.cat([self.per_star(model, part) for part in rows.split(_CHUNK)])


class SlicedScoreMatching(ImplicitScoreMatching):
    """Sliced score matching with reduced variance (Song et al. 2019, arXiv 1905.07088).

    The divergence of `ImplicitScoreMatching` is replaced by tᵀ(∇s)t along one random direction t of signs
    per star and step, which has the same mean: one tangent through the layers instead of six. Held-out stars
    are judged by the exact loss.
    """

    name = "sliced score matching"

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean over the batch, with new directions."""
        net: Any = model
        u = rows[:, _U]
        signs = torch.randint(2, u.shape, generator=generator, device=u.device).to(u.dtype).mul_(2).sub_(1)
        return _correction_loss(rows, *net.correction.value_and_curvature(u, signs)).mean()


class DenoisingScoreMatching(ImplicitScoreMatching):
    """Denoising score matching (Vincent 2011) with antithetic noise: no derivative of the network.

    Stars are shifted to ũ = u ± σξ with a standard normal ξ, and

        L = E[h(ũ) (½|s(ũ)|² ± s(ũ)·ξ/σ)]

    is least where s = ∇ log of the density smoothed by σ: the bias is O(σ²), and the two signs cancel the
    variance that grows as 1/σ. The weight h is taken at the shifted places, so the border enters by the
    smoothing alone.
    """

    name = "denoising score matching"

    def prepare(self, model: nn.Module, w: Tensor, *, validation: bool = False) -> Tensor:
        """Rows u: shape (n, 6)."""
        net: Any = model
        parameter = next(model.parameters())
        return torch.cat(
            [
                net.chart(part.to(device=parameter.device, dtype=torch.float64)).to(parameter.dtype)
                for part in w.split(_CHUNK)
            ]
        )

    def per_star(self, model: nn.Module, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The loss of each row with new noise, or with always the same: shape (n,)."""
        net: Any = model
        if generator is None:
            generator = torch.Generator(rows.device).manual_seed(1)
        noise = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)
        sigma = self.settings.smoothing
        total = torch.zeros_like(rows[:, 0])
        for sign in (1.0, -1.0):
            u = rows + sign * sigma * noise
            with torch.no_grad():
                w = net.chart.inverse(u.to(torch.float64))
                h = self.weight(net, w, u)[0].to(u.dtype)
                known = net.base.score(u)
                if self.selection is not None:
                    # ε need not be known where the weight is zero: outside the ball, or where none is seen
                    w = torch.where((h > 0).unsqueeze(-1), w, net.chart.inverse(rows.to(torch.float64)))
                    known = known + self.seen(net, w).to(u.dtype)
            score = known + net.correction(u)
            total = total + h * ((0.5 * score + (sign / sigma) * noise) * score).sum(-1)
        return 0.5 * total

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean of `per_star` with new noise."""
        return self.per_star(model, rows, generator).mean()


_OBJECTIVES = {
    "implicit": ImplicitScoreMatching,
    "sliced": SlicedScoreMatching,
    "denoising": DenoisingScoreMatching,
}


def score_matching(
    settings: ScoreSettings | None = None, selection: SelectionEfficiency | None = None
) -> ImplicitScoreMatching:
    """The objective that a score network's settings choose.

    Arguments:
        settings: The model's settings; None for the defaults.
        selection: Of the stars, where it is known.
    """
    settings = settings or ScoreSettings()
    return _OBJECTIVES[settings.objective](settings, selection)


def _correction_loss(rows: Tensor, c: Tensor, divergence: Tensor) -> Tensor:
    """The loss h (½|c|² + b·c + ∇·c) + ∇h·c + base loss of each row."""
    square = ((0.5 * c + rows[:, _B]) * c).sum(-1)
    return rows[:, _H] * (square + divergence) + (rows[:, _DH] * c).sum(-1) + rows[:, _LOSS]


def _weighted(s: Tensor, divergence: Tensor, h: Tensor, gradient: Tensor) -> Tensor:
    return h * (0.5 * s.square().sum(-1) + divergence) + (gradient * s).sum(-1)
