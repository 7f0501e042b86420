"""What an ensemble will cost by what members of a run have cost: time, devices, storage, points in MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galray.config import RunConfig
from galray.errors import GalrayError
from galray.rundir import Run, load_run, read_json
from galray.tracking.journal import numbers

__all__ = ["MemberCost", "ensemble_plan", "measured_costs"]


@dataclass(frozen=True)
class MemberCost:
    """Means over the finished members of one family.

    Attributes:
        members: How many there were.
        stars: Stars that each saw.
        star_epoch_seconds: Time of one star in one epoch.
        fixed_seconds: What does not grow with stars and epochs: the fit of Φ, the evaluation, start-up.
        bytes: What each left on disk.
        weights_bytes: What of it MLflow keeps too.
        epoch_points: Numbers of an epoch in its curve.
        final_points: Numbers at its end.
        host: Where one of them ran.
    """

    members: int
    stars: float
    star_epoch_seconds: float
    fixed_seconds: float
    bytes: float
    weights_bytes: float
    epoch_points: float
    final_points: float
    host: str

    def seconds(self, stars: float, epochs: int) -> float:
        """Time of a member with so many stars and epochs."""
        return self.fixed_seconds + self.star_epoch_seconds * stars * epochs

    def points(self, epochs: int) -> float:
        """Numbers that such a member gives MLflow."""
        return self.final_points + self.epoch_points * epochs


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measured_costs(run: Run) -> dict[str, MemberCost]:
    """What the finished members of a run have cost, by family; empty where none is finished."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted((run.folder / "members").glob("[0-9][0-9][0-9]*")):
        if not (folder / "result.json").is_file() or folder.suffix == ".tmp":
            continue
        record, spec = read_json(folder / "result.json"), read_json(folder / "spec.json")
        curve = read_json(folder / "curve.json") if (folder / "curve.json").is_file() else []
        if record["status"] != "finished" or not curve:
            continue
        stars = float(record["result"].get("stars") or run.catalog.num_rows)
        training = min(float(curve[-1]["seconds"]), record["seconds"])
        found.setdefault(spec["family"], []).append(
            {
                "stars": stars,
                "star_epoch_seconds": training / (len(curve) * stars),
                "fixed_seconds": record["seconds"] - training,
                "bytes": _size(folder),
                "weights_bytes": _size(folder / "model") + _size(folder / "field"),
                "epoch_points": len(numbers(curve[-1])) - 1,
                "final_points": len(numbers(record["result"])) + 1,
                "host": record["host"],
            }
        )
    return {family: MemberCost(len(rows), **_means(rows)) for family, rows in found.items()}


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = [name for name in rows[0] if name != "host"]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names} | {"host": rows[0]["host"]}


def ensemble_plan(config: RunConfig, rates: str | Path | None = None) -> dict[str, str]:
    """The members of an ensemble, and what they will take by the measured costs of others.

    Arguments:
        config: The ensemble.
        rates: A run directory whose members were measured; the configuration's own where not given.

    Returns:
        One line per subject.

    Raises:
        GalrayError: No finished member of a family is there to measure by.
    """
    from galray.ensemble import design
    from galray.planning import wanted_members

    source = _measured_run(config, rates)
    costs = measured_costs(source)
    settings = config.ensemble
    specs = [spec for spec in design(wanted_members(config), config.seed) if spec.family != "moments"]
    stars = _stars(config, source)
    lines, seconds, stored, kept, points = {}, 0.0, 0.0, 0.0, 0.0
    for family in dict.fromkeys(spec.family for spec in specs):
        cost = costs.get(family)
        if cost is None:
            raise GalrayError(
                f"{source.folder}: no finished member of {family} to measure by",
                f"train one (galray train {family} CONFIG), or name another run with --rates",
            )
        mine = [spec for spec in specs if spec.family == family]
        kinds = {kind: sum(s.varied == kind for s in mine) for kind in dict.fromkeys(s.varied for s in mine)}
        training = getattr(config.training, family)
        each = cost.seconds(stars, training.epochs)
        lines[family] = (
            f"{len(mine):,} members ({', '.join(f'{kind} {count}' for kind, count in kinds.items())}), "
            f"{each:.3g} s each for {stars:,.0f} stars and {training.epochs} epochs"
        )
        seconds += len(mine) * each * max(training.max_workers, 1)
        stored += len(mine) * cost.bytes
        kept += len(mine) * cost.weights_bytes * config.tracking.weights
        points += len(mine) * cost.points(training.epochs)
    hours = seconds / 3600
    devices = settings.gpus_per_member
    lines["members"] = f"{len(specs):,} networks"
    lines["GPU-hours"] = f"{hours * devices:,.4g} ({devices:g} of a GPU per member)"
    lines["CPU-hours"] = f"{hours * settings.cpus_per_member:,.4g}"
    lines["wall"] = f"{hours:,.4g} h one after another; divide by the members that run at a time"
    lines["storage"] = f"{stored / 1e9:,.3g} GB of members, {kept / 1e9:,.3g} GB more in MLflow"
    lines["MLflow"] = f"{len(specs) + 1:,} runs, {points:,.0f} points" if config.tracking.enabled else "off"
    measured = ", ".join(f"{cost.members} {family} on {cost.host}" for family, cost in costs.items())
    lines["measured"] = f"on members of {source.folder.name}: {measured}; time grows with stars and epochs"
    return lines


def _measured_run(config: RunConfig, rates: str | Path | None) -> Run:
    try:
        return load_run(rates or config.place.location, config.catalog.storage.signed)
    except GalrayError:
        if rates is not None:
            raise
        raise GalrayError(
            f"{config.place.location}: no run to measure by",
            "train one member (galray train score CONFIG), or name a measured run with --rates",
        ) from None


def _stars(config: RunConfig, source: Run) -> float:
    """How many stars a member will see: those of the run where it is made, else in proportion."""
    rows = float(source.catalog.num_rows)
    if config.mock is not None and source.config.mock is not None:
        return rows * config.mock.galaxy.num_stars / source.config.mock.galaxy.num_stars
    return rows * config.catalog.sample / source.config.catalog.sample
