"""Mock dwarfs: the Gaia Challenge's truth, its own file of stars, and what is seen from Earth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from galray.errors import GalrayError
from galray.mocks import GAIA_CHALLENGE, DwarfMock, DwarfObserveSettings, gaia_challenge, observe_dwarf
from galray.potentials import DoublePowerLaw
from galray.units import K_PROPER_MOTION, G


@pytest.fixture(scope="module")
def core():
    return gaia_challenge("PlumCoreOm")


@pytest.fixture(scope="module", params=GAIA_CHALLENGE)
def model(request):
    return gaia_challenge(request.param)


@pytest.mark.parametrize(
    ("name", "density", "mass"),
    [
        ("PlumCoreOm", (3.005e8, 2.048e8, 1.185e8, 5.000e7), (1.351e6, 1.580e7, 8.332e7, 3.425e8)),
        ("NonPlumCuspIso", (5.289e8, 1.638e8, 5.689e7, 1.600e7), (3.540e6, 1.861e7, 5.801e7, 1.553e8)),
    ],
)
def test_haloes_are_those_of_the_challenge(name, density, mass):
    mock = gaia_challenge(name)
    r = np.array([0.1, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(mock.density(r), density, rtol=5e-4)
    np.testing.assert_allclose(mock.mass(r), mass, rtol=5e-4)
    core = mock.halo.gamma == 0
    slope = -3 * r / (1 + r) if core else -1 - 2 * r / (1 + r)
    np.testing.assert_allclose(mock.slope(r), slope, rtol=1e-9)


def test_dispersion_and_radius_of_the_challenge(core):
    assert core.half_light_radius == pytest.approx(0.245, abs=0.001)
    assert core.density(np.array(0.15)) == pytest.approx(2.63e8, rel=1e-3)
    w = core.sample(50_000, 3).numpy()
    assert w[:, 5].std() == pytest.approx(13.88, abs=0.15)


def test_the_stars_are_the_challenges_own(core, test_data):
    from scipy import stats

    folder = test_data / "gaia_challenge" / "PlumCoreOm"
    stem = "gs010_bs050_rcrs025_rarc100_core_0400mpc3_df_10000_0"
    for suffix, error in ((".dat", 0.0), ("_err.dat", 2.0)):
        theirs = np.loadtxt(folder / (stem + suffix))
        ours = core.sample_noisy(10_000, 11, velocity_error=error).numpy()
        for a, b in zip(shapes(theirs), shapes(ours), strict=True):
            assert stats.ks_2samp(a, b).pvalue > 0.01
    clean = np.loadtxt(folder / (stem + ".dat"))
    r, v_r, v_t, _ = shapes(clean)
    virial = G * core.mass(r) / r
    square = v_r**2 + v_t**2
    error = (square - virial).std() / math.sqrt(len(r))
    assert abs((square - virial).mean()) < 3 * error
    assert square.mean() == pytest.approx(573.5, abs=0.1)
    assert virial.mean() == pytest.approx(576.3, abs=0.1)


def shapes(w):
    r = np.linalg.norm(w[:, :3], axis=1)
    v_r = (w[:, :3] * w[:, 3:]).sum(1) / r
    return r, v_r, np.sqrt((w[:, 3:] ** 2).sum(1) - v_r**2), np.hypot(w[:, 0], w[:, 1])


def test_projections_are_those_of_the_samples(model):
    w = model.sample(40_000, 5).numpy()
    R, v = np.hypot(w[:, 0], w[:, 1]), w[:, 5]
    edges = model.half_light_radius * np.array([0.0, 0.4, 0.8, 1.3, 2.5])
    expected = np.diff(model.projected_fraction(np.maximum(edges, 1e-6)))
    counts = np.histogram(R, edges)[0] / len(R)
    np.testing.assert_allclose(counts, expected, atol=4 * np.sqrt(0.25 / len(R)))
    # Σ against the derivative of the curve of growth
    radius, h = edges[1:], 1e-4
    growth = model.projected_fraction(radius * (1 + h)) - model.projected_fraction(radius * (1 - h))
    np.testing.assert_allclose(model.surface_density(radius), growth / (4 * np.pi * radius**2 * h), rtol=1e-5)
    for low, high in itertools.pairwise(edges):
        inside = (low < R) & (high > R)
        square = (v[inside] / model.sigma_los(R[inside])) ** 2
        assert abs(square.mean() - 1) < 4 * square.std() / math.sqrt(inside.sum())
    r = np.linalg.norm(w[:, :3], axis=1)
    a = -np.asarray(model.sphere.potential_field.acceleration(w[:, :3]))
    virial = (w[:, 3:] ** 2).sum(1) - (w[:, :3] * a).sum(1)
    assert abs(virial.mean()) < 4 * virial.std() / math.sqrt(len(r))


def test_noise_is_added_to_the_same_stars(core):
    quiet, noisy = (core.sample_noisy(5000, 4, velocity_error=e).numpy() for e in (0.0, 2.0))
    np.testing.assert_array_equal(quiet[:, :3], noisy[:, :3])
    assert (noisy - quiet)[:, 3:].std(0) == pytest.approx(2.0, rel=0.05)


def test_stars_with_mass():
    stars = DoublePowerLaw(1.0, 0.3, 2, 5, 0.2)
    mock = DwarfMock(stars, DoublePowerLaw(1e8, 1.0, 1, 3, 0), stellar_mass=2e7)
    r = np.array([50.0])
    pull = -np.asarray(mock.sphere.potential_field.acceleration([[50.0, 0, 0]]))[:, 0] * r**2 / G
    np.testing.assert_allclose(pull - mock.mass(r), 2e7, rtol=1e-3)


def test_unknown_model():
    with pytest.raises(GalrayError, match="no Gaia Challenge model 'Fornax'"):
        gaia_challenge("Fornax")


def test_seen_from_earth(core):
    settings = DwarfObserveSettings(
        ra_deg=359.9,
        dec_deg=-49.0,
        distance_kpc=80.0,
        systemic_velocity_km_s=-120.0,
        pmra_mas_yr=0.3,
        pmdec_mas_yr=-0.4,
        foreground_fraction=0.3,
        foreground_velocity_km_s=-80.0,
        foreground_dispersion_km_s=40.0,
        velocity_error_spread=0.3,
        proper_motion_error_mas_yr=0.005,
        field_radius_deg=1.5,
    )
    table = observe_dwarf(core, 20_000, settings, 6)
    t = {name: table[name].to_numpy() for name in table.column_names}
    member = t["is_member"]
    assert 1 - member.mean() == pytest.approx(0.3, abs=1e-4)
    offset = (t["ra"] - settings.ra_deg + 180) % 360 - 180
    east = np.radians(offset) * math.cos(math.radians(settings.dec_deg)) * settings.distance_kpc
    north = np.radians(t["dec"] - settings.dec_deg) * settings.distance_kpc
    R = np.hypot(east, north)
    assert np.median(R[member]) == pytest.approx(core.half_light_radius, rel=0.03)
    assert R.max() < 80 * math.radians(1.5) * 1.01
    # the velocity field tilts along the proper motion: Δv = K (μ · offset)
    tilt = np.linalg.lstsq(
        np.stack([np.ones(member.sum()), east[member], north[member]], 1), t["v_los"][member], rcond=None
    )[0]
    assert tilt[0] == pytest.approx(-120.0, abs=0.5)
    spread = 14.0 / math.sqrt(member.sum()) / 0.25  # of one component of the tilt
    assert tilt[1] == pytest.approx(K_PROPER_MOTION * 0.3, abs=4 * spread)
    assert tilt[2] == pytest.approx(-K_PROPER_MOTION * 0.4, abs=4 * spread)
    for name, mean in (("pmra", 0.3), ("pmdec", -0.4)):
        assert np.median(t[name][member]) == pytest.approx(mean, abs=0.002)
        assert t[name][member].std() > 13.0 / (K_PROPER_MOTION * 80)
    # the probabilities are calibrated
    for low in (0.05, 0.3, 0.6, 0.9):
        some = (t["membership"] > low) & (t["membership"] < low + 0.3)
        error = math.sqrt(0.25 / some.sum())
        assert t["membership"][some].mean() == pytest.approx(member[some].mean(), abs=4 * error + 0.02)
    again = observe_dwarf(core, 20_000, settings, 6)
    assert again.equals(table)


def test_an_empty_field_is_refused(core):
    with pytest.raises(GalrayError, match="none of 10 stars"):
        observe_dwarf(core, 10, DwarfObserveSettings(field_radius_deg=1e-4), 1)
