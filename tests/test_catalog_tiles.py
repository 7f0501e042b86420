"""Tiles in sky order: limits, order, completeness, the same whoever makes them, readable by others."""

import json
import subprocess
import sys

import hpgeom
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from galray.catalog import CatalogSettings, galactocentric, ingest
from galray.catalog.columns import OBSERVABLES
from galray.catalog.settings import TileSettings
from galray.catalog.tiles import Tile, partition
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from tests.catalog_stars import stars


def crowded(n=12_000):
    """Stars all over the sky and as many again in one degree."""
    rng = np.random.default_rng(1)
    cluster = stars(n, seed=1).with_columns(
        ra=pl.Series(50 + rng.normal(0, 1, n)), dec=pl.Series(rng.normal(0, 1, n))
    )
    return pl.concat([stars(n), cluster])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    table = crowded()
    for number in range(3):
        table[number::3].write_parquet(folder / f"{number}.parquet")
    return folder


@pytest.fixture(scope="module")
def store(files, tmp_path_factory):
    return ingest(configured(files), tmp_path_factory.mktemp("store"))


def configured(files, **options):
    options = {"num_shards": 4, "tiles": TileSettings(max_rows=1500), **options}
    return CatalogSettings(files=(f"{files}/*.parquet",), **options)


def tile_frames(store):
    for entry in store.manifest["tiles"]["files"]:
        path = store.path / "sky" / entry["file"]
        yield entry, pl.read_parquet(path, hive_partitioning=False, glob=False)


def test_tiles_hold_every_star_once_within_their_limits_and_pixels(store):
    found = []
    for entry, frame in tile_frames(store):
        assert frame.height == entry["rows"] <= 1500
        pixels = hpgeom.angle_to_pixel(2**29, frame["ra"].to_numpy(), frame["dec"].to_numpy(), nest=True)
        assert np.array_equal(frame["_healpix_29"].to_numpy(), pixels)
        assert frame["_healpix_29"].is_sorted()
        assert (pixels >> 2 * (29 - entry["level"]) == entry["pixel"]).all()
        found.append(frame)
    whole = pl.concat(found)
    assert whole["_healpix_29"].is_sorted()
    assert whole.columns == ["_healpix_29", *store.columns]
    assert whole.drop("_healpix_29").sort("source_id").equals(store.table().sort("source_id"))
    levels = {entry["level"] for entry in store.manifest["tiles"]["files"]}
    assert max(levels) >= 4
    assert min(levels) <= 1
    assert store.manifest["tiles"]["num_rows"] == store.num_rows


