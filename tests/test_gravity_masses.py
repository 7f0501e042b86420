"""Gaussian masses in a tide, and the forms of the estimating equation that noise does or does not bias."""

import math

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.gravity import MassField, PotentialField, PotentialSettings, Region, fit_potential, load_field
from galray.gravity import save_field as save
from galray.gravity.masses import _solid_harmonics
from galray.mocks.spheres import PlummerSphere
from galray.units import G

SPHERE = PlummerSphere(1e9, 1.0)
BALL = Region((0.0, 0.0, 0.0), 6.0)
MASSES = PotentialSettings(basis="masses", num_masses=200, mass_sets=1, mass_width=1.0, tide_order=2)


@pytest.fixture(scope="module")
def stars():
    w = SPHERE.sample(30_000, 5)
    w = w[w[:, :3].norm(dim=1) < 6.0]
    return w, SPHERE.score(w)


def places():
    x = SPHERE.sample(3000, 21)[:, :3]
    r = x.norm(dim=1)
    return x[(r > 0.4) & (r < 3.0)]


def gain(field):
    """How much of the true acceleration is found, and the rms of what is missed."""
    x = places()
    truth = SPHERE.potential_field.acceleration(x)
    error = field.acceleration(x) - truth
    return float((error * truth).sum() / truth.square().sum()), float(
        (error.square().sum() / truth.square().sum()).sqrt()
    )


def test_exact_scores_leave_the_resolution_of_the_masses(stars):
    w, scores = stars
    settings = MASSES.model_copy(update={"num_masses": 300})
    field = fit_potential(scores, w, settings, seed=1, ball=BALL)
    assert isinstance(field, MassField)
    assert gain(field)[1] < 0.005
    x = places()
    density = field.mass_density(x)
    truth = SPHERE.potential_field.mass_density(x)
    assert float(density.min()) > 0
    assert float(((density - truth).square().sum() / truth.square().sum()).sqrt()) < 0.02
    total = float(field.masses.sum())
    assert total == pytest.approx(1e9, rel=0.1)


def test_the_mean_over_sets_of_centres_forgets_where_they_fell(stars):
    w, scores = stars
    wide = MASSES.model_copy(update={"num_masses": 60})
    x = places()
    truth = SPHERE.potential_field.mass_density(x)

    def missed(sets, seed):
        field = fit_potential(scores, w, wide.model_copy(update={"mass_sets": sets}), seed=seed, ball=BALL)
        assert int(field.statistics["masses"]) == 60
        assert float(field.masses.min()) > 0
        return float((field.mass_density(x) - truth).norm() / truth.norm())

    alone = [missed(1, seed) for seed in range(4)]
    assert missed(4, 9) < 0.8 * np.mean(alone)


def test_a_network_stands_on_the_masses(stars):
    w, scores = stars
    settings = MASSES.model_copy(update={"basis": "network", "base": "masses", "epochs": 1, "num_masses": 60})
    field = fit_potential(scores, w, settings, seed=1, ball=BALL)
    assert isinstance(field, PotentialField)
    assert isinstance(field.base, MassField)
    assert gain(field)[1] < gain(field.base)[1]


def test_the_field_is_one_potential(stars):
    w, scores = stars
    field = fit_potential(scores, w, MASSES, seed=1, ball=BALL)
    x = places()[:10]
    steps = 1e-4 * torch.eye(3, dtype=torch.float64)
    numeric = torch.stack([(field.potential(x - e) - field.potential(x + e)) / 2e-4 for e in steps], -1)
    torch.testing.assert_close(field.acceleration(x), numeric, rtol=1e-6, atol=1e-2)
    divergence = sum(
        (field.acceleration(x + e) - field.acceleration(x - e))[:, i] / 2e-4 for i, e in enumerate(steps)
    )
    torch.testing.assert_close(field.mass_density(x), -divergence / (4 * math.pi * G), rtol=1e-5, atol=1e2)


def test_at_a_centre_and_far_away():
    centre = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    field = MassField(BALL, centre, [0.3], [1e9])
    torch.testing.assert_close(field.acceleration(centre), torch.zeros(1, 3, dtype=torch.float64))
    near = centre + torch.tensor([1e-6, 0.0, 0.0])
    torch.testing.assert_close(field.potential(near), field.potential(centre), rtol=1e-9, atol=0)
    far = centre + torch.tensor([4.0, 0.0, 0.0])
    assert float(field.acceleration(far)[0, 0]) == pytest.approx(-G * 1e9 / 16, rel=1e-9)
    assert float(field.potential(far)) == pytest.approx(-G * 1e9 / 4, rel=1e-9)


