"""Every objective of score networks is least at the true score, whatever the border and selection."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.mocks import PlummerSphere
from galray.phasespace import (
    Ball,
    BaseSettings,
    FlowSettings,
    NoiseSettings,
    ScoreSettings,
    SelectionEfficiency,
    build_model,
    objective,
)
from galray.phasespace.transforms import Chart
from galray.training import TrainingSettings, fit


class Linear(torch.nn.Module):
    """A correction −k u + m."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, u):
        return -self.slope * u

    def value_and_divergence(self, u):
        return self(u), torch.full_like(u[:, 0], -6.0 * self.slope)

    def value_and_curvature(self, u, direction):
        return self(u), -self.slope * direction.square().sum(-1)

    score = forward
    score_and_divergence = value_and_divergence


class LinearScore(torch.nn.Module):
    """Base −0.6 u and correction −k u in the chart of a ball, as a score network has them."""

    def __init__(self, ball, slope):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.ball = ball
        self.chart = Chart(ball)
        self.base = Linear(0.6)
        self.correction = Linear(slope)


def gaussian(ball, n, seed=0):
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(rng.normal(size=(n, 6)))
    return w[ball.contains(w[:, :3])], rng


SLOPED = SelectionEfficiency(lambda x: torch.nn.functional.logsigmoid(2.0 * x[:, 0] - 0.5))
# nothing is seen at z < −0.3, and the stars end there at once
MASKED = SelectionEfficiency(
    lambda x: torch.where(x[:, 2] > -0.3, 0.7 * x[:, 1], -torch.inf),
    weight=lambda x: (x[:, 2] + 0.3).clamp(0.0, 0.5),
)


@pytest.mark.parametrize("selection", [None, SLOPED, MASKED], ids=["all", "sloped", "masked"])
@pytest.mark.parametrize("tail", [None, 2.0])
@pytest.mark.parametrize("goal", ["implicit", "sliced", "denoising"])
def test_losses_differ_by_the_distance_to_the_true_score(goal, tail, selection):
    """f is a Gaussian of unit width: the loss of a slope k beyond the truth's exceeds it by ½(Δk)²⟨h|u|²⟩."""
    denoising = goal == "denoising"
    # A hard edge in the midst of the stars; denoising smooths across it, so it gets one in the far tails.
    ball = Ball((0.0, 0.0, 0.0), 6.0 if denoising else 1.5)
    if denoising and selection is MASKED:
        pytest.skip("denoising smooths across the mask")
    w, rng = gaussian(ball, 150_000 if denoising else 600_000)
    if selection is not None:
        seen = selection.log_efficiency(w[:, :3]).exp()
        w = w[torch.from_numpy(rng.random(len(w))) * float(seen.max()) < seen]
    settings = ScoreSettings(objective=goal, smoothing=0.05, velocity_weight=tail)
    matching = objective("score", settings, selection=selection)
    truth = 1.0 / (1.0 + 0.05**2) if denoising else 1.0

    def losses(slope):
        model = LinearScore(ball, slope - 0.6)
        rows = matching.prepare(model, w, validation=True)
        if goal != "sliced":
            return matching.validate(model, rows) if not denoising else matching.per_star(model, rows)
        # its mean over the batch, in parts that say how it scatters
        noise = torch.Generator().manual_seed(3)
        return torch.stack([matching.loss(model, part, noise) for part in rows.chunk(200)])

    at_truth = losses(truth)
    h = objective("score", settings.model_copy(update={"objective": "implicit"}), selection=selection).weight(
        LinearScore(ball, 0.0), w, w
    )[0]
    for slope in (0.7, 1.3):
        gain = losses(slope) - at_truth
        expected = float((0.5 * (slope - truth) ** 2 * h * w.square().sum(-1)).mean())
        error = float(gain.std()) / len(gain) ** 0.5
        assert abs(float(gain.mean()) - expected) < 5 * error + 0.01 * expected
        assert float(gain.mean()) > 8 * error


def test_without_its_weight_a_mask_biases_the_loss():
    """What the weight is for: stars that end at z = 0.5 without the loss knowing favour a wrong slope."""
    ball = Ball((0.0, 0.0, 0.0), 1.5)
    w, _ = gaussian(ball, 300_000)
    w = w[w[:, 2] > 0.5]
    blind = objective("score", ScoreSettings())
    loss = {}
    for slope in (1.0, 0.9):
        model = LinearScore(ball, slope - 0.6)
        loss[slope] = blind.validate(model, blind.prepare(model, w, validation=True))
    gain = loss[0.9] - loss[1.0]
    assert float(gain.mean()) < -5 * float(gain.std()) / len(gain) ** 0.5


