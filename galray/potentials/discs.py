"""Disc potentials: Miyamoto and Nagai's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from galray.potentials.base import Potential, positions
from galray.units import G

__all__ = ["MiyamotoNagai"]


class MiyamotoNagai(Potential):
    """Miyamoto & Nagai (1975) disc: Φ = −GM / √(R² + (a + √(z² + b²))²).

    Arguments:
        m_tot: Total mass in Msun.
        a: Radial scale in kpc.
        b: Vertical scale in kpc.

    References:
        Binney & Tremaine 2008, eqs. 2.69a and 2.69b.
    """

    _parameters = ("m_tot", "a", "b")
    m_tot: float
    a: float
    b: float

    def __init__(self, m_tot: float, a: float, b: float) -> None:
        super().__init__(m_tot=m_tot, a=a, b=b)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r2 = x[..., 0].square() + x[..., 1].square()
        root = torch.sqrt(x[..., 2].square() + self.b**2)
        return r2, root, r2 + (self.a + root).square()

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        return -G * self.m_tot * self._parts(positions(x))[2].rsqrt()

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        root = torch.sqrt(z2 + self.b**2)
        stretched = self.a + root
        inverse2 = 1 / (radius2 + stretched * stretched)  # no pow: orbits call this a thousand times a star
        g = G * self.m_tot * inverse2 * inverse2.sqrt()
        return g, g * stretched / root

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        r2, root, d2 = self._parts(positions(x))
        a, b = self.a, self.b
        return (
            self.m_tot
            * b**2
            / (4 * math.pi)
            * (a * r2 + (a + 3 * root) * (a + root).square())
            / (d2.pow(2.5) * root.pow(3))
        )
