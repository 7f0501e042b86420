"""Genuine file forms, and broken ones."""

import csv
import gzip
import io
import shutil

import polars as pl
import pytest

from galray.catalog import CatalogSettings, ingest, inspect, open_source, write_gaia_source
from galray.catalog.columns import columns, polars_dtype, releases
from galray.catalog.readers import SHORT_ROW
from galray.errors import GalrayError
from tests.catalog_stars import stars


def read(path, names, **options):
    return pl.concat(open_source(path, **options).batches(names))


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 1 << 16, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_text_is_cut_at_line_ends(tmp_path, monkeypatch, size, end, last):
    """Wherever the text is cut into chunks, its rows are those of Python's own reader."""
    monkeypatch.setattr("galray.catalog.text.CHUNK_BYTES", size)
    rows = [["id", "word", "number"]]
    rows += [[str(i), "a\nb,#" * (i % 5) + "long" * 20_000 * (i == 17), str(i / 7)] for i in range(40)]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows(rows)
    content = text.getvalue() if last else text.getvalue().removesuffix(end)
    for path in (tmp_path / "t.csv", tmp_path / "t.csv.gz"):
        with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as stream:
            stream.write(content.encode())
        found = read(path, ["id", "word", "number"])
        assert found["id"].cast(pl.String).to_list() == [row[0] for row in rows[1:]]
        assert found["word"].fill_null("").to_list() == [row[1] for row in rows[1:]]
        assert found["number"].to_list() == [float(row[2]) for row in rows[1:]]


def test_column_tables():
    assert {"dr2", "edr3", "dr3"} <= set(releases())
    assert [len(columns(r)) for r in ("dr2", "edr3", "dr3")] == [96, 99, 152]
    assert polars_dtype("edr3")["radial_velocity"] == pl.Float32
    with pytest.raises(GalrayError, match="release 'dr9'"):
        columns("dr9")


@pytest.mark.parametrize(
    ("name", "form", "rows", "release"),
    [
        ("official_formats/GaiaSource_rebuilt_3rows.csv.gz", "csv", 3, "dr3"),
        ("official_formats/1714556098855O-result.csv", "csv", 1, "dr3"),
        ("official_formats/1714556098855O-result.ecsv", "csv", 1, "dr3"),
        ("official_formats/1712337806100O-result.ecsv", "csv", 5, "dr3"),
        ("official_formats/1710099405832VAL-result.vot", "votable", 2, "dr3"),
        ("pyia/gdr3_sm.fits", "fits", 1000, "dr3"),
        ("pyia/gedr3_sm.fits", "fits", 1000, "edr3"),
        ("pyia/gdr2_sm.fits", "fits", 1000, "dr2"),
        ("gaia_dr2_10pc_TienParsecSample.vot", "votable", 247, "dr2"),
        ("gaia-galactic-orbits_gaia_data.fits", "fits", 4096, "dr2"),
    ],
)
def test_genuine_forms(test_data, name, form, rows, release):
    source = open_source(test_data / "formats" / name, release)
    assert (source.format, source.kind()) == (form, "gaia")
    wanted = [
        n
        for n in ("source_id", "ra", "parallax", "radial_velocity", "duplicated_source")
        if n in source.names
    ]
    table = pl.concat(source.batches(wanted, rows=300)).select(wanted)
    assert table.height == rows
    assert table["ra"].dtype == pl.Float64
    assert table["ra"].is_between(0, 360).all()
    assert not table.select(pl.col(pl.Float32, pl.Float64).is_nan().any()).sum_horizontal().item()
    if "source_id" in wanted:
        assert table["source_id"].dtype == pl.Int64
    if "duplicated_source" in wanted:
        assert table["duplicated_source"].dtype == pl.Boolean


def test_values_of_the_bulk_form(test_data):
    path = test_data / "formats/official_formats/GaiaSource_rebuilt_3rows.csv.gz"
    table = read(path, ["source_id", "parallax", "radial_velocity", "has_xp_continuous", "libname_gspphot"])
    assert table["source_id"].to_list() == [4295806720, 34361129088, 38655544960]
    assert table["parallax"].to_list() == [0.3543305595550248, 3.235017271512856, 3.1391701154499523]
    assert table["radial_velocity"].null_count() == 2
    assert table["radial_velocity"][2] == pytest.approx(41.187176)
    assert table["has_xp_continuous"].to_list() == [True, False, True]
    assert table["libname_gspphot"].to_list() == ["MARCS"] * 3
    assert not table[SHORT_ROW].any()


