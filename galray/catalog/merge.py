"""One shard from the pieces: sorted, without duplicates, in bounded memory, the same bytes whoever reads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from galray.catalog.counting import first_of_runs
from galray.catalog.pieces import PieceIndex, read_batches, temporary_name
from galray.catalog.settings import CatalogSettings
from galray.catalog.sky_rows import HEALPIX, SkyRows
from galray.catalog.statistics import ColumnSums, Histograms
from galray.provenance import file_checksum

__all__ = ["GROUP_ROWS", "ParquetSlices", "merge_shard", "typed"]

GROUP_ROWS = 131_072
"""Rows of a row group of shards and tiles."""

MERGE_BYTES = 128 << 20
"""Rows of a shard that are merged at a time; a larger shard is merged range by range of ``source_id``."""

_SAMPLE = 64  # every so many rows tell where the ranges are to end


class ParquetSlices:
    """Writes rows to a Parquet file in row groups of `GROUP_ROWS`, whatever portions they come in.

    Arguments:
        path: The file; it appears under its name when it is whole.
        schema: Columns and types.
        required: Columns in which no row lacks a value: Parquet then does not note it row by row.
        compression: As ``catalog.compression``.
        sorted_by: The column that the rows are sorted by.
        statistics: Columns of which each row group's range is noted; None for all.
    """

    def __init__(
        self,
        path: Path,
        schema: pl.Schema,
        required: Sequence[str],
        compression: str,
        sorted_by: str,
        statistics: Sequence[str] | None = None,
    ) -> None:
        self.path = path
        self.rows = 0
        self._rest: list[pa.Table] = []
        self._rest_rows = 0
        self._temporary = temporary_name(path)
        # Dictionaries cost four times the rest of the encoding and gain nothing on floats.
        words = [name for name, kind in schema.items() if not kind.is_numeric()]
        names = list(schema)
        order = [pq.SortingColumn(names.index(sorted_by), nulls_first=False)]
        self._schema = _arrow_schema(tuple(schema.items()), tuple(required))
        self._writer = pq.ParquetWriter(
            self._temporary,
            self._schema,
            # LZ4 finds nothing in measured numbers, and takes 8.04 bytes for 8.01 of Gaia's own.
            compression={
                name: "none" if compression == "lz4" and (kind.is_float() or name == HEALPIX) else compression
                for name, kind in schema.items()
            },
            compression_level=1 if compression == "zstd" else None,
            use_dictionary=words or False,
            write_batch_size=GROUP_ROWS,
            sorting_columns=order,
            write_statistics=True if statistics is None else list(statistics),
        )

    def add(self, frame: pl.DataFrame) -> None:
        """Take rows."""
        columns = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).columns
        table = pa.Table.from_arrays(columns, schema=self._schema)
        while table.num_rows:
            room = GROUP_ROWS - self._rest_rows
            self._rest.append(table.slice(0, room))
            self._rest_rows += self._rest[-1].num_rows
            table = table.slice(room)
            if self._rest_rows == GROUP_ROWS:
                self._write()

    def _write(self) -> None:
        if self._rest_rows:
            self._writer.write_table(pa.concat_tables(self._rest), row_group_size=GROUP_ROWS)
            self.rows += self._rest_rows
            self._rest, self._rest_rows = [], 0

    def close(self) -> None:
        """Write the rest and put the file in its place."""
        self._write()
        self._writer.close()
        self._temporary.replace(self.path)

    def abandon(self) -> None:
        """Let go of a file that was not finished; after `close` this does nothing."""
        # Closing writes a footer, which a full disk refuses: the file is thrown away in any case.
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


@functools.lru_cache(maxsize=16)  # it takes milliseconds, and a store's files have one or two
def _arrow_schema(columns: tuple[tuple[str, pl.DataType], ...], required: tuple[str, ...]) -> pa.Schema:
    plain = pl.Schema(columns).to_frame().to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    return pa.schema(field.with_nullable(field.name not in required) for field in plain)


def typed(frame: pl.DataFrame, schema: pl.Schema) -> pl.DataFrame:
    """The columns of a schema in its types."""
    return frame.select(pl.col(name).cast(kind) for name, kind in schema.items())


def merge_shard(
    folder: Path,
    index: PieceIndex,
    schema: pl.Schema,
    required: Sequence[str],
    path: Path,
    settings: CatalogSettings,
) -> dict[str, Any]:
    """Write one shard from the rows that the pieces hold of it.

    Rows are sorted by ``source_id``; of rows with the same one the first in the order of the input stays.
    Where the pieces have a column `HEALPIX`, the rows go by `SkyRows` to ``*.sky.arrow`` too, and the counts
    of their pixels to ``*.counts.npy``.

    Arguments:
        folder: Where the pieces are.
        index: The shard's part of the index.
        schema: Columns and types of the shard.
        required: Columns in which no row of the pieces lacks a value.
        path: Where to write.
        settings: The catalogue's settings.

    Returns:
        The manifest's entry, with ``duplicates``, and the column sums and histograms under ``sums`` and
        ``histograms``.
    """
    # Stars are dealt: of all else every row group has the whole range, which the manifest has too.
    out = ParquetSlices(path, schema, required, settings.compression, "source_id", ["source_id"])
    sky = SkyRows(path.with_suffix(".sky.arrow"), settings.tiles.max_level)
    sums = ColumnSums(schema)
    histograms = Histograms(settings, list(schema))
    counts = histograms.empty()
    duplicates = 0
    try:
        for frames in _portions(folder, index, schema):
            rows = sum(frame.height for frame in frames)
            names = [*schema, *([HEALPIX] if HEALPIX in frames[0].columns else [])]
            frame = pl.concat((f.select(names) for f in frames), how="vertical_relaxed").rechunk()
            frames.clear()
            frame = _first_of_each(frame)
            duplicates += rows - frame.height
            if HEALPIX in names:
                sky.add(frame)
            frame = typed(frame, schema)
            sums.add(frame)
            histograms.add(counts, frame)
            out.add(frame)
        sky.close()
        out.close()
    finally:
        sky.abandon()
        out.abandon()
    return {
        "file": path.name,
        "rows": out.rows,
        "bytes": path.stat().st_size,
        "xxh128": file_checksum(path),
        "duplicates": duplicates,
        "sums": sums.values,
        "histograms": {name: count.tolist() for name, count in counts.items()},
    }


def _first_of_each(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows sorted by ``source_id``, the first in order where several have the same."""
    ids = frame["source_id"].to_numpy()
    if (ids[1:] > ids[:-1]).all():
        return frame
    order = frame["source_id"].arg_sort()  # numpy's takes twice as long
    first = first_of_runs(ids[order.to_numpy()])
    return frame[order if len(first) == len(ids) else np.minimum.reduceat(order.to_numpy(), first)]


