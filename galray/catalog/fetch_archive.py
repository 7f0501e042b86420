"""Chosen columns and rows from the Gaia archive, range of ``source_id`` by range, as Parquet files."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from galray.catalog.archive_table import SpoiledAnswer, read_count, text_width, to_parquet
from galray.catalog.columns import columns
from galray.catalog.download import Part, Stopped, pause, unwritable
from galray.catalog.fetch_state import Advance, Ledger, run_jobs
from galray.catalog.fetch_tiles import TileQuery, archive_query
from galray.catalog.regions import Region
from galray.catalog.tap import JobGone, TapService
from galray.errors import GalrayError
from galray.provenance import now, write_atomic

__all__ = ["MAX_ROWS", "count_rows", "fetch_archive", "spans"]

MAX_ROWS = 3_000_000
"""Rows of the Gaia archive's longest answer to someone who is not logged in."""

Span = tuple[int, int]

_WHOLE_SKY = 12 << 59  # source_ids: level-12 pixels, 35 bits within each
_STARS = 1.8e9
_CHUNKS = 48  # of the whole sky where a condition chooses an unknown share of the stars
_NARROW = 1 << 47  # ids of a level-6 pixel: a query of fewer that takes too long is not mended by less
_TOO_LONG = r"time[d -]*out|execution (time|duration)|took too long|cancell?ing statement"


