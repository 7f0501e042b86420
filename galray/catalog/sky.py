"""Lazy Dask views of a store: counts, sky maps, quantiles, histograms and grouped means, file by file.

Every function but `compute` gives a view that holds no numbers yet. `compute` takes any of them at once, on
Ray's workers where Ray is connected and on threads of this process elsewhere; the numbers are the same. A
task reads its files in batches, and hands on sums: neither a worker's nor the driver's memory grows with the
store.

    stars, map = sky.compute(sky.counts(store, "parallax > 1"), sky.healpix_map(store, level=6))

Columns are named, or written as SQL expressions of columns: ``"phot_g_mean_mag + 5 * log10(parallax) - 10"``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import polars as pl

from galray.catalog import tallies
from galray.catalog.shards import ShardStore
from galray.errors import GalrayError

__all__ = [
    "compute",
    "counts",
    "cross_histogram",
    "extent",
    "grouped_means",
    "healpix_map",
    "histogram",
    "quantiles",
    "view",
]

Layout = Literal["shards", "tiles"]
"""Which files of the store are read: the shards, or its HEALPix tiles."""

MAX_TASKS = 512
"""Tasks that one sum is cut into at most: thousands of small tiles are read several to a task."""


def compute(*views: Any) -> tuple[Any, ...]:
    """The numbers of lazy views, all in one go.

    Arguments:
        views: What the functions of this module give, or other Dask collections.

    Returns:
        One result for each view.

    Raises:
        GalrayError: A file of the store is gone or broken.
    """
    import dask

    try:
        return tuple(dask.compute(*views, scheduler=_scheduler()))
    except Exception as error:
        # Ray wraps what a task raises; the user's own mistakes shall read the same everywhere.
        cause = getattr(error, "cause", None)
        if isinstance(cause, GalrayError):
            raise cause from None
        raise


def view(store: ShardStore, columns: Sequence[str] | None = None, *, layout: Layout = "shards") -> Any:
    """The store as a lazy Dask DataFrame, one partition per file.

    Arguments:
        store: The store.
        columns: Which columns; all where not given.
        layout: Shards, or tiles in the order of the sky.

    Raises:
        GalrayError: A column is not in the store, or it has no tiles.
    """
    import dask
    import dask.dataframe as dd

    names = list(store.columns if columns is None else columns)
    for name in names:
        if name not in store.columns:
            raise _no_column(store, name)
    files = _files(store, layout)
    meta = _pandas(files[0], names).iloc[:0]
    return dd.from_delayed([dask.delayed(_pandas)(file, names) for file in files], meta=meta)


def counts(store: ShardStore, condition: str | None = None, *, layout: Layout = "shards") -> Any:
    """Number of stars, or of those that meet an SQL condition on the store's columns (lazy, an int).

    Arguments:
        store: The store.
        condition: Such as ``"bp_rp > 1 and parallax_error < 0.1"``.
        layout: Which files are read.

    Raises:
        GalrayError: The condition cannot be read.
    """
    return _then(int, _sum_of(store, layout, tallies.count, [], condition))


def healpix_map(
    store: ShardStore,
    level: int = 5,
    *,
    frame: Literal["icrs", "galactic"] = "icrs",
    mean_of: str | None = None,
    condition: str | None = None,
    layout: Layout = "shards",
) -> Any:
    """Number of stars, or the mean of a column, in each nested HEALPix pixel (lazy).

    Arguments:
        store: The store. In a galactic map the stars of 6D tables stand where the Sun sees them.
        level: HEALPix level; there are 12 · 4^level pixels.
        frame: Coordinates of the pixels.
        mean_of: The column to average; stars are counted where not given.
        condition: Only the stars that meet it.
        layout: Which files are read.

    Returns:
        (12 · 4^level,) int64 counts, or float64 means with NaN where there is no value.

    Raises:
        GalrayError: The store has no ra and dec, or an expression cannot be read.
    """
    has_sky = {"ra", "dec"} <= {*store.columns}
    if not has_sky and frame == "icrs":
        raise GalrayError(
            f"{store.location}: no ra and dec in the store",
            "use frame='galactic', which needs positions only",
        )
    place = ["ra", "dec"] if has_sky else ["x", "y", "z"]
    arguments = (level, frame, store.frame.sun_position)
    if mean_of is None:
        return _sum_of(store, layout, tallies.pixel_counts, place, condition, *arguments)
    total = _sum_of(store, layout, tallies.pixel_sums, [*place, mean_of], condition, *arguments)
    return _then(tallies.averages, total)


def histogram(
    store: ShardStore,
    column: str,
    edges: Sequence[float] | np.ndarray,
    *,
    condition: str | None = None,
    layout: Layout = "shards",
) -> Any:
    """Histogram of a column, lazy, (len(edges) − 1,) int64; values that are missing or outside are left out.

    Raises:
        GalrayError: The column or the condition cannot be read.
    """
    return _sum_of(store, layout, tallies.histogram, [column], condition, np.asarray(edges, dtype=np.float64))


def cross_histogram(
    store: ShardStore,
    columns: Sequence[str],
    edges: Sequence[Sequence[float] | np.ndarray],
    *,
    condition: str | None = None,
    layout: Layout = "shards",
) -> Any:
    """Histogram of two, three or more columns against one another (lazy).

    Arguments:
        store: The store.
        columns: Columns or expressions, one per dimension.
        edges: Bin edges of each dimension.
        condition: Only the stars that meet it.
        layout: Which files are read.

    Returns:
        int64 of shape (len(edges[0]) − 1, len(edges[1]) − 1, …); a star counts where all values are there.

    Raises:
        GalrayError: A column or the condition cannot be read, or the edges are not one list per column.
    """
    if len(columns) != len(edges) or not columns:
        raise GalrayError(f"{len(columns)} column(s) and {len(edges)} lists of edges", "give one for each")
    arrays = [np.asarray(e, dtype=np.float64) for e in edges]
    return _sum_of(store, layout, tallies.cross_histogram, list(columns), condition, arrays)


def grouped_means(
    store: ShardStore,
    columns: Sequence[str],
    by: str,
    edges: Sequence[float] | np.ndarray,
    *,
    condition: str | None = None,
    layout: Layout = "shards",
) -> Any:
    """Means of columns in bins of another (lazy).

    Arguments:
        store: The store.
        columns: Columns or expressions to average.
        by: The column or expression that is binned.
        edges: Its bin edges.
        condition: Only the stars that meet it.
        layout: Which files are read.

    Returns:
        (len(edges) − 1, len(columns)) float64; NaN where a bin holds no value.

    Raises:
        GalrayError: A column or the condition cannot be read.
    """
    places = np.asarray(edges, dtype=np.float64)
    return _then(
        tallies.averages, _sum_of(store, layout, tallies.group_sums, [by, *columns], condition, places)
    )


def extent(store: ShardStore, column: str, *, condition: str | None = None, layout: Layout = "shards") -> Any:
    """Smallest and largest finite value of a column, lazy, (2,) float64; NaN where it has none.

    Raises:
        GalrayError: The column or the condition cannot be read.
    """
    return _then(
        tallies.extent_or_nan,
        _sum_of(store, layout, tallies.extent, [column], condition, combine=tallies.widest),
    )


def quantiles(
    store: ShardStore,
    column: str,
    q: Sequence[float],
    *,
    condition: str | None = None,
    bins: int = 65_536,
    layout: Layout = "shards",
) -> Any:
    """Quantiles of a column's finite values (lazy).

    Three passes: the range, a histogram over it, and a second histogram inside those bins that hold the
    quantiles. So the error is the range divided by about `bins`², and far outliers do no harm, while only
    histograms are held.

    Arguments:
        store: The store.
        column: A numeric column or expression.
        q: Probabilities between 0 and 1.
        condition: Only the stars that meet it.
        bins: Bins of each histogram.
        layout: Which files are read.

    Returns:
        (len(q),) float64; NaN where the column has no finite value.

    Raises:
        GalrayError: The column or the condition cannot be read, or a probability is not one.
    """
    wanted = np.asarray(q, dtype=np.float64)
    if wanted.size == 0 or not ((wanted >= 0) & (wanted <= 1)).all():
        raise GalrayError(f"quantiles: {list(q)} are not probabilities", "give numbers between 0 and 1")
    coarse = _then(tallies.even_edges, extent(store, column, condition=condition, layout=layout), bins)
    first = _sum_of(store, layout, tallies.histogram, [column], condition, coarse)
    fine = _then(tallies.finer_edges, coarse, first, wanted, bins)
    second = _sum_of(store, layout, tallies.histogram, [column], condition, fine)
    return _then(tallies.quantiles, coarse, first, fine, second, wanted)


# How a view is put together -------------------------------------------------------------------------------


def _scheduler() -> Any:
    """Ray's workers where Ray is connected, else threads of this process."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return "threads"
    import dask
    from dask.base import DaskMethodsMixin

    loaded = "ray.util.dask" in sys.modules
    persist, method = dask.persist, DaskMethodsMixin.persist
    from ray.util.dask import ray_dask_get

    if not loaded:
        # Importing it replaces dask.persist for everybody, also where Ray's scheduler is not used.
        dask.persist, DaskMethodsMixin.persist = persist, method  # type: ignore[method-assign]
    return ray_dask_get


