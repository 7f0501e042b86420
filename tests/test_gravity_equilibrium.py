"""Equilibrium: the stars' own tests, the field against itself and the Sun, what a disturbance costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.frame import cartesian, cylindrical
from galray.gravity import (
    Kernel,
    LeastSquaresField,
    Region,
    ahead_and_behind,
    curl_and_divergence,
    disturbance_error,
    solar_acceleration,
    stellar_tests,
    verdict,
)
from galray.gravity.disturbance import disturbances
from galray.mocks import BarredGalaxy, KickSettings, MilkyWay, MilkyWaySettings, PlummerSphere
from galray.mocks.orbits import MeridionalOrbits, energy, integrate
from galray.phasespace import ExactModel
from galray.units import KM_S2_PER_KPC_IN_M_S2, MYR


def steady_stars(n, seed):
    """Stars that obey the symmetries of a steady axisymmetric Galaxy, with what else such stars have."""
    rng = np.random.default_rng(seed)
    radius = 8.1 + 1.2 * rng.standard_normal(n)
    z = 0.4 * rng.standard_normal(n) * np.exp(0.3 * rng.standard_normal(n))
    v_phi = 225 + 25 * rng.standard_normal(n) - 15 * np.abs(z)
    v_radius, v_z = 40 * rng.standard_normal(n), (20 + 10 * np.abs(z)) * rng.standard_normal(n)
    v_radius += 0.3 * np.sign(z) * v_z  # a tilted ellipsoid: even under the flip
    c = np.stack([radius, 0.3 * rng.uniform(-1, 1, n), z, v_radius, v_phi, v_z], -1)
    return cartesian(c)


# The stars' own tests -------------------------------------------------------------------------------------


def test_steady_stars_pass_and_the_p_values_are_calibrated():
    p = [[t.p_value for t in stellar_tests(steady_stars(4000, s)).values()] for s in range(30)]
    assert np.min(p) > 1e-4
    # means of 30 uniform numbers
    np.testing.assert_allclose(np.mean(p, 0), 0.5, atol=4 * math.sqrt(1 / 12 / 30))


@pytest.mark.parametrize(
    ("name", "push"),
    [
        ("vertical", lambda c: c[:, 5] + 6 * np.sign(c[:, 0] - 8.1)),
        ("radial", lambda c: c[:, 3] + 6 * np.sin(2 * c[:, 0] * c[:, 4] / 200)),
        ("azimuth", lambda c: c[:, 4] + 6 * np.sign(c[:, 1])),
    ],
)
def test_each_motion_is_seen_by_its_own_test(name, push):
    c = cylindrical(steady_stars(20_000, 1))
    column = {"vertical": 5, "radial": 3, "azimuth": 4}[name]
    c[:, column] = push(c)
    tests = stellar_tests(cartesian(c))
    assert tests[name].p_value < 1e-4
    assert tests[name].amplitude > 3 * tests[name].amplitude_error
    others = [t.p_value for key, t in tests.items() if key != name]
    assert min(others) > 1e-4


def test_amplitude_does_not_depend_on_the_number_of_stars():
    def amplitude(n):
        c = cylindrical(steady_stars(n, 2))
        c[:, 3] += 12
        test = stellar_tests(cartesian(c))["radial"]
        return test.amplitude, test.amplitude_error

    (few, error), (many, _) = amplitude(5000), amplitude(40_000)
    assert abs(few - many) < 4 * error


def test_selection_does_not_matter_without_the_mirror():
    """Half of the northern stars are hidden by dust: the flip at each place stays, the mirror does not."""
    w = steady_stars(40_000, 3)
    rng = np.random.default_rng(4)
    seen = w[(w[:, 2] < 0) | (rng.random(len(w)) < 0.5)]
    assert stellar_tests(seen, mirror=False)["vertical"].p_value > 1e-3
    assert stellar_tests(seen)["vertical"].p_value < 1e-6


def test_redraws_take_off_the_bias_of_errors():
    """An error that shifts all v_R, as errors of distance do, is seen again in the redraw and taken off."""
    w = steady_stars(20_000, 5)

    def measured(states, seed):
        c = cylindrical(states)
        c[:, 3] += 5 + np.random.default_rng(seed).standard_normal(len(c))
        return cartesian(c)

    seen = measured(w, 6)
    again = measured(seen, 7)
    again[::50] = np.nan  # redraws that are no stars
    assert stellar_tests(seen)["radial"].p_value < 1e-6
    assert stellar_tests(seen, redraws=[again])["radial"].p_value > 1e-3


def test_mistakes_are_named():
    w = steady_stars(1000, 7)
    with pytest.raises(GalrayError, match="need 800"):
        stellar_tests(w[:100])
    with pytest.raises(GalrayError, match="row by row"):
        stellar_tests(w, redraws=[w[:10]])
    with pytest.raises(GalrayError, match=r"\(n, 6\)"):
        stellar_tests(w[:, :3])


# A kick ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def galaxy():
    return MilkyWay(MilkyWaySettings(num_stars=1000))


def plane_orbits(galaxy, n):
    orbits = galaxy.starting_orbits(galaxy.settings.thin_disc, n, np.random.default_rng(1))
    time = torch.full((n,), 0.02, dtype=torch.float64)
    return integrate(galaxy.potential, orbits, time, galaxy.longest_step(orbits))


def test_kicked_stars_are_the_share_asked_for_and_follow_their_orbits(galaxy):
    orbits = plane_orbits(galaxy, 1200)
    kick = KickSettings(fraction=0.10, velocity_km_s=20.0, time_myr=0.0)
    hit = galaxy.kicked(orbits, kick, np.random.default_rng(2))
    changed = (hit.state != orbits.state).any(1)
    share = 0.10 / 0.9  # of the discs' stars: the halo is not kicked
    assert float(changed.double().mean()) == pytest.approx(share, abs=4 * math.sqrt(share / 1200))
    torch.testing.assert_close(hit.state[changed, 3], orbits.state[changed, 3] + 20.0, rtol=0, atol=1e-9)
    later = galaxy.kicked(orbits, KickSettings(time_myr=200.0), np.random.default_rng(2))
    same = MeridionalOrbits(hit.state[changed], orbits.angular_momentum[changed])
    time = torch.full((len(same),), 200.0 / MYR, dtype=torch.float64)
    end = integrate(galaxy.potential, same, time, galaxy.longest_step(same) / 4)
    torch.testing.assert_close(later.state[changed], end.state, rtol=0, atol=0.05)
    before, after = (
        energy(galaxy.potential, o)
        for o in (same, MeridionalOrbits(later.state[changed], same.angular_momentum))
    )
    assert float((after / before - 1).abs().max()) < 1e-4


def test_a_kicked_galaxy_has_its_own_settings():
    with pytest.raises(ValueError, match=r"kick\.fraction"):
        MilkyWaySettings(kick=KickSettings(fraction=0.95))
    assert MilkyWaySettings().kick is None


# The field ------------------------------------------------------------------------------------------------


def test_curl_and_divergence_of_a_gradient_vanish():
    sphere = PlummerSphere(1e10, 2.0)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = curl_and_divergence(x, sphere.potential_field, Kernel())
    assert found["curl"] < 1e-4  # differences over 20 pc
    assert found["divergence"] < 1e-3
    least = LeastSquaresField(ExactModel(sphere), Region((0.0, 0.0, 0.0), 10.0), num_velocities=20)
    assert curl_and_divergence(x, least)["curl"] < 1e-4

    class Twisted:
        def acceleration(self, x):
            twist = torch.stack([x[:, 1], -x[:, 0], 0 * x[:, 0]], 1)
            return sphere.potential_field.acceleration(x) + 500 * twist

    assert curl_and_divergence(x, Twisted())["curl"] > 0.1


def test_ahead_and_behind_sees_a_bar():
    bar = BarredGalaxy().potential
    x = torch.tensor([[-8.1, 1.0, 0.3], [-7.0, 0.5, -0.5]], dtype=torch.float64)
    assert ahead_and_behind(x, bar)["relative"] > 0.05
    assert ahead_and_behind(x, bar.subset(["disc", "halo"]))["relative"] < 1e-12


def test_the_sun_against_the_rotation_curve_and_gaia():
    a = -(229.0**2) / 8.122
    found = solar_acceleration(a, 50.0, 8.122)
    assert found["ratio"] == pytest.approx(1.0)
    assert found["a_m_s2"] == pytest.approx(2.09e-10, rel=0.01)
    assert found["rotation"].p_value > 0.99
    assert 0.05 < found["gaia"].p_value < 0.5  # v_c of 229 km/s is 1.4 sigma low
    far = solar_acceleration(0.5 * a, 50.0, 8.122)
    assert far["rotation"].p_value < 1e-6
    mock = solar_acceleration(a, 50.0, 8.122, circular_velocity=(229.0, 0.0), gaia=None)
    assert "gaia" not in mock
    assert KM_S2_PER_KPC_IN_M_S2 == pytest.approx(3.2408e-14, rel=1e-4)


def test_the_verdict_quotes_what_failed():
    c = cylindrical(steady_stars(20_000, 8))
    fine = verdict(stellar=stellar_tests(cartesian(c)), solar=solar_acceleration(-6450.0, 100.0, 8.122))
    assert fine.level == "ok"
    assert "Consistent with equilibrium" in fine.sentence
    assert fine.numbers["acceleration at the Sun / (v_c²/R0)"] == pytest.approx(1, abs=0.02)
    c[:, 5] += 5
    broken = verdict(stellar=stellar_tests(cartesian(c)), figures={"residual": 0.2})
    assert broken.level == "fail"
    assert "vertical streaming" in broken.sentence
    assert broken.numbers["residual"] == 0.2


# What it costs --------------------------------------------------------------------------------------------


def test_disturbances_grow_with_the_signs_of_them_and_never_vanish():
    names = ["a_R", "a_z", "a_z", "rho", "rho_dm_average"]
    values = np.array([-6500.0, 1500.0, -1700.0, 0.09, 0.01])
    quiet = stellar_tests(steady_stars(40_000, 9))
    c = cylindrical(steady_stars(40_000, 9))
    c[:, 5] += 4
    loud = stellar_tests(cartesian(c))
    assert set(disturbances()) == {"disequilibrium", "non_axisymmetric"}
    small = disturbance_error(names, values, quiet, 40_000)
    large = disturbance_error(names, values, loud, 40_000)
    for name, entry in disturbances().items():
        assert entry["what"]
        assert (small[name] > 0).all()
        assert small[name][1] == small[name][2]
    assert (large["disequilibrium"] > 3 * small["disequilibrium"]).all()
    # as many stars with the same signs know the size of them better
    assert (
        disturbance_error(names, values, quiet, 400_000)["disequilibrium"] <= small["disequilibrium"]
    ).all()
