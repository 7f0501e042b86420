"""Cuts as named Polars expressions, and the account of which rule removed which row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from galray.catalog.columns import STATE
from galray.errors import GalrayError

__all__ = [
    "DERIVED",
    "Cut",
    "Rule",
    "add_derived",
    "apply_rules",
    "check_cut",
    "derived_inputs",
    "flag_rules",
    "parse_cuts",
    "remove_flagged",
]

_BUILT_IN: dict[str, str] = {
    "ruwe": "ruwe < {}",
    "parallax_snr": "parallax_over_error > {}",
    "fidelity": "fidelity_v2 > {}",
    "rv_error": "radial_velocity_error < {}",
    "visibility_periods": "visibility_periods_used >= {}",
    "excess_noise_sig": "astrometric_excess_noise_sig <= {}",
    "multi_peak": "ipd_frac_multi_peak <= {}",
    "flux_excess": "ABS(phot_bp_rp_excess_factor - CASE "
    "WHEN bp_rp < 0.5 THEN 1.154360 + 0.033772 * bp_rp + 0.032277 * bp_rp * bp_rp "
    "WHEN bp_rp < 4.0 THEN 1.162004 + 0.011464 * bp_rp + 0.049255 * bp_rp * bp_rp "
    "- 0.005879 * bp_rp * bp_rp * bp_rp "
    "ELSE 1.057572 + 0.140537 * bp_rp END) "
    "< {} * (0.0059898 + 8.817481e-12 * POW(phot_g_mean_mag, 7.618399))",
    "has_rv": "radial_velocity IS NOT NULL",
    "single_star": "non_single_star = 0",
    "not_duplicated": "NOT duplicated_source",
}
"""Cuts that take a number (the last three: ``true``). fidelity is Rybizki+ 2022's ``fidelity_v2``, joined;
flux_excess is a number of standard deviations of Riello+ 2021's corrected BP/RP flux excess (eqs. 6, 18)."""

DERIVED: dict[str, tuple[str, ...]] = {
    "parallax_over_error": ("parallax", "parallax_error"),
    "bp_rp": ("phot_bp_mean_mag", "phot_rp_mean_mag"),
    "distance": ("parallax",),
    "absolute_g_mag": ("phot_g_mean_mag", "parallax"),
    "absolute_rvs_mag": ("grvs_mag", "parallax"),
}
"""Quantities a cut may name that files may lack, and the columns that they are computed from."""


_BY_DISTANCE = ("distance", "absolute_g_mag", "absolute_rvs_mag")

# Columns that only stars seen by the radial-velocity spectrometer have.
_RVS_PRODUCTS = ("radial_velocity", "rv_", "rvs_", "grvs_mag", "absolute_rvs_mag", "vbroad")


@dataclass(frozen=True)
class Cut:
    """A named condition that a star must meet.

    Arguments:
        name: The key in the configuration.
        sql: The condition.
        expression: The same as Polars expression.
        columns: The columns that it reads.
    """

    name: str
    sql: str
    expression: pl.Expr
    columns: tuple[str, ...]

    @property
    def on_state(self) -> bool:
        """True when the condition needs the 6D state, so that it follows the transformation."""
        return bool({*STATE} & {*self.columns})

    @property
    def on_radial_velocity(self) -> bool:
        """True when it cannot be asked of a star without radial velocity."""
        return any(c.startswith(_RVS_PRODUCTS) or c in STATE[3:] for c in self.columns)

    @property
    def on_quality(self) -> bool:
        """True when it asks nothing of the velocity, the distance or the place: a cut on quality alone."""
        return not (self.on_radial_velocity or self.on_state or {*_BY_DISTANCE} & {*self.columns})


@dataclass(frozen=True)
class Rule:
    """One fate: rows where `removes` is true (or missing) are counted under `fate` and go no further."""

    fate: str
    removes: pl.Expr


def parse_cuts(cuts: Mapping[str, str | bool | float], section: str = "catalog.cuts.") -> list[Cut]:
    """Turn the configuration's cuts into expressions.

    A string is an SQL condition over columns, one row at a time; it runs no code. A number is the threshold
    of a built-in cut (``ruwe``, ``parallax_snr``), ``has_rv = true`` needs none.

    Raises:
        GalrayError: A condition cannot be parsed, aggregates over rows, or reads no column; a number stands
            beside a name that is not built in.
    """
    parsed = []
    for name, value in cuts.items():
        where = f"{section}{name}"
        if isinstance(value, str):
            sql = value
        elif name not in _BUILT_IN:
            raise GalrayError(
                f"{where} = {value}: only {', '.join(_BUILT_IN)} take a number",
                "write the condition as a string, such as 'parallax_over_error > 5'",
            )
        elif value is False:
            continue
        else:
            sql = _BUILT_IN[name].format(value)
        try:
            expression = pl.sql_expr(sql)
        except pl.exceptions.PolarsError as error:
            raise GalrayError(f"{where}: cannot read '{sql}': {error}", "write an SQL condition") from None
        columns = tuple(dict.fromkeys(expression.meta.root_names()))
        if not columns:
            raise GalrayError(f"{where}: '{sql}' reads no column", "write a condition on a column")
        tree = expression.meta.serialize(format="json")
        if '"Agg"' in tree or '"Over"' in tree or '"Window"' in tree:
            raise GalrayError(
                f"{where}: '{sql}' aggregates over rows, and its answer would depend on how files are cut",
                "write a condition on one row's columns, with numbers for thresholds",
            )
        parsed.append(Cut(name, sql, expression, columns))
    return parsed


