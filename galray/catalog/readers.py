"""Star files of every form → batches of Polars rows with galray's column names and types."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from galray.catalog.columns import columns, polars_dtype, release_aliases
from galray.catalog.inputs import InputUnit
from galray.errors import GalrayError

__all__ = ["SHORT_ROW", "Source", "open_source"]

BATCH_ROWS = 100_000
"""Rows that are in memory at a time, whatever the size of the file."""

SHORT_ROW = "__short_row"
"""Extra column of the batches of ESA's bulk files: true for a row that ends too early."""

_HEAD_BYTES = 1 << 22
_AGAIN = "fetch or write the file again, or set catalog.allow_bad to leave such files out"


@dataclass(frozen=True)
class Source:
    """An input file whose form has been recognised.

    Arguments:
        path: The file.
        format: csv (gzipped or not, with or without ECSV header), parquet, fits, votable or ecsv (those forms
            of ECSV that are not comma separated).
        names: Galray's name of each column → the file's own.
        release: Gaia release whose types apply to columns of its names.
        null_token: True where missing values are written ``null``, as in ESA's bulk files.
        first_row: Number of the file's rows that are passed over, where a unit is a part of it.
    """

    path: Path | str
    format: str
    names: Mapping[str, str]
    release: str
    null_token: bool = False
    header: tuple[str, ...] = field(default=(), repr=False)
    first_row: int = 0

    def kind(self) -> str | None:
        """``gaia`` or ``states`` by the columns that are there; None for neither."""
        if {"ra", "dec", "parallax", "pmra", "pmdec"} <= set(self.names):
            return "gaia"
        if {"x", "y", "z", "vx", "vy", "vz"} <= set(self.names):
            return "states"
        return None

    def require(self, wanted: Sequence[str], what: str, remedy: str) -> None:
        """Check that columns are there.

        Raises:
            GalrayError: One is absent; `what` says what the file then is not.
        """
        absent = [name for name in wanted if name not in self.names]
        if absent:
            have = ", ".join(list(self.names)[:6])
            raise GalrayError(
                f"{self.path}: {what}: column(s) {', '.join(absent)} absent; it has {have}, …", remedy
            )

    def batches(self, wanted: Sequence[str], rows: int = BATCH_ROWS) -> Iterator[pl.DataFrame]:
        """The columns `wanted` in batches, in the file's row order.

        Types are Gaia's for its column names; NaN becomes missing. Batches of files that write missing
        values out have one column more, `SHORT_ROW`.

        Raises:
            GalrayError: The file is truncated, corrupt, or holds text in a number's column.
        """
        try:
            if self.format == "csv":
                yield from self._lazy(self._scan_csv(), wanted, rows)
            elif self.format == "parquet":
                yield from self._lazy(pl.scan_parquet(self.path, glob=False), wanted, rows)
            else:
                yield from _tidied(_astropy_table(self, wanted), wanted, self._dtypes(wanted)).iter_slices(
                    rows
                )
        except pl.exceptions.NoDataError:
            raise GalrayError(f"{self.path}: the file is empty", _AGAIN) from None
        except (pl.exceptions.PolarsError, OSError, EOFError, ValueError, zlib.error) as error:
            raise self._explained(error) from None

    def _dtypes(self, wanted: Sequence[str]) -> dict[str, pl.DataType]:
        known = polars_dtype(self.release)
        return {name: known[name] for name in wanted if name in known}

    def _scan_csv(self) -> pl.LazyFrame:
        known = polars_dtype(self.release)
        ours = {theirs: name for name, theirs in self.names.items()}
        overrides: dict[str, Any] = {t: known[ours[t]] for t in self.header if ours[t] in known}
        nulls: Any = ["null", ""]
        if self.null_token:
            nulls = dict.fromkeys(self.header[:-1], "null")
            overrides[self.header[-1]] = pl.String()
        return pl.scan_csv(
            self.path,
            comment_prefix="#",
            null_values=nulls,
            schema_overrides=overrides,
            infer_schema_length=2000,
            glob=False,
        )

    def _lazy(self, lazy: pl.LazyFrame, wanted: Sequence[str], rows: int) -> Iterator[pl.DataFrame]:
        selection = [pl.col(self.names[name]).alias(name) for name in wanted]
        if self.null_token:
            # Polars fills a row that ends too early with nulls. Where missing values are written out, the
            # last cell is never empty, so an empty one gives such rows away.
            last = pl.col(self.header[-1])
            selection = [
                pl.col(self.names[name]).replace("null", None).alias(name)
                if self.names[name] == self.header[-1]
                else column
                for name, column in zip(wanted, selection, strict=True)
            ]
            selection.append(last.is_null().alias(SHORT_ROW))
        dtypes = self._dtypes(wanted)
        for batch in lazy.select(selection).collect_batches(chunk_size=rows, maintain_order=True):
            yield _tidied(batch, wanted, dtypes)

    def _explained(self, error: Exception) -> GalrayError:
        """Turn a library's error into one that names file, column and row."""
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        found = re.search(r"could not parse `(.*)` as dtype `\w+` at column '(.+?)'", text)
        if found:
            value, theirs = found.groups()
            row = self._row_of(theirs, value)
            where = f"row {row}, " if row is not None else ""
            return GalrayError(f"{self.path}: {where}column '{theirs}': '{value}' is not a number", _AGAIN)
        if isinstance(error, FileNotFoundError):
            return GalrayError(f"{self.path}: no such file", "correct catalog.files")
        if isinstance(error, PermissionError):
            return GalrayError(f"{self.path}: permission denied", "make the file readable")
        if re.search(
            r"unexpected end of file|end-of-stream|corrupt|checksum|incomplete", text, re.IGNORECASE
        ):
            return GalrayError(f"{self.path}: the file is truncated or corrupt: {text}", _AGAIN)
        return GalrayError(f"{self.path}: cannot be read as {self.format}: {text}", _AGAIN)

    def _row_of(self, column: str, value: str) -> int | None:
        """The first data row, from 1, whose cell in a CSV column is `value`."""
        with suppress(Exception):
            lazy = pl.scan_csv(self.path, comment_prefix="#", infer_schema=False, glob=False)
            rows = lazy.select(column).with_row_index().filter(pl.col(column) == value).head(1).collect()
            return int(rows["index"][0]) + 1
        return None


