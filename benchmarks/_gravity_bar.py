"""A Galaxy that is not axisymmetric: pattern speed and gravity from Gaia-like stars of a barred mock.

The inversions in (x, y, z) fit Ω_p with the gravity; the one in (R, z) stands beside them to show what an
assumed symmetry costs. The distance of Ω_p from the truth is in errors that hold its shift when the stars are
redrawn from their measurement errors and, by scores, its shift when every network sees half the stars and not
a quarter: what networks smooth away falls with their stars, and all networks of a size smooth alike. Truth is
the mock's own gravity at random places of the inner ball.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import Bench
from benchmarks._gravity_equilibrium import pair
from benchmarks._gravity_parts import cpu_seconds, part
from benchmarks._gravity_shifts import relative_shifts, values_of
from galray.catalog.astrometry import add_states
from galray.frame import GalacticFrame
from galray.gravity import (
    Kernel,
    Moments,
    MomentsSettings,
    PotentialSettings,
    RotatingSettings,
    fit_rotating_frame,
    stellar_tests,
)
from galray.gravity.disturbance import disturbances
from galray.mocks import BarredGalaxy, BarredGalaxySettings, ObserveSettings
from galray.mocks.observe import observe
from galray.phasespace import Ball, ScoreSettings, build_model, objective
from galray.results import Places, PlacesSettings
from galray.training import TrainingSettings, fit, split

STATE = ["x", "y", "z", "vx", "vy", "vz"]
FRAME = GalacticFrame()
BALL = Ball(
    FRAME.sun_position, 3.6
)  # errors scatter stars in as well as out of it: the mock's ball has 4 kpc
INNER = 0.75  # of the ball: where gravity is compared
FOLDS = 4


def barred_stars(count: int, seed: int) -> tuple[list[np.ndarray], float]:
    """States of a barred mock in the ball, and the CPU-seconds spent.

    Returns:
        The stars as they are, as Gaia sees them, and as it would see what it saw: redrawn from their errors.
    """

    def work(folder: Path) -> dict[str, Any]:
        table = BarredGalaxy(BarredGalaxySettings(num_stars=count)).sample(seed)
        pq.write_table(table, folder / "stars.parquet")
        return {"stars": count}

    found, folder = part({"what": "barred mock", "stars": count, "seed": seed}, work)
    table = pq.read_table(folder / "stars.parquet")
    true = np.stack([table[name].to_numpy() for name in STATE], -1)
    once = smeared(table, seed)
    samples = [true, *(one.select(STATE).to_numpy() for one in (once, smeared(once.to_arrow(), seed + 1)))]
    return [_in_ball(w) for w in samples], found["cpu_seconds"]


def smeared(table: pa.Table, seed: int) -> pl.DataFrame:
    """States that follow from Gaia's observables, distances being inverse parallaxes, and the magnitudes."""
    seen = pl.from_arrow(observe(table, ObserveSettings(rv_missing_fraction=0.0), seed))
    assert isinstance(seen, pl.DataFrame)
    own = [pl.Series(name, table[name].to_numpy()) for name in ("abs_g_mag", "bp_rp")]
    seen = seen.drop("bp_rp").with_columns(own).filter(pl.col("parallax_over_error") > 5)
    return add_states(seen, FRAME).select([*STATE, "abs_g_mag", "bp_rp"])


def _in_ball(w: np.ndarray) -> np.ndarray:
    inside = np.linalg.norm(w[:, :3] - np.array(BALL.center), axis=1) < BALL.radius
    return w[inside & np.isfinite(w).all(1)]


def fold_scores(
    w: np.ndarray, label: str, fold: int, epochs: int, folds: int = FOLDS
) -> tuple[np.ndarray, float]:
    """Scores at all stars of a network trained on every `folds`-th of them, and the CPU-seconds spent."""

    def work(folder: Path) -> dict[str, Any]:
        torch.set_num_threads(1)
        stars = torch.from_numpy(w)
        mine = stars[fold::folds]
        training = TrainingSettings(epochs=epochs)
        train, held = split(len(mine), training.validation_fraction, fold)
        model = build_model("score", ScoreSettings(coordinates="cylindrical"), BALL, mine[train], seed=fold)
        done = fit(model, objective("score"), mine[train].float(), mine[held].float(), training, seed=fold)
        with torch.no_grad():
            scores = torch.cat([model.score(chunk) for chunk in stars.split(16_384)])
        np.save(folder / "scores.npy", scores.numpy())
        return {"best": done.best, "epochs": done.epochs}

    task = {"what": f"score fold of {label}", "stars": len(w), "fold": fold, "of": folds, "epochs": epochs}
    found, folder = part(task, work)
    return np.load(folder / "scores.npy").astype(float), found["cpu_seconds"]


