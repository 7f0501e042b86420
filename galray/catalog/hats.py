"""HATS catalogues (and the older HiPSCat): which Parquet files of a folder or bucket hold the stars.

The form is that of the IVOA note "HATS": ``hats.properties`` (or ``properties``) says what the catalogue is,
``partition_info.csv`` lists its tiles, and ``dataset/Norder=k/Dir=d/Npix=n.parquet`` (or a folder
``Npix=n/``) holds each. Over http(s) the tiles are those of ``partition_info.csv``, one file each, and the
server must answer requests for ranges of bytes. Margin caches repeat stars of neighbouring tiles and indices
hold no stars: neither is read.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from galray.catalog.storage import Storage, is_url
from galray.errors import GalrayError
from galray.provenance import content_hash

__all__ = ["HatsCatalog", "Tile", "open_hats", "tile_path"]

_PROPERTIES = ("hats.properties", "properties")
_COLLECTION = "collection.properties"
_TILE = re.compile(r"Norder=(\d+)/Dir=\d+/Npix=(\d+)(?:\.parquet|/[^/]+\.parquet|/[^/.][^/]*)$")
_STARS = ("object", "source", "nested", "catalog")
_FETCH = "fetch or mirror the catalogue again"


@dataclass(frozen=True)
class Tile:
    """One Parquet file of a catalogue.

    Arguments:
        order: HEALPix order of its pixel.
        pixel: Its nested HEALPix pixel.
        path: The file.
        size: Bytes; where the server does not tell, the number of rows.
        version: What changes with the content.
    """

    order: int
    pixel: int
    path: str
    size: int
    version: str


@dataclass(frozen=True)
class HatsCatalog:
    """A catalogue of stars in HATS form.

    Arguments:
        root: Its folder or URL; that of the primary table where it is a collection.
        properties: What its properties file says.
        tiles: Its files in the order of the sky (nested, by their pixels' beginnings).
    """

    root: str
    properties: Mapping[str, str]
    tiles: tuple[Tile, ...]


def open_hats(root: Path | str, storage: Storage | None = None) -> HatsCatalog | None:
    """The catalogue in a folder or at a URL; None where there is none.

    Raises:
        GalrayError: It is a margin cache, an index or the like; or tiles that it lists are absent.
    """
    storage = storage or Storage()
    root = str(root).rstrip("/")
    for _ in range(2):  # a collection, and the table in it
        name = next((n for n in (_COLLECTION, *_PROPERTIES) if storage.exists(f"{root}/{n}")), None)
        if name is None:
            return None
        properties = _read_properties(storage.read(f"{root}/{name}"))
        if name != _COLLECTION:
            break
        table = properties.get("hats_primary_table_url", "")
        if not table:
            raise GalrayError(f"{root}/{name}: names no hats_primary_table_url", _FETCH)
        root = table if is_url(table) else f"{root}/{table.strip('/')}"
    kind = properties.get("dataproduct_type") or properties.get("catalog_type") or ""
    if not kind and not any(key.startswith(("hats", "hipscat")) for key in properties):
        return None  # some other program's properties
    if kind and kind not in _STARS:
        raise GalrayError(
            f"{root}: a HATS catalogue of type '{kind}', which holds no stars of its own",
            "give the main table or the collection that it belongs to",
        )
    return HatsCatalog(root, properties, tuple(_tiles(root, properties, storage)))


def tile_path(order: int, pixel: int) -> str:
    """Where a tile lies in a catalogue's dataset folder."""
    return f"Norder={order}/Dir={pixel // 10_000 * 10_000}/Npix={pixel}.parquet"


def _tiles(root: str, properties: Mapping[str, str], storage: Storage) -> list[Tile]:
    listed = _partitions(root, storage)
    if is_url(root) and root.startswith(("http://", "https://")):
        if listed is None:
            raise GalrayError(f"{root}: no partition_info.csv, and a web server lists no files", _FETCH)
        version = content_hash([dict(properties), sorted(listed.items())])
        tiles = [
            Tile(
                k, n, f"{root}/dataset/Norder={k}/Dir={n // 10_000 * 10_000}/Npix={n}.parquet", rows, version
            )
            for (k, n), rows in listed.items()
        ]
    else:
        tiles = []
        for path, (size, version) in _files(root, storage).items():
            found = _TILE.search(path.replace(os.sep, "/"))
            if found and not os.path.basename(path).startswith(("_", ".")):
                tiles.append(Tile(int(found[1]), int(found[2]), path, size, version))
        missing = sorted(set(listed or ()) - {(tile.order, tile.pixel) for tile in tiles})
        if missing:
            k, n = missing[0]
            raise GalrayError(
                f"{root}: {len(missing)} of the {len(listed or ())} tiles in partition_info.csv are absent, "
                f"such as Norder={k}, Npix={n}",
                _FETCH,
            )
        if listed is not None:
            tiles = [tile for tile in tiles if (tile.order, tile.pixel) in listed]
    if not tiles:
        raise GalrayError(f"{root}: a HATS catalogue without tiles", _FETCH)
    return sorted(tiles, key=lambda tile: (tile.pixel << 2 * (29 - tile.order), tile.path))


def _files(root: str, storage: Storage) -> dict[str, tuple[int, str]]:
    """Parquet files below the root (older catalogues have no folder ``dataset``)."""
    if is_url(root):
        found = storage.listing(f"{root}/dataset")
        return found or storage.listing(root)
    files = {}
    for path in sorted(Path(root).rglob("Norder=*/Dir=*/Npix=*")):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            status = file.stat()
            files[str(file.resolve())] = (status.st_size, str(status.st_mtime_ns))
    return files


def _partitions(root: str, storage: Storage) -> dict[tuple[int, int], int] | None:
    """Order and pixel of every tile → its rows (0 where not told)."""
    path = f"{root}/partition_info.csv"
    if not storage.exists(path):
        return None
    rows = csv.DictReader(io.StringIO(storage.read(path).decode("utf-8-sig")))
    try:
        return {(int(row["Norder"]), int(row["Npix"])): int(row.get("num_rows") or 0) for row in rows}
    except (KeyError, ValueError, TypeError) as error:
        raise GalrayError(f"{path}: not a list of tiles (Norder, Npix): {error}", _FETCH) from None


def _read_properties(content: bytes) -> dict[str, str]:
    """``key = value`` lines; those that begin with # are comments."""
    pairs = {}
    for line in content.decode("utf-8", errors="replace").splitlines():
        if "=" in line and not line.lstrip().startswith("#"):
            key, value = line.split("=", 1)
            pairs[key.strip()] = value.strip()
    return pairs
