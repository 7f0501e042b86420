"""The view in sky order: HEALPix tiles of bounded size, cut adaptively, sorted by level-29 pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from galray.catalog.merge import GROUP_ROWS, ParquetSlices, typed
from galray.catalog.settings import CatalogSettings, TileSettings
from galray.catalog.sky_rows import HEALPIX, LEVEL, rows_between
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.provenance import file_checksum

__all__ = [
    "Tile",
    "healpix_29",
    "partition",
    "sky_positions",
    "tile_limit",
    "write_tiles",
]


class Tile(NamedTuple):
    """A nested HEALPix pixel (ICRS) and the number of stars in it."""

    level: int
    pixel: int
    rows: int

    def range_29(self) -> tuple[int, int]:
        """First, and one past the last, pixel of level 29 in it."""
        shift = 2 * (LEVEL - self.level)
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
    return hpgeom.angle_to_pixel(2**LEVEL, ra, dec, nest=True).astype(np.int64, copy=False)


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


def write_tiles(
    folder: Path,
    tiles: Sequence[Tile],
    schema: pl.Schema,
    required: Sequence[str],
    settings: CatalogSettings,
) -> list[dict[str, Any]]:
    """Write tiles that follow each other on the sky, from what `SkyRows` wrote of each shard.

    Rows are sorted by level-29 pixel, then ``source_id``. A file that turns out larger than ``max_mb`` is
    cut into its four child pixels.

    Arguments:
        folder: Holds the shards' rows, ``*.sky.arrow``; the tiles go to its ``sky/dataset``.
        tiles: Which.
        schema: Columns and types of the shards.
        required: Columns in which no row lacks a value.
        settings: The catalogue's settings.

    Returns:
        The manifest's entries of the tiles written.

    Raises:
        GalrayError: A tile of the deepest level allowed is larger than ``max_mb``.
    """
    low, high = tiles[0].range_29()[0], tiles[-1].range_29()[1]
    frame = rows_between(sorted(folder.glob("shard-*.sky.arrow")), low, high)
    order = frame[HEALPIX].arg_sort()  # makes use of each shard's rows being sorted, faster than numpy
    ordered = frame[HEALPIX].to_numpy()[order.to_numpy()]
    if np.any(ordered[1:] == ordered[:-1]):  # rare, and four times slower
        order = frame.select(pl.arg_sort_by(HEALPIX, "source_id")).to_series()
    frame = frame[order]
    entries: list[dict[str, Any]] = []
    waiting = list(reversed(tiles))
    while waiting:
        tile = waiting.pop()
        start, stop = np.searchsorted(ordered, tile.range_29()).tolist()
        if stop == start:
            continue
        path = folder / "sky" / "dataset" / tile.path()
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, frame[start:stop], schema, required, settings)
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
                "xxh128": file_checksum(path),
            }
        )
    return entries


def _write(
    path: Path,
    stars: pl.DataFrame,
    schema: pl.Schema,
    required: Sequence[str],
    settings: CatalogSettings,
) -> None:
    """Write one tile; stars of 6D tables get their place on the sky, as seen from the Sun."""
    first: dict[str, pl.DataType] = {HEALPIX: pl.Int64()}
    placed = {"ra", "dec"} <= {*schema}
    if not placed:
        first |= {"ra": pl.Float64(), "dec": pl.Float64()}
    columns = pl.Schema(first | {name: kind for name, kind in schema.items() if name not in first})
    out = ParquetSlices(path, columns, [*first, *required], settings.compression, HEALPIX)
    try:
        for part in stars.iter_slices(GROUP_ROWS):
            if not placed:
                ra, dec = sky_positions(part, settings.frame.build())
                part = part.with_columns(pl.Series("ra", ra), pl.Series("dec", dec))
            out.add(typed(part, columns))
        out.close()
    finally:
        out.abandon()
