"""Rows of the weak-form moments: Plummer spheres, the mock Milky Way, cost against the number of stars.

The Plummer spheres have G = M = b = 1, 2¹⁷ stars and r < 10; the error of the acceleration is the root mean
square of |Δa| / |a| at 8192 positions with r uniform in 0.5–3 b, the mean of three realisations.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks import Bench
from benchmarks._gravity_parts import PARTS, cpu_seconds, part
from galray.gravity import Kernel, Moments, MomentsSettings, Region, smooth
from galray.gravity.moment_sums import MomentSums, fold
from galray.mocks import MilkyWay, MilkyWaySettings, PlummerSphere
from galray.units import G

__all__ = ["disc_stars", "measure"]

SPHERES = {
    "(R, z)": MomentsSettings(
        num_potential_splines=(10, 15), num_test_splines=(12, 19), concentration=(3.0, 3.0)
    ),
    "(x, y, z) shrunk to axial symmetry": MomentsSettings(
        basis="Rz+xyz",
        num_potential_splines=(10, 15),
        num_test_splines=(12, 19),
        concentration=(3.0, 3.0),
        num_departure_splines=(7, 7, 7),
        num_departure_tests=(9, 9, 9),
    ),
    "(x, y, z)": MomentsSettings(
        basis="xyz",
        num_potential_splines=(11, 11, 11),
        num_test_splines=(10, 10, 10),
        concentration=(2.5, 2.5, 2.5),
        penalty="evidence",
    ),
}
BARS = {"(R, z)": 0.035, "(x, y, z) shrunk to axial symmetry": 0.035, "(x, y, z)": 0.06}
DISC_RADIUS = 4.0  # kpc


def measure(bench: Bench) -> None:
    """Measure all rows of the group."""
    _plummer(bench)
    _cost(bench)
    _disc(bench)


def _plummer(bench: Bench) -> None:
    count, realisations = (2**14, 1) if bench.quick else (2**17, 3)
    for name, settings in SPHERES.items():
        errors, seconds = [], []
        for realisation in range(realisations):
            task = {
                "what": "moments, Plummer",
                "stars": count,
                "seed": 100 + realisation,
                "settings": settings.model_dump(mode="json"),
            }
            found, _ = part(task, lambda _, t=task, s=settings: _sphere(t, s))
            errors.append(found["error"])
            seconds.append(found["fit_seconds"])
        label = f"Plummer, {count} stars: moments, {name}: acceleration"
        bench.row(
            label,
            float(np.mean(errors)),
            "rms",
            peer="6.5 % a plain trial in (x, y, z), 35 CPU-s",
            bar=None if bench.quick else BARS[name],
            cpu_seconds=float(np.mean(seconds)),
        )
        bar = None if bench.quick else 120.0
        bench.row(f"{label}, cost", float(np.max(seconds)), "CPU-s", bar=bar, cpu_seconds=np.mean(seconds))


def _sphere(task: dict[str, Any], settings: MomentsSettings) -> dict[str, float]:
    sphere = PlummerSphere(1.0 / G, 1.0)
    w = sphere.sample(int(1.05 * task["stars"]), task["seed"])
    w = w[w[:, :3].norm(dim=1) < 10][: task["stars"]]
    begin = cpu_seconds()
    field, _ = Moments(settings, Region((0.0, 0.0, 0.0), 10.0)).fit(w)
    seconds = cpu_seconds() - begin
    rng = np.random.default_rng(1)
    direction = rng.normal(size=(8192, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    x = torch.from_numpy(direction * rng.uniform(0.5, 3.0, (8192, 1)))
    truth = sphere.potential_field.acceleration(x)
    error = (field.acceleration(x) - truth).norm(dim=1) / truth.norm(dim=1)
    return {"error": float(error.square().mean().sqrt()), "fit_seconds": seconds}


def _cost(bench: Bench) -> None:
    """CPU time and memory of the sums as shards of 25,000 stars are added, default settings."""
    counts = (10**5, 3 * 10**5) if bench.quick else (10**5, 10**6, 10**7)
    per_star = {}
    for count in counts:
        task = {
            "what": "moments, cost",
            "stars": count,
            "settings": MomentsSettings().model_dump(mode="json"),
        }
        found, _ = part(task, lambda _, n=count: _sums_of(n))
        per_star[count] = found["sum_seconds"] / count
        total = found["sum_seconds"] + found["solve_seconds"]
        bench.row(f"moments, (R, z), {count:,} stars: sums and solution", total, "CPU-s", cpu_seconds=total)
        bench.row(
            f"moments, (R, z), {count:,} stars: memory above the start",
            found["peak_mb"],
            "MB",
            bar=100.0,
            cpu_seconds=total,
        )
    first, last = counts[0], counts[-1]
    ratio = per_star[last] / per_star[first]
    label = f"moments, from {first:,} to {last:,} stars"
    bench.row(f"{label}: cost per star, ratio", ratio, bar=1.3, cpu_seconds=0.0)


def _sums_of(count: int) -> dict[str, float]:
    size = 25_000
    settings = MomentsSettings()
    moments = Moments(settings, Region((-8.122, 0.0, 0.0208), 4.0))
    shard = _smooth_disc(size, 0)
    moments.sums(shard[:1000])
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = cpu_seconds()
    drawing = 0.0

    def blocks() -> Any:
        nonlocal drawing
        for i in range(count // size):
            before = cpu_seconds()
            w = _smooth_disc(size, i)
            drawing += cpu_seconds() - before
            yield moments.sums(w)

    sums: list[MomentSums] = fold(blocks(), settings.num_blocks)
    middle = cpu_seconds()
    moments.jackknife(sums)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "sum_seconds": middle - begin - drawing,
        "solve_seconds": cpu_seconds() - middle,
        "peak_mb": max((peak - start) / 1024, 1.0),
    }


def _smooth_disc(count: int, seed: int) -> np.ndarray:
    """Stars that look like a disc to the cells: only the cost is measured on them."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2.2, 2.2, (count, 3)) + np.array([-8.122, 0.0, 0.0])
    x[:, 2] = np.clip(rng.laplace(0.0, 0.4, count), -2.0, 2.0)
    v = rng.normal(size=(count, 3)) * np.array([40.0, 30.0, 20.0]) + np.array([0.0, 220.0, 0.0])
    return np.concatenate([x, v], 1)


