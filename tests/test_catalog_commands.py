"""``galray catalog``: what its commands print, and their exit codes."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import polars as pl
import pytest

from galray import cli
from galray.catalog import CatalogSettings, ShardStore, ingest, inspect, verify, write_gaia_source
from tests.catalog_stars import stars
from tests.chain_config import SMALL_MODELS


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``galray catalog …`` in this process; gives exit code, output and errors."""
    monkeypatch.delenv("GALRAY_DEBUG", raising=False)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["galray", "catalog", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def bulk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bulk")
    return write_gaia_source(stars(3000), folder, rows_per_file=800)


@pytest.fixture(scope="module")
def pristine(bulk, tmp_path_factory):
    settings = CatalogSettings(files=tuple(map(str, bulk)), num_shards=4, require_rv=False)
    return ingest(settings, tmp_path_factory.mktemp("store") / "store").path


@pytest.fixture
def store(pristine, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(pristine, tmp_path / "store")
    return ShardStore(tmp_path / "store")


def test_help_is_light():
    code = (
        "import sys\nsys.argv = ['galray', 'catalog', '--help']\nfrom galray.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'ray', 'polars', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("ingest", "inspect", "verify", "summary"):
        assert f"\n  {name} " in done.stdout, name


# inspect ---------------------------------------------------------------------------------------------


def test_inspect_as_a_configuration_says(command, tmp_path):
    h5py = pytest.importorskip("h5py")
    stars(50).rename({"parallax": "plx"}).write_parquet(tmp_path / "named.parquet")
    with h5py.File(tmp_path / "snapshot.hdf5", "w") as file:
        file["MyStars/Coordinates"] = np.zeros((7, 3))
        file["MyStars/Velocities"] = np.zeros((7, 3))
    config = tmp_path / "own.toml"
    config.write_text(
        f'name = "own"\n[catalog]\nfiles = ["{tmp_path}/named.parquet"]\nrename = {{plx = "parallax"}}\n'
        '[catalog.states.snapshot]\nparticles = "MyStars"\n[catalog.ball]\nradius_kpc = 1.0\n'
    )
    assert command("inspect", tmp_path / "named.parquet")[0] == 1
    assert command("inspect", tmp_path / "named.parquet", "--config", config)[0] == 0
    assert command("inspect", tmp_path / "snapshot.hdf5")[0] == 2
    code, out, _ = command("inspect", tmp_path / "snapshot.hdf5", "--config", config, "--json")
    assert (code, json.loads(out)["rows"], json.loads(out)["kind"]) == (0, 7, "states")


def test_inspect_a_whole_file(command, bulk):
    code, out, err = command("inspect", bulk[0])
    assert (code, err) == (0, "")
    assert "Gaia source table" in out
    assert "problem" not in out
    code, out, _ = command("inspect", bulk[0], "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["format"], found["kind"], found["missing"], found["problems"]) == ("csv", "gaia", [], [])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda raw: raw[: len(raw) // 2], "truncated"),
        (lambda raw: raw[:-4] + b"abcd", "truncated or corrupt"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-30]), "end before the last column"),
        (
            lambda raw: gzip.compress(gzip.decompress(raw).replace(b",parallax,", b",parralax,")),
            "neither a Gaia",
        ),
    ],
    ids=["cut", "checksum", "short row", "renamed"],
)
def test_inspect_finds_what_is_wrong(command, bulk, tmp_path, spoil, words):
    path = tmp_path / bulk[0].name
    path.write_bytes(spoil(bulk[0].read_bytes()))
    code, out, _ = command("inspect", path)
    assert code == 1
    assert "problem: " in out
    assert words in out
    assert command("inspect", path, "--json")[0] == 1


def test_inspect_what_is_not_there(command, tmp_path):
    code, _, err = command("inspect", tmp_path / "nothing.csv")
    assert code == 2
    assert "nothing.csv: no such file" in err
    code, _, err = command("inspect", tmp_path)
    assert code == 2
    assert "neither a finished shard store" in err


