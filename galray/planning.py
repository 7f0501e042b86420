"""What a run will read, train and write, before it does; and what a run on a part says of the whole."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from galray.config import RunConfig, with_values
from galray.errors import GalrayError

if TYPE_CHECKING:
    from galray.ensemble import EnsembleSettings
    from galray.rundir import Run

__all__ = ["extrapolate", "parse_fraction", "plan", "preflight", "sample_config", "wanted_members"]

NUM_FILES_LOOKED_AT = 16
"""How many input files are opened before a run starts; the others follow when they are read."""


def plan(config: RunConfig) -> dict[str, str]:
    """What a run would do, one line per subject (``--dry-run``).

    Raises:
        GalrayError: As `preflight`.
    """
    from galray import catalog
    from galray.ensemble import design

    preflight(config)

    lines = {
        "run": f"{config.name} in {config.place.location} (config {config.hash})",
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
        lines["bytes"] = f"{found['bytes']:,}"
    lines["shards"] = f"{config.catalog.num_shards}"
    networks = set(config.methods) - {"vertical"}
    members = design(wanted_members(config), config.seed) if networks else []
    counts = {family: sum(m.family == family for m in members) for family in config.methods}
    lines["members"] = ", ".join(f"{family} {count}" for family, count in counts.items() if count) or "none"
    lines["devices"] = _devices(config)
    lines["tracking"] = (
        "off" if not config.tracking.enabled else config.tracking.uri or "sqlite beside the run directory"
    )
    return lines


def wanted_members(config: RunConfig) -> EnsembleSettings:
    """The design of the ensemble without the families that the run does not use."""
    from galray.ensemble import FamilyDesign

    families = ("flow", "score", "moments")
    unused = {name: FamilyDesign(seeds=0) for name in families if name not in config.methods}
    return config.ensemble.model_copy(update=unused)


def preflight(config: RunConfig) -> None:
    """Look for every mistake that can be seen before anything is started or written.

    Raises:
        GalrayError: Input files or columns are absent, the places do not fit into the ball, the baryons
            cannot be built, a method has no members, there are too few shards for a jackknife, or the
            calibration to apply is of something else.
    """
    kind = _look_at_files(config) if config.mock is None else _look_at_mock(config)
    if "vertical" in config.methods:
        return
    from galray import gravity
    from galray.ensemble import design
    from galray.results import Places

    designed = wanted_members(config)
    families = {name: getattr(designed, name) for name in ("flow", "score", "moments")}
    for name in config.methods:
        if not families[name].seeds:
            raise GalrayError(
                f"methods: {name} has no members", f"set ensemble.{name}.seeds = 1, or take it out of methods"
            )
        if kind == "states" and families[name].draws:
            raise GalrayError(
                f"ensemble.{name}.draws = {families[name].draws}: 6D tables have no errors to draw",
                f"set ensemble.{name}.draws = 0",
            )
    design(designed, config.seed)
    for key, one in designed.hyperparameters.items():
        for corner in one.corners:
            with_values(config, {key: corner}, f"ensemble.hyperparameters.{key}")
    if designed.score.blocks == "sky" and config.training.score.max_workers > 1:
        raise GalrayError(
            'ensemble.score.blocks = "sky": patches are weighed in one process',
            "set training.score.workers = 1",
        )
    if "moments" in config.methods and config.catalog.num_shards < 3:
        raise GalrayError(
            f"catalog.num_shards = {config.catalog.num_shards}: a jackknife leaves out one shard at a time",
            "set catalog.num_shards = 3 or more",
        )
    assert config.catalog.ball is not None
    kernel = gravity.Kernel.from_settings(config.gravity.kernel)
    frame, center = config.catalog.frame.build(), config.catalog.ball_center()
    Places(config.places, frame, center, config.catalog.ball.radius_kpc, kernel.reach)
    if config.mock is None:
        gravity.build(config.gravity.baryons)
    if config.calibration.apply:
        from galray.calibration.inflation import read_calibration

        read_calibration(config)


def _look_at_files(config: RunConfig) -> str:
    """Open the first input files and look for the columns that the configuration needs; their kind."""
    from itertools import islice

    from galray.catalog import input_units
    from galray.catalog.ingest import good_sources

    good = good_sources(input_units(config.catalog), config.catalog)
    kinds = [kind for _, kind in islice(good, NUM_FILES_LOOKED_AT)]
    return kinds[0]


def _look_at_mock(config: RunConfig) -> str:
    """Look for the columns that the configuration needs among those that the mock's files will have."""
    from galray.catalog.columns import columns
    from galray.catalog.readers import Source
    from galray.catalog.selection import Selection

    names = {column.name: column.name for column in columns("dr3")}
    source = Source(config.run_dir / "mock", "csv", names, "dr3", True)
    Selection(config.catalog, source, "0" * 8, config.seed)
    return "gaia"


def _devices(config: RunConfig) -> str:
    import torch

    gpus = torch.cuda.device_count()
    where = config.cluster.address or "this machine"
    workers = max(config.training.flow.max_workers, config.training.score.max_workers)
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
    """The configuration of a run on a part: its own run directory, a part of the stars.

    Of a mock only that part is generated; of files every star is read and that part kept.
    """
    fraction = parse_fraction(text)
    changes: dict[str, Any] = {"name": f"{config.name}-sample-{100 * fraction:g}pct"}
    if config.mock is not None:
        galaxy = config.mock.galaxy
        fewer = galaxy.model_copy(update={"num_stars": max(round(galaxy.num_stars * fraction), 1)})
        changes["mock"] = config.mock.model_copy(update={"galaxy": fewer})
    else:
        changes["catalog"] = config.catalog.model_copy(update={"sample": config.catalog.sample * fraction})
    return config.model_copy(update=changes)


def extrapolate(run: Run, text: str) -> list[str]:
    """Time and cost of the whole from the measured stages of a part.

    The moments, and the epochs of every training, grow in proportion to the number of stars; the fits of a
    member that show a fixed number of stars, its evaluation, and all other stages do not.
    """
    fraction = parse_fraction(text)
    stages = run.stage_seconds
    # A part of a mock is generated and read as a part; of files every row is read, since only the hash of a
    # star's identifier tells whether it belongs to the part.
    scaling = ("mock", "catalog", "moments") if run.config.mock is not None else ("moments",)
    growth = dict.fromkeys(scaling, 1 / fraction) | {"members": _growth_of_members(run, fraction)}
    total = sum(seconds * growth.get(name, 1.0) for name, seconds in stages.items())
    cores = run.provenance["machine"]["cores"]
    hours = total * cores / 3600
    dollars = hours * run.config.cost.dollars_per_core_hour
    parts = ", ".join(f"{name} {s:.0f} s" for name, s in stages.items())
    return [
        f"measured on {100 * fraction:g}%: {parts}",
        f"extrapolated to all: {total / 60:.1f} min on {cores} cores, {hours:.2f} core-hours, "
        f"about {dollars:.2f} dollars at {run.config.cost.dollars_per_core_hour:g} per core-hour",
    ]


def _growth_of_members(run: Run, fraction: float) -> float:
    """How much longer the members take on all stars: their epochs grow, the rest of them does not."""
    from galray.rundir import read_json

    whole = epochs = 0.0
    for result in (run.folder / "members").glob("[0-9]*/result.json"):
        whole += read_json(result)["seconds"]
        curve = result.parent / "curve.json"
        rows = read_json(curve) if curve.is_file() else []
        epochs += rows[-1]["seconds"] if rows else 0.0  # since the training began
    return 1.0 if whole == 0 else 1.0 + (1 / fraction - 1) * min(epochs / whole, 1.0)
