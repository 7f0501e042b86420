"""Gaia's ``gaia_source`` columns by release: names, types and units, read from the tables in ``data/``."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from galray.errors import GalrayError

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "ASTROMETRY",
    "CORRELATIONS",
    "ERRORS",
    "OBSERVABLES",
    "PHOTOMETRY",
    "STATE",
    "Column",
    "columns",
    "polars_dtype",
    "release_aliases",
    "releases",
]

STATE: tuple[str, ...] = ("x", "y", "z", "vx", "vy", "vz")
"""The 6D state of a star: kpc and km/s in the Galactocentric frame."""

OBSERVABLES: tuple[str, ...] = ("ra", "dec", "parallax", "pmra", "pmdec", "radial_velocity")
"""The six observables in the order of every covariance: deg, deg, mas, mas/yr, mas/yr, km/s."""

ASTROMETRY: tuple[str, ...] = OBSERVABLES[:5]
"""The five that one astrometric solution gives with a common covariance."""

ERRORS: tuple[str, ...] = tuple(f"{name}_error" for name in OBSERVABLES)
"""Standard errors of `OBSERVABLES`: mas (ra is ra*cos dec, and dec), mas, mas/yr, mas/yr, km/s."""

CORRELATIONS: tuple[str, ...] = tuple(
    f"{first}_{second}_corr" for i, first in enumerate(ASTROMETRY) for second in ASTROMETRY[i + 1 :]
)
"""The ten correlations of the astrometric solution, row by row of the upper triangle."""

PHOTOMETRY: tuple[str, ...] = ("phot_g_mean_mag", "bp_rp", "grvs_mag")
"""Magnitudes and colour that a selection or a tracer population needs."""

# A release may give a needed column another name.
_ALIASES: dict[str, dict[str, str]] = {
    "edr3": {
        "dr2_radial_velocity": "radial_velocity",
        "dr2_radial_velocity_error": "radial_velocity_error",
        "dr2_rv_nb_transits": "rv_nb_transits",
    }
}


@dataclass(frozen=True)
class Column:
    """One column of a release: its name, ECSV data type and unit (as ESA spells it)."""

    name: str
    dtype: str
    unit: str


def releases() -> list[str]:
    """The releases whose column table is present; a new one is a new file ``data/gaia_NAME.csv``."""
    names = (entry.name for entry in (files("galray.catalog") / "data").iterdir())
    return sorted(
        n[len("gaia_") : -len(".csv")] for n in names if n.startswith("gaia_") and n.endswith(".csv")
    )


@cache
def columns(release: str) -> tuple[Column, ...]:
    """All columns of a release's ``gaia_source`` table in their official order.

    Raises:
        GalrayError: There is no table for that release.
    """
    source = files("galray.catalog") / "data" / f"gaia_{release}.csv"
    if not source.is_file():
        raise GalrayError(f"release '{release}' has no column table", f"use one of {', '.join(releases())}")
    with source.open("r", encoding="utf-8") as stream:
        return tuple(Column(row["name"], row["dtype"], row["unit"]) for row in csv.DictReader(stream))


def release_aliases(release: str) -> dict[str, str]:
    """Names of a release's columns that galray knows under another name: ``{official: galray's}``."""
    return _ALIASES.get(release, {})


@cache
def polars_dtype(release: str) -> dict[str, pl.DataType]:
    """The Polars type of every column of a release, including those renamed by `release_aliases`."""
    import polars as pl

    kinds: dict[str, pl.DataType] = {
        "bool": pl.Boolean(),
        "string": pl.String(),
        "float32": pl.Float32(),
        "float64": pl.Float64(),
        "int8": pl.Int8(),
        "int16": pl.Int16(),
        "int32": pl.Int32(),
        "int64": pl.Int64(),
    }
    table = {column.name: kinds[column.dtype] for column in columns(release)}
    return table | {alias: table[name] for name, alias in release_aliases(release).items()}
