"""Flows of every kind: one contract, continuous scores, p(v|x) alone, and stars without radial velocity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from galray.catalog import galactocentric
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.mocks import PlummerSphere
from galray.phasespace import (
    Ball,
    ConditionalFlow,
    ConditionalModel,
    FlowPart,
    FlowSettings,
    PhaseSpaceFlow,
    PhaseSpaceModel,
    SightlineLikelihood,
    build_model,
    completed_stars,
    load_model,
    objective,
    project_out,
    save_model,
)
from galray.phasespace.continuous import ContinuousField
from galray.phasespace.flow_parts import build_part
from galray.phasespace.mixtures import GaussianMixture
from galray.phasespace.sightlines import line_integral
from galray.phasespace.smooth_transforms import SmoothSplineTransform
from galray.training import TrainingSettings, fit

SUN = (-8.121973, 0.0, 0.0208)
PARTS = {
    "mixture": FlowPart(hidden=(16, 16), bins=4),
    "mixture-layered": FlowPart(transforms=1, hidden=(16, 16), bins=4),
    "nsf": FlowPart(kind="nsf", transforms=2, hidden=(16, 16), bins=6),
    "maf": FlowPart(kind="maf", transforms=3, hidden=(16, 16)),
    "gaussians": FlowPart(kind="gaussians", hidden=(16, 16), bins=4),
    "continuous": FlowPart(kind="continuous", hidden=(16, 16), steps=12),
}


def disturbed(module, seed=6, width=0.15):
    """The module in float64, away from its special starting point."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(width * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


@pytest.fixture(params=PARTS, ids=list(PARTS))
def part(request):
    return PARTS[request.param]


def a_part(part, features=3, context=3, seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return disturbed(build_part(part, features, context))


@pytest.mark.parametrize("context", [0, 3])
def test_part_is_normalised_and_samples_itself(part, context):
    density = a_part(part, context=context)
    generator = torch.Generator().manual_seed(2)
    n = 20_000
    place = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64).expand(n, 3)
    c = place if context else None
    with torch.no_grad():
        drawn = density.draw(n, c, generator)
        # ∫ p dy by importance sampling from a t distribution as wide as the samples: heavier tails than any
        shift, scale = drawn.mean(0), 1.5 * drawn.std(0)
        t = torch.distributions.StudentT(5.0)
        z = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        chi2 = torch.randn(n, 3, 5, generator=generator, dtype=torch.float64).square().sum(-1)
        z = z / (chi2 / 5.0).sqrt()
        y = shift + scale * z
        ratio = (density.log_prob(y, c) - t.log_prob(z).sum(-1) + scale.log().sum()).exp()
        assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * float(ratio.std()) / n**0.5 + 1e-3)
        assert float(ratio.std()) / n**0.5 < 0.02
        # samples have the moments of the density, to their errors
        for power in (1, 2):
            weighted = ratio.unsqueeze(-1) * y**power
            error = (weighted.std(0).square() + (drawn**power).std(0).square()).sqrt() / n**0.5
            assert ((weighted.mean(0) - (drawn**power).mean(0)).abs() < 5 * error).all()


