"""The error budget: members of one family to a value with its terms, methods to a combined value.

The terms of a family are network (another seed), statistics (other stars: bootstrap or jackknife) and
measurement (redrawn errors). Bootstraps and redraws share the base's seed and are compared with it, so
that no term holds another's variance.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galray.ensemble.members import BudgetSettings, MemberSpec
from galray.ensemble.variance import (
    correlation,
    effective_number,
    moderate,
    shrink_correlation,
    student_factor,
    welch_satterthwaite,
)
from galray.errors import GalrayError

__all__ = ["Estimate", "Term", "combine_family", "combine_methods"]

logger = logging.getLogger(__name__)
Array = NDArray[np.float64]

_TINY = 1e-300
_TERM_WEIGHT = 6.0
"""Deviations that a term needs before its own correlations outweigh those of all terms together."""

_STEADY_DOF = 8.0
"""Degrees of freedom that smooth the variances by which methods are weighed."""


@dataclass(frozen=True)
class Term:
    """One term of a budget.

    Arguments:
        covariance: Best estimate `(Q, Q)`, without allowance for the small number of members.
        count: Members or blocks it was estimated from.
        dof: Degrees of freedom of its variances `(Q,)`; infinite for a term taken from elsewhere.
    """

    covariance: Array
    count: int
    dof: Array

    @property
    def variance(self) -> Array:
        """Variances `(Q,)`."""
        return np.diag(self.covariance).copy()


@dataclass(frozen=True)
class Estimate:
    """Values with their error budget.

    Errors are one-sigma bands that hold 68 %: the sum of the terms, widened by Student's t where few
    members stand behind them. The same factor is shared by all terms of a quantity, so that the terms'
    squares add up to the total's.

    Arguments:
        method: Family, or "combined".
        value: Values `(Q,)`.
        terms: The terms by name.
        bias: Shift under redrawn measurement errors `(Q,)`: an estimate of how far the values are off
            because the stars are measured with error; None without redraws. Already subtracted if
            `bias_corrected`.
        bias_corrected: Whether the bias was subtracted from the values.
        missing: Terms that could not be estimated for want of members.
        excluded: Members left out, with the reason, by member name.
        weights: Weights of the methods `(M, Q)` of a combined estimate.
        methods: Names that go with the weights.
    """

    method: str
    value: Array
    terms: dict[str, Term]
    bias: Array | None = None
    bias_corrected: bool = False
    missing: tuple[str, ...] = ()
    excluded: dict[str, str] = field(default_factory=dict)
    weights: Array | None = None
    methods: tuple[str, ...] = ()

    @property
    def dof(self) -> Array:
        """Effective degrees of freedom of the total variances `(Q,)`."""
        if not self.terms:
            return np.full(len(self.value), np.inf)
        terms = list(self.terms.values())
        return welch_satterthwaite([t.variance for t in terms], [t.dof for t in terms])

    @property
    def factor(self) -> Array:
        """Widening of each quantity's band for the small number of members `(Q,)`."""
        return student_factor(self.dof)

    @property
    def covariance(self) -> Array:
        """Total covariance `(Q, Q)`, widened."""
        total = np.zeros((len(self.value), len(self.value)))
        for term in self.terms.values():
            total += term.covariance
        return total * np.outer(self.factor, self.factor)

    @property
    def error(self) -> Array:
        """Total errors `(Q,)`."""
        return np.sqrt(np.diag(self.covariance))

    def term_error(self, name: str) -> Array:
        """Give one term's errors `(Q,)`, widened like the total."""
        return np.sqrt(self.terms[name].variance) * self.factor

    def with_term(self, name: str, covariance: Array, count: int = 1, dof: float = np.inf) -> Estimate:
        """Add a term from elsewhere, such as the baryons' error.

        Arguments:
            name: Its name.
            covariance: Covariance `(Q, Q)`, or variances `(Q,)`.
            count: Draws behind it.
            dof: Degrees of freedom of its variances.
        """
        covariance = np.asarray(covariance, dtype=float)
        if covariance.ndim == 1:
            covariance = np.diag(covariance)
        term = Term(covariance, count, np.full(len(self.value), float(dof)))
        return replace(self, terms=self.terms | {name: term})

    def transform(self, matrix: Array) -> Estimate:
        """Give linear combinations of the quantities (averages, differences) with their budget.

        Arguments:
            matrix: Coefficients `(P, Q)`.
        """
        matrix = np.atleast_2d(np.asarray(matrix, dtype=float))
        share = np.abs(matrix)
        terms = {}
        for name, term in self.terms.items():
            # The band of an average rests on its parts' variances: their dof, weighted by what they add.
            part = share**2 * term.variance + _TINY
            inverse = (part / term.dof).sum(axis=1) / part.sum(axis=1)
            with np.errstate(divide="ignore"):
                dof = 1.0 / inverse
            terms[name] = Term(matrix @ term.covariance @ matrix.T, term.count, dof)
        bias = None if self.bias is None else matrix @ self.bias
        return replace(self, value=matrix @ self.value, terms=terms, bias=bias, weights=None)

    def rows(self, names: Sequence[str], units: Sequence[str]) -> list[dict[str, Any]]:
        """Give the budget as table rows: quantity, method, term, value, count, dof, bias, unit.

        Arguments:
            names: Names of the quantities, Q of them.
            units: Their units.
        """
        rows: list[dict[str, Any]] = []
        for q, (name, unit) in enumerate(zip(names, units, strict=True)):
            common: dict[str, Any] = {"quantity": name, "method": self.method, "unit": unit}
            for term_name, term in self.terms.items():
                bias = self.bias[q] if term_name == "measurement" and self.bias is not None else None
                rows.append(
                    common
                    | {
                        "term": term_name,
                        "value": float(self.term_error(term_name)[q]),
                        "count": term.count,
                        "dof": float(term.dof[q]) if np.isfinite(term.dof[q]) else None,
                        "bias": None if bias is None else float(bias),
                    }
                )
            dof = self.dof[q]
            rows.append(
                common
                | {
                    "term": "total",
                    "value": float(self.error[q]),
                    "count": max((term.count for term in self.terms.values()), default=0),
                    "dof": float(dof) if np.isfinite(dof) else None,
                    "bias": None,
                }
            )
        return rows


