"""Tracer populations by colour and absolute magnitude, extinction, and completeness throughout the ball."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field, model_validator

from galray.settings import Settings

__all__ = [
    "TRACERS",
    "CompletenessSettings",
    "ExtinctionSettings",
    "TracerSettings",
    "grvs_from_colour",
    "tracer_window",
]


class TracerSettings(Settings):
    """A window in intrinsic colour and absolute magnitude; bounds left out are open."""

    colour_min: float | None = Field(default=None, description="Least (BP-RP)_0 in mag.")
    colour_max: float | None = Field(default=None, description="Largest (BP-RP)_0 in mag.")
    magnitude_min: float | None = Field(default=None, description="Least (brightest) M_G in mag.")
    magnitude_max: float | None = Field(default=None, description="Largest (faintest) M_G in mag.")

    @model_validator(mode="after")
    def _is_a_window(self) -> TracerSettings:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError("a tracer window needs at least one bound")
        for name in ("colour", "magnitude"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low is not None and high is not None and low >= high:
                raise ValueError(f"{name}_min must be below {name}_max")
        return self


TRACERS: dict[str, TracerSettings] = {
    "upper_rgb": TracerSettings(colour_min=1.2, colour_max=3.0, magnitude_min=-4.0, magnitude_max=0.0),
    "red_clump": TracerSettings(colour_min=1.0, colour_max=1.5, magnitude_min=0.0, magnitude_max=1.0),
    "upper_main_sequence": TracerSettings(
        colour_min=-0.5, colour_max=0.6, magnitude_min=-2.0, magnitude_max=3.0
    ),
}
"""Windows in (BP-RP)_0 and M_G by name. They are galray's own choice: round the giants above the red clump,
the clump itself (M_G near 0.5, BP-RP near 1.2 at solar metallicity), and main-sequence stars of types B to
early F."""


class ExtinctionSettings(Settings):
    """Columns of extinction, subtracted from magnitudes and colours of the tracer windows."""

    a_g: str = Field(default="ag_gspphot", description="Column of A_G in mag.")
    e_bp_rp: str = Field(default="ebpminrp_gspphot", description="Column of E(BP-RP) in mag.")
    missing: Literal["zero", "cut"] = Field(
        default="zero",
        description="A star without them: taken as not reddened (counted in the manifest's notes), or cut.",
    )


class CompletenessSettings(Settings):
    """Keep a star only if it would be seen anywhere in the ball: M < limit − 5 log10(d_max / 10 pc)."""

    limit: float = Field(default=14.0, description="Apparent magnitude to which the catalogue is complete.")
    band: Literal["grvs", "g"] = Field(default="grvs", description="The band of the limit: G_RVS or G.")
    distance_max_kpc: float | None = Field(
        default=None,
        gt=0,
        description="Largest distance; that of the ball's farthest point from the Sun where not given.",
    )
    grvs_from_colour: bool = Field(
        default=False,
        description="Stars without grvs_mag get one from G and G_RP (Sartoretti+ 2023, A&A 674, A6).",
    )


def tracer_window(
    tracer: str | TracerSettings, extinction: ExtinctionSettings | None
) -> tuple[pl.Expr, tuple[str, ...]]:
    """The condition that a tracer's stars meet, and the columns that it reads.

    Arguments:
        tracer: A name of `TRACERS`, or a window.
        extinction: Columns to correct with; missing values count as zero here.
    """
    window = TRACERS[tracer] if isinstance(tracer, str) else tracer
    colour, magnitude = pl.col("bp_rp"), pl.col("absolute_g_mag")
    if extinction is not None:
        colour = colour - pl.col(extinction.e_bp_rp).fill_null(0.0)
        magnitude = magnitude - pl.col(extinction.a_g).fill_null(0.0)
    conditions, columns = [], []
    for value, name, low, high in (
        (colour, "bp_rp", window.colour_min, window.colour_max),
        (magnitude, "absolute_g_mag", window.magnitude_min, window.magnitude_max),
    ):
        if low is not None or high is not None:
            columns.append(name)
        conditions += [value >= low] if low is not None else []
        conditions += [value < high] if high is not None else []
    extra = (extinction.a_g, extinction.e_bp_rp) if extinction is not None else ()
    return pl.all_horizontal(conditions), (*columns, *extra)


def grvs_from_colour() -> pl.Expr:
    """G_RVS from G and G_RP, missing outside −0.15 ≤ G − G_RP ≤ 1.7 (Sartoretti+ 2023, A&A 674, A6)."""
    rp = pl.col("phot_rp_mean_mag").cast(pl.Float64)
    x = pl.col("phot_g_mean_mag").cast(pl.Float64) - rp
    blue = -0.0397 - 0.2852 * x - 0.0330 * x**2 - 0.0867 * x**3
    red = -4.0618 + 10.0187 * x - 9.0532 * x**2 + 2.6089 * x**3
    return pl.when(x.is_between(-0.15, 1.2)).then(rp + blue).when((x > 1.2) & (x <= 1.7)).then(rp + red)
