"""Real stars: 240,000 of Gaia DR2 within 250 pc, three inversions of their vertical motion side by side.

The sample is a cylinder of 250 pc around the Sun, |z| < 400 pc, in 40 cells of known effective area. It is
too small for a three-dimensional field: a radial gradient over 500 pc is lost in the cells' unknown relative
completeness, so no a_R is quoted. What it holds is a_z(z), and with it the density in the plane.

Moments, a flow and a score network solve the same vertical equation with the same weights (areas, missing
radial velocities). Errors are of a bootstrap over cells within their tracer groups, each replica trained
with a seed of its own; replicas are the same for the three, so that differences have errors of their own.
With four replicas an error is itself known to 40 %, and T² has one degree of freedom left.
``galray run gaia_dr2_local`` gives the moments with all the terms of their budget.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import Bench
from benchmarks._gravity_parts import part
from galray.gravity.vertical import VerticalSample, VerticalSettings
from galray.gravity.vertical_distribution import fit_distribution
from galray.gravity.vertical_moments import FOUR_PI_G, layer_basis, moment_sums, solve_moments
from galray.gravity.vertical_networks import (
    VerticalNetworkSettings,
    VerticalStars,
    density_from_force,
    fit_vertical_flow,
    fit_vertical_score,
)
from galray.gravity.vertical_terms import VerticalSolver, radial_term, tilt_term
from galray.gravity.vertical_velocity import vertical_velocities
from galray.units import MSUN_PC3, G

__all__ = ["measure"]

KNOTS = np.linspace(-0.3, 0.3, 13)
HEIGHTS = np.array([0.1, 0.2, 0.3])
"""Heights at which the inversions are compared, kpc."""
MCKEE = "McKee+ 2015: 0.097 ± 0.013"
METHODS = ("moments", "flow", "score")
SEEDS = (1, 4, 5, 6)
"""Of the bootstrap over cells and of the networks' training."""


def measure(bench: Bench) -> None:
    folder = Path(os.environ.get("GALRAY_TEST_DATA", "../shared/data"))
    mock(bench, folder / "mocks" / "widmark2019_disc")
    data = folder / "gaia_dr2"
    source = data / "mosaik_40cells_z0.4kpc.parquet"
    if not source.is_file():
        print(f"# real: {source} is absent, left out (set GALRAY_TEST_DATA)", flush=True)
        return
    real = Measurement(source, data / "eff_area", quick=bench.quick)
    corrections, _ = part({"group": "real", "what": "corrections", **real.task}, lambda _: real.corrections())
    replicas = [
        part({"group": "real", "what": "replica", "number": i, **real.task}, lambda _, i=i: real.replica(i))[
            0
        ]
        for i in (0, *real.seeds)
    ]
    report(bench, corrections, replicas)


class Measurement:
    """The sample and what is done with it; read and prepared only where a part is not on disk."""

    def __init__(self, source: Path, areas: Path, *, quick: bool) -> None:
        self.source, self.areas = source, areas
        self.seeds = SEEDS[:4] if quick else SEEDS
        self.networks = VerticalNetworkSettings(epochs=2 if quick else 4)
        self.settings = VerticalSettings()
        self.task = {
            "networks": self.networks.model_dump(mode="json"),
            "settings": self.settings.model_dump(mode="json"),
            "version": 1,
        }
        self._prepared: tuple[Any, ...] | None = None

    def _sample(self) -> VerticalSample:
        import polars as pl

        return VerticalSample.from_table(pl.read_parquet(self.source), self.areas)

    def prepared(self) -> tuple[Any, ...]:
        if self._prepared is None:
            sample = self._sample()
            solver = VerticalSolver(sample, self.settings)
            solver.find_sun()
            solver.pilot = np.maximum(solver.basis().matrix @ solver.fit().theta, 0.0)
            weighted = VerticalStars.from_sample(
                sample,
                solver.velocity,
                sun_height=solver.sun,
                limit=self.settings.height_limit_kpc,
                area_floor=self.settings.area_floor,
            )
            self._prepared = (solver, solver.sums(), weighted)
        return self._prepared

    def corrections(self) -> dict[str, Any]:
        """The radial and the tilt term of ρ(0), which the three share, and χ² of the moments."""
        sample = self._sample()
        solver = VerticalSolver(sample, self.settings)
        terms = (radial_term(self.settings), tilt_term(sample, solver, self.settings))
        fit = solver.fit()
        return {
            "shift": float(sum(value for value, _ in terms)),
            "error": float(np.hypot(*(error for _, error in terms))),
            "chi2": fit.chi2,
            "dof": fit.dof,
        }

    def replica(self, number: int) -> dict[str, Any]:
        """Moments, flow and score on one bootstrap of the cells; number 0 is the sample itself."""
        import torch

        torch.set_num_threads(1)
        solver, sums, weighted = self.prepared()
        present = np.unique(np.stack([sums.block_cell, sums.block_group], 1), axis=0)
        cells = present[:, 0]
        if number:
            rng = np.random.default_rng([20181, number])
            groups = present[:, 1]
            cells = np.concatenate([rng.choice(cells[groups == g], (groups == g).sum()) for g in set(groups)])
        rows = np.concatenate([np.flatnonzero(sums.block_cell == cell) for cell in cells])
        names = ("source", "response", "noise", "block_cell", "block_group", "stars")
        again = replace(sums, **{name: getattr(sums, name)[rows] for name in names})
        basis = solver.basis()
        moments = -FOUR_PI_G * basis.column(KNOTS) @ solve_moments(again, basis).theta
        drawn = weighted.resampled(cells)
        flow = fit_vertical_flow(drawn, self.networks, seed=number).acceleration(KNOTS)
        score = fit_vertical_score(drawn, self.networks, seed=number).acceleration(KNOTS, drawn)
        return {
            "stars": len(drawn),
            "moments": moments.tolist(),
            "flow": flow.tolist(),
            "score": score.tolist(),
        }


