"""Runs are recorded whole, end, go on after a kill, and never stop the measurement."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from galray.ensemble import EnsembleSettings, FamilyDesign, MemberOutcome, design
from galray.errors import GalrayWarning
from galray.tracking import Tracker, TrackingSettings
from galray.tracking.journal import Journal, State, flatten, metric_name, numbers
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _no_foreign_store(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _members(folder, count=2):
    none = FamilyDesign(seeds=0)
    specs = design(EnsembleSettings(flow=none, moments=none, score=FamilyDesign(seeds=count)), 3, "hash")
    outcomes = []
    for spec in specs:
        path = folder / "members" / f"{spec.index:03d}"
        (path / "model").mkdir(parents=True)
        (path / "model" / "weights.safetensors").write_bytes(b"weights")
        curve = [{"epoch": e, "train": 1 / e, "validation": 2 / e, "seconds": 0.5 * e} for e in range(1, 31)]
        (path / "curve.json").write_text(json.dumps(curve))
        (path / "spec.json").write_text(json.dumps(spec.to_dict()))
        checks = {"Stein: E[v s_v] + 1": {"value": 0.02, "error": 0.01, "expected": 0.0, "ok": True}}
        (path / "checks.json").write_text(json.dumps(checks))
        ill = spec.index == 1
        outcomes.append(
            MemberOutcome(
                spec=spec,
                status="failed" if ill else "finished",
                folder=path,
                seconds=15.0,
                result={} if ill else {"best": 0.125, "note": "text", "checks": {"stein": 0.01}},
                error="ValueError: ill" if ill else "",
            )
        )
    return specs, outcomes


def _rows(database, query):
    with sqlite3.connect(database, timeout=120) as connection:
        return connection.execute(query).fetchall()


def _statuses(database):
    return dict(_rows(database, "select name, status from runs"))


def test_a_run_is_recorded_whole_and_goes_on_in_the_same_mlflow_run(tmp_path):
    folder = tmp_path / "runs" / "demo"
    specs, outcomes = _members(folder)
    report = folder / "report.html"
    report.write_text("<p>report</p>")
    settings = TrackingSettings(experiment="tests", system_seconds=0)
    params = {"training": {"epochs": 30}, "methods": ["score"], "long": "x" * 9000}
    with Tracker(settings, folder, "demo", params, {"galray.git": "abc"}) as tracker:
        for spec, outcome in zip(specs, outcomes, strict=True):
            tracker.member(spec, outcome)
        tracker.metrics({"rho_dm (z=+1)": 0.01, "budget": {"network": 0.001, "absent": None}})
        tracker.artifact(report)
        tracker.artifact(folder / "absent.svg", "figures")
        with pytest.warns(GalrayWarning, match="artifact"):
            tracker.close()
    database = tmp_path / "runs" / "mlflow.db"
    parent = tracker.run_id
    names = {spec.name: status for spec, status in zip(specs, ("FINISHED", "FAILED"), strict=True)}
    assert _statuses(database) == {"demo": "FINISHED"} | names
    tags = _rows(database, "select run_uuid from tags where key = 'mlflow.parentRunId'")
    assert len(tags) == 2
    state = State.load(Journal(folder))
    first = state.members[specs[0].id]
    curve = _rows(
        database,
        f"select step, value from metrics where run_uuid = '{first}' and key = 'train' order by step",
    )
    assert curve == [(e, pytest.approx(1 / e)) for e in range(1, 31)]
    final = dict(_rows(database, f"select key, value from latest_metrics where run_uuid = '{first}'"))
    assert final["final.best"] == 0.125
    assert final["final.checks.stein"] == 0.01
    assert final["final.checks.Stein: E_v s_v_ _ 1"] == 0.02
    assert dict(_rows(database, f"select key, value from latest_metrics where run_uuid = '{parent}'")) == {
        "rho_dm _z__1_": 0.01,
        "budget.network": 0.001,
    }
    written = dict(_rows(database, f"select key, value from params where run_uuid = '{parent}'"))
    assert written["training.epochs"] == "30"
    assert len(written["long"]) == 6000
    artefacts = {p.name for p in (tmp_path / "runs" / "mlartifacts" / parent).rglob("*") if p.is_file()}
    assert artefacts == {"report.html"}
    assert list((tmp_path / "runs" / "mlartifacts" / first).rglob("weights.safetensors"))

    # The file that was absent is there now: starting again writes it, into the same run, and no member twice.
    (folder / "absent.svg").write_text("<svg/>")
    with Tracker(settings, folder, "demo", params) as again:
        again.member(specs[0], outcomes[0])
        mended = MemberOutcome(spec=specs[1], status="finished", folder=outcomes[1].folder, seconds=1.0)
        again.member(specs[1], mended)
    assert again.run_id == parent
    assert _statuses(database) == {"demo": "FINISHED"} | dict.fromkeys(names, "FINISHED")
    assert list((tmp_path / "runs" / "mlartifacts" / parent).rglob("absent.svg"))
    assert _rows(database, f"select count(*) from metrics where run_uuid = '{first}'") == [(30 * 3 + 4,)]


def test_a_curve_is_recorded_while_the_member_trains(tmp_path):
    folder = tmp_path / "runs" / "live"
    specs, outcomes = _members(folder, 2)
    database = tmp_path / "runs" / "mlflow.db"
    work = folder / "members" / "000.tmp"
    work.mkdir()
    curve = [{"epoch": e, "train": 1.0 - e, "memory_gb": 0.5, "seconds": e + 1.0} for e in range(6)]
    steps = "select step from metrics where key = 'memory_gb' order by step"

    machine = "select value from metrics where key = 'system/cpu_utilization_percentage'"

    with Tracker(TrackingSettings(system_seconds=0.5), folder, "live") as tracker:
        tracker.follow(specs[0], work)
        tracker.follow(specs[1], folder / "members" / "001.tmp")  # never gets so far as an epoch
        (work / "curve.json").write_text(json.dumps(curve[:2]))
        wait_for(lambda: State.load(Journal(folder)).members, "the member in MLflow")
        wait_for(lambda: len(_rows(database, steps)) >= 2, "two epochs in MLflow", every=0.2)
        assert _rows(database, steps) == [(0,), (1,)]
        assert _statuses(database) == {"live": "RUNNING", specs[0].name: "RUNNING"}
        # The member ends: the rest of its curve follows, nothing twice.
        (outcomes[0].folder / "curve.json").write_text(json.dumps(curve))
        tracker.member(specs[0], outcomes[0])
        wait_for(lambda: _rows(database, machine), "what the machine does, while the run is open", every=0.2)
    assert _rows(database, steps) == [(e,) for e in range(6)]
    assert _statuses(database) == {"live": "FINISHED", specs[0].name: "FINISHED"}


def test_switched_off_writes_nothing(tmp_path):
    with Tracker(TrackingSettings(enabled=False), tmp_path / "run") as tracker:
        tracker.metrics({"a": 1.0})
        assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_store_warns_and_keeps_the_journal(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    tracker = Tracker(TrackingSettings(uri=f"sqlite:///{blocked}/mlflow.db"), tmp_path / "run")
    tracker.metrics({"rho": 0.01})
    with pytest.warns(GalrayWarning, match="kept in"):
        tracker.close()
    kept = [entry["op"] for entry, _ in Journal(tmp_path / "run").read(0)]
    assert kept == ["open", "metrics", "close"]
    assert State.load(Journal(tmp_path / "run")).offset == 0


def test_journal_survives_a_torn_line(tmp_path):
    journal = Journal(tmp_path)
    journal.folder.mkdir()
    journal.append({"op": "a"})
    with open(journal.path, "a") as file:
        file.write('{"op": "to')
    assert [entry for entry, _ in journal.read(0)] == [{"op": "a"}]
    journal.append({"op": "b"})
    entries = list(journal.read(0))
    assert [entry for entry, _ in entries] == [{"op": "a"}, None, {"op": "b"}]
    assert [entry for entry, _ in journal.read(entries[0][1])] == [None, {"op": "b"}]


def test_names_and_numbers_for_mlflow(tmp_path):
    assert metric_name("a_z(+1 kpc)/ρ") == "a_z__1 kpc_/_"
    assert numbers({"a": 1, "b": {"c": 2.5, "d": "text", "e": [1]}, "f": None, "g": float("inf")}) == {
        "a": 1.0,
        "b.c": 2.5,
    }
    assert flatten({"a": {"b": [1, 2]}, "c": True}) == {"a.b": "[1, 2]", "c": "true"}
    settings = TrackingSettings()
    assert settings.resolve_uri(tmp_path / "runs" / "x") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert settings.resolve_artifacts(tmp_path / "x") == (tmp_path / "mlartifacts").as_uri()
    server = TrackingSettings(uri="http://mlflow:5000")
    assert server.resolve_artifacts(tmp_path) is None
    relative = TrackingSettings(uri="sqlite:///store/mlflow.db")
    assert relative.resolve_uri(tmp_path) == f"sqlite:///{Path('store/mlflow.db').absolute()}"


@pytest.mark.cluster
def test_kill_nine_ends_the_run_and_the_next_start_resumes_it(tmp_path):
    folder = tmp_path / "run"
    script = (
        "import sys, time\n"
        "from galray.tracking import Tracker, TrackingSettings\n"
        f"tracker = Tracker(TrackingSettings(), {str(folder)!r}, 'demo')\n"
        "tracker.metrics({'x': float(sys.argv[1])}, step=int(sys.argv[1]))\n"
        "if sys.argv[1] == '1':\n"
        "    time.sleep(1000)\n"
        "tracker.close()\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    database = tmp_path / "mlflow.db"
    journal = Journal(folder)
    with subprocess.Popen([sys.executable, "-c", script, "1"], env=env) as process:
        parent = wait_for(lambda: State.load(journal).parent, "the run in MLflow", process)
        said = lambda: any(entry and entry["op"] == "metrics" for entry, _ in journal.read(0))  # noqa: E731
        wait_for(said, "the first metric", process)
        process.send_signal(signal.SIGKILL)
    # The next start waits for the writer of the killed one, which ends the run as FAILED first.
    subprocess.run([sys.executable, "-c", script, "2"], env=env, check=True)
    assert State.load(journal).parent == parent
    assert _statuses(database) == {"demo": "FINISHED"}
    assert _rows(database, "select step from metrics order by step") == [(1,), (2,)]

    # Killed for good: the run ends as FAILED without any further start.
    with subprocess.Popen([sys.executable, "-c", script, "1"], env=env) as process:
        wait_for(lambda: State.load(journal).parent_open, "the open run", process)
        assert _statuses(database) == {"demo": "RUNNING"}
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: not State.load(journal).parent_open, "the end of the run")
    assert _statuses(database) == {"demo": "FAILED"}


def test_passwords_stay_in_the_environment(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds a password") as caught:
        TrackingSettings(uri="https://me:hunter2@mlflow.example.org")
    assert "hunter2@" not in str(caught.value).split("input_value")[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(GalrayWarning, match="did not take everything") as told:
        Tracker(TrackingSettings(), tmp_path / "run", "run", {"seed": 1}).close()
    assert not any("hunter2" in str(warning.message) for warning in told)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"hunter2" not in path.read_bytes(), path
