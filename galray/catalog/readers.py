"""Star files of every form → batches of Polars rows with galray's column names and types."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from isal import igzip

from galray.catalog import hdf5, tables
from galray.catalog.columns import polars_dtype, release_aliases
from galray.catalog.inputs import InputUnit
from galray.catalog.storage import CorruptStream, Storage, StorageSettings, decompressed, explained
from galray.catalog.text import BadCell, LongRow, TextTable
from galray.errors import GalrayError

if TYPE_CHECKING:
    from galray.catalog.settings import CatalogSettings, StatesSettings

__all__ = ["SHORT_ROW", "Source", "open_source", "open_unit"]

BATCH_ROWS = 100_000
"""Rows that are in memory at a time, whatever the size of the file."""

SHORT_ROW = "__short_row"
"""Extra column of the batches of ESA's bulk files: true for a row that ends too early."""

_HEAD_BYTES = 1 << 22
_READ_ERRORS = (pl.exceptions.PolarsError, OSError, EOFError, ValueError, CorruptStream)
_BROKEN = r"end of file|end-of-stream|corrupt|checksum|incomplete|CRC|data produced|out of spec|thrift"
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
        header: All column names in the file's order.
        first_row: Number of the file's rows before the first that is read, where a unit is a part of it.
        num_rows: Number of rows that are read; None for all.
        storage: How the file is opened.
        states: Where an HDF5 snapshot holds its particles.
        constants: Columns of one value, which the folders of a partitioned Parquet table name
            (``survey=x/part.parquet``).
    """

    path: Path | str
    format: str
    names: Mapping[str, str]
    release: str
    null_token: bool = False
    header: tuple[str, ...] = field(default=(), repr=False)
    first_row: int = 0
    num_rows: int | None = None
    storage: Storage = field(default_factory=Storage, repr=False)
    states: StatesSettings | None = field(default=None, repr=False)
    constants: Mapping[str, str | int | float | None] = field(default_factory=dict, repr=False)

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

    def batches(self, wanted: Sequence[str], rows: int | None = None) -> Iterator[pl.DataFrame]:
        """The columns `wanted` in batches of at most `rows` (`BATCH_ROWS`), in the file's row order.

        Types are Gaia's for its column names; NaN becomes missing. Batches of files that write missing
        values out have one column more, `SHORT_ROW`.

        Raises:
            GalrayError: The file is truncated, corrupt, or holds text in a number's column.
        """
        dtypes = self._dtypes(wanted)
        rows = rows or BATCH_ROWS
        try:
            if self.format == "csv":
                frames = self._text(wanted)
            elif self.format == "parquet":
                frames = self._parquet(wanted, rows)
            elif self.format == "hdf5":
                frames = hdf5.frames(self.path, self.states, wanted, rows, self.storage)
            else:
                frames = iter(
                    [tables.frame(self.path, self.format, self.names, wanted, self.release, self.storage)]
                )
            for frame in _in_batches(frames, rows):
                yield _tidied(frame, wanted, dtypes)
        except BadCell as error:
            where = f"row {error.row}, " if error.row is not None else ""
            what = f"column '{error.column}': '{error.value}' is not {self._meant(error.column)}"
            raise GalrayError(f"{self.path}: {where}{what}", _AGAIN) from None
        except LongRow as error:
            where = f"row {error.row}" if error.row is not None else "a row"
            raise GalrayError(f"{self.path}: {where} has more cells than the header", _AGAIN) from None
        except _READ_ERRORS as error:
            raise self._explained(error) from None

    def _dtypes(self, wanted: Sequence[str]) -> dict[str, pl.DataType]:
        known = polars_dtype(self.release)
        return {name: known[name] for name in wanted if name in known}

    def _meant(self, theirs: str) -> str:
        """What a cell of a column should be, in words."""
        ours = next((name for name, other in self.names.items() if other == theirs), theirs)
        return "True or False" if polars_dtype(self.release).get(ours) == pl.Boolean else "a number"

    def _text(self, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
        known = polars_dtype(self.release)
        dtypes = {theirs: known[name] for name, theirs in self.names.items() if name in known}
        # Quotes of ESA's bulk files hold no line ends.
        table = TextTable(self.header, dtypes, self.null_token, quoted_newlines=not self.null_token)
        theirs = [self.names[name] for name in wanted]
        ours = dict(zip(theirs, wanted, strict=True))
        with decompressed(self.storage.open(self.path)) as stream:
            for frame in table.frames(stream, theirs, SHORT_ROW):
                yield frame.rename(ours)

    def _parquet(self, wanted: Sequence[str], rows: int) -> Iterator[pl.DataFrame]:
        lazy = pl.scan_parquet(
            self.path,
            glob=False,
            hive_partitioning=False,
            storage_options=self.storage.polars_options(self.path),
        )
        if self.num_rows is not None:
            lazy = lazy.slice(self.first_row, self.num_rows)
        lazy = lazy.with_columns(pl.lit(value).alias(name) for name, value in self.constants.items())
        selection = [pl.col(self.names[name]).alias(name) for name in wanted]
        yield from lazy.select(selection).collect_batches(chunk_size=rows, maintain_order=True)

    def _explained(self, error: Exception) -> GalrayError:
        """Turn a library's error into one that names the file."""
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pl.exceptions.NoDataError):
            return GalrayError(f"{self.path}: the file is empty", _AGAIN)
        if isinstance(error, FileNotFoundError):
            return GalrayError(f"{self.path}: no such file", "correct catalog.files")
        if isinstance(error, PermissionError):
            return GalrayError(f"{self.path}: permission denied", "make the file readable")
        if isinstance(error, CorruptStream) or re.search(_BROKEN, text, re.IGNORECASE):
            return GalrayError(f"{self.path}: the file is truncated or corrupt: {text}", _AGAIN)
        return GalrayError(f"{self.path}: cannot be read as {self.format}: {text}", _AGAIN)