def test_missing_values_of_fits_are_null(test_data):
    path = test_data / "formats/pyia/gdr2_sm_negplx.fits"
    table = read(path, ["parallax", "radial_velocity"], release="dr2")
    assert table["parallax"].null_count() > 0
    assert (table["parallax"] < 0).any()


def test_units_of_a_fits_table_are_converted(tmp_path):
    from astropy import units as u
    from astropy.table import Table

    table = stars(5)
    fits = Table({n: table[n].to_numpy() for n in ("source_id", "ra", "dec", "parallax", "pmra", "pmdec")})
    fits["parallax"] = (fits["parallax"] * u.mas).to(u.arcsec)
    fits.write(tmp_path / "t.fits")
    assert read(tmp_path / "t.fits", ["parallax"])["parallax"].to_list() == pytest.approx(
        table["parallax"].to_list()
    )


@pytest.fixture
def bulk(tmp_path):
    (path,) = write_gaia_source(stars(3000), tmp_path / "good")
    return path


def rewritten(bulk, tmp_path, change):
    """The file with its decompressed lines changed."""
    lines = gzip.decompress(bulk.read_bytes()).split(b"\n")
    header = next(i for i, line in enumerate(lines) if not line.startswith(b"#"))
    change(lines, header)
    path = tmp_path / bulk.name
    path.write_bytes(gzip.compress(b"\n".join(lines), 1))
    return path


def test_truncated_gzip_is_named(bulk, tmp_path):
    path = tmp_path / "cut.csv.gz"
    for keep in (0.5, 0.01):
        path.write_bytes(bulk.read_bytes()[: int(keep * bulk.stat().st_size)])
        with pytest.raises(GalrayError, match=r"cut\.csv\.gz: the file is truncated|cut\.csv\.gz: no header"):
            read(path, ["ra"])
    path.write_bytes(bulk.read_bytes()[:-8])
    with pytest.raises(GalrayError, match="truncated or corrupt"):
        read(path, ["ra"])


def test_text_in_a_number_names_row_and_column(bulk, tmp_path):
    def change(lines, header):
        cells = lines[header + 1234].split(b",")
        cells[lines[header].split(b",").index(b"parallax")] = b"abc"
        lines[header + 1234] = b",".join(cells)

    path = rewritten(bulk, tmp_path, change)
    with pytest.raises(GalrayError, match=r"row 1234, column 'parallax': 'abc' is not a number"):
        read(path, ["ra", "parallax"])
    assert any("row 1234" in problem for problem in inspect(path)["problems"])


def test_rows_that_end_early_are_marked(bulk, tmp_path):
    def change(lines, header):
        lines[header + 7] = lines[header + 7][:300]

    path = rewritten(bulk, tmp_path, change)
    assert read(path, ["ra"])[SHORT_ROW].sum() == 1
    assert inspect(path)["problems"] == ["1 row(s) end before the last column"]


