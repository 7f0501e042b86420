"""Files of stars by columns: fixed forms by their number of columns, tables by their names, with units."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galray.errors import GalrayError

__all__ = ["Columns", "read_columns"]

Array = NDArray[np.float64]

UNITS = {
    "ra": "deg",
    "dec": "deg",
    "x": "kpc",
    "y": "kpc",
    "velocity": "km/s",
    "velocity_error": "km/s",
    "membership": "",
    "pmra": "mas/yr",
    "pmdec": "mas/yr",
    "pmra_error": "mas/yr",
    "pmdec_error": "mas/yr",
    "v_x": "km/s",
    "v_y": "km/s",
}
"""galray's names of the columns and the unit of each inside; angles on the sky keep deg or rad."""

_GUESSES = {
    "ra": ("ra", "ra_deg", "raj2000", "ra_icrs"),
    "dec": ("dec", "dec_deg", "de", "dej2000", "de_icrs"),
    "x": ("x", "x_kpc"),
    "y": ("y", "y_kpc"),
    "velocity": ("velocity", "v", "v_los", "vlos", "vhel", "hrv", "rv", "radial_velocity", "v_kms"),
    "velocity_error": (
        "velocity_error",
        "v_error",
        "v_err",
        "e_v",
        "vlos_error",
        "vlos_err",
        "e_vlos",
        "v_los_error",
        "e_vhel",
        "e_hrv",
        "rv_error",
        "e_rv",
        "radial_velocity_error",
    ),
    "membership": ("membership", "p", "pmem", "p_mem", "p_member", "prob", "probability"),
    "pmra": ("pmra",),
    "pmdec": ("pmdec", "pmde"),
    "pmra_error": ("pmra_error", "e_pmra"),
    "pmdec_error": ("pmdec_error", "e_pmdec", "e_pmde"),
}
"""Names under which tables keep each column, tried in turn where `data.columns` does not say."""

_WALKER = {"ra": 0, "dec": 1, "velocity": 6, "velocity_error": 7, "membership": 15}
_WALKER_LIGHT = {"ra": 0, "dec": 1, "membership": 10}


@dataclass(frozen=True)
class Columns:
    """Columns of a file, each in galray's unit, with the rows they came from.

    Arguments:
        path: The file.
        values: Column by galray's name, shape (N,).
        rows: Row number in the file of each star, counted from 1.
        spelled: The file's own name of each column.
        units: Unit of each column; angles on the sky are ``deg`` or ``rad``.
        units_given: Units that the user or the file stated.
    """

    path: Path
    values: dict[str, Array]
    rows: NDArray[np.intp]
    spelled: dict[str, str]
    units: dict[str, str]
    units_given: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Array:
        return self.values[name]

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self.values)

    def take(self, rows: NDArray[np.intp]) -> Columns:
        """Some of the rows."""
        chosen = {name: column[rows] for name, column in self.values.items()}
        return replace(self, values=chosen, rows=self.rows[rows])

    def with_column(self, name: str, values: Array) -> Columns:
        """One more column."""
        return replace(self, values=self.values | {name: values}, units=self.units | {name: UNITS[name]})

    def in_degrees(self, name: str) -> Array:
        """An angle on the sky in degrees."""
        return np.degrees(self.values[name]) if self.units[name] == "rad" else self.values[name]

    def where(self, name: str, row: int | None = None) -> str:
        """The place of a value in words, for messages.

        Arguments:
            name: Column.
            row: Index of the star; none for the whole column.
        """
        spelled = self.spelled.get(name, name)
        place = f" row {self.rows[row]}" if row is not None else ""
        return f"{self.path}:{place} column {spelled}" if place else f"{self.path}: column {spelled}"

    def check_finite(self) -> None:
        """Refuse values that are no numbers.

        Raises:
            GalrayError: There is one; the message names its row and column.
        """
        for name, column in self.values.items():
            if (bad := ~np.isfinite(column)).any():
                row = int(np.flatnonzero(bad)[0])
                raise GalrayError(
                    f"{self.where(name, row)}: {column[row]} is no number ({bad.sum()} such rows)",
                    "remove those rows, or leave the column away if it is not needed",
                )