def open_source(
    unit: InputUnit | Path | str, release: str = "dr3", rename: Mapping[str, str] | None = None
) -> Source:
    """Recognise a unit of input, or a file, by its content.

    Known are ESA's bulk ``csv.gz``, plain CSV, Parquet, and FITS, VOTable and ECSV tables. Column names are
    compared in lower case where they are Gaia's; `rename` maps others (``{theirs: ours}``).

    Raises:
        GalrayError: There is no such file, it is empty, unreadable or of no known form.
    """
    path = Path(unit.path if isinstance(unit, InputUnit) else unit)
    if not path.is_file():
        raise GalrayError(f"{path}: no such file", "correct the path")
    try:
        with path.open("rb") as stream:
            raw = stream.read(65536)
        if not raw:
            raise GalrayError(f"{path}: the file is empty", _AGAIN)
        head = _head(path) if raw[:2] == b"\x1f\x8b" else raw
    except OSError as error:
        raise GalrayError(f"{path}: cannot be read: {error.strerror or error}", _AGAIN) from None
    if raw[:4] == b"PAR1":
        try:
            theirs = list(pl.read_parquet_schema(path))
        except (pl.exceptions.PolarsError, OSError) as error:
            text = str(error).splitlines()[0]
            raise GalrayError(f"{path}: the Parquet file is truncated or corrupt: {text}", _AGAIN) from None
        return Source(path, "parquet", _names(theirs, release, rename), release, header=tuple(theirs))
    if head[:9] == b"SIMPLE  =":
        return _via_astropy(path, "fits", release, rename)
    if re.match(rb"\s*(<\?xml|<!DOCTYPE|<VOTABLE)", head[:200]):
        return _via_astropy(path, "votable", release, rename)
    return _open_text(path, head, raw, release, rename)


def _open_text(path: Path, head: bytes, raw: bytes, release: str, rename: Mapping[str, str] | None) -> Source:
    """A text table: its first line that is not a comment is the header."""
    if b"\0" in head[:4096]:
        raise GalrayError(
            f"{path}: not a table of a known form",
            "give Gaia csv(.gz), Parquet, FITS, VOTable or ECSV files",
        )
    if head[:1] == b"#" and raw[:2] != b"\x1f\x8b":
        head = _head(path, plain=True)
    lines = head.decode("utf-8", errors="replace").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    body = [line for line in lines if line and not line.startswith("#")]
    if not body:
        raise GalrayError(f"{path}: no header line with column names in it", _AGAIN)
    is_ecsv = any("%ECSV" in line for line in comments[:1])
    if is_ecsv and not any(re.match(r"#\s*delimiter:\s*['\"]?,", line) for line in comments):
        return _via_astropy(path, "ecsv", release, rename)
    header = next(csv.reader([body[0]]))
    if len(header) < 2 or any(re.fullmatch(r"\s*[-+.\d][-+.\deE]*\s*", cell) for cell in header):
        raise GalrayError(
            f"{path}: its first line is not a header of comma-separated column names: '{body[0][:60]}'",
            "give a table with a header, such as a Gaia csv(.gz) or Parquet file",
        )
    null_token = len(body) > 1 and "null" in body[1].split(",") and is_ecsv
    return Source(path, "csv", _names(header, release, rename), release, null_token, tuple(header))


