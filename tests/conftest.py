"""Shared fixtures: one Ray cluster for the whole session, the test data folder, small mocks."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports ray: local clusters of the tests need no token, no preemption watcher, no bars.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session")
def _ray_ends():
    yield
    import ray

    ray.shutdown()


@pytest.fixture
def ray_session(_ray_ends):
    """The one Ray cluster of the test session: two CPUs, small object store, never a leftover one.

    It starts with the first test that asks for it, and again after tests with nodes of their own.
    """
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200 * 1024**2,
            log_to_driver=False,
            logging_level="ERROR",
        )
    return ray


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real catalogues and mocks by others; a test that needs them skips where they are absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("GALRAY_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"test data folder {folder} is absent; set GALRAY_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def s3_endpoint():
    """An S3 service with an empty bucket ``galray``, whose keys (any will do) are in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        address = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
        client.create_bucket(Bucket="galray")
        yield address
    server.stop()


@pytest.fixture
def s3_storage(s3_endpoint, tmp_path, monkeypatch):
    """Settings that reach it; this process keeps its copies in ``scratch`` of the test's folder."""
    from galray.catalog.mirror import SCRATCH
    from galray.catalog.storage import StorageSettings

    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    return StorageSettings(endpoint=s3_endpoint, region="us-east-1")


@pytest.fixture(scope="session")
def gcs_environment():
    """Variables by which clients find a Google service with an empty bucket ``galray``; skips without it."""
    from tests.gcs_server import gcs_server

    with gcs_server() as environment:
        yield environment


@pytest.fixture(params=["s3", "gs"])
def bucket(request, tmp_path, monkeypatch):
    """URL and settings of a bucket at Amazon's or Google's kind of service; copies lie in ``scratch``."""
    from galray.catalog.mirror import SCRATCH
    from galray.catalog.storage import StorageSettings

    if request.param == "s3":
        return "s3://galray", request.getfixturevalue("s3_storage")
    for name, value in request.getfixturevalue("gcs_environment").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    return "gs://galray", StorageSettings(skip_signature=True)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    """MLflow's server on Postgres, artefacts in S3, for tests marked `cluster`; skips without Postgres."""
    from tests.mlflow_server import mlflow_on_postgres

    with mlflow_on_postgres(tmp_path_factory.mktemp("mlflow-server")) as server:
        yield server
