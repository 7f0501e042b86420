"""Masses from one dispersion and one radius: Walker's and Wolf's estimators."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from galray.units import G

__all__ = ["walker_mass", "wolf_mass"]

Array = NDArray[np.float64]


def wolf_mass(dispersion: Array | float, half_radius: Array | float) -> Array | float:
    """M(<4 R_half/3) = 4 ⟨σ_los²⟩ R_half / G, Wolf et al. (2010), eq. 2, in Msun.

    Arguments:
        dispersion: Luminosity-weighted line-of-sight dispersion, km/s.
        half_radius: Projected half-light radius, kpc.
    """
    return 4 * dispersion**2 * half_radius / G


def walker_mass(dispersion: Array | float, half_radius: Array | float) -> Array | float:
    """M(<R_half) = (5/2) σ_los² R_half / G, Walker et al. (2009), eq. 11, in Msun.

    Arguments:
        dispersion: Line-of-sight dispersion, km/s.
        half_radius: Projected half-light radius, kpc.
    """
    return 2.5 * dispersion**2 * half_radius / G