def combine_family(
    specs: Sequence[MemberSpec],
    values: Array,
    *,
    groups: Sequence[str] | None = None,
    scales: Array | None = None,
    jackknife: Array | None = None,
    jackknife_blocks: int = 0,
    settings: BudgetSettings | None = None,
) -> Estimate:
    """Combine the members of one family into values with an error budget.

    The value is the mean over the seeds. Network: the seeds' variance divided by their number.
    Statistics: mean square of (bootstrap − its twin of the same seed), or the jackknife covariance.
    Measurement: variance of (redraw − twin); the mean of the same differences is the bias, which is
    either subtracted to first order (its uncertainty added) or, where it exceeds its own noise, kept in
    the term. Error draws that are independent from star to star are part of what a bootstrap sees, so
    the statistics term is given without them.

    Arguments:
        specs: The finished members, any order.
        values: Their results `(n, Q)`, in the specs' order; the caller evaluates members at the same
            positions and differentiates inside each.
        groups: Kind of each quantity, such as "a_z" (Q of them): variances are pooled inside a kind.
        scales: Natural scale of each quantity `(Q,)`, such as an expected error; from the members'
            own scatter when absent.
        jackknife: Covariance `(Q, Q)` of the statistics, in place of bootstraps.
        jackknife_blocks: Number of its blocks.
        settings: How to combine.

    Returns:
        The estimate.

    Raises:
        GalrayError: No seed member is left, or a quantity is not finite in any member.
    """
    settings = settings or BudgetSettings()
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or len(values) != len(specs):
        raise ValueError(f"values must have shape ({len(specs)}, Q), not {values.shape}")
    family = specs[0].family if specs else "?"
    if len({spec.family for spec in specs}) > 1:
        raise ValueError("members of different families; combine each family by itself, then the methods")
    specs, values, excluded = _sound_members(specs, values, settings)
    seeds = {s.seed: v for s, v in zip(specs, values, strict=True) if not s.bootstrap and not s.draw}
    if not seeds:
        raise GalrayError(
            f"no member of {family} with the full sample is left to give a value",
            "look at the members' error.txt, or train more seeds",
        )
    quantities = values.shape[1]
    labels = _group_numbers(groups, quantities)
    runs = np.array(list(seeds.values()))
    num_seeds = len(runs)
    value = runs.mean(axis=0)

    # Deviations of each term, each row scaled so that its mean square is the term's variance.
    network = (runs - value) * np.sqrt(num_seeds / max(num_seeds - 1, 1))
    boots, boots_alone = _differences(specs, values, seeds, value, "bootstrap")
    draws, draws_alone = _differences(specs, values, seeds, value, "draw")
    num_boots, num_draws = len(boots), len(draws)
    shift = draws.mean(axis=0) if num_draws else None
    centred = draws  # of a single redraw the square holds shift and spread together
    if shift is not None and num_draws > 1:
        centred = (draws - shift) * np.sqrt(num_draws / (num_draws - 1))

    parts = [
        (d, n) for d, n in ((network, num_seeds - 1), (boots, num_boots), (centred, max(num_draws - 1, 1)))
    ]
    parts = [(d, n) for d, n in parts if len(d) and n > 0]
    pool = _Pool(parts, labels, scales, settings, quantities)

    terms: dict[str, Term] = {}
    missing: list[str] = []
    single = np.zeros(quantities)  # network variance of one member
    if num_seeds > 1:
        single, dof = pool.variance(network, num_seeds - 1)
        terms["network"] = Term(pool.covariance(network, single / num_seeds), num_seeds, dof)
    elif family != "moments":
        missing.append("network")

    # What of the training noise is left in a difference: of twins as far as a shared seed does not share
    # it; of a member without its twin, which is compared with the seeds' mean, all of it.
    of_twins = 2.0 * (1.0 - settings.seed_correlation)
    boots_noise = single * (of_twins * (1.0 - boots_alone) + boots_alone * (1.0 + 1.0 / num_seeds))
    draws_noise = single * (of_twins * (1.0 - draws_alone) + draws_alone * (1.0 + 1.0 / num_seeds))
    if jackknife is not None:
        stat_correlation = shrink_correlation(np.asarray(jackknife, dtype=float))
        stat = np.diag(jackknife).astype(float)
        stat_dof = np.full(quantities, float(max(jackknife_blocks - 1, 1)))
        count = jackknife_blocks
    elif num_boots:
        stat, stat_dof = pool.variance(boots, num_boots)
        stat = np.maximum(stat - boots_noise, 0.05 * stat)
        stat_correlation = pool.correlation(boots)
        count = num_boots
    else:
        stat, count = np.zeros(quantities), 0
        missing.append("statistics")

    spread = np.zeros(quantities)
    if shift is not None:
        spread, dof = pool.variance(centred, max(num_draws - 1, 1))
        spread = np.maximum(spread - draws_noise, 0.05 * spread)
        measured = pool.covariance(centred, spread)
        if settings.correct_measurement_bias:
            value = value - shift
            measured = measured * (1.0 + 1.0 / num_draws) if num_draws > 1 else measured
        elif num_draws > 1:
            # The shift is one and the same cause everywhere: fully correlated between quantities. With
            # one redraw, spread and shift cannot be told apart and its square already holds both.
            excess = np.sign(shift) * np.sqrt(np.maximum(shift**2 - spread / num_draws, 0.0))
            measured = measured + np.outer(excess, excess)
        terms["measurement"] = Term(measured, num_draws, dof)
    elif settings.expect_measurement:
        missing.append("measurement")

    if count:
        if settings.measurement_within_statistics:
            stat = np.maximum(stat - spread, 0.0)
        sigma = np.sqrt(stat)
        terms["statistics"] = Term(stat_correlation * np.outer(sigma, sigma), count, stat_dof)
    order = [name for name in ("network", "statistics", "measurement") if name in terms]
    return Estimate(
        method=family,
        value=value,
        terms={name: terms[name] for name in order},
        bias=shift,
        bias_corrected=bool(shift is not None and settings.correct_measurement_bias),
        missing=tuple(missing),
        excluded=excluded,
    )


