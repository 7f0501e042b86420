"""Posteriors of distances against brute-force quadrature, joined distances, and draws from both."""

import numpy as np
import polars as pl
import pytest

from galray.catalog import (
    CatalogSettings,
    EdsdPosterior,
    EdsdSettings,
    JoinedDistanceSettings,
    draw_observables,
    galactocentric,
    galactocentric_covariance,
    ingest,
)
from galray.catalog.columns import CORRELATIONS, ERRORS, OBSERVABLES
from galray.catalog.distances import length_scales, quantile_draws
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from tests.catalog_stars import stars

# Precise, middling, useless, zero and negative parallaxes; two peaks; a prior much shorter than the distance.
CASES = [
    (10.0, 0.02, 1.35),
    (1.0, 0.1, 1.35),
    (1.0, 0.4, 1.35),
    (0.3, 0.3, 0.8),
    (0.0, 0.5, 1.35),
    (-0.5, 0.3, 1.35),
    (-5.0, 0.5, 1.35),
    (5.0, 1.0, 1.35),
    (6.0, 1.1, 2.0),
    (0.05, 0.02, 0.3),
    (50.0, 12.0, 1.0),
]


def brute_force(parallax, error, length):
    """Mode, mean, sd and three quantiles from the sum over a million points."""
    u = np.linspace(np.log(1e-3), np.log(120 * length), 1_000_001)
    d = np.exp(u)
    log = 2 * u - d / length - 0.5 * ((parallax - 1 / d) / error) ** 2
    weight = np.exp(log + u - np.max(log + u))
    weight /= weight.sum()
    mean = np.sum(weight * d)
    below = np.cumsum(weight) - weight / 2
    quantiles = np.exp(np.interp([0.16, 0.5, 0.84], below, u))
    return d[np.argmax(log)], mean, np.sqrt(np.sum(weight * (d - mean) ** 2)), *quantiles


def test_posteriors_equal_brute_force():
    posterior = EdsdPosterior(*np.array(CASES).T)
    quantiles = [posterior.quantile(p) for p in (0.16, 0.5, 0.84)]
    for i, case in enumerate(CASES):
        mode, mean, sd, *truth = brute_force(*case)
        assert posterior.mode[i] == pytest.approx(mode, rel=3e-5), case
        assert posterior.mean[i] == pytest.approx(mean, rel=5e-5), case
        assert posterior.sd[i] == pytest.approx(sd, rel=1e-4), case
        assert [q[i] for q in quantiles] == pytest.approx(truth, rel=1e-5, abs=0.003 * sd), case


def test_random_posteriors_equal_brute_force():
    rng = np.random.default_rng(4)
    n = 40
    error = 10 ** rng.uniform(-2, 0.7, n)
    parallax = 1 / rng.gamma(3, 1.0, n) + error * rng.normal(size=n)
    length = rng.uniform(0.3, 2.5, n)
    posterior = EdsdPosterior(parallax, error, length)
    truth = np.array([brute_force(*case) for case in zip(parallax, error, length, strict=True)])
    assert np.allclose(posterior.mode, truth[:, 0], rtol=3e-5)
    assert np.allclose(posterior.mean, truth[:, 1], rtol=1e-4)
    assert np.allclose(posterior.sd, truth[:, 2], rtol=1e-3)
    assert np.max(np.abs(posterior.quantile(0.5) - truth[:, 4]) / truth[:, 2]) < 0.003


def test_mode_solves_the_published_cubic():
    """d³ / L − 2 d² + ϖ d / σ² − 1 / σ² = 0 (Bailer-Jones 2015, eq. 19)."""
    parallax, error, length = np.array(CASES).T
    d = EdsdPosterior(parallax, error, length).mode
    terms = np.array([d**3 / length, -2 * d**2, parallax * d / error**2, -1 / error**2])
    assert np.max(np.abs(terms.sum(0)) / np.abs(terms).max(0)) < 1e-9


def test_quantile_draws_have_the_posteriors_moments():
    n = 20_000
    posterior = EdsdPosterior(np.full(n, 0.6), np.full(n, 0.3), 1.35)
    drawn = posterior.quantile(np.random.default_rng(0).random(n))
    assert np.mean(drawn) == pytest.approx(posterior.mean[0], abs=4 * posterior.sd[0] / np.sqrt(n))
    assert np.std(drawn) == pytest.approx(posterior.sd[0], rel=0.03)
    assert posterior.quantile(0.0)[0] < 0.3 * posterior.mode[0] < posterior.quantile(1.0)[0]


def test_calibrated_on_stars_of_the_prior():
    """Stars dealt by the prior itself: their places in their posteriors are uniform."""
    rng = np.random.default_rng(8)
    d = rng.gamma(3, 1.0, 4000)
    error = 10 ** rng.uniform(-1.5, 0.3, 4000)
    posterior = EdsdPosterior(1 / d + error * rng.normal(size=4000), error, 1.0)
    for p in (0.1, 0.5, 0.9):
        share = np.mean(d < posterior.quantile(p))
        assert share == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 4000))


