"""The angular velocity of the frame in which the stars are stationary, from their moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from galray.gravity.penalised import Equations, Solution
from galray.gravity.splines import Array

__all__ = ["PatternSpeed", "pattern_speed"]

_SIGNIFICANT = 4.0


@dataclass(frozen=True)
class PatternSpeed:
    """Ω about the Galactic z axis.

    Attributes:
        value: Ω in km/s/kpc, positive along Galactic rotation (from y towards x in galray's frame). NaN where
            it cannot be known.
        error: Standard error by jackknife over the blocks; infinite where Ω cannot be known.
        significance: By how many standard deviations the stars' departure from axial symmetry, as far as
            the moments see it, exceeds what an axially symmetric galaxy would show by chance.
        known: Whether that is significant. On axially symmetric stars every Ω is as good as any other.
        response: Change of the free unknowns of the solution with Ω, shape (free,).
    """

    value: float
    error: float
    significance: float
    known: bool
    response: Array

    def __str__(self) -> str:
        if self.known:
            return f"pattern speed {self.value:.2f} +- {self.error:.2f} km/s/kpc"
        return (
            "pattern speed: cannot be known, because the stars are axially symmetric as far as they tell "
            f"({self.significance:.1f} sigma from it)"
        )


def pattern_speed(
    blocks: Sequence[Sequence[tuple[Array, Array, Array]]],
    equations: Sequence[Equations],
    solution: Solution,
    *,
    start: float = 0.0,
) -> PatternSpeed:
    """Ω = Σ_{i≠j} c_iᵀ P b_j / Σ_{i≠j} c_iᵀ P c_j over pairs of different blocks of stars.

    c = Σ ∂g/∂φ is the column of Ω and P = I − A H⁻¹Aᵀ, whitened, leaves what the potential cannot take up.
    Products of different blocks have independent noise: the noise of c, all of it where the stars are axially
    symmetric, neither dilutes Ω nor passes for a departure from symmetry.

    Arguments:
        blocks: (A, b, c) of each block of stars of each population, with `start` taken out of b.
        equations: The populations' equations, `start` taken out.
        solution: Their solution.
        start: Ω that the equations hold already.
    """
    spins, residuals = [], []
    before = 0
    for parts, e in zip(blocks, equations, strict=True):
        whole = e.whitener(e.matrix @ solution.parameters) / len(parts)
        width = len(whole)
        for matrix, vector, spin in parts:
            # the mean prediction stands in for the block's own, whose noise says nothing of Ω
            own = np.zeros((2, len(solution.design)))
            own[0, before : before + width] = e.whitener(spin)
            own[1, before : before + width] = e.whitener(vector - matrix @ solution.parameters) + whole
            spins.append(own[0])
            residuals.append(own[1])
        before += width
    c, b = np.array(spins), np.array(residuals)
    left, right = c @ solution.design, b @ solution.design
    taken = np.linalg.solve(solution.hessian, np.concatenate([left, right]).T).T
    num = len(c)
    overlap = c @ c.T - left @ taken[:num].T
    product = c @ b.T - left @ taken[num:].T
    np.fill_diagonal(overlap, 0.0)
    np.fill_diagonal(product, 0.0)
    response = -taken[:num].sum(0)
    chance = float(np.sqrt(2 * (overlap**2).sum()))
    significance = float(overlap.sum()) / chance if chance > 0 else 0.0
    if not significance > _SIGNIFICANT:
        return PatternSpeed(float("nan"), float("inf"), significance, False, response)
    value = float(product.sum() / overlap.sum())
    without = [
        (product.sum() - product[i].sum() - product[:, i].sum())
        / (overlap.sum() - overlap[i].sum() - overlap[:, i].sum())
        for i in range(num)
    ]
    error = float(np.sqrt((num - 1) / num * ((without - np.mean(without)) ** 2).sum()))
    return PatternSpeed(start + value, error, significance, True, response)
