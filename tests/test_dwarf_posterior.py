"""The sampler, the data's checks, and halo fits to mocks of known truth."""

import json

import numpy as np
import pytest
import torch

from galray.dwarf import (
    AnisotropySettings,
    HaloFitSettings,
    HaloPosterior,
    LikelihoodSettings,
    SamplerSettings,
    Tracers,
    compare_haloes,
    fit_halo,
    heldout_log_likelihood,
)
from galray.dwarf.likelihood import GalaxyLikelihood
from galray.dwarf.model import Prior
from galray.dwarf.sampler import effective_sample_size, sample, split_rhat
from galray.errors import GalrayError
from galray.mocks.dwarfs import gaia_challenge

QUICK = SamplerSettings(chains=12, warmup=80, draws=100, samples=400)
OM = AnisotropySettings(kind="osipkov_merritt", radius=0.25)


def _stars(n: int, seed: int = 1, dimensions: int = 3, **others) -> Tracers:
    states = gaia_challenge("PlumCoreOm").sample(n, seed).numpy()
    return Tracers.project(states, 2.0, seed=seed + 1, dimensions=dimensions, **others)


@pytest.fixture(scope="module")
def posterior():
    return fit_halo(_stars(1000), HaloFitSettings(anisotropy=OM, sampler=QUICK), seed=1)


