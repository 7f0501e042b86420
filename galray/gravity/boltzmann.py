"""a(x) from the Boltzmann equation by least squares over velocities at fixed position.

With the score s = (sₓ, sᵥ) = ∇log f, stationarity is r(a) = v·sₓ + a·sᵥ = 0 for every v. Three estimating
equations over velocities drawn from p(v|x):

plain       min E[r²]:                     a = −E[sᵥsᵥᵀ]⁻¹ E[sᵥ (v·sₓ)]
stein       E[(v−u) sᵥᵀ] = −1:             a = +E[(v−u) (v·sₓ)]
instrument  E[z r] = 0, z = Σ⁻¹(v−u):      a = −E[z sᵥᵀ]⁻¹ E[z (v·sₓ)]

combined    E[g r] = 0 for z and z/(1 + χ²/3) together, χ² = (v−u)ᵀΣ⁻¹(v−u): six equations for three unknowns,
            weighed by the inverse covariance of their noise, which the difference of two models trained on
            different stars gives (generalised method of moments, Hansen 1982)

u and Σ are the mean and covariance of the velocities at x. The plain form is biased low where sᵥ is noisy
(errors in variables). The instrument is free of that bias, since z does not contain the score, is unmoved
by a score that is too small by a constant factor, and has no scatter when the score is exact; the Stein form
has the scatter of its finite sample. Everything in E[g r] = 0 that needs no score of x is a Stein identity,
E[g sᵥᵀ] = −E[∂g/∂v]: a control variate whose best multiple is the acceleration itself.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.gravity.exports import Exportable
from galray.gravity.region import Region, as_positions, as_region

__all__ = ["LeastSquaresField", "least_squares"]

Form = Literal["instrument", "stein", "plain", "combined"]

_CLIP_ROUNDS = 4  # what is set aside changes the solution by which it is judged


def least_squares(
    model: Any,
    x: Any,
    *,
    velocities: Any = None,
    num_velocities: int = 2000,
    form: Form = "instrument",
    partner: Any = None,
    clip: float | None = None,
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
        form: ``instrument``, ``stein``, ``plain`` or ``combined``.
        partner: A model trained on other stars. ``plain`` then minimises the product of the two models'
            residuals, E[r₁r₂], which has no noise floor; ``combined`` needs it.
        clip: Velocities at which the residual exceeds this many robust standard deviations (1.4826 times
            the median absolute one at the same position) are set aside.
        generator: What the model's ``sample_velocity`` takes as its source of randomness.
        batch_size: Phase-space points scored at once.

    Returns:
        a(x) in (km/s)²/kpc, shape (*, 3), float64.

    Raises:
        GalrayError: Velocities are absent and the model cannot draw them, are of the wrong shape, or too few.
    """
    x = as_positions(x)
    flat = x.reshape(-1, 3)
    if partner is not None and form not in ("plain", "combined"):
        raise GalrayError(
            f"a partner model with form='{form}'", "cross-fitting belongs to form='plain' or 'combined'"
        )
    if partner is None and form == "combined":
        raise GalrayError(
            "form='combined' without a partner model",
            "give partner=..., a model trained on other stars: their difference tells the noise",
        )
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
    moments: list[tuple[Tensor, Tensor]] = []
    for i in range(0, len(flat), step):
        part = v[i : i + step]
        w = torch.cat([flat[i : i + step, None].expand(-1, m, -1), part], -1)
        scores = [_score(known, w) for known in (model, partner) if known is not None]
        keep = torch.ones_like(part[..., :1]) if clip is None else _inliers(part, scores, clip)
        found = _solve(part, scores, "plain" if form == "combined" else form, keep)
        parts.append(found)
        if form == "combined":
            moments.append(_moments(part, scores, keep))
    if not parts:
        return torch.empty_like(x)
    pilot = torch.cat(parts)
    if form == "combined":
        slope, streaming = (torch.cat(p) for p in zip(*moments, strict=True))
        pilot = _weigh(slope, streaming, pilot)
    return pilot.reshape(x.shape)


def _score(model: Any, w: Tensor) -> Tensor:
    s = model.score(w.reshape(-1, 6))
    return s.detach().to(torch.float64).reshape(w.shape)


