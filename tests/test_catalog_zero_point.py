"""The parallax zero point against the published package, and its use from files to draws."""

import numpy as np
import polars as pl
import pytest

from galray.catalog import CatalogSettings, ingest, parallax_zero_point, zero_point_expression
from galray.catalog.readers import open_source
from galray.catalog.zero_point import ZERO_POINT_COLUMNS
from galray.errors import GalrayError
from tests.catalog_stars import stars


def inputs(n, seed=0):
    """Stars within and a little beyond the formula's range, of both kinds of solution."""
    rng = np.random.default_rng(seed)
    solved = rng.choice([31, 95], n)
    return pl.DataFrame(
        {
            "phot_g_mean_mag": rng.uniform(5.5, 21.5, n),
            "nu_eff_used_in_astrometry": np.where(solved == 31, rng.uniform(1.05, 1.95, n), np.nan),
            "pseudocolour": np.where(solved == 95, rng.uniform(1.2, 1.8, n), np.nan),
            "ecl_lat": rng.uniform(-90, 90, n),
            "astrometric_params_solved": solved,
        }
    )


def both(table):
    values = [table[name].cast(pl.Float64).fill_null(np.nan).to_numpy() for name in ZERO_POINT_COLUMNS]
    ours = parallax_zero_point(*values)
    expression = table.select(zero_point_expression()).to_series().fill_null(np.nan).to_numpy()
    assert np.allclose(ours, expression, rtol=0, atol=1e-12, equal_nan=True)
    return values, ours


def test_equals_the_published_package():
    zpt = pytest.importorskip("zero_point", reason="gaiadr3-zeropoint is not installed").zpt
    zpt.load_tables()
    values, ours = both(inputs(30_000))
    theirs = zpt.get_zpt(*values, _warnings=False)
    assert np.isfinite(ours).all()
    # Theirs is rounded to a nanoarcsecond, and missing outside the range of colours.
    known = np.isfinite(theirs)
    assert known.sum() > 20_000
    assert np.max(np.abs(ours - theirs)[known]) < 5.1e-7


def test_real_stars_equal_the_published_package(test_data):
    zpt = pytest.importorskip("zero_point", reason="gaiadr3-zeropoint is not installed").zpt
    zpt.load_tables()
    source = open_source(test_data / "formats/pyia/gdr3_sm.fits")
    table = pl.concat(source.batches(list(ZERO_POINT_COLUMNS)))
    table = table.filter(pl.col("astrometric_params_solved").is_in([31, 95])).drop_nulls("phot_g_mean_mag")
    values, ours = both(table)
    assert len(ours) > 500
    theirs = zpt.get_zpt(*values, _warnings=False)
    known = np.isfinite(theirs)
    assert known.mean() > 0.8
    assert np.max(np.abs(ours - theirs)[known]) < 5.1e-7
    assert -0.08 < np.median(ours) < -0.01


def test_ecliptic_latitude_from_the_place(test_data):
    source = open_source(test_data / "formats/pyia/gdr3_sm.fits")
    table = pl.concat(source.batches([*ZERO_POINT_COLUMNS, "ra", "dec"]))
    given = table.select(zero_point_expression()).to_series()
    found = table.select(zero_point_expression(["ra", "dec"])).to_series()
    assert (given - found).abs().max() < 1e-7


def test_values_by_hand():
    """At a knot, on the ecliptic, at the reference colour: q00 less a third of q02."""
    zero = parallax_zero_point(*(np.array([x]) for x in (17.5, 1.48, np.nan, 0.0, 31)))
    assert zero[0] == pytest.approx((-31.05 * 0 + -29.18 - 2.41 / 3) / 1000, abs=1e-12)
    assert np.isnan(parallax_zero_point(*(np.array([x]) for x in (17.5, 1.48, np.nan, 0.0, 3))))[0]


def catalogue(n=400):
    rng = np.random.default_rng(3)
    table = stars(n, rv_fraction=1.0).with_columns(
        nu_eff_used_in_astrometry=pl.Series(rng.uniform(1.2, 1.7, n)),
        pseudocolour=pl.lit(None, dtype=pl.Float64),
        ecl_lat=pl.Series(rng.uniform(-90, 90, n)),
        astrometric_params_solved=pl.lit(31),
    )
    first = pl.int_range(pl.len()) < 10
    return table.with_columns(
        nu_eff_used_in_astrometry=pl.when(first).then(2.0).otherwise("nu_eff_used_in_astrometry"),
        phot_g_mean_mag=pl.when(pl.int_range(pl.len()) >= 395).then(None).otherwise("phot_g_mean_mag"),
    )


def test_every_star_has_its_own(tmp_path):
    table = catalogue()
    table.write_parquet(tmp_path / "t.parquet")
    settings = CatalogSettings(
        files=(str(tmp_path / "t.parquet"),), num_shards=2, parallax_zero_point="lindegren2021"
    )
    store = ingest(settings, tmp_path / "s")
    assert store.manifest["parallax_zero_point"] == "lindegren2021"
    assert store.row_account == {"rows_in": 400, "kept": 395, "cut:no_zero_point": 5}
    assert store.manifest["notes"]["zero_point_outside_range"] == 10
    kept = store.table(["source_id", "parallax_zero_point", "parallax", "x", "y", "z"])
    joined = kept.join(table.select("source_id", *ZERO_POINT_COLUMNS), on="source_id")
    assert np.allclose(both(joined)[1], joined["parallax_zero_point"], atol=1e-8)
    offset = joined.select("x", "y", "z").to_numpy() - store.frame.sun_position
    distance = 1 / (joined["parallax"] - joined["parallax_zero_point"]).to_numpy()
    assert np.allclose(np.linalg.norm(offset, axis=1), distance, rtol=1e-5)
    strict = CatalogSettings(**{**settings.model_dump(), "zero_point_outside": "cut"})
    account = ingest(strict, tmp_path / "strict").row_account
    assert account == {"rows_in": 400, "kept": 385, "cut:no_zero_point": 5, "cut:zero_point_range": 10}


def test_draws_use_each_stars_zero_point(tmp_path):
    errors = [f"{n}_error" for n in ("ra", "dec", "parallax", "pmra", "pmdec", "radial_velocity")]
    catalogue().with_columns(pl.lit(0.0).alias(name) for name in errors).write_parquet(tmp_path / "t.parquet")
    settings = CatalogSettings(
        files=(str(tmp_path / "t.parquet"),), num_shards=2, parallax_zero_point="lindegren2021"
    )
    store = ingest(settings, tmp_path / "s")
    draw = store.draw(1)
    assert np.allclose(draw.states, store.states(dtype=float), rtol=1e-5, atol=1e-4)
    assert draw.account["kept"] == 395


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="lindegren2021"):
        CatalogSettings(parallax_zero_point="lindegren")
    with pytest.raises(ValueError, match="dr2"):
        CatalogSettings(parallax_zero_point="lindegren2021", release="dr2")
    stars(20).write_parquet(tmp_path / "t.parquet")
    settings = CatalogSettings(files=(str(tmp_path / "t.parquet"),), parallax_zero_point="lindegren2021")
    with pytest.raises(GalrayError, match="nu_eff_used_in_astrometry"):
        ingest(settings, tmp_path / "s")
