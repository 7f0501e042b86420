"""Parts of a long measurement, kept on disk by the hash of what they are."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from galray.provenance import content_hash, write_atomic

__all__ = ["PARTS", "cpu_seconds", "part", "recipe"]

PARTS = Path("runs") / "benchmarks" / "gravity"


def cpu_seconds() -> float:
    """CPU time of this process so far, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def recipe(settings: Any) -> dict[str, Any]:
    """What settings say as JSON values, without those of noise where it is ignored: they decide nothing."""
    found: dict[str, Any] = settings.model_dump(mode="json")
    if found.get("noise", {}).get("treatment") == "ignore":
        del found["noise"]
    return found


def part(task: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> tuple[dict[str, Any], Path]:
    """What `work` found, from the disk where the same task was done before.

    Arguments:
        task: All that decides the result: its hash names the folder.
        work: Given the folder to write files to; returns figures that JSON can hold.

    Returns:
        The figures, with ``cpu_seconds`` of the work, and the folder.
    """
    folder = PARTS / content_hash(task)
    path = folder / "part.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        begin = cpu_seconds()
        found = work(folder)
        write_atomic(path, {**found, "cpu_seconds": cpu_seconds() - begin, "task": task})
    return json.loads(path.read_text(encoding="utf-8")), folder