def combine_methods(
    estimates: Sequence[Estimate],
    *,
    groups: Sequence[str] | None = None,
    settings: BudgetSettings | None = None,
) -> Estimate:
    """Combine methods that measured the same quantities from the same stars, with random effects.

    Network errors of different methods are independent; every other term is taken as fully correlated
    between them, because the stars are the same, so averaging does not reduce it. What the methods
    differ by beyond their network errors is the variance between methods, τ² (by moments, as in
    DerSimonian & Laird 1986, Control. Clin. Trials 7, 177, pooled over similar quantities), and enters as
    the term "method". Weights go as the inverse of each method's whole variance, floored at half the
    median and capped, so that no accidentally small variance takes everything.

    Arguments:
        estimates: One per method, same Q quantities.
        groups: Kind of each quantity, as in `combine_family`.
        settings: How to combine.

    Returns:
        The combined estimate; with a single method, its own under the name "combined".
    """
    settings = settings or BudgetSettings()
    if not estimates:
        raise GalrayError("there is no method to combine", "run at least one of flow, score and moments")
    if len(estimates) == 1:
        only = estimates[0]
        return replace(
            only,
            method="combined",
            weights=np.ones((1, len(only.value))),
            methods=(only.method,),
            missing=tuple(dict.fromkeys((*only.missing, "method"))),
        )
    values = np.array([estimate.value for estimate in estimates])
    methods, quantities = values.shape
    labels = _group_numbers(groups, quantities)
    zero = np.zeros((methods, quantities))
    network, network_dof = _stack(estimates, "network", zero)
    common = list(dict.fromkeys(n for e in estimates for n in e.terms if n != "network"))
    shared = {name: _stack(estimates, name, zero)[0] for name in common}
    whole = network + sum(shared.values(), zero)

    # Between-method variance from equal weights at first: it must not depend on accidental ones.
    scale = np.sqrt(np.maximum(whole.mean(axis=0), _TINY))
    independent = np.mean(
        [effective_number(_root(e.terms, quantities) / scale, labels) for e in estimates], axis=0
    )
    raw = values.var(axis=0, ddof=1) - network.mean(axis=0)
    between, between_dof = moderate(raw, methods - 1, scale, labels, independent, settings.prior_dof)
    between = np.maximum(between, 0.0)

    variance = np.maximum(_steady(whole, np.array([e.dof for e in estimates]), labels) + between, _TINY)
    variance = np.maximum(variance, 0.5 * np.median(variance, axis=0))
    weights = _cap(1.0 / variance, max(settings.max_weight, 1.0 / methods))

    value = np.sum(weights * values, axis=0)
    terms: dict[str, Term] = {}
    if any("network" in e.terms for e in estimates):
        matrix = np.zeros((quantities, quantities))
        for weight, estimate in zip(weights, estimates, strict=True):
            if "network" in estimate.terms:
                matrix += np.outer(weight, weight) * estimate.terms["network"].covariance
        dof = welch_satterthwaite(list(weights**2 * network), list(network_dof))
        count = sum(e.terms["network"].count for e in estimates if "network" in e.terms)
        terms["network"] = Term(matrix, count, dof)
    for name in common:
        terms[name] = _shared_term(estimates, name, weights)
    root = [_root(e.terms, quantities) for e in estimates]
    typical = shrink_correlation(np.mean([shrink_correlation(r.T @ r) for r in root], axis=0))
    sigma = np.sqrt(between * np.sum(weights**2, axis=0))
    terms["method"] = Term(typical * np.outer(sigma, sigma), methods, between_dof)
    shifts = [e.bias for e in estimates]
    known = [shift for shift in shifts if shift is not None]
    bias = np.sum(weights * np.array(known), axis=0) if len(known) == methods else None
    return Estimate(
        method="combined",
        value=value,
        terms=terms,
        bias=bias,
        bias_corrected=all(e.bias_corrected for e in estimates),
        missing=tuple(dict.fromkeys(name for e in estimates for name in e.missing)),
        excluded={name: reason for e in estimates for name, reason in e.excluded.items()},
        weights=weights,
        methods=tuple(e.method for e in estimates),
    )


