"""The view in sky order: HEALPix tiles of bounded size, cut adaptively, sorted by level-29 pixel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from galray.catalog.merge import HEALPIX, ParquetSlices
from galray.catalog.settings import CatalogSettings, TileSettings
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.provenance import file_hash

__all__ = [
    "Tile",
    "block_ranges",
    "healpix_29",
    "partition",
    "pixel_counts",
    "sky_positions",
    "tile_limit",
    "write_tiles",
]

_LEVEL = 29
_READ_ROWS = 131_072


class Tile(NamedTuple):
    """A nested HEALPix pixel (ICRS) and the number of stars in it."""

    level: int
    pixel: int
    rows: int

    def range_29(self) -> tuple[int, int]:
        """First, and one past the last, pixel of level 29 in it."""
        shift = 2 * (_LEVEL - self.level)
        return self.pixel << shift, (self.pixel + 1) << shift

    def path(self) -> str:
        """Where HATS has it, relative to ``dataset``."""
        folder = self.pixel // 10_000 * 10_000
        return f"Norder={self.level}/Dir={folder}/Npix={self.pixel}.parquet"

    def describe(self) -> str:
        """The pixel with the place of its centre, for messages."""
        import hpgeom

        ra, dec = hpgeom.pixel_to_angle(2**self.level, self.pixel, nest=True)
        return f"HEALPix pixel {self.pixel} of level {self.level} (ra {ra:.3f}, dec {dec:.3f} deg)"


def sky_positions(stars: pl.DataFrame, frame: GalacticFrame) -> tuple[np.ndarray, np.ndarray]:
    """Right ascension and declination in deg, (n,) each: as given, or of states as seen from the Sun."""
    if {"ra", "dec"} <= {*stars.columns}:
        return stars["ra"].to_numpy() % 360.0, stars["dec"].to_numpy()
    offset = stars.select(pl.col("x", "y", "z").cast(pl.Float64)).to_numpy() - frame.sun_position
    x, y, z = (offset @ np.asarray(frame.icrs_to_galactocentric())).T
    return np.degrees(np.arctan2(y, x)) % 360.0, np.degrees(np.arctan2(z, np.hypot(x, y)))


def healpix_29(stars: pl.DataFrame, frame: GalacticFrame) -> np.ndarray:
    """Nested HEALPix pixel of level 29 (ICRS) of each star, (n,) int64."""
    import hpgeom

    ra, dec = sky_positions(stars, frame)
    return hpgeom.angle_to_pixel(2**_LEVEL, ra, dec, nest=True).astype(np.int64, copy=False)


def pixel_counts(pixels_29: np.ndarray, level: int) -> np.ndarray:
    """Sparse counts of stars in the pixels of a level, (2, k) int64: pixels and numbers."""
    pixels = pixels_29 >> 2 * (_LEVEL - level)
    if not len(pixels):
        return np.empty((2, 0), dtype=np.int64)
    first = int(pixels.min())
    if int(pixels.max()) - first < 16 * len(pixels) + 10_000:
        # Counting in an array is several times faster than sorting, where the array is not huge.
        numbers = np.bincount(pixels - first)
        found = np.flatnonzero(numbers)
        return np.stack([found + first, numbers[found]])
    return np.stack(np.unique(pixels, return_counts=True)).astype(np.int64)


def partition(counts: np.ndarray, limit: int, settings: TileSettings) -> list[Tile]:
    """Cut the sky into tiles: of each star's pixels the largest that holds at most `limit` stars.

    Arguments:
        counts: (12 · 4^L,) stars in the pixels of the deepest level L that is allowed.
        limit: Rows that a tile may hold.
        settings: For the message.

    Returns:
        The tiles that hold stars, in sky order.

    Raises:
        GalrayError: A pixel of the deepest level holds more; the fullest is named.
    """
    deepest = round(math.log(len(counts) / 12, 4))
    if counts.max(initial=0) > limit:
        worst = Tile(deepest, int(counts.argmax()), int(counts.max()))
        raise GalrayError(
            f"catalog.tiles: {worst.describe()} holds {worst.rows:,} stars, the limit is {limit:,} "
            f"(max_rows = {settings.max_rows:,}, max_mb = {settings.max_mb:g}), and "
            f"{int((counts > limit).sum()):,} pixel(s) are over it at the deepest level allowed",
            "raise catalog.tiles.max_level or its limits, or leave out the tiles: catalog.views = ['shards']",
        )
    pyramid = [counts]
    while len(pyramid[0]) > 12:
        pyramid.insert(0, pyramid[0].reshape(-1, 4).sum(axis=1))
    tiles: list[Tile] = []
    open_pixels = np.ones(12, dtype=bool)
    for level, stars in enumerate(pyramid):
        fits = open_pixels & (stars <= limit)
        tiles += [Tile(level, int(p), int(stars[p])) for p in np.flatnonzero(fits & (stars > 0))]
        open_pixels = np.repeat(open_pixels & ~fits, 4)
    return sorted(tiles, key=lambda tile: tile.range_29())


def tile_limit(settings: TileSettings, rows: int, size: int) -> int:
    """Rows that a tile may hold, by both limits, where `rows` rows take `size` bytes in the shards."""
    # The tiles have a column more, and different columns compress differently in another order.
    width = 1.05 * (size / max(rows, 1) + 8)
    return max(min(settings.max_rows, int(settings.max_mb * 1e6 / width)), 1)


def block_ranges(pixels: Path, block: int) -> np.ndarray:
    """Least and greatest level-29 pixel in each block of a shard's rows, (k, 2) int64."""
    ranges = []
    with pixels.open("rb") as stream:
        while len(part := np.fromfile(stream, dtype=np.int64, count=block)):
            ranges.append((part.min(), part.max()))
    return np.asarray(ranges, dtype=np.int64).reshape(-1, 2)


