"""The error budget of one family: its members to a value with its terms.

The terms of a family are network (another seed), hyperparameters, statistics (other stars: bootstrap or
jackknife), measurement (redrawn errors), systematics (errors common to all stars) and selection. Whoever
varies one of them shares the base's seed and is compared with it, so that no term holds another's variance;
in a crossed design the same comparison is made at every choice of the rest, whose scatter tells what training
adds to each member by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galray.ensemble.estimate import Estimate, Term
from galray.ensemble.members import MemberSpec
from galray.ensemble.settings import FACTORS, BudgetSettings
from galray.ensemble.variance import (
    correlation,
    effective_number,
    group_numbers,
    moderate,
    shrink_correlation,
)
from galray.errors import GalrayError

__all__ = ["combine_family"]

logger = logging.getLogger(__name__)
Array = NDArray[np.float64]

TERMS = ("network", "hyperparameters", "statistics", "measurement", "systematics", "selection")
"""The terms of a family, in the order of the budget."""
_TINY = 1e-300
_TERM_WEIGHT = 6.0
"""Deviations that a term needs before its own correlations outweigh those of all terms together."""


def combine_family(
    specs: Sequence[MemberSpec],
    values: Array,
    *,
    groups: Sequence[str] | None = None,
    scales: Array | None = None,
    jackknife: Array | None = None,
    jackknife_blocks: int = 0,
    settings: BudgetSettings | None = None,
    stars: Sequence[int] | None = None,
) -> Estimate:
    """Combine the members of one family into values with an error budget.

    The value is the mean over the seeds. Network: the seeds' variance divided by their number.
    Statistics: mean square of (bootstrap − its twin of the same seed), or the jackknife covariance.
    Measurement: variance of (redraw − twin); the mean of the same differences is the bias, which is
    either subtracted to first order (its uncertainty added) or, where it exceeds its own noise, kept in
    the term. Error draws that are independent from star to star are part of what a bootstrap sees, so
    the statistics term is given without them. Systematics: mean square of (draw − twin). Hyperparameters:
    variance over the configuration's own and the draws. Selection: mean square of (selection − twin) less
    what fewer stars cost: an efficient estimate of n of N stars differs from that of all by
    Var·(N/n − 1) (Hausman 1978, Econometrica 46, 1251).

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
        stars: Number of stars of each member, for the selection's term; equal when absent.

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
    sizes = {spec.id: float(n) for spec, n in zip(specs, stars or [1] * len(specs), strict=True)}
    known = None if jackknife is None else np.sqrt(np.diag(jackknife))
    specs, values, excluded = _sound_members(specs, values, settings, known)
    seeds = {s.seed: v for s, v in zip(specs, values, strict=True) if s.whole}
    if not seeds:
        raise GalrayError(
            f"no member of {family} with the full sample is left to give a value",
            "look at the members' error.txt, or train more seeds",
        )
    quantities = values.shape[1]
    labels = group_numbers(groups, quantities)
    num_seeds = len(seeds)
    value = np.mean(list(seeds.values()), axis=0)

    # Deviations of each term, each row scaled so that its mean square is the term's variance.
    network = _network(specs, values)
    effects = {name: _effect(specs, values, seeds, name) for name in FACTORS[1:]}
    boots, draws, systematic = (effects[name].rows for name in ("bootstrap", "draw", "systematic"))
    num_draws = len(draws)
    shift = draws.mean(axis=0) if num_draws else None
    centred = draws  # of a single redraw the square holds shift and spread together
    if shift is not None and num_draws > 1:
        centred = (draws - shift) * np.sqrt(num_draws / (num_draws - 1))
    others = effects["hyperparameter"].rows
    if len(others):
        # The configuration's own choice is one among them.
        others = np.concatenate([np.zeros((1, quantities)), others])
        others = (others - others.mean(axis=0)) * np.sqrt(len(others) / (len(others) - 1))
    selection = effects["selection"].rows

    every = [(network, num_seeds - 1), (boots, len(boots)), (centred, max(num_draws - 1, 1))]
    every += [(systematic, len(systematic)), (others, len(others) - 1), (selection, len(selection))]
    parts = [(d, n) for d, n in every if len(d) and n > 0]
    pool = _Pool(parts, labels, scales, settings, quantities)

    terms: dict[str, Term] = {}
    missing: list[str] = []
    single = np.zeros(quantities)  # network variance of one member
    if num_seeds > 1:
        single, dof = pool.variance(network, num_seeds - 1)
        terms["network"] = Term(pool.covariance(network, single / num_seeds), num_seeds, dof)
    elif family != "moments":
        missing.append("network")

    def noise(name: str) -> Array:
        return effects[name].noise(single, settings.seed_correlation, num_seeds)

    if len(others):
        spread, dof = pool.variance(others, len(others) - 1)
        # Another network is another training: nothing of the noise is shared.
        spread = np.maximum(spread - single, 0.05 * spread)
        terms["hyperparameters"] = Term(pool.covariance(others, spread), len(others) - 1, dof)
    if jackknife is not None:
        stat_correlation = shrink_correlation(np.asarray(jackknife, dtype=float))
        stat = np.diag(jackknife).astype(float)
        stat_dof = np.full(quantities, float(max(jackknife_blocks - 1, 1)))
        count = jackknife_blocks
    elif len(boots):
        stat, stat_dof = pool.variance(boots, len(boots))
        stat = np.maximum(stat - noise("bootstrap"), 0.05 * stat)
        stat_correlation = pool.correlation(boots)
        count = len(boots)
    else:
        stat, count = np.zeros(quantities), 0
        missing.append("statistics")

    spread = np.zeros(quantities)
    if shift is not None:
        spread, dof = pool.variance(centred, max(num_draws - 1, 1))
        spread = np.maximum(spread - noise("draw"), 0.05 * spread)
        if count and num_draws > 1 and settings.measurement_within_statistics:
            spread = np.minimum(spread, stat)  # two or three draws may claim more than the whole of it
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

    if len(systematic):
        common, dof = pool.variance(systematic, len(systematic))
        common = np.maximum(common - noise("systematic"), 0.05 * common)
        terms["systematics"] = Term(pool.covariance(systematic, common), len(systematic), dof)
    if len(selection):
        excess, dof = pool.variance(selection, len(selection))
        base = next(sizes[spec.id] for spec in specs if spec.whole)
        tried = [sizes[spec.id] for spec in specs if spec.varied == "selection"] or [base]
        fewer = max(float(np.mean([base / n for n in tried])) - 1.0, 0.0)
        excess = np.maximum(excess - fewer * stat - noise("selection"), 0.0)
        terms["selection"] = Term(pool.covariance(selection, excess), len(selection), dof)
    if count:
        if settings.measurement_within_statistics:
            stat = np.maximum(stat - spread, 0.0)
        sigma = np.sqrt(stat)
        terms["statistics"] = Term(stat_correlation * np.outer(sigma, sigma), count, stat_dof)
    return Estimate(
        method=family,
        value=value,
        terms={name: terms[name] for name in TERMS if name in terms},
        bias=shift,
        bias_corrected=bool(shift is not None and settings.correct_measurement_bias),
        missing=tuple(missing),
        excluded=excluded,
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
    specs: Sequence[MemberSpec], values: Array, settings: BudgetSettings, error: Array | None
) -> tuple[list[MemberSpec], Array, dict[str, str]]:
    """Leave out members that are not finite, or that lie far from all others by the stated rule.

    Centre and scatter are those of the members that differ by chance (seed, bootstrap, redraw), since others
    may all but coincide; `error` is what is known of the statistics from elsewhere `(Q,)`.
    """
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
    by_chance = [i for i in keep if not any(_rest(specs[i], "seed", "bootstrap", "draw"))]
    if len(by_chance) >= 5:
        rest = values[by_chance]
        centre = np.median(rest, axis=0)
        scatter = 1.4826 * np.median(np.abs(rest - centre), axis=0)
        if error is not None:
            scatter = np.hypot(scatter, error)
        distance = np.median(np.abs(values[keep] - centre) / np.maximum(scatter, _TINY), axis=1)
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


