"""The shard store: Parquet files of 6D stars, and the manifest that accounts for every input row."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from galray.catalog.astrometry import draw_observables, galactocentric, shift_states
from galray.catalog.columns import CORRELATIONS, ERRORS, OBSERVABLES, STATE
from galray.catalog.distances import EdsdPosterior, quantile_draws
from galray.catalog.manifest_form import require_form
from galray.catalog.mirror import Mirror, Place, open_place
from galray.catalog.rvs_selection import RVSelection
from galray.catalog.storage import StorageSettings
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.provenance import content_hash, is_intact, write_atomic
from galray.seeds import seed_sequence

__all__ = ["MANIFEST", "SIDE_VIEWS", "BallRegion", "Draw", "ShardStore", "store_hash", "written_checksum"]

MANIFEST = "manifest.json"
"""Written last: a folder without it is not a finished store."""

SIDE_VIEWS = {
    "no_rv": "stars without radial velocity",
    "margin": "stars in the margin of the ball",
}
"""Stores inside a store, of stars that are kept apart."""

# Columns beside observables and errors that a redraw uses where the shards have them.
_DRAW_COLUMNS = (
    "parallax_zero_point",
    "distance",
    "distance_low",
    "distance_high",
    "distance_prior_length",
)


@dataclass(frozen=True)
class BallRegion:
    """The ball that the stars were cut to: centre and radius in Galactocentric kpc."""

    center: tuple[float, float, float]
    radius: float

    @property
    def inner_radius(self) -> float:
        """The radius less float32's resolution there: a star kept is inside in float32 arithmetic too.

        Maps of the ball onto all space are infinite at its border.
        """
        return self.radius - 4e-7 * (math.dist(self.center, (0, 0, 0)) + self.radius)


@dataclass(frozen=True)
class Draw:
    """One redraw of the stars' observables from their errors.

    Arguments:
        states: (m, 6) in kpc and km/s, float64.
        index: (m,) for each state the number of its star among the rows drawn from: those of the store, then
            those of its margin.
        account: ``rows``, ``kept``, and the draws kept out: ``parallax_not_positive``, ``outside_ball``.
    """

    states: np.ndarray
    index: np.ndarray
    account: dict[str, int]


class ShardStore:
    """A finished store of stars, in a folder or at a URL.

    Of a store at a URL each node has a copy of the files that it has read.

    Arguments:
        path: Its folder or URL.
        storage: How an object store is reached.

    Raises:
        GalrayError: The folder is absent, or holds no manifest that can be read.
    """

    def __init__(self, path: Path | str, storage: StorageSettings | None = None) -> None:
        self._place = open_place(path, storage)
        self.path = self._place.folder
        try:
            self.manifest: dict[str, Any] = json.loads(self._read_manifest())
            require_form(self.manifest)
            self._entries: list[dict[str, Any]] = self.manifest["shards"]
        except FileNotFoundError:
            raise GalrayError(
                f"{self.location}: not a finished shard store: no {MANIFEST}",
                "run the ingest (again) to its end",
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise GalrayError(
                f"{self.location}/{MANIFEST}: cannot be read: {error}", "ingest the catalogue again"
            ) from None

    @classmethod
    def at(cls, place: Place) -> ShardStore:
        """The store at a place."""
        return cls(place.location, place.storage)

    def _read_manifest(self) -> bytes:
        """The manifest; what this node has of another store that was at the same URL is thrown away."""
        content, here = self._place.read(MANIFEST), self.path / MANIFEST
        if content is None:
            raise FileNotFoundError
        if isinstance(self._place, Mirror) and not (here.is_file() and here.read_bytes() == content):
            self._place.clear()
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(here, content)
        return content

    def __reduce__(self) -> tuple[Any, ...]:
        """A store is opened again where it arrives, on a node with a copy of its own."""
        return (ShardStore.at, (self._place,))

    @property
    def location(self) -> str:
        """Its folder or URL."""
        return self._place.location

    def __repr__(self) -> str:
        return f"ShardStore({self.location!r}: {self.num_rows:,} stars in {len(self._entries)} shards)"

    def file(self, name: str) -> os.PathLike[str]:
        """A file of the store; one at a URL is brought to the node that opens it."""
        return self._place.file(name)

    def fetch(self, *patterns: str) -> None:
        """Bring files of a store at a URL to this node, all of them where no patterns are given."""
        self._place.pull(*patterns)

    @property
    def hash(self) -> str:
        """Hash of the stars, their order and the frame: the same stars give the same, however ingested."""
        return str(self.manifest["hash"])

    @property
    def num_rows(self) -> int:
        """Number of stars."""
        return int(self.manifest["num_rows"])

    @property
    def row_account(self) -> dict[str, int]:
        """The fate of every input row: ``rows_in`` is the sum of all others."""
        return dict(self.manifest["account"])

    @property
    def shards(self) -> list[os.PathLike[str]]:
        """The shard files."""
        return [self.file(entry["file"]) for entry in self._entries]

    @property
    def shard_rows(self) -> list[int]:
        """Number of stars in each shard."""
        return [int(entry["rows"]) for entry in self._entries]

    @property
    def columns(self) -> list[str]:
        """Names of the shards' columns."""
        return list(self.manifest["columns"])

    @cached_property
    def frame(self) -> GalacticFrame:
        """The Galactocentric frame of the states."""
        given = dict(self.manifest["frame"])
        given["sun_velocity_km_s"] = tuple(given["sun_velocity_km_s"])
        return GalacticFrame(**given)

    @property
    def ball(self) -> BallRegion | None:
        """The ball that the stars were cut to, if they were."""
        ball = self.manifest.get("ball")
        return None if ball is None else BallRegion(tuple(ball["center_kpc"]), float(ball["radius_kpc"]))

    @property
    def no_rv(self) -> ShardStore | None:
        """The stars without radial velocity, where those were kept (``require_rv = false``)."""
        return self.side("no_rv")

    @property
    def margin(self) -> ShardStore | None:
        """The stars just outside the ball, where those were kept (``ball.margin_kpc``)."""
        return self.side("margin")

    def side(self, name: str) -> ShardStore | None:
        """The store of this one's stars that are kept apart, one of `SIDE_VIEWS`; None where it has none."""
        return ShardStore.at(self._place.below(name)) if self.manifest.get(name) else None

    @property
    def rv_selection(self) -> RVSelection | None:
        """The fraction of stars with radial velocity by magnitude, colour and sky, where it was counted."""
        if not self.manifest.get("selection"):
            return None
        self.fetch("selection/*")
        return RVSelection.open(self.path / "selection")

    def require_stars(self) -> None:
        """Refuse to go on without 6D stars, as when ``require_rv = false`` kept others alone.

        Raises:
            GalrayError: There are none.
        """
        if not self.num_rows:
            raise GalrayError(
                f"{self.location}: no star in it has a radial velocity, and so none a 6D state",
                "give files with radial velocities; the stars without are in the store's no_rv",
            )

    def table(
        self, columns: Sequence[str] | None = None, shards: Iterable[int] | None = None
    ) -> pl.DataFrame:
        """Columns of the stars, shard after shard, sorted by ``source_id`` within each.

        Arguments:
            columns: Which; all where not given.
            shards: Numbers of the shards; all where not given.

        Raises:
            GalrayError: A column or shard is not in the store, or a shard's file is gone or broken.
        """
        names = list(self.columns if columns is None else columns)
        if absent := [name for name in names if name not in self.columns]:
            raise GalrayError(
                f"{self.location}: no column '{absent[0]}' in the store; it has {', '.join(self.columns)}",
                "name it in catalog.keep_columns and ingest again",
            )
        parts = []
        for number in self._numbers(shards):
            try:
                parts.append(_read(self.shards[number], names))
            except (OSError, pl.exceptions.PolarsError) as error:
                raise GalrayError(
                    f"{self.shards[number]}: the shard cannot be read: {str(error).splitlines()[0]}",
                    "ingest the catalogue again",
                ) from None
        return pl.concat(parts) if parts else self.table(names, [0]).clear()

    def measured(self, extra: Sequence[str] = (), shards: Iterable[int] | None = None) -> pl.DataFrame:
        """The observables with their errors and correlations, null where the files had none.

        Arguments:
            extra: Further columns.
            shards: Numbers of the shards; all where not given.

        Raises:
            GalrayError: As `table`.
        """
        wanted = [*OBSERVABLES, *ERRORS, *CORRELATIONS]
        table = self.table([*(name for name in wanted if name in self.columns), *extra], shards)
        lacking = [name for name in wanted if name not in table.columns]
        return table.with_columns(pl.lit(None, pl.Float32).alias(name) for name in lacking)

    def states(self, shards: Iterable[int] | None = None, dtype: Any = np.float32) -> np.ndarray:
        """The stars' 6D states, (n, 6) in kpc and km/s.

        Raises:
            GalrayError: The store is one of stars without radial velocity.
        """
        self._require_6d()
        return np.ascontiguousarray(self.table(STATE, shards).to_numpy().astype(dtype, copy=False))

    def weights(self, shards: Iterable[int] | None = None) -> np.ndarray | None:
        """The stars' weights, (n,) float64, or None where the store has none."""
        if "weight" not in self.columns:
            return None
        return self.table(["weight"], shards)["weight"].cast(pl.Float64).to_numpy()

    def where(self, condition: str, shards: Iterable[int] | None = None) -> np.ndarray:
        """Which stars satisfy an SQL condition on the columns, (n,) of truth; null counts as false.

        Raises:
            GalrayError: The condition cannot be read, names no column of the store, or is no condition.
        """
        try:
            wanted = pl.sql_expr(condition)
            found = self.table(wanted.meta.root_names(), shards).select(wanted.alias("kept"))["kept"]
            if found.dtype != pl.Boolean:
                raise pl.exceptions.InvalidOperationError(f"it gives {found.dtype}, not true or false")
        except pl.exceptions.PolarsError as error:
            raise GalrayError(
                f"selection '{condition}': {str(error).splitlines()[0]}",
                f"write a condition on the columns {', '.join(self.columns)}",
            ) from None
        return found.fill_null(False).to_numpy()

    def shifted(self, w: np.ndarray, zero_point: float, sun_velocity: tuple[float, float, float]) -> Draw:
        """States moved by errors that all stars share; those that leave the ball are kept out, as in `draw`.

        Arguments:
            w: States of the store, (n, 6).
            zero_point: Shift of the parallax zero point in mas; 6D tables have none, theirs stays.
            sun_velocity: Shift of the Sun's velocity in km/s.
        """
        moved = shift_states(w, self.frame, zero_point if self.observed else 0.0, sun_velocity)
        inside = self._inside(moved)
        account = {"rows": len(w), "kept": int(inside.sum()), "outside_ball": int((~inside).sum())}
        return Draw(moved[inside], np.flatnonzero(inside), account)

    @property
    def observed(self) -> bool:
        """Whether the stars have observables, and not states alone."""
        return bool(self.manifest["source"] == "gaia")

    def draw_states(self, seed: int, shards: Iterable[int] | None = None) -> np.ndarray:
        """States of one redraw of the observables, (m, 6) float64 with m ≤ n; see `draw`."""
        return self.draw(seed, shards).states

    def draw(self, seed: int, shards: Iterable[int] | None = None, *, cut: bool = True) -> Draw:
        """Redraw the stars of several shards, or all, and those of the margin; see `draw_errors`.

        Each shard has its own random stream, so that drawing some shards gives the same stars as drawing all.

        Arguments:
            seed: Root of the random streams.
            shards: Numbers of the shards; all where not given.
            cut: Keep out the draws that lie outside the ball.

        Raises:
            GalrayError: As `draw_errors`.
        """
        states, index = [np.empty((0, 6))], [np.empty(0, dtype=np.int64)]
        account = {"rows": 0, "kept": 0, "parallax_not_positive": 0, "outside_ball": 0}
        self._require_observables()
        numbers = self._numbers(shards)
        margin = self.margin
        for store in (self,) if margin is None else (self, margin):
            for number in numbers:
                one = store.draw_errors(number, seed, cut=cut)
                states.append(one.states)
                index.append(account["rows"] + one.index)
                for name, count in one.account.items():
                    account[name] += count
        return Draw(np.concatenate(states), np.concatenate(index), account)

    def draw_errors(self, shard: int, seed: int, *, cut: bool = True) -> Draw:
        """Redraw every star of a shard from its errors with all correlations, and transform to 6D.

        Observables are drawn round the measured ones. Where the distance is not the inverse of the parallax
        it is drawn from its own posterior, and positions and proper motions from their errors given the
        parallax that it stands for. A draw without a distance (zero-point corrected parallax not positive) is
        kept out, and so is one that leaves the store's ball; both are counted.

        Arguments:
            shard: Its number.
            seed: Root of the random streams.
            cut: Keep out the draws that lie outside the ball.

        Raises:
            GalrayError: The store holds no observables or no errors, or there is no such shard.
        """
        self._require_observables()
        (number,) = self._numbers([shard])
        distance = self.manifest.get("distance", "inverse_parallax")
        extra = [name for name in _DRAW_COLUMNS if name in self.columns]
        table = self.measured(extra, [number])
        # Position errors may be absent: at microarcseconds they are nothing beside the rest. A joined
        # distance does without the parallax's.
        missing = (
            table.select(ERRORS[3:] if distance == "joined" else ERRORS[2:]).null_count().row(0, named=True)
        )
        if any(missing.values()):
            name = max(missing, key=lambda key: missing[key])
            raise GalrayError(
                f"{self.location}: '{name}' is missing for {missing[name]:,} stars of shard {number}: "
                "their errors cannot be drawn",
                "ingest files that have the error columns, or leave out error draws",
            )
        values = table.select(*OBSERVABLES, *ERRORS, *CORRELATIONS).cast(pl.Float64).fill_null(0.0).to_numpy()
        per_star = "parallax_zero_point" in extra
        constant = 0.0 if per_star else float(self.manifest["parallax_zero_point"])
        zero_point = table["parallax_zero_point"].to_numpy() if per_star else np.full(len(values), constant)
        stream = "draw" if self.manifest["kind"] == "6d" else f"draw {self.manifest['kind']}"
        generator = np.random.default_rng(seed_sequence(seed, stream, number))
        parallax = None
        if distance != "inverse_parallax":
            near = values[:, 2] - zero_point
            parallax = zero_point + 1 / _drawn_distances(table, near, values[:, 8], distance, generator)
        drawn = draw_observables(values[:, :6], values[:, 6:12], values[:, 12:], generator, parallax)
        possible = drawn[:, 2] > zero_point
        w = galactocentric(drawn[possible], self.frame, zero_point[possible])
        inside = self._inside(w) if cut else np.isfinite(w).all(-1)
        account = {
            "rows": len(drawn),
            "kept": int(inside.sum()),
            "parallax_not_positive": int((~possible).sum()),
            "outside_ball": int((~inside).sum()),
        }
        return Draw(w[inside], np.flatnonzero(possible)[inside], account)

    def _require_observables(self) -> None:
        self._require_6d()
        if not self.observed:
            raise GalrayError(
                f"{self.location}: its stars come from 6D tables, which have no observables to redraw",
                "leave out error draws for this catalogue",
            )

    def verify(self) -> dict[str, int]:
        """Check every shard's existence, checksum and row count, and that the row account adds up.

        Returns:
            Numbers of shards and rows checked.

        Raises:
            GalrayError: Something differs from the manifest; the shard is named.
        """
        self.fetch("shard-*.parquet", "selection/*")
        for entry in self._entries:
            path = Path(self.file(entry["file"]))
            if not path.is_file():
                raise GalrayError(f"{path}: the shard is gone", "ingest the catalogue again")
            if not is_intact(path, written_checksum(entry)):
                raise GalrayError(
                    f"{path}: the shard's checksum differs from the manifest's", "ingest the catalogue again"
                )
            rows = pl.scan_parquet(path, glob=False).select(pl.len()).collect().item()
            if rows != entry["rows"]:
                raise GalrayError(f"{path}: {rows} rows, the manifest says {entry['rows']}", "ingest again")
        for name, checksum in (self.manifest.get("selection") or {}).items():
            path = self.path / "selection" / name
            if self.manifest["kind"] == "6d" and not (path.is_file() and is_intact(path, checksum)):
                raise GalrayError(
                    f"{path}: gone, or its checksum differs from the manifest's", "ingest the catalogue again"
                )
        account = self.row_account
        if account.pop("rows_in") != sum(account.values()) or sum(self.shard_rows) != self.num_rows:
            raise GalrayError(f"{self.path}: the row account does not add up: {self.row_account}")
        return {"shards": len(self._entries), "rows": self.num_rows}

    def _numbers(self, shards: Iterable[int] | None) -> list[int]:
        numbers = list(range(len(self._entries))) if shards is None else [int(n) for n in shards]
        for number in numbers:
            if not 0 <= number < len(self._entries):
                raise GalrayError(f"{self.location}: no shard {number}; it has {len(self._entries)}")
        return numbers

    def _require_6d(self) -> None:
        if self.manifest["kind"] == "no_rv":
            raise GalrayError(
                f"{self.location}: its stars have no radial velocity and so no 6D state",
                "use the store beside it, or read positions with table(['x', 'y', 'z'])",
            )

    def _inside(self, w: np.ndarray) -> np.ndarray:
        finite = np.isfinite(w).all(-1)
        if self.ball is None:
            return finite
        offset = w[:, :3] - np.asarray(self.ball.center)
        return finite & (np.sum(offset**2, -1) < self.ball.inner_radius**2)


