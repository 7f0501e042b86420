"""Do error bars hold what they claim? Coverage, bias, pull width, and the factor that would mend them.

A measurement claims that truth − value, in units of its scale, follows Student's t with the degrees of
freedom of its error budget. What is judged is the probability integral transform u of the truth under that
claim, uniform from 0 to 1 where the claim is right, and the pull z = Φ⁻¹(u), a unit normal there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galray.ensemble import student_factor

__all__ = ["LEVELS", "Claims", "Coverage", "coverage", "fit_inflation"]

Array = NDArray[np.float64]

LEVELS = (0.50, 0.68, 0.90, 0.95)
"""The bands that are judged."""
_RESAMPLES = 400
_TINY = 1e-12


@dataclass(frozen=True)
class Claims:
    """What measurements of one quantity claimed, and the truth.

    Arguments:
        value: Measured values (n,).
        error: Their one-sigma errors (n,), which hold 68.3 %.
        truth: True values (n,).
        dof: Degrees of freedom of the errors (n,); infinite for Gaussian ones.
        mock: Number of the mock galaxy of each row (n,): rows of one galaxy are not independent.
    """

    value: Array
    error: Array
    truth: Array
    dof: Array
    mock: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Claims:
        return Claims(*(getattr(self, name)[rows] for name in ("value", "error", "truth", "dof", "mock")))

    def inflated(self, factor: float) -> Claims:
        """The same with every error multiplied."""
        return Claims(self.value, self.error * factor, self.truth, self.dof, self.mock)

    @property
    def standardised(self) -> Array:
        """(truth − value) / scale of Student's t, (n,)."""
        return (self.truth - self.value) * student_factor(self.dof) / self.error

    @property
    def pit(self) -> Array:
        """The transform u (n,): the claimed probability that the quantity lies below its truth."""
        from scipy.special import ndtr, stdtr

        t, finite = self.standardised, np.isfinite(self.dof)
        return np.where(finite, stdtr(np.where(finite, self.dof, 1.0), t), ndtr(t))

    @property
    def pulls(self) -> Array:
        """The normal pulls z = −Φ⁻¹(u) (n,): positive where the value is too large."""
        from scipy.special import ndtri

        return -ndtri(np.clip(self.pit, _TINY, 1 - _TINY))

    def factors(self, level: float) -> Array:
        """By how much each error must grow for its band of this level just to hold the truth, (n,)."""
        from scipy.special import ndtri, stdtrit

        upper, finite = 0.5 * (1 + level), np.isfinite(self.dof)
        reach = np.where(finite, stdtrit(np.where(finite, self.dof, 1.0), upper), ndtri(upper))
        return np.abs(self.standardised) / reach


@dataclass(frozen=True)
class Coverage:
    """How well claims hold.

    Attributes:
        number: Measurements.
        fractions: Part of them whose band held the truth, for each of `LEVELS`.
        errors: Binomial standard errors of those, at the nominal level.
        bias: Mean of value − truth.
        bias_error: Its standard error.
        mean_pull: Mean of z.
        width: Standard deviation of z.
        width_error: Its standard error, for normal z.
    """

    number: int
    fractions: tuple[float, ...]
    errors: tuple[float, ...]
    bias: float
    bias_error: float
    mean_pull: float
    width: float
    width_error: float


def coverage(claims: Claims) -> Coverage:
    """Judge the claims of one quantity, one per mock galaxy.

    Raises:
        ValueError: There are fewer than two.
    """
    number = len(claims)
    if number < 2:
        raise ValueError(f"coverage of {number} measurements")
    held = np.abs(claims.pit - 0.5)
    shift, pulls = claims.value - claims.truth, claims.pulls
    return Coverage(
        number,
        tuple(float(np.mean(held <= 0.5 * level)) for level in LEVELS),
        tuple(float(np.sqrt(level * (1 - level) / number)) for level in LEVELS),
        float(shift.mean()),
        float(shift.std(ddof=1) / np.sqrt(number)),
        float(pulls.mean()),
        float(pulls.std(ddof=1)),
        float(pulls.std(ddof=1) / np.sqrt(2 * (number - 1))),
    )


def fit_inflation(claims: Claims, seed: int = 0) -> tuple[float, float]:
    """The factor on errors with which their bands hold what they claim, and its standard error.

    For each of `LEVELS` it is that quantile of the factors that the single measurements would need; their
    mean over the levels uses the centre and the tails alike, and no outlier rules it.

    Arguments:
        claims: Of one quantity or several of a kind, pooled.
        seed: Of the bootstrap over mock galaxies that gives the standard error.
    """
    needed = np.array([claims.factors(level) for level in LEVELS])
    galaxies, place = np.unique(claims.mock, return_inverse=True)
    rows = [np.flatnonzero(place == i) for i in range(len(galaxies))]
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(_RESAMPLES):
        chosen = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        resampled.append(_quantiles(needed[:, chosen]))
    return _quantiles(needed), float(np.std(resampled, ddof=1))


def _quantiles(needed: Array, levels: Sequence[float] = LEVELS) -> float:
    return float(np.mean([np.quantile(row, level) for row, level in zip(needed, levels, strict=True)]))
