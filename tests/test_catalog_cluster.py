"""An ingest whose processes are killed, whose nodes go away, and which is started twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from galray.catalog import CatalogSettings, ShardStore, ingest
from tests.catalog_stars import stars
from tests.held_ingest import HOLD
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc"),
]

# The driver of an ingest in a process of its own; the last line that it prints is the outcome.
DRIVER = """
import json, sys
from galray.catalog import CatalogSettings, ingest
from galray.catalog.workers import peak_mb
from galray.errors import GalrayError
from tests.held_ingest import hold

what = json.loads(sys.argv[1])
if what["workers"]:
    import ray

    ray.init(address="local", num_cpus=what["workers"], include_dashboard=False,
             object_store_memory=100 * 1024**2, log_to_driver=False, logging_level="ERROR",
             runtime_env={"worker_process_setup_hook": hold})
else:
    hold()

try:
    settings = CatalogSettings(**what["settings"])
    store = ingest(settings, what["target"], num_workers=what["workers"])
except GalrayError as error:
    print(json.dumps({"error": error.what}))
    sys.exit(2)
peaks = {"driver_mb": peak_mb(), "worker_mb": store.manifest["peak_worker_mb"]}
print(json.dumps({"rows": store.num_rows, **peaks}))
"""


FILES = 16


def environment(hold: Path | None = None) -> dict[str, str]:
    """Of a process with an ingest, which waits in mid-file for a word in `hold`."""
    own = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    own["PYTHONPATH"] = str(Path(__file__).parents[1])
    if hold is not None:
        hold.mkdir()
        own[HOLD] = str(hold)
    return os.environ | own


def start(settings: dict, target: Path, workers: int, hold: Path | None = None) -> subprocess.Popen[str]:
    what = {"settings": settings, "target": str(target), "workers": workers}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(what)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(hold),
    )


def finish(process: subprocess.Popen[str]) -> dict:
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return json.loads(out.splitlines()[-1])


def checksums(store: ShardStore) -> list[tuple[str, str]]:
    entries = [*store.manifest["shards"], *store.manifest["tiles"]["files"]]
    return [(entry["file"], entry["xxh128"]) for entry in entries]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of which most are left to do when the first ones have been read."""
    folder = tmp_path_factory.mktemp("files")
    table = stars(40_000)
    for number in range(FILES):
        table[number::FILES].write_csv(folder / f"{number}.csv")
    return folder


def configured(files: Path) -> dict:
    return {"files": [str(files)], "num_shards": 3}


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    return ingest(CatalogSettings(**configured(files)), tmp_path_factory.mktemp("undisturbed"))


def held(folder: Path, process: subprocess.Popen[str]) -> list[int]:
    """Process ids of those that are in the middle of a file, of which there are some."""
    found = wait_for(lambda: list(folder.glob("held-*")), "a half-written piece", process)
    return [int(path.name.removeprefix("held-")) for path in found]


def half_written(target: Path, pid: int) -> list[Path]:
    return list(target.glob(f".ingest-*/.piece-*.{pid}-*.tmp"))


def pieces(target: Path) -> dict[Path, int]:
    """The files that have been read, and when."""
    return {path: path.stat().st_mtime_ns for path in target.glob(".ingest-*/piece-*.json")}


def test_killed_driver_and_two_at_once(files: Path, undisturbed: ShardStore, tmp_path: Path) -> None:
    target = tmp_path / "store"
    process = start(configured(files), target, workers=0, hold=tmp_path / "hold")
    assert held(tmp_path / "hold", process) == [process.pid]  # it has its lock, and comes no further

    second = start(configured(files), target, workers=0)
    out, _ = second.communicate()
    assert second.returncode == 2
    assert f"another ingest is writing this store (pid {process.pid}" in json.loads(out)["error"]

    assert half_written(target, process.pid), "it is killed in the middle"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (target / "manifest.json").exists()
    done = pieces(target)
    assert len(done) == 2

    again = start(configured(files), target, workers=0, hold=tmp_path / "again")
    held(tmp_path / "again", again)
    assert pieces(target) == done, "what was done is not done again"
    (tmp_path / "again" / "go").touch()
    finish(again)
    store = ShardStore(target)
    assert checksums(store) == checksums(undisturbed)
    assert store.row_account == undisturbed.row_account
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


