"""Potentials fitted to scores, and fields on disk."""

import json

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.gravity import (
    Kernel,
    LeastSquaresField,
    MeanField,
    PotentialField,
    PotentialSettings,
    Region,
    fit_potential,
    fit_spline_to_accelerations,
    load_field,
    save_field,
    smoothed_density,
)
from galray.mocks.spheres import PlummerSphere
from galray.phasespace import ExactModel
from galray.potentials import NFW, Composite, MiyamotoNagai

SPHERE = PlummerSphere(1e9, 1.0)
BALL = Region((0.0, 0.0, 0.0), 4.0)
SPLINE = PotentialSettings(
    basis="spline", form="instrument", base="xyz", base_splines=(9, 9, 9), concentration=(1.5, 1.5, 1.5)
)
NETWORK = SPLINE.model_copy(update={"basis": "network", "epochs": 2, "hidden": (32, 96)})


@pytest.fixture(scope="module")
def stars():
    w = SPHERE.sample(40_000, 5)
    w = w[w[:, :3].norm(dim=1) < 4.0]
    return w, SPHERE.score(w)


def places(n=3000):
    x = SPHERE.sample(n, 21)[:, :3]
    r = x.norm(dim=1)
    return x[(r > 0.4) & (r < 3.0)]


def rms(field, x=None):
    x = places() if x is None else x
    truth = SPHERE.potential_field.acceleration(x)
    return float(((field.acceleration(x) - truth).square().sum() / truth.square().sum()).sqrt())


@pytest.fixture(scope="module")
def fitted(stars):
    w, scores = stars
    return fit_potential(scores, w, NETWORK, seed=1, ball=BALL)


def test_exact_scores_leave_the_resolution_of_the_basis(stars, fitted):
    w, scores = stars
    spline = fit_potential(scores, w, SPLINE, seed=1, ball=BALL)
    assert rms(spline) < 0.03
    assert isinstance(fitted, PotentialField)
    assert rms(fitted) < rms(spline)  # the network learns what the spline misses
    assert min(c["validation"] for c in fitted.curve) < fitted.curve[0]["validation"]


def test_a_model_gives_the_same_as_its_scores(stars):
    w, scores = stars
    model = ExactModel(SPHERE)
    by_model = fit_potential(model, w, SPLINE, seed=1, ball=BALL)
    by_scores = fit_potential(scores, w, SPLINE, seed=1, ball=BALL)
    np.testing.assert_allclose(by_model.parameters, by_scores.parameters, rtol=1e-9)


def test_noise_in_the_score_biases_the_plain_form_more(stars):
    w, scores = stars
    rng = torch.Generator().manual_seed(2)
    noise = torch.randn(len(w), 6, generator=rng, dtype=torch.float64) * 0.5
    noisy = scores + torch.cat([noise[:, :3], noise[:, 3:] / 25.0], 1)
    x = places()
    truth = SPHERE.potential_field.acceleration(x)

    def bias(form):
        field = fit_potential(noisy, w, SPLINE.model_copy(update={"form": form}), seed=1, ball=BALL)
        return float(((field.acceleration(x) - truth) * truth).sum() / truth.square().sum())

    assert bias("plain") < -0.10
    assert abs(bias("instrument")) < 0.03


def test_the_mean_of_the_forms_is_one_field(tmp_path, stars):
    w, scores = (t[:5000] for t in stars)
    forms = [SPLINE.model_copy(update={"form": form}) for form in ("plain", "instrument", "stein")]
    each = [fit_potential(scores, w, form, seed=1, ball=BALL) for form in forms]
    mean = fit_potential(ExactModel(SPHERE), w, SPLINE.model_copy(update={"form": "mean"}), seed=1, ball=BALL)
    x = places(50)
    expected = torch.stack([field.acceleration(x) for field in each]).mean(0)
    torch.testing.assert_close(mean.acceleration(x), expected)
    save_field(mean, tmp_path)
    torch.testing.assert_close(load_field(tmp_path).mass_density(x), mean.mass_density(x))


def test_a_given_penalty_takes_the_place_of_the_chosen_one(stars):
    w, scores = stars

    def fitted_with(penalty):
        return fit_potential(scores, w, SPLINE.model_copy(update={"penalty": penalty}), seed=1, ball=BALL)

    chosen = fitted_with(None)
    again = fitted_with(chosen.penalty[0])
    np.testing.assert_array_equal(again.parameters, chosen.parameters)
    stiff = fitted_with(100.0)
    assert stiff.penalty == (100.0,) * 3
    rough = sum(stiff.basis.roughness())
    assert stiff.parameters @ rough @ stiff.parameters < 0.5 * chosen.parameters @ rough @ chosen.parameters


