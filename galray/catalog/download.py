"""One file over HTTP: resumed where it broke off, checked against its MD5, renamed when whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galray import __version__
from galray.errors import GalrayError

__all__ = [
    "AGENT",
    "DROPPED",
    "DiskError",
    "Part",
    "Patience",
    "Stopped",
    "content_length",
    "download",
    "give_up",
    "md5_of",
    "pause",
    "read_small",
    "unwritable",
]

_BLOCK = 1 << 18
AGENT = f"galray/{__version__}"
"""How requests name their sender."""

DROPPED = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError, urllib.error.URLError)
"""Errors of the network and of servers, HTTP's status codes among them."""

_FINAL = (400, 401, 403, 404, 405, 410, 451)


class DiskError(GalrayError):
    """The folder cannot take what is fetched: full, read-only or broken."""


class Stopped(Exception):
    """The download was given up because another one failed."""


@dataclass(frozen=True)
class Patience:
    """How long a server's failures are borne.

    Arguments:
        tries: Attempts in a row that bring no byte; one that brings some begins the count anew.
        wait: Seconds before the second attempt; doubled for each further one.
        longest: The longest of those waits in seconds.
        timeout: Seconds of silence after which a connection counts as dropped.
        corrupt: How many times a file may come whole but with a wrong checksum.
    """

    tries: int = 6
    wait: float = 2.0
    longest: float = 120.0
    timeout: float = 60.0
    corrupt: int = 3


def _request(
    url: str, method: str = "GET", begin: int = 0, encoding: str = "identity"
) -> urllib.request.Request:
    headers = {"User-Agent": AGENT, "Accept-Encoding": encoding}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    return urllib.request.Request(url, headers=headers, method=method)


def _why(error: BaseException) -> str:
    """A network error in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def give_up(url: str, error: BaseException, failures: int, patience: Patience) -> None:
    """Raise the user's error when a failure is final, or the last of too many."""
    if isinstance(error, urllib.error.HTTPError) and error.code in _FINAL:
        raise GalrayError(f"{url}: {_why(error)}", "check the address") from None
    absent = url.startswith("file:")  # what is wrong with a local file stays wrong
    if absent or failures >= patience.tries:
        tried = "" if absent else f" ({failures} attempts)"
        raise GalrayError(
            f"{url}: {_why(error)}{tried}",
            "check the address and the network; run the same command again to go on",
        ) from None


def pause(failures: int, patience: Patience, stop: threading.Event | None) -> None:
    """Wait before the next attempt, ever longer."""
    seconds = min(patience.wait * 2 ** max(0, failures - 1), patience.longest)
    if (stop or threading.Event()).wait(seconds):
        raise Stopped


def _patiently(act: Callable[[], Any], url: str, patience: Patience) -> Any:
    """Call `act` until it returns; it may raise an error of the network a limited number of times."""
    failures = 0
    while True:
        try:
            return act()
        except DROPPED as error:
            failures += 1
            give_up(url, error, failures, patience)
        pause(failures, patience, None)


def read_small(url: str, patience: Patience) -> bytes:
    """All bytes of a small file.

    Raises:
        GalrayError: It cannot be had.
    """

    def act() -> bytes:
        with urllib.request.urlopen(_request(url), timeout=patience.timeout) as answer:
            content: bytes = answer.read()  # raises IncompleteRead where it is not all
            return content

    return _patiently(act, url, patience)


def content_length(url: str, patience: Patience) -> int | None:
    """A file's bytes by a HEAD request; None where the server does not tell.

    Raises:
        GalrayError: There is no such file.
    """

    def act() -> int | None:
        with urllib.request.urlopen(_request(url, "HEAD"), timeout=patience.timeout) as answer:
            length = answer.headers.get("Content-Length")
            return int(length) if length is not None else None

    return _patiently(act, url, patience)


def md5_of(path: Path, digest: Any = None) -> Any:
    """The MD5 of a file's bytes, added to `digest` where one is given."""
    digest = digest or hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest


def unwritable(path: Path, error: OSError) -> DiskError:
    """The user's error where a file cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(
            f"{path}: the disk is full",
            "make room, or choose another folder; then run the same command again",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return DiskError(f"{path}: cannot be written: {error.strerror}", "choose a writable folder")
    return DiskError(f"{path}: {error.strerror or error}", "check the path, its rights and the disk")


def download(
    url: str,
    path: Path,
    md5: str,
    patience: Patience | None = None,
    stop: threading.Event | None = None,
    count: Callable[[int], None] | None = None,
) -> int:
    """Fetch a file whole and right, or not at all.

    Bytes go to ``PATH.part`` beside it. What an earlier attempt or run left there is kept and the rest asked
    for by ``Range``; a server that does not know ranges sends the file from its beginning.

    Arguments:
        url: Where it is.
        path: Where it goes; an older file of that name is replaced.
        md5: Its checksum in hex.
        patience: How long failures are borne.
        stop: When set, the download ends and leaves its part.
        count: Told the number of bytes of every block that arrives.

    Returns:
        Bytes of the file.

    Raises:
        GalrayError: The server does not give it, its checksum stays wrong, or it cannot be written.
        Stopped: `stop` was set.
    """
    patience = patience or Patience()
    part = path.with_name(path.name + ".part")
    found = ""
    for _ in range(patience.corrupt):
        try:
            found = Part(part).complete(url, patience, stop, count)
            if found == md5.lower():
                size = part.stat().st_size
                part.replace(path)
                return size
            part.unlink()
        except OSError as error:
            raise unwritable(path, error) from None
    raise GalrayError(
        f"{path.name}: corrupt {patience.corrupt} times over: MD5 expected {md5.lower()}, found {found} "
        f"({url})",
        "run the same command later, or fetch from another mirror with --source",
    )


class Part:
    """The bytes of a file that have come so far, and their MD5.

    Arguments:
        path: Where they are.
        encoding: The content encodings that the server may use; the bytes are kept as they come.
    """

    def __init__(self, path: Path, encoding: str = "identity") -> None:
        self.path = path
        self.encoding = encoding
        self.size = path.stat().st_size if path.exists() else 0
        self.digest = md5_of(path) if self.size else hashlib.md5(usedforsecurity=False)

    def receive(
        self, url: str, timeout: float, stop: threading.Event | None, count: Callable[[int], None] | None
    ) -> bool:
        """Append what one answer brings; True when the file is then whole.

        Raises:
            OSError: Of the network (`DROPPED`) before the first byte, or of the disk.
            Stopped: `stop` was set.
        """
        try:
            request = _request(url, begin=self.size, encoding=self.encoding)
            answer = urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416 and self.size:
                error.close()
                return True  # nothing is left to ask for: the checksum will tell whether that is right
            raise
        with contextlib.closing(answer):
            begin, total = _extent(answer, self.size)
            if begin != self.size:
                self.size, self.digest = 0, hashlib.md5(usedforsecurity=False)
            with self.path.open("ab" if self.size else "wb") as stream:
                while (block := _read(answer, stop)) != b"":
                    if block is None:
                        return False
                    stream.write(block)
                    self.size += len(block)
                    self.digest.update(block)
                    if count is not None:
                        count(len(block))
        return total is None or self.size >= total

    def complete(
        self,
        url: str,
        patience: Patience,
        stop: threading.Event | None,
        count: Callable[[int], None] | None,
    ) -> str:
        """Ask for the rest until the file is whole; its MD5."""
        failures, most = 0, self.size
        while True:
            why: BaseException = ConnectionError("the connection was dropped")
            try:
                if self.receive(url, patience.timeout, stop, count):
                    return str(self.digest.hexdigest())
            except DROPPED as error:
                why = error
            failures = 0 if self.size > most else failures + 1
            most = max(most, self.size)
            give_up(url, why, failures, patience)
            pause(failures, patience, stop)


def _read(answer: Any, stop: threading.Event | None) -> bytes | None:
    """The next bytes of an answer; none of them at its end, None where the connection broke."""
    if stop is not None and stop.is_set():
        raise Stopped
    try:
        block: bytes = answer.read1(_BLOCK) if hasattr(answer, "read1") else answer.read(_BLOCK)
    except (http.client.HTTPException, OSError):
        return None  # what has come is kept
    return block


def _extent(answer: Any, held: int) -> tuple[int, int | None]:
    """Where an answer's bytes begin (0 or `held`), and the file's length where the server tells it."""
    length = answer.headers.get("Content-Length")
    if getattr(answer, "status", None) == 206:
        found = re.match(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != held:
            raise http.client.HTTPException(f"asked for the bytes from {held}, got others")
        return held, None if found[2] == "*" else int(found[2])
    return 0, int(length) if length is not None else None