def test_the_tide_has_no_mass_and_replaces_what_lies_outside():
    """A point mass beyond the ball: nothing inside, the harmonics take its pull."""
    harmonics = _solid_harmonics(4)
    assert harmonics.shape == (34, 24)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(20_000, 3))
    x = x[np.linalg.norm(x, axis=1) < 2]
    v = rng.normal(size=x.shape) * 40
    offset = x - np.array([8.0, 0.0, 0.0])
    a = -G * 5e10 * offset / np.linalg.norm(offset, axis=1)[:, None] ** 3
    scores = np.concatenate([a, -v], 1) / 40.0**2  # a Maxwellian in any potential
    settings = MASSES.model_copy(update={"num_masses": 30, "tide_order": 4})
    field = fit_potential(scores, np.concatenate([x, v], 1), settings, seed=1, ball=Region((0, 0, 0), 2.2))
    inner = np.linalg.norm(x, axis=1) < 1.6
    error = field.acceleration(x[inner]).numpy() - a[inner]
    assert np.sqrt((error**2).sum() / (a[inner] ** 2).sum()) < 0.005


def noisy(scores, amplitude, seed):
    """Scores with independent noise of known variance in sᵥ alone, in units of 1/(25 km/s)."""
    noise = torch.randn(len(scores), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores + torch.cat([torch.zeros_like(noise), amplitude / 25.0 * noise], 1)


def test_noise_shrinks_the_plain_form_as_errors_in_variables_do():
    """⟨ŝŝᵀ⟩ = ⟨ssᵀ⟩ + τ²: where s is Maxwellian, the plain form finds (1 + τ²σ²)⁻¹ of a."""
    rng = np.random.default_rng(4)
    sigma = 40.0
    x = rng.uniform(-2, 2, (40_000, 3))
    x = x[np.linalg.norm(x, axis=1) < 2]
    v = rng.normal(size=x.shape) * sigma
    a = -500.0 * x / np.sqrt(1 + (x**2).sum(1, keepdims=True))
    for ratio in (0.3, 0.6):
        first, second = (rng.normal(size=(2, *x.shape))) * ratio / sigma
        scores = np.concatenate([a, -v], 1) / sigma**2
        w = np.concatenate([x, v], 1)

        def found(form, partner=None, scores=scores, w=w, first=first):
            hat = scores + np.concatenate([0 * first, first], 1)
            settings = MASSES.model_copy(update={"form": form, "num_masses": 100})
            field = fit_potential(hat, w, settings, seed=1, ball=Region((0, 0, 0), 2.1), partner=partner)
            inner = np.linalg.norm(x, axis=1) < 1.5
            return float((field.acceleration(x[inner]).numpy() * a[inner]).sum() / (a[inner] ** 2).sum())

        assert found("plain") == pytest.approx(1 / (1 + ratio**2), abs=0.01)
        crossed = found("plain", scores + np.concatenate([0 * second, second], 1))
        assert crossed == pytest.approx(1, abs=0.02)
        assert found("instrument") == pytest.approx(1, abs=0.02)
        assert found("stein") == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("form", ["instrument", "stein", "plain"])
def test_the_network_follows_every_form(stars, form):
    w, scores = stars
    settings = MASSES.model_copy(
        update={"basis": "network", "base": "masses", "epochs": 1, "num_masses": 60, "form": form}
    )
    hat = noisy(scores, 0.4, 1)
    partner = noisy(scores, 0.4, 2) if form == "plain" else None
    field = fit_potential(hat, w, settings, seed=1, ball=BALL, partner=partner)
    assert abs(gain(field)[0]) < 0.03
    if form == "plain":
        assert gain(fit_potential(hat, w, settings, seed=1, ball=BALL))[0] < -0.08


def test_the_disk_keeps_masses(stars, tmp_path):
    w, scores = stars
    field = fit_potential(scores, w, MASSES, seed=1, ball=BALL)
    save(field, tmp_path / "field")
    loaded = load_field(tmp_path / "field")
    x = places()[:20].reshape(4, 5, 3)
    for name in ("acceleration", "potential", "mass_density"):
        torch.testing.assert_close(getattr(loaded, name)(x), getattr(field, name)(x), rtol=0, atol=0)
    assert loaded.statistics == field.statistics


def test_bad_input(stars):
    w, scores = stars
    with pytest.raises(GalrayError, match="stars for 200 masses"):
        fit_potential(scores[:300], w[:300], MASSES, seed=1, ball=BALL)
    with pytest.raises(GalrayError, match="wrong sign"):
        fit_potential(scores * 0.0, w, MASSES, seed=1, ball=BALL)
    with pytest.raises(GalrayError, match="partner scores"):
        fit_potential(scores, w, MASSES, seed=1, ball=BALL, partner=scores[:10])
    with pytest.raises(ValueError, match="basis = 'masses'"):
        PotentialSettings(basis="spline", base="masses")
