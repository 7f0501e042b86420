"""Bulk files from a server that drops connections, lies and fails."""

import hashlib
import http.server
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter

import hpgeom
import numpy as np
import pytest

from galray import cli
from galray.catalog import CatalogSettings, ingest, write_gaia_source
from galray.catalog.download import Patience, download
from galray.catalog.fetch import fetch
from galray.catalog.fetch_bulk import choose, list_files
from galray.catalog.regions import Region
from galray.errors import GalrayError
from tests.catalog_stars import stars
from tests.waiting import wait_for

QUICK = Patience(tries=3, wait=0.01, longest=0.02)


class Faulty:
    """What a server does wrong, file by file, and how many bytes it sent of each."""

    def __init__(self, folder):
        self.folder = folder
        self.sent = Counter()
        self.asked = []
        self.drop_after = {}  # name → bytes after which the connection breaks
        self.corrupt = {}  # name → how many times
        self.failures = {}  # name → status codes to answer first
        self.ignore_range = False
        self.hold_after = {}  # name → bytes after which it waits for the release
        self.release = threading.Event()
        self.url = ""


@pytest.fixture
def server(tmp_path):
    """A loopback server of a folder of bulk files, with faults at will."""
    folder = tmp_path / "cdn"
    paths = write_gaia_source(stars(2500, seed=3), folder, rows_per_file=500)
    sums = [f"{hashlib.md5(p.read_bytes()).hexdigest()}  {p.name}" for p in paths]
    (folder / "_MD5SUM.txt").write_text("\n".join([*sums, "0" * 32 + "  readme.txt"]) + "\n")
    faults = Faulty(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, headers=()):
            self.send_response(status)
            for key, value in headers:
                self.send_header(key, value)
            self.end_headers()

        def do_HEAD(self):
            path = folder / self.path.strip("/")
            size = path.stat().st_size if path.is_file() else 0
            self.answer(200 if size else 404, [("Content-Length", str(size)), ("Accept-Ranges", "bytes")])

        def do_GET(self):
            name = self.path.strip("/")
            asked = self.headers.get("Range")
            faults.asked.append((name, asked))
            if faults.failures.get(name):
                self.answer(faults.failures[name].pop(0), [("Content-Length", "0")])
                return
            if not (folder / name).is_file():
                self.answer(404, [("Content-Length", "0")])
                return
            content = (folder / name).read_bytes()
            if faults.corrupt.get(name, 0) > 0:
                faults.corrupt[name] -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            size = len(content)
            begin, partial = 0, asked is not None and not faults.ignore_range
            if partial:
                first, last = re.match(r"bytes=(\d*)-(\d*)", asked).groups()
                begin = int(first) if first else max(0, size - int(last))
                content = content[: int(last) + 1] if first and last else content
            if begin and begin >= len(content):
                self.answer(416, [("Content-Length", "0")])
                return
            headers = [("Content-Length", str(len(content) - begin))]
            if partial:
                headers.append(("Content-Range", f"bytes {begin}-{len(content) - 1}/{size}"))
            self.answer(206 if partial else 200, headers)
            drop, hold = faults.drop_after.get(name), faults.hold_after.get(name, math.inf)
            body = content[begin:] if drop is None else content[begin : begin + drop]
            for start in range(0, len(body), 1 << 14):
                block = body[start : start + (1 << 14)]
                self.wfile.write(block)
                faults.sent[name] += len(block)
                if start + len(block) >= hold:
                    faults.release.wait()
                    self.close_connection = True
                    return
            if len(body) < len(content) - begin:
                self.close_connection = True

    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    faults.url = f"http://127.0.0.1:{service.server_port}"
    yield faults
    faults.release.set()
    service.shutdown()
    service.server_close()
    thread.join()


def names(server):
    return sorted(path.name for path in server.folder.glob("*.gz"))


def same(server, folder, wanted=None):
    wanted = names(server) if wanted is None else wanted
    assert sorted(path.name for path in folder.glob("*.gz")) == sorted(wanted)
    assert not list(folder.glob("*.part"))
    return all((folder / n).read_bytes() == (server.folder / n).read_bytes() for n in wanted)


