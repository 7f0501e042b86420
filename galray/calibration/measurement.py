"""One mock galaxy simulated and measured, in a task of its own; both are kept and never done twice."""

from __future__ import annotations

import json
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

from galray.calibration.mocks import galaxy_config
from galray.catalog.mirror import Place, open_place
from galray.cluster import without_cluster
from galray.config import RunConfig
from galray.ensemble import limit_threads
from galray.provenance import now

__all__ = ["finished", "measure_mock"]


def finished(run: RunConfig) -> dict[str, Any] | None:
    """The record of a measurement that was done before; None where there is none."""
    try:
        record = json.loads(_records(run).read(_name(run)) or b"")
    except ValueError:
        return None
    return record if isinstance(record, dict) and "quantities" in record else None


def measure_mock(values: dict[str, Any]) -> dict[str, Any]:
    """Simulate a galaxy, measure it as a run does, and keep the numbers.

    A failure is returned, not raised: one galaxy must not end a calibration, and the next call tries again.

    Arguments:
        values: The run of `mock_config`, as JSON.

    Returns:
        ``quantities`` as in a run's summary with the degrees of freedom ``dof`` of each error, ``dofs`` of
        its ``terms``, the ``bias`` that redraws showed, ``stars``, ``cpu_seconds`` of simulation and
        measurement; or ``error``.
    """
    run = RunConfig.model_validate(values)
    try:
        with without_cluster(), limit_threads(1):
            return _measure(run)
    except Exception as error:
        first = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {first[0] if first else ''}"
        return {"error": text, "traceback": traceback.format_exc()}


def _measure(run: RunConfig) -> dict[str, Any]:
    from galray.pipeline import Pipeline

    begin = time.process_time()
    galaxy = galaxy_config(run)
    # Its name is its content; what else a version of galray can configure does not make it another galaxy.
    if galaxy.place.read("stages/mock.json") is None:
        Pipeline(galaxy, overwrite=True).run(until="mock")
    simulated = time.process_time()
    pipeline = Pipeline(run, overwrite=True)
    with pipeline.session():
        galaxy.place.pull()
        _adopt(galaxy.place.folder, pipeline.folder)
        run.place.below("mock").settle()
        summary = pipeline.run(until="measure").summary
    budget: dict[tuple[str, str], dict[str, Any]] = {}
    for row in summary["budget"]:
        empty: dict[str, Any] = {"terms": {}, "dofs": {}, "dof": None}
        entry = budget.setdefault((row["quantity"], row["method"]), empty)
        if row["term"] == "total":
            entry["dof"] = row["dof"]
        else:
            entry["terms"][row["term"]], entry["dofs"][row["term"]] = row["value"], row["dof"]
        if row["bias"] is not None:
            entry["bias"] = row["bias"]
    keep = ("name", "label", "where", "unit", "method", "value", "error", "truth")
    record = {
        "quantities": [
            {key: row[key] for key in keep} | budget[f"{row['name']}@{row['where']}", row["method"]]
            for row in summary["quantities"]
        ],
        "stars": summary["catalog"]["kept"],
        "cpu_seconds": [round(simulated - begin, 2), round(time.process_time() - simulated, 2)],
        "created": now(),
        "galaxy": galaxy.name,
    }
    _records(run).write(_name(run), json.dumps(record, indent=1, allow_nan=False).encode())
    run.place.remove("")
    shutil.rmtree(pipeline.folder)
    galaxy.place.clear()
    return record


def _adopt(galaxy: Path, folder: Path) -> None:
    """Give a run directory the galaxy's finished stage, so that the run finds its mock done."""
    target = folder / "mock"
    if not target.exists():
        target.symlink_to(galaxy / "mock", target_is_directory=True)
    (folder / "stages").mkdir(exist_ok=True)
    for name in ("truth.json", "stages/mock.json"):
        shutil.copyfile(galaxy / name, folder / name)


def _records(run: RunConfig) -> Place:
    return open_place(run.output, run.catalog.storage)


def _name(run: RunConfig) -> str:
    return f"{run.name}.json"