def test_length_scale_by_galactic_place(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("l_min,l_max,b_min,b_max,length_kpc\n0,360,-10,10,2.0\n90,180,-90,90,0.5\n")
    settings = EdsdSettings(length_kpc=1.0, table=str(path))
    from astropy import units as u
    from astropy.coordinates import SkyCoord

    rng = np.random.default_rng(2)
    ra, dec = rng.uniform(0, 360, 500), np.degrees(np.arcsin(rng.uniform(-1, 1, 500)))
    place = SkyCoord(ra * u.deg, dec * u.deg).galactic
    wanted = np.where(
        np.abs(place.b.deg) <= 10, 2.0, np.where((place.l.deg >= 90) & (place.l.deg < 180), 0.5, 1)
    )
    assert np.array_equal(length_scales(settings, ra, dec), wanted)
    path.write_text("l_min,l_max\n0,1\n")
    with pytest.raises(GalrayError, match=r"edsd\.table.*b_min"):
        length_scales(settings, ra, dec)


def table_with_negative_parallaxes(n=600):
    rng = np.random.default_rng(12)
    d = rng.gamma(3, 1.0, n)
    error = rng.uniform(0.05, 0.8, n)
    return stars(n, rv_fraction=1.0).with_columns(
        parallax=pl.Series(1 / d + error * rng.normal(size=n)), parallax_error=pl.Series(error)
    )


def test_edsd_from_files_to_draws(tmp_path):
    table = table_with_negative_parallaxes()
    table.write_parquet(tmp_path / "t.parquet")
    settings = CatalogSettings(
        files=(str(tmp_path / "t.parquet"),),
        num_shards=2,
        distance="edsd",
        edsd=EdsdSettings(length_kpc=1.0, estimate="mean"),
    )
    store = ingest(settings, tmp_path / "s")
    # No star is lost, though many parallaxes are negative.
    assert (table["parallax"] < 0).sum() > 50
    assert store.row_account == {"rows_in": 600, "kept": 600}
    columns = ["parallax", "parallax_error", "distance", "distance_error", "x", "y", "z"]
    kept = store.table(columns)
    posterior = EdsdPosterior(kept["parallax"].to_numpy(), kept["parallax_error"].to_numpy(), 1.0)
    assert np.allclose(kept["distance"], posterior.mean, rtol=1e-4)
    assert np.allclose(kept["distance_error"], posterior.sd, rtol=1e-4)
    sun = np.array(store.frame.sun_position)
    far = np.linalg.norm(kept.select("x", "y", "z").to_numpy() - sun, axis=1)
    assert np.allclose(far, kept["distance"], rtol=1e-5)
    draws = [store.draw(seed) for seed in range(40)]
    assert all(draw.account["kept"] == 600 for draw in draws)
    drawn = np.array([np.linalg.norm(draw.states[:, :3] - sun, axis=1) for draw in draws])
    pull = (drawn.mean(0) - posterior.mean) / (posterior.sd / np.sqrt(40))
    assert abs(pull.mean()) < 4 / np.sqrt(600)
    assert np.median(drawn.std(0) / posterior.sd) == pytest.approx(1, abs=0.08)
    one = store.draw_errors(1, 3)
    assert np.array_equal(one.states, store.draw(3, [1]).states)


def test_draws_given_a_parallax_keep_the_correlations():
    """The mean of the proper motions follows the drawn parallax, their spread is what is left."""
    n = 40_000
    values = np.tile([120.0, 30.0, 1.0, 5.0, -3.0, 20.0], (n, 1))
    errors = np.tile([0.1, 0.1, 0.2, 0.3, 0.4, 1.0], (n, 1))
    tens = np.zeros((n, 10))
    tens[:, CORRELATIONS.index("parallax_pmra_corr")] = 0.6
    tens[:, CORRELATIONS.index("pmra_pmdec_corr")] = 0.3
    drawn = draw_observables(values, errors, tens, np.random.default_rng(1), np.full(n, 1.3))
    assert np.all(drawn[:, 2] == 1.3)
    assert np.mean(drawn[:, 3]) == pytest.approx(5 + 0.6 * 0.3 * 1.5, abs=4 * 0.3 / np.sqrt(n))
    assert np.std(drawn[:, 3]) == pytest.approx(0.3 * 0.8, rel=0.02)
    assert np.mean(drawn[:, 4]) == pytest.approx(-3, abs=4 * 0.4 / np.sqrt(n))
    assert np.cov(drawn[:, 3], drawn[:, 4])[0, 1] == pytest.approx(0.3 * 0.3 * 0.4, rel=0.05)


def test_parallaxes_drawn_from_their_own_error_give_the_joint_distribution():
    n = 60_000
    rng = np.random.default_rng(5)
    matrix = np.full((5, 5), 0.3) + 0.7 * np.eye(5)
    tens = np.tile(matrix[np.triu_indices(5, 1)], (n, 1))
    values, errors = np.tile([10.0, 0.0, 2.0, 1.0, 2.0, 3.0], (n, 1)), np.ones((n, 6))
    drawn = draw_observables(values, errors, tens, rng, 2.0 + rng.standard_normal(n))
    shift = drawn - values
    shift[:, :2] *= 3.6e6
    shift[:, 0] = (shift[:, 0] + 6.48e8) % 1.296e9 - 6.48e8
    assert np.allclose(np.cov(shift.T)[:5, :5], matrix, atol=0.03)


def test_covariance_with_a_distance_is_that_of_draws():
    n = 30_000
    frame = GalacticFrame()
    rng = np.random.default_rng(6)
    values = np.tile([200.0, -40.0, 0.8, 4.0, -6.0, 30.0], (n, 1))
    errors = np.tile([0.05, 0.05, 0.2, 0.05, 0.06, 1.5], (n, 1))
    tens = np.tile(rng.uniform(-0.3, 0.3, 10), (n, 1))
    distance, sd = 1.3, 0.01
    drawn = distance + sd * rng.standard_normal(n)
    w = galactocentric(draw_observables(values, errors, tens, rng, 1 / drawn), frame)
    ours = galactocentric_covariance(
        values[:1], errors[:1], tens[:1], frame, 0.0, np.array([distance]), np.array([sd])
    )[0]
    sampled = np.cov(w.T)
    scale = np.sqrt(np.outer(np.diag(ours), np.diag(ours)))
    assert np.max(np.abs(sampled - ours) / scale) < 0.05
    # A distance that is the parallax's own says nothing new.
    plain = galactocentric_covariance(values[:1], errors[:1], tens[:1], frame)
    same = galactocentric_covariance(
        values[:1], errors[:1], tens[:1], frame, 0.0, np.array([1 / 0.8]), np.array([0.2 / 0.64])
    )
    assert np.allclose(plain, same, rtol=1e-9)


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_joined_distances(tmp_path, form):
    table = stars(300, rv_fraction=1.0)
    table.write_parquet(tmp_path / "t.parquet")
    rng = np.random.default_rng(3)
    median = rng.uniform(200, 5000, 250)
    other = pl.DataFrame(
        {
            "source_id": table["source_id"][:250],
            "r_med_geo": median,
            "r_lo_geo": median * 0.9,
            "r_hi_geo": median * 1.2,
        }
    ).sample(fraction=1.0, shuffle=True, seed=1)
    path = tmp_path / f"bj.{form}"
    other.write_parquet(path) if form == "parquet" else other.write_csv(path)
    settings = CatalogSettings(
        files=(str(tmp_path / "t.parquet"),),
        num_shards=1,
        distance="joined",
        joined_distance=JoinedDistanceSettings(file=str(path), preset="bailer_jones_geo"),
    )
    store = ingest(settings, tmp_path / "s")
    assert store.row_account == {"rows_in": 300, "kept": 250, "cut:no_distance": 50}
    kept = store.table(["source_id", "distance", "distance_error", "x", "y", "z"])
    truth = kept.join(other, on="source_id")
    assert np.allclose(truth["distance"], truth["r_med_geo"] / 1000, rtol=1e-12)
    assert np.allclose(truth["distance_error"], 0.15 * truth["r_med_geo"] / 1000, rtol=1e-5)
    sun = np.array(store.frame.sun_position)
    far = np.linalg.norm(kept.select("x", "y", "z").to_numpy() - sun, axis=1)
    assert np.allclose(far, kept["distance"], rtol=1e-5)
    drawn = np.array([np.linalg.norm(store.draw(i).states[:, :3] - sun, axis=1) for i in range(60)])
    z = drawn / kept["distance"].to_numpy()
    assert np.mean(z < 0.9) == pytest.approx(0.16, abs=0.02)
    assert np.mean(z < 1.2) == pytest.approx(0.84, abs=0.02)
    assert store.manifest["auxiliary"]["catalog.joined_distance"].keys() == {path.name}


def test_quantile_draws():
    normal = np.random.default_rng(0).standard_normal(40_000)
    one = np.ones(40_000)
    drawn = quantile_draws(2 * one, 1.5 * one, 3 * one, normal)
    assert np.quantile(drawn, [0.1587, 0.5, 0.8413]) == pytest.approx([1.5, 2, 3], rel=0.02)
    assert drawn.min() > 0


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="joined_distance"):
        CatalogSettings(distance="joined")
    with pytest.raises(ValueError, match="preset"):
        JoinedDistanceSettings(file="x.parquet", median="a")
    stars(20).drop("parallax_error").write_parquet(tmp_path / "t.parquet")
    settings = CatalogSettings(files=(str(tmp_path / "t.parquet"),), distance="edsd")
    with pytest.raises(GalrayError, match="'parallax_error'"):
        ingest(settings, tmp_path / "s")
    assert len(ERRORS) == len(OBSERVABLES)
