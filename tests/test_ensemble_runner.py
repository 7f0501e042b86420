"""Members run once, fail alone, survive kills; the same in process and through Ray Tune."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from galray.cluster import ClusterSettings, connect
from galray.ensemble import EnsembleSettings, FamilyDesign, design, report_progress, run_members
from galray.ensemble.runner import concurrent_members
from galray.ensemble.store import MemberStore
from galray.errors import GalrayError
from tests.waiting import wait_for


def _specs(seeds=3, bootstraps=1, context_hash="data", **others):
    none = FamilyDesign(seeds=0)
    settings = EnsembleSettings(
        flow=none, moments=none, score=FamilyDesign(seeds=seeds, bootstraps=bootstraps), **others
    )
    return design(settings, 11, context_hash)


def member(spec, folder, context):
    """A member that counts its runs, can fail, can kill its process, and leaves a file."""
    calls = Path(context["calls"])
    with open(calls / spec["id"], "a") as handle:
        handle.write("x")
    report_progress(folder, 0.5, "half way")
    if spec["index"] in context.get("fail", ()):
        raise ValueError(f"member {spec['index']} is ill")
    if spec["index"] in context.get("die_once", ()) and len((calls / spec["id"]).read_text()) == 1:
        os._exit(9)
    time.sleep(context.get("sleep", 0))
    if spec["index"] == 0 and "seen" in context:
        wait_for(Path(context["seen"]).exists, "somebody who heard of the member's progress")
    value = np.random.default_rng(spec["streams"]["training"]).normal()
    Path(folder, "value.txt").write_text(repr(value))
    return {
        "value": np.float64(value),
        "weights": context.get("weights", np.zeros(1)).sum(),
        "pid": os.getpid(),
    }


@pytest.fixture
def calls(tmp_path):
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


IN_PROCESS = EnsembleSettings(concurrent=0)


def test_runs_once_and_reads_back(tmp_path, calls):
    specs, context = _specs(), {"calls": str(calls)}
    seen = []
    first = run_members(
        specs, member, tmp_path / "members", context, IN_PROCESS, on_done=lambda s, o: seen.append(s.index)
    )
    again = run_members(specs, member, tmp_path / "members", context, IN_PROCESS)
    assert [o.spec.index for o in first] == seen == [0, 1, 2, 3]
    assert all(o.finished and not o.reused for o in first)
    assert all(o.finished and o.reused for o in again)
    assert [o.result for o in again] == [o.result for o in first]
    assert all(path.read_text() == "x" for path in calls.iterdir())
    assert sorted(p.name for p in (tmp_path / "members").iterdir() if p.name[0] != ".") == [
        "000",
        "001",
        "002",
        "003",
    ]
    record = json.loads((tmp_path / "members/003/spec.json").read_text())
    assert (record["family"], record["bootstrap"], record["id"]) == ("score", 1, specs[3].id)
    assert first[0].result["value"] == first[3].result["value"]  # the bootstrap has the base's seed


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, calls, caplog):
    specs = _specs()
    context = {"calls": str(calls), "fail": [1]}
    outcomes = run_members(specs, member, tmp_path / "members", context, IN_PROCESS)
    assert [o.finished for o in outcomes] == [True, False, True, True]
    assert outcomes[1].error == "ValueError: member 1 is ill"
    assert "is ill" in (tmp_path / "members/001/error.txt").read_text()
    assert "member 1 is ill" in caplog.text
    mended = run_members(specs, member, tmp_path / "members", {"calls": str(calls)}, IN_PROCESS)
    assert [o.reused for o in mended] == [True, False, True, True]
    assert mended[1].finished
    assert not (tmp_path / "members/001/error.txt").exists()


def test_all_failed_is_one_clear_error(tmp_path, calls):
    context = {"calls": str(calls), "fail": [0, 1, 2, 3]}
    with pytest.raises(GalrayError, match=r"all 4 members failed.*member 0 is ill"):
        run_members(_specs(), member, tmp_path / "members", context, IN_PROCESS)
    with pytest.raises(GalrayError, match="cannot be imported"):
        run_members(_specs(), "no.such.module:member", tmp_path / "members", {}, IN_PROCESS)


def test_a_changed_design_keeps_what_is_still_valid(tmp_path, calls):
    context = {"calls": str(calls)}
    folder = tmp_path / "members"
    run_members(_specs(seeds=2, bootstraps=1), member, folder, context, IN_PROCESS)
    grown = run_members(_specs(seeds=3, bootstraps=1), member, folder, context, IN_PROCESS)
    assert [o.reused for o in grown] == [True, True, False, True]
    assert all(json.loads((o.folder / "spec.json").read_text())["id"] == o.spec.id for o in grown)
    stale = run_members(
        _specs(seeds=1, bootstraps=0, context_hash="other"), member, folder, context, IN_PROCESS
    )
    assert not stale[0].reused
    assert sorted(p.name for p in folder.iterdir() if p.name[0] != ".") == ["000"]
    back = run_members(_specs(seeds=3, bootstraps=1), member, folder, context, IN_PROCESS)
    assert all(o.reused for o in back)


def test_interrupted_member_finds_its_work_folder_again(tmp_path):
    specs = _specs(seeds=1, bootstraps=0)

    def stubborn(spec, folder, context):
        checkpoint = Path(folder, "checkpoint")
        if not checkpoint.exists():
            checkpoint.write_text("epoch 5")
            raise KeyboardInterrupt
        return {"resumed": checkpoint.read_text()}

    with pytest.raises(KeyboardInterrupt):
        run_members(specs, stubborn, tmp_path / "members", {}, IN_PROCESS)
    assert not (tmp_path / "members/000").exists()
    assert run_members(specs, stubborn, tmp_path / "members", {}, IN_PROCESS)[0].result == {
        "resumed": "epoch 5"
    }


def test_two_processes_do_not_run_the_same_members(tmp_path, calls):
    store = MemberStore(tmp_path / "members")
    with store.lock(), pytest.raises(GalrayError, match="another galray process"):
        run_members(_specs(), member, tmp_path / "members", {"calls": str(calls)}, IN_PROCESS)


def test_listener_error_comes_after_the_members(tmp_path, calls):
    def broken(spec, outcome):
        raise RuntimeError("listener")

    with pytest.raises(RuntimeError, match="listener"):
        run_members(_specs(), member, tmp_path / "members", {"calls": str(calls)}, IN_PROCESS, broken)
    assert len(list(calls.iterdir())) == 4


def test_through_tune(ray_session, tmp_path, calls):
    specs = _specs(seeds=4, bootstraps=2)
    heard = tmp_path / "heard"
    context = {"calls": str(calls), "fail": [1], "die_once": [2], "sleep": 0.5, "seen": str(heard)}
    context["weights"] = np.ones(1000)
    seen = []
    lock = threading.Lock()  # a driver's listener holds what cannot be pickled, and Tune pickles callbacks

    def on_done(spec, outcome):
        with lock:
            seen.append(spec.index)

    def on_progress(spec, fraction, note):
        if (spec.index, fraction, note) == (0, 0.5, "half way"):
            heard.touch()

    outcomes = run_members(
        specs,
        member,
        tmp_path / "members",
        context,
        EnsembleSettings(),
        on_done=on_done,
        on_progress=on_progress,
    )
    assert [o.finished for o in outcomes] == [True, False, True, True, True, True]
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]
    assert outcomes[1].error == "ValueError: member 1 is ill"
    assert outcomes[0].result["weights"] == 1000
    assert not (tmp_path / "ensemble" / "tune").exists()
    # Two at a time, one process more for the one that died: the others took a process over.
    assert len({o.result["pid"] for o in outcomes if o.finished}) <= 3
    again = run_members(specs, member, tmp_path / "members", context | {"fail": []}, EnsembleSettings())
    assert [o.reused for o in again] == [True, False, True, True, True, True]
    runs = {spec.index: len((calls / spec.id).read_text()) for spec in specs}
    assert runs == {0: 1, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1}
    in_process = run_members(
        specs, member, tmp_path / "p" / "members", context | {"fail": [], "sleep": 0}, IN_PROCESS
    )
    assert [o.result["value"] for o in in_process] == [o.result["value"] for o in again]


def test_member_too_large_for_the_cluster_is_refused(ray_session, tmp_path):
    with pytest.raises(GalrayError, match="member of the ensemble needs 16 CPUs"):
        run_members(_specs(), member, tmp_path / "members", {}, EnsembleSettings(cpus_per_member=16))


@pytest.mark.cluster
def test_kill_nine_in_the_ensemble_and_start_again(tmp_path, calls):
    script = tmp_path / "drive.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from galray.cluster import ClusterSettings, connect\n"
        "from galray.ensemble import EnsembleSettings, run_members\n"
        "from tests.test_ensemble_runner import _specs, member\n"
        "with connect(ClusterSettings(num_cpus=2, object_store_mb=100)):\n"
        f"    context = {{'calls': {str(calls)!r}, 'sleep': 2.0}}\n"
        f"    for o in run_members(_specs(seeds=6), member, {str(tmp_path / 'members')!r}, context):\n"
        "        print(o.spec.index, o.reused, o.result['value'])\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: list((tmp_path / "members").glob("???/result.json")), "the end of a member", process)
        process.send_signal(signal.SIGKILL)
    finished = {path.parent.name for path in (tmp_path / "members").glob("???/result.json")}
    assert 1 <= len(finished) < 7
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [int(row[0]) for row in rows] == list(range(7)), done.stderr
    reused = {f"{int(row[0]):03d}" for row in rows if row[1] == "True"}
    assert reused >= finished
    specs = _specs(seeds=6)
    for spec, row in zip(specs, rows, strict=True):
        expected = np.random.default_rng(spec.streams["training"]).normal()
        assert float(row[2]) == expected
        runs = len((calls / spec.id).read_text())
        assert runs <= 2
        if row[1] == "True":
            assert runs == 1
    assert not list((tmp_path / "members").glob("*.tmp"))


def group_member(spec, folder, context):
    """A member that is a group of two Ray Train workers, as `fit_distributed` starts them."""
    import ray.train
    from ray.train.torch import TorchTrainer

    def loop(config):
        rank = ray.train.get_context().get_world_rank()
        Path(config["folder"], f"rank-{rank}").write_text(str(time.time()))
        time.sleep(1.0)
        ray.train.report({"rank": rank})

    TorchTrainer(
        loop,
        train_loop_config={"folder": folder},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(name="ray", storage_path=str(Path(folder) / "train")),
    ).fit()
    return {"ranks": sorted(path.name for path in Path(folder).glob("rank-*"))}


@pytest.mark.cluster
def test_groups_of_workers_run_as_trials_and_wait_for_one_another(ray_session, tmp_path):
    """Two CPUs, members of two workers: one group at a time, the trial itself holding none of them."""
    specs = _specs(seeds=2, bootstraps=0)
    outcomes = run_members(specs, group_member, tmp_path / "members", {}, workers={"score": 2})
    assert [o.error for o in outcomes] == ["", ""]
    assert [o.result["ranks"] for o in outcomes] == [["rank-0", "rank-1"]] * 2
    ends = [max(float(p.read_text()) for p in o.folder.glob("rank-*")) for o in outcomes]
    starts = [min(float(p.read_text()) for p in o.folder.glob("rank-*")) for o in outcomes]
    assert max(starts) > min(ends), "one after the other"
    with pytest.raises(GalrayError, match="trains on 3 workers, the Ray cluster has 2 CPUs"):
        run_members(_specs(seeds=3), group_member, tmp_path / "large", {}, workers={"score": 3})


def test_members_of_a_cluster_that_grows_ask_for_its_nodes(ray_session):
    """All at once on their own, whatever is there now; groups as many as are placed, and one at the least."""
    members = EnsembleSettings()
    assert (concurrent_members(members, 10), concurrent_members(members, 10, 2)) == (2, 1)
    with connect(ClusterSettings(autoscaling=True)):
        assert (concurrent_members(members, 10), concurrent_members(members, 10, 4)) == (10, 1)
        some = EnsembleSettings(concurrent=3, labels={"kind": "to come"})
        assert (concurrent_members(some, 10), concurrent_members(some, 10, 4)) == (3, 1)
    one_by_one = EnsembleSettings(concurrent=0)
    assert (concurrent_members(one_by_one, 10), concurrent_members(one_by_one, 10, 2)) == (0, 0)
    with pytest.raises(GalrayError, match="trains on 3 workers"):
        concurrent_members(one_by_one, 10, 3)
