"""Chosen columns and rows of a HATS catalogue, tile by tile, as a smaller catalogue of the same form."""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from galray.catalog.columns import CORRELATIONS, ERRORS, OBSERVABLES, PHOTOMETRY, columns
from galray.catalog.download import DiskError, Patience, Stopped, unwritable
from galray.catalog.fetch_state import Advance, Ledger, run_jobs
from galray.catalog.hats import Tile, tile_path
from galray.catalog.quality import Cut, check_cut, parse_cuts
from galray.catalog.regions import Region
from galray.catalog.storage import Storage, explained, is_url
from galray.catalog.tile_catalog import write_hats_metadata
from galray.errors import GalrayError
from galray.provenance import file_hash, now, write_atomic

__all__ = ["HATS", "TileQuery", "archive_query", "estimate", "fetch_tiles", "prune"]

HATS = {"dr3": "s3://stpubdata/gaia/gaia_dr3/public/hats"}
"""Public copies of a release in HATS form, readable without credentials."""

_SIX_D = (
    "source_id",
    *OBSERVABLES,
    *ERRORS,
    *CORRELATIONS,
    *PHOTOMETRY,
    "ruwe",
    "nu_eff_used_in_astrometry",
    "pseudocolour",
    "astrometric_params_solved",
    "ecl_lat",
)
_ALWAYS = ("source_id", "ra", "dec", "_healpix_29")  # what makes the result a catalogue on the sky
_TABLES = {"dr1": "gaiadr1", "dr2": "gaiadr2", "edr3": "gaiaedr3", "dr3": "gaiadr3"}
_SAMPLED = 16

Pixel = tuple[int, int]


@dataclass(frozen=True)
class TileQuery:
    """Which columns and rows are wanted.

    Arguments:
        columns: Their names; none for all. ``6d`` stands for what an ingest of 6D stars reads.
        where: SQL condition on one row; None for all rows. Missing values and NaN meet none.
        region: Part of the sky; None for all of it.
    """

    columns: tuple[str, ...] = ()
    where: str | None = None
    region: Region | None = None

    def cut(self) -> Cut | None:
        """The condition as an expression.

        Raises:
            GalrayError: It is not SQL, aggregates over rows, or reads no column.
        """
        if self.where is None:
            return None
        (cut,) = parse_cuts({"where": self.where}, "--")
        return cut

    def names(self, available: Sequence[str]) -> list[str]:
        """The columns to keep, of those available.

        Raises:
            GalrayError: One is not there.
        """
        if not self.columns:
            return list(available)
        wanted = [name for name in _ALWAYS if name in available]
        for name in self.columns:
            if name == "6d":
                # Absent ones are left out: other copies of the catalogue may hold fewer.
                wanted += [column for column in _SIX_D if column in available]
            elif name in available:
                wanted.append(name)
            else:
                close = difflib.get_close_matches(name, available, 3)
                hint = (
                    f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(available[:6])}, …"
                )
                raise GalrayError(f"--columns: there is no column '{name}'", hint)
        return list(dict.fromkeys(wanted))

    def scan(self, tiles: Sequence[Tile], storage: Storage) -> pl.LazyFrame:
        """The rows and columns of some tiles; nothing is read yet but a footer.

        Raises:
            GalrayError: A column is not there, or the condition cannot be asked of the columns.
        """
        lazy = pl.scan_parquet(
            [tile.path for tile in tiles],
            glob=False,
            hive_partitioning=False,
            storage_options=storage.polars_options(tiles[0].path),
        )
        try:
            schema = lazy.collect_schema()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise _unreadable(tiles[0], error) from None
        if self.region is not None:
            absent = [name for name in self.region.needs() if name not in schema]
            if absent:
                raise GalrayError(f"{tiles[0].path}: no column '{absent[0]}' to tell the region by", "")
            lazy = lazy.filter(self.region.condition())
        if (cut := self.cut()) is not None:
            try:
                check_cut(cut, schema, tiles[0].path)
            except GalrayError as error:
                what = error.what.replace("catalog.cuts.where", "--where")
                raise GalrayError(what, "correct the condition") from None
            # NaN is greater than any number, but here it means that there is none.
            floats = [name for name in cut.columns if schema[name].is_float()]
            lazy = lazy.with_columns(pl.col(floats).fill_nan(None)) if floats else lazy
            lazy = lazy.filter(cut.expression)
        return lazy.select(self.names(schema.names()))

    def reads(self, available: Sequence[str]) -> set[str]:
        """The columns that must be transferred."""
        cut = self.cut()
        needs = self.region.needs() if self.region is not None else ()
        return {*self.names(available), *(cut.columns if cut else ()), *needs}


