"""Models of f(x, v) and of ∇ log f where the truth is known: their error, what it cost, and how it scales.

    python -m benchmarks.phasespace [--quick] [--only GROUP ...] [--again]

Rows of groups that are not measured stand in the results as they are, with their own date. What takes long is
done in parts that are kept under ``runs/benchmarks/phasespace`` by the hash of their task (not of the code:
``--again`` measures all anew), so that a start that was interrupted goes on where it stopped. The figure
``benchmarks/results/phasespace.png`` is drawn from whatever rows there are, by ``--only figure`` alone, too.
"""

from __future__ import annotations

import argparse
from importlib import import_module, util

from benchmarks import Bench, main

GROUPS = {
    "score": "benchmarks._phasespace_score",
    "tails": "benchmarks._phasespace_tails",
    "disc": "benchmarks._phasespace_disc",
    "hernquist": "benchmarks._phasespace_hernquist",
    "scaling": "benchmarks._phasespace_scaling",
    "flow": "benchmarks._phasespace_flow",
    "noise": "benchmarks._phasespace_noise",
    "training": "benchmarks._phasespace_training",
    "arithmetic": "benchmarks._phasespace_arithmetic",
    "figure": "benchmarks._phasespace_figure",
}
"""Each group's module, imported when its rows are asked for; it has ``measure(bench)``."""


def options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark takes beyond ``--quick``."""
    parser.add_argument("--only", nargs="+", default=[], choices=list(GROUPS), help="groups of rows")
    parser.add_argument("--again", action="store_true", help="measure what was measured already")


def measure(bench: Bench) -> None:
    bench.keep_others()
    for name in bench.options.only or GROUPS:
        module = GROUPS[name]
        if util.find_spec(module) is None:
            print(f"group {name}: no module {module}")
            continue
        import_module(module).measure(bench)


if __name__ == "__main__":
    main("phasespace", measure, options)
