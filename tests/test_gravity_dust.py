"""Φ and ε together: exact f and ε in every variant, bounds, degeneracy, and wrong use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks._dust_exact import quadrature
from benchmarks._dust_limit import least_errors
from galray.errors import GalrayError
from galray.gravity import (
    DustSettings,
    Efficiency,
    Moments,
    MomentsSettings,
    Region,
    StarCounts,
    efficiency_map,
    fit_dust,
    identifiability,
    load_field,
    log_corrected,
    save_field,
    sky_map,
)
from galray.mocks import DustMap, HernquistSphere, PlummerSphere
from galray.mocks import DustSettings as MockDust
from galray.phasespace import ExactModel
from galray.units import G

BALL = Region((0.0, 0.0, 0.0), 4.0)
SPHERE = PlummerSphere(1.0 / G, 1.0)
EXACT = {
    "potential_basis": "Rz",
    "num_potential_splines": (12, 17),
    "concentration": (2.5, 2.5),
    "selection_basis": "Rz",
    "num_selection_splines": (12, 17),
    "selection_concentration": (2.0, 2.0),
    "penalty": 1e-9,
}


def log_epsilon(x):
    """A smooth selection with a thin layer's flattening; 0 at the centre."""
    r2 = x[..., 0] ** 2 + x[..., 1] ** 2
    return -1.6 * r2 / (4 + r2) * torch.exp(-(x[..., 2] ** 2) / 4)


def gradient(function, x):
    x = x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(function(x).sum(), x)
    return found


