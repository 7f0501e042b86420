"""`galray runs`: what the tracker wrote is read back as tables."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from galray.cli import app
from galray.ensemble import EnsembleSettings, FamilyDesign, MemberOutcome, design
from galray.errors import GalrayError
from galray.tracking import Tracker, TrackingSettings
from galray.tracking.reading import find_run, list_runs, store_uri


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two runs with a few members each, one of which failed."""
    folder = tmp_path_factory.mktemp("store") / "runs"
    none = FamilyDesign(seeds=0)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    for name, rate in (("first", 1e-3), ("second", 3e-3)):
        specs = design(EnsembleSettings(flow=none, moments=none, score=FamilyDesign(seeds=4)), 3, name)
        params = {"training": {"learning_rate": rate, "epochs": 30}}
        with Tracker(TrackingSettings(experiment="tests"), folder / name, name, params) as tracker:
            for spec in specs:
                ill = name == "second" and spec.index == 1
                tracker.member(
                    spec,
                    MemberOutcome(
                        spec=spec,
                        status="failed" if ill else "finished",
                        folder=folder / name / "members" / f"{spec.index:03d}",
                        seconds=12.0,
                        result={} if ill else {"best": 0.1 * (spec.index + 1) + rate},
                        error="Traceback\nValueError: the stars are ill" if ill else "",
                    ),
                )
                if not ill:
                    tracker.member_metrics(spec.id, {"rho_dm_average": 0.009 + 0.001 * spec.index})
            tracker.metrics({"rho_dm": 10 * rate})
    return folder


@pytest.fixture(autouse=True)
def _no_foreign_store(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def invoke(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, GalrayError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_list_counts_members(store):
    lines = invoke("runs", "list", "--output", store).splitlines()
    (second,) = [line for line in lines if line.strip().startswith("second")]
    assert "1 failed, 3 finished" in second
    found = json.loads(invoke("runs", "list", "--output", store, "--json"))
    assert {run["name"]: run["members"] for run in found} == {
        "first": {"FINISHED": 4},
        "second": {"FINISHED": 3, "FAILED": 1},
    }


def test_show_names_best_and_worst_and_what_failed(store):
    lines = invoke("runs", "show", "second", "--output", store).splitlines()
    (best,) = [line for line in lines if " best " in line]
    (worst,) = [line for line in lines if " worst " in line]
    (failed,) = [line for line in lines if "FAILED" in line]
    assert "score-000" in best
    assert "0.10300" in best
    assert "0.00900" in best
    assert "score-003" in worst
    assert "ValueError: the stars are ill" in failed
    record = find_run(list_runs(store_uri("", store)), "first")
    assert "0.10100" in invoke("runs", "show", record.id[:10], "--output", store)


def test_compare_shows_what_differs(store):
    found = json.loads(invoke("runs", "compare", "first", "second", "--output", store, "--json"))
    assert found["params"] == {"training.learning_rate": ["0.001", "0.003"]}
    assert found["metrics"]["rho_dm"] == pytest.approx([0.01, 0.03])
    text = invoke("runs", "compare", "first", "second", "--output", store)
    assert "training.learning_rate" in text
    assert "epochs" not in text


def test_what_is_not_there_is_said(store, tmp_path):
    with pytest.raises(GalrayError, match="no MLflow store here"):
        invoke("runs", "list", "--output", tmp_path)
    with pytest.raises(GalrayError, match="s3://bucket/runs: MLflow keeps its runs in no object store"):
        invoke("runs", "list", "--output", "s3://bucket/runs")
    with pytest.raises(GalrayError, match="no such file"):
        invoke("runs", "list", "--uri", f"sqlite:///{tmp_path}/absent.db")
    assert not (tmp_path / "absent.db").exists()
    with pytest.raises(GalrayError, match="run third: not in the store"):
        invoke("runs", "show", "third", "--output", store)
    with pytest.raises(GalrayError, match="one run alone"):
        invoke("runs", "compare", "first", "--output", store)
    with pytest.raises(GalrayError, match=r"(?s)no experiment 'other'.*tests"):
        invoke("runs", "list", "--output", store, "--experiment", "other")
