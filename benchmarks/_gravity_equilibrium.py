"""Is a Galaxy that was hit 200 Myr ago told from one that was not? Twenty mocks of either kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import Bench
from benchmarks._gravity_parts import cpu_seconds, part
from benchmarks._gravity_shifts import relative_shifts, values_of
from galray.gravity import Kernel, Moments, MomentsSettings, stellar_tests, verdict
from galray.gravity.disturbance import disturbances
from galray.mocks import KickSettings, MilkyWay, MilkyWaySettings
from galray.mocks.orbits import MeridionalOrbits
from galray.phasespace import Ball
from galray.results import Places, PlacesSettings

NUM_STARS = 50_000
NUM_SEEDS = 20
NUM_INVERTED = 10  # pairs whose gravity is compared


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


def measure(bench: Bench) -> None:
    seeds, count = (3, 20_000) if bench.quick else (NUM_SEEDS, NUM_STARS)
    label = f"{seeds} mocks of {count} stars"
    flagged, spent, tested = {"steady": 0, "kicked": 0}, 0.0, 0.0
    amplitudes = []
    pairs = []
    for seed in range(seeds):
        steady, kicked, seconds = pair(seed, count)
        spent += seconds
        pairs.append((steady, kicked))
        begin = cpu_seconds()
        for name, w in (("steady", steady), ("kicked", kicked)):
            tests = stellar_tests(w)
            flagged[name] += verdict(stellar=tests).level != "ok"
            if name == "kicked":
                amplitudes.append(tests["vertical"].amplitude)
        tested += cpu_seconds() - begin
    bars = {"kicked": (0.9, True), "steady": (0.05, False)}
    words = {"kicked": "10 % kicked by 20 km/s 200 Myr ago, flagged", "steady": "undisturbed, flagged"}
    for name, (bar, more) in bars.items():
        bench.row(
            f"{label}: {words[name]}",
            flagged[name] / seeds,
            bar=None if bench.quick else bar,
            at_least=more,
            cpu_seconds=tested / (2 * seeds) if name == "steady" else spent / seeds,
        )
    amplitude = float(np.sqrt(np.mean(np.square(amplitudes))))
    bench.row(f"{label}: amplitude of the kick in the stars", amplitude, cpu_seconds=0.0)
    if bench.quick:
        return
    with bench.cpu():
        shifts = _shifts(pairs[:NUM_INVERTED])
    table = disturbances()["disequilibrium"]
    for name, (shift, noise) in shifts.items():
        unit = "Msun/pc3" if name.startswith("rho") else ""
        bench.row(f"kick: shift of {name} by the moments, {NUM_INVERTED} pairs", shift, unit)
        bench.row(f"kick: shift of {name}, its noise", noise, unit, cpu_seconds=0.0)
        bench.row(
            f"kick: shift of {name}, table over measured",
            table["shift"][name] / max(shift, noise, 1e-12),
            cpu_seconds=0.0,
        )


def _shifts(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[float, float]]:
    """What the kick does to the moments' result: rms over the places, and the noise in it."""
    settings = MilkyWaySettings()
    frame = MilkyWay(settings).frame
    ball = Ball(frame.sun_position, settings.ball_radius_kpc)
    places = Places(PlacesSettings(), frame, ball.center, ball.radius, Kernel().reach)
    moments = Moments(MomentsSettings(), ball)
    fields, replicas = [], []
    for which in (0, 1):
        field, parts = moments.jackknife([moments.sums(both[which]) for both in pairs])
        fields.append(values_of(field, places))
        replicas.append([values_of(field.with_parameters(p), places) for p in parts])
    shift = fields[1] - fields[0]
    spread = np.array(replicas[1]) - np.array(replicas[0])
    variance = (len(pairs) - 1) / len(pairs) * ((spread - spread.mean(0)) ** 2).sum(0)
    return relative_shifts(shift, variance, fields[0], places)
