"""Positions from a user's table: Galactocentric x, y, z, or ICRS ra, dec and distance; bad rows are named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.tables import read_table

__all__ = ["Positions", "read_positions"]

Array = NDArray[np.float64]

COLUMNS = (("x", "y", "z"), ("ra", "dec", "distance"))
LENGTHS = ("kpc", "pc")


@dataclass(frozen=True)
class Positions:
    """Positions with the table they came from.

    Attributes:
        x: Galactocentric, shape (n, 3), kpc.
        table: The table as it was read, whose other columns a result carries along.
        columns: The columns that were positions.
        source: Name of the file, for messages.
    """

    x: Array
    table: Any
    columns: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.x)

    def row(self, index: int) -> str:
        """A row as messages name it, counted from 1 (without the header)."""
        return f"{self.source}: row {index + 1}"


def read_positions(path: str | Path, frame: GalacticFrame | None = None, *, unit: str = "kpc") -> Positions:
    """Read positions from an ECSV, CSV, FITS or Parquet table.

    The columns are ``x, y, z`` in galray's Galactocentric frame, or ``ra, dec`` (ICRS) and ``distance``.
    Columns that carry a unit are converted; bare numbers are degrees, and lengths in `unit`.

    Arguments:
        path: The table.
        frame: The Galactocentric frame.
        unit: ``kpc`` or ``pc``, of lengths without a unit.

    Raises:
        GalrayError: Columns are absent, a unit is of another kind, or a row is not a position.
    """
    if unit not in LENGTHS:
        raise GalrayError(f"unit {unit!r}", "give kpc or pc")
    table = read_table(path)
    source = Path(path).name
    if len(table) == 0:
        raise GalrayError(f"{source}: has no rows", "give one position or more")
    names = next((c for c in COLUMNS if set(c) <= set(table.colnames)), None)
    if names is None:
        raise GalrayError(
            f"{source}: has the columns {', '.join(table.colnames)}",
            "give x, y, z (Galactocentric), or ra, dec and distance (ICRS)",
        )
    units = (unit, unit, unit) if names == COLUMNS[0] else ("deg", "deg", unit)
    values = np.stack([_column(table, n, s, source) for n, s in zip(names, units, strict=True)], -1)
    lengths = [i for i, s in enumerate(units) if s != "deg"]
    values[:, lengths] *= 1.0 if unit == "kpc" else 1e-3
    if names == COLUMNS[1]:
        _check_sky(values, source)
        values = _galactocentric(values, frame or GalacticFrame())
    return Positions(values, table, names, source)


def _column(table: Any, name: str, unit: str, source: str) -> Array:
    """One column as numbers in the unit that bare numbers would have had."""
    from astropy import units as u

    column = table[name]
    given = getattr(column, "unit", None)
    if given is not None:
        try:
            column = u.Quantity(column).to_value(unit)
        except u.UnitConversionError:
            raise GalrayError(
                f"{source}: column {name} is in '{given}'", f"give it in {unit}, or in what converts to it"
            ) from None
    mask = np.ma.getmaskarray(np.ma.asarray(column))
    raw = np.ma.getdata(np.ma.asarray(column))
    if raw.dtype.kind not in "fiu":
        raw = np.array([_number(value, name, i, source) for i, value in enumerate(raw)])
    values: Array = raw.astype(np.float64)
    bad = np.flatnonzero(mask | ~np.isfinite(values))
    if bad.size:
        more = f" (and {bad.size - 1} more rows)" if bad.size > 1 else ""
        text = "is empty" if mask[bad[0]] else f"= {values[bad[0]]}"
        raise GalrayError(f"{source}: row {bad[0] + 1}: {name} {text}{more}", "give a number in every row")
    return values


def _number(value: Any, name: str, row: int, source: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise GalrayError(
            f"{source}: row {row + 1}: {name} = {str(value)!r} is not a number", "give a number in every row"
        ) from None


def _check_sky(values: Array, source: str) -> None:
    for bad, text in (
        (np.abs(values[:, 1]) > 90, "dec = {:g}° lies beyond ±90°"),
        (values[:, 2] <= 0, "distance = {:g} kpc is not above zero"),
    ):
        rows = np.flatnonzero(bad)
        if rows.size:
            value = values[rows[0], 1 if "dec" in text else 2]
            raise GalrayError(
                f"{source}: row {rows[0] + 1}: {text.format(value)}", "mend or leave out the row"
            )


def _galactocentric(values: Array, frame: GalacticFrame) -> Array:
    """ICRS (ra deg, dec deg, distance kpc) to Galactocentric positions in kpc."""
    ra, dec = np.radians(values[:, 0]), np.radians(values[:, 1])
    direction = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], -1)
    rotation = np.array(frame.icrs_to_galactocentric())
    return values[:, 2:] * (direction @ rotation.T) + np.array(frame.sun_position)
