"""A run directory: claimed by one configuration, used by one process at a time, resumable stage by stage."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galray.catalog.lease import LEASE, lease
from galray.catalog.mirror import Mirror, open_place
from galray.catalog.storage import StorageSettings
from galray.config import RunConfig, load_config, to_toml
from galray.errors import GalrayError
from galray.provenance import content_hash, now, write_atomic

if TYPE_CHECKING:
    from galray.catalog import ShardStore
    from galray.ensemble import FieldEnsemble
    from galray.galaxies import DwarfConfig

__all__ = ["Run", "RunDirectory", "load_run", "read_json", "whole_folder"]

KEPT = (
    "config.toml", "config_hash", "provenance.json", "truth.json", "report.html", "unblinded.json",
    "stages/", "members/", "fields/", "results/", "figures/", "tracking/",
)  # fmt: skip
"""What of a run is copied between its URL and the node that drives it: all but stars and scratch."""

RECORD = {"inputs", "seconds", "finished", "outcome"}
"""What the record of a finished stage holds."""


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        GalrayError: It is absent or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GalrayError(f"{path}: absent", "run `galray run` until this stage is done") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GalrayError(
            f"{path}: not JSON: {error}", "delete it and run again: the stage is repeated"
        ) from None


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder that is filled under a temporary name and takes its own, over an old one, when it is whole.

    Arguments:
        final: The folder's name in the end.
    """
    temporary = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


class RunDirectory:
    """Where one run lives.

    Arguments:
        config: The run's configuration.
        overwrite: Discard what another configuration left there.
    """

    def __init__(self, config: RunConfig | DwarfConfig, *, overwrite: bool = False) -> None:
        self.config = config
        self.place = config.place
        self.path = self.place.folder
        self.overwrite = overwrite

    def check(self) -> bool:
        """Look whether this configuration may use the directory; nothing is written.

        Returns:
            Whether it holds another configuration's run, which `claim` will discard.

        Raises:
            GalrayError: It belongs to another configuration (and is not to be overwritten), or is no run
                directory.
        """
        try:
            is_file = self.path.exists() and not self.path.is_dir()
        except OSError as error:  # the name is too long
            raise GalrayError(f"{self.place.location}: {error.strerror}", "choose another name") from None
        if is_file:
            raise GalrayError(f"{self.path}: is a file", "choose another name or output")
        stamp = self.place.read("config_hash")
        if stamp is not None:
            found = stamp.decode(errors="replace").strip()
            if found != self.config.hash and self._other_design(found):
                return False
            if found != self.config.hash and not self.overwrite:
                raise GalrayError(
                    f"{self.place.location}: belongs to another configuration "
                    f"({found}, not {self.config.hash})",
                    "choose another name with --set name=…, or discard it with --overwrite",
                )
            return found != self.config.hash
        if self._foreign():
            raise GalrayError(
                f"{self.place.location}: is neither empty nor a run directory",
                "choose another name or output",
            )
        return False

    def _foreign(self) -> bool:
        """Whether there is anything in it at all."""
        if isinstance(self.place, Mirror):
            return any(name != LEASE for name in self.place.sizes())
        return self.path.is_dir() and any(p.name != ".lock" for p in self.path.iterdir())

    def _other_design(self, stamp: str) -> bool:
        """Whether what lies here, by its stamp, differs in the design of its ensemble alone.

        Members are addressed by their content: those that the new design shares are found again, and only the
        others are run. So members are added to a finished ensemble.
        """
        if not isinstance(self.config, RunConfig):
            return False
        try:
            text = (self.place.read("config.toml") or b"").decode()
            found = RunConfig.model_validate(tomllib.loads(text))
        except (ValueError, tomllib.TOMLDecodeError):
            return False
        same = found.model_copy(update={"ensemble": self.config.ensemble})
        return found.hash == stamp and same.hash == self.config.hash

    def claim(self) -> None:
        """Create the directory, or go on in it if this configuration made it.

        What lies at a URL is brought here, but for the stars, which are read where they are needed.

        Raises:
            GalrayError: It belongs to another configuration, is not a run directory, or cannot be written.
        """
        if self.check():
            self._discard()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.place.pull(*(f"{name}*" for name in KEPT))
            write_atomic(self.path / "config.toml", to_toml(self.config))
            write_atomic(self.path / "config_hash", self.config.hash + "\n")
            self.save()
        except OSError as error:
            raise GalrayError(
                f"{self.path}: cannot be written: {error.strerror}",
                "choose an output folder that you may write",
            ) from None

    def save(self, *more: str) -> None:
        """Send what is new here to the run's URL, where it has one; members are sent as they end.

        Arguments:
            more: Folders that are sent too, with a slash behind their names.
        """
        own = [name for name in (*KEPT, *more) if name != "members/"]
        self.place.push(*(f"{name}**/*" if name.endswith("/") else name for name in own))

    def _discard(self) -> None:
        """Delete what the other run left: only what a run writes, never a folder that looks foreign."""
        self.place.remove(*{name.split("/")[0] for name in self.place.sizes()} - {LEASE})
        for child in self.path.iterdir() if self.path.is_dir() else ():  # a copy of a URL is not there yet
            if child.name != ".lock":
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out while this one works; the lock goes with the process, however it ends.

        A directory that was new, and in which a mistake of the user's ended the work before any stage or
        member was done, is removed again: it would only stand in the way of the mended configuration.

        Raises:
            GalrayError: Another process works here.
        """
        if isinstance(self.place, Mirror):
            with lease(self.place):
                self.place.clear()
                new = not self._foreign()
                try:
                    yield
                except GalrayError:
                    with suppress(GalrayError):  # the store's own refusal, it may be
                        if new and self._nothing_done():
                            self.place.remove(*{name.split("/")[0] for name in self.place.sizes()} - {LEASE})
                    raise
            return
        new = not self._foreign()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = (self.path / ".lock").open("a+")
        except OSError as error:
            raise GalrayError(
                f"{self.path}: cannot be written: {error.strerror}",
                "choose an output folder that you may write",
            ) from None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                holder = stream.read().strip() or "unknown"
                raise GalrayError(
                    f"{self.path}: another run works here (process {holder})",
                    "wait for it, or choose another name",
                ) from None
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            try:
                yield
            except GalrayError:
                if new and self._nothing_done():
                    shutil.rmtree(self.path, ignore_errors=True)
                raise

    def _nothing_done(self) -> bool:
        """Whether neither a stage nor a member has come to its end."""
        return not self.stage_seconds() and not any(
            name.endswith("/result.json") for name in self.place.sizes("members/")
        )

    def is_done(self, name: str, inputs: Any) -> bool:
        """Whether the stage's record says that the same inputs were worked on to the end."""
        record = self._read(name)
        return record is not None and record["inputs"] == content_hash(inputs)

    def forget(self, name: str) -> None:
        """Have a stage done again, because what it made is gone."""
        self._record(name).unlink(missing_ok=True)

    def outcome(self, name: str) -> Any:
        """What a finished stage returned; None where it was not done."""
        record = self._read(name)
        return record["outcome"] if record is not None else None

    def stage(self, name: str, inputs: Any, work: Callable[[], Any]) -> bool:
        """Do a stage unless it `is_done`.

        Arguments:
            name: Name of the stage.
            inputs: Whatever its result depends on, as JSON; its hash decides. None: always do it.
            work: Does it; may return JSON that is kept in the record.

        Returns:
            Whether it was done now (False: skipped).
        """
        if inputs is not None and self.is_done(name, inputs):
            return False
        record = self._record(name)
        before = (self._read(name) or {"seconds": 0.0})["seconds"]
        record.unlink(missing_ok=True)
        begin = time.perf_counter()
        outcome = work()
        record.parent.mkdir(exist_ok=True)
        seconds = round(time.perf_counter() - begin, 2)
        if inputs is None:
            seconds = max(seconds, before)  # a repeat that finds everything done must not hide what it took
        content = {"inputs": content_hash(inputs), "seconds": seconds, "finished": now(), "outcome": outcome}
        write_atomic(record, content)
        self.save()
        return True

    def _record(self, name: str) -> Path:
        return self.path / "stages" / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any] | None:
        """A stage's record; None where there is none or it is broken: the stage is then done again."""
        try:
            record = read_json(self._record(name))
        except GalrayError:
            return None
        whole = isinstance(record, dict) and RECORD <= set(record)
        return record if whole and isinstance(record["seconds"], (int, float)) else None

    def stage_seconds(self) -> dict[str, float]:
        """Wall time of every finished stage, in the order in which they finished."""
        found = [(self._read(path.stem), path) for path in (self.path / "stages").glob("*.json")]
        records = [(record, path) for record, path in found if record is not None]
        # The record's time is in whole seconds; the file's own tells short stages apart.
        records.sort(key=lambda pair: (pair[0]["finished"], pair[1].stat().st_mtime_ns))
        return {path.stem: record["seconds"] for record, path in records}


