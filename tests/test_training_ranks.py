"""Several ranks give the curve of one, whatever their number; a kill changes nothing; other arithmetic."""

from __future__ import annotations

import copy
import functools
import shutil
import warnings

import numpy as np
import pytest
import torch

from galray.errors import GalrayError, GalrayWarning
from galray.phasespace import (
    Ball,
    BaseSettings,
    FlowPart,
    FlowSettings,
    ScoreSettings,
    build_model,
    objective,
)
from galray.training import TrainingSettings, fit
from galray.training.batches import Stripes
from tests.training_ranks import as_ranks

BALL = Ball((0.0, 0.0, 0.0), 2.0)
BASE = BaseSettings(components=1, hidden=(8,), star_passes=5_000)
MODELS = {
    "flow": FlowSettings(position=FlowPart(hidden=(16,), bins=3), velocity=FlowPart(hidden=(16,), bins=3)),
    "score": ScoreSettings(hidden=(16, 16), base=BASE),
}
SETTINGS = TrainingSettings(epochs=4, batch_size=128, learning_rate=1e-2)


def stars(n=1500, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(10 * n, 3))
    x = x[np.linalg.norm(x, axis=1) < 1.999][:n]
    return torch.from_numpy(np.concatenate([x, 50.0 * rng.normal(size=(n, 3))], 1))


@functools.cache
def untrained(kind):
    return build_model(kind, MODELS[kind], BALL, stars(), seed=1)


def train(kind, settings=SETTINGS, *, comm=None, w=None, **options):
    model = copy.deepcopy(untrained(kind))
    w = stars() if w is None else w
    return fit(model, objective(kind), w, stars(300, 1), settings, seed=3, communicator=comm, **options)


def losses(result):
    return [(row["train"], row["validation"]) for row in result.curve]


@pytest.mark.parametrize("kind", ["flow", "score"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_curve_of_one(kind, ranks, monkeypatch):
    """Also three ranks, which take 3, 3 and 2 of the 8 stripes: what an elastic group may start with."""
    monkeypatch.setattr("galray.phasespace.score_matching._BASE_SAMPLE", 100)  # fewer than a rank's stars
    expected = train(kind)
    found = as_ranks(ranks, lambda comm: train(kind, comm=comm))
    for result in found:
        assert losses(result) == losses(found[0])
        assert np.allclose(losses(result), losses(expected), rtol=2e-4)
    assert [row["workers"] for row in found[0].curve] == [ranks] * SETTINGS.epochs


def test_two_ranks_killed_go_on_to_the_same_curve(tmp_path):
    """The checkpoint holds all: two ranks killed in epoch 2 end as two that were not, bit by bit."""
    settings = SETTINGS.model_copy(update={"checkpoint_every": 2})
    untrained("score")  # before there are threads: building a model sets the global seed for a moment
    expected = as_ranks(2, lambda comm: train("score", settings, comm=comm))[0]

    class KilledError(Exception):
        pass

    def killed(comm):
        def on_epoch(row):
            if row["epoch"] == 2:
                raise KilledError

        train("score", settings, comm=comm, checkpoint_dir=tmp_path, on_epoch=on_epoch)

    with pytest.raises(KilledError):
        as_ranks(2, killed)
    shutil.copytree(tmp_path, tmp_path / "copy")
    seen = []
    again = as_ranks(
        2,
        lambda comm: train(
            "score",
            settings,
            comm=comm,
            checkpoint_dir=tmp_path,
            on_epoch=lambda row: seen.append(row["epoch"]),
        ),
    )[0]
    assert sorted(seen) == [2, 2, 3, 3]  # epoch 2 came after the last checkpoint: it is done again
    assert losses(again) == losses(expected)
    # One rank takes over from two: an elastic group that shrank.
    alone = train("score", settings, checkpoint_dir=tmp_path / "copy")
    assert losses(alone)[:2] == losses(expected)[:2]
    assert np.allclose(losses(alone), losses(expected), rtol=2e-4)


def test_dealt_stars_are_those_of_the_whole():
    """A rank that is given its own stripes alone does what it does with all stars."""

    def dealt(comm):
        mine = torch.cat([stars()[s::8][: 1500 // 8] for s in Stripes.share(8, comm.rank, 2)])
        return train("score", comm=comm, w=mine, dealt=1500)

    untrained("score")
    whole = as_ranks(2, lambda comm: train("score", comm=comm))[0]
    assert losses(as_ranks(2, dealt)[0]) == losses(whole)


def test_more_ranks_than_stripes_are_refused():
    with pytest.raises(GalrayError, match="too few for 9 workers"):
        Stripes(1500, SETTINGS, 1, 0, 9)


@pytest.mark.parametrize("kind", ["flow", "score"])
def test_mixed_precision_trains_close_to_full(kind):
    full = train(kind)
    mixed = train(kind, SETTINGS.model_copy(update={"precision": "bf16"}))
    assert losses(mixed) != losses(full)  # it does round
    gain = full.curve[0]["validation"] - full.best
    assert mixed.best == pytest.approx(full.best, abs=0.2 * abs(gain) + 0.02)


@pytest.mark.parametrize("kind", ["flow", "score"])
def test_a_compiled_loss_gives_the_plain_curve(kind, monkeypatch):
    # Traced for real, forward and backward; only the C++ compiler, a minute long, is left out.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    settings = SETTINGS.model_copy(update={"epochs": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error", GalrayWarning)
        compiled = train(kind, settings.model_copy(update={"compile": True}))
    plain = train(kind, settings)
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-3, atol=1e-4)


def test_tf32_is_set_for_the_run_alone():
    before = torch.get_float32_matmul_precision()
    seen = []
    train(
        "score",
        SETTINGS.model_copy(update={"precision": "tf32", "epochs": 1}),
        on_epoch=lambda row: seen.append(torch.get_float32_matmul_precision()),
    )
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == before


def test_a_failing_compiler_is_named_and_training_goes_on(monkeypatch):
    def broken(function):
        def call(*args):
            raise RuntimeError("no C++ compiler\nlong trace")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(GalrayWarning, match=r"compile.*no C\+\+ compiler.*without"):
        compiled = train("score", SETTINGS.model_copy(update={"compile": True}))
    assert losses(compiled) == losses(train("score"))


def test_the_curve_tells_memory_and_cost():
    row = train("score").curve[-1]
    assert 0.05 < row["memory_gb"] < 64
    assert row["cpu_seconds"] > 0
    assert row["stars_per_second"] > 0
    assert row["all_reduce_seconds"] == 0


@pytest.mark.parametrize(
    ("workers", "word"), [((4, 2), "smaller number first"), ((1, 3), "multiple"), ((0, 2), "greater than")]
)
def test_pairs_of_workers_that_make_no_sense(workers, word):
    with pytest.raises(ValueError, match=word):
        TrainingSettings(workers=workers)
    pair = TrainingSettings(workers=[1, 4])
    assert (pair.min_workers, pair.max_workers, pair.elastic) == (1, 4, True)
    assert not TrainingSettings(workers=2).elastic
