"""How far a disturbance moves the quantities of a run: the figures behind the table of disturbances."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from galray.gravity import Kernel, smoothed_density
from galray.results import Places

__all__ = ["relative_shifts", "values_of"]

KINDS = {
    "a_R": ("a_R",),
    "a_phi": ("a_phi",),
    "a_z": ("a_z",),
    "rho": ("rho",),
    "rho_dm": ("rho_dm_average",),
}


def values_of(field: Any, places: Places) -> np.ndarray:
    """The quantities of a run from a field, no baryons taken off."""
    acceleration = field.acceleration(torch.from_numpy(places.x)).detach().numpy()
    density = np.full(len(places.x), np.nan)
    inside = places.density_rows
    density[inside] = smoothed_density(field, torch.from_numpy(places.x[inside]), Kernel()).detach().numpy()
    return places.values(acceleration, density, np.zeros(len(places.x)))


def relative_shifts(
    shift: np.ndarray, variance: np.ndarray, values: np.ndarray, places: Places
) -> dict[str, tuple[float, float]]:
    """Rms shift of each kind of quantity free of its noise, and the noise, at the tabulated places.

    Accelerations are relative to their typical size (a_phi to that of a_R), densities in Msun/pc³. The
    table of disturbances holds the larger of the two: a shift below its noise is no more than a bound.
    """
    out = {}
    for kind, names in KINDS.items():
        rows = [i for i, q in enumerate(places.quantities) if q.name in names and q.profile is None]
        size = 1.0
        if kind.startswith("a_"):
            scale = "a_R" if kind == "a_phi" else kind
            same = [i for i, q in enumerate(places.quantities) if q.name == scale and q.profile is None]
            size = float(np.sqrt((values[same] ** 2).mean()))
        square, noise = float((shift[rows] ** 2).mean()), float(variance[rows].mean())
        out[kind] = (float(np.sqrt(max(square - noise, 0.0))) / size, float(np.sqrt(noise)) / size)
    return out