def get(server, folder, **more):
    return fetch(folder, source=server.url, patience=QUICK, **more)


def test_a_release_comes_whole_and_once(server, tmp_path):
    found = get(server, tmp_path / "to")
    size = sum((server.folder / name).stat().st_size for name in names(server))
    assert found == {"what": "bulk", "files": 5, "bytes": size, "fetched": 5, "received": size}
    assert same(server, tmp_path / "to")
    again = get(server, tmp_path / "to")
    assert (again["fetched"], again["received"]) == (0, 0)
    # A file that was touched is read again, and one that was spoiled is fetched again.
    first, second = (tmp_path / "to" / name for name in names(server)[:2])
    os.utime(first)
    second.write_bytes(b"x" * second.stat().st_size)
    assert get(server, tmp_path / "to")["fetched"] == 1
    assert same(server, tmp_path / "to")
    # The folder is a source itself.
    assert fetch(tmp_path / "copy", source=str(tmp_path / "to"), patience=QUICK)["fetched"] == 5
    assert same(server, tmp_path / "copy")
    direct = ingest(CatalogSettings(files=(str(server.folder),), num_shards=1), tmp_path / "a")
    fetched = ingest(CatalogSettings(files=(str(tmp_path / "to"),), num_shards=1), tmp_path / "b")
    assert fetched.row_account == direct.row_account
    assert fetched.table(["source_id", "x"]).equals(direct.table(["source_id", "x"]))


@pytest.mark.parametrize("release", ["dr2", "dr3"])
def test_names_of_files_say_where_their_stars_are(tmp_path, release):
    level8 = [(0, 3111), (3112, 5000), (5001, 12 * 4**8 - 1)]
    if release == "dr2":
        pairs = [f"{a << 43}_{((b + 1) << 43) - 1}" for a, b in level8]
    else:
        pairs = [f"{a:06d}-{b:06d}" for a, b in level8]
    listing = "".join(f"{i:032x}  GaiaSource_{pair}.csv.gz\n" for i, pair in enumerate(pairs))
    (tmp_path / ("MD5SUM.txt" if release == "dr2" else "_MD5SUM.txt")).write_text(listing)
    files = list_files(release, str(tmp_path))
    assert [(file.first, file.last) for file in files] == level8
    inside = choose(files, Region.from_healpix(f"10:{3112 * 16 + 3}"))
    assert [file.first for file in inside] == [3112]
    assert len(choose(files, Region.from_healpix("8:3111-3112"))) == 2
    assert len(choose(files, Region.from_healpix("0:11"))) == 1
    assert len(choose(files, number=2)) == 2
    ra, dec = hpgeom.pixel_to_angle(256, 4000, nest=True)
    cone = choose(files, Region.from_cone(f"{float(ra[()])},{float(dec[()])},0.01"))
    assert [file.first for file in cone] == [3112]


def test_files_of_a_region_hold_its_stars(server, tmp_path):
    table = stars(2500, seed=3)
    inside = hpgeom.angle_to_pixel(2, table["ra"], table["dec"], nest=True) == 5
    found = get(server, tmp_path / "to", region=Region.from_healpix("1:5"))
    assert found["files"] < 5
    store = ingest(CatalogSettings(files=(str(tmp_path / "to"),), num_shards=1), tmp_path / "store")
    wanted = table.filter(inside & table["has_rvs"].to_numpy())["source_id"]
    assert set(wanted) <= set(store.table(["source_id"])["source_id"])
    assert len(wanted) > 20


def test_dropped_connections_go_on_where_they_broke(server, tmp_path):
    for name in names(server):
        server.drop_after[name] = 30_000
    found = get(server, tmp_path / "to", workers=2)
    assert same(server, tmp_path / "to")
    for name in names(server):
        size = (server.folder / name).stat().st_size
        assert server.sent[name] == size  # no byte came twice
        begins = [int(asked[6:-1]) if asked else 0 for n, asked in server.asked if n == name]
        assert begins == sorted(begins)
        assert len(begins) == -(-size // 30_000)
    assert found["received"] == found["bytes"]


def test_a_server_without_ranges_sends_anew(server, tmp_path):
    server.ignore_range = True
    name = names(server)[0]
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / f"{name}.part").write_bytes((server.folder / name).read_bytes()[:5000])
    get(server, tmp_path / "to")
    assert same(server, tmp_path / "to")
    # One that also drops every connection is given up: nothing is gained.
    server.drop_after[name] = 20_000
    with pytest.raises(GalrayError, match=r"connection was dropped \(3 attempts\)"):
        get(server, tmp_path / "other", files=1)


