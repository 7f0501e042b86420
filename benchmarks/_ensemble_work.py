"""What the ensemble benchmark runs in processes of its own: members without Ray, and a whole driver."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from galray.catalog import ShardStore
from galray.config import load_config
from galray.pipeline import Pipeline

__all__ = ["member", "specs_of"]

FUNCTION = "benchmarks._ensemble_work:member"


def member(spec: dict[str, Any], folder: str, context: dict[str, Any]) -> dict[str, Any]:
    """A member of a run, with its process and CPU time; every start leaves a mark beside the members."""
    from galray.measurement import run_member

    with open(Path(context["starts"]) / f"{spec['id']}", "a") as marks:
        marks.write(f"{os.getpid()}\n")
    begin = time.process_time()
    result = run_member(spec, folder, context)
    with open(Path(context["starts"]) / f"{spec['id']}.done", "a") as marks:
        marks.write("x\n")
    return result | {"pid": os.getpid(), "cpu_seconds": time.process_time() - begin}


def specs_of(pipeline: Pipeline) -> tuple[list[Any], dict[str, Any]]:
    """The members of a run whose catalogue is made, and what they share."""
    store = ShardStore(pipeline.folder / "shards")
    starts = pipeline.folder / "starts"
    starts.mkdir(exist_ok=True)
    context = {
        "config": pipeline.config.model_dump(mode="json"),
        "store": str(store.path),
        "starts": str(starts),
    }
    return pipeline._design(store), context


def bare(path: str, number: int, of: int) -> None:
    """Every `of`-th member, one after another in this process, without Ray."""
    import torch

    torch.set_num_threads(1)
    pipeline = Pipeline(load_config(path))
    specs, context = specs_of(pipeline)
    folder = pipeline.folder / "bare"
    folder.mkdir(exist_ok=True)
    member(specs[0].to_dict(), str(folder / f"warm-{number}"), _short(context))  # imports, first calls
    for spec in specs[number::of]:
        out = folder / f"{spec.index:03d}.json"
        if out.is_file():
            continue
        begin = time.perf_counter()
        result = member(spec.to_dict(), str(folder / f"{spec.index:03d}"), context)
        seconds = time.perf_counter() - begin
        out.write_text(json.dumps({"seconds": seconds, "cpu_seconds": result["cpu_seconds"]}))


def _short(context: dict[str, Any]) -> dict[str, Any]:
    config = json.loads(json.dumps(context["config"]))
    config["training"]["score"]["epochs"] = 1
    return context | {"config": config}


def drive(path: str) -> None:
    """The ensemble through Ray Tune, with the times of start-up and of the members."""
    from galray.ensemble import run_members

    pipeline = Pipeline(load_config(path))
    begin = time.perf_counter()
    with pipeline.session():
        specs, context = specs_of(pipeline)
        pipeline.connect()
        started = time.perf_counter()
        outcomes = run_members(
            specs, FUNCTION, pipeline.folder / "members", context, pipeline.config.ensemble
        )
        ended = time.perf_counter()
    rows = [
        {"seconds": o.seconds, "reused": o.reused, "status": o.status, "pid": o.result.get("pid"),
         "cpu_seconds": o.result.get("cpu_seconds"), "id": o.spec.id}
        for o in outcomes
    ]  # fmt: skip
    times = {"start": started - begin, "members": ended - started, "rows": rows}
    (pipeline.folder / "driven.json").write_text(json.dumps(times))


if __name__ == "__main__":
    if sys.argv[1] == "bare":
        bare(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        drive(sys.argv[2])
