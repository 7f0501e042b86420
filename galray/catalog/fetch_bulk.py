"""ESA's bulk files: which of them hold a part of the sky, and their resumable download."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galray.catalog.download import (
    DiskError,
    Patience,
    Stopped,
    content_length,
    download,
    md5_of,
    read_small,
    unwritable,
)
from galray.catalog.regions import Region
from galray.catalog.storage import is_url
from galray.catalog.writers import HEALPIX8_SHIFT
from galray.errors import GalrayError
from galray.provenance import write_atomic

__all__ = ["BULK", "BulkFile", "choose", "fetch_files", "list_files", "total_bytes"]

_CDN = "http://cdn.gea.esac.esa.int/Gaia"
BULK: dict[str, tuple[str, str]] = {
    "dr3": (f"{_CDN}/gdr3/gaia_source/", "_MD5SUM.txt"),
    "edr3": (f"{_CDN}/gedr3/gaia_source/", "_MD5SUM.txt"),
    "dr2": (f"{_CDN}/gdr2/gaia_source/csv/", "MD5SUM.txt"),
}
"""Each release's folder of ``gaia_source`` files, and the list of their checksums in it."""

LEDGER = "_fetched.jsonl"
"""What is in a folder of fetched files and was found right: a line for each, after one for the release."""

_NAME = re.compile(r"GaiaSource_(\d+)([-_])(\d+)\.csv\.gz")
_MOST_FAILED = 3
_SAMPLED = 16


@dataclass(frozen=True)
class BulkFile:
    """One file of a release.

    Arguments:
        name: Its name.
        url: Where it is.
        md5: Its checksum in hex.
        first: The first nested HEALPix pixel of level 8 that it holds.
        last: The last.
    """

    name: str
    url: str
    md5: str
    first: int
    last: int


def list_files(release: str, source: str | None = None, patience: Patience | None = None) -> list[BulkFile]:
    """All ``gaia_source`` files of a release in the order of the sky.

    Arguments:
        release: dr2, edr3 or dr3; another where `source` is given.
        source: Folder or URL of the files and their list of checksums; by default ESA's.
        patience: How long failures are borne.

    Raises:
        GalrayError: There is no such release or list, or it names no files.
    """
    if source is None and release not in BULK:
        raise GalrayError(
            f"no address of release '{release}' is known",
            f"use one of {', '.join(BULK)}, or say where it is with --source",
        )
    base, listing = (source or BULK[release][0], BULK.get(release, ("", "_MD5SUM.txt"))[1])
    if not is_url(base):
        folder = Path(base).expanduser().resolve()
        if not folder.is_dir():
            raise GalrayError(f"{folder}: no such folder", "correct --source")
        base = folder.as_uri()
        other = {"_MD5SUM.txt": "MD5SUM.txt", "MD5SUM.txt": "_MD5SUM.txt"}[listing]
        listing = other if not (folder / listing).exists() and (folder / other).exists() else listing
    if not base.startswith(("http://", "https://", "file://")):
        raise GalrayError(
            f"{base}: bulk files come from http(s):// or a folder",
            "for Parquet in an object store give the root of a HATS catalogue",
        )
    base = base.rstrip("/") + "/"
    text = read_small(base + listing, patience or Patience()).decode("utf-8", errors="replace")
    files = []
    for line in text.splitlines():
        found = re.fullmatch(r"([0-9a-fA-F]{32})\s+\*?(?:\./)?(\S+)", line.strip())
        name = _NAME.fullmatch(found[2]) if found else None
        if found and name:
            # DR2's files are named by the first and last source_id in them.
            shift = HEALPIX8_SHIFT if name[2] == "_" else 0
            first, last = int(name[1]) >> shift, int(name[3]) >> shift
            files.append(BulkFile(found[2], base + found[2], found[1].lower(), first, last))
    if not files:
        raise GalrayError(
            f"{base}{listing}: lists no GaiaSource_*.csv.gz with its MD5",
            "name the folder of the bulk files and their list of checksums with --source",
        )
    return sorted(files, key=lambda file: (file.first, file.name))


def choose(
    files: Sequence[BulkFile], region: Region | None = None, number: int | None = None
) -> list[BulkFile]:
    """The files that hold stars of a region, or the first `number` of them.

    Raises:
        GalrayError: There are none.
    """
    chosen = list(files)
    if region is not None:
        ranges = region.ranges()
        chosen = [f for f in files if any(f.first <= last and first <= f.last for first, last in ranges)]
        if not chosen:
            raise GalrayError("no file holds that part of the sky", "take a larger region")
    return chosen[:number]


