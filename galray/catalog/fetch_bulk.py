"""ESA's bulk files: which of them hold a part of the sky, and their resumable download."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from galray.catalog.download import Patience, content_length, download, md5_of, read_small, unwritable
from galray.catalog.fetch_state import Advance, Ledger, run_jobs
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

_NAME = re.compile(r"GaiaSource_(\d+)([-_])(\d+)\.csv\.gz")
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


def _is_right(path: Path, file: BulkFile, ledger: Ledger) -> bool:
    """True where a file is there with the right checksum, by the ledger or else by reading it."""
    try:
        status = path.stat()
    except OSError:
        return False
    entry = ledger.entries.get(file.name, {})
    if entry.items() >= _state(file, status).items():
        return True
    if md5_of(path).hexdigest() != file.md5:
        return False
    ledger.add(_state(file, status))
    return True


def _state(file: BulkFile, status: os.stat_result) -> dict[str, Any]:
    return {"name": file.name, "md5": file.md5, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def fetch_files(
    files: Sequence[BulkFile],
    folder: Path,
    release: str,
    *,
    workers: int = 4,
    patience: Patience | None = None,
    advance: Advance | None = None,
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
    waits = patience or Patience()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(folder, {"release": release})
        lines = "".join(f"{file.md5}  {file.name}\n" for file in files)
        write_atomic(folder / "_MD5SUM.txt", _merged(folder / "_MD5SUM.txt", lines))
    except OSError as error:
        raise unwritable(folder, error) from None
    lock = threading.Lock()
    received = 0

    def count(more: int) -> None:
        nonlocal received
        with lock:
            received += more

    def job(file: BulkFile, stop: threading.Event) -> bool:
        path = folder / file.name
        if _is_right(path, file, ledger):
            return False
        download(file.url, path, file.md5, waits, stop, count)
        ledger.add(_state(file, path.stat()))
        return True

    def tell(done: int) -> None:
        if advance is not None:
            advance(done, len(files), received)

    fetched = run_jobs([partial(job, file) for file in files], workers, tell)
    held = sum(ledger.entries[file.name]["bytes"] for file in files)
    return {"files": len(files), "bytes": held, "fetched": fetched, "received": received}


def _merged(path: Path, lines: str) -> str:
    """The list of checksums of all that was ever asked for, so that the folder is a source itself."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    sums = {line.split()[1]: line for line in (old + lines).splitlines() if len(line.split()) == 2}
    return "".join(sums[name] + "\n" for name in sorted(sums))
