"""What a folder of fetched files remembers, and several downloads at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from galray.catalog.download import DiskError, Stopped, unwritable
from galray.errors import GalrayError

__all__ = ["LEDGER", "Advance", "Ledger", "run_jobs"]

LEDGER = "_fetched.jsonl"
"""The ledger's file: a line that says what is fetched, then one for every file that is there and right."""

Advance = Callable[[int, int, int], None]
"""Told files done, files to do, and bytes received."""

_MOST_FAILED = 3


class Ledger:
    """The files of a folder that are known to be right, so that they need not be read again.

    A line is added for each file: a run that is killed loses at most the last one.

    Arguments:
        folder: The folder; it exists.
        about: What is fetched into it. Keys whose values differ from an earlier fetch's, or that one of the
            two lacks, are mistakes: the folder holds another kind of files then.

    Raises:
        GalrayError: The folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.path = folder / LEDGER
        self.entries: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        held: dict[str, Any] | None = None
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            for line in content.decode("utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed run
                if "name" in entry:
                    self.entries[entry["name"]] = entry
                else:
                    held = entry
            if content and not content.endswith(b"\n"):
                self._append("")
            asked = json.loads(json.dumps(about))
            if held is None:
                self._append(json.dumps(asked))
        except OSError as error:
            raise unwritable(self.path, error) from None
        held = asked if held is None else held
        for key in {**asked, **held}:
            if held.get(key) != asked.get(key) or (key in held) != (key in asked):
                raise GalrayError(
                    f"{folder}: was fetched with {key} = {held.get(key)}, not {asked.get(key)}",
                    "choose another folder",
                )

    def add(self, entry: dict[str, Any]) -> None:
        """Note that the file ``entry["name"]`` is there and right.

        Raises:
            GalrayError: The disk is full or the like.
        """
        try:
            with self._lock:
                self._append(json.dumps(entry))
                self.entries[entry["name"]] = entry
        except OSError as error:
            raise unwritable(self.path, error) from None

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def run_jobs(
    jobs: Sequence[Callable[[threading.Event], bool]],
    workers: int,
    tell: Callable[[int], None] | None = None,
) -> int:
    """Run jobs in threads; one that fails does not hold up the others, unless several do or the disk does.

    Arguments:
        jobs: Each is given an event that asks it to stop, and says whether it fetched something.
        workers: Jobs at a time.
        tell: Told the number of jobs done whenever something has happened.

    Returns:
        How many jobs fetched something.

    Raises:
        GalrayError: A job failed; the message is the first's, with the number of failures.
    """
    stop = threading.Event()
    failed: list[GalrayError] = []
    done = fetched = 0

    def guarded(job: Callable[[threading.Event], bool]) -> bool:
        if stop.is_set():
            raise Stopped
        return job(stop)

    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting: set[Future[bool]] = {pool.submit(guarded, job) for job in jobs}
        try:
            while waiting:
                ready, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ready:
                    try:
                        fetched += future.result()
                        done += 1
                    except Stopped:
                        continue
                    except GalrayError as error:
                        failed.append(error)
                        if len(failed) >= _MOST_FAILED or isinstance(error, DiskError):
                            stop.set()
                if tell is not None:
                    tell(done)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    if failed:
        more = f" ({len(failed)} failed, {done} of {len(jobs)} files are there)"
        raise GalrayError(failed[0].what + more, failed[0].remedy)
    return fetched