def test_the_network_is_one_potential(fitted):
    x = places(50)[:12]
    h = 1e-4
    numeric = torch.stack(
        [
            -(fitted.potential(x + h * e) - fitted.potential(x - h * e)) / (2 * h)
            for e in torch.eye(3, dtype=torch.float64)
        ],
        -1,
    )
    torch.testing.assert_close(fitted.acceleration(x), numeric, rtol=1e-5, atol=1e-3)
    steps = torch.eye(3, dtype=torch.float64) * 1e-3
    divergence = sum(
        (fitted.acceleration(x + e) - fitted.acceleration(x - e))[:, i] / 2e-3 for i, e in enumerate(steps)
    )
    from galray.units import G

    torch.testing.assert_close(
        fitted.mass_density(x), -divergence / (4 * torch.pi * G), rtol=1e-3, atol=1e-3 * 2.4e8
    )


def test_seed_decides(stars, fitted):
    w, scores = stars
    x = places(50)
    again = fit_potential(scores, w, NETWORK, seed=1, ball=BALL)
    other = fit_potential(scores, w, NETWORK, seed=2, ball=BALL)
    torch.testing.assert_close(again.acceleration(x), fitted.acceleration(x), rtol=1e-6, atol=1e-6)
    assert float((other.acceleration(x) - fitted.acceleration(x)).abs().max()) > 0


def test_a_ball_away_from_the_axis_learns_the_azimuth():
    """A potential with an azimuthal part, from accelerations and from exact scores of f = exp(−E/σ²)."""
    center = (-8.0, 0.0, 0.0)
    ball = Region(center, 2.0)
    sigma, v0 = 40.0, 200.0
    rng = torch.Generator().manual_seed(4)

    def potential(x):
        radius = torch.hypot(x[:, 0], x[:, 1])
        phi = torch.atan2(x[:, 1], -x[:, 0])
        return (
            v0**2 * torch.log(radius) + 5e3 * torch.log(torch.cosh(x[:, 2] / 0.4)) + 2e3 * torch.sin(2 * phi)
        )

    def acceleration(x):
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(potential(x).sum(), x)[0]

    x = (torch.rand(60_000, 3, generator=rng, dtype=torch.float64) - 0.5) * 4
    x = x[x.norm(dim=1) < 2.0] + torch.tensor(center)
    v = torch.randn(x.shape, generator=rng, dtype=torch.float64) * sigma
    a = acceleration(x)
    # any n(x) goes with this Maxwellian when only the estimating equation is tested: s = (a, −v)/σ²
    scores = torch.cat([a, -v], 1) / sigma**2
    settings = PotentialSettings(epochs=1, hidden=(32, 64), base="xyz", base_splines=(6, 6, 13))
    field = fit_potential(scores, torch.cat([x, v], 1), settings, seed=3, ball=ball)
    inner = x[(x - torch.tensor(center)).norm(dim=1) < 1.6][:2000]
    truth = acceleration(inner)
    error = field.acceleration(inner) - truth
    assert float((error.square().sum() / truth.square().sum()).sqrt()) < 0.02
    symmetric = settings.model_copy(update={"basis": "spline", "base": "Rz", "base_splines": ()})
    blind = fit_spline_to_accelerations(x, a, symmetric, ball)
    missed = (blind.acceleration(inner) - truth)[:, 1]
    assert float(missed.square().mean().sqrt()) > 10 * float(error[:, 1].square().mean().sqrt())