def test_the_sampler_draws_a_correlated_gaussian():
    covariance = torch.tensor([[4.0, 1.9, 0.0], [1.9, 1.0, 0.0], [0.0, 0.0, 1e-4]], dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    inverse = torch.linalg.inv(covariance)

    def log_prob(q):
        return -0.5 * torch.einsum("ci,ij,cj->c", q - mean, inverse, q - mean)

    start = torch.zeros(12, 3, dtype=torch.float64)
    chains = sample(log_prob, start, SamplerSettings(chains=12, warmup=100, draws=300), 3)
    flat = chains.draws.reshape(-1, 3)
    assert chains.rhat.max() < 1.02
    assert chains.ess.min() > 500
    assert flat.mean(0).numpy() == pytest.approx(mean.numpy(), abs=0.2)
    assert torch.cov(flat.T).numpy() == pytest.approx(covariance.numpy(), rel=0.2, abs=0.1)
    assert float(flat[:, 2].var()) == pytest.approx(1e-4, rel=0.2)


def test_diagnostics_tell_good_chains_from_bad():
    rng = np.random.default_rng(4)
    good = rng.standard_normal((400, 8, 1))
    apart = good + np.arange(8)[None, :, None]
    slow = np.cumsum(good, 0)
    assert split_rhat(good)[0] < 1.01
    assert split_rhat(apart)[0] > 1.5
    assert effective_sample_size(good)[0] == pytest.approx(3200, rel=0.25)
    assert effective_sample_size(slow)[0] < 100


@pytest.mark.parametrize("kind", ["normal", "uniform", "box"])
def test_priors_draw_what_their_density_says(kind):
    prior = Prior("p", kind, -0.3, 2.0)
    q = torch.linspace(-6, 6, 6001, dtype=torch.float64)
    density = torch.exp(prior.log_prior(q))
    cumulative = torch.cumsum(density, 0) / density.sum()
    draws = np.sort(prior.draw(np.random.default_rng(1), 20_000))
    expected = np.interp(draws, q.numpy(), cumulative.numpy())
    assert np.abs(expected - np.arange(20_000) / 20_000).max() < 0.015


def test_a_thousand_stars_give_the_halo_within_its_bands(posterior):
    mock = gaia_challenge("PlumCoreOm")
    r = np.geomspace(0.1, 1.0, 12)
    low, high = posterior.band("density", r, (0.025, 0.975))
    inside = (low < mock.density(r)) & (mock.density(r) < high)
    assert inside.mean() >= 0.9
    half = float(mock.half_light_radius)
    mass = posterior.mass(half)
    truth = float(mock.mass(np.array(half)))
    assert np.quantile(mass, 0.025) < truth < np.quantile(mass, 0.975)
    assert mass.std() < 0.2 * truth
    assert posterior.diagnostics["rhat_max"] < 1.1
    assert posterior.diagnostics["divergent"] < 0.02
    assert np.median(posterior.half_light_radius()) == pytest.approx(half, rel=0.06)
    n = np.median(posterior.number_density(r[:8]), 0)
    assert n == pytest.approx(mock.number_density(r[:8]), rel=0.15)


def test_every_profile_is_consistent(posterior):
    r = np.array([0.1, 0.3, 0.9])
    step = 1e-3
    up, down = posterior.mass(r * np.exp(step)), posterior.mass(r * np.exp(-step))
    shell = (up - down) / (2 * step) / (4 * np.pi * r**3)
    assert shell == pytest.approx(posterior.density(r), rel=5e-3)
    slope = -np.log(posterior.density(r * np.exp(step)) / posterior.density(r * np.exp(-step))) / (2 * step)
    assert slope == pytest.approx(posterior.slope(r), abs=1e-3)
    assert (posterior.density(np.geomspace(1e-3, 50, 30)) > 0).all()
    assert np.median(posterior.anisotropy(r), 0) == pytest.approx(r**2 / (r**2 + 0.0625))
    for quantity in ("dispersion_r", "dispersion_los", "kurtosis_los", "surface_density"):
        assert np.isfinite(posterior.band(quantity, r)).all()
    with pytest.raises(GalrayError, match="no profile"):
        posterior.band("colour", r)


def test_posteriors_are_stored_and_scale_with_distance(posterior):
    arrays, meta = posterior.to_arrays()
    again = HaloPosterior.from_arrays(arrays, json.loads(json.dumps(meta)))
    r = np.array([0.15, 0.5])
    assert np.array_equal(again.density(r), posterior.density(r))
    assert again.diagnostics == posterior.diagnostics
    far = HaloPosterior(posterior.model, posterior.samples, torch.full((len(posterior),), 1.1).double())
    assert far.mass(1.1 * r) == pytest.approx(1.1 * posterior.mass(r), rel=1e-6)
    assert far.density(1.1 * r) == pytest.approx(posterior.density(r) / 1.21, rel=1e-6)
    assert far.dispersion_los(1.1 * r) == pytest.approx(posterior.dispersion_los(r), rel=1e-6)


def test_held_out_stars_prefer_the_fitted_halo(posterior):
    fresh = _stars(400, seed=9)
    score = heldout_log_likelihood(posterior, fresh)
    assert score.shape == (400,)
    prior = HaloPosterior(posterior.model, posterior.model.draw_prior(400, 2))
    assert score.sum() > heldout_log_likelihood(prior, fresh).sum() + 10


def test_cored_and_cuspy_haloes_are_compared_on_held_out_stars():
    """On stars of next to no membership too, and with a centre that each fit draws."""
    tiny = SamplerSettings(chains=6, warmup=30, draws=50, samples=100)
    weights = np.where(np.arange(300) % 10 > 0, 0.9, 0.005)
    stars = _stars(300, seed=3, membership=weights, centre_error_kpc=0.02)
    found = compare_haloes(stars, HaloFitSettings(anisotropy=OM, sampler=tiny), seed=4)
    assert found.difference == pytest.approx(found.cored - found.cuspy)
    assert np.isfinite([found.cored, found.cuspy, found.error]).all()
    assert abs(found.difference) < 20
    with pytest.raises(GalrayError, match="hold no star out"):
        compare_haloes(stars, folds=1)


def test_held_out_stars_see_the_centre_of_the_fit(posterior):
    """The same seed draws the same centre; stars that do not count have no likelihood."""
    weights = np.where(np.arange(200) % 2 == 0, 1.0, 0.0)
    one = _stars(200, seed=5, centre_error_kpc=0.1)
    same = heldout_log_likelihood(posterior, one, seed=7)
    assert same == pytest.approx(heldout_log_likelihood(posterior, one, seed=7))
    assert not np.allclose(same, heldout_log_likelihood(posterior, one, seed=8))
    halves = heldout_log_likelihood(posterior, _stars(200, seed=5, membership=weights))
    assert halves.shape == (200,)
    assert (halves[weights == 0] == 0).all()
    assert (halves[weights == 1] < 0).all()


def test_cells_agree_with_star_by_star_evaluation(posterior):
    tracers = _stars(1000)
    q = posterior.samples[::40]
    values = []
    for nodes in (200, 1000):
        settings = HaloFitSettings(anisotropy=OM, likelihood=LikelihoodSettings(nodes=nodes))
        target = GalaxyLikelihood(tracers, settings, 0, posterior.model)
        with torch.no_grad():
            values.append(target.log_posterior(q).numpy())
    # differences of the log posterior are what counts
    assert np.ptp(values[0]) > 5
    assert np.ptp(values[0] - values[1]) < 0.5


def test_a_foreground_is_told_from_members():
    rng = np.random.default_rng(6)
    members = _stars(400)
    radius = 1.5 * np.sqrt(rng.random(200))
    angle = 2 * np.pi * rng.random(200)
    inside = np.hypot(members.x, members.y) < 1.5
    tracers = Tracers(
        x=np.r_[members.x[inside], radius * np.cos(angle)],
        y=np.r_[members.y[inside], radius * np.sin(angle)],
        v=np.r_[members.v[inside] + 80.0, rng.normal(20.0, 60.0, 200)],
        v_error=2.0,
    )
    settings = HaloFitSettings(
        anisotropy=OM,
        likelihood=LikelihoodSettings(membership="mixture", footprint=1.5),
        sampler=QUICK,
    )
    posterior = fit_halo(tracers, settings, seed=2)
    nuisance = posterior.nuisance
    truth = inside.sum() / len(tracers)
    assert abs(nuisance["member_fraction"].mean() - truth) < 4 * nuisance["member_fraction"].std() + 0.02
    assert abs(nuisance["v_sys"].mean() - 80.0) < 4 * nuisance["v_sys"].std()
    assert abs(nuisance["foreground_mean"].mean() - 20.0) < 4 * nuisance["foreground_mean"].std()
    band = posterior.band("mass", [0.3], (0.01, 0.99))[:, 0]
    assert band[0] < gaia_challenge("PlumCoreOm").mass(np.array([0.3]))[0] < band[1]


def test_photometry_fixes_the_light_and_perspective_is_measured():
    """Spectra chosen outwards are no fair sample; a systemic motion across the sky tilts velocities."""
    every = _stars(3000, seed=3)
    every = every.subset(np.hypot(every.x, every.y) < 3.0)
    radius = np.hypot(every.x, every.y)
    rng = np.random.default_rng(8)
    chosen = rng.random(len(every)) < np.clip(0.15 + 0.4 * radius, 0, 0.6)
    spectra = every.subset(chosen)
    tracers = Tracers(
        x=spectra.x,
        y=spectra.y,
        v=spectra.v + 300.0 * spectra.x / 30.0,  # 300 km/s eastwards, seen from 30 kpc
        v_error=spectra.v_error,
        photometry_x=every.x,
        photometry_y=every.y,
        distance_kpc=30.0,
    )
    settings = HaloFitSettings(anisotropy=OM, likelihood=LikelihoodSettings(perspective=True), sampler=QUICK)
    posterior = fit_halo(tracers, settings, seed=2)
    mock = gaia_challenge("PlumCoreOm")
    assert np.median(posterior.half_light_radius()) == pytest.approx(float(mock.half_light_radius), rel=0.06)
    v_x = posterior.nuisance["v_x"]
    assert abs(v_x.mean() - 300.0) < 4 * v_x.std()
    assert v_x.std() < 80
    half = float(mock.half_light_radius)
    low, high = posterior.band("mass", [half], (0.01, 0.99))[:, 0]
    assert low < float(mock.mass(np.array(half))) < high


def test_proper_motions_hold_the_anisotropy():
    free = AnisotropySettings(kind="constant", inner_range=(-0.6, 0.6))
    mock = gaia_challenge("PlumCoreTan")
    states = mock.sample(500, 4).numpy()
    widths = []
    for dimensions in (3, 5):
        tracers = Tracers.project(states, 2.0, seed=5, dimensions=dimensions)
        posterior = fit_halo(tracers, HaloFitSettings(anisotropy=free, sampler=QUICK), seed=3)
        beta = posterior.anisotropy([1.0])[:, 0]
        widths.append(beta.std())
    assert widths[1] < 0.8 * widths[0]
    assert abs(beta.mean() + 0.5) < 4 * beta.std()


def _changed(**changes) -> Tracers:
    stars = _stars(100)
    fields = {"x": stars.x.copy(), "y": stars.y.copy(), "v": stars.v + 200.0, "v_error": stars.v_error.copy()}
    return Tracers(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_error": np.r_[0.0, np.full(99, 2.0)]}, "v_error of star 0 is 0"),
        ({"v_error": np.r_[np.full(99, 2.0), -1.0]}, "v_error of star 99 is -1"),
        ({"v": np.r_[np.full(10, 0.0), np.linspace(150, 250, 90)]}, "exactly 0 km/s"),
        ({"x": np.r_[np.nan, np.zeros(99)]}, "x of star 0 is nan"),
        ({"membership": np.full(100, 0.2)}, "20 members"),
        ({"membership": np.full(100, 1.2)}, "not a probability"),
        ({"x": _stars(100).x + 5.0}, "centre lies outside"),
        ({"distance_kpc": 0.2}, "units of the angles"),
    ],
)
def test_bad_data_are_refused_with_the_reason(changes, message):
    with pytest.raises(GalrayError, match=message):
        _changed(**changes).check()


