"""Checks without truth: silent on the exact score whatever the stars, loud on models that are broken."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from galray.mocks import PlummerSphere
from galray.phasespace import (
    Ball,
    BaseSettings,
    ExactModel,
    FlowPart,
    FlowSettings,
    ScoreSettings,
    build_model,
    run_checks,
)
from galray.phasespace.checks import _SeenStars, agreement, check_agreement, held_out, two_sample
from galray.phasespace.findings import FALSE_ALARMS, Finding, judge
from galray.phasespace.selection import SelectionEfficiency
from galray.phasespace.stein import curl_and_noise, local_identities, stein_identities
from galray.training import TrainingSettings, fit, objective

BALL = Ball((0.0, 0.0, 0.0), 5.0)
SPHERE = PlummerSphere(1e10, 1.0)


def draw(n, seed):
    w = SPHERE.sample(int(1.2 * n), seed)
    return w[BALL.contains(w[:, :3])][:n]


class Model:
    """Any function as a model's score."""

    ball = BALL

    def __init__(self, score):
        self.score = score


def findings(model, w, seed=0):
    return (
        stein_identities(model, w, BALL)
        | local_identities(model, w, BALL, seed=seed)
        | curl_and_noise(model, w[:4000], BALL)
    )


def alarms(model, w):
    return {name for name, row in judge(findings(model, w)).items() if row["ok"] is False}


@pytest.mark.parametrize(("n", "seeds"), [(400, 60), (3000, 30)])
def test_the_exact_score_raises_no_alarm(n, seeds):
    """Not by the tolerances' grace: without any, chance alone may flag a right model once in a hundred."""
    flagged, bare = 0, 0
    for seed in range(seeds):
        found = findings(ExactModel(SPHERE), draw(n, 1000 + seed), seed)
        assert len(found) == 20
        flagged += any(row["ok"] is False for row in judge(found).values())
        strict = {k: dataclasses.replace(f, tolerance=1e-3) for k, f in found.items()}
        bare += any(row["ok"] is False for row in judge(strict).values())
    assert flagged == 0
    assert bare <= FALSE_ALARMS * seeds + 4


def wave(w, seed):
    """A smooth function of six coordinates with nothing to do with the truth: shape (n, 6), rms 1."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return 2**0.5 * torch.sin(3.0 * (w / w.std(0)) @ turns + turns[0])


BROKEN = {
    "scale": (lambda s, w: 0.8 * s, "E[v_x s_vx]"),
    "velocity scale": (lambda s, w: s * torch.tensor([1, 1, 1, 1, 1, 1.2]), "E[v_z s_vz]"),
    "shifted": (lambda s, w: s + 0.2 * s.std(0), "E[s_vy]"),
    "mixed axes": (lambda s, w: s[:, [0, 1, 2, 4, 3, 5]], "E[v_x s_vy]"),
    "right on the mean alone": (
        lambda s, w: s + 0.6 * s.std(0) * torch.sign(torch.sin(2.5 * w[:, [1, 2, 0]])).repeat(1, 2),
        "local E[s_v]",
    ),
    "noise learnt by heart": (lambda s, w: s + 0.5 * s.std(0) * wave(w, 1), "noise in the score"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_score_is_flagged(fault):
    exact, w = ExactModel(SPHERE), draw(20_000, 5)
    change, check = BROKEN[fault]
    assert check in alarms(Model(lambda p: change(exact.score(p), p)), w)
    assert not alarms(exact, w)


def test_a_score_that_turns_is_flagged():
    exact, w = ExactModel(SPHERE), draw(3000, 6)
    turn = torch.zeros(6, 6, dtype=torch.float64)
    turn[0, 1], turn[1, 0] = 1.0, -1.0
    assert "curl of the score" in alarms(Model(lambda p: exact.score(p) + p @ turn), w)


def test_a_network_that_learnt_its_stars_by_heart_is_flagged():
    """300 stars, trained until the loss on themselves is best: held-out stars tell."""
    few, held = draw(300, 7), draw(8000, 8)
    settings = ScoreSettings(
        hidden=(48, 48), base=BaseSettings(components=1, hidden=(8,), star_passes=10_000)
    )
    model = build_model("score", settings, BALL, few, seed=1)
    before = held_out(model, held, seed=1)[1].value
    training = TrainingSettings(epochs=150, batch_size=64, learning_rate=1e-2)
    fit(model, objective("score"), few, few, training, seed=2)
    rows = run_checks(model, held, seed=3)
    assert rows["noise in the score"]["ok"] is False
    assert rows["noise in the score"]["value"] > 0.1
    assert rows["held-out implicit score matching"]["value"] > before


def test_rows_and_thresholds():
    rows = judge(
        {
            "far": Finding(1.0, 0.1, 0.0),
            "near": Finding(0.3, 0.1, 0.0),
            "small": Finding(0.04, 1e-6, 0.0),
            "free": Finding(7.0, 0.1),
            "root": Finding(0.04, 0.001, 0.0, tolerance=0.1, square=True),
            "noise": Finding(-0.02, 0.01, 0.0, tolerance=0.1, square=True),
            "broken": Finding(float("nan"), 0.1, 0.0),
        }
    )
    assert [name for name, row in rows.items() if row["ok"] is False] == ["far", "root", "broken"]
    assert [name for name, row in rows.items() if row["ok"] is None] == ["free"]
    # One hundredth over two sides of six checks: 3.14 standard errors, and the tolerance.
    assert rows["far"]["allowed"] == pytest.approx(0.05 + 0.314, abs=2e-3)
    assert rows["root"]["value"] == pytest.approx(0.2)
    assert rows["root"]["error"] == pytest.approx(0.001 / (2 * 0.2))
    assert rows["noise"]["value"] == 0.0


def test_standard_errors_are_those_of_many_samples():
    """Each check's own error against its scatter over independent stars."""
    found = [findings(ExactModel(SPHERE), draw(2000, 50 + i), i) for i in range(40)]
    for name in ("E[s_vx]", "E[v_x s_vx]", "E[h s_z + dh/dz]", "noise in the score", "local E[s_v]"):
        scatter = np.std([f[name].value for f in found], ddof=1)
        claimed = np.sqrt(np.mean([f[name].error ** 2 for f in found]))
        assert scatter == pytest.approx(claimed, rel=0.5), name