def _solve(v: Tensor, scores: list[Tensor], form: Form, keep: Tensor) -> Tensor:
    """Solve for a: velocities (n, m, 3), one or two scores (n, m, 6), velocities kept or not (n, m, 1)."""
    streaming = [(v * s[..., :3]).sum(-1, keepdim=True) for s in scores]  # v·sₓ, (n, m, 1)
    if form == "plain":
        first, last = keep * scores[0][..., 3:], keep * scores[-1][..., 3:]
        cross = first.mT @ last
        right = first.mT @ streaming[-1] + last.mT @ streaming[0]
        return -torch.linalg.solve(cross + cross.mT, right)[..., 0]
    count = keep.sum(1, keepdim=True)
    centred = keep * (v - (keep * v).sum(1, keepdim=True) / count)
    if form == "stein":
        return (centred.mT @ streaming[0] / (count - 1))[..., 0]
    # Σ⁻¹ multiplies both sides of the instrument's equation, so it drops out at fixed x
    return -torch.linalg.solve(centred.mT @ scores[0][..., 3:], centred.mT @ streaming[0])[..., 0]


def _inliers(v: Tensor, scores: list[Tensor], clip: float) -> Tensor:
    """1 where the (mean) score's residual lies within `clip` robust standard deviations, else 0: (n, m, 1).

    Judged by the instrument's solution: wild velocity scores pull the plain one through themselves.
    """
    s = torch.stack(scores).mean(0)
    streaming = (v * s[..., :3]).sum(-1)
    keep = torch.ones_like(v[..., :1])
    for _ in range(_CLIP_ROUNDS):
        a = _solve(v, [s], "instrument", keep)
        residual = (streaming + (s[..., 3:] * a[:, None]).sum(-1)).abs()
        typical = 1.4826 * residual.median(1, keepdim=True).values
        keep = (residual <= clip * typical).to(v.dtype)[..., None]
    return keep


def _moments(v: Tensor, scores: list[Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
    """⟨g sᵥᵀ⟩ (n, 2, 6, 3) and ⟨g v·sₓ⟩ (n, 2, 6) of both models, g of whitened velocities."""
    count = keep.sum(1, keepdim=True)
    centred = keep * (v - (keep * v).sum(1, keepdim=True) / count)
    root = torch.linalg.cholesky(centred.mT @ centred / count)
    z = torch.linalg.solve_triangular(root, centred.mT, upper=False).mT
    g = torch.cat([z, z / (1 + z.square().sum(-1, keepdim=True) / 3)], -1) / count
    slope = torch.stack([g.mT @ s[..., 3:] for s in scores], 1)
    streaming = torch.stack([(g.mT @ (v * s[..., :3]).sum(-1, keepdim=True))[..., 0] for s in scores], 1)
    return slope, streaming


def _weigh(slope: Tensor, streaming: Tensor, pilot: Tensor) -> Tensor:
    """Generalised least squares of the moments, their noise from the two models' difference at a pilot a."""
    moments = streaming + (slope @ pilot[:, None, :, None])[..., 0]
    difference = moments[:, 0] - moments[:, 1]
    # one covariance for all positions: whitened velocities make them alike but for a level of their own
    difference = difference / difference.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-300)
    noise = difference.mT @ difference / len(difference)
    level = float(noise.diagonal().mean()) or 1.0  # two models that agree exactly leave equal weights
    noise = noise + 1e-3 * level * torch.eye(len(noise), dtype=noise.dtype)
    left, right = slope.mean(1), streaming.mean(1)
    weighted = torch.linalg.solve(noise, left)
    return -torch.linalg.solve(left.mT @ weighted, weighted.mT @ right[..., None])[..., 0]


class LeastSquaresField(Exportable):
    """`least_squares` as an acceleration field, with the same random velocities on every call.

    Arguments:
        model: As in `least_squares`; it must have ``sample_velocity(x, n, generator)``.
        ball: Any object with ``center`` and ``radius``.
        num_velocities: Velocities at each position.
        form: As in `least_squares`.
        partner: As in `least_squares`.
        clip: As in `least_squares`.
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
        partner: Any = None,
        clip: float | None = None,
        seed: int = 0,
        batch_size: int = 50_000,
    ) -> None:
        self.model = model
        self.region: Region = as_region(ball)
        self.num_velocities = num_velocities
        self.form: Form = form
        self.partner = partner
        self.clip = clip
        self.seed = seed
        self.batch_size = batch_size

    def acceleration(self, x: Any) -> Tensor:
        """a(x) in (km/s)²/kpc, shape (*, 3)."""
        x = as_positions(x)
        generator = torch.Generator().manual_seed(self.seed)
        # the weights of ``combined`` are one covariance of all positions, so these stay together
        together = (
            self.batch_size // self.num_velocities if self.form != "combined" else len(x.reshape(-1, 3))
        )
        parts = [
            least_squares(
                self.model,
                chunk,
                num_velocities=self.num_velocities,
                form=self.form,
                partner=self.partner,
                clip=self.clip,
                generator=generator,
                batch_size=self.batch_size,
            )
            for chunk in x.reshape(-1, 3).split(max(1, together))
        ]
        return torch.cat(parts).reshape(x.shape) if parts else torch.empty_like(x)
