"""The catalogue engine beside its peers: CPU time, throughput, memory, and what all of Gaia DR3 would cost.

Every figure comes from processes of their own with one Polars and one BLAS thread; peers run in the same run
on the same file. CPU time is the figure, since other work on the machine slows the wall clock: rows per
second "on 2 cores" are twice the rows per CPU-second of one worker. Parts can be run alone:

    python -m benchmarks.catalog --only csv --only transform
    python -m benchmarks.catalog --only lsdb --lsdb-python /path/to/python    (with hats-import and lsdb)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import Bench, main
from benchmarks._catalog_data import BARE, NARROW, bulk_files, csv_file, mock_table, parquet_file, small_files

DR3_ROWS = 1_811_709_771
DR3_BYTES = 753_025_661_884
DR3_FILES = 3_386
DR3_WITH_VELOCITY = 33_812_183 / DR3_ROWS
"""Share of the stars with radial velocity: a bulk file keeps two in a hundred."""

BUSY = 0.9
"""Part of a machine's cores that work while files of unequal size are handed out."""


class Context:
    """Where the data are, and how jobs are run."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.quick = bench.quick
        self.folder = Path(bench.options.data)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bulk_rows, self.bulk_number = (5_000, 2) if self.quick else (100_000, 4)
        self.size = f"{self.bulk_number} files of {self.bulk_rows:,}"

    def run(self, task: str, **arguments: Any) -> dict[str, Any]:
        """One job in a process of its own, its scratch folder removed afterwards."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            arguments = {"target": f"{scratch}/store", **arguments}
            command = [sys.executable, "-m", "benchmarks._catalog_tasks", task, json.dumps(arguments)]
            return _result(command)

    def bar(self, value: float) -> float | None:
        """Bars hold for the full size only."""
        return None if self.quick else value


def _result(command: list[str]) -> dict[str, Any]:
    threads = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(command[:4])} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1][7:])


def _columns(path: Path) -> list[str]:
    """The columns that an ingest with the default settings reads of a file."""
    from galray.catalog import CatalogSettings, open_source
    from galray.catalog.selection import Selection

    return Selection(CatalogSettings(), open_source(path), "0" * 64, 0).columns


def csv(context: Context) -> None:
    """ESA's bulk form to both views, as a file of DR3 is: two stars in a hundred have a radial velocity."""
    _csv(context, DR3_WITH_VELOCITY, f"csv.gz, {context.size} x 152, 2 % with velocity", bars=True)


def csv_full(context: Context) -> None:
    """The same where every star has one, so that every row is transformed and written into both views."""
    _csv(context, 1.0, f"csv.gz, {context.size} x 152, every row kept", bars=False)


def _csv(context: Context, with_velocity: float, what: str, *, bars: bool) -> None:
    bench = context.bench
    paths = bulk_files(context.folder, context.bulk_rows, context.bulk_number, with_velocity)
    columns = _columns(paths[0])
    common = {
        "files": [str(path) for path in paths],
        "columns": columns,
        "repeats": 1 if context.quick else 2,
    }
    with bench.cpu():
        read = context.run("polars_read", **common)
        own = context.run("galray_ingest", **common)
        # Again, the other way round: what else the machine does falls on both.
        if not context.quick:
            own = _least(own, context.run("galray_ingest", **common))
            read = _least(read, context.run("polars_read", **common))
    size = sum(path.stat().st_size for path in paths)
    bench.row(f"{what}: bytes per row", size / own["rows"], "B", peer="Gaia DR3: 416")
    bench.row(f"{what}: bare read_csv of {len(columns)} columns", read["cpu"], "CPU-s")
    bench.row(f"{what}: both views, {own['kept']:,} stars kept", own["cpu"], "CPU-s")
    bench.row(
        f"{what}: both views over bare read_csv",
        own["cpu"] / read["cpu"],
        bar=context.bar(1.6) if bars else None,
    )
    rate, limit = own["rows"] / own["cpu"], context.bar(45_000)
    bench.row(f"{what}: rows per CPU-second", rate, "rows/s", bar=limit, at_least=True)
    with bench.cpu():
        pandas = context.run("pandas_astropy", **common)
        floor = context.run("inflate_and_parse", **common)
    _peer_row(context, what, "pandas + astropy", pandas, own, bars and 2.5)
    # What an ingest would reach whose selection, checksums and both views cost nothing.
    reach = pandas["cpu"] / floor["cpu"]
    name = f"{what}: to inflate and parse and no more, times faster than pandas + astropy"
    bench.row(name, reach, peer=f"{floor['rows'] / floor['cpu']:,.0f} rows per CPU-second")
    if bars:
        with bench.cpu():
            ecsv = context.run("astropy_ecsv", **{**common, "files": common["files"][:1], "repeats": 1})
        _peer_row(context, what, "astropy's ECSV reader", ecsv, own, 8)


