"""A finished run as a registered model: loads without its run directory, answers as the run does, serves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import galray
from galray.errors import GalrayError
from galray.evaluation import RunSource
from galray.tracking.model import bundle_run, predict, register_run
from tests.chain_config import write_config
from tests.mlflow_server import answers, free_port
from tests.waiting import wait_for

POSITIONS = np.array([[-8.12, 0.0, 0.02], [-7.5, 0.3, 1.0], [-8.5, -0.4, -0.8], [8.0, 0.0, 0.0]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run, in MLflow."""
    folder = tmp_path_factory.mktemp("registered")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    return galray.run(write_config(folder), quiet=True, cluster__enabled=False)


@pytest.fixture(scope="module")
def store(run):
    return f"sqlite:///{run.folder.parent}/mlflow.db"


@pytest.fixture(scope="module")
def registered(run, store):
    return register_run(run.folder)


def test_bundle_is_small_and_answers_as_the_run(run, tmp_path):
    bundle = bundle_run(run.folder, tmp_path / "bundle")
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".toml", ".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 2e6
    mine, theirs = (predict(RunSource(place), POSITIONS) for place in (bundle, run.folder))
    np.testing.assert_array_equal(mine.to_numpy(), theirs.to_numpy())
    assert list(mine.columns[:4]) == ["a_x", "a_x_error", "a_y", "a_y_error"]
    assert mine.loc[3].isna().all(), "outside the ball of the stars"
    assert (mine.loc[:2, "a_x_error"] > 0).all()
    truth = run.field.acceleration(torch.from_numpy(POSITIONS[:1]))
    assert abs(mine.loc[0, "a_x"] - truth[0, 0]) < 5 * mine.loc[0, "a_x_error"]


def test_links_out_of_the_run_are_refused(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    (copy / "provenance.json").unlink()
    (copy / "provenance.json").symlink_to(outside)
    with pytest.raises(GalrayError, match=r"provenance.json: a link that leads out"):
        bundle_run(copy, tmp_path / "bundle")


def test_registered_model_loads_and_answers(run, store, registered, monkeypatch):
    import mlflow
    import pandas as pd

    assert "MLFLOW_TRACKING_URI" not in os.environ, "registering leaves no trace"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    name, version = registered
    assert (name, version) == ("galray-gravity", "1")
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    answer = model.predict(pd.DataFrame(POSITIONS, columns=["x", "y", "z"]))
    expected = predict(RunSource(run.folder), POSITIONS)
    np.testing.assert_allclose(answer.to_numpy(), expected.to_numpy(), rtol=1e-12)
    assert model.metadata.metadata["galray_config_hash"] == run.config.hash
    local = Path(mlflow.artifacts.download_artifacts(f"models:/{name}@champion"))
    assert not [path for path in local.rglob("*") if path.suffix in (".pkl", ".pt", ".pth")]
    # A second version takes the alias over; the run stays finished.
    assert register_run(run.folder) == (name, "2")
    client = mlflow.MlflowClient(tracking_uri=store)
    assert str(client.get_model_version_by_alias(name, "champion").version) == "2"
    states = {r.info.run_name: r.info.status for e in client.search_experiments()
              for r in client.search_runs([e.experiment_id])}  # fmt: skip
    assert set(states.values()) == {"FINISHED"}


def test_a_run_that_is_not_in_mlflow_is_told_what_to_do(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy, ignore=shutil.ignore_patterns("tracking"))
    with pytest.raises(GalrayError, match="was not recorded in MLflow"):
        register_run(copy)


@pytest.mark.cluster
def test_registered_model_is_served(run, store, registered):
    port = free_port()
    env = os.environ | {
        "MLFLOW_TRACKING_URI": store,
        "PYTHONPATH": str(Path(galray.__file__).parents[1]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/galray-gravity/1",
               "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    server = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/ping"), "the model's server", server, every=0.3)
        body = {"dataframe_split": {"columns": ["x", "y", "z"], "data": POSITIONS[:3].tolist()}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            rows = json.load(reply)["predictions"]
        expected = predict(RunSource(run.folder), POSITIONS[:3])
        for name in ("a_x", "a_x_error", "rho"):
            np.testing.assert_allclose([row[name] for row in rows], expected[name], rtol=1e-9)
    finally:
        os.killpg(server.pid, 15)
        server.wait()


@pytest.mark.cluster
def test_registered_model_loads_in_a_clean_environment(run, store, registered, tmp_path, monkeypatch):
    """A new environment with galray from its wheel, as the model asks, and nothing of this source tree.

    The libraries are those of this environment, on the new one's path: installing torch anew shows nothing of
    galray. A path file's lines are searched for packages alone, so an editable galray there is not found.
    """
    source, root = tmp_path / "source", Path(__file__).parents[1]
    source.mkdir()
    shutil.copytree(root / "galray", source / "galray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(root / name, source)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW", "VIRTUAL_ENV"))}
    options = {"env": clean, "cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    wheel = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", str(source)]
    subprocess.run([sys.executable, "-m", *wheel], **options)
    subprocess.run([sys.executable, "-m", "venv", "fresh"], **options)
    python = str(tmp_path / "fresh" / "bin" / "python")

    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    local = Path(mlflow.artifacts.download_artifacts("models:/galray-gravity@champion"))
    requirements = (local / "requirements.txt").read_text().splitlines()
    wanted = [line for line in requirements if line.startswith("galray")]
    assert wanted == [f"galray=={galray.__version__}"]
    install = ["pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links", "dist", *wanted]
    subprocess.run([python, "-m", *install], **options)
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    asked = tmp_path / "positions.json"
    asked.write_text(json.dumps(POSITIONS.tolist()))
    script = f"""
import json, sys
import galray, mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/galray-gravity@champion")
rows = json.load(open({str(asked)!r}))
answer = model.predict(pd.DataFrame(rows, columns=["x", "y", "z"]))
rows = answer.fillna(1e99).values.tolist()
print(json.dumps({{"file": galray.__file__, "columns": list(answer), "rows": rows}}))
"""
    env = options["env"] | {"MLFLOW_TRACKING_URI": store}
    said = subprocess.run([python, "-I", "-c", script], **{**options, "env": env})
    found = json.loads(said.stdout.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(site), "galray is that of the wheel"
    expected = predict(RunSource(run.folder), POSITIONS)
    assert found["columns"] == list(expected.columns)
    np.testing.assert_allclose(found["rows"], expected.fillna(1e99).to_numpy(), rtol=1e-9)
