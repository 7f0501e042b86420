"""Can these stars tell a force from a selection? For an isothermal tracer a/σ² and ∇ log ε are one.

The moments of orders 0 to 3 answer, whichever estimator is used then: their noise is the stars' own. Their
matrix A is noisy too, and so much of AᵀΩ⁻¹A is noise that directions of which nothing is known would seem
known; the product of the matrices of different stars, Σ_{i≠j} AᵢᵀΩ⁻¹Aⱼ, has no such bias (as in jackknife
instrumental variables: Angrist, Imbens & Krueger 1999).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import linalg

from galray.errors import GalrayError
from galray.gravity.moment_selection import Degeneracy, ball_lattice, degeneracies
from galray.gravity.moment_settings import MomentsSettings
from galray.gravity.moments import Moments
from galray.gravity.penalised import solve
from galray.gravity.region import as_region
from galray.gravity.splines import Array, to_numpy

__all__ = ["Identifiability", "identifiability"]

_MAX_STARS = 100_000
_BLOCKS = 10
_PENALTY = 1e-2  # on what only roughness could tell
_EXCHANGE = 3.0  # the factor by which the prior's width is changed to see its pull
_SMALL = MomentsSettings(
    num_potential_splines=(5, 7),
    num_test_splines=(6, 9),
    selection="shared",
    num_selection_splines=(5, 7),
)


@dataclass(frozen=True)
class Identifiability:
    """What the posterior of a joint solution by moments says of Φ and log ε.

    Attributes:
        num_stars: Stars that it rests on.
        worst: The direction in which Φ and log ε are hardest to tell apart; None where none is.
        pull: Change of the accelerations, relative to their rms, as the prior of log ε is made three times as
            wide, and of log ε (rms, mean removed).
    """

    num_stars: int
    worst: Degeneracy | None
    pull: tuple[float, float]

    @property
    def uncertainty(self) -> float:
        """How far accelerations, relative to their rms, are left to the prior: worst direction or pull."""
        error = 0.0 if self.worst is None else self.worst.acceleration_error
        return max(error, self.pull[0])

    def degenerate(self, limit: float = 0.5) -> bool:
        """Whether the tracer is isothermal within the noise."""
        return self.uncertainty > limit

    def require(self, limit: float = 0.5) -> None:
        """Refuse a tracer that cannot tell a force from a selection.

        Raises:
            GalrayError: Accelerations are left to the prior by more than `limit`.
        """
        if self.degenerate(limit):
            raise GalrayError(
                f"{self.num_stars:,} stars cannot tell a force from a selection. {self}",
                "add tracers of another velocity dispersion, take more stars, or give ε by a known selection",
            )

    def __str__(self) -> str:
        """Sentences for the report."""
        pull = (
            f"A prior on ε three times as wide changes accelerations by {100 * self.pull[0]:.1f} % and log "
            f"efficiencies by {self.pull[1]:.2g}."
        )
        if self.worst is None:
            return f"Force and selection are told apart in every direction. {pull}"
        start = (
            "The tracer is isothermal within the noise" if self.degenerate() else "The degeneracy is bounded"
        )
        return f"{start}: {self.worst}. {pull}"


def identifiability(
    w: Any, ball: Any, *, amplitude: float = 2.0, settings: MomentsSettings | None = None
) -> Identifiability:
    """Solve for Φ and log ε by moments of orders 0 to 3 and look at the posterior of both.

    The moments' noise is the stars' own, so the posterior says what these stars can tell, whichever
    estimator is used then.

    Arguments:
        w: States (n, 6) in kpc and km/s.
        ball: Their ball.
        amplitude: Standard deviation of log ε beforehand.
        settings: Bases of Φ and log ε; None takes few splines in (R, z), which see large directions alone.

    Raises:
        GalrayError: Too few stars.
    """
    region = as_region(ball)
    stars = to_numpy(w)[:_MAX_STARS]
    settings = (settings or _SMALL).model_copy(update={"selection_amplitude": amplitude})
    moments = Moments(settings, region)
    assert moments.selection_basis is not None
    sums = [moments.sums(stars[i::_BLOCKS]) for i in range(_BLOCKS)]
    (equations,) = moments._equations({"": sums}, 0.0, _BLOCKS)
    unknowns = moments._unknowns(1)
    solution = solve(unknowns, [equations], penalty=(_PENALTY,))
    prior = solution.hessian - solution.design.T @ solution.design
    designs = [equations.whitener(a @ unknowns.reduction) for a, _ in equations.folds]
    targets = [equations.whitener(b) for _, b in equations.folds]
    unbiased = _BLOCKS / (_BLOCKS - 1)
    whole: Array = sum(designs, np.zeros(()))
    gram = unbiased * (whole.T @ whole - sum((d.T @ d for d in designs), np.zeros(())))
    right = unbiased * (whole.T @ sum(targets) - sum(d.T @ t for d, t in zip(designs, targets, strict=True)))
    scale = np.sqrt(np.diag(solution.hessian))
    values, vectors = linalg.eigh(gram / np.outer(scale, scale))
    gram = (vectors * np.clip(values, 0, None)) @ vectors.T * np.outer(scale, scale)
    wider = prior - np.diag(unknowns.prior) * (1 - _EXCHANGE**-2)
    theta = [unknowns.reduction @ linalg.solve(gram + p, right, assume_a="pos") for p in (prior, wider)]
    found = degeneracies(
        unknowns,
        replace(solution, hessian=gram + prior, parameters=theta[0]),
        moments.basis,
        moments.selection_basis,
        region,
    )
    x = ball_lattice(region, 400, 0.8)
    index, gradient = moments.basis.gradient(x)
    a = [np.einsum("njp,np->nj", gradient, t[index]) for t in theta]
    index, values = moments.selection_basis.values(x)
    change = (values * (theta[1] - theta[0])[moments.basis.size + index]).sum(1)
    pull = (
        float(np.sqrt(((a[1] - a[0]) ** 2).mean() / (a[0] ** 2).mean())),
        float((change - change.mean()).std()),
    )
    return Identifiability(len(stars), found[0] if found else None, pull)
