"""MLflow on Postgres and S3: eight processes log at once, nothing is refused, nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from galray.tracking.journal import Journal, State

pytestmark = pytest.mark.cluster

PROCESSES, MEMBERS, EPOCHS = 8, 3, 40

SCRIPT = """
import json, sys
from pathlib import Path
from galray.ensemble import EnsembleSettings, FamilyDesign, MemberOutcome, design
from galray.tracking import Tracker, TrackingSettings

folder, number = Path(sys.argv[1]), int(sys.argv[2])
none = FamilyDesign(seeds=0)
specs = design(EnsembleSettings(flow=none, moments=none, score=FamilyDesign(seeds={members})), number, "hash")
tracking = TrackingSettings(experiment="eight", patience=1e4)
with Tracker(tracking, folder, f"run {{number}}", {{"seed": number}}) as tracker:
    for spec in specs:
        place = folder / "members" / f"{{spec.index:03d}}"
        (place / "model").mkdir(parents=True)
        (place / "model" / "weights.safetensors").write_bytes(bytes(1000 * [number]))
        curve = [
            {{"epoch": e, "train": number + e, "validation": spec.index + 0.5**e, "seconds": 0.1 * e}}
            for e in range({epochs})
        ]
        (place / "curve.json").write_text(json.dumps(curve))
        tracker.follow(spec, place)
        tracker.member(spec, MemberOutcome(spec, "finished", place, 4.0, {{"best": number}}))
    tracker.metrics({{"rho_dm": number}})
"""


def test_eight_processes_log_at_once_and_no_point_is_lost(mlflow_server, tmp_path):
    from mlflow import MlflowClient

    source = SCRIPT.format(members=MEMBERS, epochs=EPOCHS)
    env = os.environ | {
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error::galray.errors.GalrayWarning",
                "-c",
                source,
                tmp_path / str(k),
                str(k),
            ],
            env=env,
            stderr=subprocess.PIPE,
        )
        for k in range(PROCESSES)
    ]
    errors = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, errors

    client = MlflowClient(tracking_uri=mlflow_server.uri)
    experiment = client.get_experiment_by_name("eight")
    assert experiment.artifact_location.startswith("mlflow-artifacts:")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = {r.info.run_id: r for r in runs if "mlflow.parentRunId" not in r.data.tags}
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert (len(parents), len(children)) == (PROCESSES, PROCESSES * MEMBERS)
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert sorted(r.data.metrics["rho_dm"] for r in parents.values()) == list(range(PROCESSES))
    for k in range(PROCESSES):
        state = State.load(Journal(tmp_path / str(k)))
        assert (state.refused, state.error) == (0, "")
        assert not Journal(tmp_path / str(k)).failed_path.exists()
    for child in children:
        number = int(parents[child.data.tags["mlflow.parentRunId"]].data.params["seed"])
        history = client.get_metric_history(child.info.run_id, "train")
        assert [(m.step, m.value) for m in history] == [(e, number + e) for e in range(EPOCHS)]
        assert len(client.get_metric_history(child.info.run_id, "validation")) == EPOCHS
        assert child.data.metrics["final.best"] == number
    keys = [
        entry["Key"] for entry in mlflow_server.s3().list_objects_v2(Bucket=mlflow_server.bucket)["Contents"]
    ]
    weights = [key for key in keys if key.endswith("weights.safetensors")]
    assert len(weights) == PROCESSES * MEMBERS, "the artefacts lie in the bucket"