def _head(path: Path, plain: bool = False) -> bytes:
    """Enough of a text file's beginning to hold its comments, header and first rows."""
    content = b""
    with ExitStack() as stack:
        stream: Any = stack.enter_context((open if plain else gzip.open)(path, "rb"))
        with suppress(EOFError, zlib.error):
            # A file cut in its first block: what there is may still name the columns; reading it will fail.
            while len(content) < _HEAD_BYTES:
                block = stream.read(1 << 16)
                content += block
                tail = content.rsplit(b"\n", 1)[0] if block else content
                if not block or sum(not line.startswith(b"#") for line in tail.splitlines()) > 2:
                    return tail
    if not content:
        raise GalrayError(f"{path}: the file is truncated or corrupt", _AGAIN)
    return content


def _names(theirs: Sequence[str], release: str, rename: Mapping[str, str] | None) -> dict[str, str]:
    """Galray's name of each column → the file's own; a name given in `rename` wins."""
    given, aliases, known = dict(rename or {}), release_aliases(release), polars_dtype(release)
    names: dict[str, str] = {}
    for name in theirs:
        lower = name.lower()
        # VOTables write SOURCE_ID and the like in capitals; columns that are not Gaia's keep their case.
        ours = given.get(name) or aliases.get(lower) or (lower if lower in known else name)
        if ours not in names or name in given:
            names[ours] = name
        else:
            names.setdefault(name, name)
    return names


def _via_astropy(path: Path, form: str, release: str, rename: Mapping[str, str] | None) -> Source:
    table = _read_astropy(path, form)
    return Source(path, form, _names(table.colnames, release, rename), release, header=tuple(table.colnames))


def _read_astropy(path: Path | str, form: str) -> Any:
    import warnings

    from astropy.table import Table

    formats = {"fits": "fits", "votable": "votable", "ecsv": "ascii.ecsv"}
    options: dict[str, Any] = {"use_names_over_ids": True} if form == "votable" else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # units and dates that the standards spell otherwise
            return Table.read(path, format=formats[form], **options)
    except Exception as error:  # astropy raises nearly anything on broken files
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise GalrayError(f"{path}: cannot be read as {form}: {text}", _AGAIN) from None


def _astropy_table(source: Source, wanted: Sequence[str]) -> pl.DataFrame:
    """The wanted columns of a FITS, VOTable or ECSV table; units other than Gaia's are converted."""
    import numpy as np
    from astropy import units as u

    table = _read_astropy(source.path, source.format)
    units = {column.name: column.unit for column in columns(source.release)}
    frame: dict[str, pl.Series] = {}
    for name in wanted:
        column = table[source.names[name]]
        mask = np.asarray(getattr(column, "mask", False))
        values = np.ma.getdata(column) if hasattr(column, "mask") else np.asarray(column)
        values = np.asarray(getattr(values, "value", values))
        if values.ndim > 1:
            raise GalrayError(f"{source.path}: column '{name}' holds arrays, not one value per star")
        if values.dtype.kind == "S":
            values = np.char.decode(values, "utf-8")
        if values.dtype.kind == "f" and column.unit is not None and units.get(name):
            with suppress(u.UnitsError, ValueError, TypeError, AttributeError):
                values = values * column.unit.to(u.Unit(units[name], parse_strict="silent"))
        if values.dtype.byteorder not in "=|":
            values = values.astype(values.dtype.newbyteorder("="))
        series = pl.Series(name, values.tolist() if values.dtype.kind == "O" else values)
        frame[name] = series.set(pl.Series(mask), None) if mask.ndim and mask.any() else series
    return pl.DataFrame(frame)


def _tidied(batch: pl.DataFrame, wanted: Sequence[str], dtypes: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """Gaia's types, NaN as missing."""
    extra = [name for name in batch.columns if name not in wanted]
    expressions = []
    for name in (*wanted, *extra):
        value = pl.col(name)
        kind = batch.schema[name]
        if kind.is_float():
            value = value.fill_nan(None)
        if name in dtypes and kind != dtypes[name]:
            # A wider type of the file is kept: Gaia's own only says how its text is to be read.
            if not (kind.is_numeric() and dtypes[name].is_numeric()):
                value = value.cast(dtypes[name])
            elif name == "source_id":
                value = value.cast(pl.Int64)
        expressions.append(value)
    return batch.select(expressions)