class _Pool:
    """What all deviations of a family say together: scales, independence, correlations."""

    def __init__(
        self,
        parts: list[tuple[Array, int]],
        labels: NDArray[np.int64],
        scales: Array | None,
        settings: BudgetSettings,
        quantities: int,
    ) -> None:
        self._labels = labels
        self._prior_dof = settings.prior_dof
        total = sum(number for _, number in parts)
        mean_square = np.zeros(quantities)
        for deviations, number in parts:
            mean_square += number * np.mean(deviations**2, axis=0) / total
        own = np.sqrt(mean_square)
        if scales is None:
            floor = 1e-6 * own.max() if own.size and own.max() > 0 else 1.0
            self._scale = np.maximum(own, floor)
        else:
            self._scale = np.asarray(scales, dtype=float)
            if self._scale.shape != (quantities,) or not np.all(self._scale > 0):
                raise ValueError(f"scales must be {quantities} positive numbers")
        # Each term to unit size first, or the largest term alone would set the correlations.
        rows = [self._unit(deviations) for deviations, _ in parts]
        stacked = np.concatenate(rows) if rows else np.zeros((0, quantities))
        self._independent = effective_number(stacked, labels) if rows else np.ones(quantities)
        self._correlation = correlation(stacked, labels)

    def _unit(self, deviations: Array) -> Array:
        scaled = deviations / self._scale
        size = np.sqrt(np.mean(scaled**2))
        return scaled / size if size > 0 else scaled

    def variance(self, deviations: Array, dof: int) -> tuple[Array, Array]:
        """Moderated variances of a term and their degrees of freedom."""
        square = np.mean(deviations**2, axis=0)
        return moderate(square, dof, self._scale, self._labels, self._independent, self._prior_dof)

    def correlation(self, deviations: Array) -> Array:
        """Correlations of a term: its own and the family's, by their numbers."""
        number = len(deviations)
        unit = self._unit(deviations)
        norm = np.sqrt(np.mean(unit**2, axis=0))
        unit = unit / np.where(norm > 0, norm, 1.0)
        own = unit.T @ unit / number
        mixed = (number * own + _TERM_WEIGHT * self._correlation) / (number + _TERM_WEIGHT)
        return shrink_correlation(mixed, 0.0)

    def covariance(self, deviations: Array, variance: Array) -> Array:
        """Covariance with given variances and the term's correlations."""
        sigma = np.sqrt(variance)
        return self.correlation(deviations) * np.outer(sigma, sigma)