def test_part_trains_without_global_randomness(part):
    density = a_part(part)
    y, c = torch.randn(256, 3, dtype=torch.float64), torch.randn(256, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    first = density.loss(y, c, torch.Generator().manual_seed(1))
    again = density.loss(y, c, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert torch.equal(density.held_out_loss(y, c), density.held_out_loss(y, c))
    density.draw(10, c[:10], torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    first.mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in density.parameters())


def second_derivative_jump(log_f, step):
    """The largest change of d² log f / ds² between neighbours `step` apart on a line through the stars."""
    s = torch.arange(-3.0, 3.0, step, dtype=torch.float64).requires_grad_(True)
    slope = torch.autograd.grad(log_f(s).sum(), s, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), s)[0]
    return float(slope.detach().diff().abs().max()), float(bend.abs().max())


def test_score_is_continuous(part):
    """A finer line shows a smaller step of the score: no jump, and the second derivative has no spike."""
    density = a_part(part)
    start = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    along = torch.tensor([0.6, 0.5, -0.62], dtype=torch.float64)
    c = torch.tensor([[0.1, 0.4, -0.3]], dtype=torch.float64)

    def log_f(s):
        return density.log_prob(start + s.unsqueeze(-1) * along, c.expand(len(s), 3))

    coarse, bend = second_derivative_jump(log_f, 8e-3)
    fine, finer_bend = second_derivative_jump(log_f, 2e-3)
    assert fine < 0.35 * coarse
    assert finer_bend < 1.2 * bend
    assert coarse < 1.2 * 8e-3 * finer_bend  # the score changes by its derivative times the step, no more


def test_the_ordinary_spline_would_fail_that_test():
    from zuko.transforms import MonotonicRQSTransform

    generator = torch.Generator().manual_seed(0)
    raw = [torch.randn(k, generator=generator, dtype=torch.float64) for k in (6, 6, 5)]
    ordinary = MonotonicRQSTransform(*raw, bound=3.0)
    smooth = SmoothSplineTransform(raw[0], raw[1], bound=3.0)
    jumps = {}
    for name, transform in (("ordinary", ordinary), ("smooth", smooth)):
        steps = [
            second_derivative_jump(lambda s, t=transform: t.call_and_ladj(s)[1], step)[0]
            for step in (1e-3, 1e-4)
        ]
        jumps[name] = steps[1] / steps[0]
    assert jumps["ordinary"] > 0.8
    assert jumps["smooth"] < 0.15


@pytest.mark.parametrize("bins", [2, 3, 7, 8])
def test_smooth_spline_inverts_and_knows_its_slope(bins):
    generator = torch.Generator().manual_seed(bins)
    raw = torch.randn(2, 40, bins, generator=generator, dtype=torch.float64)
    transform = SmoothSplineTransform(raw[0], raw[1], bound=3.0)
    x = torch.linspace(-5.0, 5.0, 400, dtype=torch.float64)[:, None].expand(-1, 40)
    x = x.clone().requires_grad_(True)
    y, log_slope = transform.call_and_ladj(x)
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0].log(), log_slope, atol=1e-9)
    assert torch.allclose(transform.inv(y), x, atol=1e-9)
    assert (y.diff(dim=0) > 0).all()


def test_continuous_flow_solves_its_own_equations():
    part = FlowPart(kind="continuous", hidden=(16, 16), steps=24)
    field: ContinuousField = a_part(part).field
    y = torch.randn(20, 3, dtype=torch.float64)
    c = torch.randn(20, 3, dtype=torch.float64)
    t = torch.full((20, 1), 0.37, dtype=torch.float64)
    value, divergence = field._velocity_and_divergence(0.37, y, c)
    assert torch.allclose(value, field.velocity(t, y, c))

    def at(q, k):
        return field.velocity(t[0], q, k)

    jacobian = torch.func.vmap(torch.func.jacrev(at))(y, c)
    assert torch.allclose(divergence, jacobian.diagonal(dim1=-1, dim2=-2).sum(-1), atol=1e-12)
    fine = a_part(part.model_copy(update={"steps": 96})).field
    assert torch.allclose(field.log_prob(y, c), fine.log_prob(y, c), atol=2e-4)


def test_field_at_the_end_is_the_score_of_a_gaussian():
    """For data ~ N(0, 1) the field is known: no network, and its score is −y, as that of log p."""
    with torch.random.fork_rng(devices=[]):
        field = build_part(FlowPart(kind="continuous", hidden=(8,)), 3, 0).double().field
    y = torch.randn(50, 3, dtype=torch.float64).requires_grad_(True)
    log_p = field.log_prob(y)
    assert torch.allclose(log_p, -0.5 * y.square().sum(-1) - 1.5 * math.log(2 * math.pi), atol=1e-5)
    assert torch.allclose(torch.autograd.grad(log_p.sum(), y)[0], field.field_score(y), atol=1e-4)


def disc_stars(n=3000, seed=1):
    """Stars near the Sun with a sheared, flattened distribution; no truth needed."""
    ball = Ball(SUN, 3.0)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * n, 3)) * [1.3, 1.3, 0.5] + SUN
    x = x[np.linalg.norm(x - SUN, axis=1) < 2.999][:n]
    v = rng.normal(size=(n, 3)) * [45.0, 30.0, 20.0]
    v[:, 1] += 225.0 - 4.0 * (x[:, 0] - SUN[0])
    return ball, torch.from_numpy(np.concatenate([x, v], 1))


