"""The single jobs that `benchmarks.catalog` times, each in a process of its own: ``TASK JSON`` → JSON.

Imports come before the clock starts, for galray and for its peers; a job is repeated and its least CPU time
counts. ``rss`` is the peak resident memory of the process in GiB.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")


def usage() -> float:
    """CPU seconds of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in both)


def peak_memory() -> float:
    """Peak resident memory of this process in GiB."""
    # getrusage tells the parent's too, from before the program was loaded; the kernel's own mark does not.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("no VmHWM in /proc/self/status: memory is measured on Linux only")


def timed(work: Callable[[], Any], repeats: int, prepare: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """The least CPU and wall time of some repeats of `work`, and its last result under ``rows``.

    Before each `prepare` is called, which is not timed, and what was written before goes to the disk, so that
    the kernel's work on it does not fall on who comes after.
    """
    cpu, wall, rows = [], [], 0
    for _ in range(repeats):
        prepare()
        os.sync()
        begin, start = usage(), time.perf_counter()
        rows = work()
        cpu.append(usage() - begin)
        wall.append(time.perf_counter() - start)
    return {"cpu": min(cpu), "wall": min(wall), "rows": rows}


def settings_of(arguments: dict[str, Any]) -> Any:
    from galray.catalog import CatalogSettings

    return CatalogSettings(files=tuple(arguments["files"]), **arguments.get("settings", {}))


def galray_ingest(arguments: dict[str, Any]) -> dict[str, Any]:
    """Files to both views, in this process."""
    from galray.catalog import ingest

    settings = settings_of(arguments)
    target = Path(arguments["target"])

    def work() -> int:
        return ingest(settings, target).row_account["rows_in"]

    # A store is there already from the repeat before.
    result = timed(work, arguments.get("repeats", 1), lambda: shutil.rmtree(target, ignore_errors=True))
    from galray.catalog import ShardStore

    return {**result, "kept": ShardStore(target).num_rows}


def galray_on_ray(arguments: dict[str, Any]) -> dict[str, Any]:
    """Files to both views by Ray actors; ``rss`` is the driver's peak, ``worker_rss`` the largest actor's."""
    from galray.catalog import ingest
    from galray.cluster import ClusterSettings, connect

    settings = settings_of(arguments)
    workers = arguments["workers"]
    with connect(ClusterSettings(num_cpus=workers)):
        start = time.perf_counter()
        store = ingest(settings, Path(arguments["target"]), num_workers=workers)
        wall = time.perf_counter() - start
    return {
        "wall": wall,
        "cpu": float("nan"),
        "rows": store.row_account["rows_in"],
        "worker_rss": store.manifest["peak_worker_mb"] * 1e6 / 2**30,
    }


def polars_read(arguments: dict[str, Any]) -> dict[str, Any]:
    """Bare ``polars.read_csv`` of the columns that the ingest reads."""
    import polars as pl

    from galray.catalog.columns import polars_dtype

    columns = arguments["columns"]
    known = polars_dtype("dr3")

    def work() -> int:
        rows = 0
        for file in arguments["files"]:
            rows += pl.read_csv(
                file,
                columns=columns,
                comment_prefix="#",
                null_values="null",
                schema_overrides={name: known[name] for name in columns},
            ).height
        return rows

    return timed(work, arguments.get("repeats", 1))


def inflate_and_parse(arguments: dict[str, Any]) -> dict[str, Any]:
    """The files inflated by ISA-L, and the same columns parsed from memory by Polars: no pass does with less.

    Polars' own decompression is slower than ISA-L; here each of the two steps is the fastest that there is.
    """
    import polars as pl
    from isal import igzip

    from galray.catalog.columns import polars_dtype

    columns = arguments["columns"]
    known = polars_dtype("dr3")
    block = bytearray(1 << 20)

    def inflate(file: str) -> None:
        with igzip.open(file) as stream:
            while stream.readinto(block):
                pass

    def parse(text: bytes) -> int:
        kinds = {name: known[name] for name in columns}
        return pl.read_csv(text, columns=columns, null_values="null", schema_overrides=kinds).height

    cpu, rows, repeats = 0.0, 0, arguments.get("repeats", 1)
    for file in arguments["files"]:
        with igzip.open(file) as stream:
            text = stream.read()
        header = text.index(b"\n", text.rindex(b"\n#") + 1) + 1  # below the comments
        text = text[header:]
        steps = [timed(lambda f=file: inflate(f), repeats), timed(lambda t=text: parse(t), repeats)]
        cpu += sum(step["cpu"] for step in steps)
        rows += steps[1]["rows"]
    return {"cpu": cpu, "rows": rows}


def _to_galactocentric(columns: dict[str, Any]) -> dict[str, Any]:
    """The 6D states by astropy, as its users write it."""
    import astropy.units as u
    from astropy.coordinates import CartesianDifferential, Galactocentric, SkyCoord

    place = SkyCoord(
        ra=columns["ra"] * u.deg,
        dec=columns["dec"] * u.deg,
        distance=(1.0 / columns["parallax"]) * u.kpc,
        pm_ra_cosdec=columns["pmra"] * u.mas / u.yr,
        pm_dec=columns["pmdec"] * u.mas / u.yr,
        radial_velocity=columns["radial_velocity"] * u.km / u.s,
    )
    frame = Galactocentric(
        galcen_distance=8.122 * u.kpc,
        z_sun=20.8 * u.pc,
        galcen_v_sun=CartesianDifferential([12.9, 245.6, 7.78] * u.km / u.s),
    )
    found = place.transform_to(frame)
    return {
        "x": found.x.to_value(u.kpc),
        "y": found.y.to_value(u.kpc),
        "z": found.z.to_value(u.kpc),
        "vx": found.v_x.to_value(u.km / u.s),
        "vy": found.v_y.to_value(u.km / u.s),
        "vz": found.v_z.to_value(u.km / u.s),
    }


def pandas_astropy(arguments: dict[str, Any]) -> dict[str, Any]:
    """Pandas reads the same columns, astropy transforms the stars with velocity, one Parquet file results."""
    import astropy.coordinates
    import pandas as pd

    assert astropy.coordinates
    target = Path(arguments["target"])

    def work() -> int:
        rows = 0
        for number, file in enumerate(arguments["files"]):
            table = pd.read_csv(file, usecols=arguments["columns"], comment="#", na_values=["null"])
            rows += len(table)
            table = table[table["radial_velocity"].notna() & (table["parallax"] > 0)]
            table = table.assign(**_to_galactocentric({n: table[n].to_numpy() for n in table.columns}))
            table.to_parquet(target.with_suffix(f".{number}.parquet"), compression="zstd")
        return rows

    return timed(work, arguments.get("repeats", 1))


def astropy_ecsv(arguments: dict[str, Any]) -> dict[str, Any]:
    """Astropy's ECSV reader and SkyCoord, as the header of the files invites to; one Parquet file results."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from astropy.table import Table

    target = Path(arguments["target"])

    def work() -> int:
        rows = 0
        for number, file in enumerate(arguments["files"]):
            table = Table.read(file, format="ascii.ecsv", fill_values=[("null", "0")])
            rows += len(table)
            columns = {}
            for name in arguments["columns"]:
                column = table[name]
                masked = getattr(column, "mask", None) is not None and column.dtype.kind == "f"
                columns[name] = np.asarray(column.filled(np.nan) if masked else column)
            keep = np.isfinite(columns["radial_velocity"]) & (columns["parallax"] > 0)
            columns = {name: values[keep] for name, values in columns.items()}
            columns |= _to_galactocentric(columns)
            pq.write_table(pa.table(columns), target.with_suffix(f".{number}.parquet"), compression="zstd")
        return rows

    return timed(work, arguments.get("repeats", 1))


def transform_galray(arguments: dict[str, Any]) -> dict[str, Any]:
    """The engine's own transformation on arrays in memory."""
    import polars as pl

    from galray.catalog import add_states
    from galray.frame import GalacticFrame

    columns = _arrays(arguments["rows"])

    def work() -> int:
        return add_states(pl.DataFrame(columns), GalacticFrame()).height

    return timed(work, arguments.get("repeats", 1))


def transform_astropy(arguments: dict[str, Any]) -> dict[str, Any]:
    """Astropy's SkyCoord → Galactocentric on the same arrays."""
    columns = _arrays(arguments["rows"])
    return timed(lambda: len(_to_galactocentric(columns)["x"]), arguments.get("repeats", 1))


def _arrays(rows: int) -> dict[str, Any]:
    import numpy as np

    rng = np.random.default_rng(1)
    return {
        "ra": rng.uniform(0, 360, rows),
        "dec": np.degrees(np.arcsin(rng.uniform(-1, 1, rows))),
        "parallax": rng.gamma(2, 0.5, rows) + 0.05,
        "pmra": rng.normal(0, 10, rows),
        "pmdec": rng.normal(0, 10, rows),
        "radial_velocity": rng.normal(0, 40, rows),
    }


def main() -> None:
    task, arguments = sys.argv[1], json.loads(sys.argv[2])
    result = globals()[task](arguments)
    result.setdefault("rss", peak_memory())
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
