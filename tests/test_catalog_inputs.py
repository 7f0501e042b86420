"""What catalog.files names: each file once, whatever it is called."""

import os

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from galray.catalog import CatalogSettings, InputUnit, ingest, input_units, open_source, plan
from galray.errors import GalrayError
from tests.catalog_stars import stars


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("b.parquet", "a.parquet"):
        stars(20, seed=ord(name[0])).write_parquet(folder / name)
    (folder / "notes.txt").write_text("no stars")
    return folder


def units(*files):
    return input_units(CatalogSettings(files=tuple(str(f) for f in files)))


def test_folder_glob_and_path_name_the_same_files_once(folder, tmp_path, monkeypatch):
    expected = [str(folder / "a.parquet"), str(folder / "b.parquet")]
    assert [u.path for u in units(folder)] == expected
    assert [u.path for u in units(folder / "*.parquet", folder, folder / "a.parquet")] == expected
    monkeypatch.chdir(tmp_path)
    assert [u.path for u in units("files/b.parquet", folder / ".." / "files" / "b.parquet")] == expected[1:]


def test_links_are_no_other_files(folder):
    (folder / "c.parquet").symlink_to(folder / "a.parquet")
    os.link(folder / "b.parquet", folder / "d.parquet")
    assert [os.path.basename(u.path) for u in units(folder)] == ["a.parquet", "b.parquet"]


def test_units_tell_size_and_version(folder):
    first, second = units(folder)
    assert first.size == (folder / "a.parquet").stat().st_size
    assert first.row_groups is None
    assert InputUnit.from_state({**first.state(), "rows": 3}) == first
    assert first.checksum() != second.checksum()
    os.utime(folder / "a.parquet", (1, 1))
    assert units(folder)[0] != first
    assert units(folder)[0].checksum() == first.checksum()
    assert open_source(first).names == open_source(first.path).names


def test_names_that_match_nothing(folder):
    with pytest.raises(GalrayError, match=r"'.*nothing.*' matches no file"):
        units(folder, folder / "nothing*.csv")
    with pytest.raises(GalrayError, match=r"catalog\.files is empty"):
        input_units(CatalogSettings())


def test_a_file_listed_twice_is_read_once(folder, tmp_path):
    files = (str(folder), str(folder / "a.parquet"), str(folder / "*.parquet"))
    twice = ingest(CatalogSettings(files=files, num_shards=2), tmp_path / "twice")
    once = ingest(CatalogSettings(files=(str(folder),), num_shards=2), tmp_path / "once")
    assert twice.hash == once.hash
    assert twice.row_account["rows_in"] == 40
    assert plan(CatalogSettings(files=files))["num_files"] == 2


def test_a_huge_parquet_file_is_read_in_parts(tmp_path):
    path = tmp_path / "huge.parquet"
    table = stars(5000).drop("source_id")  # ids then come from the file and the row: they must not change
    table.write_parquet(path, row_group_size=500)
    limit = path.stat().st_size / 4e6
    settings = CatalogSettings(files=(str(path),), num_shards=2, unit_megabytes=limit)
    parts = input_units(settings)
    assert [unit.row_groups for unit in parts] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert sum(unit.size for unit in parts) == pytest.approx(path.stat().st_size, rel=0.01)
    assert len({unit.name for unit in parts}) == 5
    assert len({unit.checksum() for unit in parts}) == 1
    read = [pl.concat(open_source(unit).batches(["ra"]))["ra"] for unit in parts]
    assert pl.concat(read).equals(table["ra"])
    assert [open_source(unit).first_row for unit in parts] == [0, 1000, 2000, 3000, 4000]
    store = ingest(settings, tmp_path / "parts")
    assert store.row_account["rows_in"] == 5000
    ids = store.table(["source_id"])["source_id"]
    assert ids.n_unique() == store.num_rows
    other = ingest(
        CatalogSettings(**{**settings.model_dump(), "unit_megabytes": limit / 2}), tmp_path / "more"
    )
    assert set(other.table(["source_id"])["source_id"]) == set(ids)
    assert ingest(settings, tmp_path / "parts").manifest["created"] == store.manifest["created"]


def test_large_files_of_one_footer_are_told_apart(tmp_path):
    numbers = np.random.default_rng(1)
    for name in ("a", "b"):  # as a simulation's snapshots may be: as many rows, plain, without statistics
        table = pa.table({n: numbers.normal(size=5000) for n in ("x", "y", "z", "vx", "vy", "vz")})
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=500, **options)
    first, second = (pq.read_metadata(tmp_path / f"{name}.parquet") for name in ("a", "b"))
    assert first.to_dict() == second.to_dict()
    settings = CatalogSettings(files=(str(tmp_path),), num_shards=2, unit_megabytes=0.05)
    units = input_units(settings)
    assert len({unit.checksum() for unit in units}) == 2
    store = ingest(settings, tmp_path / "store")  # their ids follow from the checksums
    assert store.row_account.get("cut:duplicate_source_id", 0) == 0
    assert store.num_rows == 10_000


def test_a_file_in_one_row_group_is_one_unit(tmp_path):
    stars(1000).write_parquet(tmp_path / "one.parquet")
    settings = CatalogSettings(files=(str(tmp_path / "one.parquet"),), unit_megabytes=0.001)
    assert [unit.row_groups for unit in input_units(settings)] == [None]
    (tmp_path / "one.parquet").write_bytes(b"PAR1" + b"x" * 5000)
    (unit,) = input_units(settings)
    with pytest.raises(GalrayError, match="truncated or corrupt"):
        open_source(unit)
