"""An asynchronous client of the IVOA's Table Access Protocol: jobs that are asked for, awaited and collected.

The life of a job follows the Universal Worker Service pattern (UWS 1.1, https://www.ivoa.net/documents/UWS;
TAP 1.1, https://www.ivoa.net/documents/TAP): POST ``/async`` makes it, POST ``phase=RUN`` starts it, its
phase goes QUEUED, EXECUTING, COMPLETED (or ERROR, ABORTED), and ``results/result`` is the table.
"""

from __future__ import annotations

import contextlib
import html
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from galray.catalog.download import AGENT, DROPPED, Patience, Stopped, give_up, pause
from galray.errors import GalrayError

__all__ = ["ARCHIVE", "JobGone", "TapService"]

ARCHIVE = "https://gea.esac.esa.int/tap-server/tap"
"""The Gaia archive's service, open to everyone."""

_FINISHED = ("COMPLETED", "ERROR", "ABORTED", "ARCHIVED")
_WAITING = ("PENDING", "HELD", "QUEUED", "EXECUTING", "SUSPENDED", "UNKNOWN")
_LONGEST = 30.0  # seconds between two looks at a job's phase
_REDIRECTS = 5


class JobGone(Exception):
    """The service knows no such job any more."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Where a POST is sent on to is the answer here, and not to be fetched."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing."""


