"""What counts of stars can tell of ε at single positions behind a field of dust, at best.

The best linear estimate of log ε from the counts of all stars, where n(x) and the spectrum of the dust are
known: the prior is the covariance of extinctions along lines of sight through the field, the noise Poisson's
of the expected counts. Seen from the middle of the ball the prior has no direction, so that around the line
of sight to a position only means over rings matter, and their equations are solved as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from galray.mocks import DustSettings

__all__ = ["least_errors"]

Array = NDArray[np.float64]

_AZIMUTHS = 48  # of half a ring


def least_errors(
    settings: DustSettings,
    log_density: Callable[[Array], Array],
    efficiency: Callable[[Array], Array],
    count: int,
    radius: float,
    *,
    step: float = 0.05,
    degrees: float = 0.8,
) -> tuple[float, float]:
    """The rms error of log ε at positions with r uniform in 0.3-3, and at stars in the same range.

    Arguments:
        settings: The dust, without layer, clouds and limiting magnitude.
        log_density: Log n + const of radii.
        efficiency: Mean ε of radii.
        count: Stars seen in the ball.
        radius: Of the ball.
        step: Of the radii of cells.
        degrees: Of the innermost rings about the line of sight; the others widen outwards.
    """
    r = np.arange(step / 2, radius, step)
    stars = r**2 * np.exp(log_density(r)) * efficiency(r)
    stars *= count / (4 * np.pi * step * stars.sum())  # per radius and solid angle
    edges = np.concatenate([np.arange(4) * degrees, 4 * degrees * 1.22 ** np.arange(13)])
    edges = np.radians(edges[edges < 65])
    theta = (edges[1:] + edges[:-1]) / 2
    angles = np.radians(np.concatenate([np.linspace(0, 10, 41), np.linspace(10, 130, 80)[1:]]))
    table = _covariances(settings, r, angles)

    def at(angle: Array) -> Array:
        """Covariances at angles (k): shape (k, radii, radii)."""
        k = np.clip(np.searchsorted(angles, angle) - 1, 0, len(angles) - 2)
        t = ((angle - angles[k]) / (angles[k + 1] - angles[k]))[:, None, None]
        return (1 - t) * table[k] + t * table[k + 1]

    phi = (np.arange(_AZIMUTHS) + 0.5) / _AZIMUTHS * np.pi
    prior = np.zeros((len(theta), len(r), len(theta), len(r)))
    for i, a in enumerate(theta):
        for j, b in enumerate(theta):
            cosine = np.cos(a) * np.cos(b) + np.sin(a) * np.sin(b) * np.cos(phi)
            prior[i, :, j] = at(np.arccos(np.clip(cosine, -1, 1))).mean(0)
    solid = 2 * np.pi * -np.diff(np.cos(edges))
    size = len(theta) * len(r)
    seen = prior.reshape(size, size) + np.diag(1 / (solid[:, None] * stars * step).ravel())
    look = np.flatnonzero((r > 0.3) & (r < 3))
    cross = at(theta)[:, :, look].reshape(size, len(look))
    told = (cross * linalg.solve(seen, cross, assume_a="pos")).sum(0)
    left = table[0][look, look] - told
    return float(np.sqrt(left.mean())), float(np.sqrt(np.average(left, weights=stars[look])))


def _covariances(settings: DustSettings, r: Array, angles: Array) -> Array:
    """Of log ε at radii along two lines of sight: shape (angles, radii, radii)."""
    distance, field = _field_covariance(settings, 2 * r[-1])
    step = r[1] - r[0]
    scale = (0.4 * np.log(10) * settings.extinction_mag_kpc * step) ** 2
    out = np.zeros((len(angles), len(r), len(r)))
    for k, angle in enumerate(angles):
        apart = r[:, None] ** 2 + r**2 - 2 * np.cos(angle) * np.outer(r, r)
        # the mean of exp(g − σ²/2) is 1, and its covariance exp(C) − 1
        cell = scale * np.expm1(np.interp(np.sqrt(np.maximum(apart, 0)), distance, field))
        total = np.pad(cell.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        out[k] = (total[1:, 1:] + total[:-1, 1:] + total[1:, :-1] + total[:-1, :-1]) / 4  # to the middles
    return out


def _field_covariance(settings: DustSettings, largest: float) -> tuple[Array, Array]:
    """Distances, and the covariance of the Gaussian field at them, as its grid has it."""
    size = 2 * int(np.ceil(largest / 2 / settings.cell_kpc)) + 3
    frequency, half = np.fft.fftfreq(size, settings.cell_kpc), np.fft.rfftfreq(size, settings.cell_kpc)
    axes: Any = (frequency[:, None, None], frequency[None, :, None], half[None, None, :])
    power = (settings.outer_scale_kpc**-2 + sum(k**2 for k in axes)) ** (-settings.spectrum_slope / 2)
    power[0, 0, 0] = 0.0
    found = np.fft.irfftn(power, (size,) * 3, axes=(0, 1, 2))
    found *= settings.log_amplitude**2 / found[0, 0, 0]
    steps = np.fft.fftfreq(size, 1 / size) * settings.cell_kpc
    distance = np.sqrt(sum(s**2 for s in np.meshgrid(steps, steps, steps, indexing="ij"))).ravel()
    shell = np.rint(distance / 0.1).astype(int)
    number = np.bincount(shell)
    mean = [np.bincount(shell, a)[number > 0] / number[number > 0] for a in (distance, found.ravel())]
    inside = mean[0] < largest / 2  # of a periodic field: half the box
    return mean[0][inside], mean[1][inside]