def test_agreement_of_two_models():
    exact, w = ExactModel(SPHERE), draw(4000, 9)
    other = Model(lambda p: 1.3 * exact.score(p))
    finding = agreement(exact, other, w)
    assert finding.value == pytest.approx(0.3 / 1.15, rel=1e-6)
    assert check_agreement(exact, other, w, seed=1)["difference of the scores"]["ok"] is True
    noisy = Model(lambda p: exact.score(p) + exact.score(p).std(0) * wave(p, 2))
    row = check_agreement(exact, noisy, w, seed=1)["difference of the scores"]
    assert row["ok"] is False
    # The bootstrap's error is the scatter of the median over other stars.
    medians = [agreement(exact, noisy, draw(4000, 20 + i)).value for i in range(12)]
    assert row["error"] == pytest.approx(np.std(medians, ddof=1), rel=0.7)


def test_two_samples_from_the_same_and_from_another_density():
    class Sampler:
        def __init__(self, factor):
            self.factor = factor

        def sample(self, n, generator):
            seed = int(torch.randint(2**31, (), generator=generator))
            return self.factor * draw(n, seed)

    w = draw(6000, 11)
    same = [two_sample(Sampler(1.0), w, seed=i, steps=150) for i in range(3)]
    assert all(row["ok"] for row in judge(dict(enumerate(same))).values())
    wide = judge({"wide": two_sample(Sampler(1.25), w, seed=1, steps=300)})["wide"]
    assert wide["ok"] is False


def test_a_known_selection_is_accounted_for():
    """Stars thinned by ε(x): the score of f passes with ε and fails without."""
    w = draw(30_000, 12)
    tilt = torch.tensor([0.6, 0.0, 0.0], dtype=torch.float64)
    kept = torch.rand(len(w), generator=torch.Generator().manual_seed(1)) < torch.sigmoid(2 * w[:, :3] @ tilt)
    selection = SelectionEfficiency(lambda x: torch.nn.functional.logsigmoid(2 * x @ tilt))
    exact = ExactModel(SPHERE)
    exact.ball = BALL
    seen = _SeenStars(exact, selection)
    assert not alarms(seen, w[kept])
    assert "E[h s_x + dh/dx]" in alarms(exact, w[kept])


def test_a_flow_of_velocities_alone_is_checked_for_them():
    part = FlowPart(hidden=(24,), bins=3)
    w, held = draw(4000, 13), draw(4000, 14)
    settings = FlowSettings(position=part, velocity=part, conditional=True)
    model = build_model("flow", settings, BALL, w, seed=1)
    poor = run_checks(model, held, seed=1)
    training = TrainingSettings(epochs=12, batch_size=256, learning_rate=1e-2)
    fit(model, objective("flow", settings), w, held, training, seed=2)
    good = run_checks(model, held, seed=1)
    assert not any("s_x" in name or "noise" in name for name in good)
    assert good["two-sample classifier (AUC)"]["ok"] is True
    assert good["local E[v s_v] + 1"]["value"] < poor["local E[v s_v] + 1"]["value"]
    assert sum(row["ok"] is False for row in poor.values()) > sum(row["ok"] is False for row in good.values())
