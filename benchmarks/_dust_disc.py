"""The disc mock behind mock dust: 10⁶ observed stars in 4 kpc, dust ignored and dust solved for.

Two million stars of the mock (two seeds) stand behind a random field of dust, a thin layer and clouds, to a
limiting magnitude. The moments are solved with ε unknown: weights undo what the counts say of its asymmetry,
and ε(R, z) is found with Φ; the map of ε then follows from the counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import Bench
from benchmarks._gravity_parts import PARTS, cpu_seconds, part
from galray.gravity import (
    Kernel,
    Moments,
    MomentsSettings,
    Region,
    StarCounts,
    efficiency_map,
    sky_map,
    smooth,
)
from galray.mocks import DustMap, DustSettings, MilkyWay
from galray.mocks.discs import giants

__all__ = ["disc_states", "measure"]

RADIUS = 4.0
LIMIT = 13.6
STARS, DUST, SEEN = (3, 4), 2, 6  # seeds that nothing was settled on
SOLVED = MomentsSettings(
    num_potential_splines=(10, 17),
    num_test_splines=(11, 19),
    concentration=(0.0, 2.5),
    selection="shared",
    num_selection_splines=(13, 21),
    selection_concentration=(0.0, 4.0),
    penalty="evidence",
)
IGNORED = SOLVED.model_copy(update={"selection": "known", "velocity_functions": SOLVED.functions})
HEIGHTS = (0.2, 0.4, 0.6, 1.0, 1.5)
RADII = (7.0, 8.122, 9.2)


def disc_states(seed: int) -> np.ndarray:
    """States of a million stars of the disc mock; made once, which takes minutes."""
    path = Path(PARTS) / f"disc-1000000-{seed}.npy"
    if not path.is_file():
        from galray.mocks import MilkyWaySettings

        table = MilkyWay(MilkyWaySettings(num_stars=1_000_000, ball_radius_kpc=RADIUS)).sample(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.stack([table[name].to_numpy() for name in ("x", "y", "z", "vx", "vy", "vz")], 1))
    return np.load(path)


def everyone() -> np.ndarray:
    """The stars before the dust."""
    return np.concatenate([disc_states(seed) for seed in STARS])


def dusty_stars(limit: float) -> tuple[DustMap, np.ndarray]:
    """The dust, and the stars that are seen."""
    sun = MilkyWay().frame.sun_position
    w = everyone()
    rng = np.random.default_rng(SEEN)
    magnitude, _ = giants(np.zeros(len(w), dtype=int), rng)
    dust = DustMap(DustSettings(limit_mag=limit), sun, RADIUS, DUST)
    return dust, w[rng.random(len(w)) < dust.probability(w[:, :3], magnitude)]


def _places() -> torch.Tensor:
    rows = [(-r, 0.0, s * z) for r in RADII for z in HEIGHTS for s in (-1, 1)]
    return torch.tensor(rows, dtype=torch.float64)


def _truths() -> tuple[np.ndarray, np.ndarray, torch.Tensor, Kernel]:
    galaxy, kernel = MilkyWay(), Kernel((0.5, 0.5, 0.2), 2.0)
    above = torch.tensor([(-8.122, 0.0, z) for z in (-0.6, -0.3, 0.0, 0.3, 0.6)], dtype=torch.float64)
    a = galaxy.potential.acceleration(_places()).numpy()
    return a, smooth(galaxy.potential.mass_density, above, kernel).numpy(), above, kernel


def _solve(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Solve once, with dust or without, ε known as constant or unknown."""
    settings = MomentsSettings.model_validate(task["settings"])
    dust, w = dusty_stars(task["limit"])
    if not task["dust"]:
        w = everyone()[: len(w)]
    w = w[: task["stars"]]
    region = Region(MilkyWay().frame.sun_position, RADIUS)
    begin = cpu_seconds()
    unknown = settings.selection != "known"
    counts = StarCounts.of(w, region)
    weights = counts.weights(w) if unknown else None
    moments = Moments(settings, region)
    _, blocks = moments.fit(w, weights)
    result = moments.result(blocks)
    seconds = cpu_seconds() - begin
    a, rho, above, kernel = _truths()
    value, covariance = result.potential.predict(_places())
    error = covariance.diagonal().sqrt().reshape(-1, 3).numpy()
    density, density_covariance = result.potential.predict(above, "smoothed_density", kernel)
    found: dict[str, Any] = {
        "stars": len(w),
        "seconds": seconds,
        "a": (value.numpy()[:, [0, 2]] / a[:, [0, 2]]).tolist(),
        "a_error": (error[:, [0, 2]] / np.abs(a[:, [0, 2]])).tolist(),
        "rho": (density.numpy() / rho).tolist(),
        "rho_error": (density_covariance.diagonal().sqrt().numpy() / rho).tolist(),
        "chi2": result.solution.chi2 if result.solution else None,
        "num_moments": result.solution.num_moments if result.solution else None,
        "notes": result.notes(),
    }
    if unknown:
        seen = efficiency_map(counts, result.selections["shared"].log_efficiency)
        good = (counts.counts >= 50) & np.isfinite(seen.efficiency) & (seen.volume > 0.99 * counts.cell**3)
        corners = np.stack(np.meshgrid(*[[-0.25, 0.25]] * 3), -1).reshape(-1, 3) * counts.cell
        truth = np.mean([dust.efficiency(counts.centres[good] + c) for c in corners], axis=0)
        ratio = np.log(seen.efficiency[good] / truth)
        found |= {
            "cells": int(good.sum()),
            "correlation": float(np.corrcoef(seen.efficiency[good], truth)[0, 1]),
            "log_scatter": float(ratio.std()),
            "counting": float(np.sqrt((1 / counts.counts[good]).mean())),
        }
        index = tuple(((w[:, :3] - [e[0] for e in counts.edges]) / counts.cell).astype(int).T)
        corrected = np.nan_to_num(1 / np.maximum(seen.efficiency[index], 0.02), nan=1.0)
        np.savez(
            folder / "maps.npz",
            x=counts.centres,
            efficiency=seen.efficiency,
            truth=dust.efficiency(counts.centres.reshape(-1, 3)).reshape(counts.counts.shape),
            counts=counts.counts,
            loss=seen.loss_per_kpc(),
            before=sky_map(w, np.ones(len(w)), region.center, 3.25)[2],
            after=sky_map(w, corrected, region.center, 3.25)[2],
            true_sky=sky_map(everyone(), np.ones(2_000_000), region.center, 3.25)[2],
        )
    return found


