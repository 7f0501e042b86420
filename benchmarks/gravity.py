"""Gravity and mass beside the peers' figures: exact solvers, Plummer, discs, bars, equilibrium, real stars.

Every group of rows is a module of its own, imported when it is asked for; rows of groups that are not
measured now stay in the results as they are. Long parts are kept under ``runs/benchmarks/gravity``, so a
measurement that was killed goes on where it stopped.

    python -m benchmarks.gravity [--only exact plummer] [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util

from benchmarks import Bench, main

GROUPS = {
    "exact": "benchmarks._gravity_exact",
    "plummer": "benchmarks._gravity_plummer",
    "round": "benchmarks._gravity_round",
    "moments": "benchmarks._gravity_moments",
    "disc": "benchmarks._gravity_disc",
    "bar": "benchmarks._gravity_bar",
    "equilibrium": "benchmarks._gravity_equilibrium",
    "real": "benchmarks._gravity_real",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=sorted(GROUPS), default=sorted(GROUPS), metavar="GROUP")


def measure(bench: Bench) -> None:
    only = getattr(bench.options, "only", list(GROUPS))
    bench.keep_others()
    for name, module in GROUPS.items():
        if name not in only:
            continue
        if importlib.util.find_spec(module) is None:
            print(f"# {name}: no module {module}, left out", flush=True)
            continue
        importlib.import_module(module).measure(bench)


if __name__ == "__main__":
    main("gravity", measure, add_options)
