"""What happens to one batch of rows: checked, cut, transformed to 6D, every row's fate counted."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from galray.catalog.astrometry import add_states
from galray.catalog.columns import ASTROMETRY, CORRELATIONS, ERRORS, OBSERVABLES, PHOTOMETRY, STATE
from galray.catalog.measures import Measures
from galray.catalog.quality import (
    DERIVED,
    Rule,
    add_derived,
    apply_rules,
    check_cut,
    derived_inputs,
    flag_rules,
    parse_cuts,
    remove_flagged,
)
from galray.catalog.radial_velocities import RV_SOURCE
from galray.catalog.readers import SHORT_ROW, Source
from galray.catalog.rvs_selection import RVTally
from galray.catalog.settings import CatalogSettings
from galray.catalog.shards import BallRegion
from galray.errors import GalrayError

__all__ = ["SHARD", "Selection", "splitmix64"]

SHARD = "__shard"
"""Extra column of selected rows: the shard each goes to."""

Views = tuple[pl.DataFrame, pl.DataFrame | None, pl.DataFrame | None]

# Float32 keeps 7 digits: enough for errors and states, not for what states are computed from.
_DOUBLE = {*OBSERVABLES, "parallax_zero_point", "distance", "distance_low", "distance_high"}
_OTHER: dict[str, Any] = {"source_id": pl.Int64, RV_SOURCE: pl.String}


def splitmix64(values: np.ndarray, salt: int = 0) -> np.ndarray:
    """Mix 64-bit integers well and reproducibly (Steele, Lea & Flood 2014), whatever a library's hash is."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Selection:
    """The rules of a configuration, bound to one file's columns.

    Arguments:
        settings: The configuration.
        source: The file.
        checksum: The file's checksum in hex, from which stars without ``source_id`` get one.
        seed: Salt of the hash that deals stars into shards.

    Raises:
        GalrayError: The file lacks a column that the configuration needs.
    """

    def __init__(self, settings: CatalogSettings, source: Source, checksum: str, seed: int) -> None:
        self.settings = settings
        self.source = source
        self.salt = seed
        self.id_base = (int(checksum[:8], 16) & 0x7FFFFFFF) << 32
        self.kind = kind_of(settings, source)
        self.cuts = parse_cuts(settings.cuts)
        self.account: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.tally: RVTally | None = None
        self.has_id = "source_id" in source.names
        asked = [c for cut in self.cuts for c in cut.columns] + list(settings.keep_columns)
        asked += [settings.weight_column] if settings.weight_column else []
        if self.kind == "gaia":
            self._bind_gaia(asked)
        else:
            self._bind_states(asked)

    def _bind_gaia(self, asked: list[str]) -> None:
        names = self.source.names
        self.measures = Measures(self.settings, self.source)
        surveys = self.settings.radial_velocities.surveys
        needed = [*ASTROMETRY, *(["radial_velocity"] if self.settings.require_rv and not surveys else [])]
        self.source.require(
            needed,
            "not a Gaia source table",
            "give gaia_source files, map other names with catalog.rename, set catalog.format = 'states' for "
            "6D tables, or catalog.require_rv = false for a catalogue without radial velocities",
        )
        wanted = ["source_id", *OBSERVABLES, *ERRORS, *CORRELATIONS, *PHOTOMETRY, *asked]
        asked = [*asked, *self.measures.derived]
        wanted += [*derived_inputs([*PHOTOMETRY, *asked]), *self.measures.columns]
        joined = self.measures.joined
        self.columns = [name for name in dict.fromkeys(wanted) if name in names and name not in joined]
        self.tally = RVTally(self.settings.rv_selection)
        have = {*self.columns, *joined, *self.measures.outputs}
        self._check_asked({*have, *STATE, *self._derived([*have], asked)})
        self.outputs = ["source_id", *STATE, *OBSERVABLES, *ERRORS, *CORRELATIONS, *PHOTOMETRY]
        self.outputs += self.measures.outputs
        self.asked = asked

    def _bind_states(self, asked: list[str]) -> None:
        given = self.settings.states.columns
        for key in ("joins", "masks", "tracer", "completeness"):
            if getattr(self.settings, key):
                raise GalrayError(
                    f"{self.source.path}: catalog.{key} needs Gaia's observables, and this is a 6D table",
                    "leave it out, or select with catalog.cuts",
                )
        self.source.require(
            given, "not a 6D table", "name its position and velocity columns in catalog.states.columns"
        )
        others = ["source_id", *(name for name in asked if name not in STATE)]
        self.columns = [n for n in dict.fromkeys([*given, *others]) if n in self.source.names]
        self._check_asked({*self.columns, *STATE})
        self.outputs = ["source_id", *STATE]
        self.asked = asked

    def _derived(self, columns: Sequence[str], asked: Sequence[str]) -> list[str]:
        return [name for name in {*asked, *PHOTOMETRY} & {*DERIVED} if {*DERIVED[name]} <= {*columns}]

    def _check_asked(self, have: set[str]) -> None:
        """Cuts, kept columns and the weight must exist."""
        for key, names in (
            ("keep_columns", self.settings.keep_columns),
            ("weight_column", [self.settings.weight_column] if self.settings.weight_column else []),
        ):
            if absent := [name for name in names if name not in have]:
                raise GalrayError(
                    f"{self.source.path}: catalog.{key}: the file has no column '{absent[0]}'",
                    "correct the name or map it with catalog.rename",
                )
        for cut in self.cuts:
            for column in cut.columns:
                if column not in have:
                    check_cut(cut, dict.fromkeys(have, pl.Float64()), self.source.path)

    def apply(self, batch: pl.DataFrame, first_row: int) -> Views:
        """Select a batch; fates of removed and kept rows are added to ``account``.

        Arguments:
            batch: Rows as the reader gives them, with ``columns``.
            first_row: Number of the batch's first row in its file.

        Returns:
            The 6D stars, the stars without radial velocity and those in the ball's margin where they are
            kept; each with a column `SHARD`.
        """
        self.account["rows_in"] += batch.height
        if self.has_id:
            rules = [Rule("rejected:no_source_id", pl.col("source_id").is_null())]
            if SHORT_ROW in batch.columns:
                rules.insert(0, Rule("rejected:short_row", pl.col(SHORT_ROW)))
            batch = apply_rules(batch, rules, self.account)
        else:
            ids = self.id_base + np.arange(first_row, first_row + batch.height, dtype=np.int64)
            batch = batch.with_columns(pl.Series("source_id", ids))
        mixed = splitmix64(batch["source_id"].to_numpy(), self.salt)
        shards = (mixed % np.uint64(self.settings.num_shards)).astype(np.uint16)
        batch = batch.with_columns(pl.Series(SHARD, shards))
        rules = []
        if self.settings.sample < 1:
            fraction = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
            rules.append(Rule("cut:not_sampled", pl.lit(pl.Series(fraction >= self.settings.sample))))
        return self._gaia(batch, rules) if self.kind == "gaia" else (self._states(batch, rules), None, None)

    def _gaia(self, batch: pl.DataFrame, rules: list[Rule]) -> Views:
        settings = self.settings
        if "radial_velocity" not in batch.columns:
            batch = batch.with_columns(pl.lit(None, dtype=pl.Float64).alias("radial_velocity"))
        if rules:
            batch = apply_rules(batch, rules, self.account)
        batch = self.measures.join(batch)
        rules, shared = self._observable_rules(batch)
        flags = flag_rules(batch, rules)
        self._count_velocities(batch, [flags[i] for i in shared])
        batch = remove_flagged(batch, rules, flags, self.account)
        batch, rules = self.measures.measure(batch, self.notes)
        batch = apply_rules(batch, rules, self.account)
        if settings.masks:
            batch, rules = self.measures.masks(batch)
            batch = apply_rules(batch, rules, self.account)
        names = [*PHOTOMETRY, *self.asked]
        batch = add_derived(batch, names, self.measures.zero_point, self.measures.distance)
        for cut in self.cuts:
            check_cut(cut, {**batch.schema, **dict.fromkeys(STATE, pl.Float64())}, self.source.path)
        others = None
        if not settings.require_rv:
            has_rv = pl.col("radial_velocity").is_not_null()
            others = self._finish(self._cut(batch.filter(~has_rv), rv=False), "kept_no_rv")
            batch = batch.filter(has_rv)
        stars, margin = self._cut(batch, rv=True), None
        if settings.ball is not None and settings.ball.margin_kpc:
            outside = self._distance_squared() >= self._reach_squared(0.0)
            margin = self._finish(stars.filter(outside), "kept_margin")
            stars = stars.filter(~outside)
        return self._finish(stars, "kept"), others, margin

    def _count_velocities(self, batch: pl.DataFrame, flags: Sequence[pl.Series]) -> None:
        """Tally the stars that are sound and meet the quality cuts, with and without radial velocity.

        Nothing that depends on the velocity, or that selects by distance or place, is asked of them.
        """
        assert self.tally is not None
        cuts = [cut for cut in self.cuts if cut.on_quality]
        names = {"source_id", "ra", "dec", "phot_g_mean_mag", "bp_rp", "radial_velocity"}
        names |= {column for cut in cuts for column in cut.columns}
        inputs = [name for name in (*names, *derived_inputs([*names])) if name in batch.columns]
        stars = add_derived(batch.select(list(dict.fromkeys(inputs))), [*names], 0.0)
        for cut in cuts:
            check_cut(cut, stars.schema, self.source.path)
        flags = [*flags, *flag_rules(stars, [Rule(cut.name, ~cut.expression) for cut in cuts])]
        bad = functools.reduce(operator.or_, flags)
        given = [name for name in ("phot_g_mean_mag", "bp_rp") if name in stars.columns]
        has_rv = pl.col("radial_velocity").is_not_null().alias("has_rv")
        self.tally.add(stars.filter(~bad).select("source_id", "ra", "dec", *given, has_rv))

    def _observable_rules(self, batch: pl.DataFrame) -> tuple[list[Rule], list[int]]:
        """What makes a row useless, or the star unfit for 6D, in order.

        Also says which of them ask nothing of the radial velocity and the distance.
        """
        sound = self._astrometry_rules(batch)
        errors = [sound.pop()] if sound[-1].fate == "rejected:bad_errors" else []
        shared = list(range(len(sound)))
        rules = sound
        if self.settings.require_rv:
            rules.append(Rule("cut:no_radial_velocity", pl.col("radial_velocity").is_null()))
        infinite = pl.col("radial_velocity").is_infinite().fill_null(False)
        rules.append(Rule("rejected:bad_radial_velocity", infinite))
        shared += [len(rules)] if errors else []
        if "radial_velocity_error" in batch.columns:
            rv_error = pl.col("radial_velocity_error").is_between(0, float("inf"), closed="left")
            bad = pl.col("radial_velocity").is_not_null() & ~rv_error.fill_null(False)
            errors.append(Rule("rejected:bad_errors", bad))
        rules += errors
        zero_point = self.settings.parallax_zero_point
        if self.settings.distance == "inverse_parallax" and not isinstance(zero_point, str):
            rules.append(Rule("cut:parallax_not_positive", pl.col("parallax") <= zero_point))
        return rules, shared

    @staticmethod
    def _astrometry_rules(batch: pl.DataFrame) -> list[Rule]:
        """What makes a row useless whether or not it has a radial velocity."""
        position = pl.any_horizontal(pl.col("ra", "dec").is_null())
        off_sky = ~(pl.col("dec").is_between(-90, 90) & pl.col("ra").is_between(-360, 360))
        missing = pl.any_horizontal(pl.col("parallax", "pmra", "pmdec").is_null())
        infinite = pl.any_horizontal(pl.col("parallax", "pmra", "pmdec").is_infinite())
        rules = [
            Rule("rejected:no_position", position),
            Rule("rejected:bad_position", off_sky),
            Rule("cut:no_astrometry", missing),
            Rule("rejected:bad_astrometry", infinite),
        ]
        bad = [
            ~pl.col(e).is_between(0, float("inf"), closed="left").fill_null(False)
            for e in ERRORS[:5]
            if e in batch.columns
        ]
        bad += [pl.col(c).abs().fill_null(0) > 1.0001 for c in CORRELATIONS if c in batch.columns]
        if bad:
            rules.append(Rule("rejected:bad_errors", pl.any_horizontal(bad)))
        return rules

    def _cut(self, batch: pl.DataFrame, rv: bool) -> pl.DataFrame:
        """The user's cuts, the transformation, and the cuts that need its result.

        A condition on the radial velocity is not asked of a star that has none.
        """
        cuts = [cut for cut in self.cuts if rv or not cut.on_radial_velocity]
        early = [Rule(f"cut:{cut.name}", ~cut.expression) for cut in cuts if not cut.on_state]
        late = [Rule(f"cut:{cut.name}", ~cut.expression) for cut in cuts if cut.on_state]
        batch = apply_rules(batch, early, self.account)
        if self.kind == "gaia":
            batch = apply_rules(batch, self.measures.selections(batch, self.notes), self.account)
            frame = self.settings.frame.build()
            measures = self.measures
            batch = add_states(batch, frame, measures.zero_point, measures.distance)
        margin = self.settings.ball.margin_kpc if self.settings.ball and rv and self.kind == "gaia" else 0.0
        return apply_rules(batch, [*self._state_rules(rv), *late, *self._ball_rule(margin)], self.account)

    @staticmethod
    def _state_rules(rv: bool) -> list[Rule]:
        finite = pl.all_horizontal(pl.col(*(STATE if rv else STATE[:3])).is_finite())
        return [Rule("rejected:not_finite", ~finite)]

    def _ball_rule(self, margin: float) -> list[Rule]:
        if self.settings.ball is None:
            return []
        return [Rule("cut:ball", self._distance_squared() >= self._reach_squared(margin))]

    def _distance_squared(self) -> pl.Expr:
        """From the ball's centre."""
        offsets = [pl.col(n) - c for n, c in zip("xyz", self.settings.ball_center(), strict=True)]
        return sum((offset**2 for offset in offsets), start=pl.lit(0.0))

    def _reach_squared(self, margin: float) -> float:
        assert self.settings.ball is not None
        return (
            BallRegion(self.settings.ball_center(), self.settings.ball.radius_kpc + margin).inner_radius ** 2
        )

    def _states(self, batch: pl.DataFrame, rules: list[Rule]) -> pl.DataFrame:
        """A ready 6D table: units, handedness and origin, then the cuts."""
        given = self.settings.states
        length, speed = given.scales()
        mirror = -1.0 if given.handedness == "left" else 1.0
        scale = [length * mirror, length, length, speed * mirror, speed, speed]
        origin = [*given.origin_kpc, *given.origin_velocity_km_s]
        state = [
            (pl.col(theirs).cast(pl.Float64) * factor + zero).alias(name)
            for theirs, name, factor, zero in zip(given.columns, STATE, scale, origin, strict=True)
        ]
        batch = apply_rules(batch, rules, self.account).with_columns(state)
        for cut in self.cuts:
            check_cut(cut, batch.schema, self.source.path)
        return self._finish(self._cut(batch, rv=True), "kept")

    def _finish(self, batch: pl.DataFrame, fate: str) -> pl.DataFrame:
        """Count the kept rows and give them the shards' columns and types."""
        self.account[fate] += batch.height
        # A state computed from float64 observables is theirs to float32's precision; a state that is itself
        # the datum stays as it is.
        state_type: Any = pl.Float32 if self.kind == "gaia" else pl.Float64
        outputs = [
            n
            for n in self.outputs
            if fate != "kept_no_rv" or n not in (*STATE[3:], *OBSERVABLES[5:], ERRORS[5], RV_SOURCE)
        ]
        expressions = []
        for name in outputs:
            if name not in batch.columns:
                expressions.append(pl.lit(None).alias(name))  # of no type: it takes no room in the pieces
                continue
            kind: Any = pl.Float64 if name in _DOUBLE else state_type if name in STATE else pl.Float32
            expressions.append(pl.col(name).cast(_OTHER.get(name, kind)))
        if self.settings.weight_column:
            expressions.append(pl.col(self.settings.weight_column).cast(pl.Float32).alias("weight"))
        expressions += [pl.col(n) for n in dict.fromkeys(self.settings.keep_columns) if n not in outputs]
        return batch.select(*expressions, SHARD)


def kind_of(settings: CatalogSettings, source: Source) -> str:
    """``gaia`` or ``states``: as configured, or by the file's columns.

    Raises:
        GalrayError: The columns are of neither kind.
    """
    if settings.format != "auto":
        return settings.format
    if {*settings.states.columns} <= {*source.names} and source.kind() != "gaia":
        return "states"
    kind = source.kind()
    if kind is None:
        lacking = [n for n in ASTROMETRY if n not in source.names]
        have = ", ".join(list(source.names)[:6])
        raise GalrayError(
            f"{source.path}: neither a Gaia source table (no {', '.join(lacking)}) nor a 6D table "
            f"(x, y, z, vx, vy, vz): its columns are {have}, …",
            "name its columns with catalog.rename or catalog.states.columns",
        )
    return kind
