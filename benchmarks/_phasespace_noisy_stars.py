"""Stars for the benchmark of noise: two galaxies as Gaia sees faint tracers, with and without their errors.

The slab is exact: an isothermal sheet (Spitzer 1942) with Maxwellian velocities, the same everywhere along
the plane, as the Sun sees it from a local standard of rest that does not rotate,

    Φ = 2σ² ln cosh(z/h),    n ∝ sech²(z/h),    σ_z = σ everywhere.

The disc is the mock Milky Way, whose gravity is exact and whose f has no closed form. Both get the same
errors: the law of Gaia DR3 for apparent magnitudes G uniform from 14.5 to 16.5, so that the parallax error is
0.02 to 0.06 mas (on average 4, 8 and 12 %, at most 6, 12 and 18 % of the distance at 1, 2 and 3 kpc), proper
motions in proportion, and radial velocities good to 10 to 20 km/s. The magnitude says nothing of the place: a
star's covariance is no hint at its true distance, as the deconvolution by flows and score networks takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks._phasespace_common import PARTS
from galray.catalog import galactocentric, galactocentric_covariance
from galray.catalog.columns import OBSERVABLES
from galray.frame import GalacticFrame
from galray.mocks import MilkyWay, MilkyWaySettings
from galray.mocks.observe import observables, parallax_error
from galray.phasespace import Ball

__all__ = ["ERRORS", "GALAXIES", "NoisyStars", "noisy_stars", "observer", "places", "pull"]

RADIUS = 3.0  # kpc, of the ball of stars that are used
BEYOND = 6.5  # kpc from the Sun along the plane: errors scatter the slab's stars into the ball from there
DISPERSION, ACROSS, HEIGHT = 25.0, 40.0, 0.5
DRAWN, DRAWN_RADIUS, SEED = 400_000, 4.5, 7  # of the disc's draw, which takes minutes and is kept
ERRORS = {"magnitudes": (14.5, 16.5), "velocities": (10.0, 20.0)}  # G; radial velocities in km/s
RELATIVE = np.array([0.80, 0.70, 1.0, 1.03, 0.89])  # ra, dec, parallax, pmra, pmdec: Gaia DR3, sky averages
FRAMES = {"slab": GalacticFrame(sun_velocity_km_s=(11.1, 12.24, 7.25)), "disc": GalacticFrame()}
GALAXIES = tuple(FRAMES)


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


def observer(galaxy: str) -> tuple[float, float, float, float, float, float]:
    """The Sun's position and velocity in one of `GALAXIES`."""
    frame = FRAMES[galaxy]
    return (*frame.sun_position, *frame.sun_velocity_km_s)


def _slab(count: int, rng: np.random.Generator) -> np.ndarray:
    """Stars of the slab in a cylinder about the Sun: shape (count, 6)."""
    radius, angle = BEYOND * np.sqrt(rng.random(count)), 2 * np.pi * rng.random(count)
    z = HEIGHT * np.arctanh(2 * rng.random(count) - 1)
    x = np.stack([FRAMES["slab"].sun_position[0] + radius * np.cos(angle), radius * np.sin(angle), z], 1)
    return np.concatenate([x, rng.standard_normal((count, 3)) * [ACROSS, ACROSS, DISPERSION]], 1)


@lru_cache(maxsize=1)
def _disc() -> np.ndarray:
    path = PARTS / f"disc-{DRAWN}-{DRAWN_RADIUS:g}-{SEED}.parquet"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        galaxy = MilkyWay(MilkyWaySettings(num_stars=DRAWN, ball_radius_kpc=DRAWN_RADIUS))
        pq.write_table(galaxy.sample(SEED), path)
    table = pq.read_table(path)
    return np.stack([table[name].to_numpy() for name in ("x", "y", "z", "vx", "vy", "vz")], 1).astype(float)


@lru_cache(maxsize=1)
def noisy_stars(galaxy: str, count: int, number: int) -> NoisyStars:
    """One realisation: stars and errors of its own (the slab), or errors alone (the disc).

    Arguments:
        galaxy: One of `GALAXIES`.
        count: Stars before the ball is cut; of the disc its first.
        number: Of the realisation.
    """
    frame = FRAMES[galaxy]
    rng = np.random.default_rng([number, 4, len(galaxy)])
    true = _slab(count, rng) if galaxy == "slab" else _disc()[:count]
    exact = observables(true, frame)
    y = np.stack([exact[name] for name in OBSERVABLES], 1)
    size = parallax_error(rng.uniform(*ERRORS["magnitudes"], len(y)))[:, None]
    errors = np.concatenate([size * RELATIVE, rng.uniform(*ERRORS["velocities"], (len(y), 1))], 1)
    noise = errors * rng.standard_normal(y.shape)
    y[:, 2:] += noise[:, 2:]  # of milliarcseconds on the sky nothing is seen
    y, errors, true = y[y[:, 2] > 0], errors[y[:, 2] > 0], true[y[:, 2] > 0]
    measured = galactocentric(y, frame)
    near = lambda w: np.linalg.norm(w[:, :3] - frame.sun_position, axis=1) < RADIUS  # noqa: E731
    seen = near(measured)
    covariance = galactocentric_covariance(y[seen], errors[seen], np.zeros((seen.sum(), 10)), frame)
    return NoisyStars(
        Ball(frame.sun_position, RADIUS),
        torch.from_numpy(true[near(true)]),
        torch.from_numpy(measured[seen]),
        torch.from_numpy(covariance),
    )


def places(galaxy: str) -> Tensor:
    """Where σ_z and a_z are judged, within 2 kpc, 0.5 to 1.5 kpc from the plane, |sin b| > 0.7: (200, 3)."""
    generator = torch.Generator().manual_seed(1)
    sun = torch.tensor(FRAMES[galaxy].sun_position, dtype=torch.float64)
    offset = 4.0 * torch.rand(20_000, 3, generator=generator, dtype=torch.float64) - 2.0
    distance, height = offset.norm(dim=1), (offset[:, 2] + sun[2]).abs()
    kept = (distance < 2.0) & (height > 0.5) & (height < 1.5) & (height > 0.7 * distance)
    return (offset[kept] + sun)[:200]


def pull(galaxy: str, field: Any) -> float:
    """a_z of a field against the true one over the places: Σ a a_true / Σ a_true²."""
    x = places(galaxy)
    if galaxy == "slab":
        truth = -2 * DISPERSION**2 / HEIGHT * torch.tanh(x[:, 2] / HEIGHT)
    else:
        truth = MilkyWay().potential.acceleration(x)[:, 2]
    a = field.acceleration(x).detach()[:, 2]
    return float((a * truth).sum() / truth.square().sum())
