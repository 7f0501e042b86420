"""Observables to 6D against astropy, the published example stars, and exact covariances."""

import numpy as np
import polars as pl
import pytest
import torch

from galray.catalog import (
    add_states,
    draw_observables,
    galactocentric,
    galactocentric_covariance,
    jacobian,
    state_expressions,
)
from galray.catalog.columns import CORRELATIONS, OBSERVABLES, STATE
from galray.frame import GalacticFrame


def observables(n=100_000, seed=1):
    rng = np.random.default_rng(seed)
    dec = np.degrees(np.arcsin(rng.uniform(-1, 1, n)))
    dec[:4] = [90.0, -90.0, 89.999999, -89.999999]
    return np.stack(
        [
            rng.uniform(0, 360, n),
            dec,
            rng.uniform(0.1, 20, n),
            rng.normal(0, 30, n),
            rng.normal(0, 30, n),
            rng.normal(0, 60, n),
        ],
        -1,
    )


def astropy_states(values, frame):
    from astropy import units as u
    from astropy.coordinates import ICRS, CartesianDifferential, Galactocentric

    star = ICRS(
        ra=values[:, 0] * u.deg,
        dec=values[:, 1] * u.deg,
        distance=1 / values[:, 2] * u.kpc,
        pm_ra_cosdec=values[:, 3] * u.mas / u.yr,
        pm_dec=values[:, 4] * u.mas / u.yr,
        radial_velocity=values[:, 5] * u.km / u.s,
    )
    galactic = Galactocentric(
        galcen_coord=ICRS(ra=frame.galcen_ra_deg * u.deg, dec=frame.galcen_dec_deg * u.deg),
        galcen_distance=frame.sun_galcen_distance_kpc * u.kpc,
        z_sun=frame.sun_height_kpc * u.kpc,
        galcen_v_sun=CartesianDifferential(np.array(frame.sun_velocity_km_s) * u.km / u.s),
        roll=frame.roll_deg * u.deg,
    )
    w = star.transform_to(galactic)
    return np.concatenate([w.cartesian.xyz.to_value(u.kpc), w.velocity.d_xyz.to_value(u.km / u.s)]).T


@pytest.mark.parametrize(
    "frame",
    [GalacticFrame(), GalacticFrame(8.3, -0.01, (11.1, 232.24, 7.25), 266.2, -29.1, 3.0)],
    ids=["default", "other"],
)
def test_states_equal_astropy(frame):
    values = observables()
    truth = astropy_states(values, frame)
    table = pl.DataFrame(values, schema=list(OBSERVABLES))
    expressions = table.select(state_expressions(frame)).select(STATE).to_numpy()
    scale = np.linalg.norm(truth[:, :3], axis=1)[:, None], np.linalg.norm(truth[:, 3:], axis=1)[:, None]
    for result in (
        expressions,
        add_states(table, frame).select(STATE).to_numpy(),
        galactocentric(values, frame),
        galactocentric(torch.tensor(values), frame).numpy(),
    ):
        assert np.max(np.abs(result - truth)[:, :3] / scale[0]) < 1e-9
        assert np.max(np.abs(result - truth)[:, 3:] / scale[1]) < 1e-9


def test_states_of_impossible_and_missing_observables():
    """As the expressions give them: missing stays missing, and the rest of the block is not harmed."""
    frame = GalacticFrame()
    table = pl.DataFrame(observables(50), schema=list(OBSERVABLES))
    odd = table.with_row_index().with_columns(
        ra=pl.when(pl.col("index") == 7).then(180.0).otherwise("ra"),
        dec=pl.when(pl.col("index") == 9).then(-90.0).otherwise("dec"),
        parallax=pl.when(pl.col("index") == 3).then(0.0).otherwise("parallax"),
        radial_velocity=pl.when(pl.col("index") != 5).then("radial_velocity"),
    )
    found = add_states(odd, frame)
    expected = odd.with_columns(state_expressions(frame))
    assert found["vx"].null_count() == 2
    assert found["vx"][5] is None
    assert found["x"][5] == pytest.approx(expected["x"][5], rel=1e-12)
    assert found["x"][3] is None, "infinitely far: no place"
    rest = ~found["index"].is_in([3, 5]).to_numpy()
    difference = (found.select(STATE).to_numpy() - expected.select(STATE).to_numpy())[rest]
    assert np.abs(difference).max() < 1e-9
    nearer = add_states(table, frame, pl.lit(-0.05), distance=None)
    assert np.allclose(nearer["x"], add_states(table, frame, -0.05)["x"], rtol=0, atol=0)
    given = add_states(table, frame, distance=1 / (pl.col("parallax") + 0.05))
    assert np.allclose(given.select(STATE), nearer.select(STATE), rtol=1e-12)


def test_zero_point_is_subtracted():
    values = observables(100)
    shifted = values.copy()
    shifted[:, 2] -= 0.03
    assert np.allclose(
        galactocentric(values - [0, 0, 0.06, 0, 0, 0], GalacticFrame(), -0.03),
        galactocentric(shifted, GalacticFrame()),
        rtol=1e-12,
    )