def _then(function: Any, *arguments: Any) -> Any:
    import dask

    return dask.delayed(function)(*arguments)


def _sum_of(
    store: ShardStore,
    layout: Layout,
    function: Any,
    columns: Sequence[str],
    condition: str | None,
    *arguments: Any,
    combine: Any = None,
) -> Any:
    """The lazy sum over files of ``function(values, *arguments)``, values a list of float64 arrays."""
    import dask

    files = _files(store, layout)
    expressions = [_expression(store, text) for text in columns]
    where = None if condition is None else _condition(store, condition)
    bundles = np.array_split(np.arange(len(files)), min(len(files), MAX_TASKS))
    task = dask.delayed(tallies.over_files)
    # Arguments stand as they are: a view among them is computed first, an array is not looked into.
    combine = combine or tallies.plus
    parts = [
        task([files[i] for i in bundle], expressions, where, combine, function, *arguments)
        for bundle in bundles
    ]
    return dask.delayed(tallies.combined)(combine, parts)


def _files(store: ShardStore, layout: Layout) -> list[os.PathLike[str]]:
    """The files of a layout, in a fixed order."""
    if layout == "shards":
        return [*store.shards]
    tiles = (store.manifest.get("tiles") or {}).get("files")
    if not tiles:
        raise GalrayError(
            f"{store.location}: the store has no tiles", "read its shards, or ingest with tiles"
        )
    return [store.file(f"sky/{name}") for name in sorted(tile["file"] for tile in tiles)]


