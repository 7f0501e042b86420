"""Bad files: what is said of them, and where the rows that they cost are named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from galray.errors import GalrayError

__all__ = ["LOST", "lost_rows", "too_many_bad", "write_lost"]

LOST = "lost.parquet"
"""Table of a store with the rows of quarantined files: ``file``, ``row`` (from 1) and ``source_id``."""


def too_many_bad(bad: Sequence[tuple[str, str, str]], number: int, allowed: int) -> GalrayError:
    """The error for more bad files than are allowed.

    Arguments:
        bad: Name of each bad file, its reason and the remedy.
        number: Files in all.
        allowed: ``catalog.allow_bad``.
    """
    remedy = bad[0][2]
    if "allow_bad" not in remedy:
        remedy += f", or leave such files out: catalog.allow_bad = {len(bad)} (--allow-bad {len(bad)})"
    if len(bad) == 1:
        return GalrayError(bad[0][1], remedy)
    # Files with one and the same trouble are told together: a wrong cut is every file's.
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, reason, _ in bad:
        path = name.partition("[")[0]
        groups.setdefault(reason.replace(name, "").replace(path, ""), []).append((name, reason))
    lines = []
    for members in groups.values():
        lines.append(members[0][1])
        if len(members) > 1:
            lines.append("  the same: " + ", ".join(name for name, _ in members[1:]))
    head = f"{len(bad)} of {number} files are bad, {allowed} may be; what is read of the others is kept"
    return GalrayError("\n  ".join([head, *lines]), remedy)


def write_lost(parts: Sequence[Path], target: Path) -> None:
    """Put the tables of lost rows together."""
    if parts:
        pl.concat([pl.scan_parquet(path, glob=False) for path in parts]).sink_parquet(
            target, compression="zstd"
        )


def lost_rows(store: Path | str) -> pl.DataFrame:
    """The rows of quarantined files that could be named: ``file``, ``row`` (from 1), ``source_id``.

    Arguments:
        store: A store's folder.
    """
    path = Path(store) / LOST
    if not path.is_file():
        return pl.DataFrame(schema={"file": pl.String, "row": pl.Int64, "source_id": pl.Int64})
    return pl.read_parquet(path, glob=False)