def _read(file: os.PathLike[str], names: list[str]) -> pl.DataFrame:
    try:
        return pl.read_parquet(os.fspath(file), columns=names, glob=False).select(names)
    except pl.exceptions.ColumnNotFoundError as error:
        raise GalrayError(f"{file}: no such column: {error}", "ingest the catalogue again") from None


def _drawn_distances(
    table: pl.DataFrame, parallax: np.ndarray, error: np.ndarray, kind: str, generator: np.random.Generator
) -> np.ndarray:
    """Distances drawn from their posteriors: under the prior, or between a catalogue's quantiles."""
    if kind == "joined":
        median, low, high = (table[n].to_numpy() for n in ("distance", "distance_low", "distance_high"))
        return quantile_draws(median, low, high, generator.standard_normal(len(table)))
    length = table["distance_prior_length"].cast(pl.Float64).to_numpy()
    uniform = generator.random(len(table))
    parts = [
        EdsdPosterior(parallax[i : i + 16384], error[i : i + 16384], length[i : i + 16384]).quantile(
            uniform[i : i + 16384]
        )
        for i in range(0, len(table), 16384)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def store_hash(entries: Sequence[Mapping[str, Any]], frame: Mapping[str, Any]) -> str:
    """Hash of the shards' checksums and of the frame."""
    shards = [[entry["rows"], written_checksum(entry)] for entry in entries]
    return content_hash({"shards": shards, "frame": dict(frame)})


def written_checksum(entry: Mapping[str, Any]) -> str:
    """The checksum of a file in its manifest's entry; stores before format 3 have SHA-256."""
    return str(entry.get("xxh128") or entry["sha256"])