def _portions(folder: Path, index: PieceIndex, schema: pl.Schema) -> Iterator[list[pl.DataFrame]]:
    """A shard's rows in portions that fit in memory, of rising ``source_id``, each in the input's order."""
    rows = int(index.entries[:, 3].sum())
    limit = max(MERGE_BYTES // (sum(_width(kind) for kind in schema.values()) + 8), 1)
    if rows <= limit:
        if rows:
            yield read_batches(folder, index)
        return
    entries = index.entries
    edges = [-1, *_edges(folder, index, rows, limit), np.iinfo(np.int64).max]
    for low, high in pairwise(edges):
        frames = []
        for position in np.flatnonzero((entries[:, 5] > low) & (entries[:, 4] <= high)):
            (frame,) = read_batches(folder, replace(index, entries=entries[position : position + 1]))
            inside = (pl.col("source_id") > low) & (pl.col("source_id") <= high)
            whole = entries[position, 4] > low and entries[position, 5] <= high
            frames.append(frame if whole else frame.filter(inside))
        if frames:
            yield frames


def _edges(folder: Path, index: PieceIndex, rows: int, limit: int) -> list[int]:
    """Values of ``source_id`` that cut a shard into ranges of about the same number of rows."""
    sample = []
    for position in range(len(index.entries)):
        part = replace(index, entries=index.entries[position : position + 1])
        (frame,) = read_batches(folder, part, ["source_id"])
        sample.append(frame["source_id"].to_numpy()[::_SAMPLE].copy())
    ordered = np.sort(np.concatenate(sample))
    parts = -(-rows // limit) + 1  # one more than needed: the sample's ranges are not quite equal
    cuts = np.unique(ordered[np.linspace(0, len(ordered) - 1, parts + 1).astype(int)[1:-1]])
    return [int(value) for value in cuts]


def _width(kind: pl.DataType) -> int:
    """Bytes of one value in memory, roughly for those of no fixed width."""
    sizes = {pl.Float32: 4, pl.Int32: 4, pl.UInt32: 4, pl.Int16: 2, pl.UInt16: 2, pl.Int8: 1, pl.Boolean: 1}
    return sizes.get(type(kind), 32 if kind == pl.String else 8)
