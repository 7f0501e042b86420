"""CSV text from a stream → frames, a few megabytes at a time: flat memory at the speed of one eager read."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import polars as pl

__all__ = ["BadCell", "LongRow", "TextTable"]

CHUNK_BYTES = 12 << 20
"""Text that is parsed at a time: with 20 MB a pass is 3 % faster and keeps 50 MB more, with 8 slower."""

MAX_RECORD_BYTES = 64 << 20
"""A row longer than this is none: a quote was opened and never closed."""

INFERENCE_ROWS = 20_000
"""Rows of the first chunk that tell the types of columns that are not Gaia's."""


_BLOCK = 1 << 16


class BadCell(ValueError):
    """A cell that does not fit its column's type; `row` counts from 1."""

    def __init__(self, row: int | None, column: str, value: str) -> None:
        super().__init__(row, column, value)
        self.row, self.column, self.value = row, column, value


class LongRow(ValueError):
    """A row with more cells than the header; `row` counts from 1."""

    def __init__(self, row: int | None) -> None:
        super().__init__(row)
        self.row = row


class TextTable:
    """Reads chosen columns of CSV text whose header is known.

    The stream is cut at line ends into chunks, each of which Polars parses eagerly. Columns are addressed by
    their place, so that a header may name one twice.

    Arguments:
        header: The file's column names in order.
        dtypes: Types of columns by their names; others that are read get theirs from the first rows.
        null_token: True where missing values are ``null`` and an empty last cell means a row cut short; else
            empty cells are missing too.
        quoted_newlines: False where quotes are known to hold no line ends, which saves a look at the quotes.
    """

    def __init__(
        self,
        header: Sequence[str],
        dtypes: Mapping[str, pl.DataType],
        null_token: bool,
        quoted_newlines: bool = True,
    ) -> None:
        self.header = tuple(header)
        self.dtypes = dtypes
        self.null_token = null_token
        self.quoted_newlines = quoted_newlines
        self.places = {name: place for place, name in reversed(list(enumerate(header)))}

    def frames(self, stream: BinaryIO, wanted: Sequence[str], short_row: str) -> Iterator[pl.DataFrame]:
        """The columns `wanted`, chunk by chunk in the order of the rows.

        Arguments:
            stream: Decompressed bytes, from the file's beginning.
            wanted: Names as in the header.
            short_row: Name of a further column that marks rows that end too early, where `null_token`.

        Raises:
            BadCell: A cell does not fit its column's type.
            LongRow: A row has more cells than the header.
            EOFError, OSError: The compressed file is cut short or corrupt.
        """
        selection = [pl.col(str(self.places[name])).alias(name) for name in wanted]
        nulls: Any = ["null", ""]
        if self.null_token:
            # Polars fills a row that ends too early with nulls. Where missing values are written out, the
            # last cell is never empty, so an empty one gives such rows away.
            last = len(self.header) - 1
            nulls = {str(place): "null" for place in range(last)}
            for number, name in enumerate(wanted):
                if self.places[name] == last:
                    dtype = self.dtypes.get(name, pl.String())
                    selection[number] = _typed(str(last), dtype).alias(name)
            selection.append(pl.col(str(last)).is_null().alias(short_row))
        schema: pl.Schema | None = None
        row = 0
        for chunk in self._chunks(stream):
            if schema is None:
                schema = self._schema(chunk, wanted, nulls)
            try:
                frame = self._parse(chunk, schema, nulls).select(selection).collect(engine="in-memory")
            except pl.exceptions.PolarsError as error:
                raise self._located(error, chunk, row) from None
            row += frame.height
            del chunk  # its memory is the next one's
            yield frame

    def _parse(self, chunk: bytes, schema: pl.Schema | None, nulls: Any) -> pl.LazyFrame:
        # Looking for comments takes a third of the time, and bulk files have none below their header.
        commented = not self.null_token and (chunk.startswith(b"#") or b"\n#" in chunk)
        return pl.scan_csv(
            chunk,
            has_header=False,
            schema=schema,
            null_values=nulls,
            comment_prefix="#" if commented else None,
            missing_columns="insert",  # where the first row of a chunk ends too early
        )

    def _schema(self, chunk: bytes, wanted: Sequence[str], nulls: Any) -> pl.Schema:
        """A type for every place; those that nobody reads stay text."""
        schema = {str(place): self.dtypes.get(name, pl.String()) for place, name in enumerate(self.header)}
        unknown = [str(self.places[name]) for name in wanted if name not in self.dtypes]
        if unknown:
            names = ",".join(schema).encode() + b"\n"
            inferred = pl.read_csv(
                names + chunk,
                columns=unknown,
                null_values=nulls,
                comment_prefix="#",
                infer_schema_length=INFERENCE_ROWS,
                n_rows=INFERENCE_ROWS,
            ).schema
            schema |= dict(inferred)
        if self.null_token:
            schema[str(len(self.header) - 1)] = pl.String()
        return pl.Schema(schema)

    def _chunks(self, stream: BinaryIO) -> Iterator[bytes]:
        """The text after the header line in pieces that end with a line."""
        held = _after_header(stream)
        while True:
            size = len(held)
            # The stream writes where Polars reads: copies of the text would take a tenth of the time.
            text = io.BytesIO(bytes(size + CHUNK_BYTES))
            with text.getbuffer() as room:
                room[:size] = held
                while count := stream.readinto(room[size:]):  # type: ignore[attr-defined]
                    size += count
                if size == len(held):
                    break
                end = _after_last_line(room[:size])
                held = bytes(room[end:size])
            text.truncate(end)
            chunk = text.getvalue()
            del text
            if self.quoted_newlines and chunk.count(b'"') % 2:
                # The last line end stands in quotes: go back to one that does not.
                end = _last_line_end(chunk)
                chunk, held = chunk[:end], chunk[end:] + held
            if chunk:
                yield chunk
            del chunk
            if len(held) > MAX_RECORD_BYTES:
                raise EOFError("incomplete row: a quote that is opened is never closed")
        if held.strip():
            yield held

    def _located(self, error: pl.exceptions.PolarsError, chunk: bytes, row: int) -> Exception:
        """The library's error with the file's row and column."""
        found = re.search(r"could not parse `(.*?)` as dtype `\w+` at column '(\d+)'", str(error), re.DOTALL)
        place = int(found[2]) if found else -1
        if found and place < len(self.header):
            value = found[1]
            number = None
            with suppress(pl.exceptions.PolarsError, IndexError):
                texts = pl.Schema({str(i): pl.String() for i in range(len(self.header))})
                cells = self._parse(chunk, texts, None).select(str(place)).with_row_index()
                number = row + 1 + cells.filter(pl.col(str(place)) == value).head(1).collect()["index"][0]
            return BadCell(number, self.header[place], value)
        if any(words in str(error) for words in ("more fields", "ragged", "n_extra")):
            lines = (
                line for line in io.TextIOWrapper(io.BytesIO(chunk), "utf-8", "replace") if line[0] != "#"
            )
            for number, values in enumerate(csv.reader(lines), row + 1):
                if len(values) > len(self.header):
                    return LongRow(number)
            return LongRow(None)
        return error


