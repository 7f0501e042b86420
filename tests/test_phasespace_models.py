"""One contract for every model, and what each must learn."""

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
    ExactModel,
    FlowPart,
    FlowSettings,
    PhaseSpaceModel,
    ScoreSettings,
    build_model,
    load_model,
    objective,
    run_checks,
    save_model,
)
from galray.training import TrainingSettings, fit

SUN = (-8.121973, 0.0, 0.0208)
SMALL_BASE = BaseSettings(components=2, hidden=(16,), star_passes=20_000)
SPLINE = FlowPart(kind="nsf", transforms=2, hidden=(16, 16), bins=4)
AFFINE = FlowPart(kind="maf", transforms=2, hidden=(16, 16))
MIXTURE = FlowPart(hidden=(16, 16), bins=4)
LAYERED = FlowPart(transforms=1, hidden=(16, 16), bins=4)

CASES = {
    "flow-mixture": ("flow", FlowSettings(position=MIXTURE, velocity=MIXTURE)),
    "flow-mixture-disc": (
        "flow",
        FlowSettings(coordinates="cylindrical", position=MIXTURE, velocity=LAYERED),
    ),
    "flow-nsf": ("flow", FlowSettings(position=SPLINE, velocity=SPLINE)),
    "flow-maf-disc": ("flow", FlowSettings(coordinates="cylindrical", position=AFFINE, velocity=AFFINE)),
    "score": ("score", ScoreSettings(hidden=(16, 16), base=SMALL_BASE)),
    "score-vector": ("score", ScoreSettings(form="vector", hidden=(16, 16), base=SMALL_BASE)),
    "score-deep-disc": (
        "score",
        ScoreSettings(coordinates="cylindrical", hidden=(16, 16, 16), activation="tanh", base=SMALL_BASE),
    ),
}
for form in ("gradient", "vector"):
    for goal in ("sliced", "denoising"):
        options = {"form": form, "objective": goal, "hidden": (16, 16), "base": SMALL_BASE}
        CASES[f"score-{form}-{goal}-disc"] = (
            "score",
            ScoreSettings(coordinates="cylindrical", velocity_weight=3.0, **options),
        )


def disc_stars(n: int = 3000, seed: int = 1) -> tuple[Ball, torch.Tensor]:
    """Stars near the Sun with a sheared, flattened distribution; no truth needed."""
    ball = Ball(SUN, 3.0)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * n, 3)) * [1.3, 1.3, 0.5] + SUN
    x = x[np.linalg.norm(x - SUN, axis=1) < 2.999][:n]
    v = rng.normal(size=(n, 3)) * [45.0, 30.0, 20.0]
    v[:, 1] += 225.0 - 4.0 * (x[:, 0] - SUN[0])
    return ball, torch.from_numpy(np.concatenate([x, v], 1))


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    kind, settings = CASES[request.param]
    ball, w = disc_stars()
    model = build_model(kind, settings, ball, w, seed=5)
    with torch.no_grad():  # away from the special starting point, where corrections are zero
        generator = torch.Generator().manual_seed(6)
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return kind, model, ball, w


def test_contract_shapes_gradients_and_storage(case, tmp_path):
    kind, model, _, w = case
    assert isinstance(model, PhaseSpaceModel)
    points = w[:24].reshape(2, 12, 6)
    score = model.score(points)
    assert score.shape == points.shape
    assert score.dtype == torch.float64
    assert torch.isfinite(score).all()
    assert torch.allclose(score.reshape(-1, 6)[5], model.score(points[0, 5]), rtol=1e-4, atol=1e-5)

    goal = objective(kind, model.settings)
    rows = goal.prepare(model, w[:512])
    loss = goal.loss(model, rows, torch.Generator())
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert goal.validate(model, rows).shape == (512,)

    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert torch.equal(again.score(points), score)
    assert again.settings == model.settings
    assert not list(tmp_path.rglob("*.p*k*"))


