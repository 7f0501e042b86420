"""Spheres with velocities in space: moments in 6D and 5D, the score network, and the projected score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galray.dwarf import (
    SphericalMassSettings,
    SphericalScoreSettings,
    fit_projected_score,
    fit_spherical_moments,
    fit_spherical_score,
    projected_virial,
)
from galray.dwarf.invariant_score import InvariantScore
from galray.dwarf.spherical_mass import TestFunctions, interpolation, radial_grid, solve_mass
from galray.dwarf.spherical_moments import moments_3d, moments_on_sky
from galray.errors import GalrayError
from galray.mocks import gaia_challenge
from galray.phasespace.protocols import PhaseSpaceModel
from galray.units import G

ON_SKY = [0, 1, 3, 4, 5]
RADII = np.array([0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8])  # kpc
QUICK = SphericalScoreSettings(steps=300)


@pytest.fixture(scope="module")
def core():
    return gaia_challenge("PlumCoreOm")


@pytest.fixture(scope="module")
def stars(core):
    return core.sample_noisy(10_000, 0).numpy()


@pytest.fixture(scope="module")
def trained(stars):
    return fit_spherical_score(stars, 2.0, QUICK, seed=1)


# -- the equations, on the truth ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PlumCoreOm", "NonPlumCuspIso", "PlumCuspTan"])
@pytest.mark.parametrize("columns", [list(range(6)), ON_SKY], ids=["6d", "5d"])
def test_moment_equations_hold_for_the_true_mass(name, columns):
    mock = gaia_challenge(name)
    w = mock.sample_noisy(100_000, 3).numpy()[:, columns]
    build = moments_3d if len(columns) == 6 else moments_on_sky
    moments = build(w, np.full(len(w), 2.0), SphericalMassSettings(test_functions=8))
    residual = moments.target - moments.predict(mock.mass(moments.grid))
    pull = residual.mean(0) / (residual.std(0) / np.sqrt(len(w)))
    assert np.abs(pull).max() < 4
    # and they are sharp: each moment's error is a small part of what it measures
    sharp = (residual.std(0) / np.sqrt(len(w)) / moments.target.mean(0))[2:-1]
    assert np.abs(sharp).max() < 0.2


def test_forgotten_velocity_errors_are_seen(core):
    w = core.sample_noisy(100_000, 3, velocity_error=6.0).numpy()
    moments = moments_3d(w, np.zeros(len(w)), SphericalMassSettings(test_functions=8))
    residual = moments.target - moments.predict(core.mass(moments.grid))
    assert np.abs(residual.mean(0) / (residual.std(0) / np.sqrt(len(w)))).max() > 8


def test_test_functions_add_up_to_one():
    r = np.random.default_rng(0).lognormal(-1, 0.8, 2000)
    tests = TestFunctions(r, 9)
    values, slopes = tests(np.geomspace(1e-4, 1e2, 300))
    np.testing.assert_allclose(values.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(slopes.sum(1), 0.0, atol=1e-12)
    x = np.geomspace(0.5 * np.median(r), 2 * np.median(r), 20)
    numeric = (tests(x * 1.0001)[0] - tests(x / 1.0001)[0]) / (2 * np.log(1.0001))
    np.testing.assert_allclose(tests(x)[1], numeric, atol=1e-5)


def test_exact_moments_give_the_exact_halo(core):
    """Without noise in the left-hand sides only quadrature, spline and prior are left."""
    w = core.sample(20_000, 5).numpy()
    settings = SphericalMassSettings(growth_sd=2.0)
    moments = moments_3d(w, np.zeros(len(w)), settings)
    residual = moments.target - moments.predict(core.mass(moments.grid))
    moments.target -= residual.mean(0)
    halo = solve_mass(moments, settings)
    np.testing.assert_allclose(halo.density(RADII), core.density(RADII), rtol=0.03)
    np.testing.assert_allclose(halo.mass(RADII), core.mass(RADII), rtol=0.02)
    np.testing.assert_allclose(halo.slope(RADII[1:-1]), core.slope(RADII[1:-1]), atol=0.25)


def test_interpolation_onto_stars():
    r = np.random.default_rng(1).lognormal(0, 1, 500)
    grid = radial_grid(r)
    np.testing.assert_allclose(interpolation(grid, r) @ np.log(grid), np.log(r), rtol=0, atol=1e-9)


# -- noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [list(range(6)), ON_SKY], ids=["6d", "5d"])
def test_core_of_ten_thousand_stars(core, columns):
    ratios, inside = [], []
    for seed in range(5):
        halo = fit_spherical_moments(core.sample_noisy(10_000, seed).numpy()[:, columns], 2.0)
        ratios.append(halo.density(RADII) / core.density(RADII))
        low, high = halo.density_band(RADII)
        inside.append((low < core.density(RADII)) & (core.density(RADII) < high))
    assert np.abs(np.median(ratios, 0) - 1).max() < 0.15
    assert np.mean(inside) >= 0.9


def test_the_challenges_own_file(core, test_data):
    folder = test_data / "gaia_challenge" / "PlumCoreOm"
    w = np.loadtxt(folder / "gs010_bs050_rcrs025_rarc100_core_0400mpc3_df_10000_0_err.dat")
    by_moments = fit_spherical_moments(w, 2.0)
    _, by_score = fit_spherical_score(w, 2.0, QUICK)
    for halo in (by_moments, by_score):
        assert np.abs(halo.density(RADII) / core.density(RADII) - 1).max() < 0.15


def test_bands_hold_over_models():
    inside = []
    for i, name in enumerate(["PlumCoreOm", "PlumCuspOm", "NonPlumCoreIso", "NonPlumCuspTan"] * 3):
        mock = gaia_challenge(name)
        r = mock.half_light_radius * np.array([0.5, 0.8, 1.2, 1.8, 2.5])
        halo = fit_spherical_moments(mock.sample_noisy(1000, 40 + i).numpy(), 2.0)
        low, high = halo.density_band(r)
        inside.append((low < mock.density(r)) & (mock.density(r) < high))
        mass_low, mass_high = halo.mass_band(r)
        assert (mass_low < halo.mass(r)).all()
        assert (halo.mass(r) < mass_high).all()
    assert np.mean(inside) >= 0.9


def test_posterior_and_jackknife_agree(stars):
    halo = fit_spherical_moments(stars, 2.0)
    ratio = halo.jackknife_error(RADII) / halo.log_density_error(RADII)
    assert ratio.shape == RADII.shape
    assert (ratio > 0.4).all()
    assert (ratio < 2.0).all()
    draws = halo.draws(4000, 1)
    np.testing.assert_allclose(np.cov(draws.T), halo.covariance, atol=0.1 * halo.covariance.max())


def test_mass_is_positive_and_rises_even_for_few_stars(core):
    halo = fit_spherical_moments(core.sample_noisy(200, 8).numpy(), 2.0)
    r = np.geomspace(1e-3, 5.0, 60)
    assert (halo.density(r) > 0).all()
    assert (np.diff(halo.mass(r)) > 0).all()


def test_prior_by_cross_validation(core):
    settings = SphericalMassSettings(growth_sd="cv", blocks=5)
    halo = fit_spherical_moments(core.sample_noisy(3000, 2).numpy(), 2.0, settings)
    assert halo.growth_sd in settings.growth_sd_grid
    assert np.abs(halo.density(RADII) / core.density(RADII) - 1).max() < 0.4


# -- the score ---------------------------------------------------------------------------------------------


def test_network_laplacian_is_exact():
    torch.manual_seed(0)
    net = InvariantScore((1, 2), SphericalScoreSettings(hidden=(8, 8, 8))).double()
    torch.nn.init.normal_(net.out.weight)
    y = torch.randn(40, 4, dtype=torch.float64, requires_grad=True)  # u, v_r and two tangential components

    def psi():
        speeds = torch.stack([y[:, 1], y[:, 2:].norm(dim=1)], 1)
        z = net.features(y[:, 0], speeds)
        for layer in net.layers:
            z = torch.nn.functional.silu(layer(z))
        return net.out(z)[:, 0]

    (gradient,) = torch.autograd.grad(psi().sum(), y, create_graph=True)
    laplacian = sum(
        torch.autograd.grad(gradient[:, i].sum(), y, retain_graph=True)[0][:, i] for i in range(4)
    )
    speeds = torch.stack([y[:, 1], y[:, 2:].norm(dim=1)], 1)
    score, divergence = net.correction(net.features(y[:, 0], speeds), speeds)
    torch.testing.assert_close(divergence, laplacian)
    torch.testing.assert_close(score[:, 0], gradient[:, 0])
    torch.testing.assert_close(score[:, 1], gradient[:, 1])
    along = (gradient[:, 2:] * y[:, 2:]).sum(1) / y[:, 2:].norm(dim=1)
    torch.testing.assert_close(score[:, 2], along)


def test_base_score_is_the_gradient_of_the_density(trained):
    net = trained[0].network
    rng = np.random.default_rng(3)
    u, speeds = rng.normal(-1.2, 0.6, 60), np.abs(rng.normal(0, 12, (60, 2)))
    got = net.score(u, speeds)
    for i, step in enumerate((2e-3, 2e-2, 2e-2)):
        shift_u, shift_v = (step if i == 0 else 0.0), np.zeros(2)
        if i:
            shift_v[i - 1] = step
        up = net.log_density(u + shift_u, speeds + shift_v)
        down = net.log_density(u - shift_u, speeds - shift_v)
        np.testing.assert_allclose(
            (up - down) / (2 * step), got[:, i], rtol=0.02, atol=0.02 * np.abs(got[:, i]).max()
        )


def test_score_of_a_sphere(core, trained):
    score, _ = trained
    assert isinstance(score, PhaseSpaceModel)
    w = core.sample(4000, 9)
    w = w[(w[:, :3].norm(dim=1) > 0.1) & (w[:, :3].norm(dim=1) < 0.8)]
    exact, learned = core.sphere.score(w), score.score(w)
    error = ((learned - exact).square().median(0).values / exact.square().median(0).values).sqrt()
    assert (error < 0.4).all()
    # Rotations: the score turns with the star, so x × s_x + v × s_v = 0
    turn = torch.linalg.cross(w[:, :3], learned[:, :3]) + torch.linalg.cross(w[:, 3:], learned[:, 3:])
    assert turn.abs().max() < 1e-6 * learned.abs().max()


def test_gravity_from_the_score(core, trained):
    score, halo = trained
    assert np.abs(halo.density(RADII) / core.density(RADII) - 1).max() < 0.25
    speed2 = score.circular_speed2(RADII[2:])
    np.testing.assert_allclose(speed2, G * core.mass(RADII[2:]) / RADII[2:], rtol=0.3)


def test_bands_of_the_score_hold_over_models():
    inside = []
    for i, name in enumerate(["PlumCoreOm", "NonPlumCuspOm", "PlumCuspIso", "NonPlumCoreTan"]):
        mock = gaia_challenge(name)
        r = mock.half_light_radius * np.array([0.6, 0.8, 1.2, 1.8, 2.5, 3.2])
        _, halo = fit_spherical_score(mock.sample_noisy(4000, 60 + i).numpy(), 2.0, QUICK)
        low, high = halo.density_band(r)
        inside.append((low < mock.density(r)) & (mock.density(r) < high))
    assert np.mean(inside) >= 0.9


def test_same_seed_same_score(stars):
    few, settings = stars[:1000], SphericalScoreSettings(steps=10)
    first, again, other = (fit_spherical_score(few, 2.0, settings, seed=s)[1] for s in (1, 1, 2))
    np.testing.assert_array_equal(first.parameters, again.parameters)
    assert not np.array_equal(first.parameters, other.parameters)


# -- three numbers per star --------------------------------------------------------------------------------


def test_projected_score_gives_the_projected_profiles():
    mock = gaia_challenge("PlumCuspIso")
    w = mock.sample_noisy(20_000, 4).numpy()
    score = fit_projected_score(w[:, 0], w[:, 1], w[:, 5], 2.0, QUICK)
    R = mock.half_light_radius * np.array([0.4, 0.7, 1.0, 1.5, 2.2])
    h = 1e-3
    slope = np.log(mock.surface_density(R * (1 + h)) / mock.surface_density(R * (1 - h))) / (2 * h)
    np.testing.assert_allclose(score.surface_slope(R), slope, atol=0.2)
    np.testing.assert_allclose(score.dispersion(R), mock.sigma_los(R), rtol=0.04)
    bend = np.log(mock.sigma_los(R * 1.01) / mock.sigma_los(R / 1.01)) / np.log(1.01)
    np.testing.assert_allclose(score.dispersion_slope(R), bend, atol=0.3)
    assert ((score.kurtosis(R) > 2.0) & (score.kurtosis(R) < 4.5)).all()
    r = R[1:]
    np.testing.assert_allclose(score.isotropic_mass(r), mock.mass(r), rtol=0.3)
    assert np.abs(score.score(R, np.full(5, -9.0))[1] + score.score(R, np.full(5, 9.0))[1]).max() < 1e-12


@pytest.mark.parametrize("name", ["PlumCoreOm", "PlumCuspIso", "NonPlumCoreTan"])
def test_projected_virial_theorem_needs_no_anisotropy(name):
    mock = gaia_challenge(name)
    w = mock.sample_noisy(40_000, 6).numpy()
    value, error = projected_virial(w[:, 0], w[:, 1], w[:, 5], 2.0)
    r = np.linalg.norm(w[:, :3], axis=1)
    assert abs(value - (G * mock.mass(r) / r).mean()) < 4 * error
    assert error < 0.03 * value


# -- mistakes ----------------------------------------------------------------------------------------------


def test_bad_input(stars):
    broken = stars[:500].copy()
    broken[7, 4] = np.nan
    centred = stars[:500].copy()
    centred[3, :3] = 0.0
    for w, error, message in (
        (stars[:, :4], 2.0, "states of shape"),
        (broken, 2.0, "star 7"),
        (stars[:500], -1.0, "negative velocity error"),
        (centred, 2.0, "star 3 stands at the centre"),
        (stars[:60], 2.0, "60 stars for 14 moments"),
    ):
        with pytest.raises(GalrayError, match=message):
            fit_spherical_moments(w, error)
    with pytest.raises(GalrayError, match="all six"):
        fit_spherical_score(stars[:, ON_SKY], 2.0)
    with pytest.raises(GalrayError, match="too few to train a score"):
        fit_spherical_score(stars[:100], 2.0)
    with pytest.raises(GalrayError, match="star 0"):
        fit_projected_score(np.zeros(500), np.zeros(500), np.ones(500))
    with pytest.raises(ValueError, match="growth_sd"):
        SphericalMassSettings(growth_sd=-1.0)