def test_positivity_removes_negative_mass(stars):
    w, scores = stars
    w, scores = w[:6000], scores[:6000]
    noise = torch.randn(len(w), 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noisy = scores + noise * torch.tensor([1.0, 1, 1, 0.04, 0.04, 0.04])
    update = {"epochs": 6, "base_splines": (7, 7, 7), "learning_rate": 1e-2}
    free = fit_potential(noisy, w, NETWORK.model_copy(update=update), seed=1, ball=BALL)
    bound = fit_potential(
        noisy, w, NETWORK.model_copy(update={**update, "positivity": 30.0}), seed=1, ball=BALL
    )
    x = w[:2000, :3]
    x = x[x.norm(dim=1) < 3.0]
    assert float(bound.mass_density(x).clamp_max(0).mean()) >= float(free.mass_density(x).clamp_max(0).mean())


def test_accelerations_become_a_stored_spline():
    field = Composite({"disc": MiyamotoNagai(6e10, 3.0, 0.3), "halo": NFW(1e12, 16.0)})
    ball = Region((-8.1, 0.0, 0.0), 3.0)
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x[x.norm(dim=1) < 3.0] + torch.tensor(ball.center)
    spline = fit_spline_to_accelerations(
        x, field.acceleration(x), PotentialSettings(base="xyz", base_splines=(6, 6, 13)), ball
    )
    inner = x[(x - torch.tensor(ball.center)).norm(dim=1) < 2.0]
    truth = field.acceleration(inner)
    assert float(((spline.acceleration(inner) - truth).square().sum() / truth.square().sum()).sqrt()) < 0.01
    with pytest.raises(GalrayError, match="accelerations for"):
        fit_spline_to_accelerations(x[:5], truth[:5], PotentialSettings(), ball)


@pytest.mark.parametrize("kind", ["network", "spline", "mean", "analytic"])
def test_fields_survive_the_disk(tmp_path, fitted, kind):
    field = {
        "network": fitted,
        "spline": fitted.base,
        "mean": MeanField([fitted, fitted.base], [1, 3]),
        "analytic": Composite({"halo": NFW(1e12, 16.0)}),
    }[kind]
    save_field(field, tmp_path / "field")
    loaded = load_field(tmp_path / "field")
    x = places(200)[:30]
    for name in ("acceleration", "potential", "mass_density"):
        torch.testing.assert_close(getattr(loaded, name)(x), getattr(field, name)(x), rtol=1e-12, atol=1e-12)
    kernel = Kernel((0.2, 0.2, 0.2), 2.0)
    torch.testing.assert_close(
        smoothed_density(loaded, x[:2], kernel), smoothed_density(field, x[:2], kernel), rtol=1e-9, atol=1e-9
    )
    assert type(loaded) is type(field)


def test_fields_that_cannot_be_stored_or_read(tmp_path, fitted):
    with pytest.raises(GalrayError, match="cannot be stored"):
        save_field(LeastSquaresField(ExactModel(SPHERE), BALL), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(GalrayError, match=r"no readable field\.json"):
        load_field(tmp_path / "nothing")
    save_field(fitted, tmp_path / "b")
    (tmp_path / "b" / "field.safetensors").write_bytes(b"broken")
    with pytest.raises(GalrayError, match="a broken field"):
        load_field(tmp_path / "b")
    (tmp_path / "b" / "field.json").write_text(json.dumps({"kind": "riddle"}))
    (tmp_path / "b" / "field.safetensors").unlink()
    with pytest.raises(GalrayError, match="riddle"):
        load_field(tmp_path / "b")


def test_bad_input(stars):
    w, scores = stars
    with pytest.raises(GalrayError, match="does not know the ball"):
        fit_potential(scores, w, SPLINE, seed=1)
    with pytest.raises(GalrayError, match=r"both must be \(n, 6\)"):
        fit_potential(scores[:10], w, SPLINE, seed=1, ball=BALL)
    with pytest.raises(GalrayError, match="for 729 splines"):
        fit_potential(scores[:500], w[:500], SPLINE, seed=1, ball=BALL)
    with pytest.raises(GalrayError, match="not finite"):
        fit_potential(scores * torch.nan, w, SPLINE, seed=1, ball=BALL)
    with pytest.raises(GalrayError, match="wrong sign"):
        fit_potential(scores * torch.tensor([1.0, 1, 1, -1, 1, 1]) * 0.0, w, SPLINE, seed=1, ball=BALL)


@pytest.mark.parametrize("form", ["plain", "instrument"])
def test_the_network_leaves_the_symmetry_of_its_base(stars, form):
    """Stars in an m = 2 force: the (R, z) base is blind to it, the network on it is not."""
    center = (-8.0, 0.0, 0.0)
    ball = Region(center, 2.0)
    rng = torch.Generator().manual_seed(4)
    x = (torch.rand(60_000, 3, generator=rng, dtype=torch.float64) - 0.5) * 4
    x = x[x.norm(dim=1) < 2.0] + torch.tensor(center)
    v = torch.randn(x.shape, generator=rng, dtype=torch.float64) * 40.0
    radius = torch.hypot(x[:, 0], x[:, 1])
    phi = torch.atan2(x[:, 1], -x[:, 0])
    a = -(200.0**2) * x / radius[:, None] ** 2 * torch.tensor([1.0, 1.0, 0.0])
    a[:, 2] = -3e3 * torch.tanh(x[:, 2] / 0.5)
    # Φ_2 = 2000 sin 2φ pulls along φ with −4000 cos 2φ / R
    along = torch.stack([x[:, 1], -x[:, 0], 0 * radius], 1) / radius[:, None]
    a = a - (4e3 * torch.cos(2 * phi) / radius)[:, None] * along
    scores = torch.cat([a, -v], 1) / 40.0**2
    settings = PotentialSettings(form=form, epochs=4)
    inner = (x - torch.tensor(center)).norm(dim=1) < 1.5
    truth = (a * along).sum(1)[inner]

    def missed(field):
        found = (field.acceleration(x[inner]) * along[inner]).sum(1)
        return float(((found - truth).square().mean() / truth.square().mean()).sqrt())

    w = torch.cat([x, v], 1)
    blind = fit_potential(scores, w, settings.model_copy(update={"basis": "spline"}), seed=3, ball=ball)
    assert missed(blind) == pytest.approx(1.0)
    assert missed(fit_potential(scores, w, settings, seed=3, ball=ball)) < 0.4
