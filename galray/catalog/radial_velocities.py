"""Radial velocities of several surveys: zero points, error floors, and one value for each star."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field, model_validator

from galray.catalog.joins import join_table
from galray.settings import Settings

__all__ = ["RV_SOURCE", "RadialVelocitySettings", "SurveySettings", "combine_velocities"]

RV_SOURCE = "rv_source"
"""Column that names the survey, or the surveys joined by ``+``, that a star's radial velocity comes from."""

GAIA = "gaia"


class SurveySettings(Settings):
    """One survey's radial velocities."""

    file: str = Field(
        default="",
        description="Parquet or CSV file, or glob pattern of Parquet files; left out for gaia itself.",
    )
    velocity: str = Field(default="radial_velocity", description="Column of the velocity in km/s.")
    error: str = Field(default="radial_velocity_error", description="Column of its standard error in km/s.")
    key: str = Field(default="source_id", description="Column of the file that holds Gaia's source_id.")
    zero_point: float = Field(default=0.0, description="Subtracted from every velocity, in km/s.")
    error_floor: float = Field(
        default=0.0, ge=0, description="Added in quadrature to every standard error, in km/s."
    )


class RadialVelocitySettings(Settings):
    """Which surveys give radial velocities, and how several of one star become one."""

    surveys: dict[str, SurveySettings] = Field(
        default_factory=dict,
        description="Surveys in order of precedence; gaia (the catalogue's own) comes first where not named.",
    )
    combine: Literal["first", "weighted_mean"] = Field(
        default="first",
        description="first: the first survey that has the star; weighted_mean: of all that do, by inverse "
        "variance after zero points and floors.",
    )

    @model_validator(mode="after")
    def _files_named(self) -> RadialVelocitySettings:
        for name, survey in self.surveys.items():
            if bool(survey.file) == (name == GAIA):
                raise ValueError(
                    f"surveys.{name}: "
                    + ("is the catalogue itself, without file" if survey.file else "needs a file")
                )
        return self

    def ordered(self) -> dict[str, SurveySettings]:
        """The surveys in order of precedence, Gaia among them."""
        return self.surveys if GAIA in self.surveys else {GAIA: SurveySettings(), **self.surveys}


def combine_velocities(settings: RadialVelocitySettings, batch: pl.DataFrame) -> pl.DataFrame:
    """Replace a batch's radial velocities by those of all surveys, and name where each is from.

    A velocity counts where it and its error are finite and the error is not negative; the combined error of
    the weighted mean is (Σ 1/σ²)^(-1/2).

    Arguments:
        settings: The surveys.
        batch: With ``source_id``, ``radial_velocity`` and, where Gaia gives it, its error.

    Returns:
        The batch with ``radial_velocity``, ``radial_velocity_error`` and `RV_SOURCE`.
    """
    if "radial_velocity_error" not in batch.columns:
        batch = batch.with_columns(radial_velocity_error=pl.lit(None, dtype=pl.Float64))
    added: list[pl.Expr] = []
    surveys = settings.ordered()
    for number, (name, survey) in enumerate(surveys.items()):
        v, e = f"__rv{number}", f"__rv_error{number}"
        if name == GAIA:
            batch = batch.with_columns(
                pl.col("radial_velocity").cast(pl.Float64).alias(v),
                pl.col("radial_velocity_error").cast(pl.Float64).alias(e),
            )
        else:
            where = f"catalog.radial_velocities.surveys.{name}"
            table = join_table(where, survey.file, {survey.velocity: v, survey.error: e}, survey.key)
            batch = table.join(batch)
        value = pl.col(v).cast(pl.Float64) - survey.zero_point
        error = (pl.col(e).cast(pl.Float64) ** 2 + survey.error_floor**2).sqrt()
        usable = value.is_finite() & error.is_finite() & (pl.col(e) >= 0)
        added += [pl.when(usable).then(value).alias(v), pl.when(usable).then(error).alias(e)]
    batch = batch.with_columns(added)
    values = [pl.col(f"__rv{i}") for i in range(len(surveys))]
    errors = [pl.col(f"__rv_error{i}") for i in range(len(surveys))]
    names = [pl.when(v.is_not_null()).then(pl.lit(name)) for name, v in zip(surveys, values, strict=True)]
    if settings.combine == "first":
        result = [pl.coalesce(values), pl.coalesce(errors), pl.coalesce(names)]
    else:
        # An error of zero would be an infinite weight: a metre per second is below every survey's.
        weights = [1 / pl.max_horizontal(e, pl.lit(1e-3)) ** 2 for e in errors]
        total = pl.sum_horizontal(
            pl.when(v.is_not_null()).then(w) for v, w in zip(values, weights, strict=True)
        )
        mean = pl.sum_horizontal(v * w for v, w in zip(values, weights, strict=True)) / total
        some = total > 0
        result = [
            pl.when(some).then(mean),
            pl.when(some).then(1 / total.sqrt()),
            pl.when(some).then(pl.concat_str(names, separator="+", ignore_nulls=True)),
        ]
    outputs = ("radial_velocity", "radial_velocity_error", RV_SOURCE)
    batch = batch.with_columns(e.alias(n) for e, n in zip(result, outputs, strict=True))
    return batch.drop([c for c in batch.columns if c.startswith("__rv")])