def archive_query(query: TileQuery, release: str) -> str:
    """The query that gives these rows from the Gaia archive (https://gea.esac.esa.int/archive).

    Raises:
        GalrayError: A column is not of the release's ``gaia_source``, or the condition is not SQL.
    """
    if release not in _TABLES:
        raise GalrayError(f"the archive has no release '{release}'", f"use one of {', '.join(_TABLES)}")
    available = [column.name for column in columns(release)]
    chosen = ", ".join(query.names(available)) if query.columns else "*"
    cut = query.cut()
    unknown = [name for name in (cut.columns if cut else ()) if name not in available]
    if unknown:
        raise GalrayError(f"--where: gaia_source has no column '{unknown[0]}'", "correct the condition")
    conditions = [f"({query.where})"] if query.where is not None else []
    conditions += [query.region.adql()] if query.region is not None else []
    text = f"SELECT {chosen}\nFROM {_TABLES[release]}.gaia_source"
    return text + ("\nWHERE " + "\n  AND ".join(conditions) if conditions else "")


def prune(tiles: Sequence[Tile], region: Region | None) -> dict[Pixel, list[Tile]]:
    """Order and pixel → the tile's files, of the tiles that can hold stars of a region.

    Raises:
        GalrayError: There are none.
    """
    ranges = region.ranges(margin=True) if region is not None else [(0, 12 * 4**8 - 1)]
    groups: dict[Pixel, list[Tile]] = {}
    for tile in tiles:
        first = tile.pixel * 4 ** (8 - tile.order) if tile.order <= 8 else tile.pixel >> 2 * (tile.order - 8)
        last = first + 4 ** max(0, 8 - tile.order) - 1
        if any(first <= b and a <= last for a, b in ranges):
            groups.setdefault((tile.order, tile.pixel), []).append(tile)
    if not groups:
        raise GalrayError("no tile holds that part of the sky", "take another region or catalogue")
    return groups


def _footer(tiles: Sequence[Tile], query: TileQuery, storage: Storage) -> tuple[int, int]:
    """Rows of a tile's files, and the bytes of the columns that the query reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = size = 0
    for tile in tiles:
        try:
            with (
                explained(tile.path) if is_url(tile.path) else nullcontext(),
                storage.open(tile.path) as stream,
            ):
                footer = pq.ParquetFile(stream).metadata
        except (pa.ArrowException, OSError) as error:
            text = (str(error).splitlines() or [""])[0]
            raise GalrayError(f"{tile.path}: the Parquet file is truncated or corrupt: {text}") from None
        rows += footer.num_rows
        reads = query.reads(
            list(dict.fromkeys(p.split(".")[0] for p in footer.schema.to_arrow_schema().names))
        )
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            chunks = (group.column(i) for i in range(group.num_columns))
            size += sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in reads)
    return rows, size


def estimate(
    groups: Mapping[Pixel, Sequence[Tile]], query: TileQuery, storage: Storage
) -> tuple[int, int, bool]:
    """Rows in the tiles, bytes of the columns to transfer, and whether every tile was asked."""
    tiles = list(groups.values())
    query.scan(tiles[0], storage)  # names what is wrong with the query
    step = max(1, len(tiles) // _SAMPLED)
    asked = tiles if len(tiles) <= 2 * _SAMPLED else tiles[step // 2 :: step]
    told = [_footer(group, query, storage) for group in asked]
    scale = len(tiles) / len(asked)
    return round(sum(r for r, _ in told) * scale), round(sum(b for _, b in told) * scale), scale == 1


def fetch_tiles(
    groups: Mapping[Pixel, Sequence[Tile]],
    query: TileQuery,
    folder: Path,
    about: Mapping[str, Any],
    storage: Storage,
    *,
    workers: int = 4,
    patience: Patience | None = None,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Write what a query takes from tiles as a HATS catalogue; tiles that are there are passed over.

    Arguments:
        groups: Tiles as `prune` gives them.
        query: Columns and rows.
        folder: Where to; when all tiles are there it becomes a catalogue that ``catalog.files`` can name.
        about: Where the rows come from, in plain values; kept with the query in ``fetch.json``.
        storage: How the tiles are read.
        workers: Tiles at a time.
        patience: How long a store's failures are borne.
        advance: Told tiles done, tiles to do, and bytes of the columns read.

    Returns:
        ``files, bytes`` (written), ``fetched`` (tiles read now), ``received`` (bytes of their columns),
        ``rows_in, rows`` of all tiles.

    Raises:
        GalrayError: The query does not fit the tiles, a tile cannot be read, no row is left, or the folder
            cannot be written or holds another query's rows.
    """
    first = next(iter(groups.values()))
    query.scan(first, storage)
    region = query.region.state() if query.region is not None else None
    what = {**about, "columns": list(query.columns), "where": query.where, "region": region}
    try:
        (folder / "dataset").mkdir(parents=True, exist_ok=True)
        ledger = Ledger(folder, what)
    except OSError as error:
        raise unwritable(folder, error) from None
    waits = patience or Patience()
    lock, received = threading.Lock(), 0

    def job(pixel: Pixel, tiles: Sequence[Tile], stop: threading.Event) -> bool:
        nonlocal received
        name = f"dataset/{tile_path(*pixel)}"
        version = [tile.version for tile in tiles]
        entry = ledger.entries.get(name)
        if entry is not None and entry["version"] == version and _there(folder / name, entry):
            return False
        rows_in, size = _with_patience(lambda: _footer(tiles, query, storage), tiles, waits, stop)
        written = _with_patience(
            lambda: _write(query.scan(tiles, storage), folder / name, tiles), tiles, waits, stop
        )
        place = {"name": name, "file": name, "level": pixel[0], "pixel": pixel[1], "version": version}
        ledger.add({**place, "rows_in": rows_in, "received": size, **written})
        with lock:
            received += size
        return True

    def tell(done: int) -> None:
        if advance is not None:
            advance(done, len(groups), received)

    jobs = [partial(job, pixel, tiles) for pixel, tiles in groups.items()]
    fetched = run_jobs(jobs, workers, tell)
    begin = {name: entry["pixel"] * 4 ** (29 - entry["level"]) for name, entry in ledger.entries.items()}
    entries = [ledger.entries[name] for name in sorted(begin, key=begin.__getitem__)]
    filled = [entry for entry in entries if entry["rows"]]
    result = {
        "files": len(filled),
        "bytes": sum(entry["bytes"] for entry in filled),
        "fetched": fetched,
        "received": received,
        "rows_in": sum(entry["rows_in"] for entry in entries),
        "rows": sum(entry["rows"] for entry in filled),
    }
    if not filled:
        raise GalrayError(f"none of {result['rows_in']:,} rows meets the condition", "correct --where")
    _describe(folder, what, entries, filled)
    return result


