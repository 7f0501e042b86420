"""Who works at a place of an object store, which has no locks: a small file that its owner renews."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from galray.catalog.mirror import Mirror
from galray.errors import GalrayError

__all__ = ["LEASE", "lease"]

LEASE = ".lease"
"""The file's name."""

RENEW_SECONDS = 5.0
"""How often the owner renews it."""

DEAD_SECONDS = 30.0
"""An owner that has not renewed it for so long is dead, and another may take it over."""


@contextmanager
def lease(place: Mirror) -> Iterator[None]:
    """Keep other processes, on whatever machine, out of a place while this one works there.

    The store writes the file only where there is none, so that of two processes one gets it. That of a
    process that was killed is taken over when it has not been renewed for `DEAD_SECONDS`, watched from here:
    no two clocks are compared.

    Arguments:
        place: The place.

    Raises:
        GalrayError: Another process works there.
    """
    mark = {
        "id": uuid.uuid4().hex,
        "holder": f"process {os.getpid()} on {socket.gethostname()}",
        "renewed": 0,
    }
    _acquire(place, mark)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            mark["renewed"] = int(mark["renewed"]) + 1  # type: ignore[call-overload]
            with suppress(GalrayError):  # the next time may do better
                place.write(LEASE, json.dumps(mark).encode())

    keeper = threading.Thread(target=renew, name="galray-lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join()
        with suppress(GalrayError):
            place.remove(LEASE)


def _acquire(place: Mirror, mark: dict[str, object]) -> None:
    seen, since = b"", time.monotonic()
    while not place.create(LEASE, json.dumps(mark).encode()):
        found = place.read(LEASE) or b""
        if seen and found != seen:
            break
        seen = seen or found
        if time.monotonic() - since > DEAD_SECONDS:
            place.remove(LEASE)
            seen, since = b"", time.monotonic()
        else:
            time.sleep(RENEW_SECONDS / 5)
    else:
        return
    try:
        holder = json.loads(found)["holder"]
    except (ValueError, KeyError, TypeError):
        holder = "another process"
    raise GalrayError(f"{place.url}: {holder} works here", "wait for it, or choose another name")