class Run:
    """A run directory, to look at.

    Arguments:
        folder: The run directory, or its URL, of which all but the stars is brought here.
        storage: How an object store is reached.

    Raises:
        GalrayError: It is not one.
    """

    def __init__(self, folder: str | Path, storage: StorageSettings | None = None) -> None:
        place = open_place(folder, storage)
        place.pull(*(f"{name}*" for name in KEPT))
        self.folder = place.folder.resolve()
        self.location = place.location
        """Its directory or URL."""
        self._shards = place.below("shards")
        if not (self.folder / "config.toml").is_file():
            raise GalrayError(
                f"{folder}: not a run directory (no config.toml)", "name a folder that `galray run` made"
            )
        self.config = load_config(self.folder / "config.toml")

    @property
    def summary(self) -> dict[str, Any]:
        """The numbers of the run, as ``results/summary.json`` holds them."""
        return read_json(self.folder / "results" / "summary.json")

    @property
    def headline(self) -> dict[str, Any]:
        """The one number: ρ_DM, its error, unit and place."""
        return self.summary["headline"]

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, hashes, seed, machine."""
        return read_json(self.folder / "provenance.json")

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Wall time of every finished stage."""
        return RunDirectory(self.here).stage_seconds()

    @property
    def here(self) -> RunConfig:
        """The configuration with the place where the run lies now, which need not be where it was made."""
        return self.config.model_copy(update={"name": self.folder.name, "output": str(self.folder.parent)})

    @property
    def catalog(self) -> ShardStore:
        """The run's shard store."""
        from galray.catalog import ShardStore

        return ShardStore.at(self._shards)

    @property
    def field(self) -> FieldEnsemble:
        """The measured gravity of all inversions and members together.

        ``run.field.acceleration([[-8.12, 0, 1]])`` gives (km/s)²/kpc.
        """
        from galray.ensemble import FieldEnsemble

        return FieldEnsemble.from_run(self.folder)


def load_run(folder: str | Path, storage: StorageSettings | None = None) -> Run:
    """Open a finished or unfinished run directory, also one at a URL."""
    return Run(folder, storage)
