"""The run on local stars with a known selection: catalogue → vertical inversion → results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from galray.catalog import ShardStore
from galray.cluster import stream_shards
from galray.combination import account, sample_stars
from galray.config import RunConfig
from galray.errors import GalrayError
from galray.gravity.vertical import VerticalResult, VerticalSample, VerticalSettings, measure
from galray.provenance import write_atomic
from galray.results import ACCELERATION_UNIT, DENSITY_UNIT, SURFACE_UNIT
from galray.rundir import read_json
from galray.summary import run_header
from galray.units import GEV_PER_CM3, MSUN_PC3, G

__all__ = ["measure_local"]

# Published totals in the plane, with their sources; the report draws them beside the value.
MIDPLANE = (
    ("McKee et al. 2015", 0.097, 0.013, "arXiv:1509.05334"),
    ("Kalda & Green 2025 (Gaia DR3)", 0.086, 0.010, "arXiv:2507.03742"),
)
EXPECTED_RANGE = (0.08, 0.12)
SURFACE = 2 * np.pi * G * 1e6  # (km/s)²/kpc per Msun/pc²
Progress = Callable[[int, int], None]


def measure_local(
    config: RunConfig, folder: Path, store: ShardStore, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure a_z(z) and the total density in the plane, and write ``results/``.

    Stars with and without radial velocity both enter: the density is that of all of them.

    Arguments:
        config: The run's configuration.
        folder: The run directory.
        store: Its shards.
        progress: Called with (done, all) as the replicas of the compared inversions end.

    Raises:
        GalrayError: The effective areas are absent, or columns that the inversion needs were not kept.
    """
    assert config.vertical is not None
    import polars as pl

    names = [name for name in store.columns if name in SAMPLE_COLUMNS]
    parts = [store.table(names)]
    if store.no_rv is not None:
        parts.append(store.no_rv.table([name for name in names if name in store.no_rv.columns]))
    table = pl.concat(parts, how="diagonal_relaxed").sort("source_id")
    sample = VerticalSample.from_table(table, effective_area(config))
    settings = VerticalSettings.model_validate(config.vertical.model_dump(exclude={"effective_area"}))

    def mapper(function: Callable[[int], Any], numbers: Sequence[int]) -> Iterator[Any]:
        return stream_shards(function, numbers, progress=progress)

    result = measure(sample, settings, config.seed, mapper=mapper)

    results = folder / "results"
    results.mkdir(exist_ok=True)
    write_profiles(result, results / "profiles.parquet")
    write_tables(result, results)
    sample_stars(store, config.seed, results / "stars.parquet")
    content = summarise(config, folder, store, result)
    write_atomic(results / "summary.json", content)
    return {key: content["headline"][key] for key in ("value", "error")}


SAMPLE_COLUMNS = {
    "source_id",
    "ra",
    "dec",
    "parallax",
    "parallax_error",
    "pmra",
    "pmra_error",
    "pmdec",
    "pmdec_error",
    "pmra_pmdec_corr",
    "radial_velocity",
    "radial_velocity_error",
    "phot_g_mean_mag",
    "phot_bp_mean_mag",
    "phot_rp_mean_mag",
    "dust_correction",
    "cell",
}


def effective_area(config: RunConfig) -> Path:
    """The folder of effective areas: as configured, or ``eff_area`` beside the first star file."""
    assert config.vertical is not None
    given = config.vertical.effective_area
    folder = Path(given) if given else Path(config.catalog.files[0]).parent / "eff_area"
    if not folder.is_dir():
        raise GalrayError(
            f"vertical.effective_area: {folder} is not a folder",
            "name the folder of the sample's effective areas (eff_area_*.npz)",
        )
    return folder


def write_profiles(result: VerticalResult, path: Path) -> None:
    """a_z, K_z = |a_z| and ρ against height."""
    import polars as pl

    a_error = np.sqrt(np.diag(result.a_z_covariance))
    rows = []

    def add(method: str, quantity: str, z: float, value: float, error: float) -> None:
        row = {"profile": "vertical", "coordinate": float(z), "quantity": quantity, "method": method}
        rows.append(row | {"value": float(value), "error": float(error), "truth": None})

    def add_force(method: str, z: float, a_z: float, error: float) -> None:
        add(method, "a_z", z, a_z, error)
        add(method, "K_z", z, abs(a_z) / SURFACE, error / SURFACE)

    for i, z in enumerate(result.z):
        add_force("vertical", z, result.a_z[i], a_error[i])
        add("vertical", "rho", z, result.rho[i] / MSUN_PC3, result.rho_error[i] / MSUN_PC3)
    if (found := result.comparison) is not None:
        for method, (values, errors) in found.a_z.items():
            for z, a_z, error in zip(found.z, values, errors, strict=True):
                if z > 0:
                    add_force(method, z, a_z, error)
    schema = {"profile": pl.String, "coordinate": pl.Float64, "quantity": pl.String, "method": pl.String}
    schema |= dict.fromkeys(("value", "error", "truth"), pl.Float64)
    pl.DataFrame(rows, schema=schema).write_parquet(path)


