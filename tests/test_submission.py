"""`galray submit` and `galray jobs`: refused before anything travels, and a real head node with a token."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import galray
from galray.cli import app
from galray.cluster.submission import JobServer
from galray.commands.jobs import environment
from galray.errors import GalrayError
from tests.chain_config import write_config


def invoke(*words: object) -> None:
    app(args=[str(word) for word in words], prog_name="galray", standalone_mode=False)


@pytest.mark.parametrize(
    "address", ["", "localhost:8265", "http://", "ftp://head:8265", "http://head:8265/x"]
)
def test_what_is_no_address_is_refused(address, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(GalrayError, match="address"):
        JobServer(address)


def test_nobody_at_the_address_is_said_at_once(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(GalrayError, match=rf"http://127.0.0.1:{port}: cannot reach"):
        JobServer(f"http://127.0.0.1:{port}")


def test_relative_paths_do_not_travel():
    with pytest.raises(GalrayError, match="output: 'runs' is relative"):
        invoke("submit", "quickstart", "--address", "http://127.0.0.1:1")


def test_variables_are_pairs_and_no_secrets(monkeypatch):
    assert environment(["A=1", "B=x=y"]) == {"A": "1", "B": "x=y"}
    with pytest.raises(GalrayError, match="not of the form"):
        environment(["A"])
    server = object.__new__(JobServer)
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "API_TOKEN"):
        with pytest.raises(GalrayError, match=f"--env {name}: looks like a secret"):
            server.submit("", "run", "0" * 16, env={name: "x"})
    with pytest.raises(GalrayError, match="--stage fly: no such stage"):
        server.submit("", "run", "0" * 16, stage="fly")


@contextlib.contextmanager
def head_node(folder: Path):
    """A Ray head in processes of its own, with a token; yields its environment and the address."""
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    (folder / "token").write_text(secrets.token_hex(32))
    env = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the jobs' own python
    }
    env.pop("RAY_ADDRESS", None)
    temporary = Path("/tmp") / f"gr{os.getpid()}"  # sockets want short paths
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
        f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--dashboard-host=127.0.0.1",
        f"--dashboard-agent-listen-port={ports[2]}", f"--temp-dir={temporary}",
        "--object-store-memory=200000000", "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            assert process.poll() is None, (folder / "head.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", ports[1]), 1):
                break
            time.sleep(0.2)
        yield env, f"http://127.0.0.1:{ports[1]}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.mark.cluster
def test_submitted_run_gives_what_the_local_one_gives(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    extra = ["--set", "tracking.enabled=false", "--set", f"output={tmp_path}/cluster"]

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "galray.cli", *map(str, words), "--address", address]
        return subprocess.run(line, env=env, capture_output=True, text=True)

    with head_node(tmp_path) as (env, address):
        env["PYTHONPATH"] = str(Path(galray.__file__).parents[1])
        stranger = {key: value for key, value in env.items() if key != "RAY_AUTH_TOKEN_PATH"}
        stranger |= {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        refused = subprocess.run(
            [sys.executable, "-m", "galray.cli", "jobs", "list", "--address", address],
            env=stranger, capture_output=True, text=True,
        )  # fmt: skip
        assert refused.returncode == 2
        assert "wants another token" in refused.stderr

        started = call("submit", config, *extra)
        assert started.returncode == 0, started.stderr
        job = started.stdout.strip()
        twice = call("submit", config, *extra)
        assert twice.returncode == 2
        assert f"job {job} is" in twice.stderr
        followed = call("jobs", "logs", job, "--follow")
        assert followed.returncode == 0, followed.stdout + followed.stderr
        assert "report:" in followed.stdout
        assert call("jobs", "status", job).stdout.startswith("SUCCEEDED")

        # The same again finds everything done; a configuration that cannot run ends with its code.
        again = call("submit", config, *extra, "--follow")
        assert again.returncode == 0, again.stderr
        assert again.stdout.startswith(f"{job}-2")
        assert "unchanged, skipped" in again.stdout
        broken = call("submit", config, *extra, "--set", "name=broken", "--stage", "tune", "--follow")
        assert broken.returncode == 2, broken.stdout
        assert "tune.space: no key to vary" in broken.stdout
        listed = call("jobs", "list").stdout
        assert listed.count("SUCCEEDED") == 2
        assert listed.count("FAILED") == 1

    mine = galray.load_run(tmp_path / "cluster" / "tiny")
    theirs = galray.run(
        config, quiet=True, output=str(tmp_path / "local"), tracking__enabled=False, cluster__enabled=False
    )
    for member in ("000", "001"):
        a, b = (
            load_file(run.folder / "members" / member / "evaluation.safetensors") for run in (mine, theirs)
        )
        scale = abs(b["acceleration"]).max()
        assert abs(a["acceleration"] - b["acceleration"]).max() < 1e-4 * scale
    assert abs(mine.headline["value"] - theirs.headline["value"]) < 1e-3 * abs(theirs.headline["error"])
