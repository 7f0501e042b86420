"""The two jobs of an ingest, reading one file and merging one shard, and who does them: here or on Ray."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from galray.catalog.inputs import InputUnit
from galray.catalog.readers import open_source
from galray.catalog.selection import SHARD, Selection
from galray.catalog.settings import CatalogSettings
from galray.catalog.shards import merge_shard
from galray.errors import GalrayError
from galray.provenance import write_atomic

__all__ = ["Worker", "run_jobs"]

FLUSH_ROWS = 400_000
"""Selected rows that a worker holds before it writes them out."""

ATTEMPTS = 3
"""How often a job is given to a worker when workers die over it."""


class Worker:
    """Reads files into pieces and merges pieces into shards; holds no state between jobs.

    Arguments:
        settings: The catalogue's configuration in JSON.
        folder: Where pieces and shards go: storage that all workers share.
        seed: Salt of the hash that deals stars into shards.
    """

    def __init__(self, settings: str, folder: str, seed: int) -> None:
        self.settings = CatalogSettings.model_validate_json(settings)
        self.folder = Path(folder)
        self.seed = seed

    def run(self, job: tuple[str, Any]) -> dict[str, Any]:
        """Do one job and answer with plain values: a user's mistake comes back as ``error``, not raised."""
        name, arguments = job
        try:
            return self.read(*arguments) if name == "read" else self.merge(*arguments)
        except GalrayError as error:
            return {"error": error.what, "remedy": error.remedy, "bad_file": name == "read"}
        except OSError as error:  # readers explain their own: this is the writing side
            return {
                "error": f"{self.folder.parent}: cannot write shards: {error.strerror or error}",
                "remedy": "free space there, or choose another writable folder",
                "bad_file": False,
            }

    def read(self, index: int, unit: InputUnit) -> dict[str, Any]:
        """Turn one unit of input into a piece: selected rows in row groups by shard, and its row account.

        A piece that is already there for the same input is left as it is.
        """
        record_path = self.folder / f"piece-{index:05d}.json"
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = json.loads(record_path.read_text(encoding="utf-8"))
            if InputUnit.from_state(record["file"]) == unit:
                return {"record": record, "reused": True}
        source = open_source(unit, self.settings.release, self.settings.rename)
        checksum = unit.checksum()
        selection = Selection(self.settings, source, checksum, self.seed)
        stars = _Piece(self.folder / f"piece-{index:05d}.6d.parquet", self.settings.num_shards)
        others = _Piece(self.folder / f"piece-{index:05d}.no_rv.parquet", self.settings.num_shards)
        row = source.first_row
        try:
            for batch in source.batches(selection.columns):
                kept, without = selection.apply(batch, row)
                row += batch.height
                stars.add(kept)
                if without is not None:
                    others.add(without)
            record = {
                "file": {**unit.state(), "sha256": checksum, "rows": row - source.first_row},
                "kind": selection.kind,
                "account": dict(selection.account),
                "notes": dict(selection.notes),
                "6d": stars.close(),
                "no_rv": others.close(),
            }
            if selection.tally is not None:
                selection.tally.write(self.folder / f"piece-{index:05d}.rv.parquet")
        finally:
            stars.abandon()
            others.abandon()
        write_atomic(record_path, record)
        return {"record": record, "reused": False}

    def merge(self, shard: int, view: str, schema_file: str) -> dict[str, Any]:
        """Merge one shard's rows from all pieces, in the order of the input files."""
        schema = pl.read_parquet_schema(self.folder / schema_file)
        parts = []
        for record_path in sorted(self.folder.glob("piece-*.json")):
            groups = json.loads(record_path.read_text(encoding="utf-8"))[view].get(str(shard))
            if groups:
                with pq.ParquetFile(record_path.with_suffix(f".{view}.parquet")) as file:
                    part = pl.from_arrow(file.read_row_groups(groups))
                assert isinstance(part, pl.DataFrame)
                parts.append(part)
        folder = self.folder / "out" / view
        folder.mkdir(parents=True, exist_ok=True)
        return {"entry": merge_shard(parts, pl.Schema(schema), folder / f"shard-{shard:05d}.parquet")}


