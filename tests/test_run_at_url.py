"""A whole run whose data, members and results lie in an object store; no two nodes share a disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from astropy.table import Table

import galray
from galray.catalog.lease import LEASE
from galray.catalog.mirror import SCRATCH, Mirror
from galray.cli import app
from galray.config import load_config, overrides_of
from galray.ensemble import EnsembleSettings, MemberSpec, MemberStore, run_members
from galray.ensemble import store as member_files
from galray.ensemble_plan import ensemble_plan
from galray.errors import GalrayError
from galray.phasespace import build_model
from galray.pipeline import Pipeline
from galray.training import TrainingResult, fit_distributed
from tests.chain_config import write_config
from tests.test_training_distributed import BALL, MODEL, SETTINGS, stars

HERE = EnsembleSettings(concurrent=0)
"""Members one by one in this process, whatever cluster another test has left connected."""


def test_a_run_at_a_url_goes_on_elsewhere_and_is_read_from_a_third(tmp_path, bucket, monkeypatch) -> None:
    url, storage = bucket
    path = write_config(tmp_path, num_stars=6000)
    at_url = [
        f"output={url}/runs",
        *overrides_of(
            {"catalog.storage": storage.model_dump(include={"endpoint", "region"}, exclude_none=True)}
        ),
        "tracking.enabled=false",
        "cluster.enabled=false",
        'methods=["score"]',
        "ensemble.score.seeds=1",
    ]
    config = load_config(path, at_url)
    Pipeline(config).run(until="members")
    shutil.rmtree(tmp_path / "scratch")

    # Another node goes on: nothing of the first one's is there.
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node2"))
    with monkeypatch.context() as patch:
        patch.delattr("galray.measurement.run_member")  # the member is finished, and not begun again
        run = Pipeline(config).run()

    # A third one reads.
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node3"))
    read = galray.load_run(f"{url}/runs/tiny", storage)
    assert read.headline == run.headline
    assert read.stage_seconds.keys() >= {"mock", "catalog", "members", "measure", "report"}
    assert (read.folder / "report.html").is_file()
    assert (read.folder / "members" / "000" / "model" / "model.safetensors").is_file()
    assert read.catalog.states([0]).shape[1] == 6
    assert "CPU-hours" in ensemble_plan(config)
    names = set(Mirror(f"{url}/runs/tiny", storage).sizes())
    assert LEASE not in names
    assert not [name for name in names if ".tmp" in name or ".ingest" in name]

    # So do the commands, by the URL alone.
    if storage.endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", storage.endpoint)
    table, place = tmp_path / "out.ecsv", Mirror(f"{url}/runs/tiny", storage)
    (tmp_path / "at.csv").write_text("x,y,z\n-8.1,0.0,1.0\n")
    place.remove("report.html")
    for words in (
        ("catalog", "verify", f"{url}/runs/tiny/shards"),
        ("gravity", "evaluate", f"{url}/runs/tiny", "--at", tmp_path / "at.csv", "--out", table),
        ("report", f"{url}/runs/tiny"),
    ):
        app(args=[str(word) for word in words], prog_name="galray", standalone_mode=False)
    assert len(Table.read(table)) == 1
    assert place.read("report.html") is not None

    # The directory belongs to its configuration.
    with pytest.raises(GalrayError, match=f"{url}/runs/tiny: belongs to another configuration"):
        Pipeline(load_config(path, [*at_url, "seed=4"])).run()


def spoilt(spec: dict, folder: str, context: dict) -> dict:
    """A member that counts its epochs in a file, and whose node goes away after the first one."""
    checkpoint = Path(folder) / "epoch.txt"
    epoch = int(checkpoint.read_text()) if checkpoint.exists() else 0
    checkpoint.write_text(str(epoch + 1))
    member_files.report_progress(folder, 0.5, "epoch")
    if epoch == 0:
        raise KeyboardInterrupt
    return {"begun_at": epoch}


def test_a_member_goes_on_on_another_node(tmp_path, bucket, monkeypatch) -> None:
    url, storage = bucket
    monkeypatch.setattr(member_files, "_SEND_SECONDS", 0.0)
    place = Mirror(f"{url}/members", storage)
    specs = [MemberSpec(0, "score", context_hash="a"), MemberSpec(1, "score", seed=1, context_hash="a")]
    with pytest.raises(KeyboardInterrupt):
        run_members(specs[:1], spoilt, place, settings=HERE)
    assert place.sizes("000.tmp").keys() >= {"000.tmp/epoch.txt", "000.tmp/spec.json"}

    monkeypatch.setenv(SCRATCH, str(tmp_path / "node2"))
    second = Mirror(f"{url}/members", storage)
    (outcome,) = run_members(specs[:1], spoilt, second, settings=HERE)
    assert outcome.result == {"begun_at": 1}
    assert {name.split("/")[0] for name in place.sizes()} == {"000"}

    # What a dead worker left is kept with the word of its death.
    store = MemberStore(second)
    store.begin(specs[1])
    (store.work_path(specs[1]) / "epoch.txt").write_text("5")
    store.send(specs[1])
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node3"))
    driver = MemberStore(Mirror(f"{url}/members", storage))
    driver.take_over(specs[1])
    failed = driver.finish(specs[1], seconds=0.0, traceback="WorkerDied: gone")
    assert failed.error == "WorkerDied: gone"
    assert (failed.folder / "epoch.txt").read_text() == "5"


def leaving(spec: dict, folder: str, context: dict) -> dict:
    """A member that reports two epochs, each with its checkpoint before."""
    checkpoint = Path(folder) / "epoch.txt"
    begun = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for epoch in range(begun, 2):
        checkpoint.write_text(str(epoch + 1))
        member_files._last_report.clear()
        member_files.report_progress(folder, epoch / 2)
    return {"begun": begun}


def test_a_member_leaves_with_its_node_and_goes_on_elsewhere(tmp_path, s3_storage, monkeypatch) -> None:
    """Notice of a preemption: the checkpoint is sent there and then, not when the next one is due."""
    monkeypatch.setattr(member_files, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr("galray.ensemble.execute.node_leaves", lambda: True)
    place, spec = Mirror("s3://galray/leaving", s3_storage), MemberSpec(0, "score", context_hash="a")
    with pytest.raises(member_files.NodeLeavesError, match="to be taken away"):
        run_members([spec], leaving, place, settings=HERE)
    assert place.read("000.tmp/epoch.txt") == b"1"
    monkeypatch.setattr("galray.ensemble.execute.node_leaves", lambda: False)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node2"))
    (outcome,) = run_members([spec], leaving, Mirror("s3://galray/leaving", s3_storage), settings=HERE)
    assert outcome.result == {"begun": 1}


def test_a_training_by_ranks_goes_on_on_another_node(tmp_path, bucket, monkeypatch) -> None:
    """Stars, checkpoints, curve and result go through the URL; Ray Train keeps its own state there too."""
    url, storage = bucket
    model = build_model("score", MODEL, BALL, stars(), seed=1)
    fit_distributed("score", model, stars(), stars(300, 1), SETTINGS, seed=3, storage=tmp_path, local=True)
    there = build_model("score", MODEL, BALL, stars(), seed=1)

    def train(curve: str) -> TrainingResult:
        place = Mirror(f"{url}/training", storage)
        return fit_distributed(
            "score", there, stars(), stars(300, 1), SETTINGS, seed=3, storage=place, curve=curve, local=True
        )  # fmt: skip

    found = train("curve.json")
    assert torch.equal(there.score(stars(50, 2)), model.score(stars(50, 2)))
    place = Mirror(f"{url}/training", storage)
    names = {"curve.json", "training/checkpoint/state.safetensors", "training/result/result.json"}
    assert place.sizes().keys() > names
    assert json.loads(place.read("curve.json") or b"") == found.curve
    assert not list((tmp_path / "scratch").glob("training-*")), "ranks clear their desks"

    # On another node, and with the result lost: the last checkpoint is there, and no epoch is done again.
    place.remove("training/result", "curve.json")
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node2"))
    assert train("curve.json").curve == found.curve
    assert place.read("curve.json") is None


def test_what_is_no_place_is_refused(tmp_path) -> None:
    with pytest.raises(GalrayError, match="not a URL"):
        Pipeline(load_config(write_config(tmp_path), ["output=s3://galray/../x"])).run()