class TapService:
    """A TAP service.

    Arguments:
        url: Its root, above ``/async``.
        patience: How long its failures are borne.

    Raises:
        GalrayError: The URL is none of http(s).
    """

    def __init__(self, url: str = ARCHIVE, patience: Patience | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise GalrayError(f"{url}: no address of a TAP service", f"give its root, such as {ARCHIVE}")
        self.url = url.rstrip("/").removesuffix("/async").removesuffix("/sync")
        self.patience = patience or Patience()

    def row_limit(self, stop: threading.Event | None = None) -> int | None:
        """The rows that an answer may have by the service's own account; None where it does not say."""
        try:
            _, _, body = self._call("GET", f"{self.url}/capabilities", None, stop)
            root = ElementTree.fromstring(body)
        except (JobGone, ElementTree.ParseError):
            return None
        limits = []
        for part in root.iter():
            if _tag(part) == "outputLimit":
                limits += [
                    int(hard.text)
                    for hard in part
                    if _tag(hard) == "hard"
                    and hard.get("unit", "row") == "row"
                    and (hard.text or "").isdigit()
                    if hard.text
                ]
        return min((limit for limit in limits if limit > 0), default=None)

    def submit(self, query: str, max_rows: int, stop: threading.Event | None = None) -> str:
        """Make a job for a query in ADQL, which is not started yet.

        Arguments:
            query: The query.
            max_rows: Rows after which the answer is cut off.
            stop: When set, `Stopped` is raised.

        Returns:
            The job's URL.

        Raises:
            GalrayError: The service takes no such job.
        """
        url = f"{self.url}/async"
        asked = {"REQUEST": "doQuery", "LANG": "ADQL", "FORMAT": "csv", "MAXREC": max_rows, "QUERY": query}
        for _ in range(_REDIRECTS):
            try:
                status, location, _ = self._call("POST", url, asked, stop)
            except JobGone:
                raise _no_service(url, "HTTP 404") from None
            if location is None:
                raise _no_service(url, f"HTTP {status}, and no job is named")
            place = urllib.parse.urljoin(url, location)
            parts = urllib.parse.urlsplit(place)
            if url.startswith("https:") and parts.hostname == urllib.parse.urlsplit(url).hostname:
                place = parts._replace(
                    scheme="https"
                ).geturl()  # services behind a proxy call themselves http
            if status != 303 and parts.path.rstrip("/").endswith("/async"):
                url = place  # the service has moved
                continue
            return place.rstrip("/")
        raise _no_service(url, "redirects without end")

    def finish(self, job: str, stop: threading.Event) -> str:
        """Start a job where it waits for that, and wait for its end.

        Returns:
            The phase at its end: COMPLETED, ERROR, ABORTED or ARCHIVED (its result has been removed).

        Raises:
            GalrayError: The service does not answer.
            JobGone: It knows the job no more.
            Stopped: `stop` was set.
        """
        seconds = min(self.patience.wait, _LONGEST)
        while True:
            _, _, body = self._call("GET", f"{job}/phase", None, stop)
            phase = body.decode("utf-8", errors="replace").strip().upper()
            if phase in _FINISHED:
                return phase
            if phase not in _WAITING:
                raise GalrayError(f"{job}/phase: '{phase[:40]}' is no phase of a job", "check --source")
            if phase in ("PENDING", "HELD"):
                self._call("POST", f"{job}/phase", {"PHASE": "RUN"}, stop)
            if stop.wait(seconds):
                raise Stopped
            seconds = min(1.5 * seconds, self.patience.longest, _LONGEST)

    def failure(self, job: str, stop: threading.Event) -> str:
        """What the service says of a job that failed."""
        for url in (f"{job}/error", job):
            with contextlib.suppress(GalrayError, JobGone):
                found = message(self._call("GET", url, None, stop)[2])
                if found:
                    return found
        return "no reason is given"

    def result(self, job: str) -> str:
        """Where the table of a completed job is."""
        return f"{job}/results/result"

    def delete(self, job: str) -> None:
        """Let the service forget a job; that it does not is no matter."""
        request = urllib.request.Request(job, headers={"User-Agent": AGENT}, method="DELETE")
        with contextlib.suppress(*DROPPED):
            _OPENER.open(request, timeout=self.patience.timeout).close()

    def _call(
        self, method: str, url: str, fields: Mapping[str, Any] | None, stop: threading.Event | None
    ) -> tuple[int, str | None, bytes]:
        """Status, place to go to, and content of a short answer; failures are borne a number of times.

        Raises:
            GalrayError: The service refuses, or fails too often.
            JobGone: There is nothing there.
        """
        data = None if fields is None else urllib.parse.urlencode(fields).encode()
        failures = 0
        while True:
            request = urllib.request.Request(url, data, {"User-Agent": AGENT}, method=method)
            opener = _OPENER if method == "POST" else _FOLLOWING
            why = ""
            try:
                with opener.open(request, timeout=self.patience.timeout) as answer:
                    return answer.status, answer.headers.get("Location"), answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    if error.code in (301, 302, 303, 307, 308):
                        return error.code, error.headers.get("Location"), b""
                    if error.code in (404, 410):
                        raise JobGone(url) from None
                    with contextlib.suppress(*DROPPED):
                        why = message(error.read())
                    if error.code == 400:
                        raise GalrayError(f"{url}: refused: {why or error.reason}", _REMEDY) from None
                error.msg = f"{error.msg}: {why}" if why else error.msg
                reason: BaseException = error
            except DROPPED as error:
                reason = error
            failures += 1
            give_up(url, reason, failures, self.patience)
            pause(failures, self.patience, stop)


_OPENER = urllib.request.build_opener(_NoRedirect)
_FOLLOWING = urllib.request.build_opener()
_REMEDY = "correct --columns and --where; --print-adql prints the query"


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _no_service(url: str, why: str) -> GalrayError:
    return GalrayError(f"{url}: {why}", f"give the root of a TAP service with --source, such as {ARCHIVE}")


def message(body: bytes) -> str:
    """The reason in an error document: a VOTable's, a UWS job's, or plain words; may be empty."""
    text = body.decode("utf-8", errors="replace")
    found = ""
    try:
        for part in ElementTree.fromstring(body).iter():
            status = part.get("name") == "QUERY_STATUS" and part.get("value") == "ERROR"
            if (_tag(part) == "INFO" and status) or _tag(part) == "message":
                found = found or "".join(part.itertext())
        if not found and text.lstrip().startswith("<?xml"):
            return ""
    except ElementTree.ParseError:
        pass
    words = found or html.unescape(re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", text, flags=re.S | re.I))
    return " ".join(words.split())[:300]