def _peer_row(
    context: Context, what: str, who: str, peer: dict[str, Any], own: dict[str, Any], bar: float | None
) -> None:
    each, ours = peer["cpu"] / peer["rows"], own["cpu"] / own["rows"]
    figure = f"{1 / each:,.0f} rows per CPU-second"
    limit = context.bar(bar) if bar else None
    name = f"{what}: times faster than {who}"
    context.bench.row(name, each / ours, peer=figure, bar=limit, at_least=True)


def _least(*results: dict[str, Any]) -> dict[str, Any]:
    return min(results, key=lambda result: result["cpu"])


def parquet(context: Context) -> None:
    """Parquet to both views, every row kept; and by two Ray workers, by the clock."""
    rows = 50_000 if context.quick else 2_000_000
    path = parquet_file(context.folder, rows)
    what = f"Parquet {rows:,} x {len(NARROW)}, every row kept"
    with context.bench.cpu():
        own = context.run("galray_ingest", files=[str(path)], repeats=1 if context.quick else 2)
    rate = 2 * own["rows"] / own["cpu"]
    context.bench.row(f"{what}: both views, 2 cores", rate, "rows/s", bar=context.bar(350_000), at_least=True)
    context.bench.row(f"{what}: both views", own["cpu"], "CPU-s", peer=f"{own['wall']:.2f} s of wall time")
    if not context.quick:
        with context.bench.cpu():
            ray = context.run("galray_on_ray", files=[str(path)], workers=2)
        load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        context.bench.row(
            f"{what}: two Ray workers, by the clock", ray["rows"] / ray["wall"], "rows/s", peer=load
        )


def lsdb(context: Context) -> None:
    """hats-import and lsdb's map_partitions(astropy) on the same Parquet file, where they are installed."""
    python = context.bench.options.lsdb_python
    if not python:
        print("lsdb: left out, name a Python that has hats-import and lsdb with --lsdb-python", flush=True)
        return
    rows = 20_000 if context.quick else 2_000_000
    path = parquet_file(context.folder, rows, BARE)
    script = Path(__file__).with_name("_lsdb_task.py")
    owns, peers = [], []
    with context.bench.cpu():
        for _ in range(1 if context.quick else 3):  # by turns: what else the machine does falls on both
            owns.append(context.run("galray_ingest", files=[str(path)], repeats=4))
            with tempfile.TemporaryDirectory(dir=context.folder) as scratch:
                peers.append(_result([python, str(script), str(path), scratch]))
    own, peer = _least(*owns), _least(*peers)
    figure = f"{peer['cpu']:.1f} CPU-s, {peer['wall']:.1f} s of wall time for {peer['stars']:,} stars"
    what = f"Parquet {rows:,} x {len(BARE)}: times faster than hats-import + lsdb"
    bar = context.bar(15)
    context.bench.row(f"{what}, CPU time", peer["cpu"] / own["cpu"], peer=figure, bar=bar, at_least=True)
    # To compute leaves the states in memory; galray's are on the disk, as is what lsdb writes.
    written = min(result["cpu_written"] for result in peers)
    name, figure = f"{what} that writes its result, CPU time", f"{written:.1f} CPU-s"
    context.bench.row(name, written / own["cpu"], peer=figure)
    figure = f"{peer['wall']:.1f} s with 2 workers; galray {own['wall']:.1f} s with one"
    context.bench.row(f"{what}, by the clock", peer["wall"] / own["wall"], peer=figure)


def transform(context: Context) -> None:
    """ICRS to Galactocentric on arrays in memory."""
    rows = 100_000 if context.quick else 1_000_000
    with context.bench.cpu():
        own = context.run("transform_galray", rows=rows, repeats=3)
        peer = context.run("transform_astropy", rows=rows, repeats=3)
    ratio, figure = peer["cpu"] / own["cpu"], f"{rows / peer['cpu'] / 1e6:.2f} M rows per CPU-second"
    name = f"transform of {rows:,} stars: times faster than SkyCoord"
    context.bench.row(name, ratio, peer=figure, bar=context.bar(3), at_least=True)
    context.bench.row(f"transform of {rows:,} stars", rows / own["cpu"] / 1e6, "M rows/s")


def memory(context: Context) -> None:
    """Peak resident memory of a worker, whatever the size of the file."""
    small, large = (20_000, 100_000) if context.quick else (100_000, 5_000_000)
    for form, make in (("Parquet", parquet_file), ("csv.gz", csv_file)):
        peaks = []
        for rows in (small, large):
            path = make(context.folder, rows)
            with context.bench.cpu():
                peaks.append(context.run("galray_ingest", files=[str(path)])["rss"])
            name = f"{form} {rows:,} x {len(NARROW)}, every row kept: peak memory of a worker"
            context.bench.row(name, peaks[-1], "GiB", bar=context.bar(1.0))
        context.bench.row(
            f"{form}: growth of the peak, {small:,} to {large:,} rows", peaks[1] - peaks[0], "GiB"
        )


