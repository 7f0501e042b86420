"""Halo profiles: exact densities give their parameters back, noisy ones their errors, priors are shown."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from galray.errors import GalrayError
from galray.gravity import HaloSettings, Kernel, ProfileFitter, fit_profile, smooth, smoothed_density
from galray.potentials import NFW
from tests.flattened import FlattenedNFW

R0 = 8.122
OPEN = HaloSettings(scale_radius_kpc=(16.0, 3.0), inner_slope=(1.0, 3.0), einasto_index=(0.17, 3.0))
WIDE = np.linspace(1.0, 60.0, 40)


def places(n=80, seed=0, reach=2.5):
    """Positions in a ball around the Sun, clear of the disc."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-reach, reach, size=(20 * n, 3))
    x = x[(np.linalg.norm(x, axis=1) < reach) & (np.abs(x[:, 2]) > 0.5)][:n]
    return x + [-R0, 0.0, 0.0]


def sphere(r):
    return NFW.from_density(8e6, 16.0).mass_density(torch.from_numpy(np.stack([r, 0 * r, 0 * r], 1))).numpy()


def correlated(sigma, x, length=0.8, seed=None):
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    return np.outer(sigma, sigma) * (np.exp(-0.5 * (distance / length) ** 2) + 0.05 * np.eye(len(x)))


def test_exact_profiles_give_their_parameters_back():
    truth = sphere(WIDE)
    held = OPEN.model_copy(update={"flattening": (1.0, 0.0)})
    nfw = fit_profile(WIDE, truth, (1e-3 * truth) ** 2, "nfw", held)
    assert nfw.value("scale_radius") == pytest.approx(16.0, rel=1e-3)
    assert nfw.value("density") == pytest.approx(float(sphere(np.array([R0]))[0]), rel=1e-4)
    assert nfw.value("flattening") == 1.0
    assert nfw.error("flattening") == 0.0
    gnfw = fit_profile(WIDE, truth, (1e-3 * truth) ** 2, "gnfw", held)
    assert gnfw.value("slope") == pytest.approx(1.0, abs=5e-3)
    alpha, r2 = 0.2, 14.0
    einasto = 5e6 * np.exp(-2 / alpha * ((WIDE / r2) ** alpha - 1))
    fit = fit_profile(WIDE, einasto, (1e-3 * einasto) ** 2, "einasto", held)
    assert fit.value("index") == pytest.approx(alpha, rel=5e-3)
    assert fit.value("scale_radius") == pytest.approx(r2, rel=5e-3)
    assert fit.mass_density(WIDE) == pytest.approx(einasto, rel=1e-3)
    # the wrong profile is seen to be wrong
    assert fit_profile(WIDE, einasto, (1e-3 * einasto) ** 2, "nfw", held).chi2 > 100 * fit.chi2 + 100


def test_pulls_with_a_full_covariance():
    halo, x = FlattenedNFW(8e6, 16.0, 0.8), places(60)
    truth = halo.mass_density(x).numpy()
    covariance = correlated(0.15 * truth, x)
    root = np.linalg.cholesky(covariance)
    rng = np.random.default_rng(3)
    settings = HaloSettings(flattening=(0.8, 0.3))
    pulls, chi2 = {"density": [], "flattening": []}, []
    expected = {"density": float(halo.mass_density([R0, 0, 0])), "flattening": 0.8}
    for _ in range(60):
        fit = fit_profile(x, truth + root @ rng.normal(size=len(x)), covariance, "nfw", settings)
        for name, values in pulls.items():
            values.append((fit.value(name) - expected[name]) / fit.error(name))
        chi2.append(fit.chi2 / fit.dof)
    assert abs(np.mean(pulls["density"])) < 0.4
    assert 0.75 < np.std(pulls["density"]) < 1.25
    # the prior, centred on the truth, makes these smaller than one; never larger
    assert abs(np.mean(pulls["flattening"])) < 0.4
    assert np.std(pulls["flattening"]) < 1.2
    assert np.mean(chi2) == pytest.approx(1.0, abs=0.1)


