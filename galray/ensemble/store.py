"""The members on disk: one folder each, addressed by content, complete or not there.

A member works in `NNN.tmp` and is renamed to `NNN` when its `result.json` is written, so a folder
without the suffix is always whole. A new design finds members again by their content hash: those that
moved to another number are renamed, those it does not hold wait in `.stale/`, out of every reader's
sight, until a design asks for them again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from galray.catalog.mirror import Mirror, Place
from galray.ensemble.members import MemberSpec
from galray.errors import GalrayError
from galray.provenance import write_atomic

__all__ = ["MemberOutcome", "MemberStore", "read_progress", "report_progress"]

_FOLDER = re.compile(r"^(\d{3,})(\.tmp)?$")
_REPORT_SECONDS = 1.0
_SEND_SECONDS = 20.0
_last_report: dict[str, float] = {}
_LOOK_SECONDS = 5.0
_keepers: dict[str, Callable[[float], None]] = {}


class NodeLeavesError(Exception):
    """The member's node is to be taken away; what it has is safe, and it goes on elsewhere."""


@dataclass(frozen=True)
class MemberOutcome:
    """What became of one member.

    Arguments:
        spec: The member.
        status: "finished" or "failed".
        folder: The member's folder.
        seconds: Wall time of its run.
        result: What its function returned.
        error: Last line of what went wrong, empty when it finished; the traceback is in `error.txt`.
        reused: Whether an earlier run had finished it.
        host: Name of the node it ran on.
    """

    spec: MemberSpec
    status: str
    folder: Path
    seconds: float
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    reused: bool = False
    host: str = ""

    @property
    def finished(self) -> bool:
        """Whether the member has a result."""
        return self.status == "finished"

    def to_dict(self) -> dict[str, Any]:
        """Give the outcome as JSON-ready values."""
        values = asdict(self)
        return plain(values | {"spec": self.spec.to_dict(), "folder": self.folder.name})


