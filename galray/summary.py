"""From the members' values to the tables of a run: summary.json, profiles, maps, the error budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galray.config import RunConfig
from galray.ensemble import Estimate
from galray.provenance import write_atomic
from galray.results import HEADLINE, Places, Quantity
from galray.seeds import seed_sequence
from galray.tables import write_table
from galray.units import GEV_PER_CM3

__all__ = [
    "headline",
    "quantity_rows",
    "run_header",
    "truth_values",
    "wide_tables",
    "write_samples",
    "write_summary",
    "write_tables",
]


def truth_values(truth: Mapping[str, Any], places: Places, kernel: Any) -> np.ndarray:
    """The exact values of every quantity, densities smoothed with the run's own kernel.

    Arguments:
        truth: The mock's ``truth.json``.
        places: Where the run measures.
        kernel: The density kernel.
    """
    import torch

    from galray import potentials
    from galray.gravity import smooth

    x = torch.from_numpy(places.x)
    total = potentials.from_dict(truth["potential"])
    baryons = potentials.from_dict(truth["baryons"])
    acceleration = np.asarray(total.acceleration(x))
    density = np.asarray(smooth(total.mass_density, x, kernel))
    return places.values(acceleration, density, np.asarray(smooth(baryons.mass_density, x, kernel)))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def quantity_rows(
    places: Places, estimates: Mapping[str, Estimate], truth: np.ndarray | None
) -> list[dict[str, Any]]:
    """Tabulated quantities (not the profiles) of every method, as summary.json holds them."""
    rows = []
    for i, quantity in enumerate(places.quantities):
        if quantity.profile is not None:
            continue
        for method, estimate in estimates.items():
            if np.isfinite(estimate.value[i]):
                rows.append(_row(quantity, method, estimate, i, truth))
    return rows


def _row(q: Quantity, method: str, estimate: Estimate, i: int, truth: np.ndarray | None) -> dict[str, Any]:
    value, error = float(estimate.value[i]), float(estimate.error[i])
    if not estimate.terms:
        error = float("nan")  # one member alone knows nothing of its error, which is not an error of zero
    true = None if truth is None else float(truth[i])
    return {
        "name": q.name,
        "label": q.label,
        "where": q.where,
        "x": list(q.position) if q.position else None,
        "method": method,
        "value": value,
        "error": _number(error),
        "truth": true,
        "pull": None if true is None or not error > 0 else (value - true) / error,
        "unit": q.unit,
    }


def headline(
    places: Places, estimates: Mapping[str, Estimate], truth: np.ndarray | None, kernel: Any
) -> dict[str, Any]:
    """The run's one number, in both units, with the terms of its error."""
    i = places.index(HEADLINE)
    estimate = estimates["combined"]
    row = _row(places.quantities[i], "combined", estimate, i, truth)
    return {
        "name": HEADLINE,
        "label": "Local dark matter density",
        "value": row["value"],
        "error": row["error"],
        "unit": "Msun/pc3",
        "value_gev": row["value"] * GEV_PER_CM3,
        "error_gev": None if row["error"] is None else row["error"] * GEV_PER_CM3,
        "truth": row["truth"],
        "truth_gev": None if row["truth"] is None else row["truth"] * GEV_PER_CM3,
        "pull": row["pull"],
        "where": row["where"],
        "kernel_kpc": list(kernel.h),
        "terms": [
            {
                "term": name,
                "error": float(estimate.term_error(name)[i]),
                "uncertainty": float(estimate.term_uncertainty(name)[i]),
                "count": term.count,
            }
            for name, term in estimate.terms.items()
        ],
        "methods": [
            {
                key: _row(places.quantities[i], method, e, i, truth)[key]
                for key in ("method", "value", "error")
            }
            for method, e in estimates.items()
            if method != "combined"
        ],
    }