def _rest(spec: MemberSpec, *names: str) -> tuple[int, ...]:
    """The labels of all factors but these."""
    return tuple(label for name, label in spec.labels.items() if name not in names)


def _network(specs: Sequence[MemberSpec], values: Array) -> Array:
    """Deviations of the seeds from their mean, at every choice of the rest that has several."""
    groups: dict[tuple[int, ...], list[Array]] = {}
    for spec, row in zip(specs, values, strict=True):
        groups.setdefault(_rest(spec, "seed"), []).append(row)
    rows = [
        (np.array(runs) - np.mean(runs, axis=0)) * np.sqrt(len(runs) / (len(runs) - 1))
        for runs in groups.values()
        if len(runs) > 1
    ]
    return np.concatenate(rows) if rows else np.zeros((0, values.shape[1]))


@dataclass(frozen=True)
class _Effect:
    """What each choice of a factor changes, the mean over all that is crossed with it.

    Attributes:
        rows: Differences from the base's choice `(levels, Q)`.
        alone: Part of them that have no twin and are compared with the seeds' mean.
        repeats: Twins per choice, where all have the same number above one.
        scatter: Variance of a single difference over its repeats `(Q,)`; None without repeats.
    """

    rows: Array
    alone: float
    repeats: int
    scatter: Array | None

    def noise(self, single: Array, seed_correlation: float, num_seeds: int) -> Array:
        """What of the training noise is left in the rows' mean square.

        Of repeated differences it is measured. Of one difference of twins it is what a shared seed does not
        share; of a member without its twin, all of it.

        Arguments:
            single: Network variance of one member `(Q,)`.
            seed_correlation: Of two members that share a seed but not the data.
            num_seeds: Behind the mean that takes the place of absent twins.
        """
        if self.scatter is not None:
            return self.scatter / self.repeats
        of_twins = 2.0 * (1.0 - seed_correlation)
        return single * (of_twins * (1.0 - self.alone) + self.alone * (1.0 + 1.0 / num_seeds))


def _effect(specs: Sequence[MemberSpec], values: Array, seeds: Mapping[int, Array], factor: str) -> _Effect:
    """Compare the members that make another choice of one factor with those that share all else."""
    mean = np.mean(list(seeds.values()), axis=0)
    base = {_rest(s, factor): v for s, v in zip(specs, values, strict=True) if not getattr(s, factor)}
    found: dict[int, list[Array]] = {}
    lonely: dict[int, Array] = {}
    for spec, row in zip(specs, values, strict=True):
        level = getattr(spec, factor)
        if not level:
            continue
        twin = base.get(_rest(spec, factor))
        if twin is not None:
            found.setdefault(level, []).append(row - twin)
        elif not any(_rest(spec, factor, "seed")):
            lonely[level] = row - mean
    lonely = {level: row for level, row in lonely.items() if level not in found}
    rows = [np.mean(rows, axis=0) for rows in found.values()] + list(lonely.values())
    repeats = min((len(rows) for rows in found.values()), default=0)
    scatter = None
    if repeats > 1 and not lonely:
        scatter = np.mean([np.var(rows, axis=0, ddof=1) for rows in found.values()], axis=0)
    stacked = np.array(rows).reshape(len(rows), values.shape[1])
    return _Effect(stacked, len(lonely) / max(len(rows), 1), repeats, scatter)
