"""Gravity behind dust: exact f and ε, Plummer spheres seen through ε, and the disc mock behind mock dust.

Long parts are kept under ``runs/benchmarks/gravity``, so a measurement that was killed goes on;
rows of groups that are not measured now stay in the results as they are.

    python -m benchmarks.dust [--only exact plummer disc] [--quick]
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks import Bench, main

GROUPS = {
    "exact": "benchmarks._dust_exact",
    "plummer": "benchmarks._dust_plummer",
    "disc": "benchmarks._dust_disc",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=sorted(GROUPS), default=sorted(GROUPS), metavar="GROUP")


def measure(bench: Bench) -> None:
    only = getattr(bench.options, "only", list(GROUPS))
    bench.keep_others()
    for name, module in GROUPS.items():
        if name in only:
            importlib.import_module(module).measure(bench)


if __name__ == "__main__":
    main("dust", measure, add_options)