def total_bytes(files: Sequence[BulkFile], patience: Patience | None = None) -> tuple[int | None, bool]:
    """Bytes of files by what the server tells, and whether all of them were asked.

    Of more than a few, some spread over the list stand for the rest. None where the server does not tell.
    """
    patience = patience or Patience()
    step = max(1, len(files) // _SAMPLED)
    asked = list(files) if len(files) <= 2 * _SAMPLED else list(files)[step // 2 :: step]
    with ThreadPoolExecutor(max_workers=8) as pool:
        sizes = list(pool.map(lambda file: content_length(file.url, patience), asked))
    told = [size for size in sizes if size is not None]
    if not told:
        return None, False
    return round(sum(told) / len(told) * len(files)), len(told) == len(files)


class Ledger:
    """The files of a folder that are known to be right, so that they need not be read again.

    Arguments:
        folder: The folder.
        release: What is fetched into it.

    Raises:
        GalrayError: The folder holds another release's files, or cannot be written.
    """

    def __init__(self, folder: Path, release: str) -> None:
        self.folder = folder
        self.path = folder / LEDGER
        self.entries: dict[str, dict[str, Any]] = {}
        held = None
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            for line in lines:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed run
                held = entry.get("release", held)
                if "name" in entry:
                    self.entries[entry["name"]] = entry
            if held not in (None, release):
                raise GalrayError(f"{folder}: holds files of {held}, not {release}", "choose another folder")
            if held is None:
                self._append({"release": release})
            elif not self.path.read_bytes().endswith(b"\n"):
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write("\n")
        except OSError as error:
            raise unwritable(self.path, error) from None

    def has(self, file: BulkFile) -> bool:
        """True where the file is there, and is what it was when its checksum was right."""
        entry = self.entries.get(file.name)
        try:
            status = (self.folder / file.name).stat()
        except OSError:
            return False
        known = {"md5": file.md5, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        if entry is not None and {key: entry.get(key) for key in known} == known:
            return True
        if md5_of(self.folder / file.name).hexdigest() != file.md5:
            return False
        self.add(file)
        return True

    def add(self, file: BulkFile) -> None:
        """Note that a file is there and right."""
        status = (self.folder / file.name).stat()
        entry = {
            "name": file.name,
            "md5": file.md5,
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
        }
        self._append(entry)
        self.entries[file.name] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def fetch_files(
    files: Sequence[BulkFile],
    folder: Path,
    release: str,
    *,
    workers: int = 4,
    patience: Patience | None = None,
    advance: Callable[[int, int, int], None] | None = None,
) -> dict[str, int]:
    """Download files into a folder, several at a time; those that are there and right are passed over.

    A file that cannot be had does not hold up the others, unless there are several such or the disk is at
    fault; whatever happens, a second call goes on where this one ended.

    Arguments:
        files: What to fetch.
        folder: Where to; it is created, and is then what ``catalog.files`` may name.
        release: Their release.
        workers: Files at a time.
        patience: How long a server's failures are borne.
        advance: Told, whenever something has happened, files done and to do, and bytes received.

    Returns:
        ``files, bytes`` in the folder of those asked for, ``fetched`` and ``received`` now.

    Raises:
        GalrayError: A file could not be had; the message names the first and how many.
    """
    patience = patience or Patience()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(folder, release)
        lines = "".join(f"{file.md5}  {file.name}\n" for file in files)
        write_atomic(folder / "_MD5SUM.txt", _merged(folder / "_MD5SUM.txt", lines))
    except OSError as error:
        raise unwritable(folder, error) from None
    stop, lock, counting = threading.Event(), threading.Lock(), threading.Lock()
    received = done = fetched = 0

    def count(more: int) -> None:
        nonlocal received
        with counting:
            received += more

    def one(file: BulkFile) -> bool:
        if stop.is_set():
            raise Stopped
        with lock:
            if ledger.has(file):
                return False
        download(file.url, folder / file.name, file.md5, patience, stop, count)
        try:
            with lock:
                ledger.add(file)
        except OSError as error:
            raise unwritable(folder / LEDGER, error) from None
        return True

    failed: list[GalrayError] = []
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting: set[Future[bool]] = {pool.submit(one, file) for file in files}
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
                if advance is not None:
                    advance(done, len(files), received)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    if failed:
        more = f" ({len(failed)} files failed, {done} of {len(files)} are there)"
        raise GalrayError(failed[0].what + more, failed[0].remedy)
    held = sum(ledger.entries[file.name]["bytes"] for file in files)
    return {"files": len(files), "bytes": held, "fetched": fetched, "received": received}


def _merged(path: Path, lines: str) -> str:
    """The list of checksums of all that was ever asked for, so that the folder is a source itself."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    sums = {line.split()[1]: line for line in (old + lines).splitlines() if len(line.split()) == 2}
    return "".join(sums[name] + "\n" for name in sorted(sums))
