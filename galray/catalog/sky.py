"""Lazy Dask views of a store: counts, sky maps and quantiles, one partition per shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from galray.catalog.shards import ShardStore
from galray.errors import GalrayError

__all__ = ["counts", "healpix_map", "histogram", "quantiles", "view"]


def view(store: ShardStore, columns: Sequence[str] | None = None) -> Any:
    """The store as a lazy Dask DataFrame, one partition per shard.

    Arguments:
        store: The store.
        columns: Which columns; all where not given.
    """
    import dask
    import dask.dataframe as dd

    names = list(store.columns if columns is None else columns)
    meta = _pandas(store, names, 0).iloc[:0]
    parts = [dask.delayed(_pandas)(store, names, number) for number in range(len(store.shards))]
    return dd.from_delayed(parts, meta=meta)


def counts(store: ShardStore, condition: str | None = None) -> int:
    """Number of stars, or of those that meet an SQL condition on the store's columns."""
    return int(_reduce(store, _count, condition).sum())


def healpix_map(store: ShardStore, level: int = 5) -> np.ndarray:
    """Number of stars in each nested HEALPix pixel (ICRS).

    Arguments:
        store: A store of Gaia stars.
        level: HEALPix level; there are 12 · 4^level pixels.

    Returns:
        (12 · 4^level,) int64.

    Raises:
        GalrayError: The store has no ra and dec.
    """
    if not {"ra", "dec"} <= {*store.columns}:
        raise GalrayError(f"{store.path}: no ra and dec in the store", "sky maps need Gaia stars")
    return _reduce(store, _pixels, level)


def histogram(store: ShardStore, column: str, edges: Sequence[float] | np.ndarray) -> np.ndarray:
    """Histogram of a column over the whole store, (len(edges) − 1,) int64; missing values are left out."""
    return _reduce(store, _histogram, column, np.asarray(edges, dtype=np.float64))


def quantiles(store: ShardStore, column: str, q: Sequence[float], *, bins: int = 65_536) -> np.ndarray:
    """Quantiles of a column over the whole store, to within its range divided by `bins`.

    Only a histogram per shard is held, so that the cost in memory does not grow with the store.

    Arguments:
        store: The store.
        column: A numeric column.
        q: Probabilities between 0 and 1.
        bins: Resolution.

    Returns:
        (len(q),) float64.

    Raises:
        GalrayError: The column is absent, not numeric, or has no values.
    """
    statistics = store.manifest["columns"].get(column, {})
    if "min" not in statistics:
        raise GalrayError(
            f"{store.path}: no numbers in a column '{column}'", f"choose one of {', '.join(store.columns)}"
        )
    low, high = float(statistics["min"]), float(statistics["max"])
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    cumulative = np.concatenate([[0], np.cumsum(histogram(store, column, edges))])
    # Empty bins make the cumulative count flat: keep its first point at every height.
    heights, first = np.unique(cumulative, return_index=True)
    return np.interp(np.asarray(q) * cumulative[-1], heights, edges[first])


def _reduce(store: ShardStore, function: Any, *arguments: Any) -> np.ndarray:
    """The sum over shards of `function(table path, …)`, computed through Dask."""
    import dask

    parts = [dask.delayed(function)(str(path), *arguments) for path in store.shards]
    return dask.delayed(_sum)(parts).compute(scheduler=_scheduler())


def _scheduler() -> Any:
    """Ray's workers where Ray is connected, else threads of this process."""
    import sys

    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        from ray.util.dask import ray_dask_get

        return ray_dask_get
    return "threads"


def _sum(parts: list[np.ndarray]) -> np.ndarray:
    return np.sum(parts, axis=0)


def _pandas(store: ShardStore, names: list[str], number: int) -> Any:
    return store.table(names, [number]).to_pandas()


def _count(path: str, condition: str | None) -> np.ndarray:
    stars = pl.scan_parquet(path, glob=False)
    if condition is not None:
        try:
            stars = stars.filter(pl.sql_expr(condition))
            return np.asarray(stars.select(pl.len()).collect().item())
        except pl.exceptions.PolarsError as error:
            raise GalrayError(f"condition '{condition}': {str(error).splitlines()[0]}") from None
    return np.asarray(stars.select(pl.len()).collect().item())


def _pixels(path: str, level: int) -> np.ndarray:
    import hpgeom

    stars = pl.read_parquet(path, columns=["ra", "dec"], glob=False)
    pixels = hpgeom.angle_to_pixel(2**level, stars["ra"].to_numpy(), stars["dec"].to_numpy(), nest=True)
    return np.bincount(pixels, minlength=12 * 4**level)


def _histogram(path: str, column: str, edges: np.ndarray) -> np.ndarray:
    values = pl.read_parquet(path, columns=[column], glob=False)[column].drop_nulls().to_numpy()
    return np.histogram(values, edges)[0]
