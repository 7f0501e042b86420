"""The figure of all rows: how the error of the score falls with the number of stars and with CPU time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import Bench

__all__ = ["draw", "measure"]

_NAME = re.compile(
    r"^Plummer, (?P<stars>\d+) stars(?:, \d+ epochs)?: (?P<how>one|\d+) "
    r"(?P<what>score networks?|flows?)\b(?!.*vector form)"
)
_PEERS = {"one spline flow": (660.0, 0.31), "16 spline flows": (10_800.0, 0.086)}
"""Others' CPU seconds and error at 2¹⁷ stars."""


def measure(bench: Bench) -> None:
    """Draw the rows that there are, of this start and of others."""
    if bench.path.is_file():
        draw(json.loads(bench.path.read_text())["rows"], bench.path.with_suffix(".png"))


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
    by_stars.tick_params(axis="x", which="minor", length=0)
    by_stars.set_xlabel("stars")
    by_stars.set_ylabel("median error of the score")
    by_stars.legend(frameon=False, fontsize=8)
    by_time.set_xlabel(r"CPU seconds, $2^{17}$ stars")
    figure.suptitle("Plummer sphere: how the error of ∇ log f falls", fontsize=10)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
