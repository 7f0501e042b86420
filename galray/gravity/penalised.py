"""Penalised generalised least squares of one or several sets of moments; the data choose the penalty."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from galray.gravity.splines import Array

__all__ = ["Equations", "Penalty", "Solution", "Unknowns", "Whitener", "solve"]

_RIDGE = 1e-10  # of the mean diagonal: makes coefficients that no star sees finite
_SCATTER_RIDGE = 1e-7  # of the unit diagonal of the scaled scatter matrix
_WEAKEST, _STRONGEST = -9.0, 1.0  # decades of the coarse scan of penalty strengths
_DECADES_BEYOND = 3  # of its minimum, for the rule of one standard error
_ROUNDS = 3


@dataclass(frozen=True)
class Penalty:
    """One quadratic penalty on a part of the unknowns.

    Attributes:
        matrix: Its form, over the unknowns of the part, (part, part).
        part: Where these stand among the free unknowns.
        group: Penalties of one group share their strength.
        strongest: Decade up to which its strength is tried.
    """

    matrix: Array
    part: slice
    group: int
    strongest: float = _STRONGEST


@dataclass(frozen=True)
class Unknowns:
    """What does not depend on the data.

    Attributes:
        reduction: Free unknowns to coefficients, shape (coefficients, free).
        parts: The free unknowns of each function; every one is known up to a constant, fixed by Σ = 0.
        penalties: Quadratic penalties.
        prior: Precision of a Gaussian prior about zero that has a scale of its own, (free,).
    """

    reduction: Array
    parts: tuple[slice, ...]
    penalties: tuple[Penalty, ...]
    prior: Array


class Whitener:
    """Multiplies moments by a root W of the inverse of their scatter, WᵀW = Ω⁻¹.

    Arguments:
        scatter: Covariance of the moments, shape (moments, moments), or its diagonal alone.
        usable: Moments to use, shape (moments,).
    """

    def __init__(self, scatter: Array, usable: NDArray[np.bool_]) -> None:
        self._usable = usable
        diagonal = scatter if scatter.ndim == 1 else np.diag(scatter)
        self._scale = 1.0 / np.sqrt(diagonal[usable])
        self._factor: Array | None = None
        if scatter.ndim == 2:
            correlation = scatter[np.ix_(usable, usable)] * np.outer(self._scale, self._scale)
            correlation[np.diag_indices_from(correlation)] += _SCATTER_RIDGE
            self._factor = linalg.cholesky(correlation, lower=True, check_finite=False, overwrite_a=True)

    def __call__(self, a: Array) -> Array:
        """W a of a vector (moments,) or of the columns of a matrix (moments, k)."""
        scaled = a[self._usable] * (self._scale if a.ndim == 1 else self._scale[:, None])
        if self._factor is None:
            return scaled
        out = linalg.solve_triangular(self._factor, scaled, lower=True, check_finite=False)
        return np.asarray(out, dtype=np.float64)

    def transposed(self, a: Array) -> Array:
        """Wᵀ a of a whitened vector, shape (moments,)."""
        if self._factor is not None:
            a = linalg.solve_triangular(self._factor, a, lower=True, trans="T", check_finite=False)
        out = np.zeros(len(self._usable))
        out[self._usable] = a * self._scale
        return out


@dataclass(frozen=True)
class Equations:
    """The moments of one set of stars, b = A θ up to noise.

    Attributes:
        matrix: A over the coefficients, shape (moments, coefficients).
        vector: b, shape (moments,).
        whitener: Of these moments.
        folds: (A, b) of each fold of the stars, for cross-validation.
    """

    matrix: Array
    vector: Array
    whitener: Whitener
    folds: Sequence[tuple[Array, Array]] = ()


@dataclass(frozen=True)
class Solution:
    """Coefficients and how well they are known.

    Attributes:
        parameters: θ, shape (coefficients,).
        covariance: H⁻¹AᵀΩ⁻¹A H⁻¹, H = AᵀΩ⁻¹A + λP: the scatter of θ from sample to sample.
        posterior: H⁻¹, which holds the squared bias of the penalty too, on average over potentials as
            rough as the penalty expects (Wahba 1983, Nychka 1988).
        penalty: λ per penalty.
        chi2: (b − Aθ)ᵀ Ω⁻¹ (b − Aθ).
        num_moments: Moments used.
        effective_dof: trace(H⁻¹AᵀΩ⁻¹A): the unknowns that the data and not the penalty decide.
        free: The free unknowns, shape (free,).
        hessian: H over the free unknowns.
        design: The whitened A over the free unknowns, shape (moments, free).
    """

    parameters: Array
    covariance: Array
    posterior: Array
    penalty: tuple[float, ...]
    chi2: float
    num_moments: int
    effective_dof: float
    free: Array
    hessian: Array
    design: Array


class _System:
    """Whitened equations with their penalties."""

    def __init__(self, unknowns: Unknowns, equations: Sequence[Equations]) -> None:
        self.unknowns = unknowns
        reduction = unknowns.reduction
        self.design = np.concatenate([e.whitener(e.matrix @ reduction) for e in equations])
        self.target = np.concatenate([e.whitener(e.vector) for e in equations])
        self.gram, self.moment = self.design.T @ self.design, self.design.T @ self.target
        size = len(self.gram)
        self.constant = np.diag(unknowns.prior)
        levels = {}
        for part in unknowns.parts:
            num = part.stop - part.start
            level = np.trace(self.gram[part, part]) / num
            levels[part.start] = level * num
            self.constant[part, part] += level / num + np.eye(num) * level * _RIDGE  # Σ = 0, and the ridge
        self.rough = []
        for penalty in unknowns.penalties:
            scaled = np.zeros((size, size))
            trace = np.trace(penalty.matrix)
            scaled[penalty.part, penalty.part] = penalty.matrix * (levels[penalty.part.start] / trace)
            self.rough.append(scaled)

    def prior(self, strength: Sequence[float]) -> Array:
        out = self.constant.copy()
        for s, r in zip(strength, self.rough, strict=True):
            out += s * r
        return out

    def held_out(self, equations: Sequence[Equations]) -> Callable[[Sequence[float]], np.ndarray]:
        """The misfit of each fold's moments under the solution of the others, shape (folds,)."""
        reduction = self.unknowns.reduction
        parts = []
        for fold in range(len(equations[0].folds)):
            d = np.concatenate([e.whitener(e.folds[fold][0] @ reduction) for e in equations])
            t = np.concatenate([e.whitener(e.folds[fold][1]) for e in equations])
            rest = self.design - d
            # |t − Dθ|² from its quadratic form: the whitened folds need not be kept
            parts.append((rest.T @ rest, rest.T @ (self.target - t), d.T @ d, d.T @ t))

        def scores(strength: Sequence[float]) -> np.ndarray:
            prior = self.prior(strength)
            found = []
            for gram, moment, own, cross in parts:
                low = linalg.cho_factor(gram + prior, lower=True, check_finite=False, overwrite_a=True)
                theta = linalg.cho_solve(low, moment, check_finite=False)
                found.append(float(theta @ own @ theta - 2 * theta @ cross))
            return np.array(found)

        return scores

    def criterion(self, rule: str) -> Callable[[Sequence[float]], float]:
        """Mallows' C_p, or −2 log of the marginal likelihood."""

        def score(strength: Sequence[float]) -> float:
            prior = self.prior(strength)
            low = linalg.cho_factor(self.gram + prior, lower=True, check_finite=False)
            theta = linalg.cho_solve(low, self.moment, check_finite=False)
            chi2 = float(((self.target - self.design @ theta) ** 2).sum())
            if rule == "cp":
                return chi2 + 2 * float(np.trace(linalg.cho_solve(low, self.gram, check_finite=False)))
            return (
                chi2
                + float(theta @ prior @ theta)
                + 2 * float(np.log(np.diag(low[0])).sum())
                - float(np.linalg.slogdet(prior)[1])
            )

        return score