def test_quick_inspection_reads_the_head_only(command, bulk, tmp_path):
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(bulk[0].read_bytes()[:-5000])
    assert command("inspect", cut)[0] == 1
    code, out, _ = command("inspect", cut, "--quick", "--json")
    assert code == 0, "the end is not looked at"
    assert json.loads(out)["rows"] is None
    whole = inspect(bulk[0])["rows"]
    assert inspect(bulk[0], quick=True)["estimated_rows"] == pytest.approx(whole, rel=0.1)
    plain = tmp_path / "plain.csv"
    plain.write_bytes(gzip.decompress(bulk[0].read_bytes()))
    assert inspect(plain, quick=True)["estimated_rows"] == pytest.approx(whole, rel=0.1)
    table = stars(5000, rv_fraction=0.5)
    table = table.with_columns(pl.col("radial_velocity").fill_nan(None))
    table.write_parquet(tmp_path / "t.parquet", row_group_size=600)
    quick = inspect(tmp_path / "t.parquet", quick=True)
    assert quick["rows"] == 5000
    assert quick["absent_values"]["radial_velocity"] == table["radial_velocity"].null_count()
    assert (
        quick["absent_values"]["radial_velocity"]
        == inspect(tmp_path / "t.parquet")["absent_values"]["radial_velocity"]
    )


def test_inspect_hats(command, tmp_path, test_data):
    found = inspect(test_data / "formats/hats_lsdb/small_sky_order1_collection")
    assert (found["what"], found["rows"], found["tiles"], found["levels"]) == ("hats", 131, 4, [1])
    assert "collection" in found
    shutil.copytree(
        test_data / "formats/hats_lsdb/small_sky_order1_collection/small_sky_order1", tmp_path / "h"
    )
    next((tmp_path / "h").rglob("Npix=45.parquet")).unlink()
    code, out, _ = command("inspect", tmp_path / "h")
    assert code == 1
    assert "tells of 131 rows" in out
    assert "lists 4 tiles, 3 are there" in out
    next((tmp_path / "h").rglob("Npix=46.parquet")).write_bytes(b"PAR1")
    assert any("Npix=46.parquet" in problem for problem in inspect(tmp_path / "h")["problems"])


def test_inspect_other_forms(tmp_path):
    table = stars(40).select("source_id", "ra", "dec", "parallax", "pmra", "pmdec", "phot_g_mean_mag")
    from astropy.table import Table

    Table(table.to_dict(as_series=False)).write(tmp_path / "t.fits")
    found = inspect(tmp_path / "t.fits")
    assert (found["format"], found["kind"], found["rows"], found["problems"]) == ("fits", "gaia", 40, [])
    assert any("catalog.require_rv = false" in note for note in found["notes"])
    states = pl.DataFrame(np.ones((3, 6)), schema=["x", "y", "z", "vx", "vy", "vz"])
    states.write_csv(tmp_path / "states.csv")
    found = inspect(tmp_path / "states.csv")
    assert (found["kind"], found["rows"], found["problems"]) == ("states", 3, [])
    assert any("no source_id" in note for note in found["notes"])
    states.clear().write_csv(tmp_path / "states.csv")
    assert inspect(tmp_path / "states.csv")["problems"] == ["no rows"]


# verify ----------------------------------------------------------------------------------------------


def test_verify_a_whole_store(command, store):
    code, out, _ = command("verify", store.path)
    assert code == 0
    assert out.startswith("ok ")
    found = json.loads(command("verify", store.path, "--json")[1])
    assert found["problems"] == []
    assert found["rows"] == store.num_rows + store.no_rv.num_rows
    assert found["shards"] == 8
    code, _, err = command("verify", store.path.parent)
    assert code == 2
    assert "not a finished shard store" in err


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def manifest_of(store, **changes):
    path = store.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap(store):
    """Two shards change places, and the manifest with them."""
    a, b = store.shards[0], store.shards[1]
    content = a.read_bytes(), b.read_bytes()
    a.write_bytes(content[1])
    b.write_bytes(content[0])
    first, second, *rest = store.manifest["shards"]
    shards = [{**second, "file": first["file"]}, {**first, "file": second["file"]}, *rest]
    manifest_of(store, shards=shards)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: flip(s.shards[2]), ["shard-00002.parquet: the checksum differs"]),
        (lambda s: s.shards[1].unlink(), ["shard-00001.parquet: the file is gone"]),
        (lambda s: s.shards[3].write_bytes(b"PAR1"), ["shard-00003.parquet: 4 bytes, the manifest says"]),
        (lambda s: flip(s.no_rv.shards[0]), ["no_rv/shard-00000.parquet: the checksum differs"]),
        (lambda s: shutil.rmtree(s.path / "no_rv"), ["no_rv: the stars without radial velocity are gone"]),
        (lambda s: manifest_of(s, num_rows=1), ["manifest.json: 1 stars"]),
        (lambda s: manifest_of(s, account={**s.row_account, "rows_in": 7}), ["does not add up: 7 rows in"]),
        (swap, ["shard-00000.parquet: holds stars that belong to another", "shard-00001", "hash is not"]),
        (
            lambda s: [flip(s.shards[0]), s.shards[1].unlink()],
            ["shard-00000.parquet: the checksum", "shard-00001.parquet: the file is gone"],
        ),
    ],
)
def test_verify_names_what_is_spoiled(command, store, spoil, words):
    spoil(store)
    code, out, err = command("verify", store.path)
    assert code == 1
    assert err == ""
    for word in words:
        assert word in out, out
    assert command("inspect", store.path)[0] == 1