def test_a_whole_part_needs_no_byte_more(server, tmp_path):
    name = names(server)[0]
    content = (server.folder / name).read_bytes()
    (tmp_path / f"{name}.part").write_bytes(content)
    get(server, tmp_path, files=1)
    assert same(server, tmp_path, [name])
    assert server.sent[name] == 0
    # A part that is longer, or of other content, is thrown away.
    for wrong in (content + b"more", b"?" * 1000):
        (tmp_path / name).unlink()
        (tmp_path / f"{name}.part").write_bytes(wrong)
        get(server, tmp_path, files=1)
        assert same(server, tmp_path, [name])


def test_corrupt_files(server, tmp_path):
    once, ever = names(server)[1:3]
    server.corrupt[once] = 1
    get(server, tmp_path / "once")
    assert same(server, tmp_path / "once")
    server.corrupt[ever] = 99
    bad = (server.folder / ever).read_bytes()
    expected = hashlib.md5(bad).hexdigest()
    found = hashlib.md5(bad[:-1] + bytes([bad[-1] ^ 1])).hexdigest()
    with pytest.raises(
        GalrayError, match=rf"{ever}: corrupt 3 times over: MD5 expected {expected}, found {found}"
    ):
        get(server, tmp_path / "ever")
    # The others came all the same.
    assert same(server, tmp_path / "ever", [name for name in names(server) if name != ever])


def test_answers_that_are_errors(server, tmp_path):
    first, second = names(server)[:2]
    server.failures = {first: [500, 503], "_MD5SUM.txt": [502]}
    get(server, tmp_path / "to")
    assert same(server, tmp_path / "to")
    server.failures = {first: [500] * 9}
    with pytest.raises(GalrayError, match=rf"{first}: HTTP 500 .*\(3 attempts\) \(1 failed, 4 of 5"):
        get(server, tmp_path / "again")
    server.failures = {}
    (server.folder / second).unlink()
    asked = len(server.asked)
    with pytest.raises(GalrayError, match=rf"{second}: HTTP 404"):
        get(server, tmp_path / "third", workers=1)
    assert [name for name, _ in server.asked[asked:]].count(second) == 1
    with pytest.raises(GalrayError, match="HTTP 404"):
        fetch(tmp_path / "x", source=server.url + "/none", patience=QUICK)
    with pytest.raises(GalrayError, match="refused"):
        fetch(tmp_path / "x", source="http://127.0.0.1:9", patience=QUICK)