def spans(region: Region | None, number: int | None, max_rows: int, chosen: bool) -> list[Span]:
    """Inclusive ranges of ``source_id`` that hold a part of the sky, about equal in area, in order.

    Arguments:
        region: The part; None for all.
        number: How many ranges; by default so many that their answers stay under the limit of rows.
        max_rows: That limit.
        chosen: True where a condition keeps but a part of the stars.
    """
    if region is None:
        pieces = [(0, _WHOLE_SKY - 1)]
    elif region.cone is None:
        pieces = region.id_ranges()
    else:
        pieces = [(a << 43, ((b + 1) << 43) - 1) for a, b in region.ranges()]
    total = sum(b - a + 1 for a, b in pieces)
    if number is None:
        full = _CHUNKS if chosen else 2 * _STARS / max_rows  # twice over, for the sky is not evenly full
        number = max(1, math.ceil(full * total / _WHOLE_SKY))
    number = min(number, total)

    def place(index: int) -> int:
        for a, b in pieces:
            if index <= b - a:
                return a + index
            index -= b - a + 1
        raise AssertionError("unreachable")

    edges = [total * i // number for i in range(number + 1)]
    return [(place(a), place(b - 1)) for a, b in pairwise(edges)]


def _within(adql: str, span: Span) -> str:
    """A query of `archive_query`, of a range of source_id alone."""
    word = "AND" if "\nWHERE " in adql else "WHERE"
    return f"{adql}\n  {word} source_id BETWEEN {span[0]} AND {span[1]}"


def count_rows(
    query: TileQuery, release: str, service: TapService, stop: threading.Event | None = None
) -> tuple[int, int]:
    """Rows that the archive has for a query, and about how many bytes they are as text.

    Raises:
        GalrayError: The query is wrong, or the archive cannot count them.
    """
    adql = archive_query(query, release)
    counting = re.sub(r"\ASELECT .*", "SELECT COUNT(*) AS n", adql)
    stop = stop or threading.Event()
    job = service.submit(counting, 10, stop)
    try:
        phase = service.finish(job, stop)
        if phase != "COMPLETED":
            raise _failed(job, phase, service.failure(job, stop))
        rows = read_count(service.result(job), service.patience)
    except JobGone:
        raise GalrayError(f"{job}: the archive has lost the job", "run the same command again") from None
    service.delete(job)
    available = {column.name: column.dtype for column in columns(release)}
    width = sum(text_width(available[name]) for name in query.names(list(available)))
    return rows, rows * width


def fetch_archive(
    query: TileQuery,
    release: str,
    folder: Path,
    service: TapService,
    *,
    chunks: int | None = None,
    workers: int = 4,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Have the archive run a query range by range and write each answer as a Parquet file.

    A range whose answer reaches the limit of rows, or takes the archive too long, is cut in two. Jobs are
    remembered in the folder's ledger before they start: a later call collects what has become of them.

    Arguments:
        query: Columns, rows and part of the sky.
        release: Gaia release.
        folder: Where to; the files in it can be named in ``catalog.files``.
        service: The archive.
        chunks: Ranges to begin with; a folder that was begun keeps its own.
        workers: Jobs at a time.
        advance: Told ranges done, ranges to do, and bytes received.

    Returns:
        ``files, bytes`` (written), ``rows``, ``chunks``, ``fetched`` (ranges collected now), ``received``
        (bytes).

    Raises:
        GalrayError: The query is wrong, the archive does not give an answer, no row is left, or the folder
            cannot be written or holds another query's rows.
    """
    adql = archive_query(query, release)
    what = {"release": release, "source": service.url, "adql": adql}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(folder, what)
    except OSError as error:
        raise unwritable(folder, error) from None
    if "plan" not in ledger.entries:
        limit = min(service.row_limit() or MAX_ROWS, MAX_ROWS)
        ranges = spans(query.region, chunks, limit, query.where is not None)
        ledger.add({"name": "plan", "ranges": ranges, "max_rows": limit})
    wanted = query.names([column.name for column in columns(release)]) if query.columns else None
    work = _Work(adql, wanted, release, folder, service, ledger)
    fetched = 0

    def tell(done: int) -> None:
        if advance is not None:
            advance(finished + done, finished + len(jobs), work.received)

    # Ranges that are cut in two on the way make another round.
    while True:
        leaves = work.leaves()
        open_ = [span for span in leaves if not work.is_there(span)]
        finished = len(leaves) - len(open_)
        if not open_:
            break
        jobs = [partial(work.chunk, span) for span in open_]
        fetched += run_jobs(jobs, workers, tell)
    entries = [ledger.entries[_name(span)] for span in leaves]
    filled = [entry for entry in entries if entry["rows"]]
    if not filled:
        raise GalrayError("the archive has no row that meets the condition", "correct --where or the region")
    keys = ("file", "first", "last", "rows", "bytes", "sha256")
    from galray import __version__

    manifest: dict[str, Any] = {**what, "created": now(), "galray": __version__}
    manifest["chunks"] = [{key: entry[key] for key in keys} for entry in entries]
    try:
        write_atomic(folder / "fetch.json", manifest)
    except OSError as error:
        raise unwritable(folder, error) from None
    return {
        "files": len(filled),
        "bytes": sum(entry["bytes"] for entry in filled),
        "chunks": len(entries),
        "fetched": fetched,
        "received": work.received,
        "rows": sum(entry["rows"] for entry in filled),
    }


def _name(span: Span) -> str:
    return f"gaia_source_{span[0]}-{span[1]}"


def _failed(job: str, phase: str, why: str) -> GalrayError:
    return GalrayError(
        f"{job}: the archive ended the job with {phase}: {why}",
        "correct the query (--print-adql prints it), or run the same command later",
    )


class _Work:
    """The ranges of one fetch.

    Arguments:
        adql: The query without a range.
        wanted: Columns that the answers must have; None for all there are.
        release: Gaia release, for the types.
        folder: Where the files go.
        service: The archive.
        ledger: What is there; ``plan`` is in it.
    """

    def __init__(
        self,
        adql: str,
        wanted: list[str] | None,
        release: str,
        folder: Path,
        service: TapService,
        ledger: Ledger,
    ) -> None:
        self.adql, self.wanted, self.release, self.folder = adql, wanted, release, folder
        self.service, self.ledger = service, ledger
        self.max_rows: int = ledger.entries["plan"]["max_rows"]
        self.received = 0
        self._lock = threading.Lock()

    def leaves(self) -> list[Span]:
        """The ranges to fetch: those planned, cut where one was too large."""
        found: list[Span] = []
        waiting: list[Span] = [(a, b) for a, b in reversed(self.ledger.entries["plan"]["ranges"])]
        while waiting:
            span = waiting.pop()
            middle = self._entry(span).get("split")
            if middle is None:
                found.append(span)
            else:
                waiting += [(middle + 1, span[1]), (span[0], middle)]
        return found

    def is_there(self, span: Span) -> bool:
        """True where a range's file is what the ledger says; a range without rows has none."""
        entry = self._entry(span)
        if "rows" not in entry:
            return False
        path = self.folder / entry["file"]
        return not entry["rows"] or (path.is_file() and path.stat().st_size == entry["bytes"])

    def chunk(self, span: Span, stop: threading.Event) -> bool:
        """Fetch a range, or note that it must be cut; True where rows or their absence are then known."""
        job: str | None = self._entry(span).get("job")
        tries = self.service.patience.corrupt
        failure: GalrayError | None = None
        for attempt in range(1, tries + 1):
            try:
                if job is None:
                    job = self._ask(span, stop)
                phase = self.service.finish(job, stop)
                if phase == "COMPLETED":
                    return self._collect(job, span, stop)
                if phase == "ARCHIVED":
                    raise JobGone(job)
            except JobGone:
                failure = GalrayError(f"{job}: the archive has lost the job", "run the same command again")
            except SpoiledAnswer as error:
                failure = GalrayError(
                    f"{self.service.result(str(job))}: {error}", "run the same command later"
                )
                if error.final:
                    raise failure from None
                continue  # the job is well: its table is fetched anew
            else:
                why = self.service.failure(job, stop)
                failure = _failed(job, phase, why)
                if re.search(_TOO_LONG, why, re.IGNORECASE) and span[1] - span[0] > _NARROW:
                    return self._cut(job, span)
            job = None
            self._note(span, {})  # a later run asks anew
            if attempt < tries:
                pause(attempt, self.service.patience, stop)
        assert failure is not None
        raise failure

    def _entry(self, span: Span) -> Mapping[str, Any]:
        return self.ledger.entries.get(_name(span), {})

    def _note(self, span: Span, about: Mapping[str, Any]) -> None:
        self.ledger.add({"name": _name(span), "first": span[0], "last": span[1], **about})

    def _part(self, span: Span) -> Path:
        return self.folder / f"{_name(span)}.csv.part"

    def _ask(self, span: Span, stop: threading.Event) -> str:
        """A new job for a range."""
        try:
            self._part(span).unlink(missing_ok=True)  # another job's rows may come in another order
        except OSError as error:
            raise unwritable(self._part(span), error) from None
        job = self.service.submit(_within(self.adql, span), self.max_rows, stop)
        self._note(span, {"job": job})
        return job

    def _cut(self, job: str, span: Span) -> bool:
        """Note that a range is two, and let go of its job."""
        if span[0] == span[1]:
            raise GalrayError(f"{job}: more than {self.max_rows} rows of one source_id", "correct the query")
        self._note(span, {"split": (span[0] + span[1]) // 2})
        self._part(span).unlink(missing_ok=True)
        self.service.delete(job)
        return False

    def _collect(self, job: str, span: Span, stop: threading.Event) -> bool:
        """Bring a completed job's table here.

        Raises:
            SpoiledAnswer: It came broken, or is no table; its part is removed.
        """
        part = self._part(span)
        path = self.folder / f"{_name(span)}.parquet"

        def count(size: int) -> None:
            with self._lock:
                self.received += size

        try:
            incoming = Part(part, "gzip, identity;q=0.5")
            incoming.complete(self.service.result(job), self.service.patience, stop, count)
            if stop.is_set():
                raise Stopped
            try:
                found = to_parquet(part, path, self.wanted, self.release, self.max_rows)
            except SpoiledAnswer:
                part.unlink()
                raise
            if found is None:
                return self._cut(job, span)
            self._note(span, {"file": path.name, **found})
            part.unlink()
        except OSError as error:
            raise unwritable(path, error) from None
        self.service.delete(job)
        return True
