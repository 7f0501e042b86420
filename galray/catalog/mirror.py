"""What lies at a URL, and each node's own copy of it: object stores have no disk that nodes could share.

A `Mirror` is a folder of this machine and the prefix of URLs that it stands for. Files are compared by size
and by what this process has moved itself; every file arrives whole or not at all, at both ends. Jobs pull
what they read and push what they wrote, so that nothing depends on a disk that two nodes would see.
"""

from __future__ import annotations

import errno
import fnmatch
import getpass
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from galray.catalog.storage import Storage, StorageSettings, access_denied, is_url
from galray.errors import GalrayError
from galray.provenance import write_atomic

__all__ = [
    "Mirror",
    "Place",
    "RemoteFile",
    "join_url",
    "local_copy",
    "open_place",
    "place_of",
    "scratch_folder",
]

SCRATCH = "GALRAY_SCRATCH"
"""The environment variable that names a node's folder for copies."""

ATTEMPTS = 6
"""How often a transfer is tried, over half a minute, beside what the store's own client tries."""

FIRST_ATTEMPTS = 2
"""How often where this process has had no answer yet: an address that is wrong is told sooner."""

PAUSE_SECONDS = 0.5
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
_PARTS = 32
"""Files that are moved at a time."""

Answer = TypeVar("Answer")

_answered: set[tuple[str | None, str]] = set()
"""Endpoints and buckets that have answered this process."""

_known: dict[Path, tuple[int, int]] = {}
"""Bytes and time of change of the copies that this process has moved: what is so still need not be sent."""


def scratch_folder() -> Path:
    """This node's folder for copies: that of the environment, or the user's among temporary files."""
    given = os.environ.get(SCRATCH)
    return Path(given) if given else Path(tempfile.gettempdir()) / f"galray-{getpass.getuser()}"


def join_url(url: str, *names: str) -> str:
    """A URL with more names behind it."""
    return "/".join([url.rstrip("/"), *(name.strip("/") for name in names)])


def open_place(path: Path | str, storage: StorageSettings | None = None) -> Place:
    """The place that a path or URL names."""
    return Mirror(str(path), storage) if is_url(path) else Place(Path(path).absolute())


def local_copy(path: str, storage: StorageSettings | None = None) -> Path:
    """A file of this node by its path; of one at a URL, a copy that is made now.

    Raises:
        GalrayError: There is no such object, or it cannot be had.
    """
    if not is_url(path):
        return Path(path).expanduser()
    folder, _, name = path.rpartition("/")
    if not name or folder.endswith("/"):
        raise GalrayError(f"{path}: not the URL of a file", "name one such as s3://bucket/folder/file")
    place = Mirror(folder, storage)
    if (content := place.read(name)) is None:
        raise GalrayError(f"{path}: no such object", "correct the URL")
    place.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(place.folder / name, content)
    return place.folder / name


def place_of(folder: Path | str, storage: StorageSettings | None = None) -> Place:
    """The place whose copy on this node a folder is; the folder itself where it is nobody's copy.

    Arguments:
        folder: An absolute path, such as a member or a trial is given to write into.
        storage: How the object store is reached.
    """
    path = Path(folder)
    scratch = scratch_folder()
    if not path.is_relative_to(scratch):
        return Place(path)
    scheme, *names = path.relative_to(scratch).parts
    return Mirror(f"{scheme}://{'/'.join(names)}", storage)


class Place:
    """A folder that all nodes which work in it share.

    Arguments:
        folder: The folder.
    """

    storage: StorageSettings | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def location(self) -> str:
        """Path or URL, for messages and for `open_place`."""
        return str(self.folder)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.location!r})"

    def below(self, name: str) -> Place:
        """A folder in this one."""
        return Place(self.folder / name)

    def file(self, name: str) -> os.PathLike[str]:
        """A file in it; one at a URL is brought to the node that opens it.

        Raises:
            GalrayError: The name, as one in a manifest from elsewhere, leads out of the folder.
        """
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise GalrayError(
                f"{self.location}: '{name}' leads out of it", "take a store whose files are its own"
            )
        return path

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Its files, or those below a folder in it, by name, with their bytes."""
        start, found = self.folder / prefix, dict[str, int]()
        below = (os.path.join(folder, name) for folder, _, names in os.walk(start) for name in names)
        for path in [start] if start.is_file() else below:
            with suppress(FileNotFoundError):  # another process works here, and has just taken it away
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):
                    found[os.path.relpath(path, self.folder)] = status.st_size
        return found

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none."""
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file as a whole."""
        write_atomic(self.folder / name, content)

    def ray_storage(self) -> dict[str, Any]:
        """Where Ray Train and Ray Tune keep their own state, as keywords of their ``RunConfig``."""
        return {"storage_path": str(self.folder)}

    def pull(self, *patterns: str, prefix: str = "") -> None:
        """Bring files to this node that are not here, or are of another size.

        Arguments:
            patterns: Of names in the place, as ``fnmatch`` reads them; all files where there are none.
            prefix: A folder in it, to look at no more than is needed.
        """

    def fetch(self, *names: str) -> None:
        """Bring files to this node that are not here.

        Raises:
            GalrayError: One is not in the place, or cannot be had.
        """

    def push(self, *patterns: str, last: Sequence[str] = ()) -> None:
        """Send files that are new here or have changed since this process moved them.

        Files whose names begin with a dot, or end in .tmp or .part, are work in progress and stay.

        Arguments:
            patterns: Of names in the folder, as ``Path.glob`` reads them; all files where there are none.
            last: Names that are sent when all others are there.
        """

    def remove(self, *prefixes: str) -> None:
        """Delete files away from this node: names, or folders with all that is in them."""

    def settle(self) -> None:
        """Make the place what is on this node: send what is new, delete what is gone."""

    def clear(self) -> None:
        """Throw this node's copy away, where it is one."""