def read_columns(
    path: Path,
    form: str,
    columns: Mapping[str, str],
    units: Mapping[str, str],
    line_of_sight: str = "z",
    *,
    photometry: bool = False,
) -> Columns:
    """Read the columns that galray needs.

    Arguments:
        path: The file; text may be compressed by gzip.
        form: ``walker``, ``gaia_challenge``, ``table``, or ``auto``.
        columns: The file's columns by galray's names, for tables.
        units: Their units, for tables.
        line_of_sight: Axis along which six coordinates are seen.
        photometry: Positions (and memberships) alone are wanted.

    Raises:
        GalrayError: The file is absent, of no known form, or lacks a column.
    """
    if not path.is_file():
        raise GalrayError(f"{path}: no such file", "check the path in [data]")
    for name in (*columns, *units):
        if name not in UNITS:
            raise GalrayError(
                f"data.columns or data.units: '{name}' is no column that galray reads",
                f"known ones are {', '.join(UNITS)}",
            )
    if form == "table" or (form == "auto" and (columns or _is_table(path))):
        return _table(path, columns, units, photometry=photometry)
    numbers = _matrix(path)
    width = numbers.shape[1]
    if form == "auto":
        form = {25: "walker", 20: "walker", 6: "gaia_challenge"}.get(width, "")
    expected = {"walker": 20 if photometry else 25, "gaia_challenge": 6}.get(form)
    if expected is None or width != expected:
        wanted = f"{expected} columns of the form '{form}'" if expected else "6, 20 or 25 columns"
        raise GalrayError(
            f"{path}: {width} columns of numbers without names, not {wanted}",
            "set data.format = 'table' for a file with a header, and name its columns in data.columns",
        )
    rows = np.arange(1, len(numbers) + 1)
    if form == "walker":
        places = _WALKER_LIGHT if photometry else _WALKER
        chosen = {name: numbers[:, at] for name, at in places.items()}
        own = {name: UNITS[name] for name in places}
        if photometry:
            own |= {"ra": "rad", "dec": "rad"}
        spelled = {name: f"{at} ({name})" for name, at in places.items()}
        own |= {name: unit for name, unit in units.items() if name in ("ra", "dec")}
        return Columns(path, chosen, rows, spelled, own)
    depth = "xyz".index(line_of_sight)
    across = [axis for axis in range(3) if axis != depth]
    chosen = {
        "x": numbers[:, across[0]],
        "y": numbers[:, across[1]],
        "velocity": numbers[:, 3 + depth],
        "v_x": numbers[:, 3 + across[0]],
        "v_y": numbers[:, 3 + across[1]],
    }
    if photometry:
        chosen = {name: chosen[name] for name in ("x", "y")}
    return Columns(path, chosen, rows, {}, {name: UNITS[name] for name in chosen})


def _is_table(path: Path) -> bool:
    """Whether a file names its columns: by its ending, or because its first line holds words."""
    if path.suffix in (".parquet", ".ecsv", ".csv") or path.name.endswith((".csv.gz", ".ecsv.gz")):
        return True
    first = next(_lines(path), "")
    try:
        [float(word) for word in first.replace(",", " ").split()]
    except ValueError:
        return True
    return False


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rt") if packed else path.open("rt") as text:
            for line in text:
                if line.strip() and not line.startswith("#"):
                    yield line
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise GalrayError(f"{path}: cannot be read: {error}", "is the file whole, and is it text?") from None


def _matrix(path: Path) -> Array:
    rows = []
    width = 0
    for number, line in enumerate(_lines(path), 1):
        words = line.replace(",", " ").split()
        width = width or len(words)
        if len(words) != width:
            raise GalrayError(
                f"{path}: row {number} has {len(words)} values, the first {width}", "mend or remove that row"
            )
        try:
            rows.append([float(word) for word in words])
        except ValueError as error:
            raise GalrayError(f"{path}: row {number}: {error}", "mend or remove that row") from None
    if not rows:
        raise GalrayError(f"{path}: holds no rows", "is the file whole?")
    return np.array(rows)


