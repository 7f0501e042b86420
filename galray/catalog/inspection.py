"""A look at star files, HATS catalogues and stores: what they are, what is in them, what is wrong."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from galray.catalog.columns import ASTROMETRY, CORRELATIONS, ERRORS, OBSERVABLES, STATE
from galray.catalog.hats import HatsCatalog, open_hats
from galray.catalog.inputs import SUFFIXES
from galray.catalog.readers import SHORT_ROW, Source, open_source
from galray.catalog.shards import MANIFEST
from galray.catalog.storage import Storage, StorageSettings, is_url
from galray.catalog.verification import verify
from galray.errors import GalrayError

if TYPE_CHECKING:
    from galray.catalog.settings import StatesSettings

__all__ = ["inspect"]

_HATS_FILES = ("hats.properties", "properties", "partition_info.csv", "collection.properties")
_SAMPLE_BYTES = 1 << 22


def inspect(
    path: Path | str,
    release: str = "dr3",
    *,
    quick: bool = False,
    rename: Mapping[str, str] | None = None,
    storage: StorageSettings | None = None,
    states: StatesSettings | None = None,
) -> dict[str, Any]:
    """Summarise a star file, a HATS catalogue or a shard store in plain values.

    A ``problem`` is what makes an ingest fail or lose rows, a ``note`` what it is well to know.

    Arguments:
        path: A file of any form that an ingest reads or the root of a HATS catalogue, both of them local or
            by URL; or a store's folder.
        release: Gaia release whose column types apply to a file.
        quick: Read metadata and the head only; a huge file then takes a moment, but its end is not checked,
            and rows of text files are estimated.
        rename: Columns of a file that carry other names: ``{theirs: ours}``.
        storage: How an object store is reached.
        states: Where an HDF5 snapshot holds its particles.

    Returns:
        ``path, what, problems, notes, rows`` always. For a file: ``format, kind, bytes, columns, missing``
        (columns a 6D ingest uses and the file lacks), ``absent_values`` (per column), ``estimated_rows``.
        For a HATS catalogue: ``tiles, bytes, levels, columns, properties``. For a store: ``kind, shards,
        bytes, columns, account, ball, cuts, frame, hash, created, quarantined``.

    Raises:
        GalrayError: There is no such file or store, or the file is of no known form.
    """
    how = _How(release, rename, storage, states, quick)
    if is_url(path):
        url = str(path).rstrip("/")
        url = url.rpartition("/")[0] if url.rpartition("/")[2] in _HATS_FILES else url
        catalog = None if url.lower().endswith(SUFFIXES) else open_hats(url, how.storage)
        return _inspect_remote_hats(catalog, how) if catalog else _inspect_file(url, how)
    path = Path(path)
    if (path / MANIFEST).is_file() or path.name == MANIFEST:
        return _inspect_store(path.parent if path.name == MANIFEST else path, quick)
    if path.name in _HATS_FILES:
        path = path.parent
    if path.is_dir():
        if any((path / name).is_file() for name in _HATS_FILES):
            return _inspect_hats(path, how)
        raise GalrayError(
            f"{path}: neither a finished shard store (no {MANIFEST}) nor a HATS catalogue",
            "name a star file in it, or run the ingest to its end",
        )
    return _inspect_file(path, how)


class _How:
    """How the files are opened.

    Arguments:
        release: As in `inspect`, as are the others.
    """

    def __init__(
        self,
        release: str,
        rename: Mapping[str, str] | None,
        storage: StorageSettings | None,
        states: StatesSettings | None,
        quick: bool,
    ) -> None:
        self.storage = Storage(storage)
        self.quick = quick
        self._options: dict[str, Any] = {"release": release, "rename": rename}
        self._options |= {"storage": storage, "states": states}

    def open(self, path: Path | str) -> Source:
        """The file's form, by its content."""
        return open_source(path, **self._options)


