"""A Galaxy that is not axisymmetric: its pattern speed and its gravity, from Gaia-like stars of a barred mock.

The inversions in (x, y, z) fit Ω_p with the gravity; the one in (R, z) stands beside them to show what an
assumed symmetry costs. Truth is the mock's own gravity at random places of the inner ball.
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
from benchmarks._gravity_parts import part
from galray.catalog.astrometry import add_states
from galray.frame import GalacticFrame
from galray.mocks import BarredGalaxy, BarredGalaxySettings, ObserveSettings
from galray.mocks.observe import observe
from galray.phasespace import Ball, ScoreSettings, build_model, objective
from galray.training import TrainingSettings, fit, split

STATE = ["x", "y", "z", "vx", "vy", "vz"]
FRAME = GalacticFrame()
BALL = Ball(
    FRAME.sun_position, 3.6
)  # errors scatter stars in as well as out of it: the mock's ball has 4 kpc
INNER = 0.75  # of the ball: where gravity is compared
FOLDS = 4


def barred_stars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """States of a barred mock in the ball, as they are and as Gaia sees them, and the CPU-seconds spent."""

    def work(folder: Path) -> dict[str, Any]:
        table = BarredGalaxy(BarredGalaxySettings(num_stars=count)).sample(seed)
        pq.write_table(table, folder / "stars.parquet")
        return {"stars": count}

    found, folder = part({"what": "barred mock", "stars": count, "seed": seed}, work)
    table = pq.read_table(folder / "stars.parquet")
    true = np.stack([table[name].to_numpy() for name in STATE], -1)
    return _in_ball(true), _in_ball(smeared(table, seed)), found["cpu_seconds"]


def smeared(table: pa.Table, seed: int) -> np.ndarray:
    """States that follow from Gaia's observables, distances being inverse parallaxes."""
    seen = pl.from_arrow(observe(table, ObserveSettings(rv_missing_fraction=0.0), seed))
    assert isinstance(seen, pl.DataFrame)
    seen = seen.filter(pl.col("parallax_over_error") > 5)
    return add_states(seen, FRAME).select(STATE).to_numpy()


def _in_ball(w: np.ndarray) -> np.ndarray:
    inside = np.linalg.norm(w[:, :3] - np.array(BALL.center), axis=1) < BALL.radius
    return w[inside & np.isfinite(w).all(1)]


def fold_scores(w: np.ndarray, label: str, fold: int, epochs: int) -> tuple[np.ndarray, float]:
    """Scores at all stars of a network trained on every `FOLDS`-th of them, and the CPU-seconds spent."""

    def work(folder: Path) -> dict[str, Any]:
        torch.set_num_threads(1)
        stars = torch.from_numpy(w)
        mine = stars[fold::FOLDS]
        training = TrainingSettings(epochs=epochs)
        train, held = split(len(mine), training.validation_fraction, fold)
        model = build_model("score", ScoreSettings(coordinates="cylindrical"), BALL, mine[train], seed=fold)
        done = fit(model, objective("score"), mine[train].float(), mine[held].float(), training, seed=fold)
        with torch.no_grad():
            scores = torch.cat([model.score(chunk) for chunk in stars.split(16_384)])
        np.save(folder / "scores.npy", scores.numpy())
        return {"best": done.best, "epochs": done.epochs}

    task = {"what": f"score fold of {label}", "stars": len(w), "fold": fold, "of": FOLDS, "epochs": epochs}
    found, folder = part(task, work)
    return np.load(folder / "scores.npy").astype(float), found["cpu_seconds"]