@pytest.mark.parametrize("coordinates", ["cartesian", "cylindrical"])
def test_model_contract(part, coordinates, tmp_path):
    ball, w = disc_stars()
    settings = FlowSettings(coordinates=coordinates, position=part, velocity=part)
    model = disturbed(build_model("flow", settings, ball, w, seed=5), width=0.05)
    assert isinstance(model, PhaseSpaceModel)
    assert isinstance(model, ConditionalModel)
    points = w[:8].clone().requires_grad_(True)
    score = torch.autograd.grad(model.log_prob(points).sum(), points)[0]
    assert torch.allclose(model.score(w[:8]), score, rtol=1e-6, atol=1e-9)
    parts = model.log_density(w[:8, :3]) + model.log_conditional(w[:8])
    assert torch.allclose(parts, model.log_prob(w[:8]))
    if part.kind != "continuous":
        rows = model.prepare(w[:8])
        assert torch.allclose(model.log_prob_rows(rows), model.log_prob(w[:8]), atol=1e-9)
        goal = objective("flow", settings)
        assert torch.allclose(goal.validate(model, rows), -model.log_prob_rows(rows))
    save_model(model, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model").score(w[:8]), model.score(w[:8]))
    generator = torch.Generator().manual_seed(1)
    assert model.sample_velocity(w[:4, :3].reshape(2, 2, 3), 3, generator).shape == (3, 2, 2, 3)
    assert ball.contains(model.sample(50, generator)[:, :3]).all()


def test_conditional_flow_has_no_density(part, tmp_path):
    ball, w = disc_stars()
    settings = FlowSettings(conditional=True, velocity=part)
    model = disturbed(build_model("flow", settings, ball, w, seed=5), width=0.05)
    assert type(model) is ConditionalFlow
    assert isinstance(model, ConditionalModel)
    assert not isinstance(model, PhaseSpaceModel)
    goal = objective("flow", settings)
    rows = goal.prepare(model, w[:64])
    assert goal.validate(model, rows).shape == (64,)
    goal.loss(model, rows, torch.Generator()).backward()
    p = w[:8].clone().requires_grad_(True)
    expected = torch.autograd.grad(model.log_conditional(p).sum(), p)[0]
    assert torch.allclose(model.conditional_score(w[:8]), expected, rtol=1e-6, atol=1e-9)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert type(again) is ConditionalFlow
    assert torch.equal(again.conditional_score(w[:8]), model.conditional_score(w[:8]))


@pytest.fixture(scope="module")
def plummer():
    sphere = PlummerSphere(1e10, 1.0)
    ball = Ball((0.0, 0.0, 0.0), 5.0)
    w = sphere.sample(24_000, 1)
    return sphere, ball, w[ball.contains(w[:, :3])]


def trained(w, ball, settings, goal=None, seed=3, base=None, **training):
    cut = len(w) // 10
    model = build_model("flow", settings, ball, w[cut:, :6] if base is None else base, seed=seed)
    training = TrainingSettings(**{"epochs": 12, "batch_size": 256, "learning_rate": 4e-3, **training})
    fit(model, goal or objective("flow", settings), w[cut:], w[:cut], training, seed=4)
    return model


def error(score, truth):
    return float(((score - truth).norm(dim=-1) / truth.norm(dim=-1)).median())


@pytest.mark.parametrize(
    ("kind", "options", "epochs", "rate"),
    [
        ("nsf", {"transforms": 2, "bins": 6}, 4, 4e-3),
        ("gaussians", {}, 8, 4e-3),
        ("continuous", {"hidden": (64, 64), "steps": 8}, 20, 1e-2),
    ],
)
def test_kinds_learn_plummer(plummer, kind, options, epochs, rate):
    sphere, ball, w = plummer
    part = FlowPart(kind=kind, **{"hidden": (32, 32), **options})
    settings = FlowSettings(position=part, velocity=part)
    scale = w.std(0)
    truth = sphere.score(w[:1000]) * scale
    before = error(build_model("flow", settings, ball, w, seed=3).score(w[:1000]) * scale, truth)
    model = trained(w[:8_000], ball, settings, epochs=epochs, learning_rate=rate)
    after = error(model.score(w[:1000]) * scale, truth)
    assert after < 0.4
    assert after < 0.7 * before


def test_selection_leaves_the_conditional_flow_unbiased(plummer):
    """A selection ε(x) that halves f on one side moves ∇ log f, and leaves ∇ log p(v|x) as it was."""
    sphere, ball, w = plummer
    rng = torch.Generator().manual_seed(8)
    keep = torch.rand(len(w), generator=rng, dtype=torch.float64) < torch.sigmoid(2.0 * w[:, 0])
    scale = w.std(0)
    part = FlowPart(hidden=(32, 32))
    held = sphere.sample(3000, 5)
    held = held[ball.contains(held[:, :3]) & (held[:, :3].norm(dim=-1) < 2.0)][:1500]
    # ∇ₓ log p(v|x) = ∇ₓ log f − ∇ log n
    positions = held[:, :3].clone().requires_grad_(True)
    log_n = torch.autograd.grad(sphere.number_density(positions).log().sum(), positions)[0]
    full = sphere.score(held) * scale
    truth = full.clone()
    truth[:, :3] -= log_n * scale[:3]

    alone = trained(w[keep], ball, FlowSettings(conditional=True, velocity=part), epochs=12)
    conditional = alone.conditional_score(held) * scale
    both = trained(w[keep], ball, FlowSettings(position=part, velocity=part), epochs=12)
    assert isinstance(both, PhaseSpaceFlow)
    moved = both.score(held) * scale
    # ε = sigmoid(2x) adds 2 sigmoid(−2x) to ∂ₓ log f: what the full flow learns, and the other does not
    tilt = 2.0 * torch.sigmoid(-2.0 * held[:, 0]) * scale[0]
    bias = (moved - full)[:, 0]
    assert float((bias * tilt).mean() / tilt.square().mean()) > 0.7
    free = (conditional - truth)[:, 0]
    assert abs(float((free * tilt).mean() / tilt.square().mean())) < 0.15
    assert error(conditional, truth) < 0.3


def test_gaussians_of_positions_may_start_where_the_stars_are():
    """Four far clumps: before any step n(x) is high in all and low between them."""
    generator = torch.Generator().manual_seed(0)
    signs = [[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    clumps = 1.5 * torch.tensor(signs, dtype=torch.float64)
    x = clumps.repeat(100, 1) + 0.2 * torch.randn(400, 3, generator=generator, dtype=torch.float64)
    w = torch.cat([x, torch.randn(400, 3, generator=generator, dtype=torch.float64)], -1)
    settings = FlowSettings(position=FlowPart(kind="gaussians", bins=64), velocity=PARTS["gaussians"])
    model = build_model("flow", settings, Ball((0.0, 0.0, 0.0), 4.0), w, seed=3)
    model.start_at(w, generator)
    with torch.no_grad():
        inside, between = model.log_density(clumps), model.log_density(0 * clumps[:1])
    assert float((inside - between).min()) > 3.0


# Stars without radial velocity ----------------------------------------------------------------------------


def test_line_integral_in_closed_form_equals_the_quadrature():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixture: GaussianMixture = disturbed(GaussianMixture(3, 3, 4, (16,)))
    part = a_part(PARTS["gaussians"])
    part.mixture = mixture
    y, c, e = (torch.randn(40, 3, dtype=torch.float64) for _ in range(3))
    e = e / e.norm(dim=-1, keepdim=True)
    closed = line_integral(part, y, e, c)
    s = torch.linspace(-25.0, 25.0, 4001, dtype=torch.float64)
    points = y[:, None] + s[:, None] * e[:, None]
    dense = torch.logsumexp(mixture.log_prob(points, c[:, None].expand(-1, 4001, 3)), 1)
    assert torch.allclose(closed, dense + math.log(50.0 / 4000), atol=1e-6)


@pytest.mark.parametrize("coordinates", ["cartesian", "cylindrical"])
@pytest.mark.parametrize("kind", ["mixture", "gaussians", "nsf"])
def test_sightline_likelihood_is_the_integral_over_the_missing_velocity(kind, coordinates):
    ball, w = disc_stars(400)
    part = PARTS[kind]
    settings = FlowSettings(coordinates=coordinates, position=part, velocity=part)
    model = disturbed(build_model("flow", settings, ball, w, seed=5), width=0.05)
    observer = (-9.0, 1.0, 0.5)
    known = torch.arange(len(w)) % 4 == 0
    stars = project_out(w, known, observer)
    n = w[:, :3] - torch.tensor(observer, dtype=torch.float64)
    n = n / n.norm(dim=-1, keepdim=True)
    assert torch.equal(stars[known, :6], w[known])
    assert ((stars[~known, 3:6] * n[~known]).sum(-1).abs() < 1e-10).all()
    # any radial velocity put in for the missing one gives the same star
    other = torch.cat([w[:, :3], w[:, 3:] + 77.0 * n * ~known[:, None]], 1)
    assert torch.allclose(project_out(other, known, observer), stars)

    goal = SightlineLikelihood(observer)
    rows = goal.prepare(model, stars)
    found = -goal.validate(model, rows)
    assert torch.allclose(found[known], model.log_prob(w[known]), atol=1e-9)
    speeds = torch.arange(-1500.0, 1500.0, 2.0, dtype=torch.float64)
    some = stars[~known][:12]
    v = some[:, None, 3:6] + speeds[:, None] * n[~known][:12, None]
    line = torch.cat([some[:, None, :3].expand_as(v), v], -1)
    with torch.no_grad():
        dense = torch.logsumexp(model.log_prob(line), 1) + math.log(2.0)
    assert torch.allclose(found[~known][:12], dense, atol=3e-3)
    loss = goal.loss(model, rows, torch.Generator())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_observed_columns_become_sightline_stars():
    """With the radial velocity taken as 0, what stays of the state is the part that was measured."""
    frame = GalacticFrame()
    rng = np.random.default_rng(4)
    low, high = [0.0, -80.0, 0.3, -5.0, -5.0, -200.0], [360.0, 80.0, 4.0, 5.0, 5.0, 200.0]
    observed = torch.from_numpy(rng.uniform(low, high, size=(200, 6)))
    without = observed.clone()
    without[:, 5] = 0.0
    known = torch.zeros(200, dtype=torch.bool)
    full, blind = (galactocentric(o, frame) for o in (observed, without))
    stars = project_out(blind, known, frame.sun_position)
    assert torch.allclose(stars, project_out(full, known, frame.sun_position), atol=1e-7)
    assert not torch.allclose(full, blind)


def test_sightlines_refuse_what_they_cannot_do():
    ball, w = disc_stars(300)
    model = build_model("flow", FlowSettings(velocity=PARTS["continuous"]), ball, w, seed=1)
    stars = project_out(w, torch.zeros(len(w), dtype=torch.bool), SUN)
    with pytest.raises(GalrayError, match="cannot marginalise"):
        SightlineLikelihood(SUN).prepare(model, stars)
    with pytest.raises(GalrayError, match="project_out"):
        SightlineLikelihood(SUN).prepare(model, w)
    broken = w.clone()
    broken[7, 4] = math.nan
    with pytest.raises(GalrayError, match="star 7"):
        project_out(broken, torch.ones(len(w), dtype=torch.bool), SUN)


def test_missing_velocities_are_drawn_from_the_flow():
    """Drawn from a Gaussian flow, missing velocities have its moments given what is known of each star."""
    ball, w = disc_stars(4000)
    part = PARTS["gaussians"]
    settings = FlowSettings(position=part, velocity=part, missing_rv="marginalise", sun_position=SUN)
    model = disturbed(build_model("flow", settings, ball, w, seed=5), width=0.05)
    one = w[:1].expand(4000, 6)
    rows = project_out(one, torch.zeros(4000, dtype=torch.bool), SUN)
    drawn = completed_stars(model, rows, SUN, seed=1)
    n = one[0, :3] - torch.tensor(SUN, dtype=torch.float64)
    n = n / n.norm()
    speed = (drawn[:, 3:] - rows[:, 3:6]) @ n
    torch.testing.assert_close(drawn[:, 3:], rows[:, 3:6] + speed[:, None] * n)
    grid = torch.linspace(-1500.0, 1500.0, 6001, dtype=torch.float64)
    line = rows[:1, :6].repeat(6001, 1)
    line[:, 3:] += grid[:, None] * n
    with torch.no_grad():
        p = torch.softmax(model.log_prob(line), 0)
    mean = float((p * grid).sum())
    sigma = float((p * (grid - mean) ** 2).sum().sqrt())
    assert abs(float(speed.mean()) - mean) < 4 * sigma / math.sqrt(4000)
    assert float(speed.std()) == pytest.approx(sigma, rel=0.05)
    known = project_out(w, torch.ones(len(w), dtype=torch.bool), SUN)
    assert torch.equal(completed_stars(model, known, SUN, seed=1), w)
    assert isinstance(objective("flow", settings), SightlineLikelihood)
    with pytest.raises(GalrayError, match="sun_position"):
        objective("flow", settings.model_copy(update={"sun_position": None}))
