"""Training on several ranks, under Ray Train, killed; and a plan for many GPUs.

On CPUs a rank's cost is its own CPU time, and what an all-reduce takes is measured apart: a rank that has a
core of its own needs the sum of both for an epoch. Both are the least of many short epochs and of many
all-reduces, because whoever else computes on the machine slows memory and caches, and never the other way;
one rank alone and many together are measured by turns in the same processes. What the clock said stands
beside it. On a GPU, where the machine has one, the same rows are measured by the clock.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import Bench
from benchmarks._phasespace_common import BALL, part, stars
from galray.phasespace import FlowSettings, ScoreSettings, build_model, objective
from galray.training import TrainingSettings, fit
from galray.training.communication import Alone, ProcessGroup

__all__ = ["measure"]

SEED = 7
BATCH = 2048
LARGE_BATCH = 8192
"""Of ranks that have enough to do: with few stars a step, waiting for one another weighs."""
MODELS: dict[str, Any] = {"score": ScoreSettings(), "flow": FlowSettings()}


def measure(bench: Bench) -> None:
    """All rows of the group."""
    count, epochs = (2**13, 4) if bench.quick else (2**14, 10)
    _plan(bench)
    _ray_overhead(bench, count, epochs)
    _kills(bench)
    for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
        for kind in MODELS:
            _scaling(bench, kind, device, count, epochs, BATCH)
            if not bench.quick:
                _scaling(bench, kind, device, 4 * count, epochs, LARGE_BATCH)


# -- several ranks ---------------------------------------------------------------------------------------


def _rank(rank: int, world_size: int, task: dict[str, Any], folder: str) -> None:
    """One rank in a process of its own: trains the whole alone and its share with the others, by turns."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    cuda = task["device"] == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    group = ProcessGroup()
    _, w, held = stars(task["stars"], SEED)
    w, held = w.float(), held[:2048].float()
    untrained = build_model(task["kind"], MODELS[task["kind"]], BALL, w[:4096], seed=SEED)
    settings = TrainingSettings(epochs=task["epochs"], batch_size=task["batch"], device=task["device"])
    goal = objective(task["kind"], untrained.settings)
    curves: dict[str, list[list[dict[str, Any]]]] = {"alone": [], "shared": []}
    for _ in range(task["rounds"]):
        for how, comm in (("alone", Alone()), ("shared", group)):
            dist.barrier()
            model = copy.deepcopy(untrained)
            curve = fit(model, goal, w, held, settings, seed=SEED, communicator=comm).curve
            curves[how].append(curve)
    flat = torch.zeros(
        sum(p.numel() for p in untrained.parameters() if p.requires_grad), device=task["device"]
    )
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        group.average_(flat)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    Path(folder, f"{rank}.json").write_text(json.dumps({"curves": curves, "all_reduce": min(times)}))
    dist.destroy_process_group()


