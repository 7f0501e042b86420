"""Ray Train workers killed in mid-epoch, and a node that goes away: the training ends as if nothing was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks._training_kill import BALL, EPOCHS, MODEL, SEED, SETTINGS, disturbed, stars
from galray.phasespace import build_model, objective
from galray.training import fit
from tests.training_ranks import as_ranks

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc"),
]


def losses(curve):
    return np.array([(row["train"], row["validation"]) for row in curve])


def undisturbed():
    """Losses of two ranks that nobody kills."""
    models = [build_model("score", MODEL, BALL, stars(), seed=SEED) for _ in range(2)]

    def run(comm):
        model = models[comm.rank]
        w, held = stars(), stars(300, 1)
        return fit(model, objective("score"), w, held, SETTINGS, seed=SEED, communicator=comm)

    return losses(as_ranks(2, run)[0].curve)


def test_a_killed_worker_and_a_lost_node_change_nothing(tmp_path):
    """Two elastic workers on two nodes: one is killed with -9 and both start again; later a node is lost.

    The curve is that of two undisturbed ranks, also after one has taken over, within the rounding of other
    sums. Every checkpoint that was ever seen is built upon.
    """
    found = disturbed(tmp_path)
    assert len(found["killed"]) == 2
    assert found["epochs"] == sorted(set(found["epochs"]))  # no checkpoint was lost
    assert found["epochs"][-1] == EPOCHS
    workers = [row["workers"] for row in found["curve"]]
    shrunk = workers.index(1)
    assert workers == [2] * shrunk + [1] * (EPOCHS - shrunk)
    # At most the interval between two checkpoints was done again.
    assert found["killed"][1] <= shrunk <= found["killed"][1] + SETTINGS.checkpoint_every
    ours, theirs = losses(found["curve"]), undisturbed()
    assert np.allclose(ours, theirs, rtol=1e-5)
