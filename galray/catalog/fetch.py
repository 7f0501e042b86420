"""Gaia's catalogue brought here: whole bulk files, or chosen columns and rows of a HATS copy."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from galray.catalog.download import Patience, unwritable
from galray.catalog.fetch_bulk import choose, fetch_files, list_files, total_bytes
from galray.catalog.regions import Region
from galray.catalog.storage import StorageSettings
from galray.errors import GalrayError

__all__ = ["fetch"]

_LOCK = ".fetch.lock"


def fetch(
    to: Path | str | None,
    release: str = "dr3",
    *,
    region: Region | None = None,
    files: int | None = None,
    columns: Sequence[str] = (),
    where: str | None = None,
    source: str | None = None,
    storage: StorageSettings | None = None,
    workers: int = 4,
    dry_run: bool = False,
    patience: Patience | None = None,
    advance: Callable[[int, int, int], None] | None = None,
) -> dict[str, Any]:
    """Fetch a part of Gaia's ``gaia_source`` into a folder that ``catalog.files`` can name.

    Without `columns` and `where` these are ESA's bulk files, whole, each checked against its MD5. With them,
    or with a `source` that is a HATS catalogue, they are its tiles with those columns and rows alone, as
    Parquet. Either way a second call goes on where an earlier one ended.

    Arguments:
        to: The folder; may be None with `dry_run`.
        release: Gaia release.
        region: Part of the sky. Bulk files that overlap it come whole; rows of tiles are exactly those in it.
        files: The first so many files or tiles.
        columns: Columns of the tiles; all of them by default. ``6d`` stands for those of an ingest.
        where: SQL condition on the tiles' rows; missing values meet none.
        source: Where the files are, instead of ESA's server or the public HATS copy: a folder or URL.
        storage: How an object store is reached.
        workers: Files at a time.
        dry_run: Only find out how much it would be.
        patience: How long a server's failures are borne.
        advance: Told files done, files to do and bytes received so far.

    Returns:
        Plain values: ``what`` (bulk or tiles), ``files, bytes`` and more by kind; of a dry run ``exact``
        says whether the bytes are the server's own sum or an estimate.

    Raises:
        GalrayError: What is asked for makes no sense or cannot be had, or the folder cannot be written.
    """
    if files is not None and files < 1:
        raise GalrayError(f"{files} files are none", "ask for at least one")
    if workers < 1:
        raise GalrayError(f"{workers} workers fetch nothing", "use at least one")
    if to is None and not dry_run:
        raise GalrayError("no folder is named", "say where the files go with --to DIR")
    patience = patience or Patience()
    chosen = list_files(release, source, patience)
    chosen = choose(chosen, region, files)
    if dry_run:
        size, exact = total_bytes(chosen, patience)
        return {"what": "bulk", "files": len(chosen), "bytes": size, "exact": exact}
    assert to is not None
    folder = Path(to).expanduser()
    with _alone(folder):
        found = fetch_files(chosen, folder, release, workers=workers, patience=patience, advance=advance)
    return {"what": "bulk", **found}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system lets go of however the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / _LOCK).open("a")
    except OSError as error:
        raise unwritable(folder, error) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GalrayError(
                f"{folder}: another fetch is writing this folder", "wait for it, or use another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