def test_a_tile_is_as_large_as_its_limit_allows():
    rng = np.random.default_rng(0)
    counts = rng.poisson(3, 12 * 4**4)
    counts[700:720] += 60
    tiles = partition(counts, 200, TileSettings(max_rows=200))
    assert sum(tile.rows for tile in tiles) == counts.sum()
    covered = np.zeros(len(counts), dtype=int)
    for tile in tiles:
        low, high = (p >> 2 * (29 - 4) for p in tile.range_29())
        covered[low:high] += 1
        assert counts[low:high].sum() == tile.rows <= 200
        if tile.level > 0:
            parent = Tile(tile.level - 1, tile.pixel // 4, 0)
            low, high = (p >> 2 * (29 - 4) for p in parent.range_29())
            assert counts[low:high].sum() > 200
    assert (covered[counts > 0] == 1).all()


def test_the_fullest_pixel_is_named_before_the_merge(files, tmp_path, monkeypatch):
    monkeypatch.setattr("galray.catalog.workers.merge_shard", None)  # it is not reached
    with pytest.raises(
        GalrayError, match=r"catalog\.tiles: HEALPix pixel \d+ of level 3 \(ra 5\d\.\d+, dec"
    ) as caught:
        ingest(configured(files, tiles=TileSettings(max_rows=1500, max_level=3)), tmp_path / "store")
    assert "max_level" in caught.value.remedy


def test_the_limit_in_bytes_holds_for_the_files(files, tmp_path):
    store = ingest(configured(files, tiles=TileSettings(max_mb=0.1)), tmp_path / "store")
    sizes = [entry["bytes"] for entry in store.manifest["tiles"]["files"]]
    assert max(sizes) <= 100_000
    assert sum(entry["rows"] for entry in store.manifest["tiles"]["files"]) == store.num_rows


def test_a_file_over_the_limit_is_cut_into_its_children(files, tmp_path, monkeypatch):
    monkeypatch.setattr("galray.catalog.stages.tile_limit", lambda *_: 100_000)
    store = ingest(configured(files, tiles=TileSettings(max_mb=0.1)), tmp_path / "store")
    assert max(entry["bytes"] for entry in store.manifest["tiles"]["files"]) <= 100_000
    assert sum(entry["rows"] for entry in store.manifest["tiles"]["files"]) == store.num_rows
    with pytest.raises(GalrayError, match=r"of level 1 .* takes \d\.\d MB, max_mb is 0\.1"):
        ingest(configured(files, tiles=TileSettings(max_mb=0.1, max_level=1)), tmp_path / "other")


def test_checksums_do_not_depend_on_files_shards_or_batches(store, files, tmp_path, monkeypatch):
    wanted = [entry["xxh128"] for entry in store.manifest["tiles"]["files"]]
    monkeypatch.setattr("galray.catalog.readers.BATCH_ROWS", 700)
    monkeypatch.setattr("galray.catalog.merge.MERGE_BYTES", 200_000)
    monkeypatch.setattr("galray.catalog.sky_rows.BATCH_ROWS", 128)
    crowded().sort("ra").write_parquet(tmp_path / "one.parquet")
    options = {"num_shards": 7, "tiles": TileSettings(max_rows=1500)}
    other = ingest(CatalogSettings(files=(str(tmp_path / "one.parquet"),), **options), tmp_path / "store")
    # The limit in bytes, which depends on the shards' compression, is far away.
    assert [entry["xxh128"] for entry in other.manifest["tiles"]["files"]] == wanted


def required(path):
    return {field.name for field in pq.read_schema(path) if not field.nullable}


def test_columns_that_no_star_lacks_are_required_in_every_file(files, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for number, path in enumerate(sorted(files.iterdir())):
        table = pl.read_parquet(path)
        if number == 1:
            table = table.drop("phot_g_mean_mag")
        if number == 2:
            table = table.with_columns(bp_rp=pl.lit(None, dtype=pl.Float64))
        table.write_parquet(folder / path.name)
    store = ingest(configured(folder, keep_columns=("ruwe",)), tmp_path / "store")
    whole = {name for name in store.columns if not store.table([name])[name].null_count()}
    assert {"source_id", "vx", "ra", "radial_velocity", "pmra_error", "ra_dec_corr", "ruwe"} <= whole
    assert not {"bp_rp", "phot_g_mean_mag"} & whole  # of no star of one file
    assert all(required(path) == whole for path in store.shards)
    tiles = [store.path / "sky" / entry["file"] for entry in store.manifest["tiles"]["files"]]
    assert all(required(path) == {"_healpix_29", *whole} for path in tiles)


def test_pieces_that_do_not_tell_what_is_missing_are_taken_all_the_same(files, store, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr("galray.catalog.workers.merge_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            ingest(configured(files), tmp_path / "store")
    records = list((tmp_path / "store").glob(".ingest-*/piece-*.json"))
    assert len(records) == 3
    for path in records:  # as an earlier version wrote them
        record = json.loads(path.read_text())
        for view in record["views"].values():
            del view["nullable"]
        path.write_text(json.dumps(record))
    monkeypatch.setattr("galray.catalog.workers.Worker._read", None)  # they are not read again
    again = ingest(configured(files), tmp_path / "store")
    assert again.table().equals(store.table())
    assert not any(required(path) for path in again.shards)


def test_stars_of_simulations_have_their_place_as_seen_from_the_sun(tmp_path):
    table = stars(3000, rv_fraction=1)
    w = galactocentric(table.select(OBSERVABLES).to_numpy(), GalacticFrame())
    pl.DataFrame(w, schema=["x", "y", "z", "vx", "vy", "vz"]).write_parquet(tmp_path / "t.parquet")
    store = ingest(CatalogSettings(files=(str(tmp_path / "t.parquet"),), num_shards=2), tmp_path / "store")
    frame = pl.concat([frame for _, frame in tile_frames(store)]).sort("source_id")
    order = frame["source_id"].to_numpy() - frame["source_id"].min()
    assert np.allclose(frame["ra"].to_numpy(), table["ra"].to_numpy()[order], atol=1e-7)
    assert np.allclose(frame["dec"].to_numpy(), table["dec"].to_numpy()[order], atol=1e-7)


def test_stars_without_radial_velocity_have_tiles_of_their_own(files, tmp_path):
    store = ingest(configured(files, require_rv=False), tmp_path / "store")
    whole = pl.concat([frame for _, frame in tile_frames(store.no_rv)])
    assert whole.drop("_healpix_29").sort("source_id").equals(store.no_rv.table().sort("source_id"))


def test_shards_alone(files, tmp_path):
    store = ingest(configured(files, views=("shards",)), tmp_path / "store")
    assert not (store.path / "sky").exists()
    assert "tiles" not in store.manifest


def test_galray_reads_its_own_tiles_as_a_catalogue(store, tmp_path):
    settings = CatalogSettings(files=(str(store.path / "sky"),), num_shards=4, format="gaia")
    again = ingest(settings, tmp_path / "again")
    assert again.num_rows == store.num_rows
    assert again.table(["source_id"]).equals(store.table(["source_id"]))


LSDB = """
import json, sys
import lsdb
from hats.io.validation import is_valid_catalog

folder = sys.argv[1]
catalog = lsdb.open_catalog(folder)
stars = catalog.compute()
cone = catalog.cone_search(ra=50, dec=0, radius_arcsec=3600).compute()
print(json.dumps({
    "valid": is_valid_catalog(folder, strict=True, verbose=False),
    "rows": len(stars), "ids": int(stars["source_id"].sum() % 2**31), "cone": len(cone),
}))
"""


def test_lsdb_reads_the_tiles(store):
    # In a process of its own: lsdb may live in another environment, named by GALRAY_LSDB_PYTHON.
    import os

    python = os.environ.get("GALRAY_LSDB_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import lsdb"], capture_output=True).returncode:
        pytest.skip("lsdb is not installed; pip install galray[lsdb], or set GALRAY_LSDB_PYTHON")
    done = subprocess.run(
        [python, "-c", LSDB, str(store.path / "sky")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    table = store.table(["source_id", "ra", "dec"])
    ra, dec = np.radians(table["ra"].to_numpy()), np.radians(table["dec"].to_numpy())
    near = np.cos(dec) * np.cos(ra - np.radians(50)) > np.cos(np.radians(1))
    assert found == {
        "valid": True,
        "rows": store.num_rows,
        "ids": int(table["source_id"].sum() % 2**31),
        "cone": int(near.sum()),
    }
