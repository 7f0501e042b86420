"""A run that is killed in the middle of its ensemble, and started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import galray
import galray.config
from tests.chain_config import write_config
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc"),
]

MEMBERS = ("000", "001", "002")


def start(config: Path, log: Path, command: str = "run") -> subprocess.Popen[bytes]:
    """``galray run`` in a process of its own, on a Ray cluster of one CPU: one member after the other."""
    words = [sys.executable, "-m", "galray.cli", command, str(config), "--set", "cluster.num_cpus=1"]
    with log.open("ab") as stream:
        return subprocess.Popen(
            words, stdout=stream, stderr=stream, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def processes() -> dict[int, tuple[int, str, str]]:
    """Parent, start time and command line of every living process."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # The name in parentheses may hold spaces: the fields are counted from behind it.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if fields[0] != "Z":
            found[int(entry.name)] = (int(fields[1]), fields[19], words)
    return found


def descendants(pid: int) -> dict[tuple[int, str], str]:
    """Children of a process and theirs: pid and start time, which no later process shares, to command."""
    table, family = processes(), {pid}
    while grown := {p for p, (parent, _, _) in table.items() if parent in family} - family:
        family |= grown
    return {(p, table[p][1]): table[p][2] for p in family - {pid}}


def wait_until_gone(helpers: dict[tuple[int, str], str]) -> None:
    """Wait for processes to end."""

    def gone() -> bool:
        table = processes()
        return not any(p in table and table[p][1] == born for p, born in helpers)

    wait_for(gone, f"the end of {set(helpers.values())}", every=0.2)


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def mlflow_status(folder: Path) -> tuple[list[str], list[str]]:
    """Status of parents and of children."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    parents = [r.info.status for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r.info.status for r in runs if "mlflow.parentRunId" in r.data.tags]
    return parents, children


def identities(folder: Path) -> list[str]:
    return [json.loads((folder / "members" / name / "spec.json").read_text())["id"] for name in MEMBERS]


def test_killed_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    text = config.read_text().replace("seeds = 2", "seeds = 3").replace("epochs = 2", "epochs = 30")
    config.write_text(text)
    folder, log = tmp_path / "tiny", tmp_path / "log.txt"
    first = folder / "members" / "000" / "result.json"

    process = start(config, log)
    wait_for(first.exists, "the end of the first member", process, log)
    helpers = descendants(process.pid)
    assert any("raylet" in words for words in helpers.values()), "the members run on Ray"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    # Everything that the run had started ends by itself: Ray at once, the writer when MLflow is in order.
    wait_until_gone(helpers)
    parents, children = mlflow_status(tmp_path)
    assert parents == ["FAILED"]
    assert "RUNNING" not in children
    assert not (folder / "members" / "002" / "result.json").exists(), "it was killed in the ensemble"
    assert not (folder / "results" / "summary.json").exists()
    done = {p: p.stat().st_mtime_ns for p in first.parent.rglob("*") if p.is_file()}
    mock = {p: p.stat().st_mtime_ns for p in (folder / "mock").iterdir()}

    again = start(config, log)
    assert again.wait() == 0, log.read_text()
    assert {p: p.stat().st_mtime_ns for p in done} == done, "the finished member is not touched"
    assert {p: p.stat().st_mtime_ns for p in mock} == mock, "nor is the mock"
    run = galray.load_run(folder)
    assert [m["status"] for m in run.summary["members"]] == ["finished"] * 3
    parents, children = mlflow_status(tmp_path)
    assert parents == ["FINISHED"]
    assert children == ["FINISHED"] * 3
    leftovers = [p.name for p in folder.rglob("*") if p.name.endswith((".tmp", ".part"))]
    assert leftovers == []

    # A run that nobody killed has the same members, with the same numbers in them.
    untouched = galray.run(
        config,
        quiet=True,
        output=str(tmp_path / "untouched"),
        tracking__enabled=False,
        cluster__enabled=False,
    )
    assert identities(untouched.folder) == identities(folder)
    for name in MEMBERS:
        mine, theirs = (
            load_file(f / "members" / name / "evaluation.safetensors") for f in (folder, untouched.folder)
        )
        scale = np.abs(theirs["acceleration"]).max()
        assert np.abs(mine["acceleration"] - theirs["acceleration"]).max() < 1e-4 * scale, name


def test_interrupted_run_is_closed_and_goes_on(tmp_path: Path) -> None:
    """Ctrl-C: exit code 130, a word on how to go on, no run left open."""
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("epochs = 2", "epochs = 200"))
    folder, log = tmp_path / "tiny", tmp_path / "log.txt"
    process: Any = start(config, log)
    wait_for((folder / "members" / "000.tmp" / "curve.json").exists, "the first epoch", process, log)
    helpers = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, log.read_text()
    assert "interrupted; run the same command again to go on" in log.read_text()
    assert "Traceback" not in log.read_text()
    wait_until_gone(helpers)
    parents, children = mlflow_status(tmp_path)
    assert parents == ["FAILED"]
    assert "RUNNING" not in children


def test_killed_search_goes_on_with_the_trials_it_had(tmp_path: Path) -> None:
    key = "training.score.learning_rate"
    extra = f"""
[tune]
trials = 4
search = "random"
asha = false
[tune.space]
"{key}" = {{ low = 1e-4, high = 1e-2, log = true }}
"""
    config = write_config(tmp_path, num_stars=8000, extra=extra)
    config.write_text(config.read_text().replace("epochs = 2", "epochs = 60"))
    folder, log = tmp_path / "tiny" / "tune", tmp_path / "log.txt"

    process: Any = start(config, log, "tune")
    (first,) = wait_for(
        lambda: list(folder.glob("*/trials/*/outcome.json")), "the end of a trial", process, log
    )
    helpers = descendants(process.pid)
    # The trial that runs now comes no further until the search has written its own state once more.
    trainers = [pid for (pid, _), words in helpers.items() if words.startswith("ray::")]
    signal_all(trainers, signal.SIGSTOP)
    written = lambda: [path.stat().st_mtime for path in folder.glob("*/tune/experiment_state-*.json")]  # noqa: E731
    wait_for(lambda: max(written(), default=0.0) > first.stat().st_mtime, "the search's state", process, log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    signal_all(trainers, signal.SIGCONT)
    wait_until_gone(helpers)
    ended = list(folder.glob("*/trials/*/outcome.json"))
    assert len(ended) < 4, "it was killed in the middle"
    assert not (folder / "best.toml").exists()
    kept = {path: path.stat().st_mtime_ns for path in ended}
    drawn = {path.parent.name for path in folder.glob("*/trials/*/choices.json")}

    again = start(config, log, "tune")
    assert again.wait() == 0, log.read_text()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    trials = json.loads(next(folder.glob("*/trials.json")).read_text())
    assert [trial["status"] for trial in trials] == ["finished"] * 4
    assert drawn <= {trial["id"] for trial in trials}
    assert all(trial["epochs"] == 60 for trial in trials)
    assert galray.config.load_config(folder / "best.toml").name == "tiny-tuned"
