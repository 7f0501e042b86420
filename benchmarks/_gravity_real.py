"""Real stars: 240,000 of Gaia DR2 within 250 pc, three inversions of their vertical motion side by side.

The sample is a cylinder of 250 pc around the Sun, |z| < 400 pc, in 40 cells of known effective area. It is
too small for a three-dimensional field: a radial gradient over 500 pc is lost in the cells' unknown relative
completeness, so no a_R is quoted. What it holds is a_z(z), and with it the density in the plane.

Moments, a flow and a score network solve the same vertical equation with the same weights: the comparison
that ``galray run gaia_dr2_local`` makes, with its seed and settings, replica by replica so that a killed
measurement goes on. The number of bootstraps and the seed were settled before any was looked at.
"""

from __future__ import annotations

import gzip
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import Bench
from benchmarks._gravity_parts import part
from galray.config import load_config
from galray.gravity.vertical import VerticalSample, VerticalSettings
from galray.gravity.vertical_comparison import VerticalInversions, compare
from galray.gravity.vertical_distribution import fit_distribution
from galray.gravity.vertical_moments import layer_basis, moment_sums, solve_moments
from galray.gravity.vertical_terms import VerticalSolver, radial_term, tilt_term
from galray.gravity.vertical_velocity import vertical_velocities

__all__ = ["measure"]

MCKEE = "McKee+ 2015: 0.097 ± 0.013"
SEED = 1


def measure(bench: Bench) -> None:
    folder = Path(os.environ.get("GALRAY_TEST_DATA", "../shared/data"))
    mock(bench, folder / "mocks" / "widmark2019_disc")
    data = folder / "gaia_dr2"
    source = data / "mosaik_40cells_z0.4kpc.parquet"
    if not source.is_file():
        print(f"# real: {source} is absent, left out (set GALRAY_TEST_DATA)", flush=True)
        return
    real = Measurement(source, data / "eff_area", quick=bench.quick)
    task = {"group": "real", "seed": SEED, "settings": real.settings.model_dump(mode="json")}
    corrections, _ = part({"what": "corrections", **task}, lambda _: real.corrections())
    replicas = [
        part({"what": "replica", "number": i, **task}, lambda _, i=i: real.inversions.replica(i))[0]
        for i in range(real.settings.bootstraps + 1)
    ]
    report(bench, real.settings, corrections, replicas)


class Measurement:
    """The sample and what is done with it; read and prepared only where a part is not on disk."""

    def __init__(self, source: Path, areas: Path, *, quick: bool) -> None:
        self.source, self.areas = source, areas
        vertical = load_config("gaia_dr2_local").vertical
        assert vertical is not None
        values = vertical.model_dump(exclude={"effective_area"})
        if quick:
            values |= {"bootstraps": 4, "networks": {"epochs": 1}}
        self.settings = VerticalSettings.model_validate(values)

    @cached_property
    def solver(self) -> VerticalSolver:
        import polars as pl

        solver = VerticalSolver(
            VerticalSample.from_table(pl.read_parquet(self.source), self.areas), self.settings
        )
        solver.prepare()
        return solver

    @cached_property
    def inversions(self) -> VerticalInversions:
        torch.set_num_threads(1)
        return VerticalInversions.of(self.solver, SEED)

    def corrections(self) -> dict[str, Any]:
        """The radial and the tilt term of ρ(0), which the three share, and χ² of the moments."""
        terms = (radial_term(self.settings), tilt_term(self.solver.sample, self.solver, self.settings))
        fit = self.solver.fit()
        return {
            "stars": len(self.inversions.stars),
            "shift": float(sum(value for value, _ in terms)),
            "error": float(np.hypot(*(error for _, error in terms))),
            "chi2": fit.chi2,
            "dof": fit.dof,
        }


