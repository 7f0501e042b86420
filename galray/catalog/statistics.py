"""What is known of a store's columns from the pass: ranges, moments and histograms, additive over shards."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from galray.catalog.settings import CatalogSettings

__all__ = ["ColumnSums", "Histograms", "column_statistics", "per_shard"]

_REACH_KPC = 32.0
_DOT_LENGTH = 8192  # OpenBLAS gives dot products to threads beyond 10,000
_LARGEST = sys.float_info.max
_BLOCK = 32_768  # values that are counted at a time, which stay in the cache


class ColumnSums:
    """Per column of a shard: missing values, and of the finite ones number, range, sum and sum of squares.

    Arguments:
        schema: The shard's columns and types.
    """

    def __init__(self, schema: Mapping[str, pl.DataType]) -> None:
        self.numbers = [name for name, kind in schema.items() if kind.is_numeric()]
        self.values: dict[str, dict[str, Any]] = {name: {"nulls": 0} for name in schema}

    def add(self, frame: pl.DataFrame) -> None:
        """Add rows."""
        if not frame.height:
            return
        missing = frame.null_count().row(0, named=True)
        for name, nulls in missing.items():
            self.values[name]["nulls"] += nulls
        for name in self.numbers:
            if missing[name] < frame.height:
                self._add(self.values[name], _numbers(frame[name]))

    @staticmethod
    def _add(own: dict[str, Any], values: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            squares = _sum_of_squares(values)
            if not np.isfinite(squares):
                values = values[np.isfinite(values)]  # inf would be its own mean and range
                squares = _sum_of_squares(values)
            sums = {"sum": float(values.sum()), "squares": squares}
        if not len(values):
            return
        own["count"] = own.get("count", 0) + len(values)
        own["min"] = min(own.get("min", np.inf), float(values.min()))
        own["max"] = max(own.get("max", -np.inf), float(values.max()))
        for what, total in sums.items():
            # Sums of the largest numbers overflow, and JSON has no infinity.
            own[what] = min(max(own.get(what, 0.0) + total, -_LARGEST), _LARGEST)


def _sum_of_squares(values: np.ndarray) -> float:
    """By dot products so short that BLAS wakes no threads for them: these would spin on after each."""
    parts = (values[start : start + _DOT_LENGTH] for start in range(0, len(values), _DOT_LENGTH))
    return sum(float(np.dot(part, part)) for part in parts)


class Histograms:
    """Counts of the stars' places, velocities and magnitudes in fixed bins.

    The bins depend on the settings alone, so that the counts of shards, and of stores of the same
    configuration, add up. Each quantity has one bin more at either end for what lies beyond.

    Arguments:
        settings: The catalogue's settings: positions are counted within the ball, or within 32 kpc.
        columns: The shard's columns; quantities that they do not give are left out.
    """

    def __init__(self, settings: CatalogSettings, columns: Sequence[str]) -> None:
        if settings.ball is None:
            center, radius = (0.0, 0.0, 0.0), _REACH_KPC
        else:
            center, radius = settings.ball_center(), settings.ball.radius_kpc
        sun = settings.frame.build().sun_position
        square = sum(((pl.col(n) - s) ** 2 for n, s in zip("xyz", sun, strict=True)), start=pl.lit(0.0))
        far = radius + float(np.linalg.norm(np.subtract(center, sun)))
        bins: dict[str, tuple[pl.Expr, float, float, int]] = {
            n: (pl.col(n), c - radius, c + radius, 100) for n, c in zip("xyz", center, strict=True)
        }
        bins |= {n: (pl.col(n), -600.0, 600.0, 120) for n in ("vx", "vy", "vz")}
        speed = (pl.col("vx") ** 2 + pl.col("vy") ** 2 + pl.col("vz") ** 2).sqrt()
        bins["speed"] = (speed, 0.0, 800.0, 160)
        bins["distance"] = (square.sqrt(), 0.0, far, 100)
        bins |= {n: (pl.col(n), 0.0, 22.0, 88) for n in ("phot_g_mean_mag", "grvs_mag")}
        bins["bp_rp"] = (pl.col("bp_rp"), -1.0, 6.0, 70)
        bins["parallax"] = (pl.col("parallax"), -5.0, 20.0, 125)
        have = {*columns}
        self.bins = {n: b for n, b in bins.items() if {*b[0].meta.root_names()} <= have}

    def empty(self) -> dict[str, np.ndarray]:
        """Zero counts, (bins + 2,) int64 each."""
        return {name: np.zeros(bins[3] + 2, dtype=np.int64) for name, bins in self.bins.items()}

    def add(self, counts: dict[str, np.ndarray], frame: pl.DataFrame) -> None:
        """Count rows; a missing value is in no bin."""
        if not frame.height:
            return
        quantities = frame.select(bins[0].cast(pl.Float64).alias(name) for name, bins in self.bins.items())
        for name, (_, low, high, number) in self.bins.items():
            values = _numbers(quantities[name])
            for start in range(0, len(values), _BLOCK):
                with np.errstate(over="ignore"):
                    slots = values[start : start + _BLOCK] - low
                    slots *= number / (high - low)
                    slots += 1.0
                    np.clip(slots, 0.0, number + 1.0, out=slots)
                counts[name] += np.bincount(slots.astype(np.intp), minlength=number + 2)

    def describe(self, counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The counts with their bins in plain values, as the manifest holds them."""
        return {
            name: {
                "low": low,
                "high": high,
                "below": int(counts[name][0]),
                "above": int(counts[name][-1]),
                "counts": counts[name][1:-1].tolist(),
            }
            for name, (_, low, high, _) in self.bins.items()
        }


