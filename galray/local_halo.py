"""Halo profiles fitted to the dark matter densities of a run, with their whole covariance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from galray.ensemble import Estimate
from galray.gravity import HaloSettings, fit_profile
from galray.results import Places
from galray.tables import write_table
from galray.units import MSUN_PC3

__all__ = ["fit_haloes", "halo_rows", "write_halo"]

MIN_POSITIONS = 4


def halo_rows(places: Places, settings: HaloSettings) -> list[int]:
    """The quantities that a halo is fitted to: ρ_DM at single positions clear of the disc."""
    low, high = settings.min_height_kpc, settings.max_height_kpc
    seen: set[tuple[float, ...]] = set()
    rows = []
    for i, quantity in enumerate(places.quantities):
        if quantity.name != "rho_dm" or quantity.position is None:
            continue
        place = tuple(np.round(quantity.position, 9).tolist())
        if low - 1e-9 <= abs(place[2]) <= high + 1e-9 and place not in seen:
            seen.add(place)
            rows.append(i)
    return rows


def fit_haloes(
    settings: HaloSettings,
    places: Places,
    kernel: Any,
    estimates: Mapping[str, Estimate],
    truth: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Every profile fitted to every method's densities.

    Arguments:
        settings: Profiles, priors and the heights that enter.
        places: Where the run measured.
        kernel: The kernel that smoothed the densities; the profiles are smoothed with it too.
        estimates: Of every method and combined, baryons' errors included.
        truth: True values (Q,), for a mock: the same fit to them tells what perfect densities would give.

    Returns:
        One entry per method and profile: χ², degrees of freedom, positions, and a row per parameter.
    """
    rows = halo_rows(places, settings)
    if len(rows) < MIN_POSITIONS:
        return []
    x = np.array([places.quantities[i].position for i in rows])
    found = []
    for method, estimate in estimates.items():
        covariance = estimate.covariance[np.ix_(rows, rows)]
        value = estimate.value[rows]
        if not estimate.terms or not np.isfinite(value).all() or not (np.diag(covariance) > 0).all():
            continue
        for profile in settings.profiles:
            common = {"kernel": kernel, "reference_radius": places.frame.sun_radius}
            scaled = covariance * MSUN_PC3**2
            fit = fit_profile(x, value * MSUN_PC3, scaled, profile, settings, **common)
            exact = None
            if truth is not None:
                exact = fit_profile(x, truth[rows] * MSUN_PC3, scaled, profile, settings, **common)
            parameters = fit.rows()
            for row in parameters:
                row["truth"] = None if exact is None else exact.value(row["parameter"])
                if row["parameter"] == "density":
                    row |= {key: _per_pc3(row[key]) for key in ("value", "error", "truth")}
                    row["unit"] = "solMass / pc3"
            found.append(
                {
                    "method": method,
                    "profile": profile,
                    "chi2": fit.chi2,
                    "dof": fit.dof,
                    "positions": len(rows),
                    "parameters": parameters,
                }
            )
    return found


def _per_pc3(value: float | None) -> float | None:
    return None if value is None else value / MSUN_PC3


def write_halo(folder: Path, fits: list[dict[str, Any]]) -> None:
    """Write the fits as ``halo.ecsv`` and ``halo.parquet``: a row per method and profile, with units."""
    from astropy import units as u
    from astropy.table import QTable

    if not fits:
        return
    units = {row["parameter"]: row["unit"] for fit in fits for row in fit["parameters"]}
    table = QTable(
        {key: [fit[key] for fit in fits] for key in ("method", "profile", "chi2", "dof", "positions")}
    )
    for name, unit in units.items():
        found = [{row["parameter"]: row for row in fit["parameters"]}.get(name, {}) for fit in fits]
        for key, suffix in (("value", ""), ("error", "_error"), ("prior", "_prior"), ("learned", "_learned")):
            column = np.array([np.nan if row.get(key) is None else row[key] for row in found], dtype=float)
            if np.isfinite(column).any():
                scale = 1 if key == "learned" else u.Unit(unit)
                table[f"{name}{suffix}"] = column * scale if unit and key != "learned" else column
    table.meta["description"] = (
        "galray halo fits; learned: part of the prior's variance that the data removed"
    )
    for ending in ("ecsv", "parquet"):
        write_table(table, folder / f"halo.{ending}")
