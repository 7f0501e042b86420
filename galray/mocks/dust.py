"""Dust whose truth is known: a random field, a thin layer and clouds → extinction → a selection of stars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.interpolate import CubicSpline

from galray.mocks.discs import giants
from galray.mocks.settings import DustSettings

__all__ = ["DustMap"]

_STEPS = 64  # along each line of sight
_CHUNK = 65_536
_MAGNITUDES = 20_000  # giants over which the efficiency is the mean
_STEP_KPC = 1e-4  # of the differences that give the gradient: small against a cell, large against round-off


class DustMap:
    """Dust in a ball around an observer, and the probability that a star behind it is seen.

    The density of extinction is

        κ(x) = κ₀ exp(g(x) − σ²/2) exp(−|z|/h) + Σ clouds,

    g a Gaussian random field of power spectrum P(k) ∝ (k₀² + k²)^{−γ/2}. Its integral along the line of
    sight, A(x) = ∫ κ ds, is kept on a grid; between the nodes the extinction *is* the cubic spline through
    them, so that it and everything made of it are smooth and known exactly.

    Arguments:
        settings: The dust and the limiting magnitude.
        observer: Place from which the extinction is counted, kpc.
        radius: Of the ball, kpc.
        seed: Of the field and the clouds.
    """

    def __init__(
        self, settings: DustSettings, observer: Sequence[float], radius: float, seed: int = 0
    ) -> None:
        self.settings = settings
        self.observer = np.array(observer, dtype=float)
        self.radius = float(radius)
        self.seed = int(seed)
        field, cloud, stars = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
        half = int(np.ceil(radius / settings.cell_kpc)) + 1
        self._half = half
        self._field = _random_field(2 * half + 1, settings, field)
        flat = cloud.uniform(-1.0, 1.0, (settings.clouds, 3)) * 0.7 * radius
        flat[:, 2] = cloud.normal(0.0, settings.height_kpc, settings.clouds) - self.observer[2]
        self.clouds: np.ndarray = self.observer + flat
        nodes = np.arange(-half, half + 1) * settings.cell_kpc
        grid = np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), -1).reshape(-1, 3)
        inside = np.flatnonzero((grid**2).sum(1) < (radius + 4 * settings.cell_kpc) ** 2)
        values = np.zeros(len(grid))
        for rows in np.array_split(inside, len(inside) // _CHUNK + 1):
            values[rows] = self._integral(grid[rows])
        self._spline = ndimage.spline_filter(values.reshape(self._field.shape), order=3)
        magnitude, _ = giants(np.zeros(_MAGNITUDES, dtype=int), stars)
        shift = np.linspace(-5.0, 40.0, 901)
        mean = np.array([self._logistic(magnitude + s).mean() for s in shift])
        self._log_mean = CubicSpline(shift, np.log(np.maximum(mean, 1e-300)))

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` makes the same dust of, as JSON values."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "observer": self.observer.tolist(),
            "radius": self.radius,
            "seed": self.seed,
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DustMap:
        """The dust that `to_dict` described."""
        settings = DustSettings.model_validate(values["settings"])
        return DustMap(settings, values["observer"], values["radius"], values["seed"])

    def density(self, x: Any) -> np.ndarray:
        """The extinction per kpc at positions (n, 3), in mag/kpc: shape (n,)."""
        s = self.settings
        offset = np.asarray(x, dtype=float) - self.observer
        g = ndimage.map_coordinates(self._field, self._at(offset), order=1, mode="nearest")
        height = np.abs(offset[:, 2] + self.observer[2])
        out = s.extinction_mag_kpc * np.exp(g - s.log_amplitude**2 / 2 - height / s.height_kpc)
        peak = s.cloud_extinction_mag / (np.sqrt(2 * np.pi) * s.cloud_radius_kpc)
        for cloud in self.clouds - self.observer:
            out += peak * np.exp(-((offset - cloud) ** 2).sum(1) / (2 * s.cloud_radius_kpc**2))
        return out

    def extinction(self, x: Any) -> np.ndarray:
        """A_G of a star at positions (n, 3) in the ball, mag: shape (n,)."""
        offset = np.asarray(x, dtype=float) - self.observer
        return ndimage.map_coordinates(
            self._spline, self._at(offset), order=3, prefilter=False, mode="nearest"
        )

    def probability(self, x: Any, abs_mag: Any) -> np.ndarray:
        """The probability that stars of absolute magnitudes (n,) at x (n, 3) are seen: shape (n,)."""
        if self.settings.limit_mag is None:
            return self.efficiency(x)
        return self._logistic(np.asarray(abs_mag) + self._shift(x))

    def log_efficiency(self, x: Any) -> np.ndarray:
        """Log ε at positions (n, 3): the mean probability over the mock's giants. Shape (n,)."""
        if self.settings.limit_mag is None:
            return -0.4 * np.log(10.0) * np.maximum(self.extinction(x), 0.0)
        return np.minimum(self._log_mean(self._shift(x)), 0.0)

    def efficiency(self, x: Any) -> np.ndarray:
        """ε at positions (n, 3): shape (n,), from 0 to 1."""
        return np.exp(self.log_efficiency(x))

    def gradient(self, x: Any) -> np.ndarray:
        """∇ log ε at positions (n, 3) in 1/kpc: shape (n, 3)."""
        x = np.asarray(x, dtype=float)
        out = np.empty_like(x)
        for i, step in enumerate(_STEP_KPC * np.eye(3)):
            out[:, i] = (self.log_efficiency(x + step) - self.log_efficiency(x - step)) / (2 * _STEP_KPC)
        return out

    def _shift(self, x: Any) -> np.ndarray:
        """Apparent less absolute magnitude."""
        distance = np.linalg.norm(np.asarray(x, dtype=float) - self.observer, axis=1)
        return self.extinction(x) + 10.0 + 5.0 * np.log10(np.maximum(distance, 1e-6))

    def _logistic(self, magnitude: np.ndarray) -> np.ndarray:
        limit = self.settings.limit_mag if self.settings.limit_mag is not None else np.inf
        return 1.0 / (1.0 + np.exp(np.minimum((magnitude - limit) / self.settings.limit_width_mag, 700.0)))

    def _at(self, offset: np.ndarray) -> np.ndarray:
        """Coordinates of the grid, (3, n)."""
        return (offset / self.settings.cell_kpc + self._half).T

    def _integral(self, offset: np.ndarray) -> np.ndarray:
        """∫ κ ds from the observer to offsets (n, 3), by the midpoint rule."""
        total = np.zeros(len(offset))
        for t in (np.arange(_STEPS) + 0.5) / _STEPS:
            total += self.density(self.observer + t * offset)
        return total * np.linalg.norm(offset, axis=1) / _STEPS


def _random_field(size: int, settings: DustSettings, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian random field of mean 0 and the settings' standard deviation on a periodic cube."""
    frequency = np.fft.fftfreq(size, settings.cell_kpc)
    half = np.fft.rfftfreq(size, settings.cell_kpc)
    k2 = frequency[:, None, None] ** 2 + frequency[None, :, None] ** 2 + half[None, None, :] ** 2
    amplitude = (settings.outer_scale_kpc**-2 + k2) ** (-settings.spectrum_slope / 4)
    amplitude[0, 0, 0] = 0.0
    noise = np.fft.rfftn(rng.standard_normal((size, size, size)))
    field = np.fft.irfftn(noise * amplitude, (size, size, size), axes=(0, 1, 2))
    return field * (settings.log_amplitude / field.std())
