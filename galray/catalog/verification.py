"""Is a store what its manifest says? Checksums, counts, schema, the deal of the stars, the row account."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from galray.catalog.selection import splitmix64
from galray.catalog.shards import MANIFEST, SIDE_VIEWS, ShardStore, store_hash, written_checksum
from galray.errors import GalrayError
from galray.provenance import is_intact

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Arguments:
        path: The store.
        shards: Shards looked at, those of stars without radial velocity among them.
        tiles: Tiles looked at.
        rows: Stars in the shards.
        bytes: Their size.
        problems: What differs from the manifest, each with the file's name.
        notes: What is odd but harms nothing.
    """

    path: str
    shards: int
    tiles: int
    rows: int
    bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain values."""
        return asdict(self)


def verify(store: ShardStore | Path | str, *, checksums: bool = True) -> Verification:
    """Check a store, and that of the stars without radial velocity beside it, to the last file.

    Unlike `ShardStore.verify`, which stops at the first fault, this finds them all.

    Arguments:
        store: The store.
        checksums: Read every file to compare its checksum, its rows and its stars; else look at sizes and
            footers only.

    Raises:
        GalrayError: There is no finished store at that place.
    """
    store = store if isinstance(store, ShardStore) else ShardStore(store)
    store.fetch()
    problems, notes = _account(store), []
    shards = _files(store, "", store.manifest["shards"], checksums, _shard_check(store))
    problems += shards
    tiles = tile_entries(store)
    if tiles:
        problems += _files(store, "sky/", tiles, checksums, None)
        problems += _tile_rows(store, tiles)
    listed = {entry["file"] for entry in store.manifest["shards"]}
    for path in sorted(store.path.glob("shard-*")):
        if path.name not in listed:
            notes.append(f"{path}: not in the manifest")
    for path in sorted(store.path.glob(".ingest-*")):
        notes.append(f"{path}: left by an interrupted ingest")
    others = []
    for name in (name for name in SIDE_VIEWS if store.manifest.get(name)):
        if (store.path / name / MANIFEST).is_file():
            others.append(verify(store.path / name, checksums=checksums))
        else:
            problems.append(f"{store.path / name}: the {SIDE_VIEWS[name]} are gone")
    return Verification(
        path=store.location,
        shards=len(store.shards) + sum(other.shards for other in others),
        tiles=len(tiles) + sum(other.tiles for other in others),
        rows=store.num_rows + sum(other.rows for other in others),
        bytes=sum(entry["bytes"] for entry in store.manifest["shards"]) + sum(o.bytes for o in others),
        problems=(*problems, *(text for other in others for text in other.problems)),
        notes=(*notes, *(text for other in others for text in other.notes)),
    )


def tile_entries(store: ShardStore) -> list[dict[str, Any]]:
    """The manifest's entries of the tiles; none where the store has shards only."""
    tiles = store.manifest.get("tiles") or []
    return list(tiles["files"] if isinstance(tiles, Mapping) else tiles)


def _account(store: ShardStore) -> list[str]:
    manifest, path = store.manifest, store.path / MANIFEST
    problems = []
    account = store.row_account
    total = account.pop("rows_in", None)
    if total != sum(account.values()):
        problems.append(f"{path}: the row account does not add up: {total} rows in, {sum(account.values())}")
    if sum(store.shard_rows) != store.num_rows or account.get("kept") != store.num_rows:
        problems.append(
            f"{path}: {store.num_rows} stars, {sum(store.shard_rows)} in its shards, "
            f"{account.get('kept')} kept by the row account"
        )
    if manifest["hash"] != store_hash(manifest["shards"], manifest["frame"]):
        problems.append(f"{path}: the store's hash is not that of its shards and frame")
    return problems


def _files(
    store: ShardStore, folder: str, entries: Sequence[Mapping[str, Any]], checksums: bool, check: Any
) -> list[str]:
    """The faults of files that the manifest lists; hashing and reading let threads work side by side."""

    def look(numbered: tuple[int, Mapping[str, Any]]) -> list[str]:
        number, entry = numbered
        path = store.path / folder / entry["file"]
        try:
            path = Path(store.file(folder + entry["file"]))
            if not path.is_file():
                return [f"{path}: the file is gone"]
            if (size := path.stat().st_size) != entry["bytes"]:
                return [f"{path}: {size:,} bytes, the manifest says {entry['bytes']:,}"]
            if checksums and not is_intact(path, written_checksum(entry)):
                return [f"{path}: the checksum differs from the manifest's"]
            rows = (
                pl.scan_parquet(path, glob=False, hive_partitioning=False).select(pl.len()).collect().item()
            )
            if rows != entry["rows"]:
                return [f"{path}: {rows:,} rows, the manifest says {entry['rows']:,}"]
            return check(number, path, checksums) if check is not None else []
        except GalrayError as error:
            return [error.what]
        except (OSError, pa.ArrowInvalid, pl.exceptions.PolarsError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            return [f"{path}: cannot be read: {text}"]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [fault for faults in pool.map(look, enumerate(entries)) for fault in faults]


def _shard_check(store: ShardStore) -> Any:
    """What else must be true of shard `number`: its columns, and that its stars belong there, each once."""
    expected = {name: entry["dtype"] for name, entry in store.manifest["columns"].items()}
    count, salt = np.uint64(len(store.shards)), int(store.manifest.get("seed", 0))

    def check(number: int, path: Path, whole: bool) -> list[str]:
        schema = {name: str(kind) for name, kind in pl.read_parquet_schema(path).items()}
        if schema != expected:
            odd = sorted({*schema.items()} ^ {*expected.items()})
            return [f"{path}: other columns than the manifest's: {', '.join(dict(odd)) or 'their order'}"]
        if not whole:
            return []
        ids = pl.read_parquet(path, columns=["source_id"], glob=False)["source_id"].to_numpy()
        faults = []
        if np.any(ids[1:] <= ids[:-1]):
            faults.append(f"{path}: stars are not sorted by source_id, or come twice")
        if np.any(splitmix64(ids, salt) % count != number):
            faults.append(f"{path}: holds stars that belong to another shard")
        return faults

    return check


def _tile_rows(store: ShardStore, tiles: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tiles hold the stars of the shards, no more and no fewer."""
    rows = sum(int(tile["rows"]) for tile in tiles)
    problems = []
    if rows != store.num_rows:
        problems.append(f"{store.path / 'sky'}: {rows:,} stars in tiles, {store.num_rows:,} in shards")
    listed = {tile["file"] for tile in tiles}
    root = store.path / "sky"
    for path in sorted(root.rglob("Npix=*.parquet")):
        if str(path.relative_to(root)) not in listed:
            problems.append(f"{path}: a tile that the manifest does not list")
    return problems