def _no_column(store: ShardStore, name: str) -> GalrayError:
    return GalrayError(
        f"{store.location}: no column '{name}' in the store; it has {', '.join(store.columns)}",
        "name it in catalog.keep_columns and ingest again",
    )


def _parsed(store: ShardStore, text: str, what: str) -> pl.Expr:
    try:
        expression = pl.sql_expr(text)
        names = expression.meta.root_names()
    except pl.exceptions.PolarsError as error:
        raise GalrayError(
            f"{what} '{text}': {str(error).splitlines()[0]}", "write SQL on columns of the store"
        ) from None
    for name in names:
        if name not in store.columns:
            raise GalrayError(f"{what} '{text}': {_no_column(store, name).what}", "correct the name")
    return expression


def _expression(store: ShardStore, text: str) -> pl.Expr:
    expression = pl.col(text) if text in store.columns else _parsed(store, text, "expression")
    return expression.cast(pl.Float64)


def _condition(store: ShardStore, text: str) -> pl.Expr:
    expression = _parsed(store, text, "condition")
    try:
        schema = pl.read_parquet_schema(os.fspath(_files(store, "shards")[0]))
        kind = pl.Schema(schema).to_frame().lazy().select(expression).collect().dtypes[0]
    except pl.exceptions.PolarsError as error:
        raise GalrayError(f"condition '{text}': {str(error).splitlines()[0]}") from None
    if kind != pl.Boolean:
        raise GalrayError(f"condition '{text}' gives {kind}, not true or false", "compare it with something")
    return expression


def _pandas(file: os.PathLike[str], names: list[str]) -> Any:
    frame = pl.read_parquet(os.fspath(file), columns=names, glob=False, hive_partitioning=False)
    return frame.select(names).to_pandas()