def _sound_members(
    specs: Sequence[MemberSpec], values: Array, settings: BudgetSettings
) -> tuple[list[MemberSpec], Array, dict[str, str]]:
    """Leave out members that are not finite, or that lie far from all others by the stated rule."""
    finite = np.isfinite(values)
    broken = ~finite.any(axis=0)
    if len(values) and broken.any():
        raise GalrayError(
            f"quantity {int(np.flatnonzero(broken)[0])} is not finite in any of {len(values)} members",
            "evaluate inside the region that the stars cover",
        )
    excluded = {
        spec.name: f"{int((~row).sum())} of {len(row)} quantities are not finite"
        for spec, row in zip(specs, finite, strict=True)
        if not row.all()
    }
    keep = [i for i, spec in enumerate(specs) if spec.name not in excluded]
    if len(keep) >= 5:
        rest = values[keep]
        centre = np.median(rest, axis=0)
        scatter = 1.4826 * np.median(np.abs(rest - centre), axis=0)
        distance = np.median(np.abs(rest - centre) / np.maximum(scatter, _TINY), axis=1)
        for place, far in zip(list(keep), distance, strict=True):
            if far > settings.outlier_threshold:
                excluded[specs[place].name] = (
                    f"typically {far:.0f} robust standard deviations from the other members "
                    f"(limit {settings.outlier_threshold:g})"
                )
                keep.remove(place)
    for name, reason in excluded.items():
        logger.warning("member %s is left out: %s", name, reason)
    return [specs[i] for i in keep], values[keep], excluded


