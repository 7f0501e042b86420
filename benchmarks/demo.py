"""The demonstration, end to end: its time, and how far each inversion lands from the truth of the mock.

Runs ``galray run demo`` in a folder of its own (``--quick``: ``quickstart``, whose accuracy has no bars).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import galray
from benchmarks import Bench, main, stopwatch


def measure(bench: Bench) -> None:
    name = "quickstart" if bench.quick else "demo"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "galray.cli", "run", name, "--set", f"output={folder}", "--quiet"]
        seconds = stopwatch()
        with bench.cpu():
            subprocess.run(command, check=True)
        minutes = seconds() / 60
        summary = galray.load_run(Path(folder) / name).summary
    full = not bench.quick
    bench.row(f"{name}: wall time after set-up", minutes, "min", bar=12 if full else None)
    bench.row(
        f"{name}: stars with 6D",
        summary["catalog"]["kept"],
        "stars",
        bar=300_000 if full else None,
        at_least=True,
    )
    top = summary["headline"]
    bench.row(f"{name}: |pull| of rho_DM", abs(top["pull"]), "sigma", bar=3)
    bench.row(f"{name}: error of rho_DM over truth", top["error"] / top["truth"], bar=0.6 if full else None)
    for row in summary["quantities"]:
        label = f"{name}: {row['method']} {row['name']} at {row['where']}"
        if row["name"] == "a_R" and row["where"] == "Sun" and row["method"] != "combined":
            bar = 0.10 if row["method"] == "flow" else 0.05
            bench.row(f"{label}, |da|/a", abs(row["value"] / row["truth"] - 1), bar=bar if full else None)
        elif row["name"] == "a_z" and row["where"] == "z=+1 kpc":
            bench.row(f"{label}, |da|/a", abs(row["value"] / row["truth"] - 1))
        elif row["name"] == top["name"] and row["method"] != "combined":
            bench.row(f"{name}: {row['method']} rho_DM average over truth", row["value"] / row["truth"])


if __name__ == "__main__":
    main("demo", measure)
