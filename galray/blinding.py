"""A hidden offset on every reported density, until the analysis is fixed and the run is unblinded.

With `blind = true` a run reports ρ and ρ_DM with one constant added, drawn from the run's seed and written
nowhere: analyses of the same seed compare, and nobody tunes towards a number. Errors and differences are the
true ones, and accelerations are shown as measured. It keeps eyes off the value, not burglars.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from galray.config import RunConfig
from galray.ensemble import Estimate
from galray.errors import GalrayError
from galray.provenance import now, write_atomic
from galray.results import Places
from galray.seeds import seed_sequence

__all__ = ["MARKER", "blinded", "hidden_offset", "is_blind", "open_envelope"]

MARKER = "unblinded.json"
"""The file in a run directory that says when it was unblinded."""
_LARGEST = 0.01
"""Of the offset, Msun/pc³: as large as the density itself."""


def is_blind(config: RunConfig, folder: Path) -> bool:
    """Whether a run's densities are reported with the offset."""
    return config.blind and not (folder / MARKER).is_file()


def hidden_offset(config: RunConfig, folder: Path) -> float:
    """What is added to every reported density, Msun/pc³; zero unless the run is blind."""
    if not is_blind(config, folder):
        return 0.0
    rng = np.random.default_rng(seed_sequence(config.seed, "blind"))
    # Not so small that it would hide nothing.
    return float(rng.choice((-1.0, 1.0)) * rng.uniform(0.3, 1.0) * _LARGEST)


def blinded(estimate: Estimate, places: Places, offset: float) -> Estimate:
    """An estimate with the offset on every density, total and dark: they still differ by the baryons."""
    names = np.array([quantity.name for quantity in places.quantities])
    dense = np.char.startswith(names, "rho") & (names != "rho_baryons")
    return estimate.shifted(np.where(dense, offset, 0.0))


def open_envelope(folder: Path) -> None:
    """Note that a run is unblinded from now on.

    Raises:
        GalrayError: It is not blind.
    """
    from galray.rundir import load_run

    run = load_run(folder)
    if not run.config.blind:
        raise GalrayError(f"{folder}: was never blind", "its report shows the measured values")
    if not is_blind(run.config, run.folder):
        raise GalrayError(f"{folder}: is unblinded already", f"see {MARKER} in it")
    run.summary  # noqa: B018  (a run without results has nothing to unblind)
    write_atomic(run.folder / MARKER, {"unblinded": now()})
