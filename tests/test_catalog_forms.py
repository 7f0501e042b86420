"""Every genuine file at hand: it is read whole and its rows are accounted for, or it is refused clearly."""

import os
import re
from pathlib import Path

import polars as pl
import pytest

from galray.catalog import CatalogSettings, ingest, open_source
from galray.errors import GalrayError

# file: release, rows, columns, stars with radial velocity kept, stars without
STARS = {
    "official_formats/GaiaSource_rebuilt_3rows.csv.gz": ("dr3", 3, 152, 1, 2),
    "official_formats/1714556098855O-result.csv": ("dr3", 1, 152, 1, 0),
    "official_formats/1714556098855O-result.ecsv": ("dr3", 1, 152, 1, 0),
    "official_formats/1710099405832VAL-result.vot": ("dr3", 2, 152, 2, 0),
    "pyia/gdr3_sm.fits": ("dr3", 1000, 152, 23, 732),
    "pyia/gedr3_sm.fits": ("edr3", 1000, 99, 9, 623),
    "pyia/gdr2_sm.fits": ("dr2", 1000, 96, 4, 729),
    "pyia/gdr2_rv_sm.fits": ("dr2", 100, 38, 100, 0),
    "gaia_dr2_10pc_TienParsecSample.vot": ("dr2", 247, 9, 80, 167),
    "gaia-galactic-orbits_gaia_data.fits": ("dr2", 4096, 9, 4096, 0),
    "trivnguyen_dr3_6d_100.csv": ("dr3", 100, 55, 100, 0),
}

# The same where none has a radial velocity
NONE_6D = {
    "official_formats/1712337806100O-result.ecsv": ("dr3", 5, 153, 0, 3),
    "official_formats/vaex_gaia-small-fits-basic.fits": ("dr2", 26, 77, 0, 1),
    "official_formats/vaex_gaia-small-fits-plus.fits": ("dr2", 26, 77, 0, 1),
    "official_formats/vaex_gaia-small-votable.vot": ("dr2", 26, 77, 0, 1),
    "pyia/gdr2_sm_negplx.fits": ("dr2", 8, 96, 0, 4),
}

# Tables that are read but hold no astrometry of stars: rows, columns, a column
OTHERS = {
    "official_formats/hats-import_gaia_epoch.ecsv": (3, 50, "n_transits"),
    "official_formats/hats-import_gaia_minimum.csv": (5, 8, "libname_gspphot"),
}

# What an ingest must refuse, and why
REFUSED = {
    "official_formats/vaex_gaia-small-colfits-plus.fits": "holds arrays, not one value per star",
    "official_formats/frostoven_gaia_dr3_dataset_info.md": "not a header of comma-separated column names",
    "zeropoint/z5_200720.txt": "not a header of comma-separated column names",
    "zeropoint/z6_200720.txt": "not a header of comma-separated column names",
}

TILES = re.compile(r"hats_lsdb/.*/Npix=\d+\.parquet|hats_lsdb/.*/index/part\.0\.parquet")


def read(path, release="dr3"):
    source = open_source(path, release)
    wanted = [n for n in ("source_id", "ra", "parallax", "radial_velocity") if n in source.names]
    wanted = wanted or list(source.names)[:1]
    frames = list(source.batches(wanted, rows=400))
    assert all(frame.height <= 400 for frame in frames)
    return source, pl.concat(frames).select(wanted)


def test_no_file_is_left_out(test_data):
    root = test_data / "formats"
    found = {
        str(Path(folder, name).relative_to(root)) for folder, _, names in os.walk(root) for name in names
    }
    stars = {name for name in found if not name.startswith("hats_lsdb/")}
    assert stars == {*STARS, *NONE_6D, *OTHERS, *REFUSED}


@pytest.mark.parametrize("name", [*STARS, *NONE_6D])
def test_rows_of_star_files(test_data, tmp_path, name):
    path = test_data / "formats" / name
    release, rows, columns, *fates = {**STARS, **NONE_6D}[name]
    source, table = read(path, release)
    assert (source.kind(), table.height, len(source.header)) == ("gaia", rows, columns)
    assert table["ra"].is_between(0, 360).all()
    assert not table["parallax"].is_nan().any()
    if "source_id" in table.columns:
        assert table["source_id"].dtype == pl.Int64
        assert table["source_id"].n_unique() == rows
    settings = CatalogSettings(files=(str(path),), release=release, num_shards=1, require_rv=False)
    account = ingest(settings, tmp_path / "store").row_account
    assert (account["rows_in"], account["kept"], account["kept_no_rv"]) == (rows, *fates)
    assert sum(account.values()) - account["rows_in"] == rows


@pytest.mark.parametrize("name", OTHERS)
def test_tables_without_astrometry(test_data, tmp_path, name):
    path = test_data / "formats" / name
    rows, columns, column = OTHERS[name]
    source = open_source(path)
    assert source.kind() is None
    assert column in source.names
    assert len(source.header) == columns
    assert sum(batch.height for batch in source.batches(list(source.names))) == rows
    with pytest.raises(GalrayError, match=r"neither a Gaia source table \(no parallax") as refused:
        ingest(CatalogSettings(files=(str(path),), num_shards=1), tmp_path / "store")
    assert Path(name).name in refused.value.what


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_of_stars(test_data, name):
    with pytest.raises(GalrayError, match=REFUSED[name]) as refused:
        read(test_data / "formats" / name)
    assert Path(name).name in refused.value.what


def test_every_tile_of_the_catalogues(test_data):
    root = test_data / "formats"
    tiles = [path for path in sorted(root.rglob("*.parquet")) if TILES.search(str(path))]
    rows = {}
    for tile in tiles:
        source = open_source(tile)
        table = pl.concat(source.batches(list(source.names)))
        assert table.height == pl.scan_parquet(tile, glob=False).select(pl.len()).collect().item()
        catalog = next(part.name for part in tile.parents if (part / "hats.properties").exists())
        rows[catalog] = rows.get(catalog, 0) + table.height
    assert rows["small_sky"] == rows["small_sky_order1"] == rows["small_sky_order1_id_index"] == 131
    assert rows["small_sky_order1_margin_1deg"] == 23
    assert rows["small_sky_order1_margin_2deg"] == 47


def test_the_real_sample_of_dr2(test_data, tmp_path):
    path = test_data / "gaia_dr2/mosaik_40cells_z0.4kpc.parquet"
    source, table = read(path, "dr2")
    assert (source.kind(), table.height, table["radial_velocity"].count()) == ("gaia", 268_545, 237_536)