def solve(
    unknowns: Unknowns,
    equations: Sequence[Equations],
    *,
    penalty: str | tuple[float, ...],
    steps: int = 7,
) -> Solution:
    """Minimise Σ_sets (b − Aθ)ᵀΩ⁻¹(b − Aθ) + Σ_d λ_d θᵀP_dθ.

    The strengths are in units in which each penalty has the trace of AᵀΩ⁻¹A over its part, so λ = 1 is as
    much penalty as data.

    Arguments:
        unknowns: Reduction, penalties and prior.
        equations: One set per tracer population.
        penalty: λ (one, or one per penalty), or the rule that chooses it: ``evidence``, ``cp``, ``cv``,
            ``cv_1se``.
        steps: Strengths tried in the coarse scan: what it finds is then refined.
    """
    system = _System(unknowns, equations)
    num = len(unknowns.penalties)
    if isinstance(penalty, str) and penalty.startswith("cv"):
        scores = system.held_out(equations)
        strength = _search(lambda s: float(scores(s).sum()), unknowns.penalties, steps)
        if penalty == "cv_1se":
            strength = _stronger(scores, strength)
    elif isinstance(penalty, str):
        strength = _search(system.criterion(penalty), unknowns.penalties, steps)
    else:
        strength = penalty * num if len(penalty) == 1 else penalty
        if len(strength) != num:
            raise ValueError(f"{len(strength)} penalty strengths for {num} penalties")
    hessian = system.gram + system.prior(strength)
    low = linalg.cho_factor(hessian, lower=True, check_finite=False)
    theta = linalg.cho_solve(low, system.moment, check_finite=False)
    posterior = linalg.cho_solve(low, np.eye(len(theta)), check_finite=False)
    shrink = posterior @ system.gram
    reduction = unknowns.reduction
    return Solution(
        parameters=reduction @ theta,
        covariance=reduction @ (shrink @ posterior) @ reduction.T,
        posterior=reduction @ posterior @ reduction.T,
        penalty=strength,
        chi2=float(((system.target - system.design @ theta) ** 2).sum()),
        num_moments=len(system.target),
        effective_dof=float(np.trace(shrink)),
        free=theta,
        hessian=hessian,
        design=system.design,
    )


