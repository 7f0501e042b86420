"""What the stars say about a(x): estimating equations E[z (v·sₓ + a(x)·sᵥ) | x] = 0 and their siblings.

Every form is a set of rows (x, z, slope, streaming), each of which says ⟨z (streaming + slope·a(x))⟩ = 0, so
that one solver serves all of them:

plain       z = −sᵥ, slope = sᵥ, streaming = v·sₓ: the least squares of E[r²], biased towards a = 0 where the
            score is noisy (errors in variables): E[ŝᵥŝᵥᵀ] = E[sᵥsᵥᵀ] + noise.
crossed     the product E[r₁r₂] of the residuals of two models trained on disjoint stars, whose noises are
            independent: z from one, slope and streaming from the other, and the other way round.
instrument  z(x, v) of `galray.gravity.instrument`, which does not contain the score.
stein       E[(v−u) sᵥᵀ] = −1 in place of the velocity score: ½|a|² − a·(v−u)(v·sₓ) is smallest, on average
            over velocities, at the true a (Stein 1981). Linear in the score, so no noise in it biases a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from galray.gravity.instrument import VelocityMoments
from galray.gravity.region import Region
from galray.gravity.splines import Array

__all__ = ["Equations", "Form", "estimating_equations"]

Form = Literal["plain", "instrument", "stein"]


@dataclass(frozen=True)
class Equations:
    """Rows that say ⟨weight z (streaming + slope·a(x))⟩ = 0.

    Attributes:
        x: Positions (m, 3) in kpc.
        z: Instruments (m, 3).
        slope: What multiplies a, (m, 3): ⟨z slopeᵀ⟩ is negative definite.
        streaming: (m,).
        weight: (m,).
        star: Number of the star that each row comes from, (m,): what is held out is held out by star.
    """

    x: Array
    z: Array
    slope: Array
    streaming: Array
    weight: Array
    star: NDArray[np.int64]


def estimating_equations(
    states: Array,
    scores: Array,
    weight: Array,
    form: Form,
    region: Region,
    *,
    partner: Array | None = None,
) -> Equations:
    """The rows of one form.

    Arguments:
        states: (n, 6) in kpc and km/s.
        scores: ∇log f at the states, (n, 6).
        weight: One per star, (n,).
        form: ``plain``, ``instrument`` or ``stein``.
        region: The ball.
        partner: Scores of a model trained on other stars, (n, 6): ``plain`` becomes crossed, the other two,
            which are linear in the score, take the mean of both.
    """
    x, v = states[:, :3], states[:, 3:]
    star = np.arange(len(states))
    if partner is not None and form != "plain":
        scores = (scores + partner) / 2
    streaming = (v * scores[:, :3]).sum(1)
    if form == "instrument":
        z = VelocityMoments(states, region).instrument(states)
        return Equations(x, z, scores[:, 3:], streaming, weight, star)
    if form == "stein":
        moments = VelocityMoments(states, region)
        # Σ⁻¹ = LLᵀ weighs the components; three rows per star make ⟨z slopeᵀ⟩ = −Σ⁻¹ without scatter
        root = np.linalg.cholesky(np.linalg.inv(moments.covariance(x)))
        moved = np.einsum("nij,ni->nj", root, v - moments.mean(x)) * streaming[:, None]
        z = root.transpose(0, 2, 1).reshape(-1, 3)
        return Equations(
            np.repeat(x, 3, 0), z, -z, moved.reshape(-1), np.repeat(weight, 3), np.repeat(star, 3)
        )
    if partner is None:
        return Equations(x, -scores[:, 3:], scores[:, 3:], streaming, weight, star)
    other = (v * partner[:, :3]).sum(1)
    return Equations(
        np.concatenate([x, x]),
        -np.concatenate([scores[:, 3:], partner[:, 3:]]),
        np.concatenate([partner[:, 3:], scores[:, 3:]]),
        np.concatenate([other, streaming]),
        np.concatenate([weight, weight]),
        np.concatenate([star, star]),
    )
