"""A training on a cluster of two nodes whose worker is killed, and then whose node goes away.

`python -m benchmarks._training_kill FOLDER` prints one JSON line: the curve, the epochs in the checkpoint
when something was killed, and every number of epochs that the checkpoint was seen to hold. `disturbed` runs
it in a process of its own, with Ray nodes of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from galray.errors import GalrayError
from galray.phasespace import Ball, BaseSettings, ScoreSettings, build_model
from galray.training import TrainingSettings, fit_distributed
from galray.training.store import load_checkpoint

__all__ = ["BALL", "EPOCHS", "MODEL", "SEED", "SETTINGS", "disturbed", "stars"]

BALL = Ball((0.0, 0.0, 0.0), 2.0)
MODEL = ScoreSettings(hidden=(16, 16), base=BaseSettings(components=1, hidden=(8,), star_passes=5_000))
SEED = 3
EPOCHS = 40
SETTINGS = TrainingSettings(epochs=EPOCHS, batch_size=128, learning_rate=1e-2, checkpoint_every=2)
MARK = "GALRAY_KILL_RUN"
"""Environment variable by which this run's processes are told from all others."""


def stars(n: int = 12_000, seed: int = 0) -> torch.Tensor:
    """Gaussian stars in a ball: shape (n, 6)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * n, 3))
    x = x[np.linalg.norm(x, axis=1) < 1.999][:n]
    return torch.from_numpy(np.concatenate([x, 50.0 * rng.normal(size=(n, 3))], 1))


def disturbed(folder: Path) -> dict[str, Any]:
    """Run it in a process of its own; what it printed.

    Raises:
        RuntimeError: The training did not come to its end.
    """
    environment = os.environ | {
        MARK: f"{os.getpid()}-{time.time_ns()}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_health_check_period_ms": "1000",  # a dead node is seen in seconds
        "RAY_health_check_failure_threshold": "3",
        # A lost node counts as there until a group that needs it did not start in time.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "40",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._training_kill", str(folder)],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"curve"')]
    if done.returncode or not lines:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    found: dict[str, Any] = json.loads(lines[0])
    return found


def train_workers() -> list[int]:
    """Process ids of this run's Ray Train workers, in order of their start."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
            started = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
            mine = mark in (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile, or belongs to somebody else
        if mine and b"RayTrainWorker" in words:
            found.append((started, int(entry.name)))
    return [pid for _, pid in sorted(found)]


def raylet_of(pid: int) -> int:
    """Process id of the Ray node that a worker belongs to."""
    entries = dict(
        entry.partition(b"=")[::2] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    return int(entries[b"RAY_RAYLET_PID"])


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[list[int]]:
    """Hold processes: what is found meanwhile is how far they are."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class Watcher(threading.Thread):
    """Kills a worker in mid-epoch, later takes its node away, and notes what the checkpoint held."""

    def __init__(self, folder: Path, cluster: Any, node: Any) -> None:
        super().__init__(daemon=True)
        self.state = folder / "training" / "checkpoint"
        self.cluster, self.node = cluster, node
        self.epochs: list[int] = []
        self.killed: list[int] = []
        self.over = threading.Event()

    def look(self) -> int:
        """Epochs in the checkpoint; it is replaced as a whole, so for an instant there may be none."""
        try:
            found = load_checkpoint(self.state)
        except GalrayError:
            found = None
        if found is None:
            return self.epochs[-1] if self.epochs else 0
        epoch = int(found[1]["epoch"])
        if not self.epochs or self.epochs[-1] != epoch:
            self.epochs.append(epoch)
        return epoch

    def wait_for(self, epoch: int) -> bool:
        """Whether the checkpoint came to hold so many epochs, before all is over."""
        while not self.over.is_set() and self.look() < epoch:
            time.sleep(0.02)
        return not self.over.is_set()

    def run(self) -> None:
        """Wait, kill, wait, take away, and watch to the end."""
        if self.wait_for(EPOCHS // 4):
            time.sleep(0.1)  # into the next epoch
            with stopped(train_workers()) as workers:
                self.killed.append(self.look())
                os.kill(workers[-1], signal.SIGKILL)
        if self.wait_for(self.look() + EPOCHS // 4):
            with stopped(train_workers()) as workers:
                self.killed.append(self.look())
                for pid in workers:
                    if raylet_of(pid) == self.node.all_processes["raylet"][0].process.pid:
                        os.kill(pid, signal.SIGKILL)
                self.cluster.remove_node(self.node, allow_graceful=False)
        self.wait_for(EPOCHS)
        self.look()


def main(folder: Path) -> None:
    """Train on two nodes of one CPU each, and be disturbed."""
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    node = cluster.add_node(**small)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    watcher = Watcher(folder, cluster, node)
    watcher.start()
    try:
        model = build_model("score", MODEL, BALL, stars(), seed=SEED)
        settings = TrainingSettings.model_validate(SETTINGS.model_dump() | {"workers": (1, 2)})
        result = fit_distributed("score", model, stars(), stars(300, 1), settings, seed=SEED, storage=folder)
    finally:
        watcher.over.set()
        watcher.join()
    print(json.dumps({"curve": result.curve, "killed": watcher.killed, "epochs": watcher.epochs}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
