"""Training in other arithmetic: the speed of mixed precision and of compiled steps, and what they do."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import Bench
from benchmarks._phasespace_common import BALL, part, stars
from benchmarks._phasespace_training import BATCH, MODELS, SEED
from galray.phasespace import build_model, objective
from galray.training import TrainingSettings, fit

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    """Rows of both kinds of model, on the CPU and on a GPU where there is one."""
    count = 2**13 if bench.quick else 2**14
    for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
        options: list[dict[str, Any]] = [{}, {"precision": "bf16"}, {"compile": True}]
        if device == "cuda":
            options += [{"precision": "tf32"}, {"precision": "bf16", "compile": True}]
        for kind in MODELS:
            found = [
                part(bench, "arithmetic", {"kind": kind, "device": device, "stars": count, **option}, _train)
                for option in options
            ]
            for option, one in zip(options[1:], found[1:], strict=True):
                rows_of(bench, f"training, {kind}, {device}: {described(option)}", one, found[0])


def described(option: dict[str, Any]) -> str:
    """An option in words."""
    return " and ".join(str(v) if k == "precision" else "compiled" for k, v in option.items())


def rows_of(bench: Bench, label: str, one: dict[str, Any], plain: dict[str, Any]) -> None:
    """Speed, and the held-out loss against what training gained in float32."""
    cost = one["cpu_seconds"]
    start = f"start-up {one['start']:.0f} s"
    bench.row(
        f"{label}, times the stars/s of float32", one["speed"] / plain["speed"], peer=start, cpu_seconds=cost
    )
    worse = (one["last"] - plain["last"]) / abs(plain["first"] - plain["last"])
    bench.row(
        f"{label}, held-out loss above float32's, of what training gains", worse, bar=0.05, cpu_seconds=cost
    )


def _train(task: dict[str, Any]) -> dict[str, Any]:
    option = {key: task[key] for key in ("precision", "compile") if key in task}
    _, w, held = stars(task["stars"], SEED)
    model = build_model(task["kind"], MODELS[task["kind"]], BALL, w[:4096], seed=SEED)
    settings = TrainingSettings(epochs=12, batch_size=BATCH, device=task["device"], **option)
    goal = objective(task["kind"], model.settings)
    curve = fit(model, goal, w.float(), held[:2048].float(), settings, seed=SEED).curve
    if task["device"] == "cuda":
        times = [task["stars"] / row["stars_per_second"] for row in curve]
    else:
        times = [row["cpu_seconds"] for row in curve]
    return {
        "speed": task["stars"] / min(times[1:]),
        "start": times[0] - min(times[1:]),
        "first": curve[0]["validation"],
        "last": curve[-1]["validation"],
    }