def test_published_example_stars(test_data):
    """100 DR3 stars with Galactocentric states from another code, in its frame (R0 = 8 kpc, z = 15 pc)."""
    table = pl.read_csv(test_data / "formats/trivnguyen_dr3_6d_100.csv")
    frame = GalacticFrame(8.0, 0.015, (11.1, 239.08, 7.25))
    values = table.select(OBSERVABLES).to_numpy()
    w = galactocentric(values, frame)
    # Theirs has no tilt of the plane by z_sun / R0, which is 2e-3 of the distance to the star.
    distance = 1 / values[:, 2:3]
    assert np.max(np.abs(w[:, :3] - table.select("x", "y", "z").to_numpy()) / distance) < 0.003
    x, v = w[:, :3], w[:, 3:]
    r, cyl = np.linalg.norm(x, axis=1), np.hypot(x[:, 0], x[:, 1])
    radial = np.sum(x * v, 1) / r
    azimuthal = (x[:, 0] * v[:, 1] - x[:, 1] * v[:, 0]) / cyl
    polar = (np.sum(x[:, :2] * v[:, :2], 1) * x[:, 2] / cyl - cyl * v[:, 2]) / r
    assert np.max(np.abs(radial - table["vr"].to_numpy())) < 1.5
    assert np.max(np.abs(azimuthal - table["vphi"].to_numpy())) < 1.5
    assert np.max(np.abs(polar - table["vtheta"].to_numpy())) < 1.5
    errors = np.zeros((len(table), 6))
    for i, name in ((2, "parallax_err"), (3, "pmra_err"), (4, "pmdec_err")):
        errors[:, i] = table[name].to_numpy()
    covariance = galactocentric_covariance(values, errors, np.zeros((len(table), 10)), frame)
    ours = np.sqrt(np.einsum("nii->ni", covariance)[:, :3])
    ratio = ours / table.select("x_err", "y_err", "z_err").to_numpy()
    assert np.all(np.abs(np.median(ratio, axis=0) - 1) < 0.05)


def test_jacobian_equals_finite_differences():
    values = observables(50, seed=3)[4:]
    frame = GalacticFrame()
    derivative = jacobian(values, frame)
    mas = 1 / 3.6e6
    step = np.array([2e3, 2e3, 1e-5, 1e-3, 1e-3, 1e-3])
    for i in range(6):
        shift = np.zeros_like(values)
        shift[:, i] = step[i] * (mas if i < 2 else 1)
        if i == 0:
            shift[:, 0] /= np.cos(np.radians(values[:, 1]))
        numeric = (galactocentric(values + shift, frame) - galactocentric(values - shift, frame)) / (
            2 * step[i]
        )
        size = np.abs(derivative[:, :, i]).max(0) + 1e-30
        assert np.max(np.abs(numeric - derivative[:, :, i]) / size) < 1e-5, OBSERVABLES[i]


def test_draws_have_the_errors_and_correlations_asked_for():
    n = 200_000
    values = np.tile([45.0, 60.0, 1.0, 5.0, -3.0, 20.0], (n, 1))
    errors = np.tile([0.02, 0.03, 0.05, 0.06, 0.07, 1.5], (n, 1))
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(5, 5)) + 2 * np.eye(5)
    covariance = factor @ factor.T
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / scale[:, None] / scale
    tens = np.tile(correlation[np.triu_indices(5, 1)], (n, 1))
    assert len(CORRELATIONS) == tens.shape[1]
    drawn = draw_observables(values, errors, tens, np.random.default_rng(5)) - values
    drawn[:, :2] *= 3.6e6
    drawn[:, 0] *= np.cos(np.radians(60.0))
    expected = np.zeros((6, 6))
    expected[:5, :5] = correlation
    expected[5, 5] = 1
    measured = drawn / errors
    assert np.max(np.abs(measured.mean(0))) < 5 / np.sqrt(n)
    assert np.max(np.abs(measured.T @ measured / n - expected)) < 8 / np.sqrt(n)


def test_first_order_covariance_equals_the_spread_of_draws():
    n = 100_000
    values = np.tile([200.0, -40.0, 2.0, 15.0, -20.0, 40.0], (n, 1))
    errors = np.tile([0.02, 0.03, 0.02, 0.03, 0.03, 0.5], (n, 1))
    tens = np.tile(np.linspace(-0.4, 0.4, 10), (n, 1))
    w = galactocentric(draw_observables(values, errors, tens, np.random.default_rng(1)), GalacticFrame())
    expected = galactocentric_covariance(values[:1], errors[:1], tens[:1], GalacticFrame())[0]
    sigma = np.sqrt(np.diag(expected))
    difference = (np.cov(w.T) - expected) / sigma[:, None] / sigma
    assert np.max(np.abs(difference)) < 0.03


def test_inconsistent_correlations_still_give_finite_draws():
    values = np.tile([10.0, 0.0, 1.0, 0.0, 0.0, 0.0], (100, 1))
    tens = np.full((100, 10), -0.9)  # five numbers cannot all be anticorrelated like this
    drawn = draw_observables(values, np.ones((100, 6)), tens, np.random.default_rng(0))
    assert np.isfinite(drawn).all()
