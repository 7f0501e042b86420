"""Mock dust: the integral along the line of sight, the spectrum, and the selection by magnitude."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from galray.frame import GalacticFrame
from galray.mocks import DustMap, DustSettings, ObserveSettings
from galray.mocks.observe import observe, observe_with_truth

SUN = np.array(GalacticFrame().sun_position)
COARSE = {"cell_kpc": 0.2}


@pytest.fixture(scope="module")
def dusty():
    return DustMap(DustSettings(**COARSE, limit_mag=13.0), SUN, 2.5, seed=3)


def places(n=400, seed=0, radius=2.4):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    return SUN + x / np.linalg.norm(x, axis=1)[:, None] * radius * np.cbrt(rng.random((n, 1)))


def test_a_smooth_layer_has_the_extinction_of_its_closed_form():
    plain = DustSettings(log_amplitude=0.0, clouds=0, height_kpc=0.3, cell_kpc=0.1)
    dust = DustMap(plain, (0.0, 0.0, 0.0), 1.5)
    x = 0.1 * np.random.default_rng(1).integers(-8, 9, (300, 3))  # nodes of the grid: no interpolation
    x = x[x[:, 2] != 0]
    path, height = np.linalg.norm(x, axis=1), np.abs(x[:, 2])
    # ∫ exp(−|z|/h) ds along a line that leaves the plane at a slope z/d
    expected = 0.7 * path * (0.3 / height) * (1 - np.exp(-height / 0.3))
    np.testing.assert_allclose(dust.extinction(x), expected, atol=1e-3)


def test_extinction_is_the_integral_of_the_density(dusty):
    x = SUN + 0.2 * np.random.default_rng(1).integers(-5, 6, (50, 3))  # nodes of the grid
    t = (np.arange(4000) + 0.5) / 4000
    path = SUN + t[None, :, None] * (x - SUN)[:, None]
    kappa = dusty.density(path.reshape(-1, 3)).reshape(50, -1)
    integral = kappa.mean(1) * np.linalg.norm(x - SUN, axis=1)
    np.testing.assert_allclose(dusty.extinction(x), integral, rtol=0.02, atol=0.01)
    assert kappa.min() > 0


def test_the_random_field_has_its_spectrum():
    settings = DustSettings(
        log_amplitude=0.9, spectrum_slope=3.0, outer_scale_kpc=1e6, clouds=0, cell_kpc=0.1
    )
    dust = DustMap(settings, (0.0, 0.0, 0.0), 2.0, seed=4)
    field = dust._field
    assert abs(field.std() - 0.9) < 1e-9
    power = np.abs(np.fft.fftn(field)) ** 2
    f = np.fft.fftfreq(len(field))
    k = np.sqrt(f[:, None, None] ** 2 + f[None, :, None] ** 2 + f[None, None, :] ** 2).ravel()
    shells = [(0.05, 0.1), (0.1, 0.2), (0.2, 0.4)]
    mean = [power.ravel()[(k > lo) & (k < hi)].mean() for lo, hi in shells]
    slopes = np.diff(np.log(mean)) / np.log(2)
    assert np.all(np.abs(slopes + 3.0) < 0.4)


def test_the_gradient_is_that_of_the_efficiency(dusty):
    x = places(30)
    along = np.random.default_rng(2).normal(size=(30, 3))
    step = 1e-3
    change = (dusty.log_efficiency(x + step * along) - dusty.log_efficiency(x - step * along)) / (2 * step)
    np.testing.assert_allclose((dusty.gradient(x) * along).sum(1), change, atol=2e-3)
    assert (dusty.log_efficiency(x) <= 0).all()


def test_the_same_dust_from_its_description(dusty):
    again = DustMap.from_dict(dusty.to_dict())
    np.testing.assert_array_equal(again.extinction(places(20)), dusty.extinction(places(20)))


def table(n, seed=0):
    rng = np.random.default_rng(seed)
    x = places(n, seed)
    w = np.hstack([x, rng.normal(0, 50, (n, 3))])
    columns = {name: w[:, i] for i, name in enumerate(("x", "y", "z", "vx", "vy", "vz"))}
    return pa.table({**columns, "abs_g_mag": np.full(n, 0.5), "bp_rp": np.full(n, 1.2)})


def test_stars_behind_dust_are_faint_red_and_missing(dusty):
    strict = DustMap(DustSettings(**COARSE, limit_mag=12.6), SUN, 2.5, seed=3)
    stars = table(20_000)
    seen, true = observe_with_truth(stars, ObserveSettings(noise_scale=0.0), 1, dust=strict)
    x = np.stack([true[c].to_numpy() for c in ("x", "y", "z")], 1)
    extinction = strict.extinction(x)
    distance = np.linalg.norm(x - SUN, axis=1)
    np.testing.assert_allclose(
        seen["phot_g_mean_mag"].to_numpy(), 0.5 + 10 + 5 * np.log10(distance) + extinction, atol=1e-5
    )
    np.testing.assert_allclose(seen["bp_rp"].to_numpy(), 1.2 + 0.5 * extinction, atol=1e-5)
    # as many of them as the probability says, near and far
    everyone = np.stack([stars[c].to_numpy() for c in ("x", "y", "z")], 1)
    chance = strict.probability(everyone, np.full(len(everyone), 0.5))
    for part in (chance < 0.3, chance > 0.7):
        expected = chance[part].sum()
        kept = np.isin(everyone[part, 0], x[:, 0]).sum()
        assert abs(kept - expected) < 4 * np.sqrt((chance * (1 - chance))[part].sum())
    assert 0.1 < seen.num_rows / len(everyone) < 0.9
    # without dust the table is what it was
    plain = observe(stars, ObserveSettings(noise_scale=0.0), 1)
    assert plain.num_rows == stars.num_rows


def test_a_selection_without_a_limit_is_the_light_that_passes():
    dust = DustMap(DustSettings(**COARSE), SUN, 2.5, seed=3)
    x = places(50)
    expected = 10 ** (-0.4 * np.maximum(dust.extinction(x), 0.0))
    np.testing.assert_allclose(dust.probability(x, np.zeros(50)), expected)
