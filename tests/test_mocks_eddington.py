"""Eddington-type distribution functions: against closed forms, quadrature, the Jeans equation and samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.mocks import EddingtonSphere, HernquistSphere, PlummerSphere
from galray.phasespace.protocols import PhaseSpaceModel
from galray.potentials import NFW, Composite, DoublePowerLaw, Isochrone, MiyamotoNagai, Plummer
from galray.units import G

CORE = DoublePowerLaw(4.0e8, 1.0, 1, 3, 0)
CUSP = DoublePowerLaw(6.4e7, 1.0, 1, 3, 1)
HOT = DoublePowerLaw(3.021516e7, 4.0, 1, 4, 0)

HEAVY = DoublePowerLaw(2e8, 0.4, 2, 5, 0.2)


def stars(gamma, r_s):
    return DoublePowerLaw(1.0, r_s, 2, 5, gamma)


CASES = {
    "isotropic": lambda: EddingtonSphere(stars(0.1, 0.25), CUSP),
    "osipkov-merritt": lambda: EddingtonSphere(stars(0.1, 0.25), CORE, r_a=0.25),
    "tangential": lambda: EddingtonSphere(stars(0.1, 1.75), HOT, beta=-0.5),
    "general tangential": lambda: EddingtonSphere(stars(1.0, 0.5), CUSP, beta=-0.7),
    "nearly half tangential": lambda: EddingtonSphere(stars(0.1, 0.5), CUSP, beta=-0.45),
    "radial": lambda: EddingtonSphere(stars(1.0, 0.5), CUSP, beta=0.25),
    "half radial": lambda: EddingtonSphere(stars(1.0, 0.5), CORE, beta=0.5),
    "cuddeford": lambda: EddingtonSphere(stars(1.0, 0.5), CUSP, beta=0.3, r_a=1.0),
    "with mass": lambda: EddingtonSphere(HEAVY, Composite({"halo": CORE, "stars": HEAVY}), r_a=0.8),
}


@pytest.fixture(scope="module", params=CASES)
def sphere(request):
    return CASES[request.param]()


@pytest.mark.parametrize(
    "known", [PlummerSphere(1e8, 0.5), HernquistSphere(1e8, 0.5)], ids=["plummer", "hernquist"]
)
def test_agrees_with_closed_forms(known):
    ours = EddingtonSphere(known.potential_field, known.potential_field)
    w = known.sample(3000, 1)
    torch.testing.assert_close(ours.log_prob(w), known.log_prob(w), rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.score(w), known.score(w), rtol=3e-5, atol=0)
    assert isinstance(ours, PhaseSpaceModel)


def velocity_moments(sphere, radius):
    """(∫f, ∫f v_r², ∫f v_t²) d³v at radii by quadrature over speed and direction, from `log_prob` alone."""
    t = np.arange(-3.0, 3.0, 0.05)  # tanh-sinh in the cosine: constant β is singular at radial directions
    cosine = np.tanh(0.5 * np.pi * np.sinh(t))
    sine = 1 / np.cosh(0.5 * np.pi * np.sinh(t))
    weight_c = 0.05 * 0.5 * np.pi * np.cosh(t) * sine**2
    node, weight_s = np.polynomial.legendre.leggauss(120)
    node, weight_s = 0.5 * (node + 1), 0.5 * weight_s
    out = []
    for r in radius:
        depth = -float(sphere.potential_field.potential([[r, 0.0, 0.0]])[0])
        limit = np.sqrt(2 * depth / (1 + sine**2 * (r / sphere.r_a) ** 2))
        speed = limit[:, None] * node
        v_r, v_t = speed * cosine[:, None], speed * sine[:, None]
        w = torch.zeros(*speed.shape, 6, dtype=torch.float64)
        w[..., 0], w[..., 3], w[..., 4] = r, torch.from_numpy(v_r), torch.from_numpy(v_t)
        f = 2 * np.pi * sphere.log_prob(w).exp().numpy() * speed**2
        f *= weight_c[:, None] * limit[:, None] * weight_s
        out.append([f.sum(), (f * v_r**2).sum(), (f * v_t**2).sum()])
    return np.array(out).T


def test_moments_are_the_density_and_the_jeans_solution(sphere):
    radius = sphere.profiles.half_mass_radius * np.array([0.01, 0.1, 0.4, 1.0, 3.0, 10.0])
    n, radial, tangential = velocity_moments(sphere, radius)
    x = torch.zeros(len(radius), 3, dtype=torch.float64)
    x[:, 0] = torch.from_numpy(radius)
    np.testing.assert_allclose(n, sphere.number_density(x), rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(radial / n), sphere.radial_dispersion(radius), rtol=1e-3)
    np.testing.assert_allclose(1 - tangential / (2 * radial), sphere.anisotropy(radius), atol=1e-3)


def test_the_dispersion_solves_the_jeans_equation(sphere):
    r = sphere.profiles.half_mass_radius * np.geomspace(0.03, 10, 40)
    h = 1e-4

    def pressure(radius):
        x = torch.zeros(len(radius), 3, dtype=torch.float64)
        x[:, 0] = torch.from_numpy(radius)
        return np.log(sphere.number_density(x).numpy() * sphere.radial_dispersion(radius) ** 2)

    slope = (pressure(r * math.exp(h)) - pressure(r * math.exp(-h))) / (2 * h)
    x = np.stack([r, 0 * r, 0 * r], -1)
    pull = -sphere.potential_field.acceleration(x)[:, 0].numpy()
    left = -(sphere.radial_dispersion(r) ** 2) * (slope + 2 * sphere.anisotropy(r))
    np.testing.assert_allclose(left, r * pull, rtol=1e-5)


def test_scores_are_gradients_and_solve_the_boltzmann_equation(sphere):
    w = sphere.sample(400, 5)
    score = sphere.score(w)
    step = torch.cat([1e-5 * w[:, :3].norm(dim=1, keepdim=True).expand(-1, 3), torch.full((400, 3), 2e-4)], 1)
    for i in range(6):
        shift = torch.zeros_like(w)
        shift[:, i] = step[:, i]
        numeric = (sphere.log_prob(w + shift) - sphere.log_prob(w - shift)) / (2 * step[:, i])
        good = torch.isfinite(numeric) & (
            (numeric - score[:, i]).abs() < 1e-3 * score.norm(dim=1) + 1e-3 * numeric.abs()
        )
        # a star at the edge of phase space (f → 0) or on a radial orbit has no smooth neighbourhood
        assert good.double().mean() > 0.985
    a = sphere.potential_field.acceleration(w[:, :3])
    streaming, pulling = (w[:, 3:] * score[:, :3]).sum(1), (a * score[:, 3:]).sum(1)
    assert (streaming + pulling).abs().max() < 1e-7 * streaming.abs().max()


def test_samples_follow_f(sphere):
    from scipy import stats

    n = 20_000
    w = sphere.sample(n, 7)
    x, v = w[:, :3], w[:, 3:]
    r = x.norm(dim=1)
    mass = sphere.tracer
    shells = np.geomspace(1e-3, 1e3, 4001) * sphere.profiles.half_mass_radius
    inside = shells**3 * np.asarray(mass.force_factors(torch.from_numpy(shells**2), torch.zeros(4001))[0]) / G
    cumulative = np.interp(r.log().numpy(), np.log(shells), inside / sphere.profiles.total)
    assert stats.kstest(cumulative, "uniform").pvalue > 1e-3
    v_r = (x * v).sum(1) / r
    sigma2 = torch.from_numpy(sphere.radial_dispersion(r.numpy())) ** 2
    within(v_r.square() / sigma2, 1.0)
    tangential = (v.square().sum(1) - v_r**2) / (2 * sigma2)
    within(tangential + torch.from_numpy(sphere.anisotropy(r.numpy())), 1.0)
    virial = v.square().sum(1) + (x * sphere.potential_field.acceleration(x)).sum(1)
    within(virial, 0.0)
    score = sphere.score(w)
    assert torch.isfinite(score).all()
    if sphere.beta <= 0.25:  # further out the score's own variance is infinite on radial orbits
        within((v * score[:, 3:]).sum(1), -3.0, sigmas=5)  # Stein: E[v ∂ᵥ ln f] = −3
    within(score[:, 3], 0.0, sigmas=5)


def within(values, truth, sigmas=4):
    error = float(values.std() / math.sqrt(len(values)))
    assert abs(float(values.mean()) - truth) < sigmas * error


def test_half_integer_and_general_inversions_join():
    w = CASES["tangential"]().sample(200, 3)
    for beta in (-0.5, 0.5, -1.5):
        tracer = stars(1.2, 1.75)
        exact = EddingtonSphere(tracer, HOT, beta=beta).log_prob(w)
        for step in (-1e-6, 1e-6):
            beside = EddingtonSphere(tracer, HOT, beta=beta + step).log_prob(w)
            torch.testing.assert_close(exact, beside, rtol=0, atol=1e-4)


def test_same_seed_same_stars():
    sphere = CASES["isotropic"]()
    assert torch.equal(sphere.sample(100, 4), sphere.sample(100, 4))
    assert not torch.equal(sphere.sample(100, 4), sphere.sample(100, 5))
    w = sphere.sample(50, 1)
    assert sphere.sample_velocity(w[:, :3].reshape(5, 10, 3), 7, 2).shape == (7, 5, 10, 3)


def test_unbound_states_have_no_density():
    sphere = CASES["osipkov-merritt"]()
    w = torch.tensor([[1.0, 0, 0, 0, 60.0, 0], [1.0, 0, 0, 1e3, 0, 0], [1.0, 0, 0, 3.0, 3.0, 0]])
    log_f = sphere.log_prob(w)
    assert log_f[0] == -torch.inf  # bound, but with more angular momentum than r_a allows
    assert log_f[1] == -torch.inf
    assert torch.isfinite(log_f[2])
    assert torch.isnan(sphere.score(w)[:2]).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EddingtonSphere(stars(0.1, 0.25), CORE, r_a=0.03), "f < 0"),
        (lambda: EddingtonSphere(stars(0.1, 0.25), CUSP, beta=0.4), "f < 0"),
        (lambda: EddingtonSphere(Plummer(1.0, 0.4), CUSP), "f < 0"),
        (lambda: EddingtonSphere(stars(0.1, 0.25), CORE, beta=1.0), "beta = 1.0"),
        (lambda: EddingtonSphere(stars(0.1, 0.25), CORE, r_a=0.0), "r_a = 0.0"),
        (lambda: EddingtonSphere(NFW(1e8, 1.0), CORE), "infinite mass"),
        (
            lambda: EddingtonSphere(stars(0.1, 0.25), DoublePowerLaw(1e8, 1, 1, 3, 2.0)),
            "infinite at its centre",
        ),
        (lambda: EddingtonSphere(stars(0.1, 0.25), MiyamotoNagai(1e8, 1, 0.3)), "not a sphere"),
    ],
    ids=[
        "too radial",
        "too radial at the centre",
        "core in a cusp",
        "beta",
        "r_a",
        "infinite tracer",
        "infinite centre",
        "disc",
    ],
)
def test_refuses_what_cannot_be(build, message):
    with pytest.raises(GalrayError, match=message):
        build()


def test_other_potentials_serve_too():
    sphere = EddingtonSphere(Plummer(1.0, 0.3), Isochrone(1e8, 0.6), beta=-0.25)
    w = sphere.sample(20_000, 2)
    x, v = w[:, :3], w[:, 3:]
    within(v.square().sum(1) + (x * sphere.potential_field.acceleration(x)).sum(1), 0.0)
