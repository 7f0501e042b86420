"""Observing a mock: exact inverse transformation, Gaia-like errors, identifiers and types."""

from __future__ import annotations

import csv
from importlib.resources import files

import hpgeom
import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.mocks import ObserveSettings
from galray.mocks.observe import (
    observables,
    observe,
    observe_with_truth,
    parallax_error,
    radial_velocity_error,
)

STATE = ("x", "y", "z", "vx", "vy", "vz")


def mock(n, seed=0):
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal((n, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    x = np.array(GalacticFrame().sun_position) + direction * rng.uniform(0.05, 4, (n, 1))
    w = np.hstack([x, rng.normal([0, 215, 0], [50, 40, 30], (n, 3))])
    return pa.table(
        {
            **{name: w[:, i] for i, name in enumerate(STATE)},
            "orbit_id": np.arange(n),
            "abs_g_mag": rng.uniform(-1, 1.5, n),
            "bp_rp": rng.normal(1.2, 0.1, n),
        }
    )


def states(table):
    return np.stack([table[name].to_numpy() for name in STATE], -1)


def to_galactocentric(seen):
    """The states by astropy, with the frame's numbers given one by one."""
    import astropy.coordinates as coord
    import astropy.units as u

    frame = GalacticFrame()
    galactocentric = coord.Galactocentric(
        galcen_coord=coord.ICRS(ra=frame.galcen_ra_deg * u.deg, dec=frame.galcen_dec_deg * u.deg),
        galcen_distance=frame.sun_galcen_distance_kpc * u.kpc,
        galcen_v_sun=coord.CartesianDifferential(frame.sun_velocity_km_s, unit=u.km / u.s),
        z_sun=frame.sun_height_kpc * u.kpc,
        roll=frame.roll_deg * u.deg,
    )
    sky = coord.SkyCoord(
        ra=seen["ra"] * u.deg,
        dec=seen["dec"] * u.deg,
        distance=(1 / np.asarray(seen["parallax"])) * u.kpc,
        pm_ra_cosdec=seen["pmra"] * u.mas / u.yr,
        pm_dec=seen["pmdec"] * u.mas / u.yr,
        radial_velocity=seen["radial_velocity"] * u.km / u.s,
        frame="icrs",
    ).transform_to(galactocentric)
    return np.hstack(
        [sky.cartesian.xyz.to_value(u.kpc).T, sky.velocity.d_xyz.to_value(u.km / u.s).T],
    )


def test_astropy_gives_the_states_back():
    w = states(mock(500))
    again = to_galactocentric(observables(w))
    np.testing.assert_allclose(again[:, :3], w[:, :3], rtol=0, atol=1e-9)
    np.testing.assert_allclose(again[:, 3:], w[:, 3:], rtol=0, atol=1e-9 * 220)


def test_no_noise_is_exact_but_for_gaias_single_precision_radial_velocity():
    table = mock(300)
    seen = observe(table, ObserveSettings(noise_scale=0, rv_missing_fraction=0), 1)
    columns = {name: seen[name].to_numpy() for name in ("ra", "dec", "parallax", "pmra", "pmdec")}
    again = to_galactocentric(
        {**columns, "radial_velocity": seen["radial_velocity"].to_numpy().astype(float)}
    )
    np.testing.assert_allclose(again[:, :3], states(table)[:, :3], rtol=0, atol=1e-9)
    np.testing.assert_allclose(again[:, 3:], states(table)[:, 3:], rtol=0, atol=1e-4)


def test_galactic_coordinates_agree_with_astropy():
    import astropy.coordinates as coord
    import astropy.units as u

    seen = observe(mock(200), ObserveSettings(), 1)
    sky = coord.SkyCoord(ra=seen["ra"].to_numpy() * u.deg, dec=seen["dec"].to_numpy() * u.deg)
    ours = coord.SkyCoord(l=seen["l"].to_numpy() * u.deg, b=seen["b"].to_numpy() * u.deg, frame="galactic")
    # Hipparcos' definition, which is Gaia's, and the FK5 one differ by some 0.04 arcsec
    assert sky.separation(ours).arcsec.max() < 0.1


def test_noise_has_the_reported_covariance():
    """The whitened residuals of all five parameters and of the radial velocity are unit normal."""
    table = mock(20_000)
    seen = observe(table, ObserveSettings(), 2)
    true = observables(states(table))
    names = ("ra", "dec", "parallax", "pmra", "pmdec")
    residual = np.stack([seen[name].to_numpy() - true[name] for name in names], -1)
    residual[:, 0] = (residual[:, 0] + 180) % 360 - 180
    residual[:, 0] *= np.cos(np.radians(true["dec"]))
    residual[:, :2] *= 3.6e6
    error = np.stack([seen[f"{name}_error"].to_numpy() for name in names], -1)
    correlation = np.empty((len(table), 5, 5))
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if i == j:
                correlation[:, i, i] = 1
            elif i < j:
                correlation[:, i, j] = correlation[:, j, i] = seen[f"{a}_{b}_corr"].to_numpy()
    assert 0.05 < np.abs(correlation[:, 0, 2]).mean() < 0.3
    away = np.abs(true["dec"]) < 85  # at the poles Δα cos δ is not linear
    white = np.linalg.solve(np.linalg.cholesky(correlation), (residual / error)[..., None])[away, :, 0]
    for i in range(5):
        assert stats.kstest(white[:, i], "norm").pvalue > 1e-4
    np.testing.assert_allclose(np.cov(white.T), np.eye(5), atol=0.04)
    velocity = seen.filter(seen["radial_velocity"].is_valid())
    pull = seen["radial_velocity"].to_numpy(zero_copy_only=False) - true["radial_velocity"]
    pull = pull / seen["radial_velocity_error"].to_numpy(zero_copy_only=False)
    assert stats.kstest(pull[np.isfinite(pull)], "norm").pvalue > 1e-4
    assert len(velocity) == np.isfinite(pull).sum()


def test_noise_scale_scales_noise_and_errors():
    one = observe(mock(2000), ObserveSettings(rv_missing_fraction=0), 3)
    half = observe(mock(2000), ObserveSettings(rv_missing_fraction=0, noise_scale=0.5), 3)
    for name in ("parallax_error", "pmra_error", "radial_velocity_error"):
        np.testing.assert_allclose(half[name].to_numpy(), 0.5 * one[name].to_numpy(), rtol=1e-6)
    true = observables(states(mock(2000)))["parallax"]
    ratio = (half["parallax"].to_numpy() - true) / (one["parallax"].to_numpy() - true)
    np.testing.assert_allclose(ratio, 0.5, rtol=1e-4)


def test_error_formulas():
    np.testing.assert_allclose(
        parallax_error(np.array([8.0, 13.0])), 1e-3 * np.sqrt(40 + 126.79 + 0.7536), rtol=1e-3
    )
    assert parallax_error(np.array([15.0]))[0] == pytest.approx(1e-3 * np.sqrt(870))
    np.testing.assert_allclose(
        radial_velocity_error(np.array([8.0, 12.0, 14.0])), [0.147, 1.11, 6.12], atol=0.01
    )


def test_missing_radial_velocities_do_not_depend_on_place():
    seen = observe(mock(20_000), ObserveSettings(rv_missing_fraction=0.3), 4)
    absent = np.array(seen["radial_velocity"].is_null())
    assert absent.mean() == pytest.approx(0.3, abs=0.015)
    for name in ("b", "parallax", "phot_g_mean_mag"):
        values = seen[name].to_numpy()
        assert stats.ks_2samp(values[absent], values[~absent]).pvalue > 1e-4


def test_source_ids_encode_the_place_and_are_unique():
    seen = observe(mock(5000), ObserveSettings(), 5)
    ident = seen["source_id"].to_numpy()
    assert len(np.unique(ident)) == len(ident)
    pixel = hpgeom.angle_to_pixel(4096, seen["ra"].to_numpy(), seen["dec"].to_numpy(), nest=True, lonlat=True)
    np.testing.assert_array_equal(ident >> 35, pixel)
    assert sorted(seen["random_index"].to_pylist()) == list(range(5000))
    # two stars in one pixel get two numbers
    table = mock(1)
    twins = observe(pa.concat_tables([table] * 5), ObserveSettings(noise_scale=0), 5)["source_id"].to_numpy()
    assert len(set(twins)) == 5
    assert len(set(twins >> 35)) == 1


def test_columns_have_gaias_names_and_types():
    with files("galray.catalog").joinpath("data/gaia_dr3.csv").open() as file:
        gaia = {row["name"]: row["dtype"] for row in csv.DictReader(file)}
    seen = observe(mock(10), ObserveSettings(), 6)
    kinds = {"float": "float32", "double": "float64"}
    for field in seen.schema:
        ours = kinds.get(str(field.type), str(field.type))
        assert gaia[field.name].replace("boolean", "bool") == ours, field.name


def test_truth_has_the_same_order_and_a_selection_drops_stars():
    table = mock(8000)

    def efficiency(x):
        return np.where(x[:, 2] > 0, 1.0, 0.25)

    seen, truth = observe_with_truth(table, ObserveSettings(noise_scale=0), 7, selection=efficiency)
    assert seen["source_id"].equals(truth["source_id"])
    np.testing.assert_allclose(observables(states(truth))["ra"], seen["ra"], atol=1e-12)
    kept, above = states(truth)[:, 2] > 0, (states(table)[:, 2] > 0).sum()
    assert kept.sum() == above
    assert (~kept).sum() == pytest.approx(0.25 * (len(table) - above), rel=0.1)
    assert "orbit_id" in truth.column_names
    with pytest.raises(GalrayError, match="selection efficiency"):
        observe(table, ObserveSettings(), 7, selection=lambda x: np.full(len(x), 1.5))


def test_seed_and_bad_tables():
    assert observe(mock(50), ObserveSettings(), 8).equals(observe(mock(50), ObserveSettings(), 8))
    assert not observe(mock(50), ObserveSettings(), 8).equals(observe(mock(50), ObserveSettings(), 9))
    with pytest.raises(GalrayError, match="no column abs_g_mag"):
        observe(mock(5).drop_columns(["abs_g_mag"]), ObserveSettings(), 1)
    at_sun = mock(1).to_pydict()
    at_sun.update(zip("xyz", ([v] for v in GalacticFrame().sun_position), strict=True))
    with pytest.raises(GalrayError, match="Sun's own place"), np.errstate(divide="ignore", invalid="ignore"):
        observe(pa.table(at_sun), ObserveSettings(), 1)
