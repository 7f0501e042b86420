"""The forward and inverse Jeans equations on exact truths."""

import numpy as np
import pytest
import torch

from galray.dwarf.anisotropy import Anisotropy, symmetric, unsymmetric
from galray.dwarf.jeans import JeansSolver, inverse_jeans
from galray.dwarf.projection import log_grid
from galray.dwarf.velocities import Shape
from galray.mocks.dwarfs import gaia_challenge
from galray.units import G

RADII = np.array([0.1, 0.3, 0.6, 1.0, 2.0, 4.0])  # in half-light radii


def _constant(beta: float) -> Anisotropy:
    one = torch.ones(1, dtype=torch.float64)
    return Anisotropy(beta * one, beta * one, one, one)


def _osipkov_merritt(radius: float) -> Anisotropy:
    one = torch.ones(1, dtype=torch.float64)
    return Anisotropy(0 * one, one, radius * one, 2 * one)


def _exact(name: str, anisotropy: Anisotropy):
    mock = gaia_challenge(name)
    half = float(mock.half_light_radius)
    grid = log_grid(half)
    solver = JeansSolver(grid, half * RADII)
    log_n = torch.from_numpy(np.log(mock.number_density(grid)))[None]
    density = torch.from_numpy(mock.density(grid))[None]
    mass = solver.enclosed(density, torch.from_numpy(-mock.slope(grid[:1])))
    return mock, half, solver, log_n, mass, solver.moments(log_n, mass, anisotropy)


MODELS = [
    ("PlumCoreOm", _osipkov_merritt(0.25)),
    ("NonPlumCuspOm", _osipkov_merritt(0.10)),
    ("PlumCuspIso", _constant(0.0)),
    ("NonPlumCoreTan", _constant(-0.5)),
]


@pytest.mark.parametrize(("name", "anisotropy"), MODELS)
def test_forward_dispersions_are_those_of_the_exact_galaxies(name, anisotropy):
    mock, half, solver, log_n, mass, moments = _exact(name, anisotropy)
    inner = solver.grid < 20 * half
    assert mass[0, inner].numpy() == pytest.approx(mock.mass(solver.grid[inner].numpy()), rel=2e-3)
    assert moments.los2[0].sqrt().numpy() == pytest.approx(mock.sigma_los(half * RADII), rel=4e-3)
    radial2, _ = solver.radial_moments(log_n, mass, anisotropy)
    r = solver.grid[inner].numpy()
    middle = (r > 0.02 * half) & (r < 10 * half)
    sigma = radial2[0, inner].sqrt().numpy()[middle]
    assert sigma == pytest.approx(mock.sigma_r(r[middle]), rel=4e-3)


@pytest.mark.parametrize(("name", "anisotropy"), [MODELS[0], MODELS[3]])
def test_fourth_moments_are_those_of_the_distribution_function(name, anisotropy):
    _, half, _, _, _, moments = _exact(name, anisotropy)
    mock = gaia_challenge(name)
    w = mock.sample(150_000, 3).numpy()
    radius = np.hypot(w[:, 0], w[:, 1]) / half
    for i, middle in enumerate(RADII[1:5], start=1):
        ring = np.abs(np.log(radius / middle)) < 0.12
        v2 = w[ring, 5] ** 2
        kurtosis = (v2**2).mean() / v2.mean() ** 2
        parts = [(p**2).mean() / p.mean() ** 2 for p in np.array_split(v2, 20)]
        error = np.std(parts) / np.sqrt(20)
        model = float(moments.los4[0, i] / moments.los2[0, i] ** 2)
        assert abs(model - kurtosis) < 4 * error + 0.03 * kurtosis


def test_proper_motion_dispersions_add_up_to_the_whole_kinetic_energy():
    mock, half, _, _, _, moments = _exact("PlumCoreOm", _osipkov_merritt(0.25))
    w = mock.sample(60_000, 5).numpy()
    radius = np.hypot(w[:, 0], w[:, 1])
    outward = (w[:, 3] * w[:, 0] + w[:, 4] * w[:, 1]) / radius
    across = (w[:, 4] * w[:, 0] - w[:, 3] * w[:, 1]) / radius
    for i in (1, 2, 3, 4):
        ring = np.abs(np.log(radius / (half * RADII[i]))) < 0.15
        assert outward[ring].std() == pytest.approx(float(moments.radial2[0, i].sqrt()), rel=0.05)
        assert across[ring].std() == pytest.approx(float(moments.tangential2[0, i].sqrt()), rel=0.05)