def test_shapes_and_settings_that_disagree_are_refused():
    with pytest.raises(GalrayError, match="y has shape"):
        Tracers(x=np.zeros(40), y=np.zeros(39), v=np.zeros(40), v_error=1.0)
    with pytest.raises(ValueError, match="means nothing"):
        AnisotropySettings(kind="isotropic", radius=0.3)
    weights = HaloFitSettings(likelihood=LikelihoodSettings(membership="weights"))
    with pytest.raises(GalrayError, match="no star has a probability"):
        GalaxyLikelihood(_stars(100), weights, 0)
    perspective = HaloFitSettings(likelihood=LikelihoodSettings(perspective=True))
    with pytest.raises(GalrayError, match="needs the distance"):
        GalaxyLikelihood(_stars(100), perspective, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distance_kpc": -5.0}, "distance_kpc = -5"),
        ({"distance_kpc": 0.0}, "distance_kpc = 0"),
        ({"distance_kpc": 80.0, "distance_error_kpc": -1.0}, "distance_error_kpc = -1"),
        ({"centre_error_kpc": -0.1}, "centre_error_kpc = -0.1"),
        ({"distance_kpc": float("inf")}, "distance_kpc = inf"),
    ],
)
def test_distances_and_their_errors_are_checked(changes, message):
    with pytest.raises(GalrayError, match=message):
        _stars(100, **changes).check()


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("likelihood", {"foreground_sigma": [-5, 20]}, "foreground_sigma"),
        ("likelihood", {"foreground_sigma": [50, 20]}, "foreground_sigma"),
        ("likelihood", {"foreground_mean": [0, -5]}, "foreground_mean"),
        ("likelihood", {"systemic_motion": [0, 0, 0]}, "systemic_motion"),
        ("halo", {"steepening": 1e5}, "steepening"),
        ("halo", {"log_density_sd": 1e6}, "log_density_sd"),
    ],
)
def test_absurd_priors_are_refused(section, changes, message):
    with pytest.raises(ValueError, match=message):
        HaloFitSettings.model_validate({section: changes})


def test_a_footprint_without_stars_is_refused():
    with pytest.raises(GalrayError, match="footprint = 1e-05 kpc holds 0 stars"):
        fit_halo(_stars(100), HaloFitSettings(likelihood=LikelihoodSettings(footprint=1e-5)))
