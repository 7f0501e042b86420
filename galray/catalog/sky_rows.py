"""A shard's rows in the order of the sky, from the merge to the tiles, and counts of their pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from galray.catalog.pieces import BatchFile

__all__ = ["HEALPIX", "LEVEL", "SkyRows", "add_counts", "pixel_counts", "rows_between"]

HEALPIX = "_healpix_29"
"""Nested HEALPix pixel of level 29 (ICRS), HATS's spatial index; pieces carry it where tiles are made."""

LEVEL = 29


class SkyRows:
    """Writes a shard's rows sorted by pixel, so that a tile reads its own rows of each shard and no others.

    They go to a `BatchFile`, each portion that is added in an order of its own. A row of the index is the
    least and greatest pixel of a batch. Beside it are the rows' `pixel_counts`, ``*.counts.npy``.

    Arguments:
        path: The file, ``*.arrow``.
        batch_rows: Rows of a batch.
        level: At which stars are counted, for the cutting of the tiles.
    """

    def __init__(self, path: Path, batch_rows: int, level: int) -> None:
        self._path = path
        self._file = BatchFile(path, 2)
        self._batch_rows = batch_rows
        self._level = level
        self._counts: list[np.ndarray] = []

    def add(self, frame: pl.DataFrame) -> None:
        """Take rows with a column `HEALPIX`."""
        frame = frame[np.argsort(frame[HEALPIX].to_numpy())]
        pixels = frame[HEALPIX].to_numpy()
        self._counts.append(pixel_counts(pixels, self._level))
        starts = range(0, frame.height, self._batch_rows)
        batches = [pixels[start : start + self._batch_rows] for start in starts]
        self._file.write(frame, map(len, batches), [(batch[0], batch[-1]) for batch in batches])

    def close(self) -> None:
        """Publish the files, if there are rows."""
        if self._counts:
            np.save(self._path.with_suffix(".counts.npy"), add_counts(self._counts))
        self._file.close()

    def abandon(self) -> None:
        """As `BatchFile.abandon`."""
        self._file.abandon()


def rows_between(path: Path, low: int, high: int) -> Iterator[pl.DataFrame]:
    """The rows that a `SkyRows` wrote with level-29 pixels in [low, high)."""
    ranges = np.load(path.with_suffix(".npy"))
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for batch in np.flatnonzero((ranges[:, 0] < high) & (ranges[:, 1] >= low)).tolist():
            frame = pl.from_arrow(reader.get_batch(batch))
            assert isinstance(frame, pl.DataFrame)
            start, stop = np.searchsorted(frame[HEALPIX].to_numpy(), (low, high)).tolist()
            if stop > start:
                yield frame[start:stop]


def pixel_counts(pixels_29: np.ndarray, level: int) -> np.ndarray:
    """Sparse counts of stars in the pixels of a level, (2, k) int64: pixels and numbers."""
    return _counts(pixels_29 >> 2 * (LEVEL - level), None)


def add_counts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of several `pixel_counts`, in the same form."""
    return _counts(*np.concatenate(parts, axis=1)) if len(parts) > 1 else parts[0]


def _counts(pixels: np.ndarray, numbers: np.ndarray | None) -> np.ndarray:
    """Each pixel once with the sum of its numbers, or with how often it is there."""
    if not len(pixels):
        return np.empty((2, 0), dtype=np.int64)
    first = int(pixels.min())
    if int(pixels.max()) - first < 16 * len(pixels) + 10_000:
        # Counting in an array is several times faster than sorting, where the array is not huge.
        total = np.bincount(pixels - first, numbers)
        found = np.flatnonzero(total)
        return np.stack([found + first, total[found].astype(np.int64)])
    found, place = np.unique(pixels, return_inverse=True)
    return np.stack([found, np.bincount(place, numbers).astype(np.int64)])