class MemberStore:
    """The folder `members/` of a run.

    At a URL each node works in its own copy: a member is sent there when it is finished, and before that what
    it needs to go on elsewhere; who reads its outcome brings it.

    Arguments:
        place: The folder, made when absent, or its place.

    Raises:
        GalrayError: The folder cannot be written.
    """

    def __init__(self, place: Path | str | Place) -> None:
        self.place = place if isinstance(place, Place) else Place(Path(place).absolute())
        self.folder = self.place.folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GalrayError(
                f"cannot make the members' folder {self.folder}: {error.strerror}",
                "choose a run directory you may write to",
            ) from error

    def path(self, spec: MemberSpec) -> Path:
        """Give the folder that a complete member has."""
        return self.folder / f"{spec.index:03d}"

    def work_path(self, spec: MemberSpec) -> Path:
        """Give the folder in which a member works until it is complete."""
        return self.folder / f"{spec.index:03d}.tmp"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from running the same members; the lock dies with its process.

        Raises:
            GalrayError: Another process holds it.
        """
        with open(self.folder / ".lock", "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise GalrayError(
                    f"another galray process is running the members in {self.folder}",
                    "wait for it or end it; or choose another run directory",
                ) from error
            yield

    def arrange(self, specs: Sequence[MemberSpec]) -> list[MemberOutcome]:
        """Bring the folders in line with a design and tell which members are finished.

        Unfinished and failed members of the design keep their work folder, so that a training goes on
        from its last checkpoint; unfinished ones outside it are removed.

        Arguments:
            specs: The design.

        Returns:
            Outcomes of the finished members.
        """
        by_id = {spec.id: spec for spec in specs}
        if len(by_id) != len(specs):
            raise ValueError("two members of the design have the same content hash")
        if len({spec.index for spec in specs}) != len(specs):
            raise ValueError("two members of the design have the same index")
        self.place.pull()
        stale = self.folder / ".stale"
        # Everything in the wrong place goes to .stale first: two members may have to change places.
        for entry in sorted(self.folder.iterdir()):
            match = _FOLDER.match(entry.name)
            if not match or not entry.is_dir():
                continue
            identity = _read_json(entry / "spec.json").get("id", "")
            spec = by_id.get(identity)
            if spec is not None and spec.index == int(match[1]):
                continue
            if match[2] and spec is None:
                shutil.rmtree(entry)
                continue
            stale.mkdir(exist_ok=True)
            _move(entry, stale / f"{identity or 'unknown-' + match[1]}{match[2] or ''}")
        outcomes = []
        for spec in specs:
            path, work = self.path(spec), self.work_path(spec)
            for source, target in ((stale / spec.id, path), (stale / f"{spec.id}.tmp", work)):
                if source.is_dir() and not target.exists():
                    os.replace(source, target)
            if path.is_dir():
                outcome = self.read(spec, reused=True)
                if outcome is not None and outcome.finished:
                    outcomes.append(outcome)
                    shutil.rmtree(work, ignore_errors=True)
                elif work.exists():
                    shutil.rmtree(path)
                else:
                    for name in ("result.json", "error.txt"):
                        (path / name).unlink(missing_ok=True)
                    os.replace(path, work)
        self.place.settle()
        return outcomes

    def begin(self, spec: MemberSpec) -> Path:
        """Make the work folder of a member (or find the one of an interrupted run) and say who it is."""
        work = self.work_path(spec)
        self.take_over(spec)
        if not self.folder.is_dir():
            raise GalrayError(
                f"the members' folder {self.folder} does not exist on node {os.uname().nodename}",
                "put the run directory on storage that all nodes share",
            )
        if work.exists() and _read_json(work / "spec.json").get("id") != spec.id:
            shutil.rmtree(work)
        work.mkdir(exist_ok=True)
        write_json(work / "spec.json", spec.to_dict())
        return work

    def take_over(self, spec: MemberSpec) -> None:
        """Bring what an interrupted member left on another node, in place of what is here of it."""
        if isinstance(self.place, Mirror):
            for path in (self.path(spec), self.work_path(spec)):
                shutil.rmtree(path, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.place.pull(prefix=self.work_path(spec).name)

    def send(self, spec: MemberSpec) -> None:
        """Send what an unfinished member has written, so that it can go on elsewhere."""
        self.place.push(f"{self.work_path(spec).name}/**/*")

    def look(self, spec: MemberSpec) -> tuple[float, str] | None:
        """What a running member reported last of its progress; None before the first report."""
        work = self.work_path(spec)
        if isinstance(self.place, Mirror):
            for name in ("curve.json", "progress.json"):
                if (content := self.place.read(f"{work.name}/{name}")) is not None:
                    work.mkdir(exist_ok=True)
                    write_atomic(work / name, content)
        return read_progress(work)

    def finish(
        self, spec: MemberSpec, *, seconds: float, result: Any = None, traceback: str = ""
    ) -> MemberOutcome:
        """Write the outcome of a member, last of all its files, and give its folder the final name.

        Arguments:
            spec: The member.
            seconds: Wall time.
            result: Dictionary of JSON-ready values that its function returned.
            traceback: The traceback of a failed member; empty for a finished one.
        """
        work, path = self.work_path(spec), self.path(spec)
        work.mkdir(exist_ok=True)
        (work / "progress.json").unlink(missing_ok=True)
        if traceback:
            (work / "error.txt").write_text(traceback)
        lines = [line for line in traceback.strip().splitlines() if line.strip()]
        record = {
            "id": spec.id,
            "status": "failed" if traceback else "finished",
            "seconds": seconds,
            "host": os.uname().nodename,
            "error": _last_error(lines),
            "result": result or {},
        }
        if not (work / "spec.json").exists():
            write_json(work / "spec.json", spec.to_dict())
        write_json(work / "result.json", record)
        if path.exists():
            shutil.rmtree(path)
        os.replace(work, path)
        self.place.remove(path.name)
        self.place.push(f"{path.name}/**/*", last=[f"{path.name}/result.json"])
        self.place.remove(work.name)
        outcome = self.read(spec)
        assert outcome is not None
        return outcome

    def read(self, spec: MemberSpec, *, reused: bool = False) -> MemberOutcome | None:
        """Read the outcome of a member; None when there is none for this very content."""
        self.place.pull(prefix=self.path(spec).name)
        record = _read_json(self.path(spec) / "result.json")
        if record.get("id") != spec.id:
            return None
        return MemberOutcome(
            spec=spec,
            status=record["status"],
            folder=self.path(spec),
            seconds=record["seconds"],
            result=record["result"],
            error=record["error"],
            reused=reused,
            host=record["host"],
        )


def report_progress(folder: Path | str, fraction: float, note: str = "") -> None:
    """Tell the driver, from inside a member, how far it is; at most one small write a second.

    Arguments:
        folder: The work folder the member's function was given.
        fraction: Part done, 0 to 1.
        note: A few words, such as the epoch and the loss.
    """
    now = time.monotonic()
    if now - _last_report.get(str(folder), -math.inf) < _REPORT_SECONDS:
        return
    _last_report[str(folder)] = now
    with contextlib.suppress(OSError):  # no member shall die of its progress bar
        write_json(Path(folder) / "progress.json", {"fraction": float(fraction), "note": note})
    if (keeper := _keepers.get(str(folder))) is not None:
        keeper(now)


@contextlib.contextmanager
def kept(store: MemberStore, spec: MemberSpec, leaves: Callable[[], bool]) -> Iterator[None]:
    """Keep a member's files safe while it works, whenever it reports its progress, between two epochs.

    They are sent now and then; and when its node is to be taken away, they are sent and the member ends
    there, to go on elsewhere.

    Arguments:
        store: Where it works.
        spec: The member.
        leaves: Whether the node of this process is to be taken away.

    Raises:
        NodeLeavesError: From within the member's function.
    """
    sent = looked = time.monotonic()

    def keep(now: float) -> None:
        nonlocal sent, looked
        if now - looked >= _LOOK_SECONDS:
            looked = now
            if leaves():
                store.send(spec)
                raise NodeLeavesError(f"node {os.uname().nodename} is to be taken away")
        if now - sent >= _SEND_SECONDS:
            sent = now
            with contextlib.suppress(GalrayError):  # the next one may arrive
                store.send(spec)

    folder = str(store.work_path(spec))
    _keepers[folder] = keep
    try:
        yield
    finally:
        del _keepers[folder]


def read_progress(folder: Path) -> tuple[float, str] | None:
    """Read what `report_progress` wrote last; None before the first report."""
    record = _read_json(folder / "progress.json")
    return (float(record["fraction"]), str(record["note"])) if record else None


def plain(value: Any) -> Any:
    """Turn numpy and torch numbers, arrays and paths into JSON-ready values; NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(plain(value), indent=1) + "\n")
    os.replace(part, path)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one when the file is absent or broken."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _move(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    os.replace(source, target)


def _last_error(lines: list[str]) -> str:
    """Give the line of a traceback that names the error (notes and remedies may follow it)."""
    for line in reversed(lines):
        if not line.startswith(" ") and ":" in line:
            return line.strip()
    return lines[-1].strip() if lines else ""
