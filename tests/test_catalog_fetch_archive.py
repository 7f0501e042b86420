"""Rows that an archive chooses: a loopback TAP service that runs the queries, and does much wrong."""

import gzip
import hashlib
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from urllib.parse import parse_qs

import polars as pl
import pytest

from galray import cli
from galray.catalog import CatalogSettings, Region, fetch, ingest
from galray.catalog.columns import columns
from galray.catalog.download import Patience
from galray.catalog.fetch_archive import spans
from galray.catalog.tap import TapService
from galray.errors import GalrayError
from tests.catalog_stars import stars
from tests.waiting import wait_for

QUICK = Patience(tries=3, wait=0.01, longest=0.02)
WHERE = "radial_velocity IS NOT NULL AND ruwe < 1.3"
ERROR = """<?xml version="1.0"?>
<VOTABLE xmlns="http://www.ivoa.net/xml/VOTable/v1.3"><RESOURCE type="results">
<INFO name="QUERY_STATUS" value="ERROR">{}</INFO></RESOURCE></VOTABLE>"""
LIMITS = """<?xml version="1.0"?><c:capabilities xmlns:c="x"><capability><outputLimit>
<default unit="row">2000</default><hard unit="row">{}</hard></outputLimit></capability></c:capabilities>"""
WHOLE = (0, (12 << 59) - 1)


def gaia(n=3000, seed=0):
    """A gaia_source of stars with all that an ingest of 6D stars reads."""
    table = stars(n, seed=seed)
    known = [column.name for column in columns("dr3")]
    table = table.select([name for name in known if name in table.columns])
    return table.with_columns(
        pl.lit(1.5).alias("nu_eff_used_in_astrometry"),
        pl.lit(None, dtype=pl.Float64).alias("pseudocolour"),
        pl.lit(31).alias("astrometric_params_solved"),
        pl.lit(10.0).alias("ecl_lat"),
        pl.col("radial_velocity", "radial_velocity_error").fill_nan(None),
    )


class Archive:
    """A TAP service over a table in memory, and what it does wrong."""

    def __init__(self, table):
        self.table = table
        self.jobs = {}
        self.log = []  # method and path of every request
        self.limit = 3_000_000
        self.capabilities = True
        self.failing = lambda query, number: None  # a message where the job is to end with ERROR
        self.end = "ERROR"
        self.hold = set()  # numbers of jobs that stay in EXECUTING
        self.drop_requests = 0  # short requests whose connection is closed without an answer
        self.drop_results = (
            0  # results that break off half way, or before the first byte where these are many
        )
        self.gzip = self.chunked = self.capitals = self.ranges = False
        self.url = ""

    def answer(self, query, max_rows):
        text = re.sub(r"FROM gaiadr3\.gaia_source", "FROM stars", query)
        found = pl.SQLContext(stars=self.table).execute(text, eager=True).head(min(max_rows, self.limit))
        if self.capitals:
            found = found.rename({"source_id": "SOURCE_ID"}, strict=False)
        return found.write_csv().encode()

    def queries(self):
        return [job["query"] for job in self.jobs.values()]


