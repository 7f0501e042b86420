"""Ray Train around the loop gives the loop's own curve."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.phasespace import Ball, BaseSettings, ScoreSettings, build_model, objective
from galray.training import TrainingSettings, fit, fit_distributed

BALL = Ball((0.0, 0.0, 0.0), 2.0)
MODEL = ScoreSettings(hidden=(16, 16), base=BaseSettings(components=1, hidden=(8,), star_passes=5_000))
SETTINGS = TrainingSettings(epochs=6, batch_size=128, learning_rate=1e-2)


def stars(n=1500, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(10 * n, 3))
    x = x[np.linalg.norm(x, axis=1) < 1.999][:n]
    return torch.from_numpy(np.concatenate([x, 50.0 * rng.normal(size=(n, 3))], 1))


def alone():
    model = build_model("score", MODEL, BALL, stars(), seed=1)
    return model, fit(model, objective("score"), stars(), stars(300, 1), SETTINGS, seed=3)


def test_local_mode_equals_the_bare_loop(tmp_path):
    expected, bare = alone()
    model = build_model("score", MODEL, BALL, stars(), seed=1)
    result = fit_distributed(
        "score",
        model,
        stars(),
        stars(300, 1),
        SETTINGS,
        seed=3,
        storage=tmp_path,
        curve="curve.json",
        local=True,
    )
    assert json.loads((tmp_path / "curve.json").read_text()) == result.curve
    assert [r["validation"] for r in result.curve] == [r["validation"] for r in bare.curve]
    assert torch.equal(model.score(stars(10, 2)), expected.score(stars(10, 2)))


def test_two_workers_give_the_curve_of_one_and_go_on(ray_session, tmp_path):
    expected, bare = alone()
    model = build_model("score", MODEL, BALL, stars(), seed=1)
    settings = SETTINGS.model_copy(update={"workers": 2})
    result = fit_distributed("score", model, stars(), stars(300, 1), settings, seed=3, storage=tmp_path)
    assert result.epochs == SETTINGS.epochs
    for ours, theirs in zip(result.curve, bare.curve, strict=True):
        assert ours["train"] == pytest.approx(theirs["train"], rel=2e-4)
        assert ours["validation"] == pytest.approx(theirs["validation"], rel=2e-4)
    assert torch.allclose(model.score(stars(50, 2)), expected.score(stars(50, 2)), rtol=2e-2, atol=2e-3)

    # Called again, it finds its last checkpoint and has nothing left to do.
    again = fit_distributed("score", model, stars(), stars(300, 1), settings, seed=3, storage=tmp_path)
    assert again.curve == result.curve


def test_a_failure_on_the_workers_is_named(tmp_path):
    model = build_model("score", MODEL, BALL, stars(), seed=1)
    broken = stars()
    broken[0, 4] = torch.nan
    with pytest.raises(GalrayError, match="not finite"):
        fit_distributed("score", model, broken, stars(300, 1), SETTINGS, seed=3, storage=tmp_path, local=True)
