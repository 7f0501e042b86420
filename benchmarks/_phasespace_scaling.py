"""How the error of score networks falls with the number of stars and with CPU time."""

from __future__ import annotations

from benchmarks import Bench
from benchmarks._phasespace_common import mean, median_error, part, sphere, stars
from benchmarks._phasespace_score import averaged, task, train_part

__all__ = ["measure"]

EPOCHS = {2**14: 12, 2**15: 12, 2**16: 12, 2**18: 6, 2**19: 4, 2**20: 2}
"""Passes over the stars for each number of them: fewer for more, since the larger sets take more steps."""
SHORTER = (2, 5)
"""Passes over 2¹⁷ stars that the time curve adds to those of the table."""
MEMBERS = {2**14: 4, 2**15: 4, 2**16: 4}
"""Networks averaged, where not two."""


def measure(bench: Bench) -> None:
    """Rows of the curves that the tables do not have."""
    sizes = {2**12: 3, 2**13: 3} if bench.quick else EPOCHS
    for count, epochs in sizes.items():
        _point(bench, f"Plummer, {count} stars", count, epochs, MEMBERS.get(count, 2))
    if not bench.quick:
        for epochs in SHORTER:
            _point(bench, f"Plummer, {2**17} stars, {epochs} epochs", 2**17, epochs, 1)


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
