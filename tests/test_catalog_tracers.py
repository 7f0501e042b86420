"""Tracer windows, extinction, completeness in the ball, and the built-in quality cuts."""

import math

import numpy as np
import polars as pl
import pytest

from galray.catalog import (
    TRACERS,
    BallSettings,
    CatalogSettings,
    CompletenessSettings,
    ExtinctionSettings,
    TracerSettings,
    ingest,
)
from galray.catalog.readers import open_source
from galray.catalog.tracers import grvs_from_colour
from galray.errors import GalrayError
from tests.catalog_stars import stars


@pytest.fixture
def catalogue(tmp_path):
    rng = np.random.default_rng(9)
    n = 3000
    table = stars(n, rv_fraction=1.0).with_columns(
        bp_rp=pl.Series(rng.uniform(-0.5, 3, n)),
        phot_g_mean_mag=pl.Series(rng.uniform(6, 15, n)),
        ag_gspphot=pl.Series(np.where(rng.random(n) < 0.2, np.nan, rng.uniform(0, 2, n))),
    )
    table = table.with_columns(
        ebpminrp_gspphot=0.5 * pl.col("ag_gspphot"),
        phot_rp_mean_mag=pl.col("phot_g_mean_mag") - 0.45 * pl.col("bp_rp"),
    )
    table.write_parquet(tmp_path / "t.parquet")
    return table


def run(tmp_path, name="s", **options):
    settings = CatalogSettings(files=(str(tmp_path / "t.parquet"),), num_shards=2, **options)
    return ingest(settings, tmp_path / name)


def magnitudes(table, zero_point=0.0):
    distance = 1 / (table["parallax"].to_numpy() - zero_point)
    return table["phot_g_mean_mag"].to_numpy() - 5 * np.log10(distance * 100), distance


@pytest.mark.parametrize("name", TRACERS)
def test_tracers_by_name(catalogue, tmp_path, name):
    store = run(tmp_path, tracer=name, parallax_zero_point=-0.03)
    window = TRACERS[name]
    m, _ = magnitudes(catalogue, -0.03)
    c = catalogue["bp_rp"].to_numpy()
    inside = (c >= window.colour_min) & (c < window.colour_max)
    inside &= (m >= window.magnitude_min) & (m < window.magnitude_max)
    assert {*store.table(["source_id"])["source_id"]} == {*catalogue.filter(inside)["source_id"]}
    assert store.row_account == {"rows_in": 3000, "kept": inside.sum(), "cut:tracer": (~inside).sum()}
    assert inside.sum() > 20


def test_extinction_is_subtracted(catalogue, tmp_path):
    own = TracerSettings(colour_max=1.4, magnitude_max=1.0)
    m, _ = magnitudes(catalogue)
    a = catalogue["ag_gspphot"].to_numpy()
    unknown = np.isnan(a)
    inside = (catalogue["bp_rp"].to_numpy() - np.nan_to_num(0.5 * a) < 1.4) & (m - np.nan_to_num(a) < 1)
    store = run(tmp_path, tracer=own, extinction=ExtinctionSettings())
    assert store.num_rows == inside.sum()
    assert store.manifest["notes"]["no_extinction"] == unknown.sum()
    strict = run(tmp_path, "strict", tracer=own, extinction=ExtinctionSettings(missing="cut"))
    assert strict.row_account == {
        "rows_in": 3000,
        "cut:no_extinction": unknown.sum(),
        "cut:tracer": (~inside & ~unknown).sum(),
        "kept": (inside & ~unknown).sum(),
    }


def test_complete_throughout_the_ball(catalogue, tmp_path):
    """A star is kept if, moved to the ball's farthest point, it is still brighter than the limit."""
    ball = BallSettings(radius_kpc=2.0, center_kpc=(-7.5, 0.0, 0.0))
    store = run(tmp_path, ball=ball, completeness=CompletenessSettings(limit=14.0))
    sun = np.array(store.frame.sun_position)
    farthest = 2.0 + math.dist(sun, (-7.5, 0, 0))
    _, distance = magnitudes(catalogue)
    seen = catalogue["grvs_mag"].to_numpy() + 5 * np.log10(farthest / distance) < 14.0
    assert store.row_account["cut:completeness"] == (~seen).sum()
    # For 4 kpc and a limit of 14 that is M_GRVS < 0.99.
    absolute = CompletenessSettings(limit=14.0, distance_max_kpc=4.0)
    kept = run(tmp_path, "four", completeness=absolute, keep_columns=("absolute_rvs_mag",))
    assert kept.table(["absolute_rvs_mag"])["absolute_rvs_mag"].max() < 14 - 5 * math.log10(400)
    m = catalogue["grvs_mag"].to_numpy() - 5 * np.log10(distance * 100)
    assert kept.num_rows == (m < 0.98970).sum()
    g = run(tmp_path, "g", completeness=CompletenessSettings(limit=15, band="g", distance_max_kpc=3))
    assert g.num_rows == (magnitudes(catalogue)[0] < 15 - 5 * math.log10(300)).sum()