def run_header(config: RunConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary says of the run itself."""
    return {
        "name": config.name,
        "description": config.description,
        "created": provenance["created"],
        "seed": config.seed,
        "config_hash": config.hash,
        "galray": provenance["galray"],
        "git": provenance["git"],
    }


def budget_rows(places: Places, estimates: Mapping[str, Estimate]) -> list[dict[str, Any]]:
    """Every term of the error of every tabulated quantity and method, with its count."""
    keep = {q.key for q in places.quantities if q.profile is None}
    keys, units = [q.key for q in places.quantities], [q.unit for q in places.quantities]
    return [row for e in estimates.values() for row in e.rows(keys, units) if row["quantity"] in keep]


def write_tables(
    folder: Path,
    places: Places,
    estimates: Mapping[str, Estimate],
    truth: np.ndarray | None,
    maps: Mapping[str, Mapping[str, np.ndarray]],
    more_cells: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the tables of a run into its results folder.

    Long ones, a row per value: profiles.parquet, maps.parquet, quantities.ecsv, budget.ecsv. Wide ones with
    a unit per column, as ECSV and Parquet: vertical, radial and radial_dm (a row per method and position)
    and places (a row per method and tabulated place).

    Arguments:
        folder: ``results/`` of the run.
        places: Where the run measured.
        estimates: Of every method and combined.
        truth: True values (Q,), for a mock.
        maps: For each method, ``a_R``, ``a_z`` and ``rho`` at the map's positions, in reported units.
        more_cells: Further rows of maps.parquet.
    """
    import polars as pl
    from astropy.table import QTable

    profiles = []
    for i, quantity in enumerate(places.quantities):
        if quantity.profile is None:
            continue
        for method, estimate in estimates.items():
            if np.isfinite(estimate.value[i]):
                row = _row(quantity, method, estimate, i, truth)
                profiles.append(
                    {
                        "profile": quantity.profile,
                        "coordinate": quantity.coordinate,
                        "quantity": quantity.name,
                        **{key: row[key] for key in ("method", "value", "error", "truth")},
                    }
                )
    schema = {"profile": pl.String, "coordinate": pl.Float64, "quantity": pl.String, "method": pl.String}
    schema |= dict.fromkeys(("value", "error", "truth"), pl.Float64)
    pl.DataFrame(profiles, schema=schema).write_parquet(folder / "profiles.parquet")

    cells = [
        {"map": "x-z", "quantity": name, "method": method, "u": u, "v": v, "value": value, "error": None}
        for method, arrays in maps.items()
        for name, values in arrays.items()
        for (u, _, v), value in zip(places.x[places.map_rows], values.tolist(), strict=True)
        if np.isfinite(value)
    ]
    schema = {"map": pl.String, "quantity": pl.String, "method": pl.String}
    schema |= dict.fromkeys(("u", "v", "value", "error"), pl.Float64)
    pl.DataFrame([*cells, *more_cells], schema=schema).write_parquet(folder / "maps.parquet")

    for name, table in wide_tables(places, estimates, truth).items():
        for ending in ("ecsv", "parquet"):
            write_table(table, folder / f"{name}.{ending}")

    for name, rows in (
        ("quantities", quantity_rows(places, estimates, truth)),
        ("budget", budget_rows(places, estimates)),
    ):
        plain = [{k: (np.nan if v is None else v) for k, v in row.items() if k != "x"} for row in rows]
        table = QTable(
            rows=plain, meta={"description": f"galray {name}; value and error in the unit of each row"}
        )
        temporary = folder / f".{name}.tmp.ecsv"
        table.write(temporary, format="ascii.ecsv", overwrite=True)
        temporary.replace(folder / f"{name}.ecsv")


NUM_SAMPLES = 1000
"""Posterior samples of ρ_DM that a run keeps."""


def write_samples(folder: Path, places: Places, estimate: Estimate, seed: int) -> None:
    """Write samples of ρ_DM at all positions together, as ``rho_dm_samples.parquet``.

    A row is one sample, a column one quantity by its key, in Msun/pc³; draws from the normal distribution
    with the estimate's whole covariance over positions: any average or fit of them has the right error.

    Arguments:
        folder: ``results/`` of the run.
        places: Where the run measured.
        estimate: Of all methods together.
        seed: The run's root seed.
    """
    import polars as pl

    rows = [
        i
        for i, quantity in enumerate(places.quantities)
        if quantity.name.startswith("rho_dm") and np.isfinite(estimate.value[i])
    ]
    if not estimate.terms or not rows:
        return
    eigenvalues, vectors = np.linalg.eigh(estimate.covariance[np.ix_(rows, rows)])
    root = vectors * np.sqrt(np.clip(eigenvalues, 0.0, None))
    normal = np.random.default_rng(seed_sequence(seed, "samples")).standard_normal((NUM_SAMPLES, len(rows)))
    samples = estimate.value[rows] + normal @ root.T
    names = [places.quantities[i].key for i in rows]
    pl.DataFrame(dict(zip(names, samples.T, strict=True))).write_parquet(folder / "rho_dm_samples.parquet")


def wide_tables(
    places: Places, estimates: Mapping[str, Estimate], truth: np.ndarray | None
) -> dict[str, Any]:
    """The quantities as astropy QTables: a row per method and place, a column with its unit per quantity.

    Arguments:
        places: Where the run measured.
        estimates: Of every method and combined.
        truth: True values (Q,), for a mock; they make rows of the method ``truth``.
    """
    from astropy import units as u
    from astropy.table import QTable

    groups: dict[str, list[int]] = {}
    for i, quantity in enumerate(places.quantities):
        groups.setdefault(quantity.profile or "places", []).append(i)
    nothing = np.full(places.num_values, np.nan)
    methods = {m: (e.value, e.error if e.terms else nothing) for m, e in estimates.items()}
    if truth is not None:
        methods["truth"] = (truth, nothing)
    tables = {}
    for name, members in groups.items():
        keys = list(dict.fromkeys(_place(places.quantities[i]) for i in members))
        slot = {(_place(q), q.name): i for i in members for q in [places.quantities[i]]}
        table = QTable()
        table["method"] = [method for method in methods for _ in keys]
        if name == "places":
            table["where"] = [key for _ in methods for key in keys]
        else:
            label = "z" if name == "vertical" else "R"
            table[label] = np.array([key for _ in methods for key in keys], dtype=float) * u.kpc
        for symbol in dict.fromkeys(places.quantities[i].name for i in members):
            rows = [slot.get((key, symbol)) for key in keys]
            unit = u.Unit(next(places.quantities[i].unit for i in rows if i is not None))
            for part, suffix in ((0, ""), (1, "_error")):
                column = [np.nan if i is None else pair[part][i] for pair in methods.values() for i in rows]
                table[f"{symbol}{suffix}"] = np.array(column, dtype=float) * unit
        table.meta["description"] = f"galray results: {name}; rows of NaN errors carry none"
        tables[name] = table
    return tables


def _place(quantity: Quantity) -> Any:
    return quantity.where if quantity.profile is None else quantity.coordinate


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, whole or not at all."""
    write_atomic(folder / "summary.json", _finite(summary))


def _finite(value: Any) -> Any:
    """The same content with None for every number that is not finite: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
