"""What ``catalog.files`` names → the units of work of an ingest: whole files, or ranges of row groups."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galray.errors import GalrayError
from galray.provenance import file_hash

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
)
"""Names of the files that are taken from a folder."""


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
        """A SHA-256 in hex that is the same for the same content: of a whole local file, its bytes.

        Raises:
            GalrayError: The file cannot be read.
        """
        if not self.is_local:
            return hashlib.sha256(f"{self.size} {self.version}".encode()).hexdigest()
        try:
            return file_hash(Path(self.path))
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

    A file that is named twice, or under several names (links), counts once.

    Raises:
        GalrayError: Nothing is named, or a name matches no file.
    """
    if not settings.files:
        raise GalrayError("catalog.files is empty", "name the star files: paths, folders or glob patterns")
    found: dict[Path, None] = {}
    for pattern in settings.files:
        found |= dict.fromkeys(_matches(pattern))
    units: dict[tuple[int, int], InputUnit] = {}
    for path in sorted(found):
        unit = local_unit(path)
        status = os.stat(path)
        units.setdefault((status.st_dev, status.st_ino), unit)
    return list(units.values())


def _matches(pattern: str) -> list[Path]:
    """Resolved paths of the files that one entry names."""
    text = os.path.expanduser(pattern)
    if Path(text).is_dir():
        matches = [str(p) for p in sorted(Path(text).iterdir()) if p.name.lower().endswith(SUFFIXES)]
    else:
        matches = [text] if Path(text).is_file() else sorted(glob.glob(text, recursive=True))
        matches = [match for match in matches if Path(match).is_file()]
    if not matches:
        raise GalrayError(f"catalog.files: '{pattern}' matches no file", "correct the path or pattern")
    return [Path(match).resolve() for match in matches]
