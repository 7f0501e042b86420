"""Is a Galaxy that was hit 200 Myr ago told from one that was not? Twenty mocks of either kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import Bench  # noqa: F401
from benchmarks._gravity_parts import part
from galray.mocks import KickSettings, MilkyWay, MilkyWaySettings
from galray.mocks.orbits import MeridionalOrbits

NUM_STARS = 50_000
NUM_SEEDS = 20


def pair(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The same Galaxy undisturbed and kicked, about `count` stars each: states, and CPU-seconds spent.

    Every star that was not kicked is the same in both, so that what the kick does is seen above the noise.
    """

    def work(folder: Path) -> dict[str, Any]:
        torch.set_num_threads(1)
        settings = MilkyWaySettings(num_stars=count)
        galaxy = MilkyWay(settings)
        rng = np.random.default_rng(np.random.SeedSequence([seed, 200]))
        steady, hit = [], []
        for disc in (settings.thin_disc, settings.thick_disc):
            wanted, have = round(count * disc.fraction), 0
            while have < wanted:
                n = 20_000 if not have else int(1.02 * (wanted - have) / have * 20_000) + 500
                orbits, _ = galaxy.mixed_orbits(disc, n, rng)
                kicked = galaxy.kicked(orbits, KickSettings(), rng)
                turn = int(rng.integers(2**62))
                steady.append(_turned(galaxy, orbits, turn))
                hit.append(_turned(galaxy, kicked, turn))
                have += len(steady[-1])
        halo = galaxy.sample_halo(count - round(count * (1 - settings.stellar_halo.fraction)), rng).numpy()
        order = rng.permutation(2 * count + 4 * 20_000)
        for name, parts in (("steady", steady), ("kicked", hit)):
            w = np.concatenate([*parts, halo])
            np.save(folder / f"{name}.npy", w[order[order < len(w)]].astype(np.float32))
        return {"stars": count}

    found, folder = part({"what": "kicked pair", "stars": count, "seed": seed}, work)
    states = [np.load(folder / f"{name}.npy").astype(float) for name in ("steady", "kicked")]
    return states[0], states[1], found["cpu_seconds"]


def _turned(galaxy: MilkyWay, orbits: MeridionalOrbits, seed: int) -> np.ndarray:
    return galaxy.turned_into_ball(orbits, np.random.default_rng(seed))[0].numpy()
