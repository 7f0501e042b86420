"""Gaia's catalogue brought here: bulk files, or chosen columns and rows of a HATS copy or the archive."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from galray.catalog.download import Patience, unwritable
from galray.catalog.fetch_archive import count_rows, fetch_archive
from galray.catalog.fetch_bulk import choose, fetch_files, list_files, total_bytes
from galray.catalog.fetch_state import Advance
from galray.catalog.fetch_tiles import HATS, TileQuery, estimate, fetch_tiles, prune
from galray.catalog.hats import HatsCatalog, open_hats
from galray.catalog.regions import Region
from galray.catalog.storage import Storage, StorageSettings, is_url
from galray.catalog.tap import ARCHIVE, TapService
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
    via: Literal["files", "archive"] = "files",
    chunks: int | None = None,
    storage: StorageSettings | None = None,
    workers: int = 4,
    dry_run: bool = False,
    patience: Patience | None = None,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Fetch a part of Gaia's ``gaia_source`` into a folder that ``catalog.files`` can name.

    Without `columns` and `where` these are ESA's bulk files, whole, each checked against its MD5. With them,
    or with a `source` that is a HATS catalogue, they are its tiles with those columns and rows alone, as
    Parquet. Either way a second call goes on where an earlier one ended.

    A tile's columns cross the network whole, whatever share of their rows is wanted: a dry run tells their
    bytes. ``via="archive"`` has the Gaia archive choose the rows, so that these alone are sent: its TAP
    service runs the query range of source_id by range, and each answer becomes a Parquet file. No login is
    needed.

    Arguments:
        to: The folder; may be None with `dry_run`.
        release: Gaia release.
        region: Part of the sky. Bulk files that overlap it come whole; rows of tiles are exactly those in it.
        files: The first so many files or tiles.
        columns: Columns of the tiles; all of them by default. ``6d`` stands for those of an ingest.
        where: SQL condition on the tiles' rows; missing values meet none.
        source: Where the files are, instead of ESA's server or the public HATS copy: a folder or URL; of the
            archive, the root of another TAP service.
        via: ``files``, or the ``archive``'s service.
        chunks: Ranges of source_id to ask the archive for, to begin with; one too large is cut.
        storage: How an object store is reached.
        workers: Files, or the archive's jobs, at a time.
        dry_run: Only find out how much it would be; the archive counts the rows.
        patience: How long a server's failures are borne.
        advance: Told files done, files to do and bytes received so far.

    Returns:
        Plain values: ``what`` (bulk, tiles or archive), ``files, bytes, fetched, received``, of tiles
        ``rows_in, rows``, of the archive ``chunks, rows``. Of a dry run ``bytes`` are those to transfer,
        ``exact`` where they are no estimate.

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
    query = TileQuery(tuple(columns), where, region)
    query.cut()  # a wrong condition is told before anything is asked of a server
    if via == "archive":
        if files is not None:
            raise GalrayError("--files has no counterpart in a query", "use --healpix or --cone")
        if chunks is not None and chunks < 1:
            raise GalrayError(f"{chunks} chunks are none", "ask for at least one")
        service = TapService(source or ARCHIVE, patience)
        if dry_run:
            rows, bytes_ = count_rows(query, release, service)
            return {"what": "archive", "rows": rows, "bytes": bytes_, "exact": False}
        assert to is not None
        folder = Path(to).expanduser()
        with _alone(folder):
            asked: dict[str, Any] = {"chunks": chunks, "workers": workers, "advance": advance}
            return {"what": "archive", **fetch_archive(query, release, folder, service, **asked)}
    if chunks is not None:
        raise GalrayError("--chunks is for the archive", "add --via archive, or leave it out")
    catalog, store = _catalog(release, query, source, storage)
    if catalog is None:
        chosen = choose(list_files(release, source, patience), region, files)
        if dry_run:
            size, exact = total_bytes(chosen, patience)
            return {"what": "bulk", "files": len(chosen), "bytes": size, "exact": exact}
        assert to is not None
        folder = Path(to).expanduser()
        with _alone(folder):
            found = fetch_files(chosen, folder, release, workers=workers, patience=patience, advance=advance)
        return {"what": "bulk", **found}
    groups = dict(list(prune(catalog.tiles, region).items())[:files])
    if dry_run:
        rows, bytes_, exact = estimate(groups, query, store)
        return {"what": "tiles", "files": len(groups), "rows_in": rows, "bytes": bytes_, "exact": exact}
    assert to is not None
    folder = Path(to).expanduser()
    about = {"release": release, "source": catalog.root}
    options: dict[str, Any] = {"workers": workers, "patience": patience, "advance": advance}
    with _alone(folder):
        return {"what": "tiles", **fetch_tiles(groups, query, folder, about, store, **options)}


def _catalog(
    release: str, query: TileQuery, source: str | None, settings: StorageSettings | None
) -> tuple[HatsCatalog | None, Storage]:
    """The HATS catalogue to read; None where bulk files are meant."""
    chosen = bool(query.columns) or query.where is not None
    if source is None:
        if not chosen:
            return None, Storage(settings)
        if release not in HATS:
            raise GalrayError(
                f"no public HATS copy of release '{release}' is known for --columns and --where",
                "name the root of one with --source, or add --via archive",
            )
        source = HATS[release]
        if settings is None or settings == StorageSettings():
            settings = StorageSettings(skip_signature=True, region="us-east-1")
    storage = Storage(settings)
    if not chosen and source.startswith(("http://", "https://")):
        return None, storage
    catalog = open_hats(source if is_url(source) else Path(source).expanduser().resolve(), storage)
    if catalog is None and chosen:
        raise GalrayError(
            f"{source}: no HATS catalogue, which --columns and --where need",
            "name the root of one (the folder of hats.properties), or leave them out for whole files",
        )
    return catalog, storage


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
