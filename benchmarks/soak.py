"""Two hundred tiny members through a Ray cluster: what grows, and what is left behind."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import Bench, main

MEMBERS = 200
WARM = 40
"""Members after which everything is loaded that will be: growth is counted from there."""


def tiny(spec: dict[str, Any], folder: str, context: dict[str, Any]) -> dict[str, Any]:
    """A member that trains a network of a few numbers for an epoch, writes it, and tells of its process."""
    import torch

    from galray.ensemble import report_progress
    from galray.phasespace import Ball, ScoreSettings, build_model, objective, save_model
    from galray.training import TrainingSettings, fit

    generator = torch.Generator().manual_seed(spec["index"])
    stars = 0.1 * torch.randn(600, 6, generator=generator)
    settings = ScoreSettings.model_validate(context["model"])
    model = build_model("score", settings, Ball((0.0, 0.0, 0.0), 4.0), stars, seed=spec["index"])
    how = TrainingSettings(epochs=1, batch_size=128)
    fit(model, objective("score"), stars[:500], stars[500:], how, seed=1, checkpoint_dir=Path(folder) / "c")
    report_progress(folder, 0.9, "trained")
    save_model(model, Path(folder) / "model")
    return {"pid": os.getpid(), "resident_mb": resident_mb(), "files": open_files()}


def resident_mb(pid: int | str = "self") -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files(pid: int | str = "self") -> int:
    """Open file handles of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def descendants(pid: int) -> set[int]:
    """Processes that this one has started, and these in turn."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            try:
                found |= {child, *descendants(child)}
            except OSError:
                continue  # it has ended meanwhile
    return found


def growth(values: list[float]) -> float:
    """Growth per hundred members after the warm-up, by a straight line."""
    later = np.asarray(values[min(WARM, len(values) // 2) :])
    return float(np.polyfit(np.arange(len(later)), later, 1)[0] * 100)


def measure(bench: Bench) -> None:
    """Run them and look at driver, actors and handles on the way, and at processes afterwards."""
    from galray.cluster import ClusterSettings, connect
    from galray.ensemble import EnsembleSettings, MemberSpec, run_members

    number = 60 if bench.quick else MEMBERS
    context = {"model": {"hidden": [8], "base": {"components": 1, "hidden": [8], "star_passes": 2000}}}
    specs = [MemberSpec(i, "score", seed=i, context_hash="soak") for i in range(number)]
    before = descendants(os.getpid())
    memory: list[float] = []
    handles: list[float] = []

    def on_done(spec: Any, outcome: Any) -> None:
        memory.append(resident_mb())
        handles.append(open_files())

    with tempfile.TemporaryDirectory() as folder, bench.cpu():
        with connect(ClusterSettings(num_cpus=2)):
            begin = time.perf_counter()
            outcomes = run_members(
                specs, "benchmarks.soak:tiny", Path(folder) / "members", context, EnsembleSettings(), on_done
            )
            took = time.perf_counter() - begin
            during = descendants(os.getpid())
        left = list(Path(folder).rglob("*.tmp"))
    while (orphans := descendants(os.getpid()) - before) and time.perf_counter() - begin - took < 30:
        time.sleep(0.5)
    alive = [pid for pid in during - before if _runs(pid)]
    prefix = f"soak of {number} members: "
    bench.row(prefix + "finished", sum(o.finished for o in outcomes), bar=number, at_least=True)
    bench.row(prefix + "driver's memory, growth per 100", growth(memory), "MB", bar=10, cpu_seconds=0)
    bench.row(prefix + "driver's open files, growth per 100", growth(handles), bar=2, cpu_seconds=0)
    by_process: dict[int, list[dict[str, Any]]] = {}
    for outcome in outcomes:
        by_process.setdefault(outcome.result["pid"], []).append(outcome.result)
    bench.row(prefix + "actors' processes", len(by_process), cpu_seconds=0)
    longest = max(by_process.values(), key=len)
    bench.row(
        prefix + "an actor's memory, growth per 100", growth([r["resident_mb"] for r in longest]), "MB",
        bar=20, cpu_seconds=0,
    )  # fmt: skip
    files = growth([r["files"] for r in longest])
    bench.row(prefix + "an actor's open files, growth per 100", files, bar=2, cpu_seconds=0)
    bench.row(prefix + "unfinished folders left", len(left), bar=0, cpu_seconds=0)
    bench.row(prefix + "processes left", len(orphans | set(alive)), bar=0, cpu_seconds=0)
    bench.row(prefix + "wall time", took, "s", cpu_seconds=0)


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main("soak", measure)
