"""What can go wrong with files and disks: the store is as it would have been, or the loss is named."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from galray.catalog import CatalogSettings, ShardStore, ingest, write_gaia_source
from galray.catalog import workers as workers_module
from galray.catalog.inputs import InputUnit, local_unit
from galray.catalog.mirror import Place
from galray.catalog.quarantine import lost_rows
from galray.catalog.workers import Worker, piece_name
from galray.errors import GalrayError
from tests.catalog_stars import stars


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_gaia_source(stars(3000), folder, rows_per_file=1000)
    return folder


def configured(folder, **options):
    return CatalogSettings(files=(str(folder),), **{"num_shards": 3, **options})


def checksums(store):
    """Of everything that a store holds: shards, tiles, those without radial velocity, side files."""
    found = [(entry["file"], entry["xxh128"]) for entry in store.manifest["shards"]]
    found += [(entry["file"], entry["xxh128"]) for entry in store.manifest["tiles"]["files"]]
    return found + (checksums(store.no_rv) if store.no_rv else [])


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    return ingest(configured(folder), tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def text_of(path):
    return gzip.decompress(path.read_bytes()).decode()


def ids_in(path):
    return pl.read_csv(path, comment_prefix="#", columns=["source_id"])["source_id"].to_list()


def truncated_gz(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return None


def text_in_a_float_column(path):
    lines = text_of(path).split("\n")
    cells = lines[-4].split(",")
    header = next(line for line in lines if line.startswith("solution_id"))
    cells[header.split(",").index("parallax")] = "oops"
    lines[-4] = ",".join(cells)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return ids_in(path)


def renamed_column(path):
    path.write_bytes(gzip.compress(text_of(path).replace(",parallax,", ",plx,").encode()))
    return ids_in(path)


def missing_column(path):
    frame = pl.read_csv(path, comment_prefix="#", null_values="null").drop("pmra")
    path.write_bytes(gzip.compress(frame.write_csv().encode()))
    return frame["source_id"].to_list()


def corrupt_footer(path):
    frame = pl.read_csv(path, comment_prefix="#", null_values="null")
    path.unlink()
    path = path.with_name("broken.parquet")
    frame.write_parquet(path)
    content = bytearray(path.read_bytes())
    content[-200:-20] = b"\xff" * 180
    path.write_bytes(bytes(content))
    return None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated_gz, "truncated or corrupt"),
        (text_in_a_float_column, "column 'parallax': 'oops' is not a number"),
        (renamed_column, "absent|no parallax"),
        (missing_column, "absent|no pmra"),
        (corrupt_footer, "corrupt"),
    ],
)
def test_a_bad_file_is_named_and_left_out_with_its_rows_and_nothing_else(
    copy, tmp_path, undisturbed, monkeypatch, spoil, reason
):
    good = sorted(copy.iterdir())
    bad = good.pop(1)
    original, whole = bad.read_bytes(), set(ids_in(bad))
    lost = spoil(bad)
    with pytest.raises(GalrayError, match=reason) as caught:
        ingest(configured(copy), tmp_path / "store")
    assert "--allow-bad 1" in caught.value.remedy or "allow_bad" in caught.value.remedy
    assert not (tmp_path / "store" / "manifest.json").exists()

    # The same with one bad file allowed: the good ones are not read again, and the store is theirs.
    reused, read = [], Worker.read

    def counting(self, unit):
        answer = read(self, unit)
        reused.append(answer["reused"])
        return answer

    monkeypatch.setattr(Worker, "read", counting)
    store = ingest(configured(copy, allow_bad=1), tmp_path / "store")
    assert reused == [True] * len(good)
    reference = ingest(CatalogSettings(files=tuple(map(str, good)), num_shards=3), tmp_path / "reference")
    assert checksums(store) == checksums(reference)
    (entry,) = store.manifest["quarantined"]
    assert entry["reason"]
    named = lost_rows(store.path)
    if lost is None:
        assert entry["rows"] is None
        assert entry["rows_named"] == named.height
        assert set(named["source_id"]) < whole
    else:
        assert entry["rows"] == entry["rows_named"] == len(lost)
        assert named["row"].to_list() == list(range(1, len(lost) + 1))
        assert named["source_id"].to_list() == lost
        assert set(named["file"]) == {entry["path"]}

    # Mended, the file is read, and all is as if nothing had happened.
    for path in copy.glob("broken*"):
        path.unlink()
    bad.write_bytes(original)
    mended = ingest(configured(copy), tmp_path / "store")
    assert checksums(mended) == checksums(undisturbed)
    assert lost_rows(mended.path).is_empty()
    assert mended.row_account == undisturbed.row_account


def test_all_bad_files_are_told_at_the_end(copy, tmp_path):
    first, second, *_ = sorted(copy.iterdir())
    truncated_gz(first)
    renamed_column(second)
    with pytest.raises(GalrayError) as caught:
        ingest(configured(copy, allow_bad=1), tmp_path / "store")
    assert "2 of " in caught.value.what
    assert first.name in caught.value.what
    assert second.name in caught.value.what
    assert "truncated" in caught.value.what
    assert "--allow-bad 2" in caught.value.remedy or "allow_bad" in caught.value.remedy


def test_files_with_the_same_trouble_are_told_together(folder, tmp_path):
    with pytest.raises(GalrayError, match="reads column 'nope'") as caught:
        ingest(configured(folder, cuts={"x": "nope > 3"}), tmp_path / "store")
    assert caught.value.what.count("reads column") == 1
    assert all(path.name in caught.value.what for path in folder.iterdir())


def test_a_file_listed_twice_counts_once(folder, tmp_path, undisturbed):
    paths = sorted(map(str, folder.iterdir()))
    (tmp_path / "link.csv.gz").symlink_to(paths[0])
    files = (*paths, paths[0], f"{folder}/../{folder.name}/*.gz", str(tmp_path / "link.csv.gz"))
    store = ingest(CatalogSettings(files=files, num_shards=3), tmp_path / "store")
    assert checksums(store) == checksums(undisturbed)
    assert store.row_account == undisturbed.row_account


def test_duplicates_across_files_change_nothing_but_the_account(copy, tmp_path, undisturbed):
    first = sorted(copy.iterdir())[0]
    number = len(ids_in(first))
    shutil.copy(first, copy / "GaiaSource_again.csv.gz")
    store = ingest(configured(copy), tmp_path / "store")
    assert checksums(store) == checksums(undisturbed)
    account = store.row_account
    assert account["rows_in"] == undisturbed.row_account["rows_in"] + number
    assert account["kept"] == undisturbed.row_account["kept"]
    assert account["cut:duplicate_source_id"] > 0
    assert account.pop("rows_in") == sum(account.values())


def test_storage_that_stumbles_is_asked_again(folder, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(workers_module, "PAUSE_SECONDS", 0.001)
    original, failures = workers_module.open_unit, []

    def stumbling(unit, *arguments):
        if len(failures) < 3:
            failures.append(unit)
            raise GalrayError(f"{unit.path}: cannot be read") from OSError(5, "Input/output error")
        return original(unit, *arguments)

    monkeypatch.setattr(workers_module, "open_unit", stumbling)
    store = ingest(configured(folder), tmp_path / "store")
    assert len({unit.path for unit in failures}) == 1
    assert checksums(store) == checksums(undisturbed)


def test_storage_that_stays_away_is_given_up(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "PAUSE_SECONDS", 0.001)
    asked = []

    def gone(unit, *arguments):
        asked.append(unit.path)
        raise GalrayError(f"{unit.path}: timed out") from TimeoutError("timed out")

    monkeypatch.setattr(workers_module, "open_unit", gone)
    with pytest.raises(GalrayError, match="timed out"):
        ingest(configured(folder), tmp_path / "store")
    assert len(asked) == workers_module.ATTEMPTS * len(set(asked))


def test_a_folder_that_workers_do_not_see(folder, tmp_path):
    settings = configured(folder)
    worker = Worker(settings.model_dump_json(), Place(tmp_path / "store" / ".ingest-x"), 0)
    assert "not visible on node" in worker.visible("1234")
    unit = local_unit(sorted(folder.iterdir())[0])
    (tmp_path / "elsewhere").mkdir()
    worker = Worker(settings.model_dump_json(), Place(tmp_path / "elsewhere"), 0)
    answer = worker.read(type(unit)("/nowhere/x.csv.gz", unit.size, unit.version))
    assert "/nowhere/x.csv.gz: not visible on node" in answer["error"]
    assert "storage that all nodes" in answer["remedy"]
    assert answer["bad_file"] is False


def test_leftovers_of_killed_ingests_are_removed(folder, tmp_path, undisturbed):
    target = tmp_path / "store"
    (target / ".ingest-of-another-time").mkdir(parents=True)
    (target / ".ingest-of-another-time" / "piece-1.6d.arrow").write_bytes(b"half")
    (target / ".manifest.json.77.tmp").write_text("{")
    (target / "shard-00000.parquet").write_bytes(b"half")
    with pytest.raises(GalrayError, match="not a finished shard store"):
        ShardStore(target)
    store = ingest(configured(folder), target)
    assert checksums(store) == checksums(undisturbed)
    assert not [path for path in target.iterdir() if path.name.startswith(".")]
    store.verify()


def test_a_half_written_piece_is_not_taken_for_a_whole_one(folder, tmp_path, undisturbed, monkeypatch):
    original = workers_module.PieceWriter.close

    def dies(self):
        self._flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(workers_module.PieceWriter, "close", dies)
    with pytest.raises(KeyboardInterrupt):
        ingest(configured(folder), tmp_path / "store")
    (work,) = (tmp_path / "store").glob(".ingest-*")
    unit = local_unit(sorted(folder.iterdir())[0].resolve())
    assert not (work / f"{piece_name(unit)}.json").exists()
    (work / f"{piece_name(unit)}.6d.arrow").write_bytes(b"ARROW1 and then the power went")
    monkeypatch.setattr(workers_module.PieceWriter, "close", original)
    assert checksums(ingest(configured(folder), tmp_path / "store")) == checksums(undisturbed)


def test_a_merge_that_was_interrupted_goes_on(folder, tmp_path, undisturbed, monkeypatch):
    original, merged = workers_module.merge_shard, []

    def dies_at_the_second(*arguments):
        if len(merged) == 1:
            raise KeyboardInterrupt
        merged.append(1)
        return original(*arguments)

    monkeypatch.setattr(workers_module, "merge_shard", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ingest(configured(folder), tmp_path / "store")
    monkeypatch.setattr(workers_module, "merge_shard", lambda *a: merged.append(2) or original(*a))
    store = ingest(configured(folder), tmp_path / "store")
    assert merged == [1, 2, 2]
    assert checksums(store) == checksums(undisturbed)


INGEST = """
import json, resource, sys
from galray.catalog import CatalogSettings, ingest
from galray.errors import GalrayError

limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    ingest(CatalogSettings(files=(sys.argv[1],), num_shards=3), sys.argv[2])
except GalrayError as error:
    print(json.dumps([error.what, error.remedy]))
    sys.exit(2)
"""


def run_ingest(folder, target, limit=0):
    return subprocess.run(
        [sys.executable, "-c", INGEST, str(folder), str(target), str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_files_that_may_not_grow(folder, tmp_path, undisturbed):
    """A quota by the process: what works without privileges."""
    target = tmp_path / "store"
    done = run_ingest(folder, target, limit=60_000)
    assert done.returncode == 2, done.stderr
    what, remedy = json.loads(done.stdout)
    assert re.search("store: cannot write shards: .*File too large", what)
    assert "free space" in remedy
    assert not (target / "manifest.json").exists()
    assert checksums(ingest(configured(folder), target)) == checksums(undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, and how to mount it again with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
        ).returncode

    if not hasattr(os, "geteuid") or os.geteuid() != 0 or mount("size=600k"):
        pytest.skip("a small file system can be mounted by root only")
    yield place, mount
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up(folder, small_disk, undisturbed):
    place, mount = small_disk
    done = run_ingest(folder, place / "store")
    assert done.returncode == 2, done.stderr
    what, remedy = json.loads(done.stdout)
    assert re.search("store: cannot write shards: .*No space left on device", what)
    assert "free space" in remedy
    assert not (place / "store" / "manifest.json").exists()
    assert mount("remount,size=40m") == 0
    done = run_ingest(folder, place / "store")
    assert done.returncode == 0, done.stdout + done.stderr
    assert checksums(ShardStore(place / "store")) == checksums(undisturbed)


def test_a_target_that_cannot_be_written(folder, small_disk):
    place, mount = small_disk
    assert mount("remount,ro") == 0
    done = run_ingest(folder, place / "store")
    assert done.returncode == 2, done.stderr
    assert "cannot write shards: Read-only file system" in json.loads(done.stdout)[0]
    assert mount("remount,rw") == 0


def test_a_store_on_a_disk_that_has_become_read_only(folder, small_disk, undisturbed):
    place, mount = small_disk
    assert mount("remount,size=40m") == 0
    assert run_ingest(folder, place / "store").returncode == 0
    assert mount("remount,ro") == 0
    # It cannot be locked there, and what it holds can still be read.
    assert "Read-only" in json.loads(run_ingest(folder, place / "store").stdout)[0]
    assert checksums(ShardStore(place / "store")) == checksums(undisturbed)
    assert mount("remount,rw") == 0


def test_a_target_below_a_file(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GalrayError, match="cannot write shards"):
        ingest(configured(folder), Path(tmp_path / "file" / "store"))


def test_numbers_beyond_all_squares_do_not_stop_the_pass(tmp_path):
    frame = pl.DataFrame({name: [1.0, 2.0, 3.0] for name in ("x", "y", "z", "vx", "vy", "vz")})
    frame.with_columns(big=pl.Series([1e200, -1e200, 1e200])).write_parquet(tmp_path / "t.parquet")
    settings = CatalogSettings(files=(str(tmp_path / "t.parquet"),), num_shards=2, keep_columns=("big",))
    store = ingest(settings, tmp_path / "store")
    assert store.manifest["columns"]["big"]["max"] == 1e200
    assert store.manifest["columns"]["big"]["std"] is None


def test_ranges_and_histograms_shard_by_shard(undisturbed):
    ranges = pl.read_parquet(undisturbed.path / "shard_ranges.parquet")
    counts = pl.read_parquet(undisturbed.path / "shard_histograms.parquet")
    total = dict.fromkeys(undisturbed.manifest["histograms"], 0)
    for number in range(3):
        table = undisturbed.table(shards=[number])
        own = {row["column"]: row for row in ranges.filter(pl.col("shard") == number).to_dicts()}
        for name in ("x", "vy", "phot_g_mean_mag", "parallax_error"):
            assert (own[name]["min"], own[name]["max"]) == (table[name].min(), table[name].max())
            assert (own[name]["rows"], own[name]["nulls"]) == (table.height, table[name].null_count())
        for row in counts.filter(pl.col("shard") == number).to_dicts():
            bins = undisturbed.manifest["histograms"][row["quantity"]]
            assert sum(row["counts"]) == table.height
            total[row["quantity"]] += table.height
            if row["quantity"] in table.columns:
                width = (bins["high"] - bins["low"]) / len(bins["counts"])
                values = table[row["quantity"]].cast(pl.Float64).to_numpy()
                place = ((values - bins["low"]) // width).clip(-1, len(bins["counts"])) + 1
                # Values within rounding of an edge may be on either side of it.
                found = pl.Series(place).cast(pl.Int64).value_counts()
                expected = dict.fromkeys(range(len(row["counts"])), 0) | dict(found.iter_rows())
                assert sum(abs(expected[i] - n) for i, n in enumerate(row["counts"])) <= 2
    for name, bins in undisturbed.manifest["histograms"].items():
        assert bins["below"] + bins["above"] + sum(bins["counts"]) == total[name] == undisturbed.num_rows
    table = undisturbed.table()
    speed = (table["vx"].cast(pl.Float64) ** 2 + table["vy"] ** 2 + table["vz"] ** 2).sqrt()
    slow = undisturbed.manifest["histograms"]["speed"]["counts"][:50]
    assert sum(slow) == pytest.approx((speed < 250).sum(), abs=1)


@pytest.mark.parametrize(
    ("path", "cause", "again"),
    [
        ("/data/a.csv", OSError(5, "Input/output error"), True),
        ("/data/a.csv", PermissionError(13, "Permission denied"), False),
        ("/data/a.csv", ValueError("connection of two columns"), False),
        ("s3://bucket/a.parquet", pl.exceptions.ComputeError("error sending request for url"), True),
        ("https://host/a.parquet", pl.exceptions.ComputeError("HTTP status 503 Service Unavailable"), True),
        ("https://host/a.parquet", ConnectionResetError(104, "Connection reset by peer"), True),
        ("https://host/a.parquet", pl.exceptions.ComputeError("HTTP status 404 Not Found"), False),
        ("https://host/a.parquet", pl.exceptions.ColumnNotFoundError("parallax"), False),
    ],
)
def test_what_is_worth_another_attempt(path, cause, again):
    def read():
        try:
            raise cause
        except type(cause):
            raise GalrayError(f"{path}: cannot be read") from None  # as readers do

    with pytest.raises(GalrayError) as caught:
        read()
    assert workers_module._is_transient(caught.value, InputUnit(path, 1, "1")) is again
