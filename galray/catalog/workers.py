"""The jobs of an ingest, each a function of files: read one unit of input, merge a shard, write tiles."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from galray.catalog.counting import counted
from galray.catalog.inputs import InputUnit
from galray.catalog.merge import merge_shard
from galray.catalog.mirror import Place
from galray.catalog.pieces import PieceIndex, PieceWriter
from galray.catalog.readers import open_unit
from galray.catalog.selection import Selection
from galray.catalog.settings import CatalogSettings
from galray.catalog.shards import SIDE_VIEWS
from galray.catalog.sky_rows import HEALPIX, LEVEL
from galray.catalog.tile_catalog import write_hats_metadata
from galray.catalog.tiles import Tile, healpix_29, write_tiles
from galray.errors import GalrayError
from galray.provenance import content_hash, write_atomic

__all__ = ["VIEWS", "Worker", "peak_mb", "piece_name"]

VIEWS = ("6d", *SIDE_VIEWS)
"""Kinds of stars: with all six coordinates, and those without radial velocity."""

ATTEMPTS = 4
"""How often a file is read when storage or network fail."""

PAUSE_SECONDS = 0.5
"""Wait before the second attempt; doubled before each further one."""

_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH}
_NETWORK_WORDS = re.compile(
    r"timed? ?out|connection|error sending request|error decoding response|temporar|slow ?down|too many req"
    r"|dns|broken pipe|reset by peer|incomplete message|unexpected eof|\b(429|500|502|503|504)\b",
    re.IGNORECASE,
)


def piece_name(unit: InputUnit) -> str:
    """Name of the files that a unit becomes: the same as long as the input is the same."""
    return f"piece-{content_hash(unit.state())}"


class Worker:
    """Does one job after another; holds no state between them.

    Arguments:
        settings: The catalogue's configuration in JSON.
        place: Where pieces and shards go: a folder that all workers share, or a URL.
        seed: Salt of the hash that deals stars into shards.
    """

    def __init__(self, settings: str, place: Place, seed: int) -> None:
        self.settings = CatalogSettings.model_validate_json(settings)
        self.place = place
        self.folder = place.folder
        self.seed = seed

    def visible(self, token: str) -> str | None:
        """Check that this process sees the driver's folder; answers with what is wrong, if anything is."""
        with contextlib.suppress(OSError):
            if self.place.read("visible") == token.encode():
                self.folder.mkdir(parents=True, exist_ok=True)
                return None
        return (
            f"{self.folder.parent}: not visible on node {socket.gethostname()}, where an ingest worker runs"
        )

    def run(self, job: tuple[str, Any]) -> dict[str, Any]:
        """Do one job and answer with plain values: a user's mistake comes back as ``error``, not raised."""
        name, arguments = job
        try:
            answer = getattr(self, name)(*arguments)
        except GalrayError as error:
            return {"error": error.what, "remedy": error.remedy, "bad_file": name == "read"}
        except OSError as error:  # readers explain their own: this is the writing side
            return {
                "error": f"{self.folder.parent}: cannot write shards: {error.strerror or error}",
                "remedy": "free space there, or choose another writable folder",
                "bad_file": False,
            }
        return {**answer, "peak_mb": peak_mb()}

    def read(self, unit: InputUnit) -> dict[str, Any]:
        """Turn one unit of input into a piece: selected rows in batches by shard, and its row account.

        A piece that is already there for the same input is left as it is. A failure of storage or network is
        tried again.
        """
        name = piece_name(unit)
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads(self.place.read(f"{name}.json") or b"")
            if InputUnit.from_state(record["file"]) == unit:
                return {"record": record, "reused": True}
        if unit.is_local and not Path(unit.path).exists():
            node = socket.gethostname()
            return {
                "error": f"{unit.path}: not visible on node {node}, where an ingest worker runs",
                "remedy": "put the star files on storage that all nodes of the cluster share",
                "bad_file": False,
            }
        for attempt in range(1, ATTEMPTS + 1):
            try:
                record = self._read(unit)
                break
            except GalrayError as error:
                if attempt == ATTEMPTS or not _is_transient(error, unit):
                    raise
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        write_atomic(self.folder / f"{name}.json", record)
        self.place.push(f"{name}.*", last=[f"{name}.json"])
        return {"record": record, "reused": False}

    def _read(self, unit: InputUnit) -> dict[str, Any]:
        source = open_unit(unit, self.settings)
        checksum = unit.checksum()
        selection = Selection(self.settings, source, checksum, self.seed)
        name = piece_name(unit)
        pieces = {view: PieceWriter(self.folder / f"{name}.{view}.arrow") for view in VIEWS}
        row = source.first_row
        tiles = "tiles" in self.settings.views
        frame = self.settings.frame.build()
        shift = 2 * (LEVEL - self.settings.tiles.max_level)
        pixels: dict[str, list[np.ndarray]] = {view: [] for view in VIEWS}
        none: pl.DataFrame | None = None
        try:
            for batch in source.batches(selection.columns):
                for view, stars in zip(VIEWS, selection.apply(batch, row), strict=True):
                    if view == "6d" and stars is not None:
                        none = stars.clear()
                    if stars is not None and stars.height:
                        if tiles:
                            sky = healpix_29(stars, frame)
                            stars = stars.with_columns(pl.Series(HEALPIX, sky))
                            pixels[view].append((sky >> shift).astype(np.int32))
                        pieces[view].add(stars)
                row += batch.height
            if none is not None and any(piece.has_rows for piece in pieces.values()):
                # Should no file have 6D stars, the store's 6D view is empty, with its columns all the same.
                pieces["6d"].add_schema(none)
            kept = {view: piece.close() for view, piece in pieces.items()}
        finally:
            for piece in pieces.values():
                piece.abandon()
        if selection.tally is not None:
            selection.tally.write(self.folder / f"{name}.rv.parquet")
        views = {
            view: {
                "rows": kept[view],
                "schema": _plain_schema(piece.schema),
                "nullable": sorted(piece.nullable),
            }
            for view, piece in pieces.items()
            if piece.schema is not None
        }
        for view, parts in pixels.items():
            if parts:
                counts = np.stack(counted(np.concatenate(parts)))
                np.save(self.folder / f"{name}.{view}.pixels.npy", counts)
        return {
            "file": {**unit.state(), "xxh128": checksum, "rows": row - source.first_row},
            "kind": selection.kind,
            "account": dict(selection.account),
            "notes": dict(selection.notes),
            "views": views,
        }

    def lost(self, unit: InputUnit) -> dict[str, Any]:
        """Name the rows of a bad file one by one, as far as they can still be read.

        Returns:
            ``rows_named``; ``rows``, the number of all its rows, None where the file does not tell.
        """
        path = self.folder / f"{piece_name(unit)}.lost.parquet"
        named: list[pl.DataFrame] = []
        rows: int | None = None
        row = 0
        try:
            source = open_unit(unit, self.settings)
            row = source.first_row
            wanted = "source_id" if "source_id" in source.names else next(iter(source.names))
            for batch in source.batches([wanted]):
                ids = batch[wanted] if wanted == "source_id" else pl.Series([None] * batch.height)
                numbers = pl.Series("row", np.arange(row + 1, row + 1 + batch.height))
                named.append(pl.DataFrame([numbers, ids.cast(pl.Int64).alias("source_id")]))
                row += batch.height
            rows = row - source.first_row
        except GalrayError:
            pass  # the file ends here for us; why is told already
        if named:
            frame = pl.concat(named).select(pl.lit(unit.name).alias("file"), "row", "source_id")
            frame.write_parquet(path, compression="zstd")
            self.place.push(path.name)
        return {"rows": rows, "rows_named": sum(frame.height for frame in named)}

    def merge(
        self, shard: int, view: str, out: str, schema_file: str, required: Sequence[str]
    ) -> dict[str, Any]:
        """Merge one shard's rows from all pieces, in the order of the input files."""
        folder, name = self.folder / out / view, f"{out}/{view}/shard-{shard:05d}"
        with contextlib.suppress(OSError, ValueError):
            entry = json.loads(self.place.read(f"{name}.json") or b"")
            if self.place.sizes(f"{name}.parquet") == {f"{name}.parquet": entry["bytes"]}:
                return {"entry": entry, "reused": True}
        self.place.fetch(f"{out}/{schema_file}", f"{out}/index-{view}.npy", f"{out}/index-{view}.txt")
        schema = pl.Schema(pl.read_parquet_schema(self.folder / out / schema_file))
        index = PieceIndex.load(self.folder / out / f"index-{view}.npy", shard)
        self.place.fetch(*(index.files[number] for number in np.unique(index.entries[:, 0])))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"shard-{shard:05d}.parquet"
        entry = merge_shard(self.folder, index, schema, required, path, self.settings)
        # As text: a sum of squares may be infinite, which JSON does not know and Python's does.
        write_atomic(path.with_suffix(".json"), json.dumps(entry))
        self.place.push(f"{name}.*", last=[f"{name}.json"])
        return {"entry": entry, "reused": False}

    def tile(
        self, tiles: Sequence[Tile], view: str, out: str, schema_file: str, required: Sequence[str]
    ) -> dict[str, Any]:
        """Write a few tiles that follow each other on the sky, when all shards have been merged."""
        self.place.fetch(f"{out}/{schema_file}")
        self.place.pull(f"{out}/{view}/shard-*.sky.*", prefix=f"{out}/{view}")
        schema = pl.Schema(pl.read_parquet_schema(self.folder / out / schema_file))
        entries = write_tiles(self.folder / out / view, tiles, schema, required, self.settings)
        self.place.push(*(f"{out}/{view}/sky/{entry['file']}" for entry in entries))
        return {"tiles": entries}

    def catalog(
        self, tiles: Sequence[dict[str, Any]], view: str, out: str, about: dict[str, str]
    ) -> dict[str, Any]:
        """Make a HATS catalogue of the tiles."""
        self.place.pull(prefix=f"{out}/{view}/sky")
        write_hats_metadata(self.folder / out / view / "sky", tiles, about)
        self.place.push(f"{out}/{view}/sky/**/*")
        return {}


def _plain_schema(schema: pl.Schema | None) -> list[list[str]]:
    return [[name, str(kind)] for name, kind in (schema or {}).items()]


def _is_transient(error: GalrayError, unit: InputUnit) -> bool:
    """Whether storage or network may do better the next time."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConnectionError, TimeoutError)):
            return True
        if isinstance(cause, OSError) and cause.errno in _TRANSIENT:
            return True
        if not unit.is_local and not isinstance(cause, GalrayError) and _NETWORK_WORDS.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def peak_mb() -> float:
    """Greatest resident memory of this process so far, in MB."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Not getrusage, which begins with what the parent process had when it forked.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)