def test_ignoring_correlations_claims_too_much():
    halo, x = FlattenedNFW(8e6, 16.0, 0.8), places(60)
    truth = halo.mass_density(x).numpy()
    covariance = correlated(0.15 * truth, x, length=1.5)
    whole = fit_profile(x, truth, covariance, "nfw").error("density")
    alone = fit_profile(x, truth, np.diag(covariance), "nfw").error("density")
    assert whole > 1.5 * alone


def test_a_local_ball_learns_the_density_and_not_the_slope():
    x = places(80)
    truth = FlattenedNFW(8e6, 16.0, 1.0 - 1e-9).mass_density(x).numpy()
    variance = (0.3 * truth) ** 2
    fit = fit_profile(x, truth, variance, "gnfw")
    assert fit.learned("density") == pytest.approx(1.0)
    assert fit.error("density") < 0.05 * fit.value("density")
    assert 0 < fit.learned("slope") < 0.6
    assert 0 < fit.learned("scale_radius") < 0.4
    assert 0 < fit.learned("flattening") < 0.5
    rows = {row["parameter"]: row for row in fit.rows()}
    assert rows["slope"]["prior"] == 1.0
    assert rows["slope"]["prior_error"] == 0.5
    assert rows["density"]["prior"] is None
    # a narrower prior is felt by what the data do not know, and hardly by what they do
    narrow = HaloSettings(inner_slope=(0.0, 0.05))
    other = fit_profile(x, truth, variance, "gnfw", narrow)
    assert other.value("slope") == pytest.approx(0.0, abs=0.06)
    assert other.value("density") == pytest.approx(fit.value("density"), abs=0.5 * fit.error("density"))


def test_flattening_from_a_field_of_forces():
    """From exact accelerations alone: smoothed −∇·a/4πG, then m² = R² + z²/q²."""
    halo, kernel, x = FlattenedNFW(8e6, 16.0, 0.7), Kernel(), places(40)
    oracle = smooth(halo.mass_density, x, kernel).numpy()
    density = smoothed_density(halo, x, kernel).numpy()
    assert density == pytest.approx(oracle, rel=1e-3)
    settings = HaloSettings(scale_radius_kpc=(16.0, 3.0), flattening=(1.0, 2.0))
    fit = fit_profile(x, density, (1e-3 * density) ** 2, "nfw", settings, kernel=kernel)
    assert fit.value("flattening") == pytest.approx(0.7, abs=2e-3)
    assert fit.value("density") == pytest.approx(float(halo.mass_density([R0, 0, 0])), rel=2e-3)
    # without the kernel the smoothing itself is taken for a rounder halo, or a flatter one
    blind = fit_profile(x, density, (1e-3 * density) ** 2, "nfw", settings)
    assert abs(blind.value("flattening") - 0.7) > 2 * abs(fit.value("flattening") - 0.7)


def test_flattened_truth_agrees_with_galpy():
    gp = pytest.importorskip("galpy.potential")
    halo = FlattenedNFW(8e6, 16.0, 0.7)
    # galpy's TriaxialNFW: amp/(4π a³) / [(m/a)(1+m/a)²], m² = x² + z²/c²
    theirs = gp.TriaxialNFWPotential(amp=4 * math.pi * 16.0**3, a=16.0, c=0.7, glorder=100)
    x = torch.tensor([[-8.0, 0.0, 1.0], [-5.0, 3.0, -0.4]], dtype=torch.float64)
    ours = halo.acceleration(x).numpy() / (4.300917270036279e-06 * 8e6)
    for row, (px, py, pz) in zip(ours, x.tolist(), strict=True):
        r = math.hypot(px, py)
        assert float(theirs.Rforce(r, pz, phi=0.0)) == pytest.approx(
            (row[0] * px + row[1] * py) / r, rel=1e-4
        )
        assert float(theirs.zforce(r, pz, phi=0.0)) == pytest.approx(row[2], rel=1e-4)


