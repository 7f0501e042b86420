"""What ``catalog.files`` names → the units of work of an ingest: whole files, or ranges of row groups."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128

from galray.catalog.hats import open_hats
from galray.catalog.storage import Storage, is_url
from galray.errors import GalrayError
from galray.provenance import file_checksum

if TYPE_CHECKING:
    from galray.catalog.settings import CatalogSettings

__all__ = ["SUFFIXES", "InputUnit", "input_units", "local_unit"]

SUFFIXES = (
    ".csv",
    ".csv.gz",
    ".parquet",
    ".fits",
    ".fits.gz",
    ".vot",
    ".vot.gz",
    ".xml",
    ".ecsv",
    ".ecsv.gz",
    ".hdf5",
    ".h5",
)
"""Names of the files that are taken from a folder."""

_SAMPLES = 64  # places of a file that is too large to be read for its checksum


@dataclass(frozen=True)
class InputUnit:
    """The piece of input that one call of a worker reads.

    Arguments:
        path: Absolute local path, or a URL.
        size: Bytes that are to be read.
        version: What tells, without reading it, that the input has not changed: the time of the last change
            of a local file in nanoseconds, or an object's ETag.
        row_groups: First and one past the last row group of a Parquet file; None for all of the file.
    """

    path: str
    size: int
    version: str
    row_groups: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The path, with the row groups where it is not the whole file: different for every unit."""
        if self.row_groups is None:
            return self.path
        return f"{self.path}[row groups {self.row_groups[0]}-{self.row_groups[1] - 1}]"

    @property
    def is_local(self) -> bool:
        """True for a path, False for a URL."""
        return "://" not in self.path

    def state(self) -> dict[str, Any]:
        """The unit in plain values, as manifests keep it."""
        state: dict[str, Any] = {"path": self.path, "size": self.size, "version": self.version}
        return state if self.row_groups is None else {**state, "row_groups": list(self.row_groups)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> InputUnit:
        """The unit that `state` describes; other keys are passed over."""
        groups = state.get("row_groups")
        return cls(state["path"], state["size"], state["version"], groups and (groups[0], groups[1]))

    def checksum(self) -> str:
        """An XXH3 of 128 bits in hex that is the same for the same content.

        It is that of a whole local file's bytes. Of a file that is read in parts it is that of its footer
        and of samples of its bytes, which all parts share, so that none of them has to read the whole; of an
        object, that of its ETag.

        Raises:
            GalrayError: The file cannot be read.
        """
        if not self.is_local:
            return xxh3_128(f"{self.path} {self.version}".encode()).hexdigest()
        try:
            if self.row_groups is None:
                return file_checksum(Path(self.path))
            with Path(self.path).open("rb") as stream:
                size = stream.seek(-8, os.SEEK_END)
                length = int.from_bytes(stream.read(4), "little")
                stream.seek(max(0, size - length))
                digest = xxh3_128(stream.read())
                # Files without statistics may have the same footer, and ids may follow from the checksum.
                for number in range(_SAMPLES):
                    stream.seek(size * number // _SAMPLES)
                    digest.update(stream.read(4096))
                return digest.hexdigest()
        except OSError as error:
            raise GalrayError(
                f"{self.path}: cannot be read: {error.strerror or error}", "mend the file"
            ) from None


def local_unit(path: Path | str) -> InputUnit:
    """A whole local file as a unit.

    Raises:
        GalrayError: There is no such file.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise GalrayError(f"{path}: {error.strerror or error}", "correct catalog.files") from None
    return InputUnit(str(path), status.st_size, str(status.st_mtime_ns))


def input_units(settings: CatalogSettings) -> list[InputUnit]:
    """The units of work that ``catalog.files`` names, sorted by path, each file once.

    Named are files, folders of files, HATS catalogues, and patterns, all of them local or by URL. A file that
    is named twice, or under several names (links), counts once. Parquet files larger than
    ``catalog.unit_megabytes`` become several units.

    Raises:
        GalrayError: Nothing is named, or a name matches no file.
    """
    if not settings.files:
        raise GalrayError("catalog.files is empty", "name the star files: paths, folders or glob patterns")
    storage = Storage(settings.storage)
    found: dict[str, InputUnit] = {}
    for pattern in settings.files:
        units = _remote(pattern, storage) if is_url(pattern) else _local(pattern, storage)
        if not units:
            raise GalrayError(f"catalog.files: '{pattern}' matches no file", "correct the path or pattern")
        found |= {unit.path: unit for unit in units}
    units_by_file: dict[object, InputUnit] = {}
    for path in sorted(found):
        status = os.stat(path) if found[path].is_local else None
        units_by_file.setdefault((status.st_dev, status.st_ino) if status else path, found[path])
    limit = int(settings.unit_megabytes * 1e6)
    return [part for unit in units_by_file.values() for part in _split(unit, limit, storage)]


def _local(pattern: str, storage: Storage) -> list[InputUnit]:
    """The files that a path or pattern names; of links to one file, the first in order."""
    text = os.path.expanduser(pattern)
    if Path(text).is_dir():
        catalog = open_hats(text, storage)
        if catalog is not None:
            return [InputUnit(tile.path, tile.size, tile.version) for tile in catalog.tiles]
        matches = [str(p) for p in sorted(Path(text).iterdir()) if p.name.lower().endswith(SUFFIXES)]
    else:
        matches = [text] if Path(text).is_file() else sorted(glob.glob(text, recursive=True))
        matches = [match for match in matches if Path(match).is_file()]
    return [local_unit(Path(match).resolve()) for match in matches]


def _remote(url: str, storage: Storage) -> list[InputUnit]:
    """The objects that a URL, a prefix or a pattern names."""
    if re.match(r"[a-z0-9]+://[^/]*@", url, re.IGNORECASE):
        raise GalrayError(
            f"catalog.files: '{url.split('://')[0]}://…@…' holds a user or key",
            "leave it out: credentials come from the environment",
        )
    is_pattern = re.search(r"[*?\[]", url) is not None
    if not is_pattern and not url.lower().endswith(SUFFIXES):
        catalog = open_hats(url, storage)
        if catalog is not None:
            return [InputUnit(tile.path, tile.size, tile.version) for tile in catalog.tiles]
    units = [InputUnit(name, size, version) for name, (size, version) in storage.listing(url).items()]
    return units if is_pattern else [unit for unit in units if unit.path.lower().endswith(SUFFIXES)]


def _split(unit: InputUnit, limit: int, storage: Storage) -> list[InputUnit]:
    """A large Parquet file in ranges of row groups of about `limit` bytes; anything else as it is."""
    if unit.size <= limit or not unit.path.endswith((".parquet", ".parq", ".pq")):
        return [unit]
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open(unit.path) as stream:
            metadata = pq.ParquetFile(stream).metadata
    except (pa.ArrowException, OSError, GalrayError):
        return [unit]  # reading it will say what is wrong
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    scale = unit.size / max(1, sum(sizes))
    parts: list[InputUnit] = []
    begin, held = 0, 0.0
    for group, size in enumerate(sizes):
        if held and held + size * scale > limit:
            parts.append(InputUnit(unit.path, round(held), unit.version, (begin, group)))
            begin, held = group, 0.0
        held += size * scale
    return [*parts, InputUnit(unit.path, round(held), unit.version, (begin, len(sizes)))] if parts else [unit]