def _stronger(scores: Callable[[Sequence[float]], np.ndarray], best: tuple[float, ...]) -> tuple[float, ...]:
    """The strongest common multiple of the best strengths that held-out stars do not tell from the best.

    Cross-validation is flat about its minimum, and its noise lets rough potentials through as often as
    smooth ones: of what is within one standard error the smoothest is taken (Hastie, Tibshirani & Friedman
    2009, §7.10). The error is that of the difference, fold by fold.
    """
    least, chosen = scores(best), best
    for step in range(1, 4 * _DECADES_BEYOND + 1):
        tried = tuple(10.0 ** (0.25 * step) * s for s in best)
        worse = scores(tried) - least
        if worse.sum() > np.sqrt(len(worse)) * worse.std(ddof=1):
            break
        chosen = tried
    return chosen


def _search(
    score: Callable[[Sequence[float]], float], penalties: Sequence[Penalty], steps: int
) -> tuple[float, ...]:
    """Search of log λ: a coarse scan, then steps that shrink, each group of penalties on its own."""
    groups = sorted({p.group for p in penalties})
    top = {p.group: p.strongest for p in penalties}
    seen: dict[tuple[float, ...], float] = {}

    def value(decades: tuple[float, ...]) -> float:
        if decades not in seen:
            by_group = dict(zip(groups, decades, strict=True))
            seen[decades] = score([10.0 ** by_group[p.group] for p in penalties])
        return seen[decades]

    grid = np.linspace(_WEAKEST, _STRONGEST, max(steps, 2))
    width = float(grid[1] - grid[0])
    best = min((tuple([float(g)] * len(groups)) for g in grid), key=value)
    for i, group in enumerate(groups):  # strengths that may go beyond the common scan
        if top[group] > _STRONGEST:
            more = np.arange(best[i], top[group] + 1e-9, width)
            best = min((_replaced(best, {i: float(g)}) for g in more), key=value)
    for _ in range(_ROUNDS):
        if len(groups) <= 2:
            shifts = [
                dict(enumerate(s))
                for s in itertools.product((0.0, -width / 2, width / 2), repeat=len(groups))
            ]
            best = min(
                (_replaced(best, {i: best[i] + s for i, s in shift.items()}) for shift in shifts), key=value
            )
        else:
            for i in range(len(groups)):
                best = min(
                    (_replaced(best, {i: best[i] + s}) for s in (0.0, -width / 2, width / 2)), key=value
                )
        width /= 1.6
    by_group = dict(zip(groups, best, strict=True))
    return tuple(10.0 ** by_group[p.group] for p in penalties)


def _replaced(values: tuple[float, ...], changes: dict[int, float]) -> tuple[float, ...]:
    return tuple(changes.get(i, v) for i, v in enumerate(values))
