"""Dask views of a store against plain calculations, on threads and on Ray."""

import subprocess
import sys

import dask
import hpgeom
import numpy as np
import polars as pl
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord

from galray.catalog import CatalogSettings, ShardStore, ingest, sky
from galray.errors import GalrayError
from tests.catalog_stars import stars

DISTANCE = "sqrt(x * x + y * y + z * z)"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sky")
    stars(4000).write_parquet(folder / "t.parquet")
    return ingest(CatalogSettings(files=(str(folder / "t.parquet"),), num_shards=3), folder / "store")


def numbers(store):
    """One of each view, in one go."""
    q = [0.0, 0.01, 0.25, 0.5, 0.99, 1.0]
    views = {
        "stars": sky.counts(store),
        "red": sky.counts(store, "bp_rp > 1 and parallax_error < 0.04"),
        "map": sky.healpix_map(store, level=2),
        "galactic": sky.healpix_map(store, level=2, frame="galactic", condition="bp_rp > 1"),
        "mean map": sky.healpix_map(store, level=0, mean_of="vx"),
        "histogram": sky.histogram(store, "bp_rp", np.linspace(0, 2, 11)),
        "plane": sky.cross_histogram(store, ["bp_rp", DISTANCE], [[0, 1, 2], [0, 5, 10, 20]]),
        "space": sky.cross_histogram(store, ["x", "y", "z"], [[-20, -8, 0], [-9, 0, 9], [-9, 0, 9]]),
        "means": sky.grouped_means(store, ["vx", "bp_rp"], "grvs_mag", [7, 9, 14, 15, 16]),
        "extent": sky.extent(store, "vx"),
        "quantiles": sky.quantiles(store, "vx", q),
        "expression": sky.quantiles(store, DISTANCE, q, condition="bp_rp > 1", bins=64),
    }
    return dict(zip(views, sky.compute(*views.values()), strict=True))