def open_source(
    unit: InputUnit | Path | str,
    release: str = "dr3",
    rename: Mapping[str, str] | None = None,
    *,
    storage: StorageSettings | None = None,
    states: StatesSettings | None = None,
) -> Source:
    """Recognise a unit of input, or a file, by its content.

    Known are ESA's bulk ``csv.gz``, plain CSV, Parquet, FITS, VOTable and ECSV tables, and HDF5 snapshots.
    Column names are compared in lower case where they are Gaia's; `rename` maps others (``{theirs: ours}``).

    Arguments:
        unit: A unit of an ingest, a path or a URL.
        release: Gaia release whose column types apply.
        rename: Columns of the file that carry other names.
        storage: How an object store is reached.
        states: Where an HDF5 snapshot holds its particles.

    Raises:
        GalrayError: There is no such file, it is empty, unreadable or of no known form.
    """
    if not isinstance(unit, InputUnit):
        unit = InputUnit(str(unit), 0, "")
    where = Storage(storage)
    path: Path | str = Path(unit.path) if unit.is_local else unit.path
    if isinstance(path, Path) and not path.is_file():
        raise GalrayError(f"{path}: no such file", "correct the path")
    try:
        with explained(unit.path) if not unit.is_local else nullcontext(), where.open(path) as stream:
            raw = stream.read(65536)
            if not raw:
                raise GalrayError(f"{path}: the file is empty", _AGAIN)
            if raw[:4] == b"PAR1":
                return _open_parquet(path, unit, stream, release, rename, where)
            stream.seek(0)
            head = _head(path, stream, raw)
    except OSError as error:
        raise GalrayError(f"{path}: cannot be read: {error.strerror or error}", _AGAIN) from None
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        theirs = hdf5.column_names(path, states, where)
        names = {name: name for name in theirs}
        return Source(path, "hdf5", names, release, header=tuple(theirs), storage=where, states=states)
    if head[:9] == b"SIMPLE  =":
        return _via_astropy(path, "fits", release, rename, where)
    if re.match(rb"\s*(<\?xml|<!DOCTYPE|<VOTABLE)", head[:200]):
        return _via_astropy(path, "votable", release, rename, where)
    return _open_text(path, head, release, rename, where)


def open_unit(unit: InputUnit, settings: CatalogSettings) -> Source:
    """`open_source` with what a configuration says of the files."""
    how = {"storage": settings.storage, "states": settings.states}
    return open_source(unit, settings.release, settings.rename, **how)  # type: ignore[arg-type]


def _open_parquet(
    path: Path | str,
    unit: InputUnit,
    stream: BinaryIO,
    release: str,
    rename: Mapping[str, str] | None,
    storage: Storage,
) -> Source:
    """A Parquet file, or a range of its row groups, by its footer."""
    first, rows = 0, None
    try:
        footer = pq.ParquetFile(stream)
        theirs = footer.schema_arrow.names
        if unit.row_groups is not None:
            counts = [footer.metadata.row_group(i).num_rows for i in range(footer.metadata.num_row_groups)]
            begin, end = unit.row_groups
            first, rows = sum(counts[:begin]), sum(counts[begin:end])
    except (pa.ArrowException, OSError) as error:
        text = str(error).splitlines()[0]
        raise GalrayError(f"{path}: the Parquet file is truncated or corrupt: {text}", _AGAIN) from None
    constants = {name: value for name, value in _folder_columns(path).items() if name not in theirs}
    return Source(
        path,
        "parquet",
        _names([*theirs, *constants], release, rename),
        release,
        header=tuple(theirs),
        first_row=first,
        num_rows=rows,
        storage=storage,
        constants=constants,
    )