def test_internal_score_is_the_gradient_of_log_f(case):
    kind, model, _, w = case
    model = model.double()
    p = w[:30].clone().requires_grad_(True)
    if kind == "flow":
        log_f = model.log_prob(p)
    else:
        with torch.no_grad():  # the base alone has a log f
            for p_out in model.correction.out.parameters():
                p_out.zero_()
        log_f = model.base.log_prob(model.chart(p)) + model.chart.log_det(p)
    expected = torch.autograd.grad(log_f.sum(), p)[0]
    assert torch.allclose(model.score(w[:30]), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("flow")])
def test_flow_is_normalised_and_samples_itself(name):
    kind, settings = CASES[name]
    ball, w = disc_stars()
    flow = build_model(kind, settings, ball, w, seed=5).double()
    generator = torch.Generator().manual_seed(2)
    # ∫ n d³x over the ball, and ∫ p(v|x) d³v at one place by importance sampling from a broad Gaussian.
    x = ball.sample_uniform(60_000, generator)
    volume = 4.0 / 3.0 * math.pi * ball.radius**3
    with torch.no_grad():
        n = volume * flow.log_density(x).exp()
        assert float(n.mean()) == pytest.approx(1.0, abs=max(0.03, 5 * float(n.std()) / len(n) ** 0.5))
        place = w[7, :3].expand(60_000, 3)
        scale = torch.tensor([90.0, 90.0, 60.0], dtype=torch.float64)
        z = torch.randn(60_000, 3, generator=generator, dtype=torch.float64)
        v = z * scale + torch.tensor([0.0, 225.0, 0.0])
        log_q = -0.5 * z.square().sum(-1) - scale.log().sum() - 1.5 * math.log(2 * math.pi)
        ratio = (flow.log_conditional(torch.cat([place, v], -1)) - log_q).exp()
        assert float(ratio.mean()) == pytest.approx(1.0, abs=0.04)

        sample = flow.sample(4000, generator)
        assert ball.contains(sample[:, :3]).all()
        # Its own samples have the entropy its density says: compare with importance sampling of the same.
        mean_v = (ratio.unsqueeze(-1) * v).mean(0)
        drawn = flow.sample_velocity(w[7, :3], 20_000, generator)
        assert drawn.shape == (20_000, 3)
        error = drawn.std(0) / len(drawn) ** 0.5 + (ratio.unsqueeze(-1) * v).std(0) / len(v) ** 0.5
        assert ((drawn.mean(0) - mean_v).abs() < 5 * error).all()
    assert flow.sample_velocity(w[:4, :3].reshape(2, 2, 3), 3, generator).shape == (3, 2, 2, 3)
    conditional = flow.conditional_score(w[:20])
    full = flow.score(w[:20])
    assert torch.allclose(conditional[:, 3:], full[:, 3:], atol=1e-9)
    assert not torch.allclose(conditional[:, :3], full[:, :3])


def test_base_divergence_equals_torch_func():
    ball, w = disc_stars(500)
    model = build_model("score", CASES["score"][1], ball, w, seed=1).double()
    u = model.chart(w[:20])
    score, divergence = model.base.score_and_divergence(u)
    hessian = torch.func.vmap(torch.func.hessian(model.base.log_prob))(u)
    assert torch.allclose(divergence, hessian.diagonal(dim1=-1, dim2=-2).sum(-1), atol=1e-9)
    assert torch.allclose(score, model.base.score(u))


def test_edge_weighted_loss_measures_the_distance_to_the_true_score():
    """The losses of two scores differ by the difference of their weighted errors: no border term is left."""
    ball = Ball((0.0, 0.0, 0.0), 1.5)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600_000, 3))  # f is a Gaussian; a third of it lies inside: a hard edge
    x = x[np.linalg.norm(x, axis=1) < 1.5]
    w = torch.from_numpy(np.concatenate([x, rng.normal(size=x.shape)], 1))
    h, gradient = ball.edge_weight(w[:, :3])

    def loss(slope):  # s = −slope w, divergence −6 slope
        s = -slope * w
        return h * (0.5 * s.square().sum(-1) - 6.0 * slope) + (gradient * s[:, :3]).sum(-1)

    for slope in (0.7, 1.3):
        gain = loss(slope) - loss(1.0)
        error = 0.5 * (slope - 1.0) ** 2 * (h * w.square().sum(-1))
        difference = gain - error
        assert abs(float(difference.mean())) < 5 * float(difference.std()) / len(w) ** 0.5
        assert float(gain.mean()) > 10 * float(gain.std()) / len(w) ** 0.5


