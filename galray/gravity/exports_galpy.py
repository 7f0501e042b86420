"""A measured field as a galpy potential."""

from __future__ import annotations

from typing import Any

import numpy as np
from galpy.potential import Potential

from galray.frame import cartesian, cylindrical
from galray.gravity.exports import PositionGuard
from galray.units import G

__all__ = ["MeasuredPotential"]

_STEP = 1e-3
"""Of the differences behind second derivatives, kpc."""


class MeasuredPotential(Potential):
    """Φ, forces, second derivatives and density of a measured field in galpy's natural units.

    Arguments:
        guard: The field.
        ro: kpc per natural unit of length.
        vo: km/s per natural unit of velocity.
        axisymmetric: Whether galpy may leave φ out.
    """

    def __init__(self, guard: PositionGuard, ro: float, vo: float, axisymmetric: bool) -> None:
        Potential.__init__(self, amp=1.0, ro=ro, vo=vo)
        self.guard = guard
        self.isNonAxi = not axisymmetric
        self.hasC = False

    @property
    def num_outside(self) -> int:
        """Positions that were asked for beyond the field's region."""
        return self.guard.num_outside

    def _positions(self, R: Any, z: Any, phi: Any) -> tuple[np.ndarray, tuple[int, ...]]:
        phi = 0.0 if phi is None else phi  # galpy leaves φ out where the potential is axisymmetric
        arrays = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (R, phi, z)))
        c = np.stack([arrays[0] * self._ro, arrays[1], arrays[2] * self._ro], -1)
        return cartesian(c.reshape(-1, 3)), arrays[0].shape

    def _scalar(self, name: str, scale: float, R: Any, z: Any, phi: Any) -> Any:
        x, shape = self._positions(R, z, phi)
        values = getattr(self.guard, name)(x).reshape(shape) * scale
        return float(values) if not shape else values

    def _force(self, component: int, R: Any, z: Any, phi: Any) -> Any:
        """Component R, φ or z (0, 1, 2) of the acceleration, natural units."""
        x, shape = self._positions(R, z, phi)
        a = self.guard.acceleration(x)
        # the cylindrical components of a vector at x transform as those of a velocity do
        values = cylindrical(np.concatenate([x, a], -1))[:, 3 + component]
        values = values.reshape(shape) * (self._ro / self._vo**2)
        return float(values) if not shape else values

    def _evaluate(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return self._scalar("potential", 1 / self._vo**2, R, z, phi)

    def _Rforce(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return self._force(0, R, z, phi)

    def _phitorque(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return R * self._force(1, R, z, phi)

    def _zforce(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return self._force(2, R, z, phi)

    def _dens(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return self._scalar("mass_density", G * self._ro**2 / self._vo**2, R, z, phi)

    def _R2deriv(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        h = _STEP / self._ro
        return -(self._Rforce(R + h, z, phi) - self._Rforce(R - h, z, phi)) / (2 * h)

    def _z2deriv(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        h = _STEP / self._ro
        return -(self._zforce(R, z + h, phi) - self._zforce(R, z - h, phi)) / (2 * h)

    def _Rzderiv(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        h = _STEP / self._ro
        return -(self._Rforce(R, z + h, phi) - self._Rforce(R, z - h, phi)) / (2 * h)