def _table(path: Path, columns: Mapping[str, str], units: Mapping[str, str], *, photometry: bool) -> Columns:
    frame, stated = _frame(path)
    lower = {name.lower(): name for name in frame}
    found: dict[str, str] = {}
    for name in UNITS:
        given = columns.get(name)
        if given is not None:
            if given not in frame:
                raise GalrayError(
                    f"{path}: no column '{given}' (data.columns.{name})",
                    f"it has {', '.join(list(frame)[:30])}",
                )
            found[name] = given
            continue
        guess = next((lower[word] for word in _GUESSES.get(name, ()) if word in lower), None)
        if guess is not None:
            found[name] = guess
    if "ra" in found and "dec" in found and not ("x" in columns or "y" in columns):
        found.pop("x", None), found.pop("y", None)
    elif "x" in found and "y" in found:
        found.pop("ra", None), found.pop("dec", None)
    else:
        raise GalrayError(
            f"{path}: no positions: neither ra and dec nor x and y among {', '.join(list(frame)[:30])}",
            "name them in data.columns",
        )
    if photometry:
        found = {name: spelled for name, spelled in found.items() if name in _PLACES}
    elif "velocity" not in found:
        raise GalrayError(
            f"{path}: no column of velocities among {', '.join(list(frame)[:30])}",
            "name it in data.columns.velocity",
        )
    given_units = {name: units.get(name) or stated.get(spelled, "") for name, spelled in found.items()}
    values, own = {}, {}
    for name, spelled in found.items():
        values[name], own[name] = _convert(path, name, spelled, frame[spelled], given_units[name])
    rows = np.arange(1, len(next(iter(values.values()))) + 1)
    stated_units = {name: unit for name, unit in given_units.items() if unit}
    return Columns(path, values, rows, found, own, stated_units)


_PLACES = ("ra", "dec", "x", "y", "membership")


def _convert(path: Path, name: str, spelled: str, column: Any, unit: str) -> tuple[Array, str]:
    """A column as numbers in galray's unit; masked and empty values become NaN."""
    try:
        values = np.array(column, dtype=np.float64)
    except (TypeError, ValueError):
        raise GalrayError(
            f"{path}: column {spelled} holds no numbers", "angles in degrees, not h:m:s; velocities in km/s"
        ) from None
    if not unit or unit == UNITS[name]:
        return values, UNITS[name]
    from astropy import units as u

    try:
        have = u.Unit(unit)
        if name in ("ra", "dec"):
            if have == u.rad:
                return values, "rad"
            return values * have.to(u.deg), "deg"
        return values * have.to(u.Unit(UNITS[name])), UNITS[name]
    except (ValueError, u.UnitConversionError) as error:
        raise GalrayError(
            f"{path}: column {spelled} ({name}) in '{unit}': {error}",
            f"its unit must be one of {UNITS[name]}'s kind",
        ) from None


def _frame(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Columns of a table file by name, and the units that it states."""
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith((".ecsv", ".fits", ".vot", ".xml")):
            from astropy.table import Table

            table = Table.read(path)
            filled: dict[str, Any] = {
                n: np.ma.filled(np.ma.asarray(table[n], dtype=float), np.nan) for n in _numeric(table)
            }
            return filled, {n: str(table[n].unit) for n in filled if table[n].unit is not None}
        import polars as pl

        if name.endswith(".parquet"):
            frame = pl.read_parquet(path)
        else:
            separator = "," if "," in next(_lines(path), ",") else " "
            if separator == ",":
                frame = pl.read_csv(
                    path, comment_prefix="#", infer_schema_length=None, null_values=["null", "", "nan", "NaN"]
                )
            else:
                return _words(path), {}
    except GalrayError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GalrayError(f"{path}: not a table: {first}", "give CSV, ECSV or Parquet") from None
    return {n: frame[n].to_numpy() for n in frame.columns}, {}


def _numeric(table: Any) -> list[str]:
    return [name for name in table.colnames if table[name].dtype.kind in "fiu" and table[name].ndim == 1]


def _words(path: Path) -> dict[str, Any]:
    """A table of words between white space, its first line the names."""
    lines = [line.split() for line in _lines(path)]
    names = lines[0]
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(names):
            raise GalrayError(
                f"{path}: row {number} has {len(line)} values, not {len(names)}", "mend or remove that row"
            )
    return {name: np.array([line[at] for line in lines[1:]]) for at, name in enumerate(names)}