@pytest.mark.parametrize("number", [1, -2], ids=["first", "last"])
def test_short_rows_at_either_end(bulk, tmp_path, number):
    """Also where such a row is the first that a parser sees, or the file ends inside it."""

    def change(lines, header):
        place = header + number if number > 0 else len(lines) + number
        lines[place] = lines[place][:300]
        if number < 0:
            del lines[place + 1 :]

    whole = inspect(bulk)["rows"]
    path = rewritten(bulk, tmp_path, change)
    assert read(path, ["ra"])[SHORT_ROW].sum() == 1
    found = inspect(path)
    assert (found["rows"], found["problems"]) == (whole, ["1 row(s) end before the last column"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv.gz", b"", "is empty"),
        ("list.dat", b"0.1 0.2 0.3\n0.4 0.5 0.6\n", "not a header"),
        ("numbers.csv", b"1.5,2.5\n3.5,4.5\n", "not a header"),
        ("image.png", b"\x89PNG\r\n\x1a\n\0\0\0\0", "not a table"),
        ("broken.parquet", b"PAR1" + b"x" * 50, "truncated or corrupt"),
        ("broken.fits", b"SIMPLE  =   T" + b" " * 100, "cannot be read as fits"),
    ],
)
def test_files_of_no_known_form(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(GalrayError, match=message) as caught:
        open_source(path)
    assert name in caught.value.what
    assert caught.value.remedy


def test_a_parquet_file_cut_short(tmp_path):
    stars(3000).write_parquet(tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(GalrayError, match=r"cut\.parquet: the Parquet file is truncated"):
        open_source(tmp_path / "cut.parquet")


def test_rename_and_case(tmp_path):
    table = stars(4).select(
        pl.col("source_id").alias("SOURCE_ID"), pl.col("ra"), pl.col("parallax").alias("plx")
    )
    table.with_columns(pl.lit(1).alias("myColumn")).write_parquet(tmp_path / "t.parquet")
    source = open_source(tmp_path / "t.parquet", rename={"plx": "parallax"})
    assert dict(source.names) == {
        "source_id": "SOURCE_ID",
        "ra": "ra",
        "parallax": "plx",
        "myColumn": "myColumn",
    }


def test_inspect_of_genuine_files(test_data, tmp_path):
    whole = inspect(test_data / "formats/official_formats/GaiaSource_rebuilt_3rows.csv.gz")
    assert (whole["format"], whole["kind"], whole["rows"], whole["missing"]) == ("csv", "gaia", 3, [])
    assert len(whole["columns"]) == 152
    assert whole["problems"] == []
    mosaik = inspect(test_data / "gaia_dr2/mosaik_40cells_z0.4kpc.parquet", release="dr2")
    assert mosaik["rows"] == 268_545
    assert mosaik["absent_values"]["radial_velocity"] == 268_545 - 237_536
    assert any("no source_id" in note for note in mosaik["notes"])
    shutil.copy(
        test_data / "gaia_challenge/PlumCoreIso/gs010_bs050_rcrs100_rarcinf_core_0400mpc3_df_100_0.dat",
        tmp_path,
    )
    with pytest.raises(GalrayError, match="not a header"):
        inspect(next(tmp_path.glob("*.dat")))


def test_a_new_release_is_a_new_table(tmp_path):
    """As DR4 will come: other columns, one of them under another name, bulk files with an ECSV header."""
    rows = [
        f"{c.name},{c.dtype},{c.unit}," for c in columns("dr3") if "'" not in c.unit and "," not in c.unit
    ]
    rows = [
        row.replace("radial_velocity,float32,km.s**-1,", "rv_combined,float32,km.s**-1,radial_velocity")
        for row in rows
    ]
    rows.append("rv_epoch_count,int16,,")
    table = tmp_path / "gaia_dr4.csv"
    table.write_text("name,dtype,unit,alias\n" + "\n".join(rows) + "\n")
    release = str(table)
    assert polars_dtype(release)["radial_velocity"] == pl.Float32
    written = stars(200).with_columns(rv_epoch_count=pl.lit(7))
    known = {c.name for c in columns(release)} | {"radial_velocity"}
    (path,) = write_gaia_source(
        written.select(n for n in written.columns if n in known), tmp_path, release=release
    )
    assert b"rv_combined" in gzip.decompress(path.read_bytes())
    settings = CatalogSettings(
        files=(str(path),), release=release, num_shards=1, keep_columns=("rv_epoch_count",)
    )
    store = ingest(settings, tmp_path / "store")
    assert store.num_rows == written["radial_velocity"].is_not_nan().sum()
    assert set(store.table(["rv_epoch_count"])["rv_epoch_count"]) == {7}
    assert store.table(["rv_epoch_count"])["rv_epoch_count"].dtype == pl.Int16
    table.with_name("bad.csv").write_text("name,dtype,unit\nra,real,deg\n")
    with pytest.raises(GalrayError, match="column 'ra' has type 'real'"):
        columns(str(table.with_name("bad.csv")))


def test_columns_that_folders_name(tmp_path):
    """A partitioned table: what its folders say of all rows is a column, unless the files have it."""
    table = stars(400).drop("ruwe")
    for number, part in enumerate(table.iter_slices(200)):
        folder = tmp_path / "t" / f"survey=field%20{number}" / f"ruwe=1.{number}" / f"bp_rp={number}"
        folder.mkdir(parents=True)
        part.write_parquet(folder / "0.parquet")
    first = tmp_path / "t/survey=field%200/ruwe=1.0/bp_rp=0/0.parquet"
    assert read(first, ["survey"]).to_dict(as_series=False) == {"survey": ["field 0"] * 200}
    got = read(first, ["bp_rp", "survey", "ruwe"])
    assert got["bp_rp"].equals(table["bp_rp"][:200])
    assert set(got["ruwe"]) == {1.0}
    settings = {"files": (str(tmp_path / "t/**/*.parquet"),), "num_shards": 1, "require_rv": False}
    store = ingest(
        CatalogSettings(**settings, keep_columns=("survey",), cuts={"ruwe": 1.05}), tmp_path / "store"
    )
    assert store.row_account["cut:ruwe"] == 200
    assert set(store.table(["survey"])["survey"]) == {"field 0"}


def test_bytes_that_are_no_text_are_not_taken_for_a_header(tmp_path):
    broken = tmp_path / "stars.parquet"
    broken.write_bytes(bytes(range(128, 256)) * 4)
    with pytest.raises(GalrayError, match=r"stars\.parquet: not a table of a known form"):
        open_source(broken)