def _folder_columns(path: Path | str) -> dict[str, str | int | float | None]:
    """What the folders of a path say of all rows (``name=value``), but for those of HATS."""
    found: dict[str, str | int | float | None] = {}
    for part in str(path).split("/")[:-1]:
        name, sign, text = part.partition("=")
        if not sign or not name.isidentifier() or name in ("Norder", "Dir", "Npix"):
            continue
        value: str | int | float | None = unquote(text)
        for kind in (float, int):
            with suppress(ValueError):
                value = kind(text)
        found[name] = None if text in ("", "__HIVE_DEFAULT_PARTITION__") else value
    return found


def _open_text(
    path: Path | str, head: bytes, release: str, rename: Mapping[str, str] | None, storage: Storage
) -> Source:
    """A text table: its first line that is not a comment is the header."""
    unknown = GalrayError(
        f"{path}: not a table of a known form",
        "give Gaia csv(.gz), Parquet, FITS, VOTable, ECSV or HDF5 files",
    )
    if b"\0" in head[:4096]:
        raise unknown
    lines = head.decode("utf-8-sig", errors="replace").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    body = [line for line in lines if line.strip() and not line.startswith("#")]
    if not body:
        raise GalrayError(f"{path}: no header line with column names in it", _AGAIN)
    if "\ufffd" in body[0]:  # no text: bytes that no encoding of column names holds
        raise unknown
    is_ecsv = any("%ECSV" in line for line in comments[:1])
    if is_ecsv and not any(re.match(r"#\s*delimiter:\s*['\"]?,", line) for line in comments):
        return _via_astropy(path, "ecsv", release, rename, storage)
    header = next(csv.reader([body[0]]))
    if len(header) < 2 or any(re.fullmatch(r"\s*[-+.\d][-+.\deE]*\s*", cell) for cell in header):
        raise GalrayError(
            f"{path}: its first line is not a header of comma-separated column names: '{body[0][:60]}'",
            "give a table with a header, such as a Gaia csv(.gz) or Parquet file",
        )
    null_token = len(body) > 1 and "null" in body[1].split(",") and is_ecsv
    names = _names(header, release, rename)
    return Source(path, "csv", names, release, null_token, tuple(header), storage=storage)


def _head(path: Path | str, stream: BinaryIO, raw: bytes) -> bytes:
    """Enough of a file's beginning to hold its comments, header and first rows."""
    packed = raw[:2] == b"\x1f\x8b"
    if not packed and not raw.startswith(b"#"):
        return raw
    content = b""
    plain: Any = igzip.IGzipFile(fileobj=stream) if packed else stream
    with suppress(EOFError, CorruptStream):
        # A file cut in its first block: what there is may still name the columns; reading it will fail.
        while len(content) < _HEAD_BYTES:
            block = plain.read(1 << 16)
            content += block
            tail = content.rsplit(b"\n", 1)[0] if block else content
            if not block or sum(not line.startswith(b"#") for line in tail.splitlines()) > 2:
                return content if b"\0" in content else tail
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


def _via_astropy(
    path: Path | str, form: str, release: str, rename: Mapping[str, str] | None, storage: Storage
) -> Source:
    table = tables.read(path, form, storage)
    names = _names(table.colnames, release, rename)
    return Source(path, form, names, release, header=tuple(table.colnames), storage=storage)


def _in_batches(frames: Iterator[pl.DataFrame], rows: int) -> Iterator[pl.DataFrame]:
    """Frames of any height as batches of `rows`: small ones are joined, large ones cut."""
    held: list[pl.DataFrame] = []
    count = 0
    for frame in frames:
        held.append(frame)
        count += frame.height
        if count >= rows:
            joined = pl.concat(held, rechunk=True) if len(held) > 1 else held[0]
            whole = count // rows * rows
            yield from joined[:whole].iter_slices(rows)
            held, count = [joined[whole:]], count - whole
    if count:
        yield pl.concat(held, rechunk=True)


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