def _inspect_store(path: Path, quick: bool) -> dict[str, Any]:
    from galray.catalog.shards import ShardStore

    store = ShardStore(path)
    manifest = store.manifest
    summary = {name: manifest[name] for name in ("account", "ball", "cuts", "frame", "hash", "created")}
    notes = [f"quarantined: {entry['path']}: {entry['reason']}" for entry in manifest["quarantined"]]
    checked = verify(store, checksums=not quick)
    return {
        "path": str(path),
        "what": "store",
        "kind": manifest["kind"],
        "rows": store.num_rows,
        "shards": len(store.shards),
        "bytes": sum(entry["bytes"] for entry in manifest["shards"]),
        "columns": manifest["columns"],
        **summary,
        "quarantined": len(manifest["quarantined"]),
        "problems": list(checked.problems),
        "notes": notes + list(checked.notes),
    }


def _inspect_hats(path: Path, how: _How) -> dict[str, Any]:
    """The root of a HATS catalogue, or of a collection of one catalogue with its margins and indices."""
    properties = _properties(path)
    if main := properties.get("hats_primary_table_url"):
        found = _inspect_hats(path / main, how)
        return {**found, "collection": str(path)}
    tiles = sorted(path.rglob("Npix=*.parquet")) + sorted(path.rglob("Npix=*/*.parquet"))
    problems: list[str] = []
    with suppress(OSError, pl.exceptions.PolarsError):
        listed = pl.read_csv(path / "partition_info.csv").height
        if listed != len(tiles):
            problems.append(f"partition_info.csv lists {listed} tiles, {len(tiles)} are there")
    size = sum(tile.stat().st_size for tile in tiles)
    return _hats_account(path, [str(tile) for tile in tiles], size, properties, problems, how)


def _inspect_remote_hats(catalog: HatsCatalog, how: _How) -> dict[str, Any]:
    """A HATS catalogue by URL: that all listed tiles are there, its opening has seen to."""
    paths = [tile.path for tile in catalog.tiles]
    size = sum(tile.size for tile in catalog.tiles)
    return _hats_account(catalog.root, paths, size, catalog.properties, [], how)


def _hats_account(
    root: object, tiles: list[str], size: int, properties: Mapping[str, str], problems: list[str], how: _How
) -> dict[str, Any]:
    """What the footers of a catalogue's tiles say."""
    names: dict[str, str] = {}
    rows = 0
    for tile in tiles:
        try:
            source = how.open(tile)
            rows += _parquet_rows(tile, how.storage)
        except GalrayError as error:
            problems.append(error.what)
            continue
        names = names or dict(source.names)
        if set(source.names) != set(names):
            problems.append(f"{tile}: other columns than the tiles before it")
    said = properties.get("hats_nrows")
    if not tiles:
        problems.append("no tiles (Norder=k/Dir=d/Npix=n.parquet) in it")
    elif said is not None and said.isdigit() and int(said) != rows:
        problems.append(f"hats.properties tells of {int(said):,} rows, the tiles hold {rows:,}")
    kind, missing, notes = _fitness(names, problems) if names else (None, [], [])
    orders = {part for tile in tiles for part in tile.split("/") if part.startswith("Norder=")}
    return {
        "path": str(root),
        "what": "hats",
        "format": "hats",
        "kind": kind,
        "rows": rows,
        "tiles": len(tiles),
        "levels": sorted(int(order.partition("=")[2]) for order in orders),
        "bytes": size,
        "columns": list(names),
        "missing": missing,
        "properties": dict(properties),
        "problems": problems,
        "notes": notes,
    }


def _properties(path: Path) -> dict[str, str]:
    for name in ("hats.properties", "properties", "collection.properties"):
        with suppress(OSError):
            lines = (path / name).read_text(encoding="utf-8", errors="replace").splitlines()
            pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
            return {key.strip(): value.strip() for key, _, value in pairs}
    return {}


def _inspect_file(path: Path | str, how: _How) -> dict[str, Any]:
    source = how.open(path)
    problems: list[str] = []
    kind, missing, notes = _fitness(source.names, problems)
    expected = STATE if kind == "states" else (*OBSERVABLES, *ERRORS, *CORRELATIONS)
    wanted = [name for name in ("source_id", *expected) if name in source.names]
    wanted = wanted or list(source.names)[:1]
    found: dict[str, Any] = {"rows": None, "absent_values": {}}
    if not how.quick:
        found = _read_through(source, wanted, problems)
    elif source.format == "parquet":
        found = {"rows": _parquet_rows(path, how.storage), "absent_values": _parquet_nulls(source, wanted)}
    elif source.format == "csv":
        found["estimated_rows"] = _estimate_rows(path, how.storage)
    if found["rows"] == 0 and not problems:
        problems.append("no rows")
    return {
        "path": str(path),
        "what": "file",
        "format": source.format,
        "kind": kind,
        "bytes": how.storage.size(path),
        **found,
        "columns": list(source.names),
        "missing": missing,
        "problems": problems,
        "notes": notes,
    }