def seen_stars(sphere, n, seed=1, selection=log_epsilon):
    """Stars of a sphere in the ball as seen through ε, exactly."""
    w = sphere.sample(6 * n, seed)
    w = w[w[:, :3].norm(dim=1) < BALL.radius]
    chance = torch.rand(len(w), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w = w[chance < selection(w[:, :3]).exp()]
    assert len(w) >= n
    return w[:n]


def places(n=1500, low=0.3, high=3.0, seed=2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    return torch.from_numpy(x / np.linalg.norm(x, axis=1)[:, None] * rng.uniform(low, high, (n, 1)))


def acceleration_error(field, sphere=SPHERE):
    x = places()
    truth = sphere.potential_field.acceleration(x)
    return float(((field.acceleration(x) - truth).norm(dim=1) / truth.norm(dim=1)).square().mean().sqrt())


def log_observed(x):
    return torch.log(SPHERE.number_density(x)) + log_epsilon(x)


@pytest.fixture(scope="module")
def stars():
    return seen_stars(SPHERE, 30_000)


@pytest.fixture(scope="module")
def scores(stars):
    out = SPHERE.score(stars)
    out[:, :3] += gradient(log_epsilon, stars[:, :3])
    return out


@pytest.mark.parametrize("basis", ["spline", "network"])
def test_exact_scores_of_the_stars_seen(stars, scores, basis):
    settings = DustSettings(**EXACT, basis=basis, epochs=2)
    found = fit_dust(scores, stars, settings, seed=1, ball=BALL, check=False)
    assert acceleration_error(found) < 0.005
    x = places()
    difference = found.log_efficiency(x) - log_epsilon(x)
    assert float(difference.std()) < 0.02
    assert abs(float(difference.mean())) < 0.05  # the maximum lies at the centre: the convention fixes it
    assert float(found.log_efficiency(x).max()) <= 0
    truth = SPHERE.potential_field.mass_density(x)
    assert float(((found.mass_density(x) - truth) / truth).square().mean().sqrt()) < 0.1
    if basis == "network":
        validation = [row["validation"] for row in found.field.curve]
        assert min(validation) <= validation[0]


@pytest.mark.parametrize("basis", ["spline", "network"])
def test_exact_conditional_scores_need_no_density(stars, basis, tmp_path):
    """The scores of p(v|x) alone give Φ and the density before the dust."""
    conditional = SPHERE.score(stars)
    conditional[:, :3] -= gradient(lambda x: torch.log(SPHERE.number_density(x)), stars[:, :3])
    settings = DustSettings(**EXACT, variant="conditional", basis=basis, epochs=2, selection_amplitude=10.0)
    found = fit_dust(conditional, stars, settings, seed=1, ball=BALL, log_density=log_observed, check=False)
    assert acceleration_error(found) < 0.005
    x = places()
    density = found.log_density(x) - torch.log(SPHERE.number_density(x))
    assert float(density.std()) < 0.02
    assert float((found.log_efficiency(x) - log_epsilon(x)).std()) < 0.02
    save_field(found, tmp_path / "field")
    again = load_field(tmp_path / "field")
    torch.testing.assert_close(again.acceleration(x), found.acceleration(x))
    torch.testing.assert_close(again.log_density(x), found.log_density(x))
    torch.testing.assert_close(again.log_efficiency(x), found.log_efficiency(x), atol=3e-3, rtol=0)
    save_field(again, tmp_path / "once more")
    torch.testing.assert_close(
        load_field(tmp_path / "once more").log_efficiency(x), again.log_efficiency(x), atol=1e-12, rtol=0
    )
    # f_corr = f_obs/ε is the sphere's f, star by star
    corrected = log_corrected(lambda w: SPHERE.log_prob(w) + log_epsilon(w), again, stars[:2000])
    inside = stars[:2000, :3].norm(dim=1) < 3
    assert float((corrected - SPHERE.log_prob(stars[:2000]))[inside].std()) < 0.03
    silent = fit_dust(conditional, stars, settings, seed=1, ball=BALL, check=False)
    with pytest.raises(GalrayError, match="does not tell ε"):
        silent.log_efficiency(x)


CONDITIONAL_MOMENTS = DustSettings(
    variant="conditional",
    basis="moments",
    num_potential_splines=(6, 7),
    selection_basis="Rz",
    num_selection_splines=(6, 7),
    penalty=1e-2,
    selection_amplitude=10.0,
    max_bound_fraction=1.0,
)


def test_moments_of_the_conditional_variant():
    """Stars weighed to a smooth density tell Φ and n: the sphere behind ε, integrated exactly."""
    settings = CONDITIONAL_MOMENTS.model_copy(
        update={
            "num_potential_splines": (8, 11),
            "num_selection_splines": (8, 11),
            "concentration": (2.0, 2.0),
            "selection_concentration": (2.0, 2.0),
            "penalty": 1e-9,
            "max_stars": 10**7,
        }
    )
    ball = Region((0.0, 0.0, 0.0), 6.0)
    w, mass = quadrature(Moments(settings.splines(), ball), log_epsilon, ball)
    given = {"seed": 1, "ball": ball, "weights": mass, "check": False}
    found = fit_dust(None, w, settings, log_density=log_observed, **given)
    x = places(high=2.5)
    truth = SPHERE.potential_field.acceleration(x)
    error = (found.acceleration(x) - truth).norm(dim=1) / truth.norm(dim=1)
    assert float(error.square().mean().sqrt()) < 0.04  # these few splines
    assert float((found.log_density(x) - torch.log(SPHERE.number_density(x))).std()) < 0.02
    assert float((found.log_efficiency(x) - log_epsilon(x)).std()) < 0.02
    with pytest.raises(GalrayError, match="need the density"):
        fit_dust(None, w, settings, **given)
    with pytest.raises(ValueError, match="joint fit is"):
        DustSettings(variant="joint", basis="moments")


def test_any_smooth_density_of_the_weighed_stars_will_do():
    """What weighs the stars falls out of Φ and n: an n_obs that is off by a smooth factor changes n alone."""
    stars = seen_stars(SPHERE, 20_000)

    def found(slope):
        def off(x):
            return log_observed(x) + slope * x[..., 2].square()

        return fit_dust(None, stars, CONDITIONAL_MOMENTS, seed=1, ball=BALL, log_density=off, check=False)

    plain, tilted = found(0.0), found(0.1)
    x = places(high=2.0)
    a = plain.acceleration(x)
    assert float((tilted.acceleration(x) - a).norm() / a.norm()) < 0.08
    change = tilted.log_density(x) - plain.log_density(x)
    assert float((change - 0.1 * x[:, 2].square()).std()) < 0.05


def test_counts_limit_what_is_known_of_dust():
    """Without stars the error is the scatter of ε itself; it falls as stars are added."""
    dust = MockDust(
        extinction_mag_kpc=0.6, height_kpc=1e6, log_amplitude=0.8, outer_scale_kpc=4.0, cell_kpc=0.25
    )

    def limits(count):
        return least_errors(
            dust, lambda r: -2.5 * np.log1p(r**2), lambda r: np.exp(-r / 2), count, 4.0, step=0.2, degrees=3.0
        )

    none, few, many = limits(1e-3), limits(2**14), limits(2**18)
    x = places(200, low=1.5, high=1.500001)
    fields = [
        DustMap(dust.model_copy(update={"clouds": 0, "limit_mag": None}), (0, 0, 0), 4.0, i)
        for i in range(12)
    ]
    scatter = np.std([field.log_efficiency(x.numpy()) for field in fields])
    at = least_errors(
        dust,
        lambda r: np.where(abs(r - 1.5) < 0.11, 0.0, -15.0),
        lambda r: np.ones_like(r),
        1e-3,
        4.0,
        step=0.2,
    )[1]
    assert abs(at / scatter - 1) < 0.25
    assert none[0] > 2 * few[0] > 3 * many[0]
    assert many[1] < many[0]


def test_two_noisy_scores_are_less_biased_than_one(stars, scores):
    """Independent noise in two scores cancels in the product of their residuals."""
    rng = np.random.default_rng(0)
    size = scores.abs().median(0).values
    first, second = (scores + size * torch.from_numpy(rng.normal(size=scores.shape)) for _ in range(2))
    settings = DustSettings(
        basis="spline",
        selection_basis="Rz",
        num_selection_splines=(5, 5),
        num_potential_splines=(7, 9),
        concentration=(2.0, 2.0),
        max_bound_fraction=1.0,
    )
    x = places()
    truth = SPHERE.potential_field.acceleration(x)

    def strength(**partner):
        found = fit_dust(first, stars, settings, seed=1, ball=BALL, check=False, **partner)
        return float((found.acceleration(x) * truth).sum() / truth.square().sum())

    alone, crossed = strength(), strength(partner=second)
    assert alone < 0.9
    assert abs(crossed - 1) < 0.5 * abs(alone - 1)


def test_moments_by_quadrature():
    ball = Region((0.0, 0.0, 0.0), 6.0)
    settings = MomentsSettings(
        num_potential_splines=(12, 17),
        num_test_splines=(13, 21),
        concentration=(2.5, 2.5),
        selection="shared",
        num_selection_splines=(10, 11),
        selection_concentration=(1.0, 1.0),
        window=0.3,
    )
    moments = Moments(settings, ball)
    w, mass = quadrature(moments, log_epsilon, ball)
    found = moments.result([moments.sums(w, mass)], penalty=1e-9)
    x = places(high=2.5)
    truth = SPHERE.potential_field.acceleration(x)
    error = (found.potential.acceleration(x) - truth).norm(dim=1) / truth.norm(dim=1)
    assert float(error.square().mean().sqrt()) < 0.005
    log = found.selections["shared"].log_efficiency(x) - log_epsilon(x)
    assert float(log.std()) < 0.02
    # to know nothing of ε is wrong by far
    naive = Moments(MomentsSettings(num_potential_splines=(8, 11), num_test_splines=(9, 13)), ball)
    wrong = naive.solve([naive.sums(w, mass)], penalty=1e-9).acceleration(x)
    assert float(((wrong - truth).norm(dim=1) / truth.norm(dim=1)).square().mean().sqrt()) > 0.1


def test_selection_in_coordinates_of_its_own_and_monotone():
    """Φ in (R, z) and a log ε in (x, y, z) that falls with distance everywhere."""
    settings = MomentsSettings(
        num_potential_splines=(6, 7),
        num_test_splines=(7, 9),
        selection="shared",
        selection_basis="xyz",
        num_selection_splines=(5, 5, 5),
        velocity_functions=("v_R", "v_z", "v_R v_R v_R", "v_z v_z v_z", "1"),
        penalty=1e-3,
    )
    w = seen_stars(SPHERE, 20_000)
    free = Moments(settings, BALL).result([Moments(settings, BALL).sums(w)])
    bound = Moments(settings.model_copy(update={"selection_monotone": True}), BALL)
    held = bound.result([bound.sums(w)])
    x = places(300).numpy()

    def steepest(result):
        slope = result.selections["shared"].gradient(x)
        return float((slope * x / np.linalg.norm(x, axis=1)[:, None]).sum(1).max())

    assert steepest(free) > 0.05
    assert steepest(held) < 0.02
    assert held.potential.statistics["bound_nodes"] > 0


def test_bounds_of_a_fit_to_scores(stars, scores):
    """Noisy scores behind an ε that grows outwards: it may be kept from that, ρ from becoming negative."""
    rng = np.random.default_rng(1)
    rising = scores.clone()
    rising[:, :3] -= 2 * gradient(log_epsilon, stars[:, :3])
    noisy = rising + 0.2 * scores.abs().median(0).values * torch.from_numpy(rng.normal(size=scores.shape))
    options = {
        "basis": "spline",
        "num_potential_splines": (12, 17),
        "concentration": (2.5, 2.5),
        "selection_basis": "xyz",
        "num_selection_splines": (5, 5, 5),
        "penalty": 1e-10,
        "max_bound_fraction": 1.0,
    }

    def extremes(**bounds):
        settings = DustSettings(**options | bounds)
        found = fit_dust(noisy, stars, settings, seed=1, ball=BALL, check=False)
        x = places(400)
        rise = (found.selection.gradient(x) * x).sum(1) / x.norm(dim=1)
        return float(rise.max()), float(found.mass_density(x).min() / found.mass_density(x).max())

    rise, lightest = extremes()
    assert rise > 0.1
    assert lightest < -0.001
    held = extremes(monotone=True, positive_mass=True)
    assert held[0] < 0.2 * rise
    assert held[1] > 0.2 * lightest


def isothermal(n, seed=0, sigma=1.0):
    """Stars of f = exp(−E/σ²) in Φ = ½ k x², σ the same everywhere."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(size=(n, 3)) * 1.3, sigma * rng.normal(size=(n, 3))], 1)


def test_an_isothermal_tracer_is_told_and_refused():
    w = isothermal(30_000)
    told = identifiability(w, BALL)
    assert told.degenerate()
    assert told.worst.correlation > 0.99
    assert 0.8 < told.worst.dispersion < 1.2
    assert "isothermal" in str(told)
    assert told.pull[0] > 1  # another prior, another acceleration
    with pytest.raises(GalrayError, match="isothermal within the noise"):
        fit_dust(np.zeros_like(w), w, DustSettings(basis="spline"), seed=1, ball=BALL)


@pytest.mark.parametrize("sphere", [SPHERE, HernquistSphere(1.0 / G, 1.0)], ids=["plummer", "hernquist"])
def test_spheres_are_not_degenerate(sphere):
    told = identifiability(seen_stars(sphere, 40_000, seed=3), BALL)
    assert told.uncertainty < 0.1
    assert "A prior on ε three times as wide" in str(told)


def test_conventions_and_bounds_of_epsilon():
    def raw(x):
        return -0.5 * torch.as_tensor(x)[..., 0] + 2.0

    x = places()
    top = Efficiency(raw, BALL, "maximum")
    assert float(top.log_efficiency(x).max()) <= 0
    assert top.bound_fraction == 0
    sun = Efficiency(raw, BALL, "sun")
    assert float(sun.log_efficiency(torch.zeros(1, 3))[0]) == 0
    assert float(sun.efficiency(x).max()) == 1  # it never exceeds one: half of the ball is at the bound
    assert 0.3 < sun.bound_fraction < 0.6
    steep = Efficiency(lambda x: 20 * raw(x), BALL, "maximum", min_efficiency=0.01)
    assert float(steep.log_efficiency(x).min()) == pytest.approx(np.log(0.01))
    assert steep.bound_fraction > 0.5


def test_wrong_use(stars, scores):
    settings = DustSettings(**EXACT, basis="spline")
    with pytest.raises(GalrayError, match=r"stars within .* of the ball for 204 splines"):
        fit_dust(scores[:300], stars[:300], settings, seed=1, ball=BALL)
    with pytest.raises(GalrayError, match="does not know the ball"):
        fit_dust(scores, stars, settings, seed=1)
    with pytest.raises(GalrayError, match="or a model with score"):
        fit_dust(scores[:, :3], stars, settings, seed=1, ball=BALL, check=False)
    with pytest.raises(GalrayError, match="not finite"):
        fit_dust(scores * torch.nan, stars, settings, seed=1, ball=BALL, check=False)
    # the selection of these stars grows outwards where the convention says that it is 1 at the middle
    rising = scores.clone()
    rising[:, :3] -= 2 * gradient(log_epsilon, stars[:, :3])
    with pytest.raises(GalrayError, match="at its bounds"):
        fit_dust(
            rising,
            stars,
            settings.model_copy(update={"convention": "sun"}),
            seed=1,
            ball=BALL,
            check=False,
        )
    with pytest.raises(ValueError, match="conditional"):
        DustSettings(variant="conditional", monotone=True)
    assert ExactModel(SPHERE).kind == "exact"


def test_map_of_counts_finds_dust_that_no_fit_resolves():
    """A cloud on one side of an axisymmetric galaxy, from counts and a fit that knows no cloud."""
    center = (-8.0, 0.0, 0.0)
    ball = Region(center, 2.0)
    rng = np.random.default_rng(0)
    x = np.array(center) + 2 * (2 * rng.random((1_500_000, 3)) - 1)
    x = x[np.linalg.norm(x - center, axis=1) < 2]

    def cloud(x):
        return 1 - 0.7 * np.exp(-((x - np.array([-8.0, 1.0, 0.0])) ** 2).sum(1) / (2 * 0.4**2))

    seen = x[rng.random(len(x)) < cloud(x)]
    stars = StarCounts.of(seen[::2], ball) + StarCounts.of(seen[1::2], ball)
    assert stars.counts.sum() == len(seen)
    assert abs(stars.volume().sum() / (4 / 3 * np.pi * 2**3) - 1) < 0.01
    # what moments would find: the mean of ε over rings, which knows no azimuth
    whole = StarCounts(ball, 0.25, cloud(stars.centres.reshape(-1, 3)).reshape(stars.counts.shape))
    mean = np.log(whole.ring_mean(np.ones(whole.counts.shape)))
    corner = np.array([e[0] for e in stars.edges])
    found = efficiency_map(stars, lambda x: mean[tuple(((x - corner) / 0.25).astype(int).T)])
    good = (stars.counts >= 50) & (found.volume > 0.99 * 0.25**3) & np.isfinite(found.efficiency)
    truth = cloud(stars.centres[good])
    value = found.efficiency[good]
    assert np.corrcoef(value, truth)[0, 1] > 0.8
    assert good.sum() > 1000
    value = value / value.mean() * truth.mean()
    pull = (value - truth) / (truth * found.relative_error[good])
    assert 0.7 < pull.std() < 1.8
    # weighed, the stars are as many before and behind the cloud
    weights = stars.weights(seen)
    ahead = [weights[side].sum() for side in (seen[:, 1] > 0.2, seen[:, 1] < -0.2)]
    assert abs(ahead[0] / ahead[1] - 1) < 0.02
    assert (seen[:, 1] > 0.2).sum() < 0.97 * (seen[:, 1] < -0.2).sum()
    assert np.isfinite(found.loss_per_kpc()[good]).mean() > 0.9
    # each star seen stands for 1/ε of its cell
    share = log_corrected(lambda x: torch.zeros(len(x)), found, seen).exp()
    assert float(share.nansum()) == pytest.approx(np.nansum(found.corrected_counts()), rel=0.02)
    assert torch.isnan(log_corrected(lambda x: torch.zeros(len(x)), found, [[0.0, 0.0, 0.0]])).all()
    l_edges, b_edges, before = sky_map(seen, np.ones(len(seen)), center, 1.0, depth=0.4, step=30.0)
    assert before.shape == (len(l_edges) - 1, len(b_edges) - 1) == (12, 2)
    behind = before[np.searchsorted(l_edges, 90.0) - 1 : np.searchsorted(l_edges, 90.0) + 1]
    assert behind.mean() < 0.9 * before.mean()
    with pytest.raises(GalrayError, match="larger cells"):
        efficiency_map(StarCounts.of(seen[:20], ball), lambda x: np.zeros(len(x)))
