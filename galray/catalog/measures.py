"""From a file's columns to a star's place: joins, velocities, zero points, distances, selections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from galray.catalog.distances import EdsdPosterior, length_scales
from galray.catalog.joins import JoinTable, join_table
from galray.catalog.masks import mask_file, masked_by_list, masked_by_regions
from galray.catalog.quality import Rule
from galray.catalog.radial_velocities import RV_SOURCE, combine_velocities
from galray.catalog.readers import Source
from galray.catalog.settings import CatalogSettings
from galray.catalog.tracers import grvs_from_colour, tracer_window
from galray.catalog.zero_point import ZERO_POINT_COLUMNS, zero_point_expression, zero_point_in_range
from galray.errors import GalrayError
from galray.provenance import file_checksum

__all__ = ["DISTANCE_COLUMNS", "Measures", "auxiliary_files"]

DISTANCE_COLUMNS = {
    "inverse_parallax": (),
    "edsd": ("distance", "distance_error", "distance_prior_length"),
    "joined": ("distance", "distance_error", "distance_low", "distance_high"),
}
"""What the shards hold of each kind of distance, in kpc; the inverse of the parallax needs none."""

_CHUNK = 16_384


def auxiliary_files(settings: CatalogSettings) -> dict[str, dict[str, str]]:
    """The checksum of every file beside the catalogue that its stars depend on, by configuration key.

    Joined files are checked for stars that stand in them twice, so that the workers find none.

    Raises:
        GalrayError: A file is absent, unreadable, lacks a column or has a source_id twice.
    """
    found: dict[str, list[Path]] = {}
    for where, table in _tables(settings):
        table.check_unique()
        found[where] = table.paths
    for name, mask in settings.masks.items():
        where = f"catalog.masks.{name}"
        found[where] = mask_file(where, mask)
    if settings.distance == "edsd" and settings.edsd.table:
        length_scales(settings.edsd, np.zeros(1), np.zeros(1))
        found["catalog.edsd.table"] = [Path(settings.edsd.table)]
    return {where: {path.name: file_checksum(path) for path in paths} for where, paths in found.items()}


def _tables(settings: CatalogSettings) -> Iterator[tuple[str, JoinTable]]:
    """Every joined catalogue of the configuration."""
    for name, join in settings.joins.items():
        where = f"catalog.joins.{name}"
        yield where, join_table(where, join.file, join.names, join.key)
    for name, survey in settings.radial_velocities.surveys.items():
        if survey.file:
            where = f"catalog.radial_velocities.surveys.{name}"
            names = {survey.velocity: "radial_velocity", survey.error: "radial_velocity_error"}
            yield where, join_table(where, survey.file, names, survey.key)
    if settings.distance == "joined":
        yield "catalog.joined_distance", _distance_table(settings)


def _distance_table(settings: CatalogSettings) -> JoinTable:
    joined = settings.joined_distance
    assert joined is not None
    median, low, high, _ = joined.quantities
    names = {median: "distance", low: "distance_low", high: "distance_high"}
    return join_table("catalog.joined_distance", joined.file, names, joined.key)


class Measures:
    """The configured way from a file's columns to distances, velocities and selections.

    Arguments:
        settings: The configuration.
        source: The file, whose columns are checked.

    Raises:
        GalrayError: A column that the configuration needs is neither in the file nor joined.
    """

    def __init__(self, settings: CatalogSettings, source: Source) -> None:
        self.settings = settings
        self.source = source
        listed = any(mask.kind == "source_ids" for mask in settings.masks.values())
        joining = [where for where, _ in _tables(settings)] + (["catalog.masks"] if listed else [])
        if joining and "source_id" not in source.names:
            raise GalrayError(
                f"{source.path}: {joining[0]} joins by source_id, which this file does not have",
                "map its column of Gaia's source_id with catalog.rename",
            )
        self.joins = [
            join_table(f"catalog.joins.{name}", join.file, join.names, join.key)
            for name, join in settings.joins.items()
        ]
        self.joined = {name for table in self.joins for name in table.schema}
        self.per_star = isinstance(settings.parallax_zero_point, str)
        self.needed = self._needed()
        have = {*source.names, *self.joined}
        for key, names in self.needed.items():
            if absent := [name for name in names if name not in have]:
                raise GalrayError(
                    f"{source.path}: {key} needs column '{absent[0]}', neither in the file nor joined",
                    "map it with catalog.rename, join it with catalog.joins, or leave that setting out",
                )
        self.outputs = list(DISTANCE_COLUMNS[settings.distance])
        self.outputs += ["parallax_zero_point"] if self.per_star else []
        self.outputs += [RV_SOURCE] if settings.radial_velocities.surveys else []

    def _needed(self) -> dict[str, list[str]]:
        """Columns that each setting needs, by its key."""
        settings = self.settings
        needed: dict[str, list[str]] = {}
        if self.per_star:
            place = {"ecl_lat"} - {*self.source.names, *self.joined}
            needed["catalog.parallax_zero_point"] = [c for c in ZERO_POINT_COLUMNS if c not in place]
        if settings.distance == "edsd":
            needed["catalog.distance = 'edsd'"] = ["parallax_error"]
        if settings.tracer is not None:
            _, columns = tracer_window(settings.tracer, settings.extinction)
            have_colour = "bp_rp" in self.source.names or "bp_rp" in self.joined
            colour = ["bp_rp"] if have_colour else ["phot_bp_mean_mag", "phot_rp_mean_mag"]
            extinction = [c for c in columns if c not in ("bp_rp", "absolute_g_mag")]
            given = [] if {"absolute_g_mag"} <= {*self.source.names, *self.joined} else ["phot_g_mean_mag"]
            needed["catalog.tracer"] = [
                *(colour if "bp_rp" in columns else []),
                *(given if "absolute_g_mag" in columns else []),
            ]
            needed["catalog.extinction"] = extinction
        if settings.completeness is not None:
            band = settings.completeness.band
            if band == "g":
                names = ["phot_g_mean_mag"]
            elif "grvs_mag" in self.source.names or "grvs_mag" in self.joined:
                names = ["grvs_mag"]
            elif not settings.completeness.grvs_from_colour:
                raise GalrayError(
                    f"{self.source.path}: catalog.completeness needs grvs_mag, which this file does not have",
                    "set catalog.completeness.grvs_from_colour = true, or band = 'g'",
                )
            else:
                names = []
            if band == "grvs" and settings.completeness.grvs_from_colour:
                names += ["phot_g_mean_mag", "phot_rp_mean_mag"]
            needed["catalog.completeness"] = names
        return needed

    @property
    def columns(self) -> list[str]:
        """The columns of the file that are needed."""
        return [name for names in self.needed.values() for name in names if name not in self.joined]

    @property
    def derived(self) -> list[str]:
        """The derived columns that are needed."""
        return ["bp_rp", "absolute_g_mag"] if self.settings.tracer is not None else []

    @property
    def zero_point(self) -> float | pl.Expr:
        """The zero point of the parallax: one number, or each star's."""
        value = self.settings.parallax_zero_point
        return pl.col("parallax_zero_point") if isinstance(value, str) else value

    @property
    def distance(self) -> pl.Expr | None:
        """The distance in kpc where it is not the inverse of the parallax."""
        return None if self.settings.distance == "inverse_parallax" else pl.col("distance")

    def join(self, batch: pl.DataFrame) -> pl.DataFrame:
        """Add the columns of other catalogues, and the radial velocities of other surveys."""
        for table in self.joins:
            batch = table.join(batch)
        if self.settings.radial_velocities.surveys:
            batch = combine_velocities(self.settings.radial_velocities, batch)
        return batch

    def measure(self, batch: pl.DataFrame, notes: Counter[str]) -> tuple[pl.DataFrame, list[Rule]]:
        """Add zero points and distances of stars that are sound.

        Arguments:
            batch: The stars.
            notes: Numbers of stars to which something applies that does not remove them; added to.

        Returns:
            The stars with the columns, and the rules that remove those that have no distance.
        """
        rules: list[Rule] = []
        if self.per_star:
            known = [*self.source.names, *self.joined]
            batch = batch.with_columns(zero_point_expression(known))
            rules.append(Rule("cut:no_zero_point", pl.col("parallax_zero_point").is_null()))
            if self.settings.zero_point_outside == "cut":
                rules.append(Rule("cut:zero_point_range", ~zero_point_in_range()))
            else:
                outside = ~zero_point_in_range() & pl.col("parallax_zero_point").is_not_null()
                notes["zero_point_outside_range"] += int(batch.select(outside.sum()).item() or 0)
        if self.settings.distance == "inverse_parallax":
            if self.per_star:
                too_far = pl.col("parallax") <= pl.col("parallax_zero_point")
                rules.append(Rule("cut:parallax_not_positive", too_far))
            return batch, rules
        batch = self._edsd(batch) if self.settings.distance == "edsd" else self._joined(batch)
        return batch, [*rules, Rule("cut:no_distance", pl.col("distance").is_null())]

    def _edsd(self, batch: pl.DataFrame) -> pl.DataFrame:
        settings = self.settings.edsd
        zero = self.zero_point
        corrected = (pl.col("parallax").cast(pl.Float64) - zero).fill_null(np.nan).alias("value")
        values = batch.select(corrected, pl.col("parallax_error").cast(pl.Float64).fill_null(np.nan))
        parallax, error = (values[name].to_numpy() for name in ("value", "parallax_error"))
        length = length_scales(settings, batch["ra"].to_numpy(), batch["dec"].to_numpy())
        possible = np.flatnonzero(np.isfinite(parallax) & (error > 0) & np.isfinite(error))
        result = np.full((2, len(parallax)), np.nan)
        for start in range(0, len(possible), _CHUNK):
            rows = possible[start : start + _CHUNK]
            posterior = EdsdPosterior(parallax[rows], error[rows], length[rows])
            if settings.estimate == "median":
                result[0, rows] = posterior.quantile(0.5)
            else:
                result[0, rows] = posterior.mean if settings.estimate == "mean" else posterior.mode
            result[1, rows] = posterior.sd
        columns = zip(DISTANCE_COLUMNS["edsd"], [*result, length], strict=True)
        return batch.with_columns(pl.Series(name, value, nan_to_null=True) for name, value in columns)

    def _joined(self, batch: pl.DataFrame) -> pl.DataFrame:
        joined = self.settings.joined_distance
        assert joined is not None
        batch = _distance_table(self.settings).join(batch)
        names = ("distance", "distance_low", "distance_high")
        batch = batch.with_columns(
            (pl.col(name).cast(pl.Float64).fill_nan(None) * joined.quantities[3]).alias(name)
            for name in names
        )
        median, low, high = (pl.col(name) for name in names)
        usable = (low > 0) & (low <= median) & (median <= high) & high.is_finite()
        return batch.with_columns(
            *(pl.when(usable).then(pl.col(name)).alias(name) for name in names),
            pl.when(usable).then((high - low) / 2).alias("distance_error"),
        )

    def masks(self, batch: pl.DataFrame) -> tuple[pl.DataFrame, list[Rule]]:
        """Add a column for each mask, and the rules that remove the stars in them."""
        rules, flags = [], []
        distance = self.distance
        if distance is None:
            distance = 1 / (pl.col("parallax").cast(pl.Float64) - self.zero_point)
        for name, mask in self.settings.masks.items():
            where, column = f"catalog.masks.{name}", f"__mask_{name}"
            if mask.kind == "regions":
                stars = batch.select("ra", "dec", "pmra", "pmdec", distance.alias("distance"))
                flags.append(masked_by_regions(where, mask, stars).alias(column))
            else:
                flags.append(masked_by_list(where, mask, batch).alias(column))
            rules.append(Rule(f"cut:mask_{name}", pl.col(column)))
        return batch.with_columns(flags), rules

    def selections(self, batch: pl.DataFrame, notes: Counter[str]) -> list[Rule]:
        """The rules of tracer and completeness, for stars with their derived columns."""
        settings = self.settings
        rules: list[Rule] = []
        if settings.tracer is not None:
            extinction = settings.extinction
            if extinction is not None:
                unknown = pl.any_horizontal(pl.col(extinction.a_g, extinction.e_bp_rp).is_null())
                if extinction.missing == "cut":
                    rules.append(Rule("cut:no_extinction", unknown))
                else:
                    notes["no_extinction"] += int(batch.select(unknown.sum()).item() or 0)
            condition, _ = tracer_window(settings.tracer, extinction)
            rules.append(Rule("cut:tracer", ~condition))
        if settings.completeness is not None:
            distance = self.distance
            if distance is None:
                distance = 1 / (pl.col("parallax").cast(pl.Float64) - self.zero_point)
            # M < limit − 5 log10(d_max / 10 pc) with M = m − 5 log10(d / 10 pc).
            at_edge = self._apparent(batch) + 5 * (settings.completeness_distance() / distance).log10()
            rules.append(Rule("cut:completeness", ~(at_edge < settings.completeness.limit)))
        return rules

    def _apparent(self, batch: pl.DataFrame) -> pl.Expr:
        """The magnitude in the band of the completeness limit."""
        completeness = self.settings.completeness
        assert completeness is not None
        if completeness.band == "g":
            return pl.col("phot_g_mean_mag").cast(pl.Float64)
        given = [pl.col("grvs_mag").cast(pl.Float64)] if "grvs_mag" in batch.columns else []
        return pl.coalesce([*given, *([grvs_from_colour()] if completeness.grvs_from_colour else [])])
