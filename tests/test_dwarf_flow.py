"""Radial flows: normalisation, equivariance, inner slope, inverse, Jacobian; the fast form and the ODE."""

import math

import numpy as np
import pytest
import torch

from galray.dwarf.flow import OdeRadialFlow, RadialMap, SphereFlow
from galray.dwarf.jflow import Kernel, LineOfSight, choose_bandwidth, fit_flow, kernel_loss, projected_loss
from galray.dwarf.tracers import Tracers
from galray.mocks.dwarfs import gaia_challenge

R = torch.logspace(-5, 3, 6001, dtype=torch.float64)


def _fast(cusp: float = 0.0, learn: bool = False) -> RadialMap:
    flow = RadialMap(0.3, cusp=cusp, learn_cusp=learn)
    with torch.no_grad():
        bumps = torch.tensor([0.1, -0.2, 0.3, 0.5, 0.2, 0.9, 0.4, 0.7], dtype=torch.float64)
        flow.log_plateaus.copy_(bumps)
    return flow


def _ode(cusp: float = 0.0) -> OdeRadialFlow:
    flow = OdeRadialFlow(0.3, hidden=16, steps=20, cusp=cusp, seed=2)
    with torch.no_grad():
        flow.last.mul_(5.0)
    return flow


FLOWS = {
    "fast cored": lambda: _fast(),
    "fast cuspy": lambda: _fast(0.5),
    "fast learned": lambda: _fast(0.2, learn=True),
    "ode cored": lambda: _ode(),
    "ode cuspy": lambda: _ode(0.5),
}


@pytest.fixture(params=list(FLOWS))
def flow(request):
    return FLOWS[request.param]()


def test_densities_are_normalised(flow):
    with torch.no_grad():
        n = torch.exp(flow.log_density(R))
    assert float(torch.trapezoid(4 * math.pi * R**3 * n, torch.log(R))) == pytest.approx(1, abs=1e-4)


def test_maps_turn_with_their_input(flow):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        assert torch.allclose(flow.sample(z @ turn.T), flow.sample(z) @ turn.T, atol=1e-12)


def test_inner_slope_is_that_of_the_cusp(flow):
    inner = torch.tensor([1e-6, 2e-6], dtype=torch.float64)
    with torch.no_grad():
        slope = -float(torch.diff(flow.log_density(inner))) / math.log(2)
        cusp = float(flow.cusp)
    assert slope == pytest.approx(3 * cusp / (1 + cusp), abs=1e-3)


def test_density_is_the_base_over_the_jacobian(flow):
    z = torch.tensor([[0.3, -0.5, 0.2], [1.5, 0.4, -1.0]], dtype=torch.float64)
    for point in z:
        jacobian = torch.autograd.functional.jacobian(flow.sample, point)
        base = -0.5 * point.square().sum() - 1.5 * math.log(2 * math.pi)
        expected = base - torch.linalg.slogdet(jacobian)[1]
        with torch.no_grad():
            got = flow.log_density(flow.sample(point).norm()[None])[0]
        assert float(got) == pytest.approx(float(expected), abs=2e-6)


def test_round_trips():
    s = torch.linspace(0.01, 4.5, 80, dtype=torch.float64)
    with torch.no_grad():
        fast, ode = _fast(0.3), _ode()
        assert torch.allclose(torch.exp(fast.inverse(fast.forward_radius(s)[0])), s, rtol=1e-12)
        x = torch.stack([s, 0 * s, 0 * s], -1)
        there, gained = ode.integrate(x)
        back, lost = ode.integrate(there, backward=True)
        assert torch.allclose(back, x, atol=1e-7)
        assert torch.allclose(gained, -lost, atol=1e-6)


def test_slope_of_the_fast_form_is_exact():
    flow = _fast(0.5)
    r = torch.logspace(-3, 1, 20, dtype=torch.float64).requires_grad_(True)
    (gradient,) = torch.autograd.grad(flow.log_density(r).sum(), r)
    assert torch.allclose(gradient * r, flow.log_slope(r), atol=1e-9)


