"""The gravity of a galactic bar: a potential without axial symmetry, exact like the others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.potentials.base import Potential
from galray.units import G

__all__ = ["LongMuraliBar"]


class LongMuraliBar(Potential):
    """A bar: the Miyamoto–Nagai disc of lengths b and c, spread evenly along a needle of half-length a.

    With X along the bar, Y across it, ζ = √(z² + c²) and D² = Y² + (b + ζ)²,
    Φ = −GM/2a [arsinh((X + a)/D) − arsinh((X − a)/D)].

    Arguments:
        m_tot: Total mass in Msun.
        a: Half-length of the needle in kpc.
        b: How far the needle is spread in the plane, in kpc.
        c: Scale height in kpc.
        angle_deg: Azimuth of the bar's near end, from the Sun along Galactic rotation, in degrees.

    Raises:
        GalrayError: A mass or length that is not positive, or an angle that is not finite.

    References:
        Long & Murali 1992, ApJ 397, 44, their "triaxial" bar.
    """

    _parameters = ("m_tot", "a", "b", "c", "angle_deg")
    axisymmetric = False
    m_tot: float
    a: float
    b: float
    c: float
    angle_deg: float

    def __init__(self, m_tot: float, a: float, b: float, c: float, angle_deg: float = 0.0) -> None:
        super().__init__(m_tot=m_tot, a=a, b=b, c=c)
        if not math.isfinite(angle_deg):
            raise GalrayError(f"LongMuraliBar: angle_deg = {angle_deg!r}", "give the angle in degrees")
        self.angle_deg = float(angle_deg)
        # φ = atan2(y, −x): the near end points along (−cos φ, sin φ)
        self._cos, self._sin = -math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))

    def _axes(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = _as_positions(x)
        along = self._cos * x[..., 0] + self._sin * x[..., 1]
        across = self._cos * x[..., 1] - self._sin * x[..., 0]
        return along, across, x[..., 2]

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        along, across, z = self._axes(x)
        d = torch.sqrt(across.square() + (self.b + torch.sqrt(z.square() + self.c**2)).square())
        ends = torch.asinh((along + self.a) / d) - torch.asinh((along - self.a) / d)
        return -G * self.m_tot / (2 * self.a) * ends

    def acceleration(self, x: Any) -> Tensor:
        """a(x) = −∇Φ in (km/s)²/kpc, shape (*, 3)."""
        along, across, z = self._axes(x)
        height = torch.sqrt(z.square() + self.c**2)
        spread = self.b + height
        d2 = across.square() + spread.square()
        far, near = torch.sqrt((along + self.a).square() + d2), torch.sqrt((along - self.a).square() + d2)
        total = far + near
        pull = -G * self.m_tot / (2 * far * near)
        sideways = pull * (total - 4 * along.square() / total) / d2
        a_along, a_across = 4 * pull * along / total, sideways * across
        return torch.stack(
            [
                self._cos * a_along - self._sin * a_across,
                self._sin * a_along + self._cos * a_across,
                sideways * z * spread / height,
            ],
            -1,
        )

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """Refuse: a bar's gravity depends on azimuth.

        Raises:
            GalrayError: Always.
        """
        raise GalrayError(
            "a bar has no force factors in (R, z): its gravity depends on azimuth",
            "use acceleration(x), or follow orbits with galray.mocks.bars",
        )

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        along, across, z = self._axes(x)
        height = torch.sqrt(z.square() + self.c**2)
        spread2 = (self.b + height).square()
        d2 = across.square() + spread2

        def integrals(s: Tensor) -> Tensor:
            root2 = s.square() + d2
            third = s / (d2 * root2.sqrt())  # ∫ ds (s² + D²)^−3/2
            fifth = s * (3 * d2 + 2 * s.square()) / (3 * d2.square() * root2.pow(1.5))
            return self.b * third + 3 * height * spread2 * fifth

        needle = integrals(along + self.a) - integrals(along - self.a)
        return self.c**2 * self.m_tot / (8 * math.pi * self.a * height.pow(3)) * needle


def _as_positions(x: Any) -> Tensor:
    return x.to(torch.float64) if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.float64)
