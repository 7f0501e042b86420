"""Stars for the benchmark of noise: a disc mock as Gaia sees it, with and without its errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.catalog import galactocentric, galactocentric_covariance
from galray.catalog.columns import CORRELATIONS, ERRORS, OBSERVABLES
from galray.frame import GalacticFrame
from galray.mocks import MilkyWay, MilkyWaySettings, ObserveSettings
from galray.mocks.observe import observe_with_truth
from galray.phasespace import Ball

__all__ = ["OBSERVER", "NoisyStars", "noisy_stars"]

FOLDER = Path(__file__).parents[1] / "runs" / "benchmarks" / "phasespace"
FRAME = GalacticFrame()
OBSERVER = (*FRAME.sun_position, *FRAME.sun_velocity_km_s)


@dataclass
class NoisyStars:
    """One realisation.

    Attributes:
        ball: The ball that the stars were cut at.
        true: States before the errors, (n, 6).
        measured: States as measured, (m, 6): other stars lie in the ball.
        covariance: Covariances from the measured observables, (m, 6, 6).
    """

    ball: Ball
    true: Tensor
    measured: Tensor
    covariance: Tensor


def _galaxy(count: int, radius: float, seed: int) -> Any:
    """The mock's table, kept on disk."""
    import pyarrow.parquet as pq

    path = FOLDER / f"disc-{count}-{radius:g}-{seed}.parquet"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(MilkyWay(MilkyWaySettings(num_stars=count, ball_radius_kpc=radius)).sample(seed), path)
    return pq.read_table(path)


def noisy_stars(
    count: int, parts: int, *, scale: float, radius: float, beyond: float, seed: int
) -> list[NoisyStars]:
    """Disjoint realisations of one mock.

    Arguments:
        count: Stars in the mock.
        parts: Realisations they are dealt into.
        scale: Factor on the errors of Gaia DR3 for the mock's giants.
        radius: Of the ball of stars that are used, in kpc.
        beyond: Of the ball that holds the mock, which errors scatter stars from.
        seed: Of the mock and of its errors.
    """
    table = _galaxy(count, beyond, seed)
    seen, truth = observe_with_truth(
        table, ObserveSettings(noise_scale=scale, rv_missing_fraction=0.0), seed + 1
    )
    column = lambda t, names: np.stack([t[name].to_numpy() for name in names], 1).astype(float)  # noqa: E731
    y, errors, correlations = (column(seen, names) for names in (OBSERVABLES, ERRORS, CORRELATIONS))
    true = column(truth, ("x", "y", "z", "vx", "vy", "vz"))
    possible = y[:, 2] > 0
    y, errors, correlations, true = y[possible], errors[possible], correlations[possible], true[possible]
    measured = galactocentric(y, FRAME)
    ball = Ball(FRAME.sun_position, radius)
    near = lambda w: np.linalg.norm(w[:, :3] - FRAME.sun_position, axis=1) < radius  # noqa: E731
    realisations = []
    for part in range(parts):
        mine = np.arange(len(y)) % parts == part
        inside, seen_inside = mine & near(true), mine & near(measured)
        covariance = galactocentric_covariance(
            y[seen_inside], errors[seen_inside], correlations[seen_inside], FRAME
        )
        realisations.append(
            NoisyStars(
                ball,
                torch.from_numpy(true[inside]),
                torch.from_numpy(measured[seen_inside]),
                torch.from_numpy(covariance),
            )
        )
    return realisations