def measure(bench: Bench) -> None:
    """Every row of the group."""
    count = 200_000 if bench.quick else 1_000_000
    runs = {}
    for name, settings, dust in (
        ("ignored", IGNORED, True),
        ("solved", SOLVED, True),
        ("without dust", IGNORED, False),
    ):
        task = {
            "what": "disc behind dust",
            "seeds": [*STARS, DUST, SEEN],
            "stars": count,
            "limit": LIMIT,
            "dust": dust,
            "settings": settings.model_dump(mode="json"),
        }
        runs[name], folder = part(task, lambda f, t=task: _solve(t, f))
        if name == "solved":
            from benchmarks._dust_figure import draw

            draw(folder / "maps.npz")
    label = f"disc mock behind dust, {runs['solved']['stars']} observed stars"
    low = np.abs(_places()[:, 2].numpy()) < 0.5
    quantities = {"a_R": (0, np.ones(len(low), bool)), "a_z, |z| = 0.2 and 0.4 kpc": (1, low)}
    bias: dict[str, dict[str, float]] = {}
    for name, found in runs.items():
        seconds = found["seconds"]
        for what, (column, rows) in quantities.items():
            off = np.array(found["a"])[rows, column] - 1
            pull = off / np.array(found["a_error"])[rows, column]
            # of a_R its sign changes at the Sun's radius: what the mean over all radii hides
            each = off.reshape(len(RADII), -1).mean(1) if what == "a_R" else off.mean()
            bias.setdefault(f"{what}, rms over R" if what == "a_R" else what, {})[name] = float(
                np.sqrt(np.mean(each**2))
            )
            bench.row(f"{label}, dust {name}: {what}, mean bias", off.mean(), cpu_seconds=seconds)
            bench.row(
                f"{label}, dust {name}: {what}, rms of (value - truth) / error",
                float(np.sqrt((pull**2).mean())),
                bar=2.0 if name == "solved" and not bench.quick else None,
                cpu_seconds=seconds,
            )
        by_radius = bias["a_R, rms over R"][name]
        bench.row(f"{label}, dust {name}: a_R, bias, rms over R", by_radius, cpu_seconds=seconds)
        off = np.array(found["rho"]) - 1
        bias.setdefault("rho, |z| < 0.6 kpc", {})[name] = abs(float(off.mean()))
        bench.row(f"{label}, dust {name}: rho, |z| < 0.6 kpc, mean bias", off.mean(), cpu_seconds=seconds)
        pull = off / np.array(found["rho_error"])
        bench.row(
            f"{label}, dust {name}: rho, rms of (value - truth) / error",
            float(np.sqrt((pull**2).mean())),
            bar=2.0 if name == "solved" and not bench.quick else None,
            cpu_seconds=seconds,
        )
    solved = runs["solved"]
    for what, values in bias.items():
        bench.row(
            f"{label}: {what}, bias when ignored over bias when solved for",
            values["ignored"] / max(values["solved"], 1e-9),
            bar=None if bench.quick else 3.0,
            at_least=True,
            cpu_seconds=solved["seconds"],
        )
    bench.row(
        f"{label}: correlation of the epsilon map with the truth, cells of (0.25 kpc)^3 with 50 stars",
        solved["correlation"],
        f"{solved['cells']} cells",
        bar=None if bench.quick else 0.9,
        at_least=True,
        peer="S within 5 % (Kalda & Green 2026, spheres)",
        cpu_seconds=solved["seconds"],
    )
    bench.row(
        f"{label}: scatter of log(epsilon / truth) in these cells",
        solved["log_scatter"],
        peer=f"{solved['counting']:.3f} from counting alone",
        cpu_seconds=solved["seconds"],
    )