def test_grvs_from_colour_is_that_of_real_stars(test_data):
    source = open_source(test_data / "formats/pyia/gdr3_sm.fits")
    columns = ["phot_g_mean_mag", "phot_rp_mean_mag", "grvs_mag"]
    table = pl.concat(source.batches(columns)).drop_nulls("grvs_mag")
    difference = table.select(grvs_from_colour() - pl.col("grvs_mag")).to_series()
    assert len(difference) > 15
    assert abs(difference.median()) < 0.05
    outside = pl.DataFrame({"phot_g_mean_mag": [10.0, 10.0], "phot_rp_mean_mag": [8.0, 10.5]})
    assert outside.select(grvs_from_colour()).to_series().null_count() == 2


def test_releases_without_grvs(catalogue, tmp_path):
    catalogue.drop("grvs_mag").write_parquet(tmp_path / "t.parquet")
    with pytest.raises(GalrayError, match=r"needs grvs_mag") as caught:
        run(tmp_path, completeness=CompletenessSettings(distance_max_kpc=1))
    assert "grvs_from_colour" in caught.value.remedy
    both = CompletenessSettings(distance_max_kpc=1.0, grvs_from_colour=True)
    store = run(tmp_path, "colour", completeness=both)
    x = 0.45 * catalogue["bp_rp"].to_numpy()
    rvs = catalogue["phot_rp_mean_mag"].to_numpy() - 0.0397 - 0.2852 * x - 0.0330 * x**2 - 0.0867 * x**3
    red = -4.0618 + 10.0187 * x - 9.0532 * x**2 + 2.6089 * x**3
    rvs = np.where(x > 1.2, catalogue["phot_rp_mean_mag"].to_numpy() + red, rvs)
    _, distance = magnitudes(catalogue)
    seen = (rvs - 5 * np.log10(distance) < 14) & (x >= -0.15) & (x <= 1.7)
    assert store.num_rows == seen.sum()


def test_built_in_cuts(tmp_path):
    rng = np.random.default_rng(0)
    n = 2000
    colour, g = rng.uniform(-0.3, 5, n), rng.uniform(8, 18, n)
    normal = np.where(
        colour < 0.5,
        1.154360 + 0.033772 * colour + 0.032277 * colour**2,
        1.162004 + 0.011464 * colour + 0.049255 * colour**2 - 0.005879 * colour**3,
    )
    normal = np.where(colour >= 4, 1.057572 + 0.140537 * colour, normal)
    sigma = 0.0059898 + 8.817481e-12 * g**7.618399
    z = rng.normal(0, 3, n)
    table = stars(n, rv_fraction=1.0).with_columns(
        bp_rp=pl.Series(colour),
        phot_g_mean_mag=pl.Series(g),
        phot_bp_rp_excess_factor=pl.Series(normal + z * sigma),
        non_single_star=pl.Series(rng.integers(0, 4, n).astype(np.int16)),
        duplicated_source=pl.Series(rng.random(n) < 0.2),
        visibility_periods_used=pl.Series(rng.integers(5, 30, n).astype(np.int16)),
        ipd_frac_multi_peak=pl.Series(rng.integers(0, 10, n).astype(np.int16)),
        astrometric_excess_noise_sig=pl.Series(rng.uniform(0, 4, n)),
    )
    table.write_parquet(tmp_path / "t.parquet")
    cuts = {
        "flux_excess": 3,
        "single_star": True,
        "not_duplicated": True,
        "visibility_periods": 8,
        "multi_peak": 6,
        "excess_noise_sig": 2,
        "rv_error": 2.5,
    }
    truth = {
        "flux_excess": np.abs(z) < 3,
        "single_star": (table["non_single_star"] == 0).to_numpy(),
        "not_duplicated": ~table["duplicated_source"].to_numpy(),
        "visibility_periods": (table["visibility_periods_used"] >= 8).to_numpy(),
        "multi_peak": (table["ipd_frac_multi_peak"] <= 6).to_numpy(),
        "excess_noise_sig": (table["astrometric_excess_noise_sig"] <= 2).to_numpy(),
        "rv_error": (table["radial_velocity_error"] < 2.5).to_numpy(),
    }
    account, left = {"rows_in": n}, np.ones(n, dtype=bool)
    for name, good in truth.items():
        account[f"cut:{name}"] = (left & ~good).sum()
        left &= good
    assert run(tmp_path, cuts=cuts).row_account == {**account, "kept": left.sum()}


def test_mistakes_are_named(catalogue, tmp_path):
    with pytest.raises(ValueError, match="at least one bound"):
        TracerSettings()
    with pytest.raises(ValueError, match="colour_min must be below"):
        TracerSettings(colour_min=2, colour_max=1)
    with pytest.raises(ValueError, match="completeness needs a ball"):
        CatalogSettings(completeness=CompletenessSettings())
    with pytest.raises(ValueError, match="name a tracer"):
        CatalogSettings(extinction=ExtinctionSettings())
    with pytest.raises(GalrayError, match=r"catalog\.extinction needs column 'a_v'"):
        run(tmp_path, tracer="red_clump", extinction=ExtinctionSettings(a_g="a_v"))
    catalogue.drop("phot_g_mean_mag").write_parquet(tmp_path / "t.parquet")
    with pytest.raises(GalrayError, match=r"catalog\.tracer needs column 'phot_g_mean_mag'"):
        run(tmp_path, tracer="red_clump")
