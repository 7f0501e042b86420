"""The mock galaxies of a calibration: drawn from its prior, and the run that measures each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from galray.calibration.settings import CalibrationSettings, PriorSettings
from galray.catalog.mirror import Place, open_place
from galray.catalog.storage import is_url
from galray.config import MockSettings, RunConfig
from galray.errors import GalrayError
from galray.mocks import MilkyWaySettings
from galray.provenance import content_hash
from galray.seeds import seed_for, seed_sequence

__all__ = [
    "cache_place",
    "check",
    "differences",
    "draw",
    "galaxy_config",
    "mock_config",
    "outside",
    "procedure",
]

_CATALOG = (
    "frame",
    "ball",
    "num_shards",
    "cuts",
    "require_rv",
    "distance",
    "edsd",
    "tracer",
    "completeness",
    "sample",
)
"""What of [catalog] shapes the sample of stars, and not where they come from."""
_MARGIN = 1.05  # errors scatter stars in as well as out
_NEVER = ("disequilibrium", "non_axisymmetric", "systematics")


def cache_place(config: RunConfig) -> Place:
    """Where simulated galaxies and finished measurements are kept for all calibrations."""
    if given := config.calibration.cache:
        given_at = given if is_url(given) else Path(given).expanduser()
        return open_place(given_at, config.catalog.storage.signed)
    return config.model_copy(update={"name": "calibration-cache"}).place


def check(config: RunConfig) -> None:
    """Look for what cannot be calibrated before anything is simulated.

    Raises:
        GalrayError: The vertical inversion, distances joined from elsewhere, or a ball beyond the mocks'.
    """
    if "vertical" in config.methods:
        raise GalrayError(
            "methods: the vertical inversion has no calibration", "calibrate flow, score or moments"
        )
    if config.catalog.distance == "joined":
        raise GalrayError(
            "catalog.distance = 'joined': mock stars are in no other catalogue",
            "calibrate with inverse_parallax or edsd",
        )
    assert config.catalog.ball is not None
    most = next(m.le for m in MilkyWaySettings.model_fields["ball_radius_kpc"].metadata if hasattr(m, "le"))
    reach = config.catalog.ball.radius_kpc + config.catalog.ball.margin_kpc
    if reach * _MARGIN > most:
        raise GalrayError(
            f"catalog.ball reaches to {reach:g} kpc with its margin: mock galaxies fill balls up to "
            f"{most / _MARGIN:.3g} kpc",
            "calibrate in a smaller ball",
        )


def draw(prior: PriorSettings, seed: int) -> dict[str, float]:
    """One galaxy's numbers, each even between its ends, by the prior's names."""
    rng = np.random.default_rng(seed_sequence(seed, "prior"))
    return {name: float(low + (high - low) * rng.random()) for name, (low, high) in prior}


def mock_config(config: RunConfig, index: int) -> RunConfig:
    """The run that measures one mock galaxy as `config` would measure real stars.

    Its name is its content hash: the same galaxy measured in the same way, whichever calibration asks.

    Arguments:
        config: The configuration that is calibrated.
        index: Number of the mock, from 0.
    """
    settings, catalog = config.calibration, config.catalog
    assert catalog.ball is not None
    seed = seed_for(config.seed, "calibration", index)
    reach = catalog.ball.radius_kpc + catalog.ball.margin_kpc
    galaxy = _galaxy(settings, reach, draw(settings.prior, seed))
    kept = catalog.model_dump(mode="json", include=set(_CATALOG))
    values = config.model_dump(
        mode="json", exclude={"mock", "catalog", "calibration", "description", "blind"}
    )
    values |= {
        "name": "mock",
        "output": cache_place(config).below("measurements").location,
        "seed": seed,
        "mock": MockSettings(galaxy=galaxy, observe=settings.observe, rows_per_file=10**7).model_dump(),
        # Mocks lie with the run's own results, whose credentials public star files may do without.
        "catalog": kept | {"views": ["shards"], "storage": catalog.storage.signed.model_dump()},
        "cluster": {"enabled": False},
        "tracking": {"enabled": False},
    }
    values["gravity"]["baryons"] = _baryons(config, galaxy, seed)
    run = RunConfig.model_validate(values)
    content = [procedure(run), values["gravity"]["baryons"], run.seed, galaxy_config(run).name]
    return run.model_copy(update={"name": content_hash(content)})


def galaxy_config(run: RunConfig) -> RunConfig:
    """The run that simulates the galaxy of `run` alone: the same whatever will be measured on it."""
    assert run.mock is not None
    frame = run.catalog.frame
    name = content_hash([run.mock.model_dump(mode="json"), run.seed, frame.model_dump(mode="json")])
    return RunConfig.model_validate(
        {
            "name": name,
            "output": f"{run.output.rpartition('/')[0]}/galaxies",
            "seed": run.seed,
            "mock": run.mock.model_dump(),
            "catalog": {
                "frame": frame.model_dump(),
                "ball": {"radius_kpc": 4.0},
                "storage": run.catalog.storage.model_dump(),
            },
            "cluster": {"enabled": False},
            "tracking": {"enabled": False},
        }
    )


def procedure(config: RunConfig) -> dict[str, Any]:
    """What a measurement is done with, as JSON: equal for the calibration and the runs it holds for."""
    networks = [name for name in config.methods if name in ("flow", "score")]
    unused = {"flow", "score", "moments"}.difference(config.methods)
    resources = {"concurrent", "cpus_per_member", "gpus_per_member", "threads", "max_crashes"}
    return {
        "methods": sorted(config.methods),
        "catalog": config.catalog.model_dump(mode="json", include=set(_CATALOG)),
        "gravity": config.gravity.model_dump(mode="json", exclude={"baryons"}),
        "places": config.places.model_dump(mode="json"),
        "ensemble": config.ensemble.model_dump(mode="json", exclude=unused | resources),
        "training": {name: getattr(config.training, name).model_dump(mode="json") for name in networks},
        **{name: getattr(config, name).model_dump(mode="json") for name in networks},
    }


def outside(config: RunConfig) -> list[str]:
    """Terms of a budget that the mocks do not exercise, so that nothing is learnt of them.

    The mock galaxies are in equilibrium and axially symmetric, observed with the zero point and the Sun's
    motion that they are measured with; and what is subtracted as baryons is exactly theirs, unless the
    configuration gives the mass of a model with an error, which their own is then drawn from.
    """
    baryons = config.gravity.baryons
    drawn = baryons.model == "potential" and baryons.relative_error > 0
    return [*_NEVER, *([] if drawn else ["baryons"])]


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """The dotted keys in which two procedures differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = sorted({*first, *second})
        return [d for k in keys for d in differences(first.get(k), second.get(k), f"{where}.{k}".lstrip("."))]
    return [] if first == second else [where]


