"""Stores that refuse, servers that go away, disks that are full, nodes that are slow: how members end."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from galray.catalog import CatalogSettings, ingest
from galray.catalog.mirror import SCRATCH, Mirror
from galray.catalog.storage import StorageSettings
from galray.ensemble import EnsembleSettings, MemberSpec, report_progress, run_members
from galray.ensemble import store as member_files
from tests.catalog_stars import stars
from tests.chain_config import write_config
from tests.unsteady import Doorway, unsteady_s3
from tests.waiting import wait_for

SPECS = [MemberSpec(i, "score", seed=i, context_hash="x") for i in range(4)]


HERE = EnsembleSettings(concurrent=0)


def busy(spec: dict, folder: str, context: dict) -> dict:
    """A member that writes files, and says how far it is."""
    for part in range(3):
        (Path(folder) / f"{part}.bin").write_bytes(os.urandom(20_000))
        report_progress(folder, part / 3, "busy")
    return {"seed": spec["seed"]}


@pytest.mark.cluster
def test_a_store_that_refuses_one_request_in_five(tmp_path, monkeypatch) -> None:
    """Outcome: complete, the same stars as without refusals, all members finished."""
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    monkeypatch.setattr("galray.catalog.mirror.PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(member_files, "_SEND_SECONDS", 0.0)
    for number in range(2):
        stars(200, seed=number).write_parquet(tmp_path / f"{number}.parquet")
    with unsteady_s3(every=5) as (address, counts):
        storage = StorageSettings(endpoint=address, region="us-east-1")
        settings = CatalogSettings(
            files=(str(tmp_path / "*.parquet"),), num_shards=2, views=("shards",), storage=storage
        )
        there = ingest(settings, "s3://galray/store")
        assert there.hash == ingest(settings, tmp_path / "here").hash
        outcomes = run_members(SPECS[:2], busy, Mirror("s3://galray/members", storage), settings=HERE)
        assert [outcome.status for outcome in outcomes] == ["finished"] * 2
        assert counts[1] >= 10
        assert 4.5 < counts[0] / counts[1] < 5.5


def test_a_store_that_refuses_everything_is_named(tmp_path, monkeypatch) -> None:
    """Outcome: failed, with the URL, the store's word and what to do."""
    from galray.errors import GalrayError

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("galray.catalog.mirror.PAUSE_SECONDS", 0.0)
    monkeypatch.setattr("galray.catalog.mirror.ATTEMPTS", 2)
    with unsteady_s3(every=5) as (address, counts):
        counts.append(0)
    with pytest.raises(GalrayError, match="s3://galray/gone: cannot be") as caught:
        Mirror("s3://galray/gone", StorageSettings(endpoint=address, region="us-east-1")).read("x")
    assert "run again: it goes on" in caught.value.remedy


@pytest.fixture
def full_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_node_whose_disk_is_full(full_disk, tmp_path, s3_storage, monkeypatch) -> None:
    """Outcome: the members say why they failed; with space they go on, and what was finished stays."""
    from galray.errors import GalrayError

    done = run_members(SPECS[:1], busy, Mirror("s3://galray/full", s3_storage), settings=HERE)
    assert done[0].finished
    monkeypatch.setenv(SCRATCH, str(full_disk))
    (full_disk / "ballast").write_bytes(bytes(1_000_000))
    with pytest.raises((GalrayError, OSError)) as caught:
        run_members(SPECS[1:2], busy, Mirror("s3://galray/full", s3_storage), settings=HERE)
    assert "No space left" in str(caught.value)
    (full_disk / "ballast").unlink()
    outcomes = run_members(SPECS[:2], busy, Mirror("s3://galray/full", s3_storage), settings=HERE)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 2
    assert outcomes[0].reused


def slow_or_not(spec: dict, folder: str, context: dict) -> dict:
    """A member; the first one is slower than all the others together."""
    others = context["others"] if spec["index"] == 0 else 0
    members = Path(folder).parent
    wait_for(lambda: len(list(members.glob("00?/result.json"))) >= others, "the end of all other members")
    return {}


def test_a_straggler_holds_up_nobody(tmp_path, ray_session) -> None:
    """Outcome: complete; the others are done while one member, which began first, is still at work."""
    ended: list[int] = []
    specs = [MemberSpec(i, "score", seed=i, context_hash="slow") for i in range(8)]
    outcomes = run_members(
        specs, "tests.test_unsteady_services:slow_or_not", tmp_path / "members", {"others": 7},
        EnsembleSettings(), on_done=lambda spec, outcome: ended.append(spec.index),
    )  # fmt: skip
    assert [outcome.error for outcome in outcomes] == [""] * 8
    assert sorted(ended) == list(range(8))
    assert ended.index(0) >= 6, "at most the last of the others is heard of after it"


AWAY_SECONDS = 60.0


@pytest.mark.cluster
def test_mlflow_goes_away_in_mid_run(mlflow_server, tmp_path) -> None:
    """Outcome: complete; the end of the run waits for the server, which then has all epochs of them all."""
    from mlflow import MlflowClient

    import galray
    from galray.tracking.journal import Journal, State

    door = Doorway(int(mlflow_server.uri.rpartition(":")[2]))
    config = write_config(tmp_path, num_stars=6000, name="away")
    away: list[float] = []

    def shut_for_a_minute() -> None:
        # The run is open in MLflow: on an idle machine members train before its client has been imported.
        wait_for(lambda: State.load(Journal(tmp_path / "away")).parent, "the run in MLflow")
        door.shut()
        away.append(time.monotonic())
        time.sleep(AWAY_SECONDS)
        door.reopen()
        away.append(time.monotonic())

    keeper = threading.Thread(target=shut_for_a_minute, daemon=True)
    keeper.start()
    run = galray.run(
        config, quiet=True, methods=["score"], training__score__epochs=40, cluster__enabled=False,
        tracking__uri=f"http://127.0.0.1:{door.port}", tracking__experiment="away", tracking__patience=1e4,
    )  # fmt: skip
    keeper.join()
    assert len(away) == 2
    assert run.headline["value"] is not None
    state = State.load(Journal(run.folder))
    assert (state.error, state.refused, list(state.ended.values())) == ("", 0, ["FINISHED"] * 2)
    client = MlflowClient(mlflow_server.uri)
    assert client.get_run(state.parent).info.status == "FINISHED"
    assert "report.html" in [item.path for item in client.list_artifacts(state.parent)]
    (experiment,) = [e for e in client.search_experiments() if e.name == "away"]
    assert len(client.search_runs([experiment.experiment_id])) == 3, "no run was made twice"
    for member in state.members.values():
        assert client.get_run(member).info.status == "FINISHED"
        epochs = [point.step for point in client.get_metric_history(member, "validation")]
        assert sorted(epochs) == list(range(40))