def _numbers(column: pl.Series) -> np.ndarray:
    """The values that are not missing, as float64."""
    return (column.drop_nulls() if column.null_count() else column).cast(pl.Float64).to_numpy()


def column_statistics(entries: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Type, number of missing values, and of the finite ones range, mean and deviation, over all shards."""
    result: dict[str, Any] = {}
    for name, kind in schema.items():
        sums = [(entry["rows"], entry["sums"][name]) for entry in entries]
        statistics: dict[str, Any] = {"dtype": str(kind), "nulls": sum(s["nulls"] for _, s in sums)}
        counted = [(s["count"], s) for _, s in sums if "count" in s]
        if counted and name != "source_id":
            number = sum(n for n, _ in counted)
            mean = sum(s["sum"] for _, s in counted) / number
            # mean * mean, not mean**2: where a value is near the largest number, inf, and no error.
            variance = max(sum(s["squares"] for _, s in counted) / number - mean * mean, 0.0)
            whole = max(abs(s[what]) for _, s in counted for what in ("sum", "squares")) < _LARGEST
            statistics |= {
                "min": min(s["min"] for _, s in counted),
                "max": max(s["max"] for _, s in counted),
                # Where sums overflowed there is a range and no more; JSON has null, and no infinity.
                "mean": mean if whole else None,
                "std": variance**0.5 if whole else None,
            }
        result[name] = statistics
    return result


def per_shard(entries: Sequence[Mapping[str, Any]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Range of each column and counts of each histogram shard by shard, as tables.

    Returns:
        ``shard, column, rows, nulls, min, max`` and ``shard, quantity, counts`` (a list with the bins below
        and above at its ends).
    """
    ranges = [
        (number, name, entry["rows"], sums["nulls"], sums.get("min"), sums.get("max"))
        for number, entry in enumerate(entries)
        for name, sums in entry["sums"].items()
    ]
    counts = [
        (number, name, count)
        for number, entry in enumerate(entries)
        for name, count in entry["histograms"].items()
    ]
    kinds = {"shard": pl.Int32, "column": pl.String, "rows": pl.Int64, "nulls": pl.Int64}
    return (
        pl.DataFrame(ranges, schema={**kinds, "min": pl.Float64, "max": pl.Float64}, orient="row"),
        pl.DataFrame(
            counts,
            schema={"shard": pl.Int32, "quantity": pl.String, "counts": pl.List(pl.Int64)},
            orient="row",
        ),
    )
