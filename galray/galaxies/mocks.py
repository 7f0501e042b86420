"""Mock galaxies as files: drawn, noised, written with their truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from galray.errors import GalrayError
from galray.provenance import write_atomic

__all__ = ["write_mock"]

_COLUMNS = {"x": "kpc", "y": "kpc", "z": "kpc", "vx": "km/s", "vy": "km/s", "vz": "km/s"}


def write_mock(model: str, stars: int, seed: int, velocity_error: float, path: Path) -> dict[str, Any]:
    """Draw stars of a model of the Gaia Challenge and write them.

    Arguments:
        model: Its name.
        stars: Number of stars.
        seed: Of every random number.
        velocity_error: Gaussian error added to each velocity, km/s.
        path: ``.dat`` (six columns without header), ``.ecsv``, ``.csv`` or ``.parquet`` (with ``velocity``
            along z and ``velocity_error`` too, so that `galray dwarf fit` reads it as it is).

    Returns:
        The model's truth in short.

    Raises:
        GalrayError: No such model, or a file name of no known form.
    """
    from galray.mocks.dwarfs import gaia_challenge

    if path.suffix not in (".dat", ".ecsv", ".csv", ".parquet"):
        raise GalrayError(f"{path}: no known form of a file", "end it in .dat, .ecsv, .csv or .parquet")
    sphere = gaia_challenge(model)
    w = sphere.sample_noisy(stars, seed, velocity_error=velocity_error).numpy()
    half = sphere.half_light_radius
    at = np.array([0.15, half])
    truth = {
        "R_half (kpc)": f"{half:.4g}",
        "rho(150 pc)": f"{sphere.density(at)[0]:.4g} Msun/kpc3",
        "M(<R_half)": f"{sphere.mass(at)[1]:.4g} Msun",
        "gamma(150 pc)": f"{-sphere.slope(at)[0]:.3f}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".dat":
        write_atomic(path, "".join(" ".join(f"{value:.8g}" for value in row) + "\n" for row in w))
        return truth
    from astropy.table import Table

    table = Table(meta={"model": model, "seed": seed, **truth})
    for at_column, (name, unit) in enumerate(_COLUMNS.items()):
        table[name] = w[:, at_column]
        table[name].unit = unit
    table["velocity"] = w[:, 5]
    table["velocity_error"] = np.full(stars, max(velocity_error, 1e-3))
    for name in ("velocity", "velocity_error"):
        table[name].unit = "km/s"
    if path.suffix == ".parquet":
        import polars as pl

        pl.DataFrame({name: np.asarray(table[name]) for name in table.colnames}).write_parquet(path)
    else:
        table.write(path, format="ascii.ecsv" if path.suffix == ".ecsv" else "ascii.csv", overwrite=True)
    return truth
