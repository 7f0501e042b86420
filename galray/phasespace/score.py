"""Score networks: ∇ log f from the stars themselves, by implicit score matching from an analytic base."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.base import AnalyticBase
from galray.phasespace.gradient_mlp import GradientMLP
from galray.phasespace.mlp import DivergenceMLP
from galray.phasespace.selection import SelectionEfficiency
from galray.phasespace.settings import ScoreSettings
from galray.phasespace.transforms import Ball, Chart

__all__ = ["ScoreNetwork"]

# Of the base: each leaves two fifths of what is amiss where errors are half the dispersion, and six tenths
# where they are eight tenths of it.
_ROUNDS = 6
_CHUNK = 16_384  # points per evaluation: bounds memory and stays near the cache


class ScoreNetwork(nn.Module):
    """s(w) = ∇ log f_base + network, learned in standardised internal coordinates.

    The network starts as zero, so an untrained model is its analytic base.

    Arguments:
        settings: Its form.
        ball: The ball of positions.
    """

    kind = "score"

    def __init__(self, settings: ScoreSettings, ball: Ball) -> None:
        super().__init__()
        self.settings = settings
        self.ball = ball
        self.chart = Chart(ball, settings.coordinates)
        self.base = AnalyticBase(settings.base)
        network = GradientMLP if settings.form == "gradient" else DivergenceMLP
        self.correction = network(6, settings.hidden, settings.activation)
        self.base.requires_grad_(False)

    def fit_base(
        self, w: Tensor, generator: torch.Generator, selection: SelectionEfficiency | None = None
    ) -> None:
        """Fit standardisation and analytic base to stars.

        Of stars with errors the base is fitted anew, a few times, to places drawn from each star's posterior
        under the base before: expectation maximisation of the deconvolved base, from which the network then
        has little way to go.

        Arguments:
            w: Stars (n, 6), or (n, 27) with errors that are to be deconvolved.
            generator: Source of every random number.
            selection: Known selection of the stars.
        """
        if len(w) < 100:
            raise GalrayError(f"{len(w)} stars are too few to fit a phase-space model", "select 100 or more")
        self.chart.fit(w[:, :6])
        efficiency = None
        if selection is not None:

            def efficiency(x: Tensor) -> Tensor:
                return selection.log_efficiency(self.chart.position_inverse(x)).detach()

        def fit(states: Tensor) -> None:
            u = self.chart(states.to(torch.float64)).to(next(self.parameters()).dtype)
            self.base.requires_grad_(True)
            inside = lambda x: self.ball.contains(self.chart.position_inverse(x))  # noqa: E731
            self.base.fit(u, inside, generator, efficiency)

        fit(w[:, :6])
        if w.shape[1] > 6 and self.settings.noise.treatment == "deconvolve":
            from galray.phasespace.noise_objectives import posterior_stars

            for _ in range(_ROUNDS):
                seed = int(torch.randint(2**62, (), generator=generator))
                fit(posterior_stars(self, w, self.settings.noise, seed=seed))

    def internal_score(self, u: Tensor) -> Tensor:
        """The score of the density in internal coordinates, u (*, 6) to (*, 6); base part detached."""
        return self.base.score(u) + self.correction(u)

    @torch.no_grad()
    def score(self, w: Tensor) -> Tensor:
        """∇ log f at phase-space points.

        Arguments:
            w: Points inside the ball, shape (*, 6), in kpc and km/s.

        Returns:
            (∂ₓ log f, ∂ᵥ log f) in 1/kpc and 1/(km/s), shape and dtype of w.
        """
        flat = w.reshape(-1, 6)
        dtype = next(self.parameters()).dtype
        out = torch.empty_like(flat)
        for start in range(0, len(flat), _CHUNK):
            part = flat[start : start + _CHUNK].to(torch.float64)
            s = self.internal_score(self.chart(part).to(dtype)).to(torch.float64)
            out[start : start + _CHUNK] = self.chart.pull_score(part, s).to(w.dtype)
        return out.reshape(w.shape)