def test_sliced_has_the_mean_of_the_exact_loss():
    ball = Ball((0.0, 0.0, 0.0), 3.0)
    w, _ = gaussian(ball, 4000)
    base = BaseSettings(hidden=(8,), star_passes=5000)
    settings = ScoreSettings(hidden=(8, 8), objective="sliced", base=base)
    model = build_model("score", settings, ball, w, seed=1).double()
    torch.nn.init.normal_(model.correction.out.weight, generator=torch.Generator().manual_seed(1))
    matching = objective("score", settings)
    rows = matching.prepare(model, w[:500].double(), validation=True)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        drawn = torch.stack([matching.loss(model, rows, noise) for _ in range(400)])
    exact = float(matching.validate(model, rows).mean())
    assert abs(float(drawn.mean()) - exact) < 5 * float(drawn.std()) / 20
    assert float(drawn.std()) > 0


@pytest.fixture(scope="module")
def plummer():
    sphere, ball = PlummerSphere(1e10, 1.0), Ball((0.0, 0.0, 0.0), 5.0)
    w = sphere.sample(26_000, 1)
    w = w[ball.contains(w[:, :3])]
    return sphere, ball, w[:20_000], w[20_000:]


def relative_error(score, truth, scale):
    return float((((score - truth) * scale).norm(dim=-1) / (truth * scale).norm(dim=-1)).median())


@pytest.mark.parametrize(("form", "goal"), [("vector", "sliced"), ("gradient", "denoising")])
def test_other_objectives_learn_plummer(plummer, form, goal):
    sphere, ball, train, held = plummer
    base = BaseSettings(hidden=(16,), star_passes=200_000)
    settings = ScoreSettings(form=form, hidden=(48, 48), objective=goal, base=base)
    model = build_model("score", settings, ball, train, seed=3)
    truth, scale = sphere.score(held), held.std(0)
    before = relative_error(model.score(held), truth, scale)
    training = TrainingSettings(epochs=12, batch_size=512, learning_rate=3e-3)
    fit(model, objective("score", settings), train, held, training, seed=4)
    assert relative_error(model.score(held), truth, scale) < 0.85 * before


def test_known_selection_gives_the_score_of_f(plummer):
    """A third of the stars is left, along a slope of x: the score found is that of f, not of ε f."""
    sphere, ball, train, held = plummer
    selection = SelectionEfficiency(lambda x: torch.nn.functional.logsigmoid(2.5 * x[:, 0] - 1.0))
    draw = np.random.default_rng(3).random(len(train))
    seen = train[torch.from_numpy(draw) < selection.log_efficiency(train[:, :3]).exp()]
    assert 0.25 < len(seen) / len(train) < 0.45
    base = BaseSettings(hidden=(16,), star_passes=200_000)
    settings = ScoreSettings(hidden=(32, 32), base=base)
    held = held[held[:, 0] > -1.0]  # where stars are seen
    truth, scale = sphere.score(held), held.std(0)
    of_seen = truth.clone()
    of_seen[:, :3] += selection.log_and_gradient(held[:, :3])[1]
    error, distance = {}, {}
    for name, known in (("known", selection), ("ignored", None)):
        model = build_model("score", settings, ball, seen, seed=3, selection=known)
        training = TrainingSettings(epochs=12, batch_size=512)
        goal = objective("score", settings, selection=known)
        fit(model, goal, seen[500:], seen[:500], training, seed=4)
        score = model.score(held)
        error[name] = relative_error(score[:, :3], truth[:, :3], scale[:3])
        distance[name] = relative_error(score[:, :3], of_seen[:, :3], scale[:3])
    assert error["known"] < 0.32
    assert distance["known"] > 2 * error["known"]
    assert distance["ignored"] < 0.3
    assert error["ignored"] > 2 * distance["ignored"]


def test_selections_that_make_no_sense_are_refused(plummer):
    _, ball, train, _ = plummer
    x = train[:10, :3]
    with pytest.raises(GalrayError, match="not finite at 10 of 10 stars"):
        SelectionEfficiency(lambda x: torch.log(-x.square().sum(-1))).log_and_gradient(x)
    with pytest.raises(GalrayError, match="gave shape"):
        SelectionEfficiency(lambda x: x).log_and_gradient(x)
    constant = SelectionEfficiency(lambda x: torch.full((len(x),), -1.0, dtype=x.dtype))
    assert torch.equal(constant.log_and_gradient(x)[1], torch.zeros_like(x))
    with pytest.raises(GalrayError, match="kind 'flow' does not correct for a selection"):
        build_model("flow", FlowSettings(), ball, train, seed=1, selection=SLOPED)
    with pytest.raises(GalrayError, match="kind 'flow' does not correct"):
        objective("flow", FlowSettings(), selection=SLOPED)
    deconvolving = ScoreSettings(noise=NoiseSettings(treatment="deconvolve"))
    with pytest.raises(GalrayError, match="deconvolves errors"):
        objective("score", deconvolving, selection=SLOPED)
    with pytest.raises(ValueError, match="has an objective of its own"):
        ScoreSettings(objective="sliced", noise=NoiseSettings(treatment="deconvolve"))
    broken = SelectionEfficiency(lambda x: torch.full((len(x),), math.nan, dtype=x.dtype))
    with pytest.raises(GalrayError, match="whole ball"):
        build_model("score", ScoreSettings(), ball, train, seed=1, selection=broken)