def check_cut(cut: Cut, schema: Mapping[str, pl.DataType], path: object) -> None:
    """Check a cut against the columns at hand.

    Raises:
        GalrayError: A column is absent, or the condition is not true-or-false.
    """
    absent = [c for c in cut.columns if c not in schema]
    if absent:
        raise GalrayError(
            f"{path}: catalog.cuts.{cut.name} reads column '{absent[0]}', which the file does not have",
            "correct the name, map it with catalog.rename, or drop the cut",
        )
    try:
        # Evaluated, not only planned: a comparison of text with a number fails at run time alone.
        nothing = {name: pl.Series([None], dtype=schema[name]) for name in cut.columns}
        kind = pl.DataFrame(nothing).select(cut.expression).dtypes[0]
    except pl.exceptions.PolarsError as error:
        raise GalrayError(f"catalog.cuts.{cut.name}: '{cut.sql}': {str(error).splitlines()[0]}") from None
    if kind != pl.Boolean:
        raise GalrayError(
            f"catalog.cuts.{cut.name}: '{cut.sql}' gives {kind}, not true or false",
            "compare it with something: 'ruwe < 1.4'",
        )


def derived_inputs(names: Sequence[str]) -> list[str]:
    """The columns that the derived ones among `names` are computed from."""
    return [source for name in names for source in DERIVED.get(name, ())]


def add_derived(
    frame: pl.DataFrame, names: Sequence[str], zero_point: float | pl.Expr, distance: pl.Expr | None = None
) -> pl.DataFrame:
    """Add or complete derived columns that are asked for and computable from those at hand.

    A value that the file gives stays. Distances (kpc) and absolute magnitudes are from `distance` where it is
    given, else from the inverse of the zero-point corrected parallax, and missing where that is not positive;
    no extinction is subtracted.
    """
    if distance is None:
        parallax = pl.col("parallax") - zero_point
        positive = pl.when(parallax > 0).then(parallax)
        modulus, distance = 5 * (positive.log10() - 2), 1.0 / positive
    else:
        modulus = -5 * (distance.log10() + 2)
    formulas: dict[str, pl.Expr] = {
        "parallax_over_error": pl.col("parallax") / pl.col("parallax_error"),
        "bp_rp": pl.col("phot_bp_mean_mag") - pl.col("phot_rp_mean_mag"),
        "distance": distance,
        "absolute_g_mag": pl.col("phot_g_mean_mag") + modulus,
        "absolute_rvs_mag": pl.col("grvs_mag") + modulus,
    }
    have = set(frame.columns)
    computable = [n for n in dict.fromkeys(names) if n in formulas and have.issuperset(DERIVED[n])]
    return frame.with_columns(
        (pl.coalesce(name, formulas[name]) if name in have else formulas[name]).alias(name)
        for name in computable
    )


def apply_rules(frame: pl.DataFrame, rules: Sequence[Rule], account: Counter[str]) -> pl.DataFrame:
    """Remove rows by the first rule that applies, and count them.

    A rule whose condition is missing (null) for a row removes the row.

    Arguments:
        frame: The rows.
        rules: In order; a row is counted under the first that removes it.
        account: Fates and their numbers; added to.

    Returns:
        The rows that no rule removed.
    """
    return remove_flagged(frame, rules, flag_rules(frame, rules), account)


def flag_rules(frame: pl.DataFrame, rules: Sequence[Rule]) -> list[pl.Series]:
    """For each rule the rows that it would remove, whatever the others do; a missing answer removes."""
    flags = frame.select(rule.removes.fill_null(True).alias(str(i)) for i, rule in enumerate(rules))
    return [flags[str(i)] for i in range(len(rules))]


def remove_flagged(
    frame: pl.DataFrame, rules: Sequence[Rule], flags: Sequence[pl.Series], account: Counter[str]
) -> pl.DataFrame:
    """Remove the rows that `flag_rules` found, each counted under the first rule that applies."""
    if not rules or frame.height == 0:
        return frame
    gone = flags[0]
    counts = [int(gone.sum())]
    for flag in flags[1:]:
        gone = gone | flag
        counts.append(int(gone.sum()))
    for rule, count, before in zip(rules, counts, [0, *counts], strict=False):
        if count > before:
            account[rule.fate] += count - before
    return frame.filter(~gone) if counts[-1] else frame
