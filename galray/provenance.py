"""Where an artefact came from: versions, revision, configuration, inputs, seed."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

__all__ = [
    "content_hash",
    "file_checksum",
    "file_hash",
    "git_revision",
    "is_intact",
    "library_versions",
    "now",
    "provenance",
    "write_atomic",
]

LIBRARIES = (
    "torch",
    "zuko",
    "ray",
    "mlflow",
    "polars",
    "pyarrow",
    "dask",
    "astropy",
    "numpy",
    "scipy",
    "pydantic",
    "safetensors",
)


def now() -> str:
    """The time in UTC to the second, in ISO form."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def content_hash(content: Any) -> str:
    """A short stable hash of anything JSON can write: keys sorted, no white space."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file: which file it is, in records that outlive galray's own."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_checksum(path: Path) -> str:
    """XXH3 of a file, 128 bits, as ``xxh128sum`` prints it: whether it is as it was written.

    A guard against accidents, not against forgers. It keeps pace with the disk, where SHA-256 of a store's
    files would be an eighth of the work of an ingest.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxh3_128).hexdigest()


def is_intact(path: Path, checksum: str) -> bool:
    """Whether a file has the checksum of `file_checksum`, or the SHA-256, that was written down for it."""
    return checksum == (file_hash(path) if len(checksum) == 64 else file_checksum(path))


@cache
def git_revision() -> str | None:
    """The revision of galray's checkout, with ``+`` where it has uncommitted changes; None outside git."""
    folder = Path(__file__).resolve().parent
    try:
        revision = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result can depend on."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def provenance(config_hash: str, input_hash: str | None, seed: int) -> dict[str, Any]:
    """What every artefact carries: galray's version and revision, hashes, seed, libraries, machine, time."""
    from galray import __version__

    return {
        "galray": __version__,
        "git": git_revision(),
        "config_hash": config_hash,
        "input_hash": input_hash,
        "seed": seed,
        "created": now(),
        "libraries": library_versions(),
        "machine": {
            "system": platform.system(),
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
    }


def write_atomic(path: Path, content: str | bytes | dict[str, Any] | list[Any]) -> None:
    """Write a file whole or not at all: under a temporary name, then renamed over the old one.

    Dictionaries and lists are written as JSON.
    """
    if isinstance(content, (dict, list)):
        content = json.dumps(content, indent=1, allow_nan=False, default=_plain) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays, tensors and paths as JSON knows them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