def check(store, found):
    table = store.table().with_columns(distance=pl.sql_expr(DISTANCE))
    red = table.filter(table["bp_rp"] > 1)
    assert found["stars"] == store.num_rows
    assert found["red"] == red.filter(red["parallax_error"].cast(pl.Float64) < 0.04).height
    pixels = (table["source_id"] // 2 ** (35 + 2 * 10)).to_numpy()  # level 12 → 2
    assert np.array_equal(found["map"], np.bincount(pixels, minlength=192))
    galactic = SkyCoord(red["ra"].to_numpy() * u.deg, red["dec"].to_numpy() * u.deg).galactic
    pixels = hpgeom.angle_to_pixel(4, galactic.l.deg, galactic.b.deg, nest=True)
    assert np.array_equal(found["galactic"], np.bincount(pixels, minlength=192))
    pixels = (table["source_id"] // 2 ** (35 + 2 * 12)).to_numpy()
    mean = [table["vx"].cast(pl.Float64).to_numpy()[pixels == pixel].mean() for pixel in range(12)]
    assert np.allclose(found["mean map"], mean, rtol=1e-10)
    bp_rp, distance = table["bp_rp"].to_numpy(), table["distance"].to_numpy()
    assert np.array_equal(found["histogram"], np.histogram(bp_rp, np.linspace(0, 2, 11))[0])
    plane = np.histogram2d(bp_rp, distance, [[0, 1, 2], [0, 5, 10, 20]])[0]
    assert found["plane"].dtype == np.int64
    assert np.array_equal(found["plane"], plane)
    assert found["space"].shape == (2, 2, 2)
    assert 0 < found["space"].sum() <= store.num_rows
    bright = table.filter(table["grvs_mag"].is_between(7, 9, closed="left"))
    assert found["means"][0] == pytest.approx([bright["vx"].cast(pl.Float64).mean(), bright["bp_rp"].mean()])
    assert np.isnan(found["means"][2:]).all(), "no star has 14 < G_RVS < 16"
    assert found["extent"].tolist() == [table["vx"].min(), table["vx"].max()]
    q = [0.0, 0.01, 0.25, 0.5, 0.99, 1.0]
    exact = np.quantile(table["vx"].to_numpy(), q, method="inverted_cdf")
    assert found["quantiles"] == pytest.approx(exact, abs=1e-4)
    exact = np.quantile(red["distance"].to_numpy(), q, method="inverted_cdf")
    assert found["expression"] == pytest.approx(exact, abs=float(np.ptp(exact)) / 64**2 * 6)


def test_views_without_ray(store, monkeypatch):
    monkeypatch.setattr(sky, "_scheduler", lambda: "threads")
    check(store, numbers(store))
    whole = sky.view(store, ["x", "vx"])
    assert whole.npartitions == 3
    mean = store.table(["vx"])["vx"].mean()
    assert sky.compute(whole["vx"].mean())[0] == pytest.approx(mean, abs=1e-3)


def test_views_are_lazy(store, tmp_path):
    """Nothing is read before `compute`."""
    import shutil

    gone = tmp_path / "store"
    shutil.copytree(store.path, gone)
    views = [sky.counts(ShardStore(gone)), sky.quantiles(ShardStore(gone), "vx", [0.5])]
    (gone / "shard-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(GalrayError, match=r"shard-00001\.parquet: cannot be read"):
        sky.compute(*views)


def test_views_on_ray_are_the_same(store, ray_session, monkeypatch):
    persist = dask.persist
    assert callable(sky._scheduler())
    assert dask.persist is persist, "Ray's replacement of dask.persist is undone"
    found = numbers(store)
    check(store, found)
    monkeypatch.setattr(sky, "_scheduler", lambda: "threads")
    here = numbers(store)
    assert all(np.array_equal(found[name], here[name], equal_nan=True) for name in here)


def test_mistakes_on_ray_read_the_same(store, ray_session, tmp_path):
    import shutil

    broken = tmp_path / "store"
    shutil.copytree(store.path, broken)
    (broken / "shard-00001.parquet").unlink()
    with pytest.raises(GalrayError) as raised:
        sky.compute(sky.histogram(ShardStore(broken), "vx", [0, 1]))
    assert type(raised.value) is GalrayError
    assert "shard-00001.parquet: cannot be read" in raised.value.what


def test_a_store_without_tiles_says_so(tmp_path):
    stars(500).write_parquet(tmp_path / "t.parquet")
    settings = CatalogSettings(files=(str(tmp_path / "t.parquet"),), num_shards=1, views=("shards",))
    with pytest.raises(GalrayError, match="has no tiles"):
        sky.counts(ingest(settings, tmp_path / "store"), layout="tiles")


def test_tiles_hold_the_shards_stars(store):
    views = [sky.counts(store, "vx > 0", layout=layout) for layout in ("shards", "tiles")]
    shards, tiles = sky.compute(*views)
    assert 0 < tiles == shards


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda store: sky.quantiles(store, "feh", [0.5]), "no column 'feh' in the store"),
        (lambda store: sky.quantiles(store, "vx", [1.5]), "not probabilities"),
        (lambda store: sky.counts(store, "nope > 1"), "condition 'nope > 1'"),
        (lambda store: sky.counts(store, "vx + 1"), "not true or false"),
        (lambda store: sky.counts(store, "vx >"), "condition 'vx >'"),
        (lambda store: sky.cross_histogram(store, ["x", "y"], [[0, 1]]), "1 lists of edges"),
        (lambda store: sky.view(store, ["x", "feh"]), "no column 'feh'"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(store, call, message):
    with pytest.raises(GalrayError, match=message):
        call(store)


def test_far_outliers_do_not_blur_quantiles(tmp_path):
    rng = np.random.default_rng(3)
    w = rng.normal(0, 1, (5000, 6))
    w[:3, 0] = [1e7, -3e6, 5e5]
    pl.DataFrame(w, schema=["x", "y", "z", "vx", "vy", "vz"]).write_parquet(tmp_path / "t.parquet")
    made = ingest(CatalogSettings(files=(str(tmp_path / "t.parquet"),), num_shards=2), tmp_path / "store")
    (found,) = sky.compute(sky.quantiles(made, "x", [0.1, 0.5, 0.9]))
    exact = np.quantile(w[:, 0], [0.1, 0.5, 0.9], method="inverted_cdf")
    assert found == pytest.approx(exact, abs=1e-2)
    # A table of states has no ra and dec: its stars stand where the Sun sees them.
    (counted,) = sky.compute(sky.healpix_map(made, level=0, frame="galactic"))
    assert counted.sum() == 5000
    assert counted[4] > 4900, "a cloud at the Galactic centre is at l = 0, b = 0"
    with pytest.raises(GalrayError, match="no ra and dec"):
        sky.healpix_map(made)


def test_columns_without_values(tmp_path):
    frame = stars(300).with_columns(grvs_mag=pl.lit(None, dtype=pl.Float32))
    frame.write_parquet(tmp_path / "t.parquet")
    made = ingest(CatalogSettings(files=(str(tmp_path / "t.parquet"),), num_shards=40), tmp_path / "store")
    assert min(made.shard_rows) < 6, "some shards hold hardly a star"
    views = [
        sky.quantiles(made, "grvs_mag", [0.5, 0.9]),
        sky.histogram(made, "grvs_mag", [0, 10, 20]),
        sky.grouped_means(made, ["grvs_mag"], "bp_rp", [0, 2]),
        sky.extent(made, "grvs_mag"),
    ]
    quantiles, histogram, means, extent = sky.compute(*views)
    assert np.isnan([*quantiles, *means.ravel(), *extent]).all()
    assert histogram.tolist() == [0, 0]


def test_importing_the_catalogue_leaves_dask_alone():
    code = "import sys, galray.catalog.sky; assert not {'dask', 'ray'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
