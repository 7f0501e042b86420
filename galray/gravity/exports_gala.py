"""A measured field as a gala potential."""

from __future__ import annotations

from typing import Any

import numpy as np
from gala.potential import PotentialBase
from gala.units import galactic

from galray.gravity.exports import PositionGuard

__all__ = ["MeasuredPotential"]

KPC_MYR = 3.15576e13 / 3.085677581491367e16
"""One km/s in kpc/Myr (Julian years)."""


class MeasuredPotential(PotentialBase):
    """Φ, its gradient and the density of a measured field, in kpc, Myr and Msun.

    Arguments:
        guard: The field.
        units: gala's galactic units; others are not taken.
    """

    def __init__(self, guard: PositionGuard, units: Any = galactic) -> None:
        super().__init__(units=units)
        self.guard = guard

    @property
    def num_outside(self) -> int:
        """Positions that were asked for beyond the field's region."""
        return self.guard.num_outside

    def _energy(self, q: Any, t: Any = 0.0) -> np.ndarray:  # q of shape (n, 3)
        return self.guard.potential(np.ascontiguousarray(q)) * KPC_MYR**2

    def _gradient(self, q: Any, t: Any = 0.0) -> np.ndarray:  # q of shape (3, n), as gala's C potentials take
        return -self.guard.acceleration(np.ascontiguousarray(q.T)).T * KPC_MYR**2

    def _density(self, q: Any, t: Any = 0.0) -> np.ndarray:
        return self.guard.mass_density(np.ascontiguousarray(q))
