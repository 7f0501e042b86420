"""Chosen columns and rows of HATS catalogues: local, in S3, over HTTP; and the archive's query."""

import gzip
import hashlib
import json
import re
import sys

import polars as pl
import pytest

from galray import cli
from galray.catalog import CatalogSettings, Region, TileQuery, archive_query, fetch, ingest, open_source
from galray.catalog.download import Patience
from galray.catalog.fetch_tiles import prune
from galray.catalog.hats import open_hats
from galray.catalog.storage import StorageSettings
from galray.errors import GalrayError
from tests.catalog_stars import stars
from tests.test_catalog_fetch import server  # noqa: F401
from tests.test_catalog_hats import write_hats
from tests.test_catalog_s3 import bucket  # noqa: F401

WHERE = "radial_velocity IS NOT NULL AND parallax_over_error > 20 AND ruwe > 1.05"


def gaia(n, seed=0):
    """Stars as in a public copy: with a spatial index, and NaN among the missing values."""
    table = stars(n, seed=seed)
    absent = pl.int_range(pl.len()) % 11 == 0
    return table.with_columns(
        pl.when(absent).then(float("nan")).otherwise("ruwe").alias("ruwe"),
        (pl.col("parallax") / pl.col("parallax_error")).alias("parallax_over_error"),
        (pl.col("source_id") // 2**35 * 2**34).alias("_healpix_29"),
    )


@pytest.fixture(scope="module")
def hats(tmp_path_factory):
    return write_hats(tmp_path_factory.mktemp("hats") / "gaia", gaia(3000), folders=(3, 7))


def rows(folder):
    catalog = open_hats(folder)
    return pl.concat(pl.read_parquet(tile.path, hive_partitioning=False) for tile in catalog.tiles)


def test_rows_and_columns_of_a_catalogue(hats, tmp_path):
    found = fetch(tmp_path / "to", columns=["6d"], where=WHERE, source=str(hats))
    table = gaia(3000).with_columns(pl.col(pl.Float64).fill_nan(None))
    wanted = table.filter(pl.sql_expr(WHERE))
    assert 0 < wanted.height < 2000
    assert (found["rows_in"], found["rows"], found["fetched"]) == (3000, wanted.height, 48)
    got = rows(tmp_path / "to")
    assert set(got["source_id"]) == set(wanted["source_id"])
    assert {"source_id", "_healpix_29", "radial_velocity_error", "ra_dec_corr", "ruwe"} <= set(got.columns)
    assert "phot_variable_flag" not in got.columns
    manifest = json.loads((tmp_path / "to" / "fetch.json").read_text())
    assert manifest["where"] == WHERE
    assert sum(tile["rows_in"] for tile in manifest["tiles"]) == 3000
    for tile in manifest["tiles"]:
        if tile["rows"]:
            content = (tmp_path / "to" / tile["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == tile["sha256"]
    # The same stars as an ingest of all of them with the same cuts.
    direct = ingest(CatalogSettings(files=(str(hats),), num_shards=2, cuts={"a": WHERE}), tmp_path / "direct")
    fetched = ingest(CatalogSettings(files=(str(tmp_path / "to"),), num_shards=2), tmp_path / "fetched")
    columns = ["source_id", "x", "vz", "parallax"]
    assert fetched.num_rows == direct.num_rows == wanted.height
    assert fetched.table(columns).sort("source_id").equals(direct.table(columns).sort("source_id"))


@pytest.mark.parametrize(
    "region",
    [
        Region.from_healpix("1:5"),
        Region.from_healpix("0:1,11"),
        Region.from_healpix("4:700-760"),
        Region.from_cone("0,0,30"),
        Region.from_cone("123,88,9"),
    ],
)
def test_regions_are_exact(hats, tmp_path, region):
    table = gaia(3000)
    wanted = set(table.filter(region.condition())["source_id"])
    groups = prune(open_hats(hats).tiles, region)
    assert len(groups) < 48
    found = fetch(tmp_path / "to", source=str(hats), region=region)
    assert found["rows_in"] < 3000
    assert set(rows(tmp_path / "to")["source_id"]) == wanted
    assert set(rows(tmp_path / "to").columns) == set(table.columns)


def test_stars_that_have_left_their_pixel_are_not_lost(tmp_path):
    """A source_id holds an older place: the star lies in another tile than its pixel of old."""
    table = gaia(500)
    region = Region.from_healpix("8:4000")
    moved = table.head(1).with_columns(
        pl.lit((4000 << 43) + 5, dtype=pl.Int64).alias("source_id"), pl.lit(47.0).alias("ra")
    )
    import hpgeom

    ra, dec = hpgeom.pixel_to_angle(256, hpgeom.neighbors(256, 4000)[0])
    moved = moved.with_columns(pl.lit(float(ra)).alias("ra"), pl.lit(float(dec)).alias("dec"))
    root = write_hats(tmp_path / "hats", pl.concat([table, moved]), order=8)
    fetch(tmp_path / "to", source=str(root), region=region)
    assert (4000 << 43) + 5 in rows(tmp_path / "to")["source_id"]


def write_bulk(folder):
    """A release of one bulk file, with its list of checksums."""
    folder.mkdir()
    name = "GaiaSource_000000-003111.csv.gz"
    (folder / name).write_bytes(gzip.compress(b"source_id\n1\n"))
    (folder / "_MD5SUM.txt").write_text(f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n")


def test_a_second_call_does_what_is_missing(hats, tmp_path):
    some = fetch(tmp_path / "to", source=str(hats), columns=["parallax"], files=10)
    assert some["fetched"] == some["files"] == 10
    (tmp_path / "to" / "_fetched.jsonl").open("a").write('{"name": "torn')
    spoiled = open_hats(tmp_path / "to").tiles[3]
    with open(spoiled.path, "ab") as stream:
        stream.write(b"x")
    found = fetch(tmp_path / "to", source=str(hats), columns=["parallax"])
    assert (found["fetched"], found["files"]) == (39, 48)
    again = fetch(tmp_path / "to", source=str(hats), columns=["parallax"])
    assert (again["fetched"], again["received"], again["rows"]) == (0, 0, 3000)
    assert rows(tmp_path / "to").height == 3000
    with pytest.raises(GalrayError, match=r"was fetched with columns = \['parallax'\], not \['ruwe'\]"):
        fetch(tmp_path / "to", source=str(hats), columns=["ruwe"])
    with pytest.raises(GalrayError, match="was fetched with where = None, not ruwe < 1"):
        fetch(tmp_path / "to", source=str(hats), columns=["parallax"], where="ruwe < 1")
    write_bulk(tmp_path / "bulk")
    with pytest.raises(GalrayError, match="was fetched with source = "):
        fetch(tmp_path / "to", source=str(tmp_path / "bulk"))
    fetch(tmp_path / "whole", source=str(tmp_path / "bulk"))
    with pytest.raises(GalrayError, match="was fetched with source = None, not "):
        fetch(tmp_path / "whole", source=str(hats), columns=["parallax"])


def test_bytes_are_those_of_the_columns(hats, tmp_path):
    few = fetch(None, source=str(hats), columns=["parallax"], dry_run=True, files=20)
    most = fetch(None, source=str(hats), dry_run=True, files=20)
    assert few["exact"]
    assert 0 < few["bytes"] < most["bytes"] / 3
    assert few["rows_in"] == most["rows_in"]
    done = fetch(tmp_path / "to", source=str(hats), columns=["parallax"], files=20)
    assert done["received"] == few["bytes"]
    guess = fetch(None, source=str(hats), columns=["parallax"], dry_run=True)
    assert not guess["exact"]
    assert guess["rows_in"] == pytest.approx(3000, rel=0.2)


def test_from_a_bucket(bucket, tmp_path):  # noqa: F811
    storage = StorageSettings(endpoint=bucket[1], region="us-east-1", skip_signature=True)
    there = fetch(
        tmp_path / "there", source="s3://gaia/dr3/hats", columns=["6d"], where="ruwe < 1.1", storage=storage
    )
    here = fetch(tmp_path / "here", source=str(bucket[0] / "hats"), columns=["6d"], where="ruwe < 1.1")
    assert {**there, "x": 0} == {**here, "x": 0}
    assert rows(tmp_path / "there").equals(rows(tmp_path / "here"))
    quick = Patience(tries=2, wait=0.01)
    with pytest.raises(GalrayError, match="no HATS catalogue"):
        fetch(tmp_path / "x", source="s3://gaia/none", columns=["ra"], storage=storage, patience=quick)


def test_from_a_web_server(server, tmp_path):  # noqa: F811
    pytest.importorskip("aiohttp", reason="fsspec's http(s) file system needs aiohttp")
    root = write_hats(server.folder / "hats", gaia(600), order=0)
    query = {"columns": ["6d"], "where": "ruwe < 1.1", "files": 4}
    there = fetch(tmp_path / "there", source=server.url + "/hats", **query)
    here = fetch(tmp_path / "here", source=str(root), **query)
    assert there == here
    assert rows(tmp_path / "there").equals(rows(tmp_path / "here"))
    cuts = {"south": "dec < -30"}
    web = ingest(CatalogSettings(files=(server.url + "/hats",), num_shards=1, cuts=cuts), tmp_path / "web")
    disk = ingest(CatalogSettings(files=(str(root),), num_shards=1, cuts=cuts), tmp_path / "disk")
    assert web.row_account == disk.row_account
    assert set(web.table(["source_id"])["source_id"]) == set(disk.table(["source_id"])["source_id"])
    # Whole files from a web server are bulk files; this folder has no list of them.
    with pytest.raises(GalrayError, match=r"hats/_MD5SUM\.txt: HTTP 404"):
        fetch(tmp_path / "x", source=server.url + "/hats", patience=Patience(tries=2, wait=0.01))
    server.ignore_range = True
    with pytest.raises(GalrayError, match="cannot be read"):
        fetch(
            tmp_path / "y",
            source=server.url + "/hats",
            columns=["ra"],
            patience=Patience(tries=1, wait=0.01),
        )


def test_broken_tiles_are_named(hats, tmp_path):
    root = write_hats(tmp_path / "hats", gaia(300), order=0)
    bad = root / "dataset/Norder=0/Dir=0/Npix=5.parquet"
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(GalrayError, match=r"Npix=5\.parquet: the Parquet file is truncated.*11 of 12 files"):
        fetch(tmp_path / "to", source=str(root), columns=["ra"])
    # What is half there is no catalogue yet.
    assert open_hats(tmp_path / "to") is None
    with pytest.raises(GalrayError, match="none of 3,000 rows meets"):
        fetch(tmp_path / "none", source=str(hats), where="ruwe > 99")


def test_the_archive_s_query():
    text = archive_query(
        TileQuery(("ra", "ruwe"), "ruwe < 1.4 OR ra > 5", Region.from_cone("10.5,-20,0.25")), "dr3"
    )
    assert text == (
        "SELECT source_id, ra, dec, ruwe\nFROM gaiadr3.gaia_source\nWHERE (ruwe < 1.4 OR ra > 5)\n"
        "  AND 1 = CONTAINS(POINT('ICRS', ra, dec), CIRCLE('ICRS', 10.5, -20, 0.25))"
    )
    text = archive_query(TileQuery(region=Region.from_healpix("12:0,1,7")), "dr2")
    assert text == (
        "SELECT *\nFROM gaiadr2.gaia_source\nWHERE (source_id BETWEEN 0 AND 68719476735"
        " OR source_id BETWEEN 240518168576 AND 274877906943)"
    )
    text = archive_query(TileQuery(("6d",), "radial_velocity IS NOT NULL"), "dr3")
    assert "parallax_pmra_corr" in text
    assert "_healpix_29" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "ra,parralax"], "no column 'parralax'"),
        (["--columns", ","], "--columns names none"),
        (["--where", "ruwe <"], "--where: cannot read 'ruwe <'"),
        (["--where", "nothing < 1"], "column 'nothing'"),
        (["--where", "AVG(ruwe) > 1"], "aggregates over rows"),
        (["--where", "ruwe + 1"], "not true or false"),
        (["--columns", "ra", "--release", "edr3", "--no-source"], "no public HATS copy of release 'edr3'"),
        (["--print-adql", "--files", "2"], "no counterpart"),
        (["--print-adql", "--columns", "rax"], "no column 'rax'"),
    ],
)
def test_mistakes_end_in_one_clear_line(hats, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.delenv("GALRAY_DEBUG", raising=False)
    source = [] if "--no-source" in arguments else ["--source", str(hats)]
    words = [word for word in arguments if word != "--no-source"]
    monkeypatch.setattr(
        sys, "argv", ["galray", "catalog", "fetch", *words, *source, "--to", str(tmp_path / "to")]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in err.splitlines()[0]
    assert len(err.splitlines()) == 2
    assert not (tmp_path / "to" / "fetch.json").exists()


def test_the_command(hats, tmp_path, monkeypatch, capsys):
    words = ["fetch", "--source", str(hats), "--columns", "parallax,ruwe", "--where", "ruwe < 1"]
    for more, expected in (
        (["--dry-run"], r"48 tiles, [\d.]+ kB to transfer for the columns of [\d,]+ rows \(estimated"),
        (["--to", str(tmp_path / "to")], r"48 tiles, [\d.]+ kB, \d+ of 3,000 rows in .*; 48 fetched now"),
        (["--print-adql"], r"SELECT source_id, ra, dec, parallax, ruwe\nFROM gaiadr3"),
    ):
        monkeypatch.setattr(sys, "argv", ["galray", "catalog", *words, *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        assert re.match(expected, capsys.readouterr().out)
    assert open_source(open_hats(tmp_path / "to").tiles[0].path).header[0] == "source_id"