def _describe(
    folder: Path,
    what: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    filled: Sequence[Mapping[str, Any]],
) -> None:
    """Make the folder a HATS catalogue, with a manifest of what was taken from where."""
    from galray import __version__

    keys = ("file", "rows_in", "rows", "bytes", "sha256")
    manifest = {**what, "created": now(), "galray": __version__}
    manifest["tiles"] = [{key: entry[key] for key in keys} for entry in entries]
    most = str(max(entry["rows"] for entry in filled))
    names = {"name": f"gaia_{what['release']}", "created": now(), "galray": __version__, "max_rows": most}
    try:
        write_atomic(folder / "fetch.json", manifest)
        write_hats_metadata(folder, filled, names)
    except OSError as error:
        raise unwritable(folder, error) from None


def _unreadable(tile: Tile, error: Exception) -> GalrayError:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return GalrayError(f"{tile.path}: cannot be read: {text}", "check the source and the network")


def _there(path: Path, entry: Mapping[str, Any]) -> bool:
    """True where a tile's file is what the ledger says; a tile without rows has none."""
    if not entry["rows"]:
        return True
    return path.is_file() and path.stat().st_size == entry["bytes"]


def _write(lazy: pl.LazyFrame, path: Path, tiles: Sequence[Tile]) -> dict[str, Any]:
    """Stream a query into a file: rows, bytes, sha256."""
    import pyarrow.parquet as pq

    half = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lazy.sink_parquet(half, compression="zstd", maintain_order=True)
        rows = pq.read_metadata(half).num_rows
        if not rows:
            return {"rows": 0, "bytes": 0, "sha256": None}
        entry = {"rows": rows, "bytes": half.stat().st_size, "sha256": file_hash(half)}
        half.replace(path)
        return entry
    except (pl.exceptions.PolarsError, OSError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, OSError) and error.errno and not is_url(tiles[0].path):
            raise unwritable(path, error) from None
        if re.search("No space left|Read-only file system|Permission denied", text):
            raise DiskError(
                f"{path}: cannot be written: {text}", "make room or choose another folder"
            ) from None
        raise _unreadable(tiles[0], error) from None
    finally:
        half.unlink(missing_ok=True)


def _with_patience(act: Any, tiles: Sequence[Tile], patience: Patience, stop: threading.Event) -> Any:
    """Call `act`; of an object store its failures are borne a limited number of times."""
    tries = patience.tries if is_url(tiles[0].path) else 1
    for attempt in range(1, tries + 1):
        try:
            return act()
        except GalrayError as error:
            final = "cannot be read" not in error.what and "truncated" not in error.what
            if attempt == tries or final:
                raise
        if stop.wait(min(patience.wait * 2 ** (attempt - 1), patience.longest)):
            raise Stopped
    raise AssertionError("unreachable")
