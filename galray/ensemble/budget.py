"""The error budget of one family: its members to a value with its terms.

The terms of a family are network (another seed), statistics (other stars: bootstrap or jackknife) and
measurement (redrawn errors). Bootstraps and redraws share the base's seed and are compared with it, so
that no term holds another's variance.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from galray.ensemble.estimate import Estimate, Term
from galray.ensemble.members import BudgetSettings, MemberSpec
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
    labels = group_numbers(groups, quantities)
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