def _ranks(task: dict[str, Any]) -> dict[str, Any]:
    """So many ranks at once: stars per second alone and together, cost of all-reduce, curves compared."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        count = task["ranks"]
        processes = [context.Process(target=_rank, args=(r, count, task, folder)) for r in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        ranks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(count)]
    rows = {
        how: [[row for curve in r["curves"][how] for row in curve[1:]] for r in ranks]
        for how in ("alone", "shared")
    }
    sums = max(r["all_reduce"] for r in ranks) * (task["stars"] // task["batch"])
    clock = {h: statistics.median(row["stars_per_second"] for row in rows[h][0]) for h in rows}
    if task["device"] == "cuda":
        best = {h: max(row["stars_per_second"] for row in rows[h][0]) for h in rows}
    else:
        least = {h: [min(row["cpu_seconds"] for row in of_rank) for of_rank in rows[h]] for h in rows}
        best = {
            "alone": task["stars"] / statistics.median(least["alone"]),
            "shared": task["stars"] / (max(least["shared"]) + sums),
        }
    figures = [
        [row[key] for row in ranks[0]["curves"][how][0] for key in ("train", "validation")]
        for how in ("shared", "alone")
    ]
    return {
        "alone": best["alone"],
        "shared": best["shared"],
        "clock": clock["shared"] / clock["alone"],
        "sums": sums * best["shared"] / task["stars"],
        "waiting": sum(row["all_reduce_seconds"] for row in rows["shared"][0])
        * clock["shared"]
        / task["stars"]
        / len(rows["shared"][0]),
        "difference": max(abs(a - b) / abs(b) for a, b in zip(*figures, strict=True)),
        "load": os.getloadavg()[0] / (os.cpu_count() or 1),
        "cpu_seconds": sum(row["cpu_seconds"] for h in rows for of_rank in rows[h] for row in of_rank),
    }


def _scaling(bench: Bench, kind: str, device: str, count: int, epochs: int, batch: int) -> None:
    worlds = [2, 4] if device == "cpu" else [n for n in (2, 4, 8) if n <= torch.cuda.device_count()]
    label = f"training, {kind}, {count} stars, batch {batch}, {device}"
    for world in worlds:
        task = {
            "kind": kind, "device": device, "stars": count, "batch": batch, "epochs": epochs, "ranks": world,
            "rounds": 3,
        }  # fmt: skip
        found = part(bench, "ranks", task, _ranks)
        cost = found["cpu_seconds"]
        if world == 2:
            bench.row(f"{label}: 1 rank", found["alone"], "stars/s", cpu_seconds=cost)
        ratio = found["shared"] / found["alone"]
        bench.row(
            f"{label}: {world} ranks, times the stars/s of 1",
            ratio,
            bar=1.6 if world == 2 and device == "cpu" and batch == LARGE_BATCH else None,
            at_least=True,
            peer=f"efficiency {ratio / world:.2f}; all-reduce {100 * found['sums']:.1f} % of the time",
            cpu_seconds=cost,
        )
        bench.row(
            f"{label}: {world} ranks, times the stars/s of 1, by the clock",
            found["clock"],
            peer=f"{100 * found['waiting']:.0f} % in all-reduce and waiting; load {found['load']:.1f} a core",
            cpu_seconds=cost,
        )
        bench.row(
            f"{label}: {world} ranks, largest relative difference of the curve from 1",
            found["difference"],
            bar=2e-4,
            cpu_seconds=cost,
        )


# -- under Ray Train -------------------------------------------------------------------------------------


def _ray_overhead(bench: Bench, count: int, epochs: int) -> None:
    found = part(bench, "ray", {"stars": count, "epochs": 3 * epochs}, _under_ray)
    for what, bar in (("CPU time", None if bench.quick else 1.05), ("clock", None)):
        key = "cpu" if what == "CPU time" else "clock"
        bench.row(
            f"training, score: an epoch under Ray Train with 1 worker / bare, {what}",
            found[f"ray_{key}"] / found[f"bare_{key}"],
            bar=bar,
            peer=f"{found[f'ray_{key}']:.3f} / {found[f'bare_{key}']:.3f} s; start-up {found['start']:.0f} s",
            cpu_seconds=found["cpu_seconds"],
        )


def _under_ray(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of an epoch, checkpoints and validation included by the clock; the least of several each."""
    import ray

    from galray.training import fit_distributed

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    _, w, held = stars(task["stars"], SEED)
    w, held = w.float(), held[:2048].float()
    settings = TrainingSettings(epochs=task["epochs"], batch_size=BATCH)

    def model() -> Any:
        return build_model("score", MODELS["score"], BALL, w[:4096], seed=SEED)

    def bare() -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            return fit(model(), objective("score"), w, held, settings, seed=SEED, checkpoint_dir=folder).curve

    before = bare()
    begin = time.perf_counter()
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 1024**2,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = fit_distributed("score", model(), w, held, settings, seed=SEED, storage=folder)
        start = time.perf_counter() - begin - result.seconds
    finally:
        ray.shutdown()
    after = bare()
    return {
        "ray_cpu": _least(result.curve, "cpu"),
        "bare_cpu": min(_least(curve, "cpu") for curve in (before, after)),
        "ray_clock": _least(result.curve, "clock"),
        "bare_clock": min(_least(curve, "clock") for curve in (before, after)),
        "start": start,
    }


def _least(curve: list[dict[str, Any]], key: str) -> float:
    """Seconds of the quickest epoch after the first."""
    if key == "cpu":
        return min(float(row["cpu_seconds"]) for row in curve[1:])
    ends = [float(row["seconds"]) for row in curve]
    return min(b - a for a, b in itertools.pairwise(ends))


# -- killed ----------------------------------------------------------------------------------------------