def _galaxy(settings: CalibrationSettings, ball: float, truth: dict[str, float]) -> MilkyWaySettings:
    thin, halo = truth["thin_disc_fraction"], truth["stellar_halo_fraction"]
    values = settings.galaxy.model_dump()
    values["ball_radius_kpc"] = round(_MARGIN * ball, 6)
    values["potential"] |= {name: truth[name] for name in values["potential"] if name in truth}
    values["thin_disc"]["fraction"] = thin
    values["stellar_halo"]["fraction"] = halo
    values["thick_disc"]["fraction"] = 1 - thin - halo
    return MilkyWaySettings.model_validate(values)


def _baryons(config: RunConfig, galaxy: MilkyWaySettings, seed: int) -> dict[str, Any]:
    """The mock's own baryons, known no better than the configuration says that baryons are.

    A table of layers cannot hold for galaxies of other discs: its error is left out of the calibration.
    """
    baryons = config.gravity.baryons
    error = baryons.relative_error if baryons.model == "potential" else 0.0
    if not error:
        return {"model": "potential"}
    from galray.mocks import MilkyWay

    # The factor of the true mass over the assumed one is log-normal, as the run draws it.
    spread = np.sqrt(np.log1p(error**2))
    factor = float(
        np.exp(spread * np.random.default_rng(seed_sequence(seed, "baryons")).normal() - spread**2 / 2)
    )
    assumed = MilkyWay(galaxy, config.catalog.frame.build()).baryons.to_dict()
    for part in assumed["components"].values():
        part["m_tot"] /= factor
    return {"model": "potential", "potential": assumed, "relative_error": error}
