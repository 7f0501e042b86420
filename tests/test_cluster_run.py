"""Runs through a cluster of nodes without a shared disk: the whole chain, and what clouds do to it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import galray
from galray.catalog.lease import LEASE
from galray.catalog.mirror import SCRATCH, Mirror
from galray.catalog.storage import StorageSettings
from galray.config import load_config
from galray.ensemble import read_trials
from tests.chain_config import FOUR_MOCKS, write_config
from tests.mlflow_server import KEYS
from tests.ray_nodes import Nodes, ray_nodes
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are read from /proc"),
]

BUCKET = "galray"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with ray_nodes(tmp_path_factory.mktemp("nodes")) as found:
        yield found


@pytest.fixture(scope="module")
def storage(mlflow_server) -> StorageSettings:
    mlflow_server.s3().create_bucket(Bucket=BUCKET)
    return StorageSettings(endpoint=mlflow_server.s3_endpoint, region="us-east-1")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as a node of its own, with the bucket's keys."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "here"))
    return tmp_path


def overrides(storage: StorageSettings, tracking: str = "") -> list[str]:
    """Where the run lives, as a user writes it."""
    pairs = [f"output=s3://{BUCKET}/runs", f"catalog.storage.endpoint={storage.endpoint}"]
    pairs += ["catalog.storage.region=us-east-1"]
    pairs += [f"tracking.uri={tracking}"] if tracking else ["tracking.enabled=false"]
    return [word for pair in pairs for word in ("--set", pair)]


def finished(place: Mirror) -> set[str]:
    return {name for name in place.sizes("members") if name.endswith("/result.json")}


def test_submitted_run_gives_what_the_local_one_gives(
    nodes: Nodes, storage: StorageSettings, mlflow_server, here: Path
) -> None:
    config, where = write_config(here), overrides(storage, mlflow_server.uri)
    at = ("--address", nodes.address)
    stranger = nodes.galray("jobs", "list", *at, RAY_AUTH_TOKEN_PATH="", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert stranger.returncode == 2
    assert "wants another token" in stranger.stderr

    started = nodes.galray("submit", config, *where, *at)
    assert started.returncode == 0, started.stderr
    job = started.stdout.strip()
    twice = nodes.galray("submit", config, *where, *at)
    assert twice.returncode == 2
    assert f"job {job} is" in twice.stderr
    followed = nodes.galray("jobs", "logs", job, "--follow", *at)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "report:" in followed.stdout
    assert nodes.galray("jobs", "status", job, *at).stdout.startswith("SUCCEEDED")

    # The same again finds everything done; a configuration that cannot run ends with its code.
    again = nodes.submit(config, *where, "--working-tree")
    assert again.returncode == 0, again.stderr
    sent = [path.parents[1] for path in Path(nodes.session).rglob("working_dir_files/*/galray/cli.py")]
    assert sent
    for folder in sent:
        assert {"run.toml", "pyproject.toml", "galray"} <= {path.name for path in folder.iterdir()}
        assert not (folder / ".git").exists()
    assert again.stdout.startswith(f"{job}-2")
    assert "unchanged, skipped" in again.stdout
    broken = nodes.submit(config, *where, "--set", "name=broken", "--stage", "tune")
    assert broken.returncode == 2, broken.stdout
    listed = nodes.galray("jobs", "list", *at).stdout
    assert (listed.count("SUCCEEDED"), listed.count("FAILED")) == (2, 1)

    # No node had more than its own copy, and the head none of the stars.
    assert not list((nodes.folder / "head").rglob("piece-*.arrow"))
    worked = [name for name in ("node1", "node2") if list((nodes.folder / name).rglob("shard-*.parquet"))]
    assert worked

    mine = galray.load_run(f"s3://{BUCKET}/runs/tiny", storage)
    theirs = galray.run(
        config, quiet=True, output=str(here / "local"), tracking__enabled=False, cluster__enabled=False
    )
    assert mine.catalog.hash == theirs.catalog.hash
    for member in ("000", "001"):
        a, b = (
            load_file(run.folder / "members" / member / "evaluation.safetensors") for run in (mine, theirs)
        )
        scale = abs(b["acceleration"]).max()
        assert abs(a["acceleration"] - b["acceleration"]).max() < 1e-4 * scale
    assert abs(mine.headline["value"] - theirs.headline["value"]) < 1e-3 * abs(theirs.headline["error"])

    # What is secret stands nowhere: not in the run, its logs, MLflow or the report.
    s3 = mlflow_server.s3()
    written = [followed.stdout, again.stdout, nodes.galray("config", "show", config).stdout]
    written += [
        path.read_bytes() for path in nodes.folder.rglob("*") if path.is_file() and path.name != "token"
    ]
    for bucket in (BUCKET, "mlflow"):
        for item in s3.list_objects_v2(Bucket=bucket)["Contents"]:
            written.append(s3.get_object(Bucket=bucket, Key=item["Key"])["Body"].read())
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_server.uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    written += [str(run.to_dictionary()) for run in runs]
    assert len(written) > 50
    for name, secret in nodes.secrets.items():
        for text in written:
            content = text if isinstance(text, bytes) else text.encode()
            assert secret.encode() not in content, f"{name} stands in {content[:200]!r}"

    from galray.tracking.reading import list_runs

    (record,) = [run for run in list_runs(mlflow_server.uri) if run.name == "tiny"]
    assert record.status == "FINISHED"
    assert record.members == {"FINISHED": 2}
    keys = [o["Key"] for o in mlflow_server.s3().list_objects_v2(Bucket="mlflow")["Contents"]]
    assert any(key.endswith("artifacts/report.html") for key in keys)


def test_a_node_lost_in_the_ensemble_and_a_second_run_at_once(
    nodes: Nodes, storage: StorageSettings, here: Path
) -> None:
    """The members of the lost node go on where their last copy was; the run ends complete."""
    config = write_config(here, name="lost")
    where = [*overrides(storage), "--set", "training.score.epochs=250", "--set", 'methods=["score"]']
    place = Mirror(f"s3://{BUCKET}/runs/lost", storage)
    job = nodes.start_galray("submit", config, *where, "--address", nodes.address, "--follow")
    wait_for(lambda: place.read(LEASE), "the run at its place", job, every=0.3)
    second = nodes.start_galray("run", config, *where, "--set", "cluster.enabled=false")
    lost = nodes.folder / "node1" / "s3" / BUCKET / "runs" / "lost" / "members"
    wait_for(lambda: list(lost.glob("*.tmp/checkpoint/*")), "a checkpoint on the first node", job)
    nodes.kill("node1")
    assert not finished(place), "the node went away in mid-training"
    said, _ = second.communicate()
    assert second.returncode == 2, said
    assert f"{place.url}: process" in said
    assert "works here" in said
    out, _ = job.communicate()
    nodes.add("node3")
    assert job.returncode == 0, out
    assert len(finished(place)) == 2
    assert galray.load_run(place.url, storage).headline["value"] is not None


def test_trainings_on_two_nodes_and_a_search_of_them(
    nodes: Nodes, storage: StorageSettings, here: Path
) -> None:
    """Every trial, and then the member, has a rank on each node; all they share is the object store."""
    rate = "training.score.learning_rate"
    config = write_config(here, name="ranks", num_stars=6000)
    where = [*overrides(storage), "--set", 'methods=["score"]', "--set", "ensemble.score.seeds=1"]
    where += ["--set", "training.score.workers=2", "--set", "training.score.epochs=4"]
    search = [f"tune.space={{ '{rate}' = [1e-6, 5e-3] }}", f"{rate}=1e-6", "tune.trials=2", "tune.asha=false"]
    found = nodes.submit(config, *where, "--stage", "tune", *(w for s in search for w in ("--set", s)))
    assert found.returncode == 0, found.stdout + found.stderr
    place = Mirror(f"s3://{BUCKET}/runs/ranks", storage)
    place.pull(prefix="tune/")
    trials = read_trials(next((place.folder / "tune").glob("*/trials")))
    assert [(trial.status, trial.epochs) for trial in trials] == [("finished", 4)] * len(trials)
    assert trials[0].choices == {rate: 5e-3}
    curve = json.loads((trials[0].folder / "curve.json").read_text())
    assert [row["workers"] for row in curve] == [2] * 4
    assert load_config(place.folder / "tune" / "best.toml").training.score.learning_rate == 5e-3

    trained = nodes.submit(config, *where, "--stage", "ensemble", "--set", f"{rate}=1e-6")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    place.pull(prefix="members/")
    member = json.loads((place.folder / "members" / "000" / "curve.json").read_text())
    assert [row["workers"] for row in member] == [2] * 4
    names = place.sizes()
    assert not [name for name in names if "/train/" in name], "stars that were dealt lie about"


def test_a_calibration_through_the_cluster_and_what_the_next_one_finds(
    nodes: Nodes, storage: StorageSettings, here: Path
) -> None:
    """Mock galaxies on two nodes: all that they share is the object store."""
    config = write_config(here, name="judged", num_stars=4000, extra=FOUR_MOCKS)
    where = [*overrides(storage), "--set", 'methods=["moments"]', "--stage", "calibrate"]
    first = nodes.submit(config, *where)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "4 mocks, 0 of them known before" in first.stdout
    place = Mirror(f"s3://{BUCKET}/runs/judged-calibration", storage)
    assert place.sizes().keys() > {"calibration.ecsv", "mocks.ecsv", "report.html"}
    assert f"report: {place.url}/report.html" in first.stdout
    galaxies = [nodes.folder / name / "s3" / BUCKET / "runs/calibration-cache" for name in nodes.nodes]
    assert any(folder.is_dir() for folder in galaxies)
    assert not [path for folder in galaxies for path in folder.rglob("*.csv.gz")], "nodes keep no galaxy"
    again = nodes.submit(config, *where)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "4 mocks, 4 of them known before" in again.stdout


def test_a_dwarf_galaxy_is_fitted_through_the_cluster(
    nodes: Nodes, storage: StorageSettings, here: Path
) -> None:
    """Its stars are a file of the driver alone; members and page go through the object store."""
    made = nodes.galray("dwarf", "mock", "PlumCoreOm", "--stars", 150, "--to", here / "stars.dat")
    assert made.returncode == 0, made.stderr
    pairs = [f"storage.endpoint={storage.endpoint}", "storage.region=us-east-1", "tracking.enabled=false"]
    pairs += [f"cluster.address={nodes.gcs}", "data.velocity_error=2", "members.longer=0"]
    pairs += [f"fit.sampler.{pair}" for pair in ("chains=6", "warmup=40", "draws=50", "samples=200")]
    words = ["dwarf", "fit", here / "stars.dat", "--members", 3, "--output", f"s3://{BUCKET}/fits"]
    words += [word for pair in pairs for word in ("--set", pair)]
    fitted = nodes.galray(*words, GALRAY_SCRATCH=str(here / "driver"))
    assert fitted.returncode == 0, fitted.stdout + fitted.stderr
    place = Mirror(f"s3://{BUCKET}/fits/stars", storage)
    assert len(finished(place)) == 3
    assert f"report: {place.url}/report.html" in fitted.stdout
    assert [path for name in nodes.nodes for path in (nodes.folder / name).rglob("posterior.safetensors")]


def test_a_cluster_that_was_restarted_goes_on(storage: StorageSettings, here: Path, tmp_path_factory) -> None:
    """Head and workers are gone between two submissions: what the first one did is not done again."""
    config = write_config(here, name="restarted", num_stars=6000)
    where = [*overrides(storage), "--set", 'methods=["score"]', "--set", "ensemble.score.seeds=1"]
    with ray_nodes(tmp_path_factory.mktemp("first"), workers=1) as first:
        ended = first.submit(config, *where, "--stage", "ensemble")
        assert ended.returncode == 0, ended.stdout
    with ray_nodes(tmp_path_factory.mktemp("second"), workers=1) as second:
        again = second.submit(config, *where)
        assert again.returncode == 0, again.stdout
        assert again.stdout.count("unchanged, skipped") >= 2  # mock and measure
        assert not list((second.folder / "node1").rglob("curve.json")), "no member was trained again"
    assert (galray.load_run(f"s3://{BUCKET}/runs/restarted", storage).folder / "report.html").is_file()