def _kills(bench: Bench) -> None:
    if not Path("/proc/self/stat").exists():
        print("killed workers: processes are found in /proc, which this system lacks")
        return
    found = part(bench, "kill", {"run": 2}, _killed)
    name = "training, 2 workers: one killed with -9 in mid-epoch, later its node lost"
    bench.row(
        f"{name}: relative difference of the final held-out loss",
        found["difference"],
        bar=1e-5,
        peer="tolerance 1e-5: the last part runs on one rank, whose sums round differently",
        cpu_seconds=found["cpu_seconds"],
    )
    bench.row(f"{name}: checkpoints lost", found["lost"], bar=0, cpu_seconds=0.0)


def _killed(task: dict[str, Any]) -> dict[str, Any]:
    import resource

    from benchmarks import _training_kill as kill

    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        disturbed = kill.disturbed(Path(folder))
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    if len(disturbed["killed"]) != 2:
        raise RuntimeError("the training ended before it was disturbed")
    model = build_model("score", kill.MODEL, kill.BALL, kill.stars(), seed=kill.SEED)
    goal = objective("score")
    alone = fit(model, goal, kill.stars(), kill.stars(300, 1), kill.SETTINGS, seed=kill.SEED)
    final, expected = disturbed["curve"][-1]["validation"], alone.curve[-1]["validation"]
    seen = disturbed["epochs"]
    return {
        "difference": abs(final / expected - 1.0),
        "lost": sum(later <= earlier for earlier, later in itertools.pairwise(seen)),
        "cpu_seconds": end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime,
    }


# -- many GPUs -------------------------------------------------------------------------------------------

PLAN_STARS = 3.0e7
"""Stars with all six coordinates in Gaia DR3, about."""
PLAN_BATCH = 2**17
GPU_FLOPS = 0.2 * 19.5e12
"""A fifth of an A100's float32 peak: what dense layers of width 64 may sustain; an assumption."""
LAUNCH = 5e-6
"""Seconds to launch one kernel; an assumption. Kernels that are shorter wait for the next launch."""
LATENCY, BANDWIDTH = 20e-6, 12.5e9
"""Seconds of a message between GPUs and bytes per second (100 Gbit/s between nodes); assumptions."""


def _plan(bench: Bench) -> None:
    """Seconds of an epoch on N GPUs, from measured FLOPs, kernels and bytes and the assumptions above.

    t = (S / B) [max(F B / N R, K τ) + 2 log₂N α + 2 (N − 1)/N G / β]: S stars in batches of B, F FLOPs a star
    and step, R sustained FLOP/s, K kernels a step at τ each, a ring or tree all-reduce of G bytes.
    """
    flops, kernels, weights = _count("score")
    bench.row("training, score: arithmetic of a step", flops, "FLOP/star", cpu_seconds=0.0)
    bench.row("training, score: operations of a step", kernels, "kernels", cpu_seconds=0.0)
    bench.row("training, score: all-reduce of a step", 4.0 * weights, "bytes", cpu_seconds=0.0)
    steps = PLAN_STARS / PLAN_BATCH

    def epoch(count: int) -> float:
        work = max(flops * PLAN_BATCH / count / GPU_FLOPS, kernels * LAUNCH)
        sums = 2 * math.log2(count) * LATENCY + 2 * (count - 1) / count * 4 * weights / BANDWIDTH
        return steps * (work + (sums if count > 1 else 0.0))

    for count in (1, 8, 16, 32, 64):
        bench.row(
            f"plan, score, 3e7 stars, batch {PLAN_BATCH}: epoch on {count} GPU{'s' * (count > 1)}",
            epoch(count),
            "s",
            peer=f"predicted, not measured; efficiency {epoch(1) / epoch(count) / count:.2f}",
            cpu_seconds=0.0,
        )


def _count(kind: str) -> tuple[float, int, int]:
    """FLOPs per star and operations of a training step, and the number of trained weights."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    _, w, _ = stars(BATCH, SEED)
    model = build_model(kind, MODELS[kind], BALL, w, seed=SEED)
    goal = objective(kind, model.settings)
    rows = goal.prepare(model, w)
    generator = torch.Generator().manual_seed(SEED)

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # Views launch nothing.
            self.calls += not any(
                r.alias_info
                for r in function._schema.returns
                if r.alias_info is not None and not r.alias_info.is_write
            )
            return function(*args, **(kwargs or {}))

    flops = FlopCounterMode(display=False)
    # In mixed precision the network takes plain products, which the counter knows, in place of fused ones.
    with flops, torch.autocast("cpu", torch.bfloat16):
        goal.loss(model, rows, generator).backward()
    counter = Counter()
    with counter:
        goal.loss(model, rows, generator).backward()
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return flops.get_total_flops() / len(rows), counter.calls, weights