def _differences(
    specs: Sequence[MemberSpec], values: Array, seeds: Mapping[int, Array], mean: Array, what: str
) -> tuple[Array, float]:
    """Differences of the members that vary one thing from their twins, and the part without a twin."""
    other = "draw" if what == "bootstrap" else "bootstrap"
    rows, alone = [], 0
    for spec, row in zip(specs, values, strict=True):
        if getattr(spec, what) and not getattr(spec, other):
            alone += spec.seed not in seeds
            rows.append(row - seeds.get(spec.seed, mean))
    return np.array(rows).reshape(len(rows), values.shape[1]), alone / max(len(rows), 1)


def _group_numbers(groups: Sequence[str] | None, quantities: int) -> NDArray[np.int64]:
    if groups is None:
        return np.zeros(quantities, dtype=np.int64)
    if len(groups) != quantities:
        raise ValueError(f"{len(groups)} groups for {quantities} quantities")
    return np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)


def _stack(estimates: Sequence[Estimate], name: str, zero: Array) -> tuple[Array, Array]:
    """Variances and dof of one term `(M, Q)`; zero and infinite where a method has none."""
    variances, dofs = zero.copy(), np.full(zero.shape, np.inf)
    for place, estimate in enumerate(estimates):
        if name in estimate.terms:
            variances[place] = estimate.terms[name].variance
            dofs[place] = estimate.terms[name].dof
    return variances, dofs


def _shared_term(estimates: Sequence[Estimate], name: str, weights: Array) -> Term:
    """A term that all methods have in common, so that averaging does not reduce it: Σ wₘ sₘ².

    A method that has no estimate of the term is given the mean of the others'.
    """
    have = [e.terms[name] for e in estimates if name in e.terms]
    mean = np.mean([term.variance for term in have], axis=0)
    total, spread = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for weight, estimate in zip(weights, estimates, strict=True):
        term = estimate.terms.get(name)
        part = weight * (term.variance if term is not None else mean)
        total += part
        if term is not None:
            spread += part**2 / np.maximum(term.dof, 1.0)
    dof = np.where(spread > 0, total**2 / np.where(spread > 0, spread, 1.0), np.inf)
    sigma = np.sqrt(total)
    matrix = np.mean([shrink_correlation(term.covariance, 0.0) for term in have], axis=0)
    return Term(shrink_correlation(matrix) * np.outer(sigma, sigma), sum(t.count for t in have), dof)


def _steady(variance: Array, dof: Array, labels: NDArray[np.int64]) -> Array:
    """Variances `(M, Q)` to weigh methods by, with the accidents of few members smoothed out.

    Weights that follow the noise of a variance prefer the values whose error is underestimated; so each
    method's variance, relative to the methods' mean, is drawn towards its mean over similar quantities.
    """
    typical = np.maximum(variance.mean(axis=0), _TINY)
    relative = variance / typical
    steady = relative.copy()
    for group in np.unique(labels):
        mask = labels == group
        known = np.minimum(dof[:, mask], 1e6)
        pooled = relative[:, mask].mean(axis=1, keepdims=True)
        steady[:, mask] = (known * relative[:, mask] + _STEADY_DOF * pooled) / (known + _STEADY_DOF)
    # And towards each other: a method of few members may not claim to be much better than the rest.
    few = np.minimum(dof, 1e6)
    return typical * (few * steady + _STEADY_DOF) / (few + _STEADY_DOF)


def _root(terms: Mapping[str, Term], quantities: int) -> Array:
    """A square root of an estimate's whole covariance, as rows of deviations `(Q, Q)`."""
    total = np.zeros((quantities, quantities))
    for term in terms.values():
        total += term.covariance
    eigenvalues, vectors = np.linalg.eigh(total)
    return (vectors * np.sqrt(np.clip(eigenvalues, 0.0, None))).T * np.sqrt(quantities)


def _cap(weights: Array, largest: float) -> Array:
    """Normalise weights `(M, Q)` over the methods with none above `largest`."""
    weights = weights / weights.sum(axis=0)
    for _ in range(len(weights)):
        over = weights > largest
        if not over.any():
            break
        capped = np.where(over, largest, weights)
        free = np.where(over, 0.0, weights)
        room = 1.0 - np.where(over, capped, 0.0).sum(axis=0)
        weights = np.where(over, largest, free * room / np.maximum(free.sum(axis=0), _TINY))
    return weights / weights.sum(axis=0)