def report(bench: Bench, corrections: dict[str, Any], replicas: list[dict[str, Any]]) -> None:
    """Rows from the parts: densities, forces, and how far the three agree."""
    cpu = corrections["cpu_seconds"] + sum(r["cpu_seconds"] for r in replicas)
    forces = {m: np.array([r[m] for r in replicas]) for m in METHODS}  # (1 + replicas, knots)
    settings = VerticalSettings()
    bins = round(settings.height_limit_kpc / settings.bin_kpc)
    edges = np.linspace(0.0, settings.height_limit_kpc, bins + 1)
    basis = layer_basis(edges, settings.layer_heights_kpc)  # the same layers for all
    name = f"Gaia DR2, {replicas[0]['stars']:,} stars with weights, |z| < 0.36 kpc"

    def row(text: str, value: float, unit: str = "", **options: Any) -> None:
        bench.row(f"{name}: {text}", value, unit, cpu_seconds=cpu, **options)

    row("χ² per degree of freedom of the moments", corrections["chi2"] / corrections["dof"])
    row("ρ(0), all: error of the radial and tilt terms", corrections["error"], "Msun/pc3")
    odd: dict[str, np.ndarray] = {}
    for method, values in forces.items():
        away = np.abs(KNOTS) > 0.01  # the moments' force is odd, and without error in the plane
        spread = values[1:, away].std(0, ddof=1)
        fits = [density_from_force(KNOTS[away], a[away], spread, basis) for a in values]
        central = np.array([basis.centre @ theta for theta, _ in fits]) + corrections["shift"]
        row(f"ρ(0), {method}", central[0], "Msun/pc3", peer=MCKEE)
        row(f"ρ(0), {method}: error over cells and seeds", central[1:].std(ddof=1), "Msun/pc3")
        half = np.array([[np.interp([-z, z], KNOTS, a) @ [0.5, -0.5] for z in HEIGHTS] for a in values])
        odd[method] = half / (2 * np.pi * G * MSUN_PC3) * 1e3  # Msun/pc², 1 kpc = 1e3 pc
        for k, z in enumerate(HEIGHTS):
            row(f"|K_z|/2πG at {1e3 * z:.0f} pc, {method}", odd[method][0, k], "Msun/pc2")
            row(f"|K_z|/2πG at {1e3 * z:.0f} pc, {method}: error", odd[method][1:, k].std(ddof=1), "Msun/pc2")
        if method != "moments":  # which are odd by construction
            pairs = (values + values[:, ::-1])[:, len(KNOTS) // 2 + 2 :: 2]
            row(f"north against south, {method}: p-value", _hotelling(pairs[0], pairs[1:])[1])
    for i, first in enumerate(METHODS):
        for second in METHODS[i + 1 :]:
            difference = odd[first] - odd[second]
            chi2, chance = _hotelling(difference[0], difference[1:])
            row(f"K_z of {first} and {second} at 3 heights: T²", chi2)
            row(f"K_z of {first} and {second} at 3 heights: p-value", chance)
            relative = np.sqrt(np.mean((difference[0] / odd["moments"][0]) ** 2))
            row(f"K_z of {first} and {second}: rms difference", 100 * relative, "%")


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


def _hotelling(value: np.ndarray, replicas: np.ndarray) -> tuple[float, float]:
    """T² of a vector whose covariance is estimated from a few replicas, and the chance of a larger one."""
    count, size = replicas.shape
    covariance = np.cov(replicas, rowvar=False)
    t2 = float(value @ np.linalg.solve(covariance, value))
    if count <= size:
        return t2, float("nan")
    return t2, float(stats.f.sf(t2 * (count - size) / (size * (count - 1)), size, count - size))
