"""The loop: determined by its seed, resumable to the same curve, honest about divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.phasespace import (
    Ball,
    BaseSettings,
    FlowPart,
    FlowSettings,
    ScoreSettings,
    build_model,
    objective,
)
from galray.training import TrainingSettings, fit, split
from galray.training.batches import Stripes

BALL = Ball((0.0, 0.0, 0.0), 2.0)
MODELS = {
    "flow": FlowSettings(
        position=FlowPart(hidden=(16,), bins=3), velocity=FlowPart(kind="maf", transforms=2, hidden=(16,))
    ),
    "score": ScoreSettings(hidden=(16, 16), base=BaseSettings(components=1, hidden=(8,), star_passes=5_000)),
}
SETTINGS = TrainingSettings(epochs=6, batch_size=128, learning_rate=1e-2)


def stars(n=1500, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(10 * n, 3))
    x = x[np.linalg.norm(x, axis=1) < 1.999][:n]
    return torch.from_numpy(np.concatenate([x, 50.0 * rng.normal(size=(n, 3))], 1))


def model_of(kind, seed=1):
    return build_model(kind, MODELS[kind], BALL, stars(), seed=seed)


def losses(result):
    return [(row["train"], row["validation"]) for row in result.curve]


@pytest.mark.parametrize("kind", ["flow", "score"])
def test_same_seed_same_curve_other_seed_another(kind):
    runs = [
        fit(model_of(kind), objective(kind), stars(), stars(300, 1), SETTINGS, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[0]) != losses(runs[2])
    assert runs[0].best == min(row["validation"] for row in runs[0].curve)


@pytest.mark.parametrize("kind", ["flow", "score"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_run_goes_on_to_the_same_curve(kind, every, tmp_path):
    settings = SETTINGS.model_copy(update={"checkpoint_every": every})
    whole = model_of(kind)
    expected = fit(whole, objective(kind), stars(), stars(300, 1), settings, seed=3)

    class KilledError(Exception):
        pass

    def kill(row):
        if row["epoch"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        fit(
            model_of(kind),
            objective(kind),
            stars(),
            stars(300, 1),
            settings,
            seed=3,
            checkpoint_dir=tmp_path,
            on_epoch=kill,
        )
    again = model_of(kind, seed=77)  # its own random weights must not matter
    seen = []
    result = fit(
        again,
        objective(kind),
        stars(),
        stars(300, 1),
        settings,
        seed=3,
        checkpoint_dir=tmp_path,
        on_epoch=lambda row: seen.append(row["epoch"]),
    )
    assert seen == [4, 5]
    assert losses(result) == losses(expected)
    assert torch.equal(again.score(stars(20, 2)), whole.score(stars(20, 2)))
    assert {p.suffix for p in tmp_path.rglob("*.*")} == {".safetensors"}

    done = fit(again, objective(kind), stars(), stars(300, 1), settings, seed=3, checkpoint_dir=tmp_path)
    assert losses(done) == losses(expected)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    fit(
        model_of("flow"), objective("flow"), stars(), stars(300, 1), SETTINGS, seed=3, checkpoint_dir=tmp_path
    )
    with pytest.raises(GalrayError, match="other settings, seed or stars"):
        fit(
            model_of("flow"),
            objective("flow"),
            stars(),
            stars(300, 1),
            SETTINGS,
            seed=4,
            checkpoint_dir=tmp_path,
        )
    with pytest.raises(GalrayError, match="other settings, seed or stars"):  # as many, but others
        fit(
            model_of("flow"),
            objective("flow"),
            stars(),
            stars(300, 2),
            SETTINGS,
            seed=3,
            checkpoint_dir=tmp_path,
        )
    (tmp_path / "checkpoint" / "state.safetensors").write_text("{")
    with pytest.raises(GalrayError, match="cannot be read"):
        fit(
            model_of("flow"),
            objective("flow"),
            stars(),
            stars(300, 1),
            SETTINGS,
            seed=3,
            checkpoint_dir=tmp_path,
        )


def test_early_stopping_keeps_the_best_weights():
    few = stars(120)
    settings = SETTINGS.model_copy(
        update={"epochs": 200, "batch_size": 16, "learning_rate": 2e-2, "patience": 3, "schedule": "constant"}
    )
    model = build_model("flow", FlowSettings(), BALL, few, seed=1)
    held = stars(400, 1)
    result = fit(model, objective("flow"), few, held, settings, seed=3)
    assert result.stopped == "patience"
    assert result.epochs == result.best_epoch + 4 < 200
    goal = objective("flow")
    with torch.no_grad():
        again = float(goal.validate(model, goal.prepare(model, held, validation=True)).double().mean())
    assert again == pytest.approx(result.best, rel=1e-6)
    assert result.curve[-1]["validation"] > result.best


def test_divergence_is_an_error_with_a_remedy():
    class Broken:
        name = "broken"

        def prepare(self, model, w, *, validation=False):
            return w.float()

        def loss(self, model, rows, generator):
            return sum(p.sum() for p in model.parameters() if p.requires_grad) * float("nan")

        def validate(self, model, rows):
            return rows[:, 0]

    with pytest.raises(GalrayError, match=r"diverged.*\n.*learning_rate"):
        fit(model_of("flow"), Broken(), stars(), stars(300, 1), SETTINGS, seed=3)


def test_stars_outside_the_ball_are_refused():
    outside = stars()
    outside[5, 0] = 9.0
    with pytest.raises(GalrayError, match="outside the ball"):
        fit(model_of("flow"), objective("flow"), outside, stars(300, 1), SETTINGS, seed=3)


@pytest.mark.parametrize("n", [1000, 1003])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_any_number_of_workers_sees_the_same_global_batches(n, world_size):
    def stars_of_steps(size):
        steps = None
        for rank in range(size):
            stripes = Stripes(n, SETTINGS, 5, rank, size)
            rows = stripes.rows(n)
            mine = [set(rows[b].tolist()) for b in stripes.batches(2).numpy()]
            assert all(len(m) == stripes.batches(2).shape[1] for m in mine)
            steps = mine if steps is None else [a | b for a, b in zip(steps, mine, strict=True)]
        return steps

    reference = stars_of_steps(1)
    assert stars_of_steps(world_size) == reference
    assert all(len(step) == SETTINGS.batch_size for step in reference)
    assert len(set().union(*reference)) == len(reference) * SETTINGS.batch_size  # no star twice in an epoch


def test_split_holds_out_what_it_says():
    train, held = split(1000, 0.2, 7)
    assert len(held) == 200
    assert sorted([*train, *held]) == list(range(1000))
    assert not np.array_equal(held, split(1000, 0.2, 8)[1])
    with pytest.raises(GalrayError, match="cannot be split"):
        split(1, 0.2, 7)


@pytest.mark.parametrize(
    ("values", "word"),
    [({"batch_size": 100, "stripes": 8}, "multiple"), ({"workers": 3}, "multiple"), ({"epoch": 3}, "epoch")],
)
def test_settings_that_make_no_sense(values, word):
    with pytest.raises(ValueError, match=word):
        TrainingSettings(**values)
