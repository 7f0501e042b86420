"""Spheres: normalisation, density, scores, virial theorem, Boltzmann equation, sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from galray.mocks import HernquistSphere, IsochroneSphere, PlummerSphere
from galray.units import G

SPHERES = {
    "plummer": PlummerSphere(1e10, 5.0),
    "isochrone": IsochroneSphere(3e11, 2.0),
    "hernquist": HernquistSphere(5e10, 3.0),
}


@pytest.fixture(params=SPHERES)
def sphere(request):
    return SPHERES[request.param]


def test_density_is_the_integral_of_f(sphere):
    """∫ f d³v = ρ/M at radii from the centre to the far outskirts: normalisation and shape of f at once."""
    for radius in sphere.scale * np.array([0.003, 0.1, 1.0, 7.0, 80.0]):
        x = torch.tensor([radius, 0.0, 0.0], dtype=torch.float64)
        escape = math.sqrt(-2 * sphere.potential_field.potential(x).item())

        def integrand(angle, x=x, escape=escape):
            v = escape * math.sin(angle)  # takes the end-point singularity of ε^{5/2} away
            w = torch.cat([x, torch.tensor([v, 0.0, 0.0], dtype=torch.float64)])
            return 4 * math.pi * v**2 * sphere.log_prob(w).exp().item() * escape * math.cos(angle)

        value, _ = integrate.quad(integrand, 0, math.pi / 2, epsrel=1e-9, limit=200)
        assert value == pytest.approx(sphere.number_density(x).item(), rel=1e-7)


def test_scores_are_the_gradients_of_log_f(sphere):
    w = sphere.sample(400, 3).requires_grad_()
    (expected,) = torch.autograd.grad(sphere.log_prob(w).sum(), w)
    torch.testing.assert_close(sphere.score(w.detach()), expected, rtol=1e-7, atol=1e-10)


def test_scores_agree_with_finite_differences(sphere):
    w = sphere.sample(200, 4)
    keep = w[:, :3].norm(dim=1) > 0.05 * sphere.scale  # a cusp's curvature spoils differences, not scores
    w = w[keep]
    step = 1e-5 * torch.tensor([1.0] * 3 + [50.0] * 3, dtype=torch.float64)
    for i in range(6):
        h = torch.zeros(6, dtype=torch.float64)
        h[i] = step[i]
        inside = torch.isfinite(sphere.log_prob(w + 100 * h)) & torch.isfinite(sphere.log_prob(w - 100 * h))
        difference = (sphere.log_prob(w + h) - sphere.log_prob(w - h)) / (2 * step[i])
        torch.testing.assert_close(sphere.score(w)[inside, i], difference[inside], rtol=1e-4, atol=1e-5)


def test_boltzmann_residual_is_round_off(sphere):
    w = sphere.sample(5000, 5)
    s, a = sphere.score(w), sphere.potential_field.acceleration(w[:, :3])
    streaming = (w[:, 3:] * s[:, :3]).sum(1)
    residual = streaming + (a * s[:, 3:]).sum(1)
    assert (residual.abs() / (1e-3 * streaming.abs().median() + streaming.abs())).max() < 1e-11


def test_log_f_is_continuous_where_the_series_takes_over():
    for sphere in (SPHERES["isochrone"], SPHERES["hernquist"]):
        e = torch.tensor([0.15 - 1e-12, 0.15 + 1e-12], dtype=torch.float64)
        value, slope = sphere._log_df(e, 1 - e)
        assert abs(value[1] - value[0]) < 1e-10
        assert abs(slope[1] / slope[0] - 1) < 1e-9


def test_virial_theorem(sphere):
    """⟨v²⟩ = ⟨x·∇Φ⟩ over all stars, within its own standard error."""
    w = sphere.sample(200_000, 6)
    x, v = w[:, :3], w[:, 3:]
    difference = v.square().sum(1) + (x * sphere.potential_field.acceleration(x)).sum(1)
    z = difference.mean() / (difference.std() / math.sqrt(len(w)))
    assert abs(z) < 4
    assert difference.mean().abs() < 0.02 * v.square().sum(1).mean()


def test_radii_follow_the_enclosed_mass(sphere):
    w = sphere.sample(50_000, 7)
    radius = w[:, :3].norm(dim=1)
    a = -sphere.potential_field.acceleration(w[:, :3]).norm(dim=1)
    enclosed = (-a * radius.square() / (G * sphere.m_tot)).numpy()
    assert stats.kstest(enclosed, "uniform").pvalue > 1e-4
    # isotropic directions of positions and velocities
    for block in (w[:, :3], w[:, 3:]):
        cosine = (block[:, 2] / block.norm(dim=1)).numpy()
        assert stats.kstest(cosine, "uniform", args=(-1, 2)).pvalue > 1e-4


@pytest.mark.parametrize("radius", [0.02, 0.6, 15.0])
def test_speeds_follow_f(sphere, radius):
    """The cumulative of 4πv² f/n, by quadrature, makes sampled speeds uniform."""
    x = torch.tensor([0.0, radius * sphere.scale, 0.0], dtype=torch.float64)
    speed = sphere.sample_velocity(x, 20_000, 8).norm(dim=1).numpy()
    escape = math.sqrt(-2 * sphere.potential_field.potential(x).item())
    v = torch.linspace(0, escape, 40_001, dtype=torch.float64)[:-1]
    w = torch.zeros(len(v), 6, dtype=torch.float64)
    w[:, :3], w[:, 3] = x, v
    density = (v.square() * sphere.log_prob(w).exp()).numpy()
    cumulative = integrate.cumulative_simpson(density, x=v.numpy(), initial=0)
    uniform = np.interp(speed, v.numpy(), cumulative / cumulative[-1])
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4


def test_stein_identities_hold_on_samples(sphere):
    """E[s_v | x] = 0 and E[v s_vᵀ | x] = −1 with the exact score."""
    x = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64) * sphere.scale
    v = sphere.sample_velocity(x, 100_000, 9)
    s = sphere.score(torch.cat([x.expand(len(v), 3), v], 1))[:, 3:]
    product = v[:, :, None] * s[:, None, :] + torch.eye(3, dtype=torch.float64)
    for value in (s, product):
        z = value.mean(0) / (value.std(0) / math.sqrt(len(v)))
        assert z.abs().max() < 4.5


def test_unbound_states_have_no_density(sphere):
    w = torch.tensor([[sphere.scale, 0, 0, 1e5, 0, 0]], dtype=torch.float64)
    assert sphere.log_prob(w).item() == -math.inf
    assert torch.isnan(sphere.score(w)).all()


def test_seed_fixes_the_sample(sphere):
    assert torch.equal(sphere.sample(100, 1), sphere.sample(100, 1))
    assert not torch.equal(sphere.sample(100, 1), sphere.sample(100, 2))
    assert sphere.sample_velocity(torch.ones(4, 5, 3), 7, 1).shape == (7, 4, 5, 3)
