"""Measurements that anyone can repeat: rows with a bar, a peer's figure beside, and a verdict.

Every module here has ``measure(bench)``, prints a table and writes ``benchmarks/results/NAME.json``; its exit
code is 1 when a bar does not hold. ``--quick`` measures a smaller version (its rows say so by their name).

    python -m benchmarks.exact [--quick]      one module
    python -m benchmarks [--quick]            all of them
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from galray.provenance import git_revision, library_versions, now, write_atomic

__all__ = ["Bench", "Row", "main"]

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One measured figure.

    Arguments:
        name: What was measured, with its size.
        value: The figure.
        unit: Its unit; ``""`` for a pure number.
        peer: The figure to beat and whose it is, where there is one.
        bar: What it must be at most, or with ``at_least`` at least; None for a figure without a bar.
        at_least: Whether more is better.
        cpu_seconds: CPU time of this process and its children that the figure took.
        date: When it was measured.
        revision: Of the code that was measured.
    """

    name: str
    value: float
    unit: str = ""
    peer: str = ""
    bar: float | None = None
    at_least: bool = False
    cpu_seconds: float | None = None
    date: str = ""
    revision: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the bar holds; None without one. NaN holds no bar."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usages)


class Bench:
    """Collects rows and writes each as it comes, so that a long measurement can be interrupted.

    Arguments:
        name: Name of the module, and of its results file.
        quick: Measure the smaller version.
    """

    def __init__(self, name: str, *, quick: bool = False) -> None:
        self.name = name
        self.quick = quick
        self.options = argparse.Namespace()
        self.rows: list[Row] = []
        self._keeps = False
        self.path = RESULTS / f"{name}{'-quick' if quick else ''}.json"
        self._cpu = 0.0

    @contextmanager
    def cpu(self) -> Iterator[None]:
        """Account the CPU time of this block to the rows that follow."""
        begin = _cpu_seconds()
        yield
        self._cpu = _cpu_seconds() - begin

    def keep_others(self) -> None:
        """Leave rows of the results file that are not measured this time as they are, with their dates."""
        self._keeps = True

    def row(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        peer: str = "",
        bar: float | None = None,
        at_least: bool = False,
        cpu_seconds: float | None = None,
    ) -> None:
        """Add a row, print it, and write the file; its CPU time is that of the last `cpu` where not given."""
        spent = round(self._cpu if cpu_seconds is None else cpu_seconds, 2)
        row = Row(name, float(value), unit, peer, bar, at_least, spent, now(), git_revision() or "")
        self.rows = [other for other in self.rows if other.name != name]
        self.rows.append(row)
        verdict = {True: "holds", False: "FAILS", None: ""}[row.holds]
        sign = ">=" if at_least else "<="
        limit = f"{sign} {bar:g}" if bar is not None else ""
        figures = f"{row.value:>12.4g} {unit:<10} {limit:<12} {verdict:<6} {row.cpu_seconds:>8.1f} CPU-s"
        print(f"{name:<64} {figures}  {peer}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the rows measured so far."""
        RESULTS.mkdir(exist_ok=True)
        rows = [
            {**asdict(row), "holds": row.holds, "value": row.value if row.value == row.value else None}
            for row in self.rows
        ]
        if self._keeps and self.path.is_file():
            # Read anew every time: another part may be measured at the same time.
            names = {row.name for row in self.rows}
            others = json.loads(self.path.read_text(encoding="utf-8"))["rows"]
            rows = [row for row in others if row["name"] not in names] + rows
        about = {
            "benchmark": self.name,
            "quick": self.quick,
            "date": now(),
            "git": git_revision(),
            "machine": _machine(),
        }
        write_atomic(self.path, {**about, "libraries": library_versions(), "rows": rows})


def _machine() -> dict[str, object]:
    import os

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform()}


def main(
    name: str,
    measure: Callable[[Bench], None],
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Entry point of one module: measure, and exit with 1 when a bar does not hold.

    Arguments:
        name: The module's name.
        measure: Measures, and adds rows to what it is given.
        add_options: Adds the module's own options; they stand in ``bench.options``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="a smaller run")
    if add_options is not None:
        add_options(parser)
    options = parser.parse_args()
    bench = Bench(name, quick=options.quick)
    bench.options = options
    print(f"# {name}{' (quick)' if bench.quick else ''}: {json.dumps(_machine())}", flush=True)
    measure(bench)
    failed = [row.name for row in bench.rows if row.holds is False]
    where = f"benchmarks/results/{bench.path.name}"
    print(f"{len(bench.rows)} rows, {len(failed)} bars do not hold; written to {where}")
    sys.exit(1 if failed else 0)


def stopwatch() -> Callable[[], float]:
    """Seconds of wall time since now."""
    begin = time.perf_counter()
    return lambda: time.perf_counter() - begin
