"""Input files of `benchmarks.catalog`: a mock disc seen by Gaia, as all 152 columns of ``gaia_source``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hpgeom
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from galray.catalog import write_gaia_source
from galray.catalog.columns import CORRELATIONS, ERRORS, OBSERVABLES, PHOTOMETRY, columns

# Share of the stars of DR3 that have these groups of columns.
_GROUPS = {
    "pseudocolour": ("pseudocolour", 0.49),
    "gspphot": ("_gspphot", 0.26),
    "vbroad": ("vbroad", 0.002),
}
_TWO_PARAMETERS = 0.19
"""Share of the sources with a place and no more: neither parallax nor motion."""

_VELOCITY_COLUMNS = ("radial_velocity", "rv_", "rvs_", "grvs_")


def mock_table(rows: int, with_velocity: float, seed: int = 1) -> pl.DataFrame:
    """Stars of a disc seen by Gaia, a part of them with radial velocity; the other columns made up.

    Columns that follow from a star's place, motion and magnitude are those of `galray.mocks.observe`. The
    rest are numbers of the right type and length, missing as often as in DR3.
    """
    from galray.mocks.observe import observe
    from galray.mocks.settings import ObserveSettings

    rng = np.random.default_rng(seed)
    stars = {
        "x": rng.uniform(-3, 3, rows) - 8.122,
        "y": rng.uniform(-3, 3, rows),
        "z": rng.laplace(0, 0.3, rows),
        "vx": rng.normal(0, 40, rows),
        "vy": rng.normal(215, 30, rows),
        "vz": rng.normal(0, 20, rows),
        "abs_g_mag": rng.normal(0.5, 0.8, rows),
        "bp_rp": rng.normal(1.2, 0.1, rows),
    }
    observed = pl.from_arrow(observe(pa.table(stars), ObserveSettings(rv_missing_fraction=0.0), seed))
    assert isinstance(observed, pl.DataFrame)
    seen = pl.Series(rng.random(rows) < with_velocity)
    made: dict[str, Any] = {}
    for column in columns("dr3"):
        if column.name in observed.columns:
            continue
        made[column.name] = _made_up(column.name, column.dtype, rows, rng, observed["source_id"])
    table = observed.with_columns(**made)
    missing = []
    full = pl.Series((rng.random(rows) >= _TWO_PARAMETERS) | seen.to_numpy())
    for name in table.columns:
        if name.startswith(("parallax", "pm")) or (name.endswith("_corr") and name != "ra_dec_corr"):
            missing.append(pl.when(full).then(pl.col(name)).alias(name))
            continue
        if name.startswith(_VELOCITY_COLUMNS):
            missing.append(pl.when(seen).then(pl.col(name)).alias(name))
        for word, share in _GROUPS.values():
            if word in name:
                missing.append(pl.when(pl.Series(rng.random(rows) < share)).then(pl.col(name)).alias(name))
    return table.with_columns(missing)


def _made_up(name: str, dtype: str, rows: int, rng: np.random.Generator, ids: pl.Series) -> pl.Series:
    if name == "designation":
        return pl.select(pl.lit("Gaia DR3 ") + ids.cast(pl.String)).to_series()
    if name == "solution_id":
        return pl.Series(np.full(rows, 1636148068921376768))
    if dtype == "bool":
        return pl.Series(rng.random(rows) < 0.1)
    if dtype == "string":
        return pl.Series(rng.choice(["NOT_AVAILABLE", "VARIABLE"], rows, p=[0.95, 0.05]))
    if dtype.startswith("int"):
        return pl.Series(rng.poisson(15, rows).astype(np.int16))
    if name.startswith("classprob"):
        return pl.Series((10.0 ** rng.uniform(-13, 0, rows)).astype(np.float32))
    if dtype == "float64":
        return pl.Series(rng.lognormal(5.0, 1.5, rows))
    # As many digits as most of Gaia's own: four to eight.
    return pl.Series(np.round(rng.lognormal(1.0, 1.0, rows), rng.integers(3, 7))).cast(pl.Float32)


def bulk_files(folder: Path, rows: int, number: int, with_velocity: float) -> list[Path]:
    """Files in ESA's bulk form of so many rows each; made once."""
    target = folder / f"bulk-{rows}-{number}-{with_velocity:.3g}"
    if not target.is_dir():
        part = target.with_suffix(".part")
        write_gaia_source(mock_table(rows * number, with_velocity), part, rows_per_file=rows)
        part.rename(target)
    return sorted(target.glob("*.csv.gz"))


NARROW = ("source_id", *OBSERVABLES, *ERRORS, *CORRELATIONS, *PHOTOMETRY)
"""What an ingest reads of each star."""


BARE = ("source_id", *OBSERVABLES, *ERRORS)
"""The states' observables with their errors."""


def parquet_file(folder: Path, rows: int, columns: tuple[str, ...] = NARROW) -> Path:
    """Stars with velocity as one Parquet file, the mock repeated at jittered places with ids of their own."""
    target = folder / f"placed-{rows}-{len(columns)}.parquet"
    if not target.is_file():
        base = mock_table(min(rows, 100_000), 1.0).select(columns)
        part = target.with_suffix(".part")
        writer = None
        written = 0
        while written < rows:
            frame = _jittered(base.head(rows - written), written // base.height)
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
            writer = writer or pq.ParquetWriter(part, table.schema, compression="zstd")
            writer.write_table(table)
            written += frame.height
        assert writer is not None
        writer.close()
        part.rename(target)
    return target


def _jittered(frame: pl.DataFrame, copy: int) -> pl.DataFrame:
    """Another catalogue of the same statistics: other ids, places moved by up to half a degree."""
    rng = np.random.default_rng(copy)
    n = frame.height
    moved = frame.with_columns(
        ra=(pl.col("ra") + pl.Series(rng.uniform(0, 0.5, n))) % 360.0,
        dec=(pl.col("dec") + pl.Series(rng.uniform(-0.5, 0.5, n))).clip(-90, 90),
        parallax=pl.col("parallax") * pl.Series(rng.uniform(0.9, 1.1, n)),
    )
    # as in Gaia, an id tells the place: its pixel of level 12, and below it 35 bits
    pixels = hpgeom.angle_to_pixel(2**12, moved["ra"].to_numpy(), moved["dec"].to_numpy())
    ids = (pixels.astype(np.int64) << 35) + rng.integers(2**35, size=n)
    return moved.with_columns(pl.Series("source_id", ids))


def csv_file(folder: Path, rows: int) -> Path:
    """The same stars as one csv.gz of the columns that are read, written piece by piece."""
    import gzip

    target = folder / f"placed-{rows}.csv.gz"
    if not target.is_file():
        base = mock_table(min(rows, 100_000), 1.0).select(NARROW)
        part = target.with_suffix(".part")
        with gzip.open(part, "wb", compresslevel=1) as stream:
            written = 0
            while written < rows:
                frame = _jittered(base.head(rows - written), written // base.height)
                stream.write(frame.write_csv(include_header=written == 0).encode())
                written += frame.height
        part.rename(target)
    return target


def small_files(folder: Path, number: int, rows: int = 40) -> Path:
    """A folder of many small Parquet files."""
    target = folder / f"small-{number}"
    if not target.is_dir():
        part = target.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        base = mock_table(min(number * rows, 100_000), 1.0).select(NARROW)
        for index in range(number):
            start = (index * rows) % base.height
            frame = _jittered(base.slice(start, rows), 1 + index * rows // base.height)
            frame.write_parquet(part / f"part-{index:05d}.parquet")
        part.rename(target)
    return target