def _fitness(names: Mapping[str, str], problems: list[str]) -> tuple[str | None, list[str], list[str]]:
    """What kind of table these columns make, which of its columns are missing, and what that means."""
    kind: str | None = None
    if {*ASTROMETRY} <= {*names}:
        kind = "gaia"
    elif {*STATE} <= {*names}:
        kind = "states"
    expected = STATE if kind == "states" else (*OBSERVABLES, *ERRORS, *CORRELATIONS)
    missing = [name for name in expected if name not in names]
    notes = []
    if kind is None:
        problems.append("neither a Gaia source table nor a 6D table: name its columns with catalog.rename")
    elif missing:
        shown = ", ".join(missing[:4]) + " …" * (len(missing) > 4)
        notes.append(f"{len(missing)} column(s) absent: {shown}")
        if "radial_velocity" in missing:
            notes.append("no radial velocities: set catalog.require_rv = false for a 5D store")
        elif kind == "gaia":
            notes.append("errors cannot be drawn without all errors of parallax, motions and velocity")
    if "source_id" not in names:
        notes.append("no source_id: stars get one from the file's checksum and their row")
    return kind, missing, notes


def _read_through(source: Source, wanted: list[str], problems: list[str]) -> dict[str, Any]:
    """Read all rows, batch by batch."""
    rows = short = 0
    absent = dict.fromkeys(wanted, 0)
    try:
        for batch in source.batches(wanted):
            rows += batch.height
            for name, count in zip(wanted, batch.select(pl.col(wanted).null_count()).row(0), strict=True):
                absent[name] += count
            if SHORT_ROW in batch.columns:
                short += int(batch[SHORT_ROW].sum())
    except GalrayError as error:
        problems.append(error.what)
    if short:
        problems.append(f"{short:,} row(s) end before the last column")
    return {"rows": rows, "absent_values": {name: count for name, count in absent.items() if count}}


def _parquet_rows(path: Path | str, storage: Storage) -> int:
    """Rows by the footer."""
    import pyarrow.parquet as pq

    try:
        with storage.open(path) as stream:
            return int(pq.read_metadata(stream).num_rows)
    except (OSError, ValueError) as error:
        text = (str(error).splitlines() or [""])[0]
        raise GalrayError(
            f"{path}: the Parquet file is truncated or corrupt: {text}", "fetch or write it again"
        ) from None


def _parquet_nulls(source: Source, wanted: list[str]) -> dict[str, int]:
    """Missing values by the footer's statistics, for the columns that have them in every row group."""
    import pyarrow.parquet as pq

    with source.storage.open(source.path) as stream:
        footer = pq.read_metadata(stream)
    columns = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
    nulls: dict[str, int] = {}
    for name in wanted:
        number = columns.get(source.names[name])
        if number is None:
            continue
        groups = [footer.row_group(g).column(number).statistics for g in range(footer.num_row_groups)]
        if all(s is not None and s.has_null_count for s in groups):
            nulls[name] = sum(s.null_count for s in groups)
    return {name: count for name, count in nulls.items() if count}


def _estimate_rows(path: Path | str, storage: Storage) -> int:
    """Rows of a text file from the mean length of those at its beginning."""
    size = storage.size(path)
    head = b""
    with storage.open(path) as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        with suppress(EOFError, zlib.error, OSError):
            while len(head) < _SAMPLE_BYTES and (block := stream.read(1 << 16)):
                head += block
        # What of the file holds so many lines; the reader is at most one buffer ahead.
        consumed = max(min(raw.tell(), size), 1)
    lines = sum(1 for line in head.splitlines() if line and not line.startswith(b"#"))
    return round(max(lines - 1, 0) * size / consumed)
