"""HATS catalogues: the genuine small ones, and a tree of Gaia columns in that form."""

import shutil

import hpgeom
import numpy as np
import polars as pl
import pytest

from galray.catalog import CatalogSettings, ingest, input_units, open_source
from galray.catalog.hats import open_hats, tile_path
from galray.errors import GalrayError
from tests.catalog_stars import stars


def write_hats(root, table, order=1, folders=()):
    """A catalogue in HATS form; the tiles in `folders` become a folder with two files."""
    pixels = hpgeom.angle_to_pixel(2**order, table["ra"].to_numpy(), table["dec"].to_numpy(), nest=True)
    lines = ["Norder,Npix,num_rows"]
    for pixel in np.unique(pixels):
        part = table.filter(pl.Series(pixels == pixel))
        path = root / "dataset" / tile_path(order, int(pixel))
        path.parent.mkdir(parents=True, exist_ok=True)
        if pixel in folders:
            inside = path.with_suffix("")
            inside.mkdir()
            half = part.height // 2
            part[:half].write_parquet(inside / "part0.parquet")
            part[half:].write_parquet(inside / "part1.parquet")
        else:
            part.write_parquet(path)
        lines.append(f"{order},{pixel},{part.height}")
    (root / "partition_info.csv").write_text("\n".join(lines) + "\n")
    (root / "hats.properties").write_text(
        f"#HATS catalog\nobs_collection=gaia\ndataproduct_type=object\nhats_nrows={table.height}\n"
        "hats_col_ra=ra\nhats_col_dec=dec\nhats_version=v1.0\n"
    )
    table.head(0).write_parquet(root / "dataset" / "_common_metadata")
    return root


@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        ("small_sky", 1),
        ("small_sky_order1_collection/small_sky_order1", 4),
        ("small_sky_order1_collection", 4),
    ],
)
def test_genuine_catalogues(test_data, name, tiles):
    root = test_data / "formats/hats_lsdb" / name
    catalog = open_hats(root)
    assert len(catalog.tiles) == tiles
    units = input_units(CatalogSettings(files=(str(root),)))
    assert sorted(unit.path for unit in units) == sorted(tile.path for tile in catalog.tiles)
    assert all("margin" not in unit.path for unit in units)
    rows = []
    for unit in units:
        source = open_source(unit)
        assert source.kind() is None
        rows.append(pl.concat(source.batches(["id", "ra", "dec"])))
    table = pl.concat(rows)
    assert table.height == table["id"].n_unique() == 131
    assert table["ra"].is_between(0, 360).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("small_sky_order1_margin_1deg", "margin"), ("small_sky_order1_id_index", "index")],
)
def test_what_holds_no_stars_of_its_own_is_refused(test_data, name, kind):
    root = test_data / "formats/hats_lsdb/small_sky_order1_collection" / name
    with pytest.raises(GalrayError, match=f"of type '{kind}'"):
        input_units(CatalogSettings(files=(str(root),)))


def test_gaia_columns_in_hats_form_are_the_same_stars(tmp_path):
    table = stars(3000)
    root = write_hats(tmp_path / "hats", table, folders=(3, 7))
    table.write_parquet(tmp_path / "one.parquet")
    units = input_units(CatalogSettings(files=(str(root),)))
    assert len(units) == 48 + 2
    tiled = ingest(CatalogSettings(files=(str(root),), num_shards=3), tmp_path / "tiled")
    whole = ingest(CatalogSettings(files=(str(tmp_path / "one.parquet"),), num_shards=3), tmp_path / "whole")
    assert tiled.row_account == whole.row_account
    columns = ["source_id", "x", "vz", "parallax"]
    assert tiled.table(columns).sort("source_id").equals(whole.table(columns).sort("source_id"))


def test_a_pixel_column_in_the_files_is_kept(tmp_path):
    root = write_hats(tmp_path / "hats", stars(500).with_columns(Npix=pl.lit(5), Norder=pl.lit(1)))
    store = ingest(CatalogSettings(files=(str(root),), num_shards=1, keep_columns=("Npix",)), tmp_path / "s")
    assert set(store.table(["Npix"])["Npix"]) == {5}


def test_old_names_and_broken_catalogues(tmp_path):
    root = write_hats(tmp_path / "hats", stars(500))
    (root / "hats.properties").rename(root / "properties")
    assert len(open_hats(root).tiles) == 48
    next(root.rglob("Npix=17.parquet")).unlink()
    with pytest.raises(GalrayError, match=r"1 of the 48 tiles .* such as Norder=1, Npix=17"):
        open_hats(root)
    (root / "partition_info.csv").write_text("a,b\n1,2\n")
    with pytest.raises(GalrayError, match=r"partition_info\.csv: not a list of tiles"):
        open_hats(root)
    (root / "partition_info.csv").unlink()
    assert len(open_hats(root).tiles) == 47
    shutil.rmtree(root / "dataset")
    with pytest.raises(GalrayError, match="without tiles"):
        open_hats(root)
    (root / "properties").write_text("color = blue\n")
    assert open_hats(root) is None


def test_a_collection_that_names_no_table(tmp_path):
    (tmp_path / "collection.properties").write_text("obs_collection=x\n")
    with pytest.raises(GalrayError, match="names no hats_primary_table_url"):
        open_hats(tmp_path)