def test_the_fast_form_is_the_ode_form():
    """The ODE's flow is a monotone map of the radius, and the map without a solver takes its place."""
    ode = _ode()
    fast = RadialMap(0.3, knots=24, knot_range=(0.03, 4.0))
    s = torch.linspace(0.02, 4.2, 160, dtype=torch.float64)
    with torch.no_grad():
        target, slope = ode.forward_radius(s)
    optimizer = torch.optim.LBFGS(
        fast.parameters(), max_iter=300, history_size=40, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        r, log_slope = fast.forward_radius(s)
        loss = (torch.log(r / target)).square().mean() + (log_slope - slope).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        r, _ = fast.forward_radius(s)
        assert float(torch.log(r / target).abs().max()) < 0.01
        gap = (fast.log_density(target) - ode.log_density(target)).abs()
        assert float(gap[s < 3.5].max()) < 0.03
        assert float(gap[s < 3.5].mean()) < 0.01


@pytest.mark.parametrize("shape", [-0.5, 0.0, 0.6])
def test_samples_in_phase_space_have_the_dispersions_anisotropy_and_kurtosis(shape):
    flow = SphereFlow(_fast(), 0.25, 12.0, lambda r: r**2 / (r**2 + 0.09), non_gaussian=True)
    with torch.no_grad():
        flow.shape.fill_(shape)
        flow.sigma.bends[2] = -0.3
        w = flow.sample(torch.randn(60_000, 6, generator=torch.Generator().manual_seed(3)).double())
        x, v = w[:, :3], w[:, 3:]
        r = x.norm(dim=-1)
        radial = (v * x).sum(-1) / r
        tangential2 = 0.5 * (v.square().sum(-1) - radial**2)
        sigma_r, sigma_t = flow.dispersions(r)
        assert float((radial / sigma_r).square().mean()) == pytest.approx(1, rel=0.02)
        assert float((tangential2 / sigma_t**2).mean()) == pytest.approx(1, rel=0.02)
        u = radial / sigma_r
        excess = float(u.pow(4).mean() / u.square().mean() ** 2 - 3)
        assert excess == pytest.approx(float(flow.excess_kurtosis()), abs=0.12 + 0.1 * abs(excess))


def test_kernel_loss_approaches_the_exact_loss_and_counts_errors_once():
    """With a kernel of a third of the galaxy both losses nearly are the same cross entropy."""
    flow = SphereFlow(RadialMap(0.9), 1.0, 25.0)
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(50_000, 6, generator=generator, dtype=torch.float64)
    smear = torch.randn(1, 300, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(300, generator=generator, dtype=torch.float64)
    error = torch.full((300,), 6.0, dtype=torch.float64)
    with torch.no_grad():
        stars = flow.sample(torch.randn(300, 6, generator=generator, dtype=torch.float64))[:, [0, 1, 5]]
        stars[:, 2] += error * noise
    radius = stars[:, :2].norm(dim=-1)
    values = []
    for assumed in (error, 4 * error):
        with torch.no_grad():
            exact = projected_loss(flow, radius, stars[:, 2], assumed, LineOfSight(radius, 60.0))
            narrow = kernel_loss(flow, stars, assumed, Kernel(0.3, 4.0), base, smear)
        assert float(narrow) == pytest.approx(float(exact), abs=0.2)
        values.append((float(exact), float(narrow)))
    # wrong errors cost as much by either loss
    (exact, narrow), (exact_wrong, narrow_wrong) = values
    assert exact_wrong > exact + 0.02
    assert narrow_wrong - narrow == pytest.approx(exact_wrong - exact, abs=0.03)


def test_a_fit_finds_the_stars_density_and_dispersion():
    mock = gaia_challenge("PlumCoreIso")
    tracers = Tracers.project(mock.sample(1500, 1).numpy(), 2.0, seed=2)
    fit = fit_flow(tracers, steps=120, batch=256, seed=1)
    r = np.array([0.4, 0.8, 1.5])
    with torch.no_grad():
        n = torch.exp(fit.flow.positions.log_density(torch.from_numpy(r))).numpy()
        sigma = fit.flow.dispersions(torch.from_numpy(r))[0].numpy()
    assert n == pytest.approx(mock.number_density(r), rel=0.25)
    assert sigma == pytest.approx(mock.sigma_r(r), rel=0.12)
    assert fit.mass(r[1:]) == pytest.approx(mock.mass(r[1:]), rel=0.5)
    assert np.isfinite(fit.density(r)).all()
    kernel = choose_bandwidth(np.stack([tracers.x, tracers.y, tracers.v], -1), tracers.v_error)
    assert 0.02 < kernel.position < 0.6


@pytest.mark.parametrize("loss", ["projected", "kernel"])
def test_stars_of_no_membership_do_not_draw_the_fit(loss):
    """A fast, wide foreground of membership 0 changes nothing but the batches."""
    states = gaia_challenge("PlumCoreIso").sample(600, 1).numpy()
    rng = np.random.default_rng(3)
    field = np.zeros((400, 6))
    field[:, :2], field[:, 5] = 4 * rng.standard_normal((400, 2)), 80 + 60 * rng.standard_normal(400)
    member = np.r_[np.ones(600), np.zeros(400)]
    options = {"loss": loss, "steps": 100, "batch": 200, "base": 1024, "learning_rate": 0.05, "seed": 1}
    alone = fit_flow(Tracers.project(states, 2.0), **options)
    among = fit_flow(Tracers.project(np.vstack([states, field]), 2.0, membership=member), **options)
    r = torch.tensor([0.5, 1.0], dtype=torch.float64)
    with torch.no_grad():
        sigma, other = (fit.flow.dispersions(r)[0].numpy() for fit in (alone, among))
        n, n_other = (torch.exp(fit.flow.positions.log_density(r)).numpy() for fit in (alone, among))
    assert among.v_sys == pytest.approx(alone.v_sys)
    assert other == pytest.approx(sigma, rel=0.15)
    assert n_other == pytest.approx(n, rel=0.3)
