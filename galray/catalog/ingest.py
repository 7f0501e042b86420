"""The pass over a catalogue: files → pieces → shards → manifest; resumable, and refused twice at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from galray.catalog.inputs import InputUnit, input_units
from galray.catalog.quality import parse_cuts
from galray.catalog.readers import open_source
from galray.catalog.rvs_selection import SELECTION_FILES, RVTally
from galray.catalog.selection import kind_of
from galray.catalog.settings import CatalogSettings
from galray.catalog.shards import MANIFEST, ShardStore, column_statistics, store_hash
from galray.catalog.workers import run_jobs
from galray.errors import GalrayError
from galray.provenance import content_hash, file_hash, library_versions, now, write_atomic

__all__ = ["ingest", "plan"]

STORE_FORMAT = 1
Progress = Callable[[int, int, str], None]
"""Called with done and total work (as bytes of input) and a line of text."""


def plan(settings: CatalogSettings) -> dict[str, Any]:
    """What an ingest would do, from the files' sizes and the first one's columns; nothing is written.

    Returns:
        ``files`` (names of the units of work), ``num_files``, ``bytes``, ``num_shards``; ``kind`` and
        ``format`` of the first.

    Raises:
        GalrayError: As `input_units`; or the first file is not of a known form.
    """
    units = input_units(settings)
    source = open_source(units[0], settings.release, settings.rename)
    return {
        "files": [unit.name for unit in units],
        "num_files": len(units),
        "bytes": sum(unit.size for unit in units),
        "num_shards": settings.num_shards,
        "format": source.format,
        "kind": kind_of(settings, source),
    }


def ingest(
    settings: CatalogSettings,
    target: Path | str,
    *,
    num_workers: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> ShardStore:
    """Turn star files into a shard store.

    Every file becomes a piece, the pieces are merged shard by shard, and the manifest is written last: until
    then the folder is no store. A finished store of the same files and settings is returned as it is; an
    interrupted ingest goes on with the files and shards that are missing. The stars, their shards and the
    checksums do not depend on `num_workers`.

    Arguments:
        settings: What to read, cut and keep.
        target: Folder of the store; with Ray on several machines, storage that they share.
        num_workers: Ray actors of one CPU each, 0 to work in this process.
        seed: Salt of the hash that deals stars into shards.
        progress: Called as the work goes on.

    Returns:
        The finished store.

    Raises:
        GalrayError: A file is unreadable or lacks a column (beyond ``allow_bad`` of them), no star is left,
            the target cannot be written or holds something else, or another ingest works on it.
    """
    units = input_units(settings)
    target = Path(target)
    _prepare(target)
    with _locked(target):
        key = content_hash(
            {
                "format": STORE_FORMAT,
                "seed": seed,
                "settings": settings.model_dump(exclude={"files", "allow_bad"}),
            }
        )
        finished = _finished(target, key, units, settings.allow_bad)
        if finished is not None:
            return finished
        work = target / f".ingest-{content_hash([key, [unit.state() for unit in units]])}"
        for stale in target.glob(".ingest-*"):
            if stale != work:
                shutil.rmtree(stale, ignore_errors=True)
        started = time.monotonic()
        try:
            work.mkdir(exist_ok=True)
            run = _Run(settings, target, work, units, num_workers, seed, progress or (lambda *_: None))
            records, quarantined = run.read()
            manifest = run.merge(records)
            manifest |= {
                "settings_hash": key,
                "seed": seed,
                "inputs": [record["file"] for record in records],
                "input_hash": content_hash([record["file"]["sha256"] for record in records]),
                "quarantined": quarantined,
                "seconds": round(time.monotonic() - started, 3),
            }
            run.publish(manifest)
        except OSError as error:
            raise _unwritable(target, error) from None
        return ShardStore(target)


def _unwritable(target: Path, error: OSError) -> GalrayError:
    return GalrayError(
        f"{target}: cannot write shards: {error.strerror or error}", "free space, or choose a writable folder"
    )


def _prepare(target: Path) -> None:
    """Make the folder; refuse one that holds something else."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        names = [entry.name for entry in target.iterdir()]
    except OSError as error:
        raise _unwritable(target, error) from None
    own = {MANIFEST, ".lock", "no_rv", "selection"}
    foreign = [n for n in names if n not in own and not n.startswith((".ingest-", "shard-", f".{MANIFEST}"))]
    if foreign:
        raise GalrayError(
            f"{target}: holds files that are not a shard store's, such as '{foreign[0]}'",
            "choose an empty or new folder",
        )


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the store's lock; the system lets go of it when the process ends, however it ends."""
    path = target / ".lock"
    try:
        stream = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(target, error) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip() or "another process"
            raise GalrayError(
                f"{target}: another ingest is writing this store ({owner})",
                "wait for it, or use another folder",
            ) from None
        except OSError:
            # A file system without locks: there the user sees to it that only one ingest runs.
            pass
        stream.truncate(0)
        stream.write(f"pid {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _finished(target: Path, key: str, units: list[InputUnit], allow_bad: int) -> ShardStore | None:
    """The store that is there, if it is of these settings and files and whole."""
    try:
        store = ShardStore(target)
    except GalrayError:
        return None
    manifest = store.manifest
    if manifest.get("settings_hash") != key or len(manifest["quarantined"]) > allow_bad:
        return None
    entries = (*manifest["inputs"], *manifest["quarantined"])
    known = {InputUnit.from_state(entry).name: entry for entry in entries}
    if sorted(known) != sorted(unit.name for unit in units):
        return None
    for unit in units:
        entry = known[unit.name]
        # A file written again with the same content, as by copying, is the same file.
        if InputUnit.from_state(entry) != unit and (
            entry["size"] != unit.size or entry.get("sha256") != unit.checksum()
        ):
            return None
    stores = [store, *([store.no_rv] if store.no_rv else [])]
    whole = all(
        path.is_file() and path.stat().st_size == entry["bytes"]
        for each in stores
        for path, entry in zip(each.shards, each.manifest["shards"], strict=True)
    )
    selection = all((target / "selection" / name).is_file() for name in manifest.get("selection") or ())
    return store if whole and selection else None


class _Run:
    """One ingest, stage by stage."""

    def __init__(
        self,
        settings: CatalogSettings,
        target: Path,
        work: Path,
        units: list[InputUnit],
        num_workers: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self.settings = settings
        self.target = target
        self.work = work
        self.units = units
        self.num_workers = num_workers
        self.progress = progress
        self.arguments = (settings.model_dump_json(), str(work), seed)
        self.read_size = sum(unit.size for unit in units)
        self.work_size = self.read_size * 10 // 9  # merging takes about a tenth of the time

    def read(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Read all files; returns the pieces' records in the files' order, and the files left out."""
        jobs = [("read", (index, unit)) for index, unit in enumerate(self.units)]
        records: dict[int, dict[str, Any]] = {}
        quarantined: dict[int, dict[str, Any]] = {}
        done = rows = kept = 0
        for number, answer in run_jobs(jobs, self.arguments, self.num_workers):
            if "error" in answer:
                bad = answer["bad_file"]
                if not bad or len(quarantined) >= self.settings.allow_bad:
                    also = f" (and {len(quarantined)} bad file(s) before it)" if bad and quarantined else ""
                    raise GalrayError(answer["error"] + also, answer["remedy"])
                quarantined[number] = {**self.units[number].state(), "reason": answer["error"]}
            else:
                records[number] = answer["record"]
                rows += records[number]["account"].get("rows_in", 0)
                kept += records[number]["account"].get("kept", 0)
            done += self.units[number].size
            message = f"{len(records)}/{len(jobs)} files, {rows:,} rows read, {kept:,} stars kept"
            self.progress(done, self.work_size, message)
        return [records[n] for n in sorted(records)], [quarantined[n] for n in sorted(quarantined)]

    def merge(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Merge the pieces into shards; returns the manifest of the 6D store, that of no_rv inside."""
        account: Counter[str] = Counter({"rows_in": 0, "kept": 0})
        for record in records:
            account.update(record["account"])
        kinds = {record["kind"] for record in records}
        if len(kinds) > 1:
            raise GalrayError(
                "catalog.files mixes Gaia tables and 6D tables", "ingest them into two stores, one kind each"
            )
        if account["kept"] == 0:
            raise GalrayError(
                f"no star is left of {account['rows_in']:,} rows: {_describe(account)}",
                "loosen the cuts or the ball in [catalog], or give other files",
            )
        shutil.rmtree(self.work / "out", ignore_errors=True)
        common = self._common(kinds.pop())
        manifest = self._merge_view("6d", account, common)
        if account["kept_no_rv"] > 0:
            manifest["no_rv"] = self._merge_view("no_rv", account, common)
        manifest["account"] = dict(account)
        notes: Counter[str] = Counter()
        for record in records:
            notes.update(record["notes"])
        manifest["notes"] = dict(notes)
        manifest["selection"] = self._selection_function()
        return manifest

    def _selection_function(self) -> dict[str, str] | None:
        """Add up the files' tallies of radial velocities; returns the checksums of what is published."""
        pieces = sorted(self.work.glob("piece-*.rv.parquet"))
        if not pieces:
            return None
        folder = self.work / "out" / "selection"
        about = {"cuts": {cut.name: cut.sql for cut in parse_cuts(self.settings.cuts) if cut.on_quality}}
        RVTally.merge(self.settings.rv_selection, pieces).save(folder, about)
        return {name: file_hash(folder / name) for name in SELECTION_FILES}

    def _common(self, kind: str) -> dict[str, Any]:
        from galray import __version__

        settings = self.settings
        ball = settings.ball
        return {
            "format": STORE_FORMAT,
            "galray": __version__,
            "created": now(),
            "source": kind,
            "settings": settings.model_dump(mode="json"),
            "frame": settings.frame.build().as_dict(),
            "parallax_zero_point": settings.parallax_zero_point,
            "ball": ball and {"center_kpc": list(settings.ball_center()), "radius_kpc": ball.radius_kpc},
            "cuts": {cut.name: cut.sql for cut in parse_cuts(settings.cuts)},
            "versions": library_versions(),
        }

    def _merge_view(self, view: str, account: Counter[str], common: dict[str, Any]) -> dict[str, Any]:
        schema = self._schema(view)
        schema_file = f"schema-{view}.parquet"
        schema.to_frame().write_parquet(self.work / schema_file)
        count = self.settings.num_shards
        jobs = [("merge", (shard, view, schema_file)) for shard in range(count)]
        entries: dict[int, dict[str, Any]] = {}
        for number, answer in run_jobs(jobs, self.arguments, self.num_workers):
            if "error" in answer:
                raise GalrayError(answer["error"], answer["remedy"])
            entries[number] = answer["entry"]
            done = self.read_size + (self.work_size - self.read_size) * len(entries) // count
            self.progress(done, self.work_size, f"{len(entries)}/{count} shards merged")
        ordered = [entries[number] for number in range(count)]
        statistics = column_statistics(ordered, schema)
        duplicates = sum(entry["duplicates"] for entry in ordered)
        if duplicates:
            account["kept" if view == "6d" else "kept_no_rv"] -= duplicates
            account["cut:duplicate_source_id"] += duplicates
        shards = [{k: v for k, v in entry.items() if k not in ("sums", "duplicates")} for entry in ordered]
        return {
            **common,
            "kind": view,
            "num_rows": sum(entry["rows"] for entry in shards),
            "shards": shards,
            "columns": statistics,
            "hash": store_hash(shards, common["frame"]),
        }

    def _schema(self, view: str) -> pl.Schema:
        """Columns and types that hold every piece's."""
        frames: list[pl.DataFrame] = []
        for path in sorted(self.work.glob(f"piece-*.{view}.parquet")):
            if json.loads((path.with_name(path.name.split(".")[0] + ".json")).read_text())[view]:
                frames.append(pl.Schema(pl.read_parquet_schema(path)).to_frame())
        try:
            return pl.concat(frames, how="vertical_relaxed").schema
        except pl.exceptions.PolarsError as error:
            raise GalrayError(
                f"a kept column has different types in different files: {str(error).splitlines()[0]}",
                "drop it from catalog.keep_columns, or make the files agree",
            ) from None

    def publish(self, manifest: dict[str, Any]) -> None:
        """Put the shards in place and write the manifest, which makes them a store."""
        no_rv = manifest.pop("no_rv", None)
        (self.target / MANIFEST).unlink(missing_ok=True)
        for old in self.target.glob("shard-*.parquet"):
            old.unlink()
        for folder in ("no_rv", "selection"):
            shutil.rmtree(self.target / folder, ignore_errors=True)
        if manifest["selection"] is not None:
            (self.work / "out" / "selection").replace(self.target / "selection")
        for shard in sorted((self.work / "out" / "6d").iterdir()):
            shard.replace(self.target / shard.name)
        if no_rv is not None:
            (self.work / "out" / "no_rv").replace(self.target / "no_rv")
            copied = ("account", "settings_hash", "seed", "inputs", "input_hash", "quarantined", "seconds")
            kept = no_rv["num_rows"]
            # In its own account the 6D stars are a fate like any other, so that it too adds up.
            account = {**manifest["account"], "kept_6d": manifest["account"]["kept"], "kept": kept}
            account.pop("kept_no_rv")
            write_atomic(
                self.target / "no_rv" / MANIFEST,
                {**no_rv, **{name: manifest[name] for name in copied}, "account": account},
            )
        write_atomic(self.target / MANIFEST, {**manifest, "no_rv": no_rv is not None})
        shutil.rmtree(self.work, ignore_errors=True)


def _describe(account: Counter[str]) -> str:
    """The largest losses in words."""
    fates = [
        (n, fate) for fate, n in account.items() if fate.startswith(("cut:", "rejected:", "kept_")) and n
    ]
    return ", ".join(f"{fate} {n:,}" for n, fate in sorted(fates, reverse=True)[:4]) or "the files are empty"