def write_tables(result: VerticalResult, results: Path) -> None:
    """The estimators and groups, and the budget, as ECSV."""
    from astropy.table import Table

    for name, rows in (("estimators", result.estimators + result.groups), ("budget", result.terms)):
        keys = [key for row in rows for key in row]
        plain = [{key: row.get(key, np.nan) for key in dict.fromkeys(keys)} for row in rows]
        meta = {"description": "densities in solMass / pc3, total in the plane"}
        temporary = results / f".{name}.tmp.ecsv"
        Table(rows=plain, meta=meta).write(temporary, format="ascii.ecsv", overwrite=True)
        temporary.replace(results / f"{name}.ecsv")


def summarise(config: RunConfig, folder: Path, store: ShardStore, result: VerticalResult) -> dict[str, Any]:
    """The content of ``summary.json``."""
    record = read_json(folder / "provenance.json")
    a_error = np.sqrt(np.diag(result.a_z_covariance))
    sun = list(store.frame.sun_position)
    quantities: list[dict[str, Any]] = []

    def add(
        name: str, label: str, where: str, z: float, method: str, value: float, error: float, unit: str
    ) -> None:
        about = {"name": name, "label": label, "where": where, "x": [sun[0], 0.0, z], "method": method}
        number = {"value": float(value), "error": float(error), "truth": None, "pull": None, "unit": unit}
        quantities.append(about | number)

    midplane = ("rho", "ρ", "midplane at the Sun", 0.0)
    add(*midplane, "vertical", result.rho0, result.rho0_error, DENSITY_UNIT)
    for height in (0.05, 0.1, 0.2, 0.3):
        value, error = (float(np.interp(height, result.z, y)) for y in (result.a_z, a_error))
        add("a_z", "a_z", f"z=+{height:g} kpc", height, "vertical", value, error, ACCELERATION_UNIT)
    compared = {}
    if (found := result.comparison) is not None:
        for method, (value, error) in found.rho0.items():
            add(*midplane, method, value, error, DENSITY_UNIT)
        for method, (values, errors) in found.surface.items():
            for height, value, error in zip(found.heights, values, errors, strict=True):
                add("K_z", "|K_z|/2πG", f"z=±{height:g} kpc", height, method, value, error, SURFACE_UNIT)
        compared = {f"K_z of {pair}, p-value": a["p_value"] for pair, a in found.agreement.items()}
        compared |= {f"north and south by the {m}, p-value": p for m, p in found.north_south.items()}
    low, high = EXPECTED_RANGE
    inside = low <= result.rho0 <= high
    p_value = chi2_p(result)
    return {
        "run": run_header(config, record),
        "headline": {
            "name": "rho",
            "label": "Total mass density in the plane at the Sun",
            "value": result.rho0,
            "error": result.rho0_error,
            "unit": "Msun/pc3",
            "value_gev": result.rho0 * GEV_PER_CM3,
            "error_gev": result.rho0_error * GEV_PER_CM3,
            "truth": None,
            "truth_gev": None,
            "pull": None,
            "where": f"z = 0, kernel falling to half at |z| = {1000 * half_width(result):.0f} pc",
            "kernel_kpc": None,
            "terms": [{"term": t["term"], "error": t["error"], "count": t["count"]} for t in result.terms],
        },
        "quantities": quantities,
        "budget": [
            {
                "quantity": "rho@midplane",
                "method": "vertical",
                "term": t["term"],
                "value": t["error"],
                "count": t["count"],
                "bias": None,
                "unit": DENSITY_UNIT,
            }
            for t in result.terms
        ],
        "catalog": account(store),
        "equilibrium": {
            "verdict": f"The moments of all tracer groups against one potential: χ² = {result.chi2:.1f} "
            f"for {result.dof} degrees of freedom (p = {p_value:.2g})."
            + ("" if found is None else f" {found.sentence()}"),
            "level": "ok" if min([p_value, *compared.values()]) > 0.01 / (1 + len(compared)) else "warn",
            "numbers": {"chi2": result.chi2, "dof": result.dof, "p_value": p_value, **compared},
        },
        "checks": {},
        "members": [],
        "weights": {},
        "counts": result.counts,
        "estimators": result.estimators,
        "groups": result.groups,
        "comparisons": [
            {"label": label, "value": value, "error": error, "unit": "Msun/pc3", "source": source}
            for label, value, error, source in MIDPLANE
        ],
        "notes": result.notes,
        "warnings": []
        if inside
        else [
            f"the density in the plane, {result.rho0:.3f} ± {result.rho0_error:.3f} Msun/pc³, lies outside "
            f"the published range of {low:g}–{high:g}: see the notes"
        ],
    }


def half_width(result: VerticalResult) -> float:
    """Height in kpc at which the response of the midplane value to the density has fallen to half."""
    return float(result.kernel_z[np.argmax(result.kernel < 0.5 * result.kernel[0])])


def chi2_p(result: VerticalResult) -> float:
    """Probability of a larger χ² of the moment equations."""
    from scipy import stats

    return float(stats.chi2.sf(result.chi2, result.dof))