def test_plummer_in_its_own_gravity():
    a, total = 0.3, 1e7
    grid = log_grid(a)
    solver = JeansSolver(grid, np.array([0.1, 0.5]))
    n = torch.from_numpy(3 / (4 * np.pi * a**3) * (1 + (grid / a) ** 2) ** -2.5)[None]
    mass = solver.enclosed(total * n, torch.zeros(1, dtype=torch.float64))
    radial2, radial4 = solver.radial_moments(torch.log(n), mass, _constant(0.0))
    inner = grid < 10 * a
    assert radial2[0].numpy()[inner] == pytest.approx(G * total / 6 / np.hypot(grid, a)[inner], rel=2e-3)
    # v²/v_esc² is Beta(3/2, 9/2): ⟨v_r⁴⟩/⟨v_r²⟩² = 18/7
    assert (radial4 / radial2**2)[0].numpy()[inner] == pytest.approx(18 / 7, rel=2e-3)


def test_inverse_jeans_returns_the_mass():
    mock = gaia_challenge("PlumCoreOm")
    r = np.geomspace(0.02, 2.0, 60)
    step = 1e-3

    def log_slope(f):
        return (np.log(f(r * np.exp(step))) - np.log(f(r * np.exp(-step)))) / (2 * step)

    mass = inverse_jeans(
        torch.from_numpy(r),
        torch.from_numpy(log_slope(mock.number_density)),
        torch.from_numpy(mock.sigma_r(r) ** 2),
        torch.from_numpy(2 * log_slope(mock.sigma_r)),
        torch.from_numpy(r**2 / (r**2 + 0.0625)),
    )
    assert mass.numpy() == pytest.approx(mock.mass(r), rel=0.02)


def test_anisotropy_contains_the_classical_forms_and_its_factor_integrates_it():
    r = torch.logspace(-3, 2, 50, dtype=torch.float64)
    assert _osipkov_merritt(0.4).beta(r)[0].numpy() == pytest.approx((r**2 / (r**2 + 0.16)).numpy())
    half = torch.tensor([0.5], dtype=torch.float64)
    general = Anisotropy(-0.6 * half, 1.8 * half, 0.6 * half, 3 * half)
    u = torch.log(r).requires_grad_(True)
    (slope,) = torch.autograd.grad(general.log_factor(torch.exp(u)).sum(), u)
    assert slope.numpy() == pytest.approx(2 * general.beta(r)[0].numpy(), rel=1e-9)
    (bend,) = torch.autograd.grad(general.beta(torch.exp(u)).sum(), u)
    assert bend.numpy() == pytest.approx(general.slope(r)[0].numpy(), rel=1e-9)
    beta = torch.tensor([-3.0, 0.0, 0.4, 1.0], dtype=torch.float64)
    assert unsymmetric(symmetric(beta)).numpy() == pytest.approx(beta.numpy())


@pytest.mark.parametrize("excess", [-0.6, -0.05, 0.0, 0.8, 3.0])
def test_velocity_shapes_have_the_moments_they_are_given(excess):
    v = torch.linspace(-400, 400, 20001, dtype=torch.float64)
    sigma2, error2 = 12.0**2, 5.0**2
    shape = Shape.of(torch.tensor(sigma2, dtype=torch.float64), torch.tensor(excess, dtype=torch.float64))
    p = torch.exp(shape.log_prob(v, torch.tensor(error2, dtype=torch.float64)))
    norm, second, fourth = (float(torch.trapezoid(p * v**k, v)) for k in (0, 2, 4))
    assert norm == pytest.approx(1, rel=1e-6)
    assert second == pytest.approx(sigma2 + error2, rel=1e-4)
    # the fourth cumulant does not see Gaussian errors
    assert fourth - 3 * second**2 == pytest.approx(excess * sigma2**2, abs=2e-3 * sigma2**2)