def test_killed_actor_in_mid_file(files: Path, undisturbed: ShardStore, tmp_path: Path) -> None:
    target = tmp_path / "store"
    process = start(configured(files), target, workers=2, hold=tmp_path / "hold")
    actor = held(tmp_path / "hold", process)[0]
    assert actor != process.pid
    assert half_written(target, actor)
    os.kill(actor, signal.SIGKILL)
    (tmp_path / "hold" / "go").touch()
    finish(process)
    store = ShardStore(target)
    assert checksums(store) == checksums(undisturbed)
    assert store.row_account == undisturbed.row_account
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


NODES = """
import json, os, sys, threading
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from galray.catalog import CatalogSettings, ingest
from tests.held_ingest import HOLD, hold
from tests.waiting import wait_for

settings, target = CatalogSettings(**json.loads(sys.argv[1])), Path(sys.argv[2])
signals = Path(os.environ[HOLD])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False,
                                                        "object_store_memory": 100 * 1024**2})
other = cluster.add_node(num_cpus=1, object_store_memory=100 * 1024**2)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR",
         runtime_env={"worker_process_setup_hook": hold})
result = []
thread = threading.Thread(target=lambda: result.append(ingest(settings, target, num_workers=2)), daemon=True)
thread.start()
wait_for(lambda: len(list(signals.glob("held-*"))) == 2, "both nodes at work")
cluster.remove_node(other, allow_graceful=False)
(signals / "go").touch()
thread.join()
Path(sys.argv[3]).write_text(json.dumps({"rows": result[0].num_rows if result else None}))
ray.shutdown()
cluster.shutdown()
"""


def test_removed_node(files: Path, undisturbed: ShardStore, tmp_path: Path) -> None:
    outcome = tmp_path / "outcome.json"
    done = subprocess.run(
        [sys.executable, "-c", NODES, json.dumps(configured(files)), str(tmp_path / "store"), str(outcome)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(tmp_path / "hold"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(outcome.read_text()) == {"rows": undisturbed.num_rows}
    store = ShardStore(tmp_path / "store")
    assert checksums(store) == checksums(undisturbed)
    assert store.row_account == undisturbed.row_account


def test_memory_does_not_grow_with_a_files_size(tmp_path: Path) -> None:
    peaks = []
    for rows in (100_000, 5_000_000):
        part = stars(100_000, rv_fraction=1)
        path = tmp_path / f"{rows}.parquet"
        copies = [
            part.lazy().with_columns(pl.col("source_id") + (np.int64(n) << 20))
            for n in range(rows // part.height)
        ]
        pl.concat(copies).sink_parquet(path, row_group_size=100_000)
        found = finish(start({"files": [str(path)]}, tmp_path / f"store{rows}", workers=1))
        assert found["rows"] == rows
        peaks.append(found["worker_mb"])
        path.unlink()
    print(f"peak resident per worker: {peaks} MB")
    assert max(peaks) <= 1074  # 1.0 GiB


def test_the_drivers_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    table = stars(3386 * 12, rv_fraction=1)
    found = {}
    for number in (400, 3386):
        folder = tmp_path / str(number)
        folder.mkdir()
        for n in range(number):
            table[12 * n : 12 * (n + 1)].write_parquet(folder / f"{n}.parquet")
        settings = {"files": [str(folder)], "num_shards": 4}
        found[number] = finish(start(settings, tmp_path / f"store{number}", workers=2))
        assert found[number]["rows"] == 12 * number
    print({number: outcome["driver_mb"] for number, outcome in found.items()})
    assert found[3386]["driver_mb"] < found[400]["driver_mb"] + 40