def report(
    bench: Bench, settings: VerticalSettings, corrections: dict[str, Any], replicas: list[dict[str, Any]]
) -> None:
    """Rows from the parts: densities, forces, and how far the three agree."""
    cpu = corrections["cpu_seconds"] + sum(r["cpu_seconds"] for r in replicas)
    found = compare(replicas, settings, corrections["shift"])
    name = f"Gaia DR2, {corrections['stars']:,} stars with weights, |z| < 0.36 kpc"

    def row(text: str, value: float, unit: str = "", **options: Any) -> None:
        bench.row(f"{name}: {text}", value, unit, cpu_seconds=cpu, **options)

    row("χ² per degree of freedom of the moments", corrections["chi2"] / corrections["dof"])
    row("ρ(0), all: error of the radial and tilt terms", corrections["error"], "Msun/pc3")
    row("bootstraps over the cells", found.replicas)
    for method, (value, error) in found.rho0.items():
        row(f"ρ(0), {method}", value, "Msun/pc3", peer=MCKEE)
        row(f"ρ(0), {method}: error over cells and seeds", error, "Msun/pc3")
        for z, force, spread in zip(found.heights, *found.surface[method], strict=True):
            row(f"|K_z|/2πG at {1e3 * z:.0f} pc, {method}", force, "Msun/pc2")
            row(f"|K_z|/2πG at {1e3 * z:.0f} pc, {method}: error", spread, "Msun/pc2")
    for method, chance in found.north_south.items():
        row(f"north against south, {method}: p-value", chance)
    for pair, numbers in found.agreement.items():
        row(f"K_z of {pair} at 3 heights: T²", numbers["t2"])
        row(f"K_z of {pair} at 3 heights: p-value", numbers["p_value"])
        row(f"K_z of {pair}: rms difference", 100 * numbers["relative"], "%")


def mock(bench: Bench, folder: Path) -> None:
    """A published mock with Gaia's errors and known selection: mean density within 60, 100 and 150 pc."""
    if not folder.is_dir():
        print(f"# real: {folder} is absent, left out (set GALRAY_TEST_DATA)", flush=True)
        return
    found, _ = part({"group": "real", "what": "widmark2019", "version": 2}, lambda _: _mock(folder))
    heights = np.array(MOCK_HEIGHTS)
    truth = sum(rho * h * np.tanh(heights / h) for rho, h in MOCK_LAYERS) / heights + MOCK_UNIFORM
    name = f"Widmark+ 2019 mock, {found['stars']:,} stars"
    for method in ("moments", "distribution"):
        for z, value, error, true in zip(heights, *found[method], truth, strict=True):
            where = f"{name}: mean ρ within {1e3 * z:.0f} pc, {method}"
            options = {"cpu_seconds": found["cpu_seconds"]}
            bench.row(where, value, "Msun/pc3", peer=f"truth {true:.4f}", **options)
            bench.row(f"{where}: pull", (value - true) / error, "sigma", **options)


MOCK_LAYERS, MOCK_UNIFORM = ((0.05, 0.03), (0.05, 0.06), (0.03, 0.12)), 0.03
"""The mock's stated truth: sech² layers (Msun/pc³, kpc), and a uniform density."""
MOCK_HEIGHTS = (0.06, 0.1, 0.15)


def _mock(folder: Path) -> dict[str, Any]:
    sample = _mock_sample(folder)
    velocity = vertical_velocities(sample, 0.35)
    edges, limit, heights = np.linspace(0, 0.18, 61), 0.18, np.array(MOCK_HEIGHTS)
    options = {"num_tests": 11, "window": 40.0, "pilot": np.full(60, 0.12), "area_floor": 0.02}
    sums = moment_sums(sample, velocity, sun_height=0.0, height_limit=limit, edges=edges, **options)
    layers = (0.06, 100.0)
    fit = solve_moments(sums, layer_basis(edges, layers))
    reach = layer_basis(np.linspace(0, 0.22, 74), layers)
    distribution = fit_distribution(sample, velocity, reach, components=3, range_kpc=0.19)
    fits = {"moments": fit, "distribution": distribution}
    means = {name: list(zip(*(f.mean_within(z) for z in heights), strict=True)) for name, f in fits.items()}
    return {"stars": len(sample), **means}


def _mock_sample(folder: Path) -> VerticalSample:
    rows, cells, areas = [], [], {}
    for window in ("3.7-4.2", "4.6-5.0"):
        with gzip.open(folder / f"mock_dataset_absGlims-{window}_rlims-0.1-0.2_dust.npy.gz") as file:
            rows.append(np.load(file))
        cells += [window] * len(rows[-1])
        with np.load(folder / f"effective_area_absGlims-{window}_dust.npz") as data:
            areas[window] = (data["zlist"], data["effectivearea"])
    table = np.concatenate(rows)
    return VerticalSample.from_observables(
        longitude=np.radians(table[:, 0]),
        latitude=np.radians(table[:, 1]),
        parallax=table[:, 2],
        pm_l=table[:, 3],
        pm_b=table[:, 4],
        radial_velocity=table[:, 5],
        parallax_error=table[:, 8],
        pm_b_error=table[:, 7],
        radial_velocity_error=table[:, 12],
        magnitude=table[:, 13],
        cell=cells,
        group=cells,
        areas=areas,
    )