def test_a_density_of_noise_is_no_halo_and_no_failure():
    x = places(40)
    rng = np.random.default_rng(1)
    fit = fit_profile(x, rng.normal(size=40) * 1e7, np.full(40, 1e14), "gnfw")
    assert abs(fit.value("density")) < 4 * fit.error("density")
    assert fit.learned("flattening") < 0.5


def test_error_of_the_fitted_density_follows_the_fits():
    x = places(50)
    truth = FlattenedNFW(8e6, 16.0, 0.9).mass_density(x).numpy()
    variance = (0.2 * truth) ** 2
    rng = np.random.default_rng(5)
    at = np.array([[-R0 + 1.0, 0.0, 1.0], [-R0, 0.0, 0.0]])
    fits = [fit_profile(x, truth + rng.normal(size=50) * variance**0.5, variance) for _ in range(60)]
    scatter = np.std([f.mass_density(at) for f in fits], axis=0)
    claimed = np.mean([f.mass_density_error(at) for f in fits], axis=0)
    assert np.all(np.abs(scatter / claimed - 1) < 0.35)


def test_posterior_density_is_the_fits_own():
    x = places(40)
    truth = FlattenedNFW(8e6, 16.0, 0.8).mass_density(x).numpy()
    fitter = ProfileFitter(x, truth, (0.1 * truth) ** 2, "gnfw")
    fit = fitter.fit()
    best = fitter.log_posterior(fit.theta)
    for i, sigma in enumerate(np.sqrt(np.diag(fit.covariance))):
        for sign in (-1, 1):
            away = fit.theta.copy()
            away[i] += sign * 0.3 * sigma
            assert fitter.log_posterior(away) < best
    outside = fit.theta.copy()
    outside[fit.names.index("slope")] = 3.0
    assert fitter.log_posterior(outside) == -math.inf


def test_posterior_samples_agree_with_the_fit():
    pytest.importorskip("emcee")
    x = places(40)
    truth = FlattenedNFW(8e6, 16.0, 0.8).mass_density(x).numpy()
    fitter = ProfileFitter(x, truth, (0.05 * truth) ** 2)
    fit, posterior = fitter.fit(), fitter.sample(num_steps=400, burn=100, num_walkers=16, seed=2)
    low, middle, high = posterior.quantiles("density")
    assert middle == pytest.approx(fit.value("density"), abs=0.3 * fit.error("density"))
    assert 0.5 * (high - low) == pytest.approx(fit.error("density"), rel=0.25)
    assert 0.2 < posterior.acceptance < 0.9


def test_no_emcee_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "emcee", None)
    with pytest.raises(GalrayError, match=r"pip install galray\[emcee\]"):
        ProfileFitter(np.array([7.0, 8.0]), np.ones(2), np.ones(2)).sample()


@pytest.mark.parametrize(
    ("x", "density", "covariance", "text"),
    [
        (np.ones(1), np.ones(1), np.ones(1), "two positions"),
        (np.ones(3), np.ones(2), np.ones(2), "one position"),
        (np.ones(2), np.ones(2), np.eye(3), "one position"),
        (np.ones(2), np.array([1.0, np.nan]), np.ones(2), "not finite"),
        (np.ones(2), np.ones(2), np.array([1.0, 0.0]), "no error"),
    ],
)
def test_bad_densities(x, density, covariance, text):
    with pytest.raises(GalrayError, match=text):
        fit_profile(x, density, covariance)


@pytest.mark.parametrize(
    "values",
    [{"flattening": (0.0, 0.1)}, {"inner_slope": (2.5, 0.5)}, {"scale_radius_kpc": (16.0, -1.0)}],
)
def test_bad_priors(values):
    with pytest.raises(ValidationError):
        HaloSettings(**values)