def driver(context: Context) -> None:
    """Resident memory of the driver over many small files."""
    few, many = (20, 100) if context.quick else (400, DR3_FILES)
    grown = {}
    for number in (few, many):
        folder = small_files(context.folder, number)
        with context.bench.cpu():
            if context.quick:
                result = context.run("galray_ingest", files=[str(folder)])
            else:
                result = context.run("galray_on_ray", files=[str(folder)], workers=2)
        grown[number] = result["rss"]
        context.bench.row(f"{number:,} small files: peak memory of the driver", result["rss"], "GiB")
    ratio = grown[many] / grown[few]
    name = f"driver's memory, {many:,} files over {few}"
    context.bench.row(name, ratio, bar=context.bar(1.1))


def cost(context: Context) -> None:
    """What the pass over all of DR3 costs, from rates measured here."""
    bench = context.bench
    if context.quick:
        print("cost: left out, small files tell of the start of a pass and not of its rate", flush=True)
        return
    paths = bulk_files(context.folder, context.bulk_rows, context.bulk_number, DR3_WITH_VELOCITY)
    files, size = [str(path) for path in paths], sum(path.stat().st_size for path in paths)
    with bench.cpu():
        own = context.run("galray_ingest", files=files, repeats=1 if context.quick else 3)
    # By rows and by bytes: the mock's rows are not as long as Gaia's. The dearer of the two stands.
    by_rows = DR3_ROWS * own["cpu"] / own["rows"] / 3600
    by_bytes = DR3_BYTES * own["cpu"] / size / 3600
    _cost_rows(
        bench, "csv.gz", DR3_BYTES, max(by_rows, by_bytes), f"{by_rows:.1f} by rows, {by_bytes:.1f} by bytes"
    )
    rows = context.bulk_rows * context.bulk_number
    wide = context.folder / f"wide-{rows}.parquet"
    if not wide.is_file():
        mock_table(rows, DR3_WITH_VELOCITY).write_parquet(wide, row_group_size=100_000)
    with bench.cpu():
        own = context.run("galray_ingest", files=[str(wide)], repeats=1 if context.quick else 3)
    columns = _parquet_share(wide, _columns(wide))
    hours = DR3_ROWS * own["cpu"] / own["rows"] / 3600
    size = DR3_ROWS * columns / own["rows"]
    _cost_rows(bench, "HATS/Parquet", size, hours, "only the columns that are read")


def _parquet_share(path: Path, names: list[str]) -> int:
    """Bytes of some columns in a Parquet file."""
    import pyarrow.parquet as pq

    footer = pq.read_metadata(path)
    groups = (footer.row_group(g) for g in range(footer.num_row_groups))
    chunks = (group.column(i) for group in groups for i in range(footer.num_columns))
    return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in names)


def _cost_rows(bench: Bench, form: str, size: float, hours: float, how: str) -> None:
    """Rows of the cost table: core-hours = DR3's rows x CPU-seconds per row measured / 3600."""
    what = f"all of DR3 as {form}, {DR3_ROWS:,} rows"
    bench.row(f"{what}: bytes read", size / 1e9, "GB")
    bench.row(f"{what}: core-hours", hours, "core-h", peer=how)
    cores = 16
    clock = hours / (cores * BUSY)
    bench.row(f"{what}: one machine of {cores} cores", clock, "h", peer=f"{BUSY:.0%} of the cores busy")
    bench.row(
        f"{what}: ten such machines", 60 * clock / 10, "min", peer=f"reads {size / clock / 360e9:.2f} GB/s"
    )
    formula = f"dollars = {hours / BUSY:.2f} x price of a core-hour + {size / 1e9:.0f} GB x price of egress"
    bench.row(f"{what}: dollars at 0.05 per core-hour", hours / BUSY * 0.05, "$", peer=formula)


PARTS: dict[str, Callable[[Context], None]] = {
    "csv": csv,
    "csv-full": csv_full,
    "parquet": parquet,
    "transform": transform,
    "memory": memory,
    "driver": driver,
    "cost": cost,
    "lsdb": lsdb,
}


def measure(bench: Bench) -> None:
    chosen = bench.options.only or list(PARTS)
    if bench.options.only:
        bench.keep_others()
    context = Context(bench)
    for name in chosen:
        PARTS[name](context)
    if bench.options.clean:
        shutil.rmtree(context.folder, ignore_errors=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=list(PARTS), help="this part; may be repeated")
    parser.add_argument(
        "--data",
        default=os.environ.get("GALRAY_BENCH_DATA", f"{tempfile.gettempdir()}/galray-benchmarks"),
        help="where input files are made and kept (about 5 GB)",
    )
    parser.add_argument("--clean", action="store_true", help="remove the input files at the end")
    parser.add_argument(
        "--lsdb-python",
        default=os.environ.get("GALRAY_LSDB_PYTHON", ""),
        help="a Python with hats-import and lsdb",
    )


if __name__ == "__main__":
    main("catalog", measure, add_options)