@pytest.fixture(scope="module")
def plummer():
    sphere = PlummerSphere(1e10, 1.0)
    ball = Ball((0.0, 0.0, 0.0), 5.0)

    def draw(n, seed):
        w = sphere.sample(n, seed)
        return w[ball.contains(w[:, :3])]

    return sphere, ball, draw(21_000, 1), draw(5_000, 2)


def median_error(model, sphere, w):
    truth = ExactModel(sphere).score(w)
    scale = w.std(0)
    return float((((model.score(w) - truth) * scale).norm(dim=-1) / (truth * scale).norm(dim=-1)).median())


@pytest.mark.parametrize(
    ("form", "hidden", "bar"), [("vector", (64, 64), 0.20), ("gradient", (48, 48, 48), 0.14)]
)
def test_score_network_learns_plummer(plummer, form, hidden, bar):
    sphere, ball, train, held = plummer
    # A short fit of the base on purpose: the network has something to correct.
    base = BaseSettings(components=1, hidden=(16,), star_passes=200_000)
    settings = ScoreSettings(form=form, hidden=hidden, base=base)
    model = build_model("score", settings, ball, train, seed=3)
    before = median_error(model, sphere, held)
    result = fit(
        model,
        objective("score"),
        train,
        held,
        TrainingSettings(epochs=40, batch_size=512, learning_rate=3e-3),
        seed=4,
    )
    after = median_error(model, sphere, held)
    assert result.best < result.curve[0]["validation"]
    assert before > 0.22
    assert after < bar
    assert after < 0.9 * before


def test_flow_learns_plummer_and_checks_see_it(plummer):
    sphere, ball, train, held = plummer
    settings = FlowSettings(position=FlowPart(hidden=(48, 48)), velocity=FlowPart(hidden=(48, 48)))
    model = build_model("flow", settings, ball, train, seed=3)
    untrained = median_error(model, sphere, held)
    poor = run_checks(model, held, seed=1)
    fit(
        model,
        objective("flow"),
        train,
        held,
        TrainingSettings(epochs=30, batch_size=256, learning_rate=4e-3),
        seed=4,
    )
    trained = median_error(model, sphere, held)
    assert untrained > 0.4
    assert trained < 0.25
    good = run_checks(model, held, seed=1)
    assert poor["two-sample classifier (AUC)"]["ok"] is False
    assert good["two-sample classifier (AUC)"]["ok"] is True
    assert good["curl of the score"]["value"] < 0.02
    assert (
        good["held-out negative log likelihood"]["value"] < poor["held-out negative log likelihood"]["value"]
    )
    for row in good.values():
        assert set(row) == {"value", "error", "expected", "allowed", "ok"}


def test_same_seed_same_model_and_no_global_state():
    ball, w = disc_stars(500)
    before = torch.get_rng_state()
    first = build_model("score", CASES["score"][1], ball, w, seed=9)
    second = build_model("score", CASES["score"][1], ball, w, seed=9)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.score(w), second.score(w))
    assert not torch.equal(first.score(w), build_model("score", CASES["score"][1], ball, w, seed=10).score(w))


def test_bad_input_is_named(tmp_path):
    ball, w = disc_stars(500)
    with pytest.raises(GalrayError, match="kind 'spline'"):
        build_model("spline", FlowSettings(), ball, w)
    outside, broken = w.clone(), w.clone()
    outside[3, 0], broken[3, 4] = 100.0, math.nan
    with pytest.raises(GalrayError, match="1 lie"):
        build_model("flow", FlowSettings(), ball, outside, seed=1)
    with pytest.raises(GalrayError, match="1 are not finite"):
        build_model("flow", FlowSettings(), ball, broken, seed=1)
    with pytest.raises(GalrayError, match="too few"):
        build_model("score", ScoreSettings(), ball, w[:10], seed=1)
    with pytest.raises(GalrayError, match="does not hold a readable model"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="bare Gaussian"):
        FlowPart(kind="nsf", transforms=0)
