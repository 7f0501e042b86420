"""a(x) from the Boltzmann equation by least squares over velocities at fixed position.

With the score s = (sₓ, sᵥ) = ∇log f, stationarity is r(a) = v·sₓ + a·sᵥ = 0 for every v. Three estimating
equations over velocities drawn from p(v|x):

plain       min E[r²]:                     a = −E[sᵥsᵥᵀ]⁻¹ E[sᵥ (v·sₓ)]
stein       E[(v−u) sᵥᵀ] = −1:             a = +E[(v−u) (v·sₓ)]
instrument  E[z r] = 0, z = Σ⁻¹(v−u):      a = −E[z sᵥᵀ]⁻¹ E[z (v·sₓ)]

u and Σ are the mean and covariance of the velocities at x. The plain form is biased low where sᵥ is noisy
(errors in variables). The instrument is free of that bias, since z does not contain the score, is unmoved
by a score that is too small by a constant factor, and has no scatter when the score is exact; the Stein form
has the scatter of its finite sample.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.gravity.exports import Exportable
from galray.gravity.region import Region, as_positions, as_region

__all__ = ["LeastSquaresField", "least_squares"]

Form = Literal["instrument", "stein", "plain"]


def least_squares(
    model: Any,
    x: Any,
    *,
    velocities: Any = None,
    num_velocities: int = 2000,
    form: Form = "instrument",
    partner: Any = None,
    generator: Any = None,
    batch_size: int = 50_000,
) -> Tensor:
    """Acceleration at positions from the score of f at many velocities.

    Arguments:
        model: Anything with ``score(w)``: the full score (∇log n included) at w (*, 6), shape (*, 6).
        x: Positions (*, 3) in kpc.
        velocities: Velocities at each position, shape (m, *, 3) in km/s. They may be stars' or drawn from
            the model; None draws them with ``model.sample_velocity(x, m, generator)``.
        num_velocities: m, when they are drawn.
        form: ``instrument``, ``stein`` or ``plain``.
        partner: A model trained on other stars (``plain`` only): the product of the two models' residuals
            is minimised, E[r₁r₂], which has no noise floor.
        generator: What the model's ``sample_velocity`` takes as its source of randomness.
        batch_size: Phase-space points scored at once.

    Returns:
        a(x) in (km/s)²/kpc, shape (*, 3), float64.

    Raises:
        GalrayError: Velocities are absent and the model cannot draw them, are of the wrong shape, or too few.
    """
    x = as_positions(x)
    flat = x.reshape(-1, 3)
    if partner is not None and form != "plain":
        raise GalrayError(f"a partner model with form='{form}'", "cross-fitting belongs to form='plain'")
    if velocities is None:
        if not hasattr(model, "sample_velocity"):
            raise GalrayError(
                f"{type(model).__name__} cannot draw velocities", "give velocities=..., shape (m, *, 3)"
            )
        with torch.no_grad():
            velocities = model.sample_velocity(x, num_velocities, generator)
    v = torch.as_tensor(velocities).to(torch.float64)
    if v.ndim != x.ndim + 1 or v.shape[1:] != x.shape:
        raise GalrayError(
            f"velocities of shape {tuple(v.shape)} for positions of shape {tuple(x.shape)}",
            "give m velocities per position, shape (m, *, 3)",
        )
    m = v.shape[0]
    if m < 8:
        raise GalrayError(f"{m} velocities per position", "three unknowns with noise need at least 8")
    v = v.reshape(m, -1, 3).transpose(0, 1)  # (n, m, 3)
    step = max(1, batch_size // m)
    parts = []
    for i in range(0, len(flat), step):
        w = torch.cat([flat[i : i + step, None].expand(-1, m, -1), v[i : i + step]], -1)
        scores = [_score(known, w) for known in (model, partner) if known is not None]
        parts.append(_solve(w[..., 3:], scores, form))
    return torch.cat(parts).reshape(x.shape) if parts else torch.empty_like(x)


def _score(model: Any, w: Tensor) -> Tensor:
    s = model.score(w.reshape(-1, 6))
    return s.detach().to(torch.float64).reshape(w.shape)


def _solve(v: Tensor, scores: list[Tensor], form: Form) -> Tensor:
    """Solve for a: velocities (n, m, 3) and one or two scores (n, m, 6)."""
    streaming = [(v * s[..., :3]).sum(-1, keepdim=True) for s in scores]  # v·sₓ, (n, m, 1)
    m = v.shape[1]
    if form == "plain":
        first, last = scores[0][..., 3:], scores[-1][..., 3:]
        cross = first.mT @ last
        right = first.mT @ streaming[-1] + last.mT @ streaming[0]
        return -torch.linalg.solve(cross + cross.mT, right)[..., 0]
    centred = v - v.mean(1, keepdim=True)
    if form == "stein":
        return (centred.mT @ streaming[0])[..., 0] / (m - 1)
    # Σ⁻¹ multiplies both sides of the instrument's equation, so it drops out at fixed x
    return -torch.linalg.solve(centred.mT @ scores[0][..., 3:], centred.mT @ streaming[0])[..., 0]


class LeastSquaresField(Exportable):
    """`least_squares` as an acceleration field, with the same random velocities on every call.

    Arguments:
        model: As in `least_squares`; it must have ``sample_velocity(x, n, generator)``.
        ball: Any object with ``center`` and ``radius``.
        num_velocities: Velocities at each position.
        form: As in `least_squares`.
        seed: Seed of the velocities.
        batch_size: Phase-space points scored at once.
    """

    def __init__(
        self,
        model: Any,
        ball: Any,
        *,
        num_velocities: int = 2000,
        form: Form = "instrument",
        seed: int = 0,
        batch_size: int = 50_000,
    ) -> None:
        self.model = model
        self.region: Region = as_region(ball)
        self.num_velocities = num_velocities
        self.form: Form = form
        self.seed = seed
        self.batch_size = batch_size

    def acceleration(self, x: Any) -> Tensor:
        """a(x) in (km/s)²/kpc, shape (*, 3)."""
        x = as_positions(x)
        generator = torch.Generator().manual_seed(self.seed)
        parts = [
            least_squares(
                self.model,
                chunk,
                num_velocities=self.num_velocities,
                form=self.form,
                generator=generator,
                batch_size=self.batch_size,
            )
            for chunk in x.reshape(-1, 3).split(max(1, self.batch_size // self.num_velocities))
        ]
        return torch.cat(parts).reshape(x.shape) if parts else torch.empty_like(x)
