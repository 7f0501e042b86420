"""Gaia's ``gaia_source`` columns by release: names, types and units, read from the tables in ``data/``.

A new release is a new table and no code. ``gaia_dr4.csv`` needs the columns ``name,dtype,unit`` as the ECSV
header of any of its bulk files lists them, in that order, and may have a fourth, ``alias``: galray's name of
a column that the release calls otherwise (EDR3's ``dr2_radial_velocity`` is ``radial_velocity``). Put it into
``data/`` and ``catalog.release = "dr4"`` works; or leave it where it is and name its path,
``catalog.release = "/data/gaia_dr4.csv"``, on storage that all workers share.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
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

_DTYPES = {
    "bool": "Boolean",
    "string": "String",
    "float32": "Float32",
    "float64": "Float64",
    "int8": "Int8",
    "int16": "Int16",
    "int32": "Int32",
    "int64": "Int64",
}


@dataclass(frozen=True)
class Column:
    """One column of a release: its name, ECSV data type, unit as ESA spells it, and galray's name for it."""

    name: str
    dtype: str
    unit: str
    alias: str = ""


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
    is_path = release.endswith(".csv")
    source = Path(release) if is_path else files("galray.catalog") / "data" / f"gaia_{release}.csv"
    if not source.is_file():
        known = ", ".join(releases())
        raise GalrayError(
            f"release '{release}' has no column table", f"use one of {known}, or the path of a table (.csv)"
        )
    with source.open("r", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    try:
        table = tuple(Column(r["name"], r["dtype"], r["unit"] or "", r.get("alias") or "") for r in rows)
    except KeyError as error:
        raise GalrayError(
            f"{release}: a column table needs name, dtype and unit; {error} is absent",
            "see galray.catalog.columns",
        ) from None
    for column in table:
        if column.dtype not in _DTYPES:
            raise GalrayError(
                f"{release}: column '{column.name}' has type '{column.dtype}'",
                f"use one of {', '.join(_DTYPES)}",
            )
    return table


def release_aliases(release: str) -> dict[str, str]:
    """Names of a release's columns that galray knows under another name: ``{official: galray's}``."""
    return {column.name: column.alias for column in columns(release) if column.alias}


@cache
def polars_dtype(release: str) -> dict[str, pl.DataType]:
    """The Polars type of every column of a release, including those renamed by `release_aliases`."""
    import polars as pl

    table = {column.name: getattr(pl, _DTYPES[column.dtype])() for column in columns(release)}
    return table | {alias: table[name] for name, alias in release_aliases(release).items()}
