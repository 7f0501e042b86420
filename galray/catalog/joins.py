"""Columns of other catalogues, by source_id: small files are held, large ones read range by range."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from galray.errors import GalrayError
from galray.settings import Settings

__all__ = ["HELD_ROWS", "JoinSettings", "JoinTable", "join_table"]

HELD_ROWS = 2_000_000
"""Files of at most so many rows are held in memory; of larger ones the row groups that a batch needs."""

_KEY = "source_id"


class JoinSettings(Settings):
    """Columns of another catalogue that are joined by source_id; missing where it lacks a star."""

    file: str = Field(description="Parquet or CSV file, or a glob pattern of Parquet files.")
    columns: dict[str, str] | tuple[str, ...] = Field(
        description="Columns to join: names, or {theirs: ours}; cuts, keep_columns and extinction may "
        "name them.",
    )
    key: str = Field(default=_KEY, description="Column of the file that holds Gaia's source_id.")

    @field_validator("columns")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if not value or _KEY in (value.values() if isinstance(value, dict) else value):
            raise ValueError(f"name at least one column, and not {_KEY}")
        return value

    @property
    def names(self) -> dict[str, str]:
        """``{theirs: ours}``."""
        return self.columns if isinstance(self.columns, dict) else {name: name for name in self.columns}


class JoinTable:
    """Columns of one catalogue, looked up by source_id with bounded memory.

    Arguments:
        where: The configuration's key, for messages.
        pattern: File, or glob pattern of Parquet files.
        names: ``{theirs: ours}``; none for a mere list of source_ids.
        key: The column of source_ids.
        unique: True where a source_id may stand once only.

    Raises:
        GalrayError: A file or column is absent, a CSV file is too large to hold, or a file that is held has
            a source_id twice.
    """

    def __init__(
        self, where: str, pattern: str, names: dict[str, str], key: str = _KEY, unique: bool = True
    ) -> None:
        self.where, self.names, self.key, self.unique = where, names, key, unique
        self.paths = matching_files(where, pattern)
        self.held: pl.DataFrame | None = None
        self._groups: list[tuple[Path, int, int, int]] = []
        rows = 0
        for path in self.paths:
            schema = self._schema(path)
            for name in (key, *names):
                if name not in schema:
                    have = ", ".join(list(schema)[:6])
                    raise GalrayError(
                        f"{where}: {path} has no column '{name}'; it has {have}, …",
                        f"correct {where}.key" if name == key else f"correct the columns of {where}",
                    )
            if path.suffix == ".parquet":
                rows += self._index(path)
        if not all(path.suffix == ".parquet" for path in self.paths) or rows <= HELD_ROWS:
            self.held = self._hold()
        else:
            self._require_sorted()
        self.schema = self._types()

    def _schema(self, path: Path) -> dict[str, Any]:
        try:
            if path.suffix == ".parquet":
                return dict(pl.read_parquet_schema(path))
            return dict(self._scan_csv(path).collect_schema())
        except (OSError, pl.exceptions.PolarsError) as error:
            raise GalrayError(
                f"{self.where}: {path} cannot be read: {str(error).splitlines()[0]}",
                "give a Parquet or CSV file",
            ) from None

    def _scan_csv(self, path: Path) -> pl.LazyFrame:
        # A source_id needs all its 64 bits: as a float it would lose some.
        return pl.scan_csv(
            path,
            comment_prefix="#",
            null_values=["null", ""],
            schema_overrides={self.key: pl.Int64},
            infer_schema_length=10_000,
            glob=False,
        )

    def _index(self, path: Path) -> int:
        """Note which source_ids each row group spans."""
        metadata = pq.read_metadata(path)
        column = metadata.schema.names.index(self.key)
        for number in range(metadata.num_row_groups):
            statistics = metadata.row_group(number).column(column).statistics
            known = statistics is not None and statistics.has_min_max
            span = (statistics.min, statistics.max) if known else (-(2**63), 2**63 - 1)
            self._groups.append((path, number, *span))
        return int(metadata.num_rows)

    def _require_sorted(self) -> None:
        """A large file must be sorted: only then does a range of source_ids need few of its row groups."""
        self._groups.sort(key=lambda group: group[2])
        for before, after in itertools.pairwise(self._groups):
            if after[2] <= before[3]:
                raise GalrayError(
                    f"{self.where}: {after[0]} is not sorted by {self.key}, and too large to hold",
                    f"sort it once: polars.scan_parquet(FILE).sort('{self.key}').sink_parquet(NEW)",
                )

    def check_unique(self) -> None:
        """Look for stars that stand in the catalogue twice, a row group at a time.

        Raises:
            GalrayError: There is one.
        """
        if self.held is None and self.unique:
            # Row groups do not overlap, so that twins lie in the same one.
            for path, number, _, _ in self._groups:
                with pq.ParquetFile(path) as file:
                    group = pl.from_arrow(file.read_row_group(number, columns=[self.key]))
                assert isinstance(group, pl.DataFrame)
                self._checked(group.rename({self.key: _KEY}).drop_nulls(), path)

    def _hold(self) -> pl.DataFrame:
        frames = []
        for path in self.paths:
            if path.suffix == ".parquet":
                frames.append(self._renamed(pl.scan_parquet(path, glob=False)).collect())
                continue
            try:
                frame = self._renamed(self._scan_csv(path)).head(HELD_ROWS + 1).collect()
            except pl.exceptions.PolarsError as error:
                raise GalrayError(
                    f"{self.where}: {path}: {str(error).splitlines()[0]}", "mend the file"
                ) from None
            if frame.height > HELD_ROWS:
                raise GalrayError(
                    f"{self.where}: {path} has more than {HELD_ROWS:,} rows, too many for a CSV file",
                    f"write it as Parquet sorted by {self.key}, which is read range by range",
                )
            frames.append(frame)
        whole = pl.concat(frames, how="vertical_relaxed")
        return self._checked(whole, self.paths[0] if len(self.paths) == 1 else self.paths)

    def _renamed(self, lazy: pl.LazyFrame) -> pl.LazyFrame:
        return lazy.select(
            pl.col(self.key).cast(pl.Int64).alias(_KEY), *(pl.col(t).alias(o) for t, o in self.names.items())
        ).drop_nulls(_KEY)

    def _checked(self, frame: pl.DataFrame, path: Any) -> pl.DataFrame:
        if not self.unique:
            return frame.unique(_KEY)
        twice = frame.filter(pl.col(_KEY).is_duplicated())
        if twice.height:
            name = path if isinstance(path, Path) else f"{path[0]} and others"
            raise GalrayError(
                f"{self.where}: {name} has source_id {twice[_KEY][0]} more than once",
                "keep one row for each star",
            )
        return frame

    def _types(self) -> dict[str, Any]:
        if self.held is not None:
            return dict(self.held.drop(_KEY).schema)
        schema = self._schema(self.paths[0])
        return {ours: schema[theirs] for theirs, ours in self.names.items()}

    def look_up(self, source_ids: pl.Series) -> pl.DataFrame:
        """The rows of these stars, each source_id once.

        Row groups whose source_ids do not overlap the stars' are not read, and one is in memory at a time.

        Raises:
            GalrayError: One of the stars stands in the catalogue twice.
        """
        wanted = source_ids.to_frame(_KEY)
        if self.held is not None:
            return self.held.join(wanted, on=_KEY, how="semi")
        ids = np.sort(source_ids.to_numpy())
        found = [pl.DataFrame(schema={_KEY: pl.Int64(), **self.schema})]
        for path, number, low, high in self._groups:
            place = np.searchsorted(ids, low)
            if place < len(ids) and ids[place] <= high:
                columns = [self.key, *self.names]
                with pq.ParquetFile(path) as file:
                    group = pl.from_arrow(file.read_row_group(number, columns=columns))
                assert isinstance(group, pl.DataFrame)
                part = self._renamed(group.lazy()).collect().join(wanted, on=_KEY, how="semi")
                found.append(part.cast(pl.Schema({_KEY: pl.Int64(), **self.schema})))
        return self._checked(pl.concat(found), self.paths[0] if len(self.paths) == 1 else self.paths)

    def join(self, batch: pl.DataFrame) -> pl.DataFrame:
        """A batch with these columns, missing for stars that the catalogue lacks; like-named ones go."""
        batch = batch.drop([name for name in self.schema if name in batch.columns])
        return batch.join(self.look_up(batch[_KEY]), on=_KEY, how="left", maintain_order="left")


def matching_files(where: str, pattern: str) -> list[Path]:
    """The files of a path or glob pattern, sorted.

    Raises:
        GalrayError: There is none.
    """
    text = os.path.expanduser(pattern)
    paths = [Path(text)] if Path(text).is_file() else sorted(Path(p) for p in glob.glob(text))
    if not paths:
        raise GalrayError(f"{where}: no such file: {pattern}", "correct the path")
    return paths


def join_table(
    where: str, pattern: str, names: dict[str, str], key: str = _KEY, unique: bool = True
) -> JoinTable:
    """A `JoinTable`, kept from one input file to the next in the same process as long as it is the same."""
    states = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in matching_files(where, pattern))
    return _kept(where, pattern, tuple(names.items()), key, unique, states)


@lru_cache(maxsize=16)
def _kept(
    where: str, pattern: str, names: Sequence[tuple[str, str]], key: str, unique: bool, states: Any
) -> JoinTable:
    return JoinTable(where, pattern, dict(names), key, unique)
