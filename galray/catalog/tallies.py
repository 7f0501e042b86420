"""Sums over the stars of a file, batch by batch, and what is made of them; numpy and Polars alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from galray.errors import GalrayError

__all__ = [
    "averages",
    "combined",
    "count",
    "cross_histogram",
    "even_edges",
    "extent",
    "extent_or_nan",
    "finer_edges",
    "group_sums",
    "histogram",
    "over_files",
    "pixel_counts",
    "pixel_sums",
    "plus",
    "quantiles",
    "widest",
]

BATCH_ROWS = 1_000_000
"""Rows that a task holds at a time."""

# IAU: rows are the Galactic axes in ICRS (Hipparcos catalogue, vol. 1, eq. 1.5.11).
_GALACTIC = np.array(
    [
        [-0.0548755604162154, -0.8734370902348850, -0.4838350155487132],
        [+0.4941094278755837, -0.4448296299600112, +0.7469822444972189],
        [-0.8676661490190047, -0.1980763734312015, +0.4559837761750669],
    ]
)


def over_files(
    files: Sequence[os.PathLike[str]],
    expressions: Sequence[pl.Expr],
    where: pl.Expr | None,
    combine: Callable[[Any, Any], Any],
    function: Callable[..., Any],
    *rest: Any,
) -> Any:
    """`function` of every batch of values of the files, put together by `combine`.

    Arguments:
        files: Parquet files.
        expressions: What is computed from their columns.
        where: The rows that are used; all without it.
        combine: Joins two results.
        function: Takes values (expressions, rows), float64 with NaN for missing ones, and `rest`.
        rest: Further arguments of `function`.

    Raises:
        GalrayError: A file is gone or broken.
    """
    total: Any = None
    for file in files:
        try:
            for batch in _batches(file, expressions, where):
                part = function(batch, *rest)
                total = part if total is None else combine(total, part)
        except (OSError, pl.exceptions.PolarsError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise GalrayError(f"{file}: cannot be read: {text}", "ingest the catalogue again") from None
    return total


def _batches(
    file: os.PathLike[str], expressions: Sequence[pl.Expr], where: pl.Expr | None
) -> Iterator[np.ndarray]:
    """A file's values, (columns, rows) float64 at a time with NaN for missing ones; at least one batch."""
    stars = pl.scan_parquet(os.fspath(file), glob=False, hive_partitioning=False)
    if where is not None:
        stars = stars.filter(where)
    if not expressions:
        yield np.empty((0, stars.select(pl.len()).collect().item()))
        return
    chosen = stars.select(e.alias(str(i)) for i, e in enumerate(expressions))
    empty = True
    for batch in chosen.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True):
        empty = False
        yield batch.fill_null(float("nan")).to_numpy().T
    if empty:
        yield np.empty((len(expressions), 0))


def plus(a: Any, b: Any) -> Any:
    """Their sum."""
    return a + b


def combined(combine: Any, parts: list[Any]) -> Any:
    """All parts put together, in their order."""
    total = parts[0]
    for part in parts[1:]:
        total = combine(total, part)
    return total


def count(values: np.ndarray) -> np.int64:
    """Number of rows."""
    return np.int64(values.shape[1])


def _directions(place: np.ndarray, level: int, frame: str, sun: tuple[float, float, float]) -> np.ndarray:
    """Nested pixels of places: (2, n) ICRS degrees, or (3, n) Galactocentric kpc as seen from the Sun."""
    import hpgeom

    if len(place) == 2 and frame == "icrs":
        longitude, latitude = place
    else:
        if len(place) == 2:
            ra, dec = np.radians(place)
            across = np.cos(dec)
            x, y, z = _GALACTIC @ np.stack([across * np.cos(ra), across * np.sin(ra), np.sin(dec)])
        else:
            # The frame's x axis points from the Sun to the centre, to within its height above the plane.
            x, y, z = place - np.asarray(sun)[:, None]
        longitude, latitude = np.degrees(np.arctan2(y, x)), np.degrees(np.arctan2(z, np.hypot(x, y)))
    return hpgeom.angle_to_pixel(2**level, longitude % 360.0, latitude, nest=True)


def pixel_counts(values: np.ndarray, level: int, frame: str, sun: tuple[float, float, float]) -> np.ndarray:
    """Rows in each nested pixel; `values` holds a place, see `_directions`."""
    place = values[:, np.isfinite(values).all(0)]
    return np.bincount(_directions(place, level, frame, sun), minlength=12 * 4**level)