class _Piece:
    """Writes selected rows to one Parquet file in row groups that each belong to one shard."""

    def __init__(self, path: Path, num_shards: int) -> None:
        self.path = path
        self.num_shards = num_shards
        self.held: list[pl.DataFrame] = []
        self.rows = 0
        self.groups: dict[str, list[int]] = {}
        self.count = 0
        self.writer: pq.ParquetWriter | None = None

    def add(self, frame: pl.DataFrame) -> None:
        self.held.append(frame)
        self.rows += frame.height
        if self.rows >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        if not self.held:
            return
        frame = pl.concat(self.held).sort(SHARD, maintain_order=True)
        self.held, self.rows = [], 0
        for (shard,), part in frame.group_by(SHARD, maintain_order=True):
            table: pa.Table = part.drop(SHARD).to_arrow(compat_level=pl.CompatLevel.oldest())
            if self.writer is None:
                self.writer = pq.ParquetWriter(self.path, table.schema, compression="lz4")
            self.writer.write_table(table, row_group_size=FLUSH_ROWS + table.num_rows)
            self.groups.setdefault(str(shard), []).append(self.count)
            self.count += 1

    def close(self) -> dict[str, list[int]]:
        self.flush()
        if self.writer is not None:
            self.writer.close()
            self.writer = None
        return self.groups

    def abandon(self) -> None:
        """Let go of a file that was not finished."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
            self.path.unlink(missing_ok=True)


def run_jobs(
    jobs: Sequence[tuple[str, Any]], arguments: tuple[str, str, int], num_workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Do jobs, in this process (0 workers) or on Ray actors that each take the next when free.

    Arguments:
        jobs: What `Worker.run` takes.
        arguments: What `Worker` is made with.
        num_workers: Number of actors of one CPU; 0 for none.

    Yields:
        Each job's number and answer, as they end.

    Raises:
        GalrayError: Ray is asked for but not connected.
    """
    if num_workers < 1:
        worker = Worker(*arguments)
        for number, job in enumerate(jobs):
            yield number, worker.run(job)
        return
    import ray

    if not ray.is_initialized():
        raise GalrayError(
            f"{num_workers} ingest workers are asked for, but Ray is not connected",
            "connect first (galray.cluster.connect), or use num_workers = 0",
        )
    yield from _on_ray(ray, jobs, arguments, min(num_workers, len(jobs)))


def _on_ray(
    ray: Any, jobs: Sequence[tuple[str, Any]], arguments: tuple[str, str, int], num_workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """One job in flight per actor: slow files hold up nobody, and the driver holds only row accounts."""
    environment = {"env_vars": {"POLARS_MAX_THREADS": os.environ.get("POLARS_MAX_THREADS", "1")}}
    actor_class = ray.remote(num_cpus=1, runtime_env=environment)(Worker)
    create: Callable[[], Any] = lambda: actor_class.remote(*arguments)  # noqa: E731
    waiting = deque((number, 1) for number in range(len(jobs)))
    running: dict[Any, tuple[Any, int, int]] = {}
    actors = [create() for _ in range(num_workers)]
    try:
        idle = list(actors)
        while waiting or running:
            while waiting and idle:
                actor = idle.pop()
                number, attempt = waiting.popleft()
                running[actor.run.remote(jobs[number])] = (actor, number, attempt)
            done, _ = ray.wait(list(running), num_returns=1)
            actor, number, attempt = running.pop(done[0])
            try:
                answer = ray.get(done[0])
            except ray.exceptions.RayTaskError:
                raise  # a bug in galray, with its own traceback
            except ray.exceptions.RayError as error:
                with contextlib.suppress(Exception):
                    ray.kill(actor)
                actors.remove(actor)
                actors.append(create())
                idle.append(actors[-1])
                if attempt < ATTEMPTS:
                    waiting.append((number, attempt + 1))
                    continue
                reason = str(error).splitlines()[0]
                over = jobs[number][1][1]
                answer = {
                    "error": f"{getattr(over, 'name', over)}: {attempt} workers died over it: {reason}",
                    "remedy": "look at the memory of the nodes, or leave the file out with catalog.allow_bad",
                    "bad_file": jobs[number][0] == "read",
                }
            else:
                idle.append(actor)
            yield number, answer
    finally:
        for actor in actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
