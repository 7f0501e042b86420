"""The pass over a catalogue: files → pieces → shards → tiles → manifest; resumable, refused twice at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from galray.catalog.crew import Crew
from galray.catalog.inputs import InputUnit, input_units
from galray.catalog.lease import LEASE, lease
from galray.catalog.manifest import SIDE_FILES, STORE_FORMAT, describe_settings, finished_store, publish
from galray.catalog.measures import auxiliary_files
from galray.catalog.mirror import Mirror, Place, open_place
from galray.catalog.quarantine import LOST
from galray.catalog.readers import Source, open_unit
from galray.catalog.selection import Selection, kind_of
from galray.catalog.settings import CatalogSettings
from galray.catalog.shards import MANIFEST, SIDE_VIEWS, ShardStore
from galray.catalog.stages import Progress, Stages
from galray.errors import GalrayError
from galray.provenance import content_hash

__all__ = ["good_sources", "ingest", "plan"]

_LOCK = ".lock"


def plan(settings: CatalogSettings) -> dict[str, Any]:
    """What an ingest would do, from the files' sizes and the first one's columns; nothing is written.

    Returns:
        ``files`` (names of the units of work), ``num_files``, ``bytes``, ``num_shards``; ``kind`` and
        ``format`` of the first that can be read.

    Raises:
        GalrayError: As `input_units`; or more of the first files than ``allow_bad`` are of no known form.
    """
    units = input_units(settings)
    source, kind = next(good_sources(units, settings))
    return {
        "files": [unit.name for unit in units],
        "num_files": len(units),
        "bytes": sum(unit.size for unit in units),
        "num_shards": settings.num_shards,
        "format": source.format,
        "kind": kind,
    }


def good_sources(units: Sequence[InputUnit], settings: CatalogSettings) -> Iterator[tuple[Source, str]]:
    """Open one unit after another and look for its columns, passing over as many as may be bad.

    Arguments:
        units: The input.
        settings: What to read and cut; ``allow_bad`` of the units may be bad, but not all.

    Yields:
        Each good unit and its kind, ``gaia`` or ``states``.

    Raises:
        GalrayError: More units cannot be read or lack a column; the last of them is named.
    """
    bad = 0
    for unit in units:
        try:
            source = open_unit(unit, settings)
            kind = kind_of(settings, source)
            Selection(settings, source, "0" * 8, 0)
        except GalrayError:
            bad += 1
            if bad > settings.allow_bad or bad == len(units):
                raise
        else:
            yield source, kind


def ingest(
    settings: CatalogSettings,
    target: Path | str,
    *,
    num_workers: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> ShardStore:
    """Turn star files into a shard store, and into tiles in sky order beside it.

    Every unit of input becomes a piece, the pieces are merged shard by shard, the tiles are cut from the
    shards, and the manifest is written last: until then the folder is no store. A finished store of the same
    files and settings is returned as it is; an interrupted ingest goes on with the files and shards that are
    missing, and so does one that ended because more files were bad than ``allow_bad``, whether these have
    been mended or ``allow_bad`` raised. The stars, their shards and tiles and the checksums do not depend on
    `num_workers`. Where stars without radial velocity are kept (``require_rv = false``) and no others are
    left, the store has all its columns and no rows, and the stars are in `ShardStore.no_rv`.

    Arguments:
        settings: What to read, cut and keep.
        target: Folder of the store, with Ray on several machines one that they share; or a URL, of which
            each node keeps a copy of what it works on.
        num_workers: Ray actors of one CPU each, 0 to work in this process.
        seed: Salt of the hash that deals stars into shards.
        progress: Called as the work goes on.

    Returns:
        The finished store.

    Raises:
        GalrayError: More files than ``allow_bad`` are unreadable or lack a column (all are named), no star is
            left, the target cannot be written, is not seen by the workers or holds something else, or another
            ingest works on it.
    """
    units = input_units(settings)
    auxiliary = auxiliary_files(settings)
    place = open_place(target, settings.storage.signed)
    target = place.folder
    _prepare(place)
    with lease(place) if isinstance(place, Mirror) else _locked(target):
        content = settings.model_dump(exclude={"files", "allow_bad"})
        about = {"format": STORE_FORMAT, "seed": seed, "settings": content, "auxiliary": auxiliary}
        key = content_hash(about)
        finished = finished_store(place, key, units, settings.allow_bad)
        if finished is not None:
            return finished
        started = time.monotonic()
        try:
            work = _workspace(place, key)
            with Crew(settings.model_dump_json(), work, seed, num_workers) as crew:
                stages = Stages(settings, work, units, crew, progress or (lambda *_: None))
                stages.read()
                views = stages.merge()
                selection = stages.selection_function()
            about = describe_settings(settings, stages.kind) | {
                "account": dict(stages.account),
                "notes": dict(stages.notes),
                "selection": selection,
                "settings_hash": key,
                "auxiliary": auxiliary,
                "seed": seed,
                "inputs": stages.inputs,
                "input_hash": content_hash([entry["xxh128"] for entry in stages.inputs]),
                "quarantined": stages.quarantined,
                "seconds": round(time.monotonic() - started, 3),
                "peak_worker_mb": round(stages.peak_mb, 1),
            }
            publish(place, work, stages.out, views, about)
        except OSError as error:
            raise _unwritable(target, error) from None
        return ShardStore.at(place)


def _unwritable(target: Path, error: OSError) -> GalrayError:
    return GalrayError(
        f"{target}: cannot write shards: {error.strerror or error}", "free space, or choose a writable folder"
    )


def _prepare(place: Place) -> None:
    """Make the folder; refuse one that holds something else."""
    target = place.folder
    try:
        target.mkdir(parents=True, exist_ok=True)
        names = sorted({name.split("/")[0] for name in place.sizes()})
    except OSError as error:
        raise _unwritable(target, error) from None
    own = {MANIFEST, LOST, _LOCK, LEASE, *SIDE_VIEWS, "selection", "sky", *SIDE_FILES}
    foreign = [n for n in names if n not in own and not n.startswith((".ingest-", "shard-", f".{MANIFEST}"))]
    if foreign:
        raise GalrayError(
            f"{place.location}: holds files that are not a shard store's, such as '{foreign[0]}'",
            "choose an empty or new folder",
        )


def _workspace(place: Place, key: str) -> Place:
    """The ingest's own place in the target; what other or killed ingests left half done is removed."""
    target, work = place.folder, place.folder / f".ingest-{key}"
    others = {name.split("/")[0] for name in place.sizes() if name.startswith(".ingest-")} - {work.name}
    place.remove(*others)
    for stale in (*target.glob(".ingest-*"), *target.glob(f".{MANIFEST}*")):
        if stale.is_file():
            stale.unlink()
        elif stale != work:
            shutil.rmtree(stale, ignore_errors=True)
    work.mkdir(exist_ok=True)
    for half in (*work.glob(".*.tmp"), *work.glob("piece-*.lost.parquet")):
        half.unlink(missing_ok=True)
    return place.below(work.name)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the store's lock; the system lets go of it when the process ends, however it ends."""
    path = target / _LOCK
    stream = _lock(path, target)
    with stream:
        stream.truncate(0)
        stream.write(f"pid {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path, target: Path) -> TextIO:
    """Open the lock's file and lock it."""
    while True:
        try:
            stream = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise _unwritable(target, error) from None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip() or "another process"
            stream.close()
            raise GalrayError(
                f"{target}: another ingest is writing this store ({owner})",
                "wait for it, or use another folder",
            ) from None
        except OSError:
            # A file system without locks: there the user sees to it that only one ingest runs.
            return stream
        # The owner before may have removed the file between our opening and locking it.
        with contextlib.suppress(OSError):
            if os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
                return stream
        stream.close()
