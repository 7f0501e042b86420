"""Gaia-form files as others read them."""

import gzip
import warnings
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from astropy.table import Table

from galray.catalog import open_source, write_gaia_source
from galray.catalog.columns import columns
from galray.errors import GalrayError
from tests.catalog_stars import stars


def test_astropy_reads_the_files(tmp_path):
    table = stars(60).sort("source_id")
    (path,) = write_gaia_source(table, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = Table.read(path, format="ascii.ecsv", fill_values=[("null", "0")])
    assert back.colnames == [column.name for column in columns("dr3")]
    assert len(back) == 60
    assert str(back["parallax"].unit) == "mas"
    assert back["ra"].dtype == np.float64
    assert back["has_rvs"].dtype == bool
    for name in ("source_id", "ra", "parallax", "has_rvs", "phot_variable_flag"):
        assert list(back[name]) == table[name].to_list(), name
    assert np.array_equal(back["radial_velocity"].mask, table["radial_velocity"].is_nan().to_numpy())
    assert np.all(back["teff_gspphot"].mask)


def test_the_text_has_esas_form(tmp_path):
    table = stars(5).with_columns(pl.lit('a "quoted" name').alias("designation"))
    (path,) = write_gaia_source(table, tmp_path)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert lines[0] == "# %ECSV 1.0"
    body = [line for line in lines if not line.startswith("#")]
    assert body[0].split(",") == [column.name for column in columns("dr3")]
    cells = body[1].split(",")
    assert len(cells) == 152
    assert cells[0] == "null"
    assert cells[1] == '"a ""quoted"" name"'
    assert {cells[body[0].split(",").index("has_rvs")]} <= {'"True"', '"False"'}
    names = [n.strip() for line in lines if line.startswith("#   name:") for n in [line.split(":")[1]]]
    assert names == body[0].split(",")


def test_round_trip_through_files_named_by_sky(tmp_path):
    table = stars(5000).sort("source_id")
    paths = write_gaia_source(table, tmp_path, rows_per_file=1200)
    assert len(paths) == 5
    parts = []
    for path in paths:
        part = pl.concat(open_source(path).batches(["source_id", "parallax", "ra_dec_corr", "has_rvs"]))
        first, last = path.name[len("GaiaSource_") : -len(".csv.gz")].split("-")
        pixels = part["source_id"] // 2**43
        assert (int(first), int(last)) == (pixels.min(), pixels.max())
        parts.append(part)
    whole = pl.concat(parts)
    assert whole["source_id"].equals(table["source_id"])
    assert whole["parallax"].equals(table["parallax"])
    assert whole["ra_dec_corr"].equals(table["ra_dec_corr"].cast(pl.Float32))
    ranges = [[int(n) for n in p.name[11:-7].split("-")] for p in paths]
    assert all(a[1] < b[0] for a, b in pairwise(ranges))


def test_arrow_tables_and_other_releases(tmp_path):
    (path,) = write_gaia_source(
        stars(10).drop("grvs_mag", "has_rvs", "phot_variable_flag").to_arrow(), tmp_path, release="edr3"
    )
    source = open_source(path, "edr3")
    assert len(source.names) == 99
    assert pl.concat(source.batches(["radial_velocity"]))["radial_velocity"].count() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop("source_id"), "no column source_id"),
        (lambda t: t.head(0), "no rows"),
        (lambda t: t.with_columns(orbit_id=1), "orbit_id"),
        (lambda t: t.with_columns(source_id=pl.lit(None, dtype=pl.Int64)), "missing or negative"),
        (lambda t: t.with_columns(ra=pl.lit("north")), "does not fit"),
    ],
)
def test_tables_that_cannot_be_gaias(tmp_path, change, message):
    with pytest.raises(GalrayError, match=message):
        write_gaia_source(change(stars(5)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GalrayError, match="cannot write"):
        write_gaia_source(stars(5), tmp_path / "file" / "folder")
