"""The light of a galaxy from a published profile, where there is no photometry of its stars."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["king_radii", "plummer_radii", "sersic_radii"]

Array = NDArray[np.float64]


def sersic_radii(half_radius: float, index: float, count: int) -> Array:
    """Projected radii of a sample of Sérsic's Σ ∝ exp[−b (R/R_e)^(1/n)], one at each middle quantile.

    The enclosed light is the regularised Γ(2n, x), x = b (R/R_e)^(1/n), so that b = Γ⁻¹(2n, 1/2) and the
    quantiles follow in closed form (Ciotti & Bertin 1999).

    Arguments:
        half_radius: R_e.
        index: n.
        count: Number of radii.

    Returns:
        Radii in the unit of `half_radius`, rising, shape (count,).
    """
    from scipy.special import gammaincinv

    b = gammaincinv(2 * index, 0.5)
    return half_radius * (gammaincinv(2 * index, _quantiles(count)) / b) ** index


def king_radii(core: float, limit: float, count: int) -> Array:
    """The same of King's (1962) Σ ∝ {[1 + (R/R_c)²]^(−1/2) − [1 + (R_t/R_c)²]^(−1/2)}².

    Arguments:
        core: Core radius R_c.
        limit: Limiting radius R_t.
        count: Number of radii.
    """
    x = np.linspace(0, (limit / core) ** 2, 20_001)
    edge = 1 + (limit / core) ** 2
    # ∫Σ dR² in closed form (King 1962, eq. 18)
    light = np.log1p(x) - 4 * (np.sqrt(1 + x) - 1) / np.sqrt(edge) + x / edge
    return core * np.sqrt(np.interp(_quantiles(count), light / light[-1], x))


def plummer_radii(half_radius: float, count: int) -> Array:
    """The same of Plummer's Σ ∝ (1 + R²/a²)⁻², whose half-light radius is a.

    Arguments:
        half_radius: a.
        count: Number of radii.
    """
    u = _quantiles(count)
    return half_radius * np.sqrt(u / (1 - u))


def _quantiles(count: int) -> Array:
    return (np.arange(count) + 0.5) / count
