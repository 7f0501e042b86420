"""Flattened haloes: potentials that are constant on spheroids about the disc's axis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.potentials.base import TINY, Potential, positions
from galray.potentials.spheres import nfw_mean_density
from galray.units import G

__all__ = ["FlattenedNFW"]

_RANGE = (0.8, 1.25)


class FlattenedNFW(Potential):
    """An NFW potential with flattened equipotentials: Φ(m) of `NFW` with m² = R² + z²/q².

    Its force costs no more than a sphere's. With F(m) = (1/m) dΦ/dm,

        4πG ρ = (2 + 1/q²) F + (m dF/dm) (R² + z²/q⁴)/m²,

    which near the scale radius is about twice as flat as Φ. The construction is that of the logarithmic
    potential (Binney & Tremaine 2008, §2.3.2).

    Arguments:
        m_tot: Mass scale 4π ρ_s r_s³ of the sphere (q = 1) in Msun.
        r_s: Scale radius in kpc.
        q: Axis ratio of the equipotentials, 0.8 to 1.25: beyond, the density turns negative within a few r_s.

    Raises:
        GalrayError: A parameter out of range.
    """

    _parameters = ("m_tot", "r_s", "q")
    m_tot: float
    r_s: float
    q: float

    def __init__(self, m_tot: float, r_s: float, q: float) -> None:
        super().__init__(m_tot=m_tot, r_s=r_s, q=q)
        if not _RANGE[0] <= q <= _RANGE[1]:
            raise GalrayError(
                f"FlattenedNFW: q = {q:g} gives negative densities",
                f"give an axis ratio of the equipotentials from {_RANGE[0]:g} to {_RANGE[1]:g}",
            )

    def _radius(self, radius2: Tensor, z2: Tensor) -> Tensor:
        """The spheroidal radius in units of r_s."""
        return torch.sqrt((radius2 + z2 / self.q**2).clamp_min(TINY)) / self.r_s

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        x = positions(x)
        s = self._radius(x[..., 0].square() + x[..., 1].square(), x[..., 2].square())
        return -G * self.m_tot / self.r_s * torch.log1p(s) / s

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        g = G * self.m_tot / self.r_s**3 * nfw_mean_density(self._radius(radius2, z2))
        return g, g / self.q**2

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        x = positions(x)
        radius2, z2 = x[..., 0].square() + x[..., 1].square(), x[..., 2].square()
        s = self._radius(radius2, z2)
        mean, local = nfw_mean_density(s), 1 / (s * (1 + s).square())
        shape = (radius2 + z2 / self.q**4) / (s * self.r_s).square()
        total = (2 + self.q**-2) * mean + (local - 3 * mean) * shape
        return self.m_tot / (4 * math.pi * self.r_s**3) * total