def pixel_sums(values: np.ndarray, level: int, frame: str, sun: tuple[float, float, float]) -> np.ndarray:
    """(2, pixels): sums of the last of `values` and their counts; the others are a place."""
    values = values[:, np.isfinite(values).all(0)]
    pixels, number = _directions(values[:-1], level, frame, sun), 12 * 4**level
    sums = np.bincount(pixels, weights=values[-1], minlength=number)
    return np.stack([sums, np.bincount(pixels, minlength=number)])


def histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Counts between `edges`; none for fewer than two edges."""
    if len(edges) < 2:
        return np.zeros(0, dtype=np.int64)
    return np.histogram(values[0][np.isfinite(values[0])], edges)[0]


def cross_histogram(values: np.ndarray, edges: list[np.ndarray]) -> np.ndarray:
    """Counts in cells; rows with a missing value are left out."""
    there = values[:, np.isfinite(values).all(0)]
    return np.histogramdd(there.T, edges)[0].astype(np.int64)


def group_sums(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(2, bins, columns): sums and counts."""
    bins = np.digitize(values[0], edges) - 1
    bins[values[0] == edges[-1]] = len(edges) - 2  # the last bin is closed, as in a histogram
    inside = (bins >= 0) & (bins < len(edges) - 1) & np.isfinite(values[0])
    result = np.zeros((2, len(edges) - 1, len(values) - 1))
    for number, column in enumerate(values[1:]):
        use = inside & np.isfinite(column)
        result[0, :, number] = np.bincount(bins[use], weights=column[use], minlength=len(edges) - 1)
        result[1, :, number] = np.bincount(bins[use], minlength=len(edges) - 1)
    return result


def extent(values: np.ndarray) -> np.ndarray:
    """Smallest and largest finite value, (inf, −inf) where there is none."""
    finite = values[0][np.isfinite(values[0])]
    return np.array([finite.min(), finite.max()]) if finite.size else np.array([np.inf, -np.inf])


# What is made of the sums ---------------------------------------------------------------------------------


def widest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The range that holds both."""
    return np.array([min(a[0], b[0]), max(a[1], b[1])])


def extent_or_nan(extent: np.ndarray) -> np.ndarray:
    """The range, NaN for an empty one."""
    return extent if extent[0] <= extent[1] else np.full(2, np.nan)


def averages(sums: np.ndarray) -> np.ndarray:
    """Sums and counts → means; NaN where nothing was counted."""
    total, number = sums
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def even_edges(extent: np.ndarray, bins: int) -> np.ndarray:
    """Edges over the range; none for an empty one."""
    low, high = extent
    if not np.isfinite(low):
        return np.zeros(0)
    return np.linspace(low, high if high > low else np.nextafter(low, np.inf) + abs(low) * 1e-9, bins + 1)


def _bins_of(cumulative: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The bins in which the cumulative count reaches the wished part of the whole."""
    rank = np.maximum(q * cumulative[-1], 0.5)
    return np.minimum(np.searchsorted(cumulative, rank, side="left"), len(cumulative) - 1)


def finer_edges(edges: np.ndarray, counted: np.ndarray, q: np.ndarray, bins: int) -> np.ndarray:
    """Many edges inside each bin that holds a quantile."""
    if len(edges) < 2:
        return edges
    chosen = np.unique(_bins_of(np.cumsum(counted), q))
    each = max(2, bins // len(chosen))
    return np.unique(np.concatenate([np.linspace(edges[i], edges[i + 1], each + 1) for i in chosen]))


def quantiles(
    edges: np.ndarray, counted: np.ndarray, finer: np.ndarray, finely: np.ndarray, q: np.ndarray
) -> np.ndarray:
    """Quantiles by linear interpolation inside the finer bins."""
    if len(edges) < 2:
        return np.full(len(q), np.nan)
    below = counted[: np.searchsorted(edges, finer[0], side="left")].sum()
    cumulative = below + np.cumsum(finely)
    rank = np.maximum(q * counted.sum(), 0.5)
    bins = np.minimum(np.searchsorted(cumulative, rank, side="left"), len(finely) - 1)
    before = cumulative[bins] - finely[bins]
    part = np.clip((rank - before) / np.maximum(finely[bins], 1), 0.0, 1.0)
    return finer[bins] + part * (finer[bins + 1] - finer[bins])
