"""Stores at URLs: every node has a copy of its own, and none of them is shared."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from galray.catalog import CatalogSettings, ShardStore, ingest, sky, summarize, verify
from galray.catalog import lease as leases
from galray.catalog.lease import LEASE, lease
from galray.catalog.mirror import SCRATCH, Mirror, Place, RemoteFile, open_place
from galray.catalog.workers import Worker
from galray.errors import GalrayError
from tests.catalog_stars import stars


def checksums(store: ShardStore) -> list[str]:
    tiles = (store.manifest.get("tiles") or {"files": []})["files"]
    return [entry["xxh128"] for entry in (*store.manifest["shards"], *tiles)]


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(3):
        stars(400, seed=number).write_parquet(folder / f"{number}.parquet")
    return str(folder)


def test_a_place_moves_files_whole_and_once(bucket, tmp_path) -> None:
    url, storage = bucket
    mine = Mirror(f"{url}/place", storage)
    (mine.folder / "deep").mkdir(parents=True)
    for name, text in {"deep/x": "hi", "e": "e", ".hidden": "", "half.tmp": ""}.items():
        (mine.folder / name).write_text(text)
    mine.push()
    assert mine.sizes() == {"deep/x": 2, "e": 1}
    assert mine.sizes("deep") == {"deep/x": 2}
    (mine.folder / "e").write_text("f")  # of the same size: this process knows that it has changed
    mine.push()
    assert mine.read("e") == b"f"
    assert mine.read("none") is None
    mine.clear()
    mine.pull("deep/*")
    assert [p.name for p in mine.folder.rglob("*") if p.is_file()] == ["x"]
    assert isinstance(mine.file("e"), RemoteFile)
    assert Path(mine.file("e")).read_text() == "f"
    with pytest.raises(GalrayError, match=rf"{url}/place/none: .*no such"):
        mine.fetch("none")
    mine.remove("deep", "e")
    assert mine.sizes() == {}
    assert isinstance(open_place(tmp_path), Place)


@pytest.mark.parametrize("url", ["s3://", "s3://galray/../x", "s3://key:secret@galray/x", "here"])
def test_what_is_no_url_of_a_folder_is_refused(url) -> None:
    with pytest.raises(GalrayError, match="not a URL"):
        Mirror(url)


def test_a_store_at_a_url_is_the_local_one(bucket, files, tmp_path, monkeypatch) -> None:
    url, storage = bucket
    settings = CatalogSettings(files=(files,), num_shards=3, storage=storage, require_rv=False)
    here = ingest(settings, tmp_path / "here")
    there = ingest(settings, f"{url}/there/store")
    assert checksums(there) == checksums(here)
    assert there.row_account == here.row_account
    held = set(there._place.sizes())
    assert not [name for name in held if name.startswith(".")]
    assert {"manifest.json", "no_rv/manifest.json", "sky/hats.properties"} <= held

    # Another node: nothing is there but what it reads.
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node2"))
    again = ingest(settings, f"{url}/there/store")
    assert again.manifest["created"] == there.manifest["created"], "it was whole"
    assert not list((tmp_path / "node2").rglob("shard-*"))
    # Workers of a Ray that an earlier test started know nothing of this node, nor of the keys of the store.
    monkeypatch.setattr(sky, "_scheduler", lambda: "threads")
    store = pickle.loads(pickle.dumps(ShardStore(f"{url}/there/store", storage)))
    assert np.array_equal(store.states([1]), here.states([1]))
    assert [p.name for p in (tmp_path / "node2").rglob("shard-*")] == ["shard-00001.parquet"]
    assert store.no_rv.table(["source_id"]).equals(here.no_rv.table(["source_id"]))
    assert store.rv_selection is not None
    for layout in ("shards", "tiles"):
        mine, theirs = sky.compute(
            sky.healpix_map(store, level=2, layout=layout), sky.healpix_map(here, level=2, layout=layout)
        )
        assert np.array_equal(mine, theirs)
    assert summarize(store).num_stars == here.num_rows
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node3"))
    inputs = Mirror(f"{url}/input", storage)
    shutil.copytree(files, inputs.folder)
    inputs.push()
    given = settings.model_copy(update={"files": (f"{url}/input/*.parquet",)})
    assert ingest(given, tmp_path / "from-url").hash == here.hash, "Polars reads the same bucket"
    found = verify(ShardStore(f"{url}/there/store", storage))
    assert found.problems == ()
    assert found.tiles == len(here.manifest["tiles"]["files"]) + len(here.no_rv.manifest["tiles"]["files"])


def test_another_store_at_the_same_url_replaces_copies(s3_storage, files, tmp_path, monkeypatch) -> None:
    settings = CatalogSettings(files=(files,), num_shards=2, storage=s3_storage)
    ingest(settings, "s3://galray/changing")
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node2"))
    store = ShardStore("s3://galray/changing", s3_storage)
    before = store.states()
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    ingest(settings.model_copy(update={"num_shards": 5}), "s3://galray/changing", seed=4)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node2"))
    changed = ShardStore("s3://galray/changing", s3_storage)
    assert len(changed.shards) == 5
    assert np.array_equal(np.sort(changed.states()[:, 0]), np.sort(before[:, 0]))
    assert [name for name in changed._place.sizes() if name.startswith("shard-") and "parquet" in name] == [
        f"shard-{n:05d}.parquet" for n in range(5)
    ]


def test_an_ingest_goes_on_on_another_node(bucket, files, tmp_path, monkeypatch) -> None:
    url, storage = bucket
    settings = CatalogSettings(files=(files,), num_shards=2, storage=storage)

    class Killed(BaseException):
        """As if the driver's node had gone."""

    def progress(done: int, total: int, text: str) -> None:
        if text.startswith("2/3 files"):
            raise Killed

    with pytest.raises(Killed):
        ingest(settings, f"{url}/goes-on", progress=progress)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node2"))
    read: list[str] = []
    really = Worker._read
    monkeypatch.setattr(Worker, "_read", lambda self, unit: (read.append(unit.path), really(self, unit))[1])
    store = ingest(settings, f"{url}/goes-on")
    assert len(read) == 1, "two of three files were read by the node that is gone"
    assert checksums(store) == checksums(ingest(settings, tmp_path / "here"))


def test_a_lease_keeps_others_out_and_outlives_no_owner(bucket, monkeypatch) -> None:
    url, storage = bucket
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(leases, "DEAD_SECONDS", 300.0)  # the first renewal tells that the owner lives
    place = Mirror(f"{url}/leased", storage)
    with lease(place):
        with (
            pytest.raises(GalrayError, match=rf"{url}/leased: process \d+ on .* works here"),
            lease(place),
        ):
            pass
        assert threading.active_count() >= 2
    assert place.read(LEASE) is None
    place.write(LEASE, json.dumps({"id": "x", "holder": "a dead one", "renewed": 7}).encode())
    monkeypatch.setattr(leases, "DEAD_SECONDS", 1.0)
    with lease(place):
        assert json.loads(place.read(LEASE) or b"")["holder"] != "a dead one"
