"""Wait for an event: a test says what it waits for, never how long that takes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["wait_for"]

Found = TypeVar("Found")


def wait_for(
    condition: Callable[[], Found],
    what: str,
    process: subprocess.Popen[Any] | None = None,
    log: Path | None = None,
    *,
    every: float = 0.02,
    patience: float = 300.0,
) -> Found:
    """Look until something is there; what was found.

    Arguments:
        condition: What is looked at; anything true ends the wait.
        what: What is waited for, for the message of a wait in vain.
        process: Who brings it about: once it has ended, waiting is in vain.
        log: What that process says.
        every: Seconds between two looks.
        patience: Seconds that end a hang. No limit on speed: several times what a slow machine needs.

    Raises:
        AssertionError: It did not come.
    """
    until = time.monotonic() + patience
    while True:
        ended = process is not None and process.poll() is not None  # asked before the last look
        if found := condition():
            return found
        said = f":\n{log.read_text()}" if log is not None and log.exists() else ""
        assert not ended, f"the process ended before {what}{said}"
        assert time.monotonic() < until, f"waited {patience:g} s in vain for {what}{said}"
        time.sleep(every)
