"""A shard's rows in the order of the sky, from the merge to the tiles, and counts of their pixels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from galray.catalog.counting import first_of_runs
from galray.catalog.pieces import BatchFile

__all__ = ["HEALPIX", "LEVEL", "SkyRows", "rows_between"]

HEALPIX = "_healpix_29"
"""Nested HEALPix pixel of level 29 (ICRS), HATS's spatial index; pieces carry it where tiles are made."""

LEVEL = 29

BATCH_ROWS = 131_072
"""Rows of a batch; a tile's job maps it into memory and touches no pages but those of its own rows."""


class SkyRows:
    """Writes a shard's rows sorted by pixel, so that a tile reads its own rows of each shard and no others.

    They go to a `BatchFile`, each portion that is added in an order of its own. A row of the index is the
    least and greatest pixel of a batch. Beside it, in ``*.counts.npy``, are (2, k) pixels of a lower level
    and numbers of rows in them; a pixel may stand there several times.

    Arguments:
        path: The file, ``*.arrow``.
        level: At which stars are counted, for the cutting of the tiles.
    """

    def __init__(self, path: Path, level: int) -> None:
        self._path = path
        self._file = BatchFile(path, 2)
        self._level = level
        self._counts: list[np.ndarray] = []

    def add(self, frame: pl.DataFrame) -> None:
        """Take rows with a column `HEALPIX`."""
        # Rows sorted by Gaia's ids are nearly so by pixel, which a stable sort makes use of.
        frame = frame[np.argsort(frame[HEALPIX].to_numpy(), kind="stable")]
        pixels = frame[HEALPIX].to_numpy()
        cells = pixels >> 2 * (LEVEL - self._level)
        first = first_of_runs(cells)
        self._counts.append(np.stack([cells[first], np.diff(first, append=len(cells))]))
        batches = [pixels[start : start + BATCH_ROWS] for start in range(0, frame.height, BATCH_ROWS)]
        self._file.write(frame, map(len, batches), [(batch[0], batch[-1]) for batch in batches])

    def close(self) -> None:
        """Publish the files, if there are rows."""
        if self._counts:
            np.save(self._path.with_suffix(".counts.npy"), np.concatenate(self._counts, axis=1))
        self._file.close()

    def abandon(self) -> None:
        """As `BatchFile.abandon`."""
        self._file.abandon()


def rows_between(paths: Iterable[Path], low: int, high: int) -> pl.DataFrame:
    """The rows that several `SkyRows` wrote with level-29 pixels in [low, high), in one chunk."""
    # Columns that hold nothing in a shard may be of another type there.
    alike: dict[pa.Schema, list[pa.RecordBatch]] = defaultdict(list)
    for path in paths:
        ranges = np.load(path.with_suffix(".npy"))
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            for number in np.flatnonzero((ranges[:, 0] < high) & (ranges[:, 1] >= low)).tolist():
                batch = reader.get_batch(number)
                # Arrow's to_numpy imports pandas.
                pixels = np.frombuffer(batch.column(HEALPIX).buffers()[1], np.int64, batch.num_rows)
                start, stop = np.searchsorted(pixels, (low, high)).tolist()
                if stop > start:
                    alike[batch.schema].append(batch.slice(start, stop - start))
    tables = (pa.Table.from_batches(batches) for batches in alike.values())
    frames = [pl.DataFrame(pl.from_arrow(table, rechunk=False)) for table in tables]
    return pl.concat(frames, how="vertical_relaxed").rechunk()
