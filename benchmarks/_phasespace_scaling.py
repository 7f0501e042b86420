"""How the error of score networks falls with stars and with CPU time; and the figure of all rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import Bench
from benchmarks._phasespace_common import mean, median_error, part, sphere, stars
from benchmarks._phasespace_score import averaged, task, train_part

__all__ = ["draw", "measure"]

EPOCHS = {2**14: 12, 2**15: 12, 2**16: 12, 2**18: 6, 2**19: 4, 2**20: 2}
"""Passes over the stars for each number of them: fewer for more, since the larger sets take more steps."""
SHORTER = (2, 5)
"""Passes over 2¹⁷ stars that the time curve adds to those of the table."""
MEMBERS = 3
_NAME = re.compile(
    r"^Plummer, (?P<stars>\d+) stars(?:, \d+ epochs)?: (?P<how>one|\d+) (?P<what>score networks?|flows?)\b"
)
_PEERS = {"one spline flow": (660.0, 0.31), "16 spline flows": (10_800.0, 0.086)}
"""Others' CPU seconds and error at 2¹⁷ stars."""


def measure(bench: Bench) -> None:
    """Rows of the curves that the tables do not have, and the figure."""
    sizes = {2**12: 3, 2**13: 3} if bench.quick else EPOCHS
    for count, epochs in sizes.items():
        members = 2 if bench.quick else MEMBERS if count <= 2**16 else 1
        _point(bench, f"Plummer, {count} stars", count, epochs, members)
    if not bench.quick:
        for epochs in SHORTER:
            _point(bench, f"Plummer, {2**17} stars, {epochs} epochs", 2**17, epochs, 1)
        draw(json.loads(bench.path.read_text())["rows"], bench.path.with_suffix(".png"))


def _point(bench: Bench, label: str, count: int, epochs: int, members: int) -> None:
    found = [
        part(bench, "score", task(count, 0, member, epochs=epochs), train_part) for member in range(members)
    ]
    spent = mean([one["cpu_seconds"] for one in found])
    bench.row(f"{label}: one score network", mean([one["error"] for one in found]), cpu_seconds=spent)
    if members > 1:
        exact = sphere().score(stars(count, 100)[2])
        bench.row(
            f"{label}: {members} score networks averaged",
            median_error(averaged(found), exact),
            cpu_seconds=members * spent,
        )


def _error(point: tuple[int, float, float]) -> float:
    return point[1]


def draw(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Draw error against number of stars and against CPU time from whatever rows there are.

    Arguments:
        rows: Rows of the results file; those of other names are passed over.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    series: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for row in rows:
        found = _NAME.match(row["name"])
        if found is None or row["value"] is None or row["unit"]:
            continue
        what = "score network" if found["what"].startswith("score") else "flow"
        how = "one" if found["how"] == "one" else "averaged"
        point = (int(found["stars"]), float(row["value"]), float(row["cpu_seconds"] or 0.0))
        series.setdefault((what, how), []).append(point)
    figure, (by_stars, by_time) = plt.subplots(1, 2, figsize=(9.0, 3.6), sharey=True, layout="constrained")
    colours = {"score network": "#0b6e99", "flow": "#c05a1e"}
    for (what, how), points in sorted(series.items(), reverse=True):
        style = {
            "color": colours[what],
            "marker": "o" if how == "one" else "s",
            "mfc": colours[what] if how == "one" else "white",
            "markersize": 5,
            "linewidth": 1.2,
            "linestyle": "-" if how == "one" else "--",
        }
        label = f"one {what}" if how == "one" else f"{what}s averaged"
        best = [min((p for p in points if p[0] == n), key=_error) for n in sorted({p[0] for p in points})]
        by_stars.plot([p[0] for p in best], [p[1] for p in best], label=label, **style)
        timed = sorted((p for p in points if p[0] == 2**17 and p[2] > 0), key=lambda p: p[2])
        by_time.plot([p[2] for p in timed], [p[1] for p in timed], **style)
    for name, (seconds, error) in _PEERS.items():
        by_time.plot(seconds, error, "*", color="0.4", markersize=9)
        by_time.annotate(name, (seconds, error), (-4, 6), textcoords="offset points", ha="right", fontsize=8)
    for axes in (by_stars, by_time):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(True, which="major", alpha=0.3, linewidth=0.5)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5])
    counts = sorted({p[0] for points in series.values() for p in points})
    by_stars.set_xticks(counts, [f"$2^{{{n.bit_length() - 1}}}$" for n in counts])
    by_stars.xaxis.set_minor_formatter(NullFormatter())
    by_stars.set_xlabel("stars")
    by_stars.set_ylabel("median error of the score")
    by_stars.legend(frameon=False, fontsize=8)
    by_time.set_xlabel(r"CPU seconds, $2^{17}$ stars")
    figure.suptitle("Plummer sphere: how the error of ∇ log f falls", fontsize=10)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