def places_to_compare(galaxy: BarredGalaxy) -> tuple[torch.Tensor, torch.Tensor]:
    """A thousand places of the inner ball, and the true acceleration there."""
    rng = np.random.default_rng(0)
    direction = rng.standard_normal((1000, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    offset = INNER * BALL.radius * np.cbrt(rng.random((1000, 1))) * direction
    x = torch.from_numpy(np.array(BALL.center) + offset)
    return x, galaxy.potential.acceleration(x)


def by_scores(
    w: np.ndarray, label: str, epochs: int, speed: float | None = None, folds: int = FOLDS
) -> dict[str, Any]:
    """Φ as a spline and the pattern speed from the products of several networks' residuals."""
    found = [fold_scores(w, label, fold, epochs, folds) for fold in range(folds)]
    begin = cpu_seconds()
    fit_ = fit_rotating_frame(
        [scores for scores, _ in found],
        w,
        PotentialSettings(base="xyz", basis="spline"),
        ball=BALL,
        rotating=RotatingSettings(pattern_speed=speed),
    )
    spent = sum(seconds for _, seconds in found) + cpu_seconds() - begin
    print(f"# {label}: {fit_.sentence}", flush=True)
    return {"field": fit_.field, "speed": fit_.frame.pattern_speed, "error": fit_.error, "known": fit_.known,
            "asymmetry": fit_.asymmetry, "seconds": spent}  # fmt: skip


def by_moments(w: np.ndarray, label: str, settings: MomentsSettings) -> dict[str, Any]:
    """Accelerations at the places to compare, and the pattern speed, kept on disk."""
    x, _ = places_to_compare(BarredGalaxy())

    def work(folder: Path) -> dict[str, Any]:
        torch.set_num_threads(1)
        moments = Moments(settings, BALL)
        field, sums = moments.fit(w)
        np.save(folder / "acceleration.npy", field.acceleration(x).numpy())
        speed = moments.result(sums).pattern_speed
        if speed is None:
            return {"known": False}
        known = {"speed": speed.value, "error": speed.error} if speed.known else {}
        return {"known": speed.known, "significance": speed.significance, **known}

    task = {"what": f"moments of {label}", "stars": len(w), "settings": settings.model_dump(mode="json")}
    found, folder = part(task, work)
    return {**found, "acceleration": torch.from_numpy(np.load(folder / "acceleration.npy"))}


def measure(bench: Bench) -> None:
    count, epochs = (20_000, 4) if bench.quick else (200_000, 20)
    galaxy = BarredGalaxy()
    x, truth = places_to_compare(galaxy)
    speed = galaxy.pattern_speed
    (true, seen, twice), seconds = barred_stars(count, 1)
    label = f"barred mock, {count} stars"
    bench.row(f"{label}: making it", seconds, "s", cpu_seconds=seconds)

    def rms(a: torch.Tensor) -> float:
        return float((a - truth).norm() / truth.norm())

    def limit(bar: float) -> float | None:
        return None if bench.quick else bar

    free = MomentsSettings(basis="xyz", pattern_speed="fit")
    name = "barred mock, smeared twice, seed 1"
    redrawn = {
        "scores": lambda stars: by_scores(stars, name, epochs),
        "moments": lambda stars: by_moments(stars, name, free),
    }
    for w, words in ((true, "true states"), (seen, "Gaia-smeared")):
        own = "barred mock, seed 1" if w is true else "barred mock, smeared, seed 1"
        for method, found in (("scores", by_scores(w, own, epochs)), ("moments", by_moments(w, own, free))):
            spent = found.get("seconds", found.get("cpu_seconds"))
            head = f"{label}, {words}: {method}"
            if found["known"]:
                value, error = found["speed"], found["error"]
                if method == "scores":
                    halves = by_scores(w, own, epochs, folds=2)
                    value, shift = halves["speed"], halves["speed"] - found["speed"]
                    spent += halves["seconds"]
                    bench.row(
                        f"{head}, shift from networks of a quarter of the stars to ones of half",
                        shift,
                        "km/s/kpc",
                        cpu_seconds=halves["seconds"],
                    )
                    error = float(np.hypot(error, shift))
                bench.row(f"{head}, pattern speed", value, "km/s/kpc", cpu_seconds=spent)
                bench.row(f"{head}, its error", error, "km/s/kpc", cpu_seconds=0.0)
                if w is seen:
                    # the stars' errors move Ω, and once more about as much where they are drawn again
                    again = redrawn[method](twice)
                    shift = again["speed"] - found["speed"] if again["known"] else float("nan")
                    bench.row(
                        f"{head}, shift by one more draw of errors", shift, "km/s/kpc", cpu_seconds=spent
                    )
                    error = float(np.hypot(error, shift))
                away = abs(value - speed) / error
                text = f"{head}, distance from {speed:g} in errors"
                bench.row(text, away, bar=limit(2.0), cpu_seconds=0.0)
            else:
                bench.row(
                    f"{head}, pattern speed", float("nan"), "km/s/kpc", bar=limit(2.0), cpu_seconds=spent
                )
            a = found["field"].acceleration(x) if "field" in found else found["acceleration"]
            bench.row(f"{head}, rms of a(x), frame fitted", rms(a), bar=limit(0.08), cpu_seconds=spent)
    still = by_scores(seen, "barred mock, smeared, seed 1", epochs, 0.0)
    bench.row(
        f"{label}, Gaia-smeared: scores, rms of a(x), frame taken to stand still",
        rms(still["field"].acceleration(x)),
        cpu_seconds=still["seconds"],
    )
    plane = by_moments(seen, "barred mock, smeared, seed 1", MomentsSettings())
    bench.row(
        f"{label}, Gaia-smeared: moments in (R, z), rms of a(x)",
        rms(plane["acceleration"]),
        bar=limit(0.12),
        at_least=True,
        cpu_seconds=plane["cpu_seconds"],
    )
    if not bench.quick:
        _axisymmetric(bench, epochs)
        _shifts(bench, true, galaxy)


def _axisymmetric(bench: Bench, epochs: int) -> None:
    """Stars of an axisymmetric Galaxy do not tell a pattern speed, and that is said."""
    w = _in_ball(np.concatenate([pair(seed, 50_000)[0] for seed in range(3)]))
    w = w[np.random.default_rng(0).permutation(len(w))]
    found = by_scores(w, "axisymmetric mock", epochs)
    label = f"axisymmetric mock, {len(w)} stars"
    bench.row(f"{label}: scores claim a pattern speed", found["known"], bar=0, cpu_seconds=found["seconds"])
    bench.row(f"{label}: asymmetry of the scores", found["asymmetry"], cpu_seconds=0.0)
    found = by_moments(w, "axisymmetric mock", MomentsSettings(basis="xyz", pattern_speed="fit"))
    bench.row(
        f"{label}: moments claim a pattern speed", found["known"], bar=0, cpu_seconds=found["cpu_seconds"]
    )


def _shifts(bench: Bench, w: np.ndarray, galaxy: BarredGalaxy) -> None:
    """What the bar does to the quantities of an axisymmetric, steady inversion."""
    places = Places(PlacesSettings(), FRAME, BALL.center, BALL.radius, Kernel().reach)
    moments = Moments(MomentsSettings(), BALL)
    with bench.cpu():
        field, replicas = moments.jackknife([moments.sums(w[i::10]) for i in range(10)])
    truth, found = values_of(galaxy.potential, places), values_of(field, places)
    spread = np.array([values_of(field.with_parameters(r), places) for r in replicas])
    variance = 0.9 * ((spread - spread.mean(0)) ** 2).sum(0)
    table = disturbances()["non_axisymmetric"]
    amplitude = stellar_tests(w)["azimuth"].amplitude
    bench.row("bar: amplitude in the stars", amplitude, cpu_seconds=0.0)
    for name, (shift, noise) in relative_shifts(found - truth, variance, truth, places).items():
        unit = "Msun/pc3" if name.startswith("rho") else ""
        bench.row(f"bar: shift of {name} by the moments in (R, z)", shift, unit)
        bench.row(f"bar: shift of {name}, its noise", noise, unit, cpu_seconds=0.0)
        bench.row(
            f"bar: shift of {name}, table over measured",
            table["shift"][name] / max(shift, noise, 1e-12),
            cpu_seconds=0.0,
        )
