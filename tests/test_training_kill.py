"""Ray Train workers killed in mid-epoch, and a node that goes away: the training ends as if nothing was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from galray.phasespace import build_model, objective
from galray.training import fit
from tests.training_kill_data import BALL, EPOCHS, MODEL, SEED, SETTINGS, stars
from tests.training_ranks import as_ranks

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc"),
]


def undisturbed():
    """Losses of two ranks that nobody kills."""
    models = [build_model("score", MODEL, BALL, stars(), seed=SEED) for _ in range(2)]

    def run(comm):
        model = models[comm.rank]
        w, held = stars(), stars(300, 1)
        return fit(model, objective("score"), w, held, SETTINGS, seed=SEED, communicator=comm)

    return losses(as_ranks(2, run)[0].curve)


def losses(curve):
    return np.array([(row["train"], row["validation"]) for row in curve])


def test_a_killed_worker_and_a_lost_node_change_nothing(tmp_path):
    """Two elastic workers on two nodes: one is killed with -9, they start again; its node is lost, one goes on.

    The curve is that of two undisturbed ranks to the last bit while there are two, and within the rounding of
    other sums when one takes over. Every checkpoint that was ever seen is built upon.
    """
    environment = os.environ | {
        "GALRAY_TEST_RUN": tmp_path.name,
        "OMP_NUM_THREADS": "1",
        # What the lost node had counts as there until a group of that size did not start in time.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.training_kill", str(tmp_path)],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"curve"')))

    assert len(found["killed"]) == 2
    assert found["epochs"] == sorted(set(found["epochs"]))  # no checkpoint was lost
    assert found["epochs"][-1] == EPOCHS
    workers = [row["workers"] for row in found["curve"]]
    shrunk = workers.index(1)
    assert workers == [2] * shrunk + [1] * (EPOCHS - shrunk)
    # At most the interval between two checkpoints was done again.
    assert found["killed"][1] <= shrunk <= found["killed"][1] + SETTINGS.checkpoint_every
    ours, theirs = losses(found["curve"]), undisturbed()
    assert np.array_equal(ours[:shrunk], theirs[:shrunk])
    assert np.allclose(ours, theirs, rtol=2e-4)
    assert ours[-1, 1] == pytest.approx(theirs[-1, 1], rel=1e-5)
