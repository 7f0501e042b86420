"""The stages of an ingest: read all input, merge the shards, cut the tiles; here are only accounts."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from galray.catalog.crew import Crew
from galray.catalog.inputs import InputUnit
from galray.catalog.mirror import Place
from galray.catalog.pieces import PieceIndex
from galray.catalog.quality import parse_cuts
from galray.catalog.quarantine import too_many_bad
from galray.catalog.rvs_selection import SELECTION_FILES, RVTally
from galray.catalog.settings import CatalogSettings
from galray.catalog.shards import store_hash
from galray.catalog.sky_rows import HEALPIX
from galray.catalog.statistics import Histograms, column_statistics, per_shard
from galray.catalog.tiles import Tile, partition, tile_limit
from galray.catalog.workers import VIEWS, piece_name
from galray.errors import GalrayError
from galray.provenance import content_hash, file_checksum

__all__ = ["Progress", "Stages"]

Progress = Callable[[int, int, str], None]
"""Called with done and total work (as bytes of input) and a line of text."""

_JOB_ROWS = 524_288
"""Rows of the tiles that one job writes, where they are several; each job looks into every shard's rows."""


class Stages:
    """One ingest's work between its input and the manifest.

    Arguments:
        settings: The catalogue's settings.
        place: Where the pieces are, and the shards to come.
        units: The input.
        crew: Who does it.
        progress: Called as the work goes on.
    """

    def __init__(
        self, settings: CatalogSettings, place: Place, units: list[InputUnit], crew: Crew, progress: Progress
    ) -> None:
        self.settings = settings
        self.place = place
        self.work = place.folder
        self.units = units
        self.crew = crew
        self.progress = progress
        self.account: Counter[str] = Counter({"rows_in": 0, "kept": 0})
        self.notes: Counter[str] = Counter()
        self.inputs: list[dict[str, Any]] = []
        self.quarantined: list[dict[str, Any]] = []
        self.pieces: dict[str, list[str]] = {view: [] for view in VIEWS}
        self.kind = ""
        self.peak_mb = 0.0
        self._schemas: dict[str, dict[str, str]] = {view: {} for view in VIEWS}
        self._nullable: dict[str, set[str]] = {view: set() for view in VIEWS}
        self._read_size = sum(unit.size for unit in units)
        self._work_size = self._read_size * 10 // 8  # merging and tiling take about a fifth of the time

    def read(self) -> None:
        """Read all input; what cannot be read is quarantined, and too much of that is an error at the end.

        Raises:
            GalrayError: More files are bad than ``allow_bad``, the files are of different kinds, or something
                that is not a file's fault went wrong.
        """
        jobs = [("read", (unit,)) for unit in self.units]
        records: dict[int, dict[str, Any]] = {}
        bad: dict[int, dict[str, Any]] = {}
        done = 0
        for number, answer in self.crew.run(jobs):
            if "error" in answer:
                if not answer["bad_file"]:
                    raise GalrayError(answer["error"], answer["remedy"])
                bad[number] = answer
            else:
                records[number] = self._noted(answer)
            done += self.units[number].size
            quarantine = f", {len(bad)} bad" if bad else ""
            rows, kept = self.account["rows_in"], self.account["kept"]
            self.progress(
                done,
                self._work_size,
                f"{len(records)}/{len(jobs)} files{quarantine}, {rows:,} rows read, {kept:,} stars kept",
            )
        kinds = {record["kind"] for record in records.values()}
        if len({self.units[n].path for n in bad}) > self.settings.allow_bad:
            reasons = [(self.units[n].name, bad[n]["error"], bad[n]["remedy"]) for n in sorted(bad)]
            raise too_many_bad(reasons, len(jobs), self.settings.allow_bad)
        if len(kinds) > 1:
            raise GalrayError(
                "catalog.files mixes Gaia tables and 6D tables", "ingest them into two stores, one kind each"
            )
        if not self.account["kept"] + self.account["kept_no_rv"]:
            raise GalrayError(
                f"no star is left of {self.account['rows_in']:,} rows: {_describe(self.account)}",
                "loosen the cuts or the ball in [catalog], or give other files",
            )
        self.kind = kinds.pop()
        self._tallies = [self.work / f"{piece_name(self.units[n])}.rv.parquet" for n in sorted(records)]
        for number in sorted(records):
            record = records[number]
            self.inputs.append(record["file"])
            for view in record["views"]:
                self.pieces[view].append(f"{piece_name(self.units[number])}.{view}.arrow")
        self._name_losses(bad)
        self.place.pull("piece-*.npy", "piece-*.rv.parquet", "piece-*.lost.parquet")
        self.place.fetch(*(name for names in self._schemas.values() for name in names.values()))

    def _noted(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Add a record to the accounts; what is kept of it here is small."""
        record = answer["record"]
        self._note_peak(answer)
        self.account.update(record["account"])
        self.notes.update(record["notes"])
        name = piece_name(InputUnit.from_state(record["file"]))
        for view, about in record["views"].items():
            self._schemas[view][content_hash(about["schema"])] = f"{name}.{view}.arrow"
            # Pieces of an interrupted ingest by an earlier version do not say.
            self._nullable[view].update(about.get("nullable", (column for column, _ in about["schema"])))
        return {"file": record["file"], "kind": record["kind"], "views": tuple(record["views"])}

    def _note_peak(self, answer: dict[str, Any]) -> None:
        self.peak_mb = max(self.peak_mb, answer.get("peak_mb", 0.0))

    def _name_losses(self, bad: dict[int, dict[str, Any]]) -> None:
        """Note the files left out, with their rows as far as these can be named."""
        numbers = sorted(bad)
        named: dict[int, dict[str, Any]] = {}
        # A file over which workers died is not touched again.
        jobs = [n for n in numbers if not bad[n].get("died")]
        for index, answer in self.crew.run([("lost", (self.units[n],)) for n in jobs]):
            named[jobs[index]] = answer
        for n in numbers:
            found = named.get(n, {})
            self.quarantined.append(
                {
                    **self.units[n].state(),
                    "reason": bad[n]["error"],
                    "rows": found.get("rows"),
                    "rows_named": found.get("rows_named", 0),
                }
            )

    def merge(self) -> dict[str, dict[str, Any]]:
        """Merge the pieces into shards and cut the tiles; returns each view's part of the manifest."""
        self.out = f"out-{content_hash(self.pieces)}"
        for stale in self.work.glob("out-*"):
            if stale.name != self.out:
                shutil.rmtree(stale, ignore_errors=True)
        views = [view for view in VIEWS if self.pieces[view]]
        if "tiles" in self.settings.views:
            for view in views:
                self._check_density(view)
        manifests = {}
        for number, view in enumerate(views):
            manifests[view] = self._merge_view(view, number / len(views), 1 / len(views))
        return manifests

    def selection_function(self) -> dict[str, str] | None:
        """Add up the files' tallies of radial velocities; returns the checksums of what is published."""
        tallies = [path for path in self._tallies if path.exists()]
        if not tallies:
            return None
        folder = self.work / self.out / "selection"
        about = {"cuts": {cut.name: cut.sql for cut in parse_cuts(self.settings.cuts) if cut.on_quality}}
        RVTally.merge(self.settings.rv_selection, tallies).save(folder, about)
        return {name: file_checksum(folder / name) for name in SELECTION_FILES}

    def _check_density(self, view: str) -> None:
        """Fail before the merge where no tile could hold a pixel's stars."""
        counts = self._counts(self.work / name.replace(".arrow", ".pixels.npy") for name in self.pieces[view])
        partition(counts, self.settings.tiles.max_rows, self.settings.tiles)

    def _counts(self, paths: Any) -> np.ndarray:
        counts = np.zeros(12 * 4**self.settings.tiles.max_level, dtype=np.int64)
        for path in paths:
            if path.exists():
                pixels, numbers = np.load(path)
                np.add.at(counts, pixels, numbers)
        return counts

    def _merge_view(self, view: str, start: float, share: float) -> dict[str, Any]:
        folder = self.work / self.out / view
        folder.mkdir(parents=True, exist_ok=True)
        schema = self._schema(view)
        schema.to_frame().write_parquet(self.work / self.out / f"schema-{view}.parquet")
        index = PieceIndex.of(self.work, self.pieces[view])
        index.save(self.work / self.out / f"index-{view}.npy")
        del index
        self.place.push(f"{self.out}/*")
        count = self.settings.num_shards
        required = [name for name in schema if name not in self._nullable[view]]
        form = (view, self.out, f"schema-{view}.parquet", required)
        jobs = [("merge", (shard, *form)) for shard in range(count)]
        entries: dict[int, dict[str, Any]] = {}
        tiled = "tiles" in self.settings.views
        for number, answer in self._answers(jobs):
            entries[number] = answer["entry"]
            part = start + share * len(entries) / count * (0.6 if tiled else 1)
            self._advance(part, f"{len(entries)}/{count} shards merged")
        ordered = [entries[number] for number in range(count)]
        duplicates = sum(entry["duplicates"] for entry in ordered)
        if duplicates:
            self.account["kept" if view == "6d" else f"kept_{view}"] -= duplicates
            self.account["cut:duplicate_source_id"] += duplicates
        ranges, counts = per_shard(ordered)
        ranges.write_parquet(folder / "shard_ranges.parquet")
        counts.write_parquet(folder / "shard_histograms.parquet")
        histograms = Histograms(self.settings, list(schema))
        total = {
            name: np.sum([entry["histograms"][name] for entry in ordered], axis=0) for name in histograms.bins
        }
        own = ("file", "rows", "bytes", "xxh128")
        shards = [{name: entry[name] for name in own} for entry in ordered]
        manifest = {
            "kind": view,
            "num_rows": sum(entry["rows"] for entry in shards),
            "shards": shards,
            "columns": column_statistics(ordered, schema),
            "histograms": histograms.describe(total),
            "hash": store_hash(shards, self.settings.frame.build().as_dict()),
        }
        if tiled:
            manifest["tiles"] = self._tile(view, form, manifest, start + share * 0.6, share * 0.4)
        return manifest

    def _tile(
        self, view: str, form: tuple[Any, ...], manifest: dict[str, Any], start: float, share: float
    ) -> dict[str, Any]:
        """Cut the shards' stars into tiles; returns the manifest's part on them."""
        folder = self.work / self.out / view
        shutil.rmtree(folder / "sky", ignore_errors=True)
        self.place.remove(f"{self.out}/{view}/sky")
        self.place.pull("*.counts.npy", prefix=f"{self.out}/{view}")
        counts = self._counts(sorted(folder.glob("shard-*.counts.npy")))
        limit = tile_limit(
            self.settings.tiles, manifest["num_rows"], sum(entry["bytes"] for entry in manifest["shards"])
        )
        tiles = partition(counts, limit, self.settings.tiles)
        groups = _grouped(tiles, _JOB_ROWS)
        jobs = [("tile", (group, *form)) for group in groups]
        entries: dict[int, list[dict[str, Any]]] = {}
        for number, answer in self._answers(jobs):
            entries[number] = answer["tiles"]
            self._advance(start + share * len(entries) / len(jobs), f"{len(entries)}/{len(jobs)} tile groups")
        written = [entry for number in range(len(jobs)) for entry in entries[number]]
        from galray import __version__
        from galray.provenance import now

        about = {"name": f"galray_{view}", "created": now(), "galray": __version__, "max_rows": str(limit)}
        # A view without stars has no tiles, and no catalogue of them.
        for _ in self._answers([("catalog", (written, view, self.out, about))] if written else []):
            pass
        return {"max_rows": limit, "num_rows": sum(e["rows"] for e in written), "files": written}

    def _answers(self, jobs: list[Any]) -> Any:
        """Answers to jobs of which none may fail."""
        for number, answer in self.crew.run(jobs):
            if "error" in answer:
                raise GalrayError(answer["error"], answer["remedy"])
            self._note_peak(answer)
            yield number, answer

    def _advance(self, part: float, text: str) -> None:
        done = self._read_size + round((self._work_size - self._read_size) * min(part, 1.0))
        self.progress(done, self._work_size, text)

    def _schema(self, view: str) -> pl.Schema:
        """Columns and types that hold every piece's."""
        frames = []
        for name in sorted(self._schemas[view].values()):
            kinds = pl.read_ipc_schema(self.work / name)
            frames.append(pl.Schema(kinds).to_frame().drop(HEALPIX, strict=False))
        try:
            schema = pl.concat(frames, how="vertical_relaxed").schema
        except pl.exceptions.PolarsError as error:
            raise GalrayError(
                f"a kept column has different types in different files: {str(error).splitlines()[0]}",
                "drop it from catalog.keep_columns, or make the files agree",
            ) from None
        # Errors, correlations and magnitudes that no file has are no columns of the store.
        return pl.Schema({name: kind for name, kind in schema.items() if kind != pl.Null})


def _grouped(tiles: list[Tile], limit: int) -> list[list[Tile]]:
    """Runs of tiles up to a number of rows, for one job each."""
    groups: list[list[Tile]] = []
    rows = 0
    for tile in tiles:
        if not groups or rows + tile.rows > limit:
            groups.append([])
            rows = 0
        groups[-1].append(tile)
        rows += tile.rows
    return groups


def _describe(account: Counter[str]) -> str:
    """The largest losses in words."""
    fates = [
        (n, fate) for fate, n in account.items() if fate.startswith(("cut:", "rejected:", "kept_")) and n
    ]
    return ", ".join(f"{fate} {n:,}" for n, fate in sorted(fates, reverse=True)[:4]) or "the files are empty"
