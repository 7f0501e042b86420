"""Objectives that learn the noise-free f from noisy stars.

Both rest on one principle. The density of measured stars is (f * errors)(w'), and its likelihood has the
gradient E[∇_θ log f(w)] over the posterior p(w|w') ∝ f(w) p(w'|w) of each star's true place. A flow, which
has f, takes the logarithm of the importance-sampled integral. A score network has f but for a factor, which
the posterior does not need: it is trained by score matching on places drawn from the posterior under itself.
That is expectation maximisation for the deconvolved density, one step per batch; its fixed point is the f
whose convolution with the errors is the density of the measured stars, and the way there is short where the
errors are small beside the structure of f.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from galray.phasespace.noise import draw_errors
from galray.phasespace.noise_settings import NoiseSettings
from galray.phasespace.score_matching import ImplicitScoreMatching
from galray.phasespace.settings import ScoreSettings

__all__ = ["ConvolvedLikelihood", "PosteriorScoreMatching", "posterior_stars"]

_CHUNK = 4_096
_HELD_OUT_SEED = 0x0B5E


class _NoisyStars:
    """What both objectives share: rows are stars with their errors, as given."""

    def __init__(self, settings: NoiseSettings) -> None:
        self.settings = settings

    def prepare(self, model: nn.Module, w: Tensor, *, validation: bool = False) -> Tensor:
        """Stars (n, 27) with their errors, or (n, 6) without any, as rows in float64."""
        return w.to(device=next(model.parameters()).device, dtype=torch.float64)

    def _draws(self, model: Any, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws (n, K, 6) and log volumes (n, K), −∞ for draws outside the ball.

        The model says nothing outside: such a draw is replaced by the measured place, with no weight. A
        star all of whose draws are outside stands where it was measured.
        """
        w, volume = draw_errors(rows, self.settings.draws, generator, self.settings.observer)
        inside = model.ball.contains(w[..., :3])
        w = torch.where(inside.unsqueeze(-1), w, rows[:, None, :6])
        volume = torch.where(inside, volume, -torch.inf)
        volume[:, 0] = torch.where(inside.any(1), volume[:, 0], 0.0)
        return w, volume

    def _held_out_draws(self, rows: Tensor) -> torch.Generator:
        # The same draws at every call: epochs are compared on equal terms.
        return torch.Generator().manual_seed(_HELD_OUT_SEED)


