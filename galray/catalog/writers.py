"""Tables → files in Gaia's own bulk form: ``GaiaSource_AAAAAA-BBBBBB.csv.gz`` as ESA publishes them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from galray.catalog.columns import Column, columns, polars_dtype, release_aliases
from galray.errors import GalrayError

__all__ = ["HEALPIX8_SHIFT", "ecsv_header", "write_gaia_source"]

HEALPIX8_SHIFT = 43
"""A Gaia ``source_id`` shifted right by this many bits is its nested HEALPix pixel of level 8."""


def ecsv_header(release: str = "dr3") -> str:
    """The commented ECSV header of a bulk file: every column's name, type and unit."""
    lines = ["%ECSV 1.0", "---", "delimiter: ','", "meta: !!omap", f"- RELEASE: Gaia {release.upper()}"]
    lines += ["- TABLE: gaia_source", "datatype:"]
    for column in columns(release):
        lines += ["-", f"  name: {column.name}", f"  datatype: {column.dtype}"]
        if column.unit:
            quoted = column.unit.replace("'", "''")
            lines.append(f"  unit: '{quoted}'" if set(column.unit) & set("'(") else f"  unit: {column.unit}")
    return "".join(f"# {line}\n" for line in lines)


def write_gaia_source(
    table: Any, folder: Path | str, *, rows_per_file: int = 500_000, release: str = "dr3"
) -> list[Path]:
    """Write stars as genuine ``gaia_source`` bulk files.

    Every column of the release is written in its official order; those that the table lacks hold
    ``null`` throughout. Missing values and NaN are ``null``, strings and booleans stand in double quotes.
    Stars are sorted by ``source_id`` and cut into files at borders of HEALPix level-8 pixels, which name
    the files by the first and last pixel that they hold.

    Arguments:
        table: A Polars DataFrame or pyarrow Table with columns named as in Gaia's table.
        folder: Where the files go; it is created.
        rows_per_file: Wished number of rows in a file; a single pixel is never split.
        release: Which release's form.

    Returns:
        The files written, in sky order.

    Raises:
        GalrayError: ``source_id`` is absent, missing or negative, the table is empty, a column is not of
            the release or does not fit its type, or the folder cannot be written.
    """
    frame = _official(table, release)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [
            _write_file(part, folder, columns(release), ecsv_header(release))
            for part in _split(frame, rows_per_file)
        ]
    except OSError as error:
        raise GalrayError(f"{folder}: cannot write Gaia files: {error}", "choose a writable folder") from None


def _official(table: Any, release: str) -> pl.DataFrame:
    """The table with official names, types and order of its columns, sorted by source_id."""
    converted = table if isinstance(table, pl.DataFrame) else pl.from_arrow(table)
    assert isinstance(converted, pl.DataFrame)
    frame = converted.rename({v: k for k, v in release_aliases(release).items()}, strict=False)
    dtypes = polars_dtype(release)
    official = [column.name for column in columns(release)]
    if unknown := sorted(set(frame.columns) - set(official)):
        raise GalrayError(
            f"column(s) {', '.join(unknown)} are not in Gaia {release.upper()}'s gaia_source",
            "drop or rename them before writing",
        )
    if "source_id" not in frame.columns or frame.height == 0:
        what = (
            "the table has no rows" if "source_id" in frame.columns else "the table has no column source_id"
        )
        raise GalrayError(what, "give at least one star with a source_id")
    if frame["source_id"].null_count() or frame["source_id"].min() < 0:  # type: ignore[operator]
        raise GalrayError("source_id has missing or negative values", "give every star a Gaia source_id")
    names = [name for name in official if name in frame.columns]
    try:
        frame = frame.select(pl.col(name).cast(dtypes[name]) for name in names)
    except pl.exceptions.PolarsError as error:
        raise GalrayError(f"a column does not fit its Gaia type: {str(error).splitlines()[0]}") from None
    return frame.sort("source_id")


def _split(frame: pl.DataFrame, rows_per_file: int) -> list[pl.DataFrame]:
    """Cut sorted stars at pixel borders into near-equal parts of about `rows_per_file` rows."""
    pixel = (frame["source_id"] // (1 << HEALPIX8_SHIFT)).to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], pixel[1:] != pixel[:-1]]))
    count = max(1, -(-frame.height // rows_per_file))
    wished = np.arange(1, count) * frame.height / count
    cuts = starts[np.clip(np.searchsorted(starts, wished), 0, len(starts) - 1)]
    edges = np.unique(np.concatenate([[0], cuts, [frame.height]]))
    return [frame[int(a) : int(b)] for a, b in pairwise(edges)]


def _write_file(frame: pl.DataFrame, folder: Path, table: tuple[Column, ...], header: str) -> Path:
    """Write one file. Neighbouring absent columns are one constant text cell, which makes it fast."""
    cells: list[pl.Expr] = []
    names: list[str] = []
    absent: list[str] = []

    def flush() -> None:
        if absent:
            cells.append(pl.lit(",".join(["null"] * len(absent))).alias(",".join(absent)))
            names.append(",".join(absent))
            absent.clear()

    for column in table:
        if column.name not in frame.columns:
            absent.append(column.name)
            continue
        flush()
        names.append(column.name)
        cells.append(_cell(column).alias(column.name))
    flush()
    # The header travels as the first column's name, so that one compressed stream holds the whole file.
    names[0] = header + names[0]
    rows = frame.select(cells)
    rows.columns = names
    first, last = (int(frame["source_id"][i]) >> HEALPIX8_SHIFT for i in (0, -1))
    path = folder / f"GaiaSource_{first:06d}-{last:06d}.csv.gz"
    rows.write_csv(path, compression="gzip", compression_level=1, quote_style="never", null_value="null")
    return path


def _cell(column: Column) -> pl.Expr:
    value = pl.col(column.name)
    if column.dtype == "bool":
        return pl.when(value).then(pl.lit('"True"')).when(~value).then(pl.lit('"False"'))
    if column.dtype == "string":
        return pl.lit('"') + value.str.replace_all('"', '""', literal=True) + pl.lit('"')
    return value.fill_nan(None) if column.dtype.startswith("float") else value
