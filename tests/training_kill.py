"""A training on a cluster of two nodes whose worker is killed, and then whose node goes away.

`python -m tests.training_kill FOLDER` prints one JSON line: the curve, what was killed, and every epoch that
the checkpoint was seen to hold.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from galray.phasespace import build_model
from galray.training import TrainingSettings, fit_distributed
from tests.training_kill_data import BALL, EPOCHS, MODEL, SEED, SETTINGS, stars


def train_workers() -> list[int]:
    """Process ids of this cluster's Ray Train workers, in order of their start."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            started = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
            mine = f"GALRAY_TEST_RUN={os.environ['GALRAY_TEST_RUN']}".encode() in (
                entry / "environ"
            ).read_bytes().split(b"\0")
        except OSError:
            continue
        if mine and "RayTrainWorker" in words:
            found.append((started, int(entry.name)))
    return [pid for _, pid in sorted(found)]


class Watcher(threading.Thread):
    """Kills a worker in mid-epoch, later takes its node away, and notes what the checkpoint held."""

    def __init__(self, folder: Path, cluster: Any, node: Any) -> None:
        super().__init__(daemon=True)
        self.state = folder / "training" / "checkpoint" / "state.json"
        self.cluster, self.node = cluster, node
        self.epochs: list[int] = []
        self.killed: list[int] = []
        self.over = threading.Event()

    def look(self) -> int:
        """Epochs in the checkpoint; it is replaced as a whole, so for an instant there may be none."""
        try:
            epoch = int(json.loads(self.state.read_text())["epoch"])
        except (OSError, ValueError):
            return self.epochs[-1] if self.epochs else 0
        if not self.epochs or self.epochs[-1] != epoch:
            self.epochs.append(epoch)
        return epoch

    def wait_for(self, epoch: int) -> bool:
        while not self.over.is_set() and self.look() < epoch:
            time.sleep(0.02)
        return not self.over.is_set()

    def run(self) -> None:
        if self.wait_for(EPOCHS // 4):
            time.sleep(0.1)  # into the next epoch
            victim = train_workers()[-1]
            os.kill(victim, signal.SIGKILL)
            self.killed.append(self.look())
        if self.wait_for(self.epochs[-1] + EPOCHS // 4):
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.killed.append(self.look())
        self.wait_for(EPOCHS)


def main(folder: Path) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 1024**2},
    )
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 1024**2)
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
