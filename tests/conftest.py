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
def ray_session():
    """The one Ray cluster of the test session: two CPUs, small object store, never a leftover one."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 1024**2,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real catalogues and mocks by others; a test that needs them skips where they are absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("GALRAY_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"test data folder {folder} is absent; set GALRAY_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    """MLflow's server on Postgres, artefacts in S3, for tests marked `cluster`; skips without Postgres."""
    from tests.mlflow_server import mlflow_on_postgres

    with mlflow_on_postgres(tmp_path_factory.mktemp("mlflow-server")) as server:
        yield server
