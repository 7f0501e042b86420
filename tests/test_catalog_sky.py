"""Dask views of a store against plain calculations."""

import numpy as np
import pytest

from galray.catalog import CatalogSettings, ingest, sky
from galray.errors import GalrayError
from tests.catalog_stars import stars


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sky")
    stars(4000).write_parquet(folder / "t.parquet")
    return ingest(CatalogSettings(files=(str(folder / "t.parquet"),), num_shards=3), folder / "store")


def check(store):
    table = store.table()
    assert sky.counts(store) == store.num_rows
    assert sky.counts(store, "bp_rp > 1") == table.filter(table["bp_rp"] > 1).height
    counted = sky.healpix_map(store, level=2)
    pixels = (table["source_id"] // 2 ** (35 + 2 * 10)).to_numpy()  # level 12 → 2
    assert np.array_equal(counted, np.bincount(pixels, minlength=192))
    q = np.array([0.01, 0.25, 0.5, 0.99])
    vx = table["vx"].to_numpy()
    reached = [np.mean(vx <= value) for value in sky.quantiles(store, "vx", q)]
    assert np.max(np.abs(reached - q)) <= 2 / len(vx)


def test_views_without_ray(store, monkeypatch):
    monkeypatch.setattr(sky, "_scheduler", lambda: "synchronous")
    check(store)
    view = sky.view(store, ["x", "vx"])
    assert view.npartitions == 3
    assert view["vx"].mean().compute(scheduler="synchronous") == pytest.approx(
        store.table(["vx"])["vx"].mean(), abs=1e-3
    )
    with pytest.raises(GalrayError, match="no numbers in a column 'feh'"):
        sky.quantiles(store, "feh", [0.5])
    with pytest.raises(GalrayError, match="condition 'nope > 1'"):
        sky.counts(store, "nope > 1")


def test_views_on_ray(store, ray_session):
    assert callable(sky._scheduler())
    check(store)