class ConvolvedLikelihood(_NoisyStars):
    """Negative log likelihood of noisy stars under a flow convolved with each star's own errors.

    −log ∫ f(w) p(w'|w) dw ≈ −log (1/K) Σ_k f(w_k) ρ_k⁶, with K draws w_k of the errors round w' that are new
    in every batch (importance sampling, Burda et al. 2016, arXiv 1509.00519). Single draws would bias the
    logarithm by −Var/2K, and for K = 1 teach the flow to be blurred twice; pairs along random frames have no
    such bias to first order in the covariances.

    Arguments:
        settings: Number of draws, and the observer.
    """

    name = "negative log likelihood of noisy stars"

    def per_star(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of each row: shape (n,)."""
        net: Any = model
        w, volume = self._draws(net, rows, generator)
        log_f = net.log_prob_rows(net.prepare(w.flatten(0, 1))).view(volume.shape)
        return -torch.logsumexp(log_f + volume.to(log_f.dtype), 1) + torch.log(
            log_f.new_tensor(float(volume.shape[1]))
        )

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean of `per_star` with new draws."""
        return self.per_star(model, rows, generator).mean()

    @torch.no_grad()
    def validate(self, model: nn.Module, rows: Tensor) -> Tensor:
        """`per_star` with the same draws at every call."""
        generator = self._held_out_draws(rows)
        return torch.cat([self.per_star(model, part, generator) for part in rows.split(_CHUNK)])


class PosteriorScoreMatching(_NoisyStars):
    """Implicit score matching on places drawn from each star's posterior under the model itself.

    Of K draws of the errors round w', one is chosen with probability ∝ f(w_k) ρ_k⁶ and stands for the star
    in the loss of `ImplicitScoreMatching`. The choice carries no gradient. A gradient form gives log f
    itself; for free components it is the line integral of the score from w' by the trapezoidal rule, exact
    to second order in the errors.

    The held-out figure is the same loss over held-out stars, all draws weighted. What it is an expectation of
    sharpens with the model, so that it compares epochs of one training, not different treatments of noise.

    Arguments:
        settings: Number of draws, and the observer.
        model_settings: Those of the score network, for the weights of the loss; None for the defaults.
    """

    name = "implicit score matching of noisy stars"

    def __init__(self, settings: NoiseSettings, model_settings: ScoreSettings | None = None) -> None:
        super().__init__(settings)
        self.plain = ImplicitScoreMatching(model_settings)

    def weights(self, model: nn.Module, rows: Tensor, w: Tensor, volume: Tensor) -> Tensor:
        """Posterior log weights of draws w (n, K, 6) with log volumes (n, K): shape (n, K)."""
        net: Any = model
        with torch.no_grad():
            return log_ratio(net, rows[:, :6], w) + volume

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean loss with one new draw of each star's posterior."""
        w, volume = self._draws(model, rows, generator)
        log_weight = self.weights(model, rows, w, volume)
        return self._score_matching(model, _choose(w, log_weight, generator)).mean()

    @torch.no_grad()
    def validate(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Posterior mean of the loss of each row, with the same draws at every call."""
        net: Any = model
        generator = self._held_out_draws(rows)
        found = []
        for part in rows.split(_CHUNK):
            w, volume = self._draws(net, part, generator)
            weight = torch.softmax(self.weights(net, part, w, volume), 1)
            loss = self._score_matching(net, w.flatten(0, 1), base_loss=True).view(volume.shape)
            found.append((weight.to(loss.dtype) * loss).sum(1))
        return torch.cat(found)

    def _score_matching(self, model: Any, w: Tensor, *, base_loss: bool = False) -> Tensor:
        """The loss of `ImplicitScoreMatching` at w (n, 6), shape (n,); without the base's part unless asked.

        The base does not learn, so its own part has no gradient, only cost.
        """
        dtype = next(model.parameters()).dtype
        wide = model.chart(w)
        h, gradient = (t.to(dtype) for t in self.plain.weight(model, w, wide))
        u = wide.to(dtype)
        c, divergence = model.correction.value_and_divergence(u)
        if base_loss:
            b, base_divergence = model.base.score_and_divergence(u)
            c, divergence = b + c, base_divergence + divergence
            return h * (0.5 * c.square().sum(-1) + divergence) + (gradient * c).sum(-1)
        b = model.base.score(u)
        return h * (((0.5 * c + b) * c).sum(-1) + divergence) + (gradient * c).sum(-1)


def log_ratio(model: Any, w0: Tensor, w: Tensor) -> Tensor:
    """Log f(w_k) + const of a score network at points w (n, K, 6) near w0 (n, 6): shape (n, K), float64."""
    chart = model.chart
    u = chart(w)
    dtype = next(model.parameters()).dtype
    if hasattr(model.correction, "potential"):
        flat = u.flatten(0, 1).to(dtype)
        log_f = (model.base.log_prob(flat) + model.correction.potential(flat)).view(u.shape[:-1])
    else:
        u0 = chart(w0)
        s0 = model.internal_score(u0.to(dtype)).unsqueeze(1)
        s = model.internal_score(u.flatten(0, 1).to(dtype)).view(u.shape)
        log_f = (0.5 * (s + s0) * (u - u0.unsqueeze(1)).to(dtype)).sum(-1)
    return log_f.to(torch.float64) + chart.log_det(w)


def _choose(w: Tensor, log_weight: Tensor, generator: torch.Generator) -> Tensor:
    """One of K points (n, K, 6) with probability ∝ exp(log_weight): shape (n, 6)."""
    cumulative = torch.softmax(log_weight, 1).cumsum(1)
    uniform = torch.rand(len(w), 1, generator=generator, dtype=w.dtype, device=generator.device).to(w.device)
    k = (uniform * cumulative[:, -1:] > cumulative[:, :-1]).sum(1)
    return w[torch.arange(len(w), device=w.device), k]


@torch.no_grad()
def posterior_stars(model: Any, rows: Tensor, settings: NoiseSettings, *, seed: int) -> Tensor:
    """One place for each noisy star, drawn from its posterior under a trained model: a sample of f.

    What holds for stars of f itself, such as Stein's identities, holds for these and not for measured ones.

    Arguments:
        model: A flow or a score network.
        rows: Stars (n, 27) of `attach_errors`.
        settings: Number of draws, and the observer.
        seed: Of the draws.

    Returns:
        States inside the ball, shape (n, 6), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    noisy = _NoisyStars(settings)
    found = []
    for part in noisy.prepare(model, rows).split(_CHUNK):
        w, volume = noisy._draws(model, part, generator)
        log_f = log_ratio(model, part[:, :6], w) if model.kind == "score" else model.log_prob(w)
        found.append(_choose(w, log_f + volume, generator))
    return torch.cat(found)
