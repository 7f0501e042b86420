"""A finished run's directory as the report reads it: the summary is required, the rest may be absent."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galray.errors import GalrayError

__all__ = ["Curve", "RunFolder", "entries"]


@dataclass(frozen=True)
class Curve:
    """One member's training curve.

    Arguments:
        member: Name of the member's folder, such as ``003``.
        family: ``flow``, ``score`` or another model family.
        epochs: Epoch numbers.
        train: Training objective per epoch (NaN where absent).
        validation: Held-out objective per epoch (NaN where absent).
    """

    member: str
    family: str
    epochs: list[float]
    train: list[float]
    validation: list[float]


@dataclass
class RunFolder:
    """What a run directory holds, read once.

    Arguments:
        path: The run directory.
        summary: ``results/summary.json``.
        config: Text of ``config.toml``; empty when absent.
        provenance: ``provenance.json``; empty when absent.
        truth: ``truth.json``; None for real stars.
        profiles, maps, stars, dust, dust_sky: Polars data frames of ``results/*.parquet``, or None.
        curves: Training curves of the members.
        problems: Sentences about files that could not be read.
    """

    path: Path
    summary: dict[str, Any]
    config: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    truth: dict[str, Any] | None = None
    profiles: Any = None
    maps: Any = None
    stars: Any = None
    dust: Any = None
    dust_sky: Any = None
    curves: list[Curve] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read a run directory.

        Raises:
            GalrayError: The directory or its summary is absent or is not what it should be.
        """
        path = Path(path)
        if not path.is_dir():
            raise GalrayError(f"{path} is not a run directory", "give the folder that `galray run` wrote")
        source = path / "results" / "summary.json"
        if not source.is_file():
            raise GalrayError(
                f"{path} has no results/summary.json", "finish the run first: galray run CONFIG goes on there"
            )
        try:
            summary = json.loads(source.read_text("utf-8"))
        except (ValueError, OSError) as error:
            raise GalrayError(f"{source} cannot be read: {error}", "run `galray run` again") from error
        if not isinstance(summary, dict):
            raise GalrayError(
                f"{source} holds a {type(summary).__name__}, not an object", "run `galray run` again"
            )
        if not summary:
            raise GalrayError(f"{source}: holds nothing", "run `galray run` again")
        run = cls(path=path, summary=summary)
        config = path / "config.toml"
        run.config = config.read_text("utf-8", errors="replace") if config.is_file() else ""
        run.provenance = run._json("provenance.json") or {}
        run.truth = run._json("truth.json")
        run.profiles = run._table(
            "profiles.parquet", ["profile", "coordinate", "quantity", "method", "value", "error"]
        )
        run.maps = run._table("maps.parquet", ["map", "quantity", "method", "u", "v", "value"])
        run.stars = run._table("stars.parquet", [])
        run.dust = run._table("dust.parquet", ["x", "y", "z", "counts", "efficiency"])
        run.dust_sky = run._table("dust_sky.parquet", ["l", "b", "before", "after"])
        run._read_curves()
        return run

    @property
    def is_mock(self) -> bool:
        """Whether the run's truth is known."""
        headline = self.summary.get("headline") or {}
        return self.truth is not None or headline.get("truth") is not None

    def _json(self, name: str) -> dict[str, Any] | None:
        source = self.path / name
        if not source.is_file():
            return None
        try:
            content = json.loads(source.read_text("utf-8"))
        except (ValueError, OSError) as error:
            self.problems.append(f"{name} cannot be read: {error}")
            return None
        if not isinstance(content, dict):
            self.problems.append(f"{name} holds a {type(content).__name__}, not an object.")
            return None
        return content

    def _table(self, name: str, columns: list[str]) -> Any:
        """A results table with at least these columns, or None with the reason noted."""
        source = self.path / "results" / name
        if not source.is_file():
            return None
        import polars as pl

        try:
            frame = pl.read_parquet(source)
        except (pl.exceptions.PolarsError, OSError) as error:
            self.problems.append(f"results/{name} cannot be read: {error}")
            return None
        absent = [column for column in columns if column not in frame.columns]
        if absent:
            self.problems.append(f"results/{name} lacks the columns {', '.join(absent)}.")
            return None
        return frame if frame.height else None

    def _read_curves(self) -> None:
        listed = self.summary.get("members")
        families = {
            int(m["index"]): m.get("family") for m in entries(listed) if isinstance(m.get("index"), int)
        }
        for folder in sorted(p.parent for p in self.path.glob("members/*/curve.json")):
            try:
                rows = json.loads((folder / "curve.json").read_text("utf-8"))
                epochs = [float(row["epoch"]) for row in rows]
                train, validation = (
                    [_number(row.get(key)) for row in rows] for key in ("train", "validation")
                )
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
                self.problems.append(f"members/{folder.name}/curve.json cannot be read: {error!r}")
                continue
            if not epochs:
                continue
            spec = self._json(f"members/{folder.name}/spec.json") or {}
            family = spec.get("family")
            if family is None and folder.name.isdigit():
                family = families.get(int(folder.name))
            self.curves.append(Curve(folder.name, str(family or "model"), epochs, train, validation))


def entries(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list; anything else is left out."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _number(value: Any) -> float:
    """A JSON number as float; NaN for null and for anything else."""
    return float(value) if isinstance(value, int | float) else float("nan")