@pytest.fixture
def archive():
    found = Archive(gaia())

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def say(self, status, body=b"", **headers):
            self.send_response(status)
            for key, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body)

        def handle_any(self, method):
            length = int(self.headers.get("Content-Length") or 0)
            fields = {k: v[0] for k, v in parse_qs(self.rfile.read(length).decode()).items()}
            found.log.append((method, self.path))
            parts = self.path.strip("/").split("/")[1:]
            if parts[-1] != "result" and found.drop_requests:
                found.drop_requests -= 1
                self.close_connection = True
                return
            if parts == ["capabilities"]:
                self.say(200 if found.capabilities else 404, LIMITS.format(found.limit).encode())
            elif parts == ["async"] and method == "POST":
                assert (fields["REQUEST"], fields["LANG"], fields["FORMAT"]) == ("doQuery", "ADQL", "csv")
                number = len(found.jobs) + 1
                job = {"query": fields["QUERY"], "max_rows": int(fields["MAXREC"]), "phases": ["PENDING"]}
                found.jobs[number] = job
                self.say(303, Location=f"/tap/async/{number}")
            elif parts[0] != "async" or len(parts) < 2 or found.jobs.get(int(parts[1])) is None:
                self.say(404)
            else:
                self.job(method, int(parts[1]), parts[2:], fields)

        def job(self, method, number, rest, fields):
            job = found.jobs[number]
            if method == "DELETE":
                job["deleted"] = True
                self.say(303, Location="/tap/async")
            elif rest == ["phase"] and method == "POST":
                assert (fields["PHASE"], job["phases"]) == ("RUN", ["PENDING"])
                job["error"] = found.failing(job["query"], number)
                end = found.end if job["error"] else "COMPLETED"
                job["phases"] = ["QUEUED", "EXECUTING", "EXECUTING", end]
                self.say(303, Location=f"/tap/async/{number}")
            elif rest == ["phase"]:
                phase = job["phases"][0]
                if len(job["phases"]) > 1 and not (phase == "EXECUTING" and number in found.hold):
                    job["phases"].pop(0)
                self.say(200, phase.encode())
            elif rest == ["error"]:
                self.say(200, ERROR.format(job["error"]).encode())
            elif rest == ["results", "result"] and job["phases"] == ["COMPLETED"]:
                self.result(job)
            else:
                self.say(200, b"<?xml version='1.0'?><job/>")

        def result(self, job):
            body = found.answer(job["query"], job["max_rows"])
            zipped = found.gzip and "gzip" in self.headers.get("Accept-Encoding", "")
            headers = {"Content_Encoding": "gzip"} if zipped else {}
            body = gzip.compress(body, mtime=0) if zipped else body
            whole = len(body)
            asked = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") if found.ranges else None
            if asked and int(asked[1]) >= whole:
                self.say(416)
                return
            if asked:
                body = body[int(asked[1]) :]
                headers["Content_Range"] = f"bytes {asked[1]}-{whole - 1}/{whole}"
            drop = found.drop_results > 0
            found.drop_results -= drop
            self.send_response(206 if asked else 200)
            about = {"Transfer_Encoding": "chunked"} if found.chunked else {"Content_Length": len(body)}
            for key, value in {**about, **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            sent = body[: len(body) // 2 if found.drop_results < 1000 else 0] if drop else body
            if found.chunked and sent:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(sent), sent) + (b"" if drop else b"0\r\n\r\n"))
            else:
                self.wfile.write(sent)
            self.close_connection = drop

        def do_GET(self):
            self.handle_any("GET")

        def do_POST(self):
            self.handle_any("POST")

        def do_DELETE(self):
            self.handle_any("DELETE")

    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{service.server_port}/tap"
    yield found
    service.shutdown()
    service.server_close()
    thread.join()


def get(archive, folder, **more):
    options = {"columns": ["6d"], "where": WHERE, "patience": QUICK, **more}
    return fetch(folder, source=archive.url, via="archive", **options)


def rows(folder):
    return pl.concat(pl.read_parquet(path) for path in sorted(folder.glob("*.parquet")))


def wanted(archive, where=WHERE):
    return archive.table.filter(pl.sql_expr(where))


def same(folder, table):
    found = rows(folder)
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
    return found.sort("source_id").equals(table.select(found.columns).cast(found.schema).sort("source_id"))


