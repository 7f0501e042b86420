"""A Ray cluster of separate nodes on this machine: own processes and directories, a token, no shared disk."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import galray
from tests.mlflow_server import KEYS, free_port
from tests.waiting import wait_for

__all__ = ["Nodes", "ray_nodes"]


SECRETS = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "GALRAY_ARCHIVE_PASSWORD")
"""Variables of every node whose values may be written nowhere; the cluster's token is another secret."""


class Nodes:
    """A head and its workers, each a process group of its own with its own folder for copies.

    Arguments:
        folder: Where the nodes' folders and logs go.
        head_cpus: CPUs of the head, on which drivers run.
        more: Environment variables of all nodes.
    """

    def __init__(self, folder: Path, head_cpus: int, more: dict[str, str]) -> None:
        self.folder = folder
        (folder / "token").write_text(secrets.token_hex(32))
        self.secrets = {name: f"planted-{secrets.token_hex(8)}" for name in SECRETS}
        self.secrets["the token"] = (folder / "token").read_text()
        self.env = os.environ | KEYS | {name: self.secrets[name] for name in SECRETS} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "MLFLOW_TRACKING_USERNAME": "somebody",
            "OMP_NUM_THREADS": "1",
            "POLARS_MAX_THREADS": "1",
            "RAY_health_check_period_ms": "1000",  # a dead node is seen in seconds
            "RAY_health_check_failure_threshold": "3",
            "PYTHONPATH": str(Path(galray.__file__).parents[1]),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the jobs' own python
        } | more  # fmt: skip
        for name in ("RAY_ADDRESS", "GALRAY_SCRATCH", "MLFLOW_TRACKING_URI"):
            self.env.pop(name, None)
        self.session = tempfile.mkdtemp(prefix="gr", dir="/tmp")  # sockets want short paths
        self.gcs, dashboard = f"127.0.0.1:{free_port()}", free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._start(
            "head", head_cpus, "--head", f"--port={self.gcs.rpartition(':')[2]}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        )  # fmt: skip
        self._wait_for("head", lambda: accepts(dashboard))

    def _start(self, name: str, num_cpus: int, *words: str) -> None:
        scratch = self.folder / name
        scratch.mkdir(exist_ok=True)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={num_cpus}",
            "--num-gpus=0", f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
            "--object-store-memory=100000000", "--node-ip-address=127.0.0.1",
            "--min-worker-port=0", "--max-worker-port=0",  # each node would deal the same ones
            f"--temp-dir={self.session}/{name}", *words,
        ]  # fmt: skip
        with (self.folder / f"{name}.log").open("ab") as log:
            self.nodes[name] = subprocess.Popen(
                command, env=self.env | {"GALRAY_SCRATCH": str(scratch)}, cwd=scratch, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _wait_for(self, name: str, condition: Callable[[], object]) -> None:
        wait_for(condition, f"the node {name}", self.nodes[name], self.folder / f"{name}.log", every=0.2)

    def add(self, name: str, num_cpus: int = 1) -> None:
        """Let a node join, and wait until it has."""
        self._start(name, num_cpus, f"--address={self.gcs}")
        log = self.folder / f"{name}.log"
        self._wait_for(name, lambda: "Ray runtime started" in log.read_text())

    def kill(self, name: str) -> None:
        """Take a node away with all its processes, without a word to anybody."""
        process = self.nodes.pop(name)
        # Ray gives some of a node's processes sessions of their own; they are its descendants all the same.
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def galray(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command of galray as a user of the cluster gives it, from a machine of his own."""
        return subprocess.run(
            self._command(words), env=self.env | environment, capture_output=True, text=True
        )

    def submit(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Submit a run and follow it to its end."""
        return self.galray("submit", *words, "--address", self.address, "--follow")

    def start_galray(self, *words: object) -> subprocess.Popen[str]:
        """The same as `galray` without waiting for its end."""
        return subprocess.Popen(
            self._command(words), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _command(self, words: tuple[object, ...]) -> list[str]:
        return [sys.executable, "-m", "galray.cli", *map(str, words)]

    def stop(self) -> None:
        """End all nodes, the workers first."""
        for name in reversed(list(self.nodes)):
            self.kill(name)
        shutil.rmtree(self.session, ignore_errors=True)


@contextlib.contextmanager
def ray_nodes(folder: Path, workers: int = 2, head_cpus: int = 0, **more: str) -> Iterator[Nodes]:
    """A cluster as long as the block lasts."""
    nodes = Nodes(folder, head_cpus, more)
    try:
        for number in range(workers):
            nodes.add(f"node{number + 1}")
        yield nodes
    finally:
        nodes.stop()


def accepts(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 60):
        return True
    return False


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and these in turn, the deepest first."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [*descendants(int(child)), int(child)]
    return found
