"""Ingests that stop in the middle of a file until they are told to go on: what is killed there is at work."""

from __future__ import annotations

import os
from pathlib import Path

from galray.catalog.pieces import BatchFile
from tests.waiting import wait_for

__all__ = ["HOLD", "hold"]

HOLD = "GALRAY_TEST_HOLD"
"""Environment variable with the folder of the signals; without it nothing stops."""


def hold() -> None:
    """From here on, in this process: after two files have been read, the next one stays half-written.

    It says so by a file ``held-PID`` in the folder, and goes on when there is a file ``go``.
    """
    if HOLD not in os.environ:
        return
    folder, close = Path(os.environ[HOLD]), BatchFile.close

    def held(self: BatchFile) -> None:
        done = len(list(self.path.parent.glob("piece-*.json")))
        if self._writer is not None and done >= 2 and not (folder / "go").exists():
            (folder / f"held-{os.getpid()}").touch()
            wait_for((folder / "go").exists, "the word to go on")
        close(self)

    BatchFile.close = held  # type: ignore[method-assign]
