"""Pieces: the selected rows of one unit of input, shard by shard, between the reading and the merge."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from galray.catalog.selection import SHARD
from galray.provenance import write_atomic

__all__ = ["BatchFile", "PieceIndex", "PieceWriter", "read_batches", "temporary_name"]

FLUSH_ROWS = 200_000
"""Selected rows that a worker holds before it writes them out."""

FLUSH_BYTES = 64 << 20
"""The same limit in bytes, for tables with many or long columns."""


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses: two workers may be at the same job."""
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


class BatchFile:
    """An Arrow file of record batches, and beside it its index: an array with a row for each batch.

    Both appear under their names only when they are whole.

    Arguments:
        path: The file, ``*.arrow``; the index is ``*.npy``.
        columns: Of the index.
    """

    def __init__(self, path: Path, columns: int) -> None:
        self.path = path
        self._columns = columns
        self._index: list[Sequence[int]] = []
        self._temporary = temporary_name(path)
        self._sink: pa.NativeFile | None = None
        self._writer: pa.RecordBatchFileWriter | None = None

    def write(self, frame: pl.DataFrame, counts: Iterable[int], index: Iterable[Sequence[int]]) -> None:
        """Write rows as batches of these numbers of rows, each with its row of the index."""
        table: pa.Table = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
        if self._writer is None:
            # Every column of a small batch would be a system call of its own.
            self._sink = pa.BufferedOutputStream(pa.OSFile(str(self._temporary), "wb"), 1 << 20)
            self._writer = pa.ipc.new_file(self._sink, table.schema)
        start = 0
        for count in counts:
            self._writer.write_table(table.slice(start, count))
            start += count
        self._index += index

    def close(self) -> None:
        """Publish the file, if there is one."""
        if self._writer is None or self._sink is None:
            return
        self._writer.close()
        self._sink.close()
        self._writer = self._sink = None
        index = temporary_name(self.path)
        with index.open("wb") as stream:
            np.save(stream, np.asarray(self._index, dtype=np.int64).reshape(-1, self._columns))
        index.replace(self.path.with_suffix(".npy"))
        self._temporary.replace(self.path)

    def abandon(self) -> None:
        """Let go of a file that was not finished; after `close` this does nothing."""
        if self._writer is not None and self._sink is not None:
            # Closing writes the rest, which a full disk refuses: the file is thrown away in any case.
            for stream in (self._writer, self._sink):
                try:
                    stream.close()
                except (OSError, pa.ArrowException):
                    continue
            self._writer = self._sink = None
        self._temporary.unlink(missing_ok=True)


class PieceWriter:
    """Writes selected rows to a `BatchFile` whose batches each belong to one shard.

    A row of the index is (shard, number of rows, least and greatest ``source_id``). ``nullable`` names the
    columns in which some row has no value.

    Arguments:
        path: The file, ``*.arrow``.
    """

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self.schema: pl.Schema | None = None
        self.nullable: set[str] = set()
        self._held: list[pl.DataFrame] = []
        self._held_rows = self._held_bytes = 0
        self._file = BatchFile(path, 4)

    @property
    def has_rows(self) -> bool:
        """True where rows have been added."""
        return self.rows + self._held_rows > 0

    def add(self, frame: pl.DataFrame) -> None:
        """Take rows with a column `SHARD`; memory stays bounded, whatever their number."""
        self._held.append(frame)
        self._held_rows += frame.height
        self._held_bytes += int(frame.estimated_size())
        if self._held_rows >= FLUSH_ROWS or self._held_bytes >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        held, rows, self._held, self._held_rows, self._held_bytes = self._held, self._held_rows, [], 0, 0
        if not rows:
            return
        frame = pl.concat(held, rechunk=True)
        of_rows = frame[SHARD].to_numpy()
        order = np.argsort(of_rows, kind="stable")  # 16-bit numbers sort in linear time
        frame = frame.drop(SHARD)[pl.Series(order.astype(np.uint32))]  # of the type that Polars' indices have
        self.schema = frame.schema
        self.nullable |= {column.name for column in frame if column.null_count()}
        counts = np.bincount(of_rows)
        shards = np.flatnonzero(counts)
        counts = counts[shards]
        starts = np.cumsum(counts) - counts
        ids = frame["source_id"].to_numpy()
        index = zip(
            shards.tolist(),
            counts.tolist(),
            np.minimum.reduceat(ids, starts).tolist(),
            np.maximum.reduceat(ids, starts).tolist(),
            strict=True,
        )
        self._file.write(frame, counts.tolist(), index)
        self.rows += frame.height

    def add_schema(self, frame: pl.DataFrame) -> None:
        """Let there be a file even without rows, of the columns of a frame with a column `SHARD`."""
        self._flush()
        if self.schema is None:
            frame = frame.clear().drop(SHARD)
            self.schema = frame.schema
            self._file.write(frame, (), ())

    def close(self) -> int:
        """Write the rest and publish; returns the number of rows.

        Without rows and without `add_schema` there is no file.
        """
        self._flush()
        self._file.close()
        return self.rows

    def abandon(self) -> None:
        """As `BatchFile.abandon`."""
        self._file.abandon()


@dataclass(frozen=True)
class PieceIndex:
    """Where shards' rows are in the pieces: shard by shard, of each in the order of the input.

    Arguments:
        files: Names of the pieces.
        entries: (m, 6) int64: number of the file, batch, shard, rows, least and greatest ``source_id``.
    """

    files: Sequence[str]
    entries: np.ndarray

    @classmethod
    def of(cls, folder: Path, names: Iterable[str]) -> PieceIndex:
        """Collect the indices of pieces."""
        names = list(names)
        parts = [np.empty((0, 6), dtype=np.int64)]
        for number, name in enumerate(names):
            own = np.load((folder / name).with_suffix(".npy"))
            place = np.stack([np.full(len(own), number), np.arange(len(own))], axis=1)
            parts.append(np.concatenate([place, own], axis=1))
        entries = np.concatenate(parts)
        return cls(names, entries[np.argsort(entries[:, 2], kind="stable")])

    def save(self, path: Path) -> None:
        """Write the entries to a file, ``*.npy``, and the names of the pieces beside it, to ``*.txt``."""
        write_atomic(path.with_suffix(".txt"), "\n".join(self.files))
        temporary = temporary_name(path)
        with temporary.open("wb") as stream:
            np.save(stream, np.asfortranarray(self.entries))  # a search of the shards reads no other column
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, shard: int) -> PieceIndex:
        """One shard's part of an index; no more of it is read."""
        entries = np.load(path, mmap_mode="r")
        start, stop = np.searchsorted(entries[:, 2], (shard, shard + 1))
        names = path.with_suffix(".txt").read_text(encoding="utf-8").split("\n")
        return cls(names, np.array(entries[start:stop], order="C"))


def read_batches(folder: Path, index: PieceIndex, columns: Sequence[str] | None = None) -> list[pl.DataFrame]:
    """The rows of an index, in its order, one frame for each file; they are in mapped memory as yet."""
    frames: list[pl.DataFrame] = []
    entries = index.entries
    for number in dict.fromkeys(entries[:, 0].tolist()):
        with pa.memory_map(str(folder / index.files[number])) as source:
            reader = pa.ipc.open_file(source)
            batches = entries[entries[:, 0] == number][:, 1].tolist()
            table = pa.Table.from_batches([reader.get_batch(batch) for batch in batches])
            frame = pl.from_arrow(table if columns is None else table.select(list(columns)), rechunk=False)
            assert isinstance(frame, pl.DataFrame)
            frames.append(frame)
    return frames
