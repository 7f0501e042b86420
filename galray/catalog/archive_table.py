"""Tables as an archive sends them, text that may be compressed, turned into Parquet in bounded memory."""

from __future__ import annotations

import contextlib
import csv
import gzip
import os
import zlib
from pathlib import Path
from typing import Any

from galray.catalog.columns import columns
from galray.catalog.download import Patience, read_small
from galray.catalog.tap import message
from galray.errors import GalrayError
from galray.provenance import file_hash

__all__ = ["SpoiledAnswer", "read_count", "text_width", "to_parquet"]

_GROUP_ROWS = 1 << 17
_BLOCK = 4 << 20
_WIDTHS = {"float64": 20, "float32": 11, "int64": 19, "bool": 5, "string": 14}


class SpoiledAnswer(Exception):
    """An answer that is not the table asked for.

    Arguments:
        why: What is wrong with it.
        final: True where fetching the same again would change nothing.
    """

    def __init__(self, why: str, final: bool = False) -> None:
        super().__init__(why)
        self.final = final


def text_width(dtype: str) -> int:
    """About how many bytes a value of a type and its comma take as text."""
    return _WIDTHS.get(dtype, 4) + 1


def read_count(url: str, patience: Patience) -> int:
    """The number in an answer to ``SELECT COUNT(*)``.

    Raises:
        GalrayError: There is none.
    """
    content = read_small(url, patience)
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    lines = content.decode("utf-8", errors="replace").split()
    if len(lines) != 2 or not lines[1].strip('"').isdigit():
        raise GalrayError(f"{url}: no number of rows: {message(content)[:100]}", "check --source")
    return int(lines[1].strip('"'))


def to_parquet(
    part: Path, path: Path, wanted: list[str] | None, release: str, max_rows: int
) -> dict[str, Any] | None:
    """Write a table of text as Parquet, under its name when it is whole.

    Missing values and NaN become null. Names of columns lose their capitals, which some services give them.

    Arguments:
        part: The text, compressed by gzip or not.
        path: The file to write; a table without rows leaves none.
        wanted: Columns that it must have, in this order; None for all there are.
        release: Gaia release that knows the columns' types.
        max_rows: Rows at which a table counts as cut off.

    Returns:
        ``rows, bytes, sha256``; None where the table was cut off.

    Raises:
        SpoiledAnswer: The text is broken or lacks a column.
        OSError: The file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    header, is_empty, is_gzip = _head(part)
    absent = [name for name in (wanted or ["source_id"]) if name not in header]
    if absent:
        raise SpoiledAnswer(f"the answer has no column '{absent[0]}'", final=True)
    if is_empty:
        return {"rows": 0, "bytes": 0, "sha256": None}
    known = {column.name: pa.type_for_alias(column.dtype) for column in columns(release)}
    half = path.with_name(f".{path.name}.part")
    writer: Any = None
    try:
        with pa.input_stream(str(part), compression="gzip" if is_gzip else None) as stream:
            reader = pyarrow.csv.open_csv(
                stream,
                pyarrow.csv.ReadOptions(
                    column_names=header, skip_rows=1, block_size=_BLOCK, use_threads=False
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types={name: known[name] for name in header if name in known},
                    include_columns=wanted or header,
                    null_values=["", "null", "NULL", "NaN", "nan"],
                    true_values=["true", "True", "TRUE", "t", "T", "1"],
                    false_values=["false", "False", "FALSE", "f", "F", "0"],
                    strings_can_be_null=True,
                ),
            )
            writer = pq.ParquetWriter(half, reader.schema, compression="zstd")
            held: list[Any] = []
            rows = held_rows = 0
            for batch in reader:
                held.append(batch)
                held_rows += batch.num_rows
                rows += batch.num_rows
                if held_rows >= _GROUP_ROWS:
                    writer.write_table(pa.Table.from_batches(held))
                    held, held_rows = [], 0
            if held_rows:
                writer.write_table(pa.Table.from_batches(held))
        writer.close()
        if rows >= max_rows:
            return None
        entry = {"rows": rows, "bytes": half.stat().st_size, "sha256": file_hash(half)}
        half.replace(path)
        return entry
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise SpoiledAnswer(f"the answer is broken: {str(error).splitlines()[0]}") from None
    finally:
        if writer is not None and writer.is_open:
            with contextlib.suppress(pa.ArrowException, OSError):  # the file is thrown away
                writer.close()
        half.unlink(missing_ok=True)


def _head(part: Path) -> tuple[list[str], bool, bool]:
    """Names of the columns, whether no row follows, and whether the text is compressed.

    Raises:
        SpoiledAnswer: It does not begin or end as a table does.
    """
    with part.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        size = raw.seek(0, os.SEEK_END)
        raw.seek(max(0, size - 1))
        is_whole = is_gzip or raw.read(1) == b"\n"  # compressed text tells its own end
    try:
        with gzip.open(part) if is_gzip else part.open("rb") as stream:
            first = stream.readline()
            if first.lstrip().startswith(b"<"):
                why = message(first + stream.read(1 << 20)) or "a document"
                raise SpoiledAnswer(f"no table but: {why}", final=True)
            if not first.strip():
                raise SpoiledAnswer("the answer is empty")
            if not is_whole:
                raise SpoiledAnswer("the answer ends within a row")
            rest = stream.read(1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SpoiledAnswer(f"the answer is broken: {error}") from None
    names = next(csv.reader([first.decode("utf-8-sig", errors="replace").strip()]))
    return [name.strip().lower() for name in names], not rest, is_gzip