def test_a_killed_fetch_goes_on(server, tmp_path):
    third = names(server)[2]
    server.hold_after = {third: 20_000}
    target = tmp_path / "to"
    command = [sys.executable, "-m", "galray.cli", "catalog", "fetch", "--source", server.url]
    command += ["--to", str(target), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = target / f"{third}.part"
    try:
        wait_for(lambda: part.exists() and part.stat().st_size >= 20_000, "a part of the third file", process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    server.hold_after = {}
    server.release.set()
    held = part.stat().st_size
    assert 20_000 <= held < (server.folder / third).stat().st_size
    assert len(list(target.glob("*.gz"))) == 2
    found = get(server, target)
    assert same(server, target)
    assert found["fetched"] == 3
    assert (third, f"bytes={held}-") in server.asked


def test_disks_that_take_nothing(server, tmp_path):
    with pytest.raises(GalrayError, match=r"/proc/.*: "):
        get(server, "/proc/galray")
    full = tmp_path / "to" / names(server)[0]
    full.parent.mkdir()
    full.with_name(full.name + ".part").symlink_to("/dev/full")
    with pytest.raises(GalrayError, match="the disk is full"):
        download(f"{server.url}/{full.name}", full, "0" * 32, QUICK)


def test_folders_of_other_releases_and_other_fetches(server, tmp_path):
    get(server, tmp_path, files=1)
    with pytest.raises(GalrayError, match="was fetched with release = dr3, not edr3"):
        get(server, tmp_path, release="edr3")
    import fcntl

    with (tmp_path / ".fetch.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(GalrayError, match="another fetch is writing"):
            get(server, tmp_path)


def test_a_dry_run_counts(server, tmp_path):
    found = get(server, None, dry_run=True, files=3)
    size = sum((server.folder / name).stat().st_size for name in names(server)[:3])
    assert found == {"what": "bulk", "files": 3, "bytes": size, "exact": True}
    assert not server.sent.keys() - {"_MD5SUM.txt"}


def held(ranges, pixels):
    first, last = np.array(ranges).T
    place = np.searchsorted(first, pixels, side="right") - 1
    return bool((place >= 0).all() and (pixels <= last[place]).all())


def test_regions_hold_the_stars_they_should():
    rng = np.random.default_rng(0)
    for level in (0, 3, 8, 10, 12):
        pixels = rng.choice(12 * 4**level, min(5, 12 * 4**level), replace=False)
        region = Region.from_healpix(f"{level}:{','.join(map(str, pixels))}")
        ra, dec = hpgeom.pixel_to_angle(2**level, np.sort(pixels), nest=True)
        at8 = hpgeom.angle_to_pixel(256, ra, dec, nest=True)
        ranges = region.ranges()
        assert held(ranges, at8)
        count = sum(b - a + 1 for a, b in ranges)
        assert count == len(pixels) * 4 ** (8 - level) if level <= 8 else count <= len(pixels)
        assert sum(b - a + 1 for a, b in region.id_ranges()) == len(pixels) << (35 + 2 * (12 - level))
    table = stars(4000)
    for cone in ("10,89.5,20", "359.9,-5,12", "180,0,170", "20,-90,5"):
        region = Region.from_cone(cone)
        ra, dec, radius = map(float, cone.split(","))
        inside = table.select(region.condition()).to_series().to_numpy()
        a, d = np.radians(table["ra"].to_numpy()), np.radians(table["dec"].to_numpy())
        unit = np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)])
        a0, d0 = np.radians(ra), np.radians(dec)
        centre = np.array([np.cos(d0) * np.cos(a0), np.cos(d0) * np.sin(a0), np.sin(d0)])
        assert (inside == (centre @ unit >= np.cos(np.radians(radius)))).all()
        pixels = table["source_id"].to_numpy()[inside] >> 43
        assert held(region.ranges(), pixels)


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.delenv("GALRAY_DEBUG", raising=False)
        monkeypatch.setattr(sys, "argv", ["galray", "catalog", "fetch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


def test_the_command(server, tmp_path, command):
    code, out, _ = command("--source", server.url, "--files", 2, "--dry-run")
    assert code == 0
    assert re.search(r"2 files, [\d.]+ kB", out)
    code, out, _ = command("--source", server.url, "--files", 2, "--to", tmp_path / "to", "--json")
    assert code == 0
    assert json.loads(out)["fetched"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--healpix", "1:5", "--cone", "1,2,3", "--to", "x"], "two regions"),
        (["--cone", "1,2", "--to", "x"], "cone '1,2' is not a cone"),
        (["--cone", "1,95,1", "--to", "x"], "is not a cone"),
        (["--healpix", "1:48", "--to", "x"], "level 1 has pixels 0 to 47"),
        (["--healpix", "13:1", "--to", "x"], "levels up to 12"),
        (["--healpix", "five", "--to", "x"], "not a list of pixels"),
        (["--release", "dr9", "--to", "x"], "release 'dr9'"),
        (["--files", "0", "--to", "x"], "0 files are none"),
        (["--files", "1"], "no folder is named"),
        (["--source", "s3://bucket/files", "--endpoint", "http://127.0.0.1:9", "--to", "x"], "s3://bucket"),
    ],
)
def test_mistakes_end_in_one_clear_line(tmp_path, command, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err.splitlines()[0]
    assert len(err.splitlines()) == 2
