"""Ten thousand broken files: read or refused in a sentence; no traceback, no hang, no file elsewhere."""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import Bench, main
from benchmarks._fuzz_cases import KINDS, Fuzz

CASES = 10_000
HANG_SECONDS = 20
"""A case that takes longer hangs."""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=1, help="of the cases")


def _hangs(*_: Any) -> None:
    raise TimeoutError(f"a case took more than {HANG_SECONDS} s")


def measure(bench: Bench) -> None:
    """Run the cases of every kind and count how they end."""
    number = (400 if bench.quick else CASES) // len(KINDS)
    signal.signal(signal.SIGALRM, _hangs)
    where = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        fuzz = Fuzz(Path(name) / "fuzz", bench.options.seed)
        os.chdir(fuzz.folder / "inside")  # what goes astray is then seen
        try:
            for kind in KINDS:
                ends: Counter[str] = Counter()
                slowest = 0.0
                with bench.cpu():
                    for _ in range(number):
                        begin = time.perf_counter()
                        signal.alarm(HANG_SECONDS)
                        try:
                            ends[fuzz.case(kind)] += 1
                        except Exception as error:
                            ends["fault"] += 1
                            last = traceback.extract_tb(error.__traceback__)[-1]
                            place = f"{Path(last.filename).name}:{last.lineno}"
                            print(f"  {kind}: {type(error).__name__} at {place}: {str(error)[:100]}")
                        finally:
                            signal.alarm(0)
                        slowest = max(slowest, time.perf_counter() - begin)
                bench.row(f"fuzz: faults of {number:,} broken inputs, {kind}", ends["fault"], bar=0)
                bench.row(f"fuzz: refused of {number:,}, {kind}", ends["refused"], cpu_seconds=0)
                bench.row(f"fuzz: slowest case, {kind}", slowest, "s", bar=HANG_SECONDS, cpu_seconds=0)
            bench.row(
                "fuzz: files outside the folder that is read", len(fuzz.outside()), bar=0, cpu_seconds=0
            )
        finally:
            os.chdir(where)


if __name__ == "__main__":
    main("fuzz", measure, _options)