def write_tiles(
    folder: Path, tiles: Sequence[Tile], settings: CatalogSettings, block: int
) -> list[dict[str, Any]]:
    """Write tiles that follow each other on the sky from the shards of a folder.

    Rows are sorted by level-29 pixel, then ``source_id``. A file that turns out larger than ``max_mb`` is
    cut into its four child pixels.

    Arguments:
        folder: Holds the shards, with their pixels and the blocks' ranges beside them; the tiles go to its
            ``sky/dataset``.
        tiles: Which.
        settings: The catalogue's settings.
        block: Rows of a block.

    Returns:
        The manifest's entries of the tiles written.

    Raises:
        GalrayError: A tile of the deepest level allowed is larger than ``max_mb``.
    """
    low, high = tiles[0].range_29()[0], tiles[-1].range_29()[1]
    frames, keys = [], []
    for path in sorted(folder.glob("shard-*.parquet")):
        for frame, pixels in _rows_between(path, low, high, block):
            frames.append(frame)
            keys.append(pixels)
    frame = pl.concat(frames, rechunk=False)
    frames.clear()
    pixels = np.concatenate(keys)
    order = np.lexsort((frame["source_id"].to_numpy(), pixels))
    pixels = pixels[order]
    galactic = settings.frame.build()
    entries: list[dict[str, Any]] = []
    waiting = list(reversed(tiles))
    while waiting:
        tile = waiting.pop()
        start, stop = np.searchsorted(pixels, tile.range_29()).tolist()
        if stop == start:
            continue
        path = folder / "sky" / "dataset" / tile.path()
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, frame, order[start:stop], pixels[start:stop], galactic)
        size = path.stat().st_size
        if size > settings.tiles.max_mb * 1e6:
            path.unlink()
            if tile.level >= settings.tiles.max_level:
                raise GalrayError(
                    f"catalog.tiles: {tile.describe()} takes {size / 1e6:.1f} MB, max_mb is "
                    f"{settings.tiles.max_mb:g}",
                    "raise catalog.tiles.max_level or max_mb, or set catalog.views = ['shards']",
                )
            waiting += [Tile(tile.level + 1, 4 * tile.pixel + child, 0) for child in (3, 2, 1, 0)]
            continue
        entries.append(
            {
                "level": tile.level,
                "pixel": tile.pixel,
                "file": f"dataset/{tile.path()}",
                "rows": stop - start,
                "bytes": size,
                "sha256": file_hash(path),
            }
        )
    return entries


def _rows_between(path: Path, low: int, high: int, block: int) -> Iterator[tuple[pl.DataFrame, np.ndarray]]:
    """A shard's rows with level-29 pixels in [low, high), and these."""
    blocks = path.with_suffix(".blocks.npy")
    if not blocks.exists():
        return  # a shard without stars
    ranges = np.load(blocks)
    hits = np.flatnonzero((ranges[:, 0] < high) & (ranges[:, 1] >= low))
    if not len(hits):
        return
    shard = pl.scan_parquet(path, glob=False)
    with path.with_suffix(".pixels").open("rb") as stream:
        for run in np.split(hits, np.flatnonzero(np.diff(hits) > 1) + 1):
            step = max(_READ_ROWS // block, 1)
            for first in range(int(run[0]), int(run[-1]) + 1, step):
                count = min(step, int(run[-1]) + 1 - first) * block
                stream.seek(8 * first * block)
                pixels = np.fromfile(stream, dtype=np.int64, count=count)
                inside = (pixels >= low) & (pixels < high)
                if inside.any():
                    frame = shard.slice(first * block, len(pixels)).collect()
                    yield (frame, pixels) if inside.all() else (frame.filter(inside), pixels[inside])


def _write(
    path: Path, frame: pl.DataFrame, rows: np.ndarray, pixels: np.ndarray, galactic: GalacticFrame
) -> None:
    """Write one tile; stars of 6D tables get their place on the sky, as seen from the Sun."""
    out: ParquetSlices | None = None
    try:
        for start in range(0, len(rows), _READ_ROWS):
            part = frame[rows[start : start + _READ_ROWS]]
            columns = [pl.Series(HEALPIX, pixels[start : start + _READ_ROWS])]
            if not {"ra", "dec"} <= {*part.columns}:
                ra, dec = sky_positions(part, galactic)
                columns += [pl.Series("ra", ra), pl.Series("dec", dec)]
            part = pl.DataFrame(columns).hstack(part.drop([c.name for c in columns], strict=False))
            if out is None:
                out = ParquetSlices(path, part.schema, _READ_ROWS, HEALPIX)
            out.add(part)
        if out is not None:
            out.close()
    finally:
        if out is not None:
            out.abandon()
