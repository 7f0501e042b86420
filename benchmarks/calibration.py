"""Do error bars hold? Small runs on mock galaxies of known truth: moments, and pairs of score networks.

Mocks and measurements are kept under ``runs/benchmarks/calibration``: a benchmark that was killed goes
on where it stopped. Moments and pairs share the galaxies. Judged are the terms that the mocks exercise: they
are in equilibrium and axially symmetric.

    python -m benchmarks.calibration [--only moments score] [--quick]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks import Bench, main
from galray.calibration.run import NAMED, Calibration, Judgement, calibrate
from galray.calibration.statistics import LEVELS
from galray.config import load_config
from galray.console import Console

CONFIG = Path(__file__).parent / "calibration.toml"
GROUPS = {
    "moments": [],
    "score": [
        "name=score",
        "description=Two small score networks on 40,000 stars with Gaia-like errors, measured 50 times",
        'methods=["score"]',
        "calibration.mocks=50",
    ],
}
BARE = "no peer states how often its error bars hold the truth"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=sorted(GROUPS), default=sorted(GROUPS), metavar="GROUP")
    parser.add_argument("--known", action="store_true", help="judge the mocks that are measured already")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of the local Ray")


def measure(bench: Bench) -> None:
    bench.keep_others()
    for group, overrides in GROUPS.items():
        if group not in bench.options.only:
            continue
        fewer = ["calibration.mocks=6"] if bench.quick else []
        cpus = [f"cluster.num_cpus={bench.options.cpus}"]
        known = bench.options.known
        found = calibrate(load_config(CONFIG, [*overrides, *fewer, *cpus]), console=Console(), known=known)
        _rows(bench, group, found)


def _rows(bench: Bench, group: str, found: Calibration) -> None:
    """The rows of one calibration; CPU seconds are those of the mocks, whenever they were measured."""
    seconds = np.array([record["cpu_seconds"] for record in found.records.values()])
    spent = float(seconds.sum())

    def row(name: str, value: float, unit: str = "", **more: object) -> None:
        bench.row(f"{group}: {name}", value, unit, cpu_seconds=spent, **more)  # type: ignore[arg-type]

    number = len(found.records)
    least = {"moments": 100, "score": 50}[group]
    row("mocks measured", number, "mocks", bar=None if bench.quick else least, at_least=True)
    row("measurement of one mock, its galaxy known", float(np.median(seconds[:, 1])), "CPU-s", bar=40)
    for name in NAMED:
        places = [j for j in found.judgements if (j.method, j.name) == (group, name)]
        _coverage(row, group, places)


def _coverage(row: object, group: str, places: list[Judgement]) -> None:
    assert callable(row)
    name, held = places[0].name, np.array([j.raw.fractions for j in places])
    where = "" if len(places) == 1 else f", mean of {len(places)} places"
    at = {f"{100 * level:.0f}": i for i, level in enumerate(LEVELS)}
    mean, errors = held.mean(0), places[0].raw.errors
    for text, i in at.items():
        row(f"{name}{where}: {text} % band holds", 100 * mean[i], "%", peer=BARE)
    if group == "moments":
        row(f"{name}{where}: 68 % band off nominal", 100 * abs(mean[at["68"]] - 0.68), "points", bar=10)
        row(f"{name}{where}: 90 % band", 100 * mean[at["90"]], "%", bar=82, at_least=True)
    else:
        for text, i in at.items():
            off = abs(mean[i] - LEVELS[i]) / errors[i]
            row(f"{name}{where}: {text} % band off nominal", off, "binomial errors", bar=2)
    width = np.array([j.raw.width for j in places])
    row(f"{name}{where}: pull width, at most", width.mean(), bar=1.25)
    row(f"{name}{where}: pull width, at least", width.mean(), bar=0.8, at_least=True)
    row(f"{name}{where}: bias in errors", float(np.mean([j.raw.mean_pull for j in places])), "sigma")
    if len(places) > 1:
        worst = int(np.argmax(np.abs(held[:, at["68"]] - 0.68)))
        row(f"{name}, worst of {len(places)} places: 68 % band holds", 100 * held[worst, at["68"]], "%")
    row(f"{name}: inflation fitted on the even mocks", places[0].fitted)
    tested = [j.tested for j in places if j.tested is not None]
    if tested:
        inflated = float(np.mean([t.width for t in tested]))
        row(f"{name}{where}: pull width of the odd mocks inflated, at most", inflated, bar=1.25)
        row(
            f"{name}{where}: pull width of the odd mocks inflated, at least", inflated, bar=0.8, at_least=True
        )
        part = float(np.mean([t.fractions[at["68"]] for t in tested]))
        row(f"{name}{where}: 68 % band of the odd mocks inflated holds", 100 * part, "%")


if __name__ == "__main__":
    main("calibration", measure, add_options)