def test_rows_come_as_files_that_an_ingest_reads(archive, tmp_path):
    archive.gzip = archive.capitals = True
    found = get(archive, tmp_path / "to", chunks=5)
    table = wanted(archive)
    assert 1000 < table.height < 2500
    assert (found["rows"], found["chunks"], found["fetched"], found["files"]) == (table.height, 5, 5, 5)
    assert same(tmp_path / "to", table)
    assert rows(tmp_path / "to").schema["source_id"] == pl.Int64
    assert rows(tmp_path / "to").schema["parallax"] == pl.Float64
    assert rows(tmp_path / "to").schema["parallax_error"] == pl.Float32
    assert rows(tmp_path / "to")["pseudocolour"].is_null().all()
    text = len(archive.answer("SELECT * FROM stars", 10**6))
    assert found["received"] < text / 2
    manifest = json.loads((tmp_path / "to" / "fetch.json").read_text())
    assert sum(chunk["rows"] for chunk in manifest["chunks"]) == table.height
    for chunk in manifest["chunks"]:
        content = (tmp_path / "to" / chunk["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == chunk["sha256"]
    assert all(job.get("deleted") for job in archive.jobs.values())
    archive.table.write_parquet(tmp_path / "all.parquet")
    cuts = {"a": WHERE}
    direct = ingest(
        CatalogSettings(files=(str(tmp_path / "all.parquet"),), num_shards=2, cuts=cuts), tmp_path / "a"
    )
    ours = ingest(CatalogSettings(files=(str(tmp_path / "to"),), num_shards=2), tmp_path / "b")
    names = ["source_id", "x", "y", "z"]
    assert ours.num_rows == direct.num_rows == table.height
    assert ours.table(names).sort("source_id").equals(direct.table(names).sort("source_id"))


def test_a_second_call_asks_for_what_is_missing(archive, tmp_path):
    get(archive, tmp_path, chunks=4)
    asked = len(archive.log)
    again = get(archive, tmp_path, chunks=9)
    assert (again["fetched"], again["received"], again["chunks"]) == (0, 0, 4)
    assert len(archive.log) == asked
    sorted(tmp_path.glob("*.parquet"))[2].unlink()
    assert get(archive, tmp_path)["fetched"] == 1
    assert len(archive.jobs) == 5
    assert same(tmp_path, wanted(archive))
    for changed in ({"where": "ruwe < 2"}, {"columns": ["ruwe"]}, {"region": Region.from_healpix("0:1")}):
        with pytest.raises(GalrayError, match="was fetched with adql"):
            get(archive, tmp_path, **changed)
    with pytest.raises(GalrayError, match="was fetched with source"):
        fetch(tmp_path, columns=["6d"], where=WHERE, source=archive.url + "2", via="archive", patience=QUICK)


@pytest.mark.parametrize("known", [True, False])
def test_answers_that_are_cut_off_are_asked_for_in_halves(archive, tmp_path, known, monkeypatch):
    archive.limit, archive.capabilities = 300, known
    monkeypatch.setattr("galray.catalog.fetch_archive.MAX_ROWS", 3_000_000 if known else 300)
    found = get(archive, tmp_path, chunks=2)
    assert found["rows"] == wanted(archive).height
    assert found["chunks"] > 2
    assert same(tmp_path, wanted(archive))
    ledger = [json.loads(line) for line in (tmp_path / "_fetched.jsonl").read_text().splitlines()]
    assert sum("split" in entry for entry in ledger) == found["chunks"] - 2
    assert all(entry["rows"] < 300 for entry in ledger if "rows" in entry)
    assert len(archive.jobs) == 2 * found["chunks"] - 2
    assert get(archive, tmp_path)["fetched"] == 0


def test_one_star_more_often_than_an_answer_is_long(archive, tmp_path, monkeypatch):
    archive.table = pl.concat([archive.table.head(1)] * 5)
    archive.limit = 3
    star = archive.table["source_id"][0]
    monkeypatch.setattr("galray.catalog.fetch_archive.spans", lambda *_: [(star - 3, star + 9)])
    with pytest.raises(GalrayError, match="more than 3 rows of one source_id"):
        get(archive, tmp_path, where=None, chunks=1)


@pytest.mark.parametrize("way", ["length", "ranges", "chunked", "gzip", "gzip chunked ranges"])
def test_dropped_connections(archive, tmp_path, way):
    archive.chunked, archive.gzip, archive.ranges = ("chunked" in way, "gzip" in way, "ranges" in way)
    archive.drop_results, archive.drop_requests = 2, 2
    found = get(archive, tmp_path, chunks=3, workers=1)
    assert found["fetched"] == 3
    assert same(tmp_path, wanted(archive))
    archive.drop_results = 10**6
    with pytest.raises(GalrayError, match=r"results/result: .* \(3 attempts\)"):
        get(archive, tmp_path / "never", chunks=1)
    archive.drop_results = 0
    jobs = len(archive.jobs)
    assert get(archive, tmp_path / "never")["rows"] == found["rows"]
    assert len(archive.jobs) == jobs, "the finished job's result was taken"


def test_jobs_that_fail(archive, tmp_path):
    archive.failing = lambda query, number: "the database is &lt;tired&gt;" if number <= 2 else None
    assert get(archive, tmp_path / "once", chunks=2, workers=1)["rows"] == wanted(archive).height
    assert len(archive.jobs) == 4
    for end in ("ERROR", "ABORTED"):
        archive.end, archive.failing = end, lambda query, number: "no such function f"
        with pytest.raises(GalrayError, match=rf"the job with {end}: no such function f \(1 failed"):
            get(archive, tmp_path / end, chunks=1)
    archive.failing = lambda query, number: None
    assert get(archive, tmp_path / "ABORTED")["rows"] == wanted(archive).height


def test_ranges_that_take_too_long_are_halved(archive, tmp_path):
    def failing(query, number):
        a, b = re.search(r"BETWEEN (\d+) AND (\d+)$", query).groups()
        return "Job timed out" if int(b) - int(a) > WHOLE[1] // 4 else None

    archive.failing = failing
    assert get(archive, tmp_path, chunks=1)["chunks"] == 4
    assert same(tmp_path, wanted(archive))
    archive.failing = lambda query, number: "Job timed out"
    region = Region.from_healpix("12:5")
    with pytest.raises(GalrayError, match="Job timed out"):
        get(archive, tmp_path / "narrow", region=region)


def test_a_killed_fetch_collects_the_jobs_that_have_finished(archive, tmp_path):
    archive.hold = {3}
    program = (
        "from galray.catalog import fetch\nfrom galray.catalog.download import Patience\n"
        f"fetch({str(tmp_path / 'to')!r}, columns=['6d'], where={WHERE!r}, source={archive.url!r},"
        "via='archive', chunks=4, workers=1, patience=Patience(wait=0.01, longest=0.02))"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        phases = lambda: archive.jobs[3]["phases"] if 3 in archive.jobs else [""]  # noqa: E731
        wait_for(lambda: phases()[0] == "EXECUTING", "the third job at work", process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    archive.hold = set()
    (tmp_path / "to" / "_fetched.jsonl").open("a").write('{"name": "torn')
    before = len(archive.log)
    found = get(archive, tmp_path / "to")
    assert (found["fetched"], found["chunks"]) == (2, 4)
    assert len(archive.jobs) == 4, "the job that was running was not asked for again"
    assert not [path for _, path in archive.log[before:] if path.startswith(("/tap/async/1", "/tap/async/2"))]
    assert same(tmp_path / "to", wanted(archive))


def test_jobs_that_the_archive_has_forgotten(archive, tmp_path):
    archive.drop_results = 10**6
    with pytest.raises(GalrayError):
        get(archive, tmp_path, chunks=1)
    archive.jobs[1] = None
    archive.drop_results = 0
    assert get(archive, tmp_path)["rows"] == wanted(archive).height
    assert len(archive.jobs) == 2
    assert same(tmp_path, wanted(archive))


@pytest.mark.parametrize(
    "region", [None, "1:5,9-12", "6:20000-20007", (30, 40, 25), (0, 0, 100), (5, -89.9, 2)]
)
@pytest.mark.parametrize("number", [1, 7])
def test_ranges_hold_a_region_and_share_it(region, number):
    if isinstance(region, tuple):
        chosen = Region.from_cone(",".join(map(str, region)))
    else:
        chosen = Region.from_healpix(region) if region else None
    found = spans(chosen, number, 1000, True)
    assert len(found) == number
    assert all(a <= b for a, b in found)
    assert all(b < c for (_, b), (c, _) in pairwise(found))
    if chosen is None:
        assert (found[0][0], found[-1][1]) == WHOLE
        return
    inside = stars(20_000, seed=4).filter(chosen.condition())["source_id"]
    assert all(any(a <= star <= b for a, b in found) for star in inside.to_list())


def test_the_number_of_ranges_follows_the_limit():
    assert len(spans(None, None, 3_000_000, True)) == 48
    assert len(spans(None, None, 3_000_000, False)) == 1200
    assert len(spans(Region.from_healpix("1:0"), None, 3_000_000, True)) == 1


def test_a_region_comes_exactly(archive, tmp_path):
    region = Region.from_healpix("1:5,9-30")
    found = get(
        archive, tmp_path, region=region, chunks=3, where=None, columns=["has_rvs", "phot_variable_flag"]
    )
    table = archive.table.filter(region.condition())
    assert found["rows"] == table.height > 500
    assert same(tmp_path, table)
    assert rows(tmp_path).schema["has_rvs"] == pl.Boolean
    with pytest.raises(GalrayError, match="no row that meets the condition"):
        get(archive, tmp_path / "none", where="ruwe > 1000", chunks=3)


def test_answers_that_are_no_tables(archive, tmp_path):
    answers = [
        (b"", "the answer is empty"),
        (b"source_id,ra\n1,", "ends within a row"),
        (b"source_id,ra\n1,2\n", "no column 'dec'"),
        (ERROR.format("disk broken").encode(), "no table but: disk broken"),
        (b"source_id,ra,dec,ruwe\n1,2,3,4\n1,2,x,5\n", "the answer is broken: .*'x'"),
    ]
    for number, (content, text) in enumerate(answers):
        archive.answer = lambda query, max_rows, content=content: content
        with pytest.raises(GalrayError, match=text):
            get(archive, tmp_path / str(number), columns=["ruwe"], chunks=1)
    for number, root in enumerate([archive.url + "/none", "http://127.0.0.1:9"]):
        with pytest.raises(GalrayError, match=["HTTP 404", "refused"][number]):
            fetch(tmp_path / f"x{number}", columns=["6d"], source=root, via="archive", patience=QUICK)
    with pytest.raises(GalrayError, match="no address of a TAP service"):
        TapService("gea.esac.esa.int")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--files", "2"], "no counterpart in a query"),
        (["--chunks", "0"], "0 chunks are none"),
        (["--columns", "parralax"], "no column 'parralax'"),
        (["--where", "AVG(ruwe) > 1"], "aggregates over rows"),
        (["--release", "dr9"], "no release 'dr9'"),
        (["--via", "files", "--chunks", "2"], "--chunks is for the archive"),
    ],
)
def test_mistakes_end_in_one_clear_line(archive, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.delenv("GALRAY_DEBUG", raising=False)
    words = ["--via", "archive", *arguments, "--source", archive.url, "--to", str(tmp_path / "to")]
    monkeypatch.setattr(sys, "argv", ["galray", "catalog", "fetch", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in err.splitlines()[0]
    assert len(err.splitlines()) == 2
    assert not archive.jobs


def test_the_command(archive, tmp_path, monkeypatch, capsys):
    words = ["fetch", "--via", "archive", "--source", archive.url, "--columns", "6d", "--where", WHERE]
    monkeypatch.setattr(sys.modules["galray.catalog.fetch"], "Patience", lambda: QUICK)
    count = wanted(archive).height
    for more, expected in (
        (["--dry-run"], rf"{count:,} rows, about [\d.]+ kB as text to transfer"),
        (
            ["--to", str(tmp_path), "--chunks", "5"],
            rf"5 files, [\d.]+ kB, {count:,} rows in .*; 5 of 5 ranges fetched now",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["galray", "catalog", *words, *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        assert re.match(expected, capsys.readouterr().out)
    assert same(tmp_path, wanted(archive))