def _typed(name: str, dtype: pl.DataType) -> pl.Expr:
    """A column that was read as text, in its own type, with ``null`` as missing."""
    text = pl.col(name).replace("null", None)
    if dtype == pl.Boolean:
        return text.str.to_lowercase() == "true"
    return text if dtype == pl.String else text.cast(dtype)


def _after_last_line(text: memoryview) -> int:
    """Where the line begins that does not end in `text`."""
    for stop in range(len(text), 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        if (end := bytes(text[start:stop]).rfind(b"\n")) >= 0:
            return start + end + 1
    return 0


def _last_line_end(text: bytes) -> int:
    """Where the last line ends that leaves no quote open, in text that ends inside quotes; 0 for none."""
    end = len(text)
    odd = 1
    while odd and end:
        start = text.rfind(b"\n", 0, end - 1) + 1
        odd = (odd + text.count(b'"', start, end)) % 2
        end = start
    return end


def _after_header(stream: BinaryIO) -> bytes:
    """Read past comments and the header line; what has been read beyond it."""
    held = b""
    while True:
        block = stream.read(_BLOCK)
        held += block
        position = 0
        while (end := held.find(b"\n", position)) >= 0:
            line = held[position:end]
            position = end + 1
            if line.strip() and not line.startswith(b"#"):
                return held[position:]
        if not block:
            return b""
        held = held[position:]