class Mirror(Place):
    """A URL and this node's copy of it, which has the same place in the scratch folder of every node.

    Arguments:
        url: The prefix, such as ``s3://bucket/runs/mine``.
        storage: How the object store is reached.

    Raises:
        GalrayError: It is no URL, or leaves itself by ``..``.
    """

    def __init__(self, url: str, storage: StorageSettings | None = None) -> None:
        self.url = url.rstrip("/")
        scheme, separator, path = self.url.partition("://")
        parts = [part for part in path.split("/") if part]
        if not separator or not is_url(url) or not parts or {".", ".."} & set(parts) or "@" in parts[0]:
            shown = re.sub(r"://[^/]*@", "://…@", url)  # a password is not repeated
            raise GalrayError(f"{shown}: not a URL of a folder", "name a place such as s3://bucket/folder")
        super().__init__(scratch_folder().joinpath(scheme, *parts))
        self.storage = storage or StorageSettings()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Mirror, (self.url, self.storage))

    @property
    def location(self) -> str:
        """The URL."""
        return self.url

    def below(self, name: str) -> Mirror:
        """As `Place.below`."""
        return Mirror(join_url(self.url, name), self.storage)

    def file(self, name: str) -> RemoteFile:
        """As `Place.file`."""
        return RemoteFile(self, name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """As `Place.sizes`, of what lies at the URL."""

        def look() -> dict[str, int]:
            system = self._system()
            system.invalidate_cache()
            root = system._strip_protocol(self.url).rstrip("/") + "/"
            found = system.find(root + prefix, detail=True)
            return {
                name.removeprefix(root): int(info.get("size") or 0)
                for name, info in found.items()
                # Keys are any text: one that would leave the folder is nobody's file.
                if info["type"] == "file"
                and name.startswith(root)
                and not {"", ".", ".."} & {*name.split("/")}
            }

        return self._patiently(look, "listed")

    def pull(self, *patterns: str, prefix: str = "") -> None:
        """As `Place.pull`."""
        sizes = {
            name: size
            for name, size in self.sizes(prefix).items()
            if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        }
        missing = [name for name, size in sizes.items() if not self._has(name, size)]
        for begin in range(0, len(missing), _PARTS):
            self._bring(missing[begin : begin + _PARTS])

    def fetch(self, *names: str) -> None:
        """As `Place.fetch`."""
        missing = [name for name in names if not (self.folder / name).is_file()]
        for begin in range(0, len(missing), _PARTS):
            self._bring(missing[begin : begin + _PARTS])

    def push(self, *patterns: str, last: Sequence[str] = ()) -> None:
        """As `Place.push`."""
        found = {path for pattern in patterns or ("**/*",) for path in self.folder.glob(pattern)}
        names = sorted(str(path.relative_to(self.folder)) for path in found if path.is_file())
        changed = [name for name in names if not _in_progress(name) and self._is_new(name)]
        first = [name for name in changed if name not in last]
        for group in (first, [name for name in last if name in changed]):
            for begin in range(0, len(group), _PARTS):
                self._send(group[begin : begin + _PARTS])

    def remove(self, *prefixes: str) -> None:
        """As `Place.remove`."""
        for prefix in prefixes:
            names = self.sizes(prefix)
            if names:
                self._patiently(partial(self._delete, list(names)), "deleted")
            for name in names:
                _known.pop(self.folder / name, None)

    def settle(self) -> None:
        """As `Place.settle`."""
        self.push()
        self.remove(*(name for name in self.sizes() if not (self.folder / name).is_file()))

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file unless there is one already; whether it was written."""

        def write() -> bool:
            try:
                self._system().pipe_file(join_url(self.url, name), content, mode="create")
            except FileExistsError:
                return False
            return True

        return bool(self._patiently(write, "written"))

    def read(self, name: str) -> bytes | None:
        """As `Place.read`, of what lies at the URL."""

        def look() -> bytes | None:
            try:
                return bytes(self._system().cat_file(join_url(self.url, name)))
            except FileNotFoundError:
                return None

        return self._patiently(look, "read")

    def ray_storage(self) -> dict[str, Any]:
        """As `Place.ray_storage`: Ray writes through the same file system as everybody else."""
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        system = self._system()
        return {
            "storage_path": system._strip_protocol(self.url),
            "storage_filesystem": PyFileSystem(FSSpecHandler(system)),
        }

    def write(self, name: str, content: bytes) -> None:
        """As `Place.write`, at the URL."""
        self._patiently(lambda: self._system().pipe_file(join_url(self.url, name), content), "written")

    def clear(self) -> None:
        """As `Place.clear`."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # Transfers ---------------------------------------------------------------------------------------------

    def _system(self) -> Any:
        return Storage(self.storage).filesystem(self.url)

    def _state(self, name: str) -> tuple[int, int]:
        status = (self.folder / name).stat()
        return status.st_size, status.st_mtime_ns

    def _is_new(self, name: str) -> bool:
        return self._state(name) != _known.get(self.folder / name)

    def _has(self, name: str, size: int) -> bool:
        try:
            return self._state(name)[0] == size
        except OSError:
            return False

    def _delete(self, names: list[str]) -> None:
        self._system().rm([join_url(self.url, name) for name in names])

    def _bring(self, names: list[str]) -> None:
        targets = [self.folder / name for name in names]
        parts = [path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part") for path in targets]

        def move() -> None:
            for path in targets:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._system().get([join_url(self.url, name) for name in names], [str(path) for path in parts])

        try:
            self._patiently(move, "read", f"{names[0]}" if len(names) == 1 else "")
            for name, part, path in zip(names, parts, targets, strict=True):
                part.replace(path)
                _known[path] = self._state(name)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)

    def _send(self, names: list[str]) -> None:
        states = {name: self._state(name) for name in names}
        local = [str(self.folder / name) for name in names]
        remote = [join_url(self.url, name) for name in names]
        self._patiently(lambda: self._system().put(local, remote), "written")
        _known.update({self.folder / name: state for name, state in states.items()})

    def _patiently(self, work: Callable[[], Answer], what: str, name: str = "") -> Answer:
        """Do it again while the store or the network fail; then say where."""
        url = join_url(self.url, name) if name else self.url
        service = (self.storage.endpoint if self.storage else None, self.url.split("/")[2])
        attempts = ATTEMPTS if service in _answered else min(FIRST_ATTEMPTS, ATTEMPTS)
        for attempt in range(1, attempts + 1):
            try:
                answer = work()
                _answered.add(service)
                return answer
            except GalrayError:
                raise
            except FileNotFoundError as error:
                raise GalrayError(f"{url}: {error}: no such file or object", "correct the URL") from None
            except Exception as error:
                denied = access_denied(error)
                hopeless = isinstance(error, OSError) and error.errno in _HOPELESS
                if attempt == attempts or denied or hopeless:
                    text = (str(error).splitlines() or [type(error).__name__])[0]
                    remedy = (
                        "set the credentials in the environment, or give the machine a role"
                        if denied
                        else f"free space in {self.folder}, or name another folder with {SCRATCH}"
                        if hopeless
                        else "check the URL, the storage settings and the network, and run again: it goes on"
                    )
                    raise GalrayError(f"{url}: cannot be {what}: {text}", remedy) from error
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError


class RemoteFile(os.PathLike[str]):
    """A file at a URL that is brought to this node when somebody opens it.

    Arguments:
        mirror: The folder that it is in.
        name: Its name there.
    """

    def __init__(self, mirror: Mirror, name: str) -> None:
        self.mirror = mirror
        self.relative = name

    def __fspath__(self) -> str:
        """The path of the copy on this node, which is made now if it is not there."""
        self.mirror.fetch(self.relative)
        return str(self.mirror.folder / self.relative)

    def __str__(self) -> str:
        return join_url(self.mirror.url, self.relative)

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.relative.rpartition("/")[2]


def _in_progress(name: str) -> bool:
    file = name.rpartition("/")[2]
    return file.startswith(".") or file.endswith((".tmp", ".part"))