def _disc(bench: Bench) -> None:
    count = 10**5 if bench.quick else 10**6
    settings = MomentsSettings()
    task = {
        "what": "moments, disc",
        "stars": count,
        "seed": 1,
        "settings": settings.model_dump(mode="json"),
    }
    found, _ = part(task, lambda _: _disc_part(task, settings))
    seconds = found["fit_seconds"]
    label = f"disc mock, {count:,} stars: moments"
    strict = not bench.quick
    for name, bar, peer in (("a_R", 0.015, "0.8-1.4 % a trial"), ("a_z", 0.08, "6-9 % a trial")):
        bench.row(
            f"{label}: {name}",
            found[name],
            "rms",
            bar=bar if strict else None,
            peer=peer,
            cpu_seconds=seconds,
        )
    bench.row(f"{label}: cost", seconds, "CPU-s", bar=60.0 if strict else None, cpu_seconds=seconds)
    bench.row(
        f"{label}: density at {found['heights']:.0f} heights, chi2 probability",
        found["probability"],
        bar=0.01,
        at_least=True,
        cpu_seconds=seconds,
    )
    bench.row(f"{label}: density, rms pull", found["pull"], cpu_seconds=seconds)


def disc_stars(count: int, seed: int) -> np.ndarray:
    """States (n, 6) of the mock Milky Way in a ball of `DISC_RADIUS`, from the disk where they were drawn."""
    path = Path(PARTS) / f"disc-{count}-{seed}.npy"
    if not path.is_file():
        table = MilkyWay(MilkyWaySettings(num_stars=count, ball_radius_kpc=DISC_RADIUS)).sample(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.stack([table[name].to_numpy() for name in ("x", "y", "z", "vx", "vy", "vz")], 1))
    return np.load(path)


def _disc_part(task: dict[str, Any], settings: MomentsSettings) -> dict[str, float]:
    """Acceleration and smoothed density of the mock Milky Way against the truth.

    Returns:
        The rms of Δa_R and Δa_z at stars within 0.8 of the radius, each over the rms of the truth; χ² of the
        smoothed density above the Sun with its full covariance, its probability and the rms pull.
    """
    galaxy = MilkyWay(MilkyWaySettings(num_stars=task["stars"], ball_radius_kpc=DISC_RADIUS))
    w = disc_stars(task["stars"], task["seed"])
    begin = cpu_seconds()
    sun = galaxy.frame.sun_position
    field, _ = Moments(settings, Region(sun, DISC_RADIUS)).fit(w)
    seconds = cpu_seconds() - begin
    deep = ((w[:, :3] - np.array(sun)) ** 2).sum(1) < (0.8 * DISC_RADIUS) ** 2
    x = torch.from_numpy(w[deep][:8192, :3])
    truth, value = galaxy.potential.acceleration(x), field.acceleration(x)
    radius = x[:, :2].norm(dim=1)
    found = {"fit_seconds": seconds}
    for name, one in (
        ("a_R", lambda a: (a[:, :2] * x[:, :2]).sum(1) / radius),
        ("a_z", lambda a: a[:, 2]),
    ):
        found[name] = float((one(value - truth).square().mean() / one(truth).square().mean()).sqrt())
    kernel = Kernel((0.5, 0.5, 0.2), 2.0)
    heights = np.array([-2.4, -1.6, -0.8, 0.0, 0.8, 1.6, 2.4])
    places = torch.tensor([[sun[0], sun[1], z] for z in heights], dtype=torch.float64)
    density, covariance = field.predict(places, "smoothed_density", kernel)
    residual = (density - smooth(galaxy.potential.mass_density, places, kernel)).numpy()
    chi2 = float(residual @ np.linalg.solve(covariance.numpy(), residual))
    pull = residual / np.sqrt(np.diag(covariance.numpy()))
    return {
        **found,
        "heights": float(len(heights)),
        "chi2": chi2,
        "probability": float(stats.chi2.sf(chi2, len(heights))),
        "pull": float(np.sqrt(np.mean(pull**2))),
    }
