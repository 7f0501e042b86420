"""The instrument z(x, v) of the estimating equation E[z (v·sₓ + a·sᵥ) | x] = 0."""

from __future__ import annotations

import numpy as np

from galray.gravity.region import Region
from galray.gravity.splines import Array

__all__ = ["VelocityMoments"]

_DEGREES = (3, 2)  # of the polynomials of u(x) and of Σ(x)
_SOFT = 1.0  # squared Mahalanobis speed at which an instrument's length is halved


class VelocityMoments:
    """Smooth mean u(x) and covariance Σ(x) of the velocities, by polynomial regression on the stars.

    Any z(x, v) is a valid instrument, so these need only be roughly right; how well they follow the stars
    decides how much noise is averaged, not whether the result is biased.

    Arguments:
        w: States (n, 6) inside the region.
        region: The ball.
    """

    def __init__(self, w: Array, region: Region) -> None:
        self.region = region
        x, v = w[:, :3], w[:, 3:]
        self._mean = _regress(self._features(x, _DEGREES[0]), v)
        centred = v - self.mean(x)
        self._typical = centred.T @ centred / len(centred)
        i, j = np.triu_indices(3)
        self._upper = _regress(self._features(x, _DEGREES[1]), centred[:, i] * centred[:, j])

    def _features(self, x: Array, degree: int) -> Array:
        t = (x - np.array(self.region.center)) / self.region.radius
        t[:, 2] = np.arcsinh(4 * x[:, 2] / self.region.radius) / np.arcsinh(
            4.0
        )  # discs change fast near z = 0
        powers = [t**k for k in range(degree + 1)]
        return np.stack(
            [
                powers[i][:, 0] * powers[j][:, 1] * powers[k][:, 2]
                for i in range(degree + 1)
                for j in range(degree + 1 - i)
                for k in range(degree + 1 - i - j)
            ],
            1,
        )

    def mean(self, x: Array) -> Array:
        """u(x) in km/s, shape (n, 3)."""
        return self._features(x, _DEGREES[0]) @ self._mean

    def covariance(self, x: Array) -> Array:
        """Σ(x) in (km/s)², shape (n, 3, 3), kept within a factor 10 of the whole sample's."""
        upper = self._features(x, _DEGREES[1]) @ self._upper
        out = np.empty((len(x), 3, 3))
        i, j = np.triu_indices(3)
        out[:, i, j] = upper
        out[:, j, i] = upper
        root = np.linalg.cholesky(self._typical)
        inverse = np.linalg.inv(root)
        values, vectors = np.linalg.eigh(inverse @ out @ inverse.T)
        vectors = root @ vectors
        return (vectors * np.clip(values, 0.1, 10.0)[:, None, :]) @ vectors.transpose(0, 2, 1)

    def instrument(self, w: Array) -> Array:
        """Give z = Σ⁻¹(v − u) / (1 + χ²), χ² = (v−u)ᵀΣ⁻¹(v−u), in 1/(km/s), shape (n, 3).

        The denominator bounds the influence of the fastest stars, where scores are worst; it depends on
        (x, v) alone and so leaves the equation valid. On scores of networks and flows trained on a disc mock
        a bound at χ² = 1 gave a third less error than one at 9.
        """
        centred = w[:, 3:] - self.mean(w[:, :3])
        z = np.linalg.solve(self.covariance(w[:, :3]), centred[..., None])[..., 0]
        return z / (1 + (z * centred).sum(1, keepdims=True) / _SOFT)


def _regress(features: Array, target: Array) -> Array:
    gram = features.T @ features
    gram[np.diag_indices_from(gram)] += 1e-9 * np.trace(gram) / len(gram)
    return np.asarray(np.linalg.solve(gram, features.T @ target), dtype=np.float64)