def test_stores_of_before_are_verified_by_sha256(command, store):
    """Stores of formats 1 and 2 have no XXH3 of their files."""
    from galray.catalog.shards import store_hash
    from galray.provenance import file_hash

    for view in (store, store.no_rv):
        manifest = json.loads((view.path / "manifest.json").read_text())
        for folder, entries in (("", manifest["shards"]), ("sky", manifest["tiles"]["files"])):
            for entry in entries:
                del entry["xxh128"]
                entry["sha256"] = file_hash(view.path / folder / entry["file"])
        manifest["selection"] = {
            name: file_hash(store.path / "selection" / name) for name in manifest.get("selection") or {}
        }
        manifest |= {"format": 2, "hash": store_hash(manifest["shards"], manifest["frame"])}
        (view.path / "manifest.json").write_text(json.dumps(manifest))
    assert verify(store.path).problems == ()
    assert ShardStore(store.path).verify()["rows"] == store.num_rows
    flip(store.shards[2])
    assert "shard-00002.parquet: the checksum differs" in command("verify", store.path)[1]


def test_verify_compares_columns(store):
    columns = dict(store.manifest["columns"])
    columns.pop("bp_rp")
    manifest_of(store, columns=columns)
    found = verify(store.path).problems
    assert len(found) == 4
    assert "shard-00000.parquet: other columns than the manifest's: bp_rp" in found[0]


def test_quick_verification_trusts_sizes(command, store):
    flip(store.shards[0])
    assert command("verify", store.path, "--quick")[0] == 0
    store.shards[0].unlink()
    assert command("verify", store.path, "--quick")[0] == 1


def test_verify_notes_leftovers(store):
    (store.path / ".ingest-0123").mkdir()
    (store.path / "shard-99999.parquet").write_bytes(b"")
    found = verify(store.path)
    assert found.problems == ()
    assert len(found.notes) == 2


# summary, ingest -------------------------------------------------------------------------------------


def test_summary_prints_and_plots(command, store, tmp_path):
    code, out, _ = command("summary", store.path, "--figures", tmp_path / "figures")
    assert code == 0
    assert f"{store.num_rows:,} stars with 6D states" in out
    assert "v_phi [km/s]" in out
    assert "kept without radial velocity" in out
    assert "6 figures in" in out
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 6
    code, out, err = command("summary", store.path, "--json", "--figures", tmp_path / "figures")
    assert code == 0
    assert json.loads(out)["num_stars"] == store.num_rows, "JSON alone on standard output"
    assert "6 figures" in err


@pytest.fixture
def config(bulk, tmp_path):
    path = tmp_path / "files.toml"
    (tmp_path / "data").mkdir()
    for file in bulk:
        shutil.copy(file, tmp_path / "data")
    path.write_text(
        f"""
name = "files"
output = "{tmp_path}/runs"
methods = ["moments"]
[catalog]
files = ["{tmp_path}/data"]
num_shards = 5
[ensemble]
moments = {{ seeds = 1, draws = 0 }}
[tracking]
enabled = false
{SMALL_MODELS}
"""
    )
    return path


def test_ingest_forgives_as_many_bad_files_as_told(command, config, tmp_path):
    bad = sorted((tmp_path / "data").iterdir())[1]
    bad.write_bytes(bad.read_bytes()[:5000])
    code, _, err = command("ingest", config, "--workers", 0)
    assert code == 2
    assert bad.name in err
    # The same run goes on: how much is forgiven is not part of what it is.
    code, out, err = command("ingest", config, "--workers", 0, "--allow-bad", 1)
    assert code == 0, err
    assert f"quarantined: {bad.resolve()}: " in out
    store = tmp_path / "runs" / "files" / "shards"
    code, out, _ = command("inspect", store)
    assert code == 0
    assert "note: quarantined: " in out
    assert command("verify", store)[0] == 0
