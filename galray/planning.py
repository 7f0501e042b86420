"""What a run will read, train and write, before it does; and what a run on a part says of the whole."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from galray.config import RunConfig
from galray.errors import GalrayError

if TYPE_CHECKING:
    from galray.pipeline import Run

__all__ = ["extrapolate", "parse_fraction", "plan", "sample_config"]

# Per-star stages grow with the catalogue; the rest (start-up, evaluation, report) does not.
SCALING_STAGES = ("mock", "catalog", "ensemble", "moments")


def plan(config: RunConfig) -> dict[str, str]:
    """What a run would do, one line per subject (``--dry-run``).

    Raises:
        GalrayError: The input files are absent.
    """
    from galray import catalog
    from galray.ensemble import design

    lines = {
        "run": f"{config.name} in {config.run_dir} (config {config.hash})",
        "methods": ", ".join(config.methods),
    }
    if config.mock is not None:
        stars = config.mock.galaxy.num_stars
        lines["files"] = (
            f"{-(-stars // config.mock.rows_per_file)} or more, generated: {stars:,} mock stars in Gaia form"
        )
    else:
        found = catalog.plan(config.catalog)
        lines["files"] = f"{found['num_files']:,}"
        lines["bytes"] = f"{found['num_bytes']:,}"
    lines["shards"] = f"{config.catalog.num_shards}"
    members = [m for m in design(config.ensemble, config.seed) if m.family in config.methods]
    counts = {family: sum(m.family == family for m in members) for family in config.methods}
    lines["members"] = ", ".join(f"{family} {count}" for family, count in counts.items() if count) or "none"
    lines["devices"] = _devices(config)
    lines["tracking"] = (
        "off" if not config.tracking.enabled else config.tracking.uri or "sqlite beside the run directory"
    )
    return lines


def _devices(config: RunConfig) -> str:
    import torch

    gpus = torch.cuda.device_count()
    where = config.cluster.address or "this machine"
    workers = max(config.training.flow.workers, config.training.score.workers)
    return f"{where}: {gpus} GPU(s) seen here, {workers} training worker(s) per member"


def parse_fraction(text: str) -> float:
    """``1%`` or ``0.01`` as a fraction.

    Raises:
        GalrayError: It is neither, or not in (0, 1].
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e-?\d+)?)\s*(%?)\s*", text, re.IGNORECASE)
    try:
        value = float(match[1]) / (100 if match[2] else 1) if match else float("nan")
    except ValueError:
        value = float("nan")
    if not 0 < value <= 1:
        raise GalrayError(
            f"--sample {text}: not a part of the whole",
            "give a percentage such as 1% or a fraction such as 0.01",
        )
    return value


def sample_config(config: RunConfig, text: str) -> RunConfig:
    """The configuration of a run on a part: its own run directory, a part of the stars."""
    fraction = parse_fraction(text)
    changes: dict[str, Any] = {"name": f"{config.name}-sample-{100 * fraction:g}pct"}
    changes["catalog"] = config.catalog.model_copy(
        update={"sample_fraction": config.catalog.sample_fraction * fraction}
    )
    return config.model_copy(update=changes)


def extrapolate(run: Run, text: str) -> list[str]:
    """Time and cost of the whole from the measured stages of a part.

    Stages that pass over the stars are taken to grow in proportion to their number, the others not at all.
    """
    fraction = parse_fraction(text)
    stages = run.stage_seconds
    total = sum(s / fraction if name in SCALING_STAGES else s for name, s in stages.items())
    cores = run.provenance["machine"]["cores"]
    hours = total * cores / 3600
    dollars = hours * run.config.cost.dollars_per_core_hour
    parts = ", ".join(f"{name} {s:.0f} s" for name, s in stages.items())
    return [
        f"measured on {100 * fraction:g}%: {parts}",
        f"extrapolated to all: {total / 60:.1f} min on {cores} cores, {hours:.2f} core-hours, "
        f"about {dollars:.2f} dollars at {run.config.cost.dollars_per_core_hour:g} per core-hour",
    ]
