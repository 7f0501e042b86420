"""Spherical potentials: Plummer, isochrone, Hernquist, NFW and the double power law."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.potentials.base import TINY, Potential, float64, positions, radius_of
from galray.potentials.double_power_law import DoublePowerLawTable
from galray.units import G

__all__ = ["NFW", "DoublePowerLaw", "Hernquist", "Isochrone", "Plummer"]


class Plummer(Potential):
    """Plummer (1911) sphere: Φ = −GM / √(r² + b²).

    Arguments:
        m_tot: Total mass in Msun.
        b: Scale radius in kpc.

    References:
        Binney & Tremaine 2008, eqs. 2.44a and 2.44b.
    """

    _parameters = ("m_tot", "b")
    m_tot: float
    b: float

    def __init__(self, m_tot: float, b: float) -> None:
        super().__init__(m_tot=m_tot, b=b)

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        return -G * self.m_tot * (positions(x).square().sum(-1) + self.b**2).rsqrt()

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        g = G * self.m_tot * (radius2 + z2 + self.b**2).pow(-1.5)
        return g, g

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        s2 = positions(x).square().sum(-1) / self.b**2
        return 3 * self.m_tot / (4 * math.pi * self.b**3) * (1 + s2).pow(-2.5)


class Isochrone(Potential):
    """Hénon's (1959) isochrone: Φ = −GM / (b + √(b² + r²)).

    Arguments:
        m_tot: Total mass in Msun.
        b: Scale radius in kpc.

    References:
        Binney & Tremaine 2008, eqs. 2.47 and 2.49.
    """

    _parameters = ("m_tot", "b")
    m_tot: float
    b: float

    def __init__(self, m_tot: float, b: float) -> None:
        super().__init__(m_tot=m_tot, b=b)

    def _root(self, x: Tensor) -> Tensor:
        return torch.sqrt(x.square().sum(-1) + self.b**2)

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        return -G * self.m_tot / (self.b + self._root(positions(x)))

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        root = torch.sqrt(radius2 + z2 + self.b**2)
        g = G * self.m_tot / (root * (self.b + root).square())
        return g, g

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        x = positions(x)
        root, r2, b = self._root(x), x.square().sum(-1), self.b
        return (
            self.m_tot
            * (3 * (b + root) * root**2 - r2 * (b + 3 * root))
            / (4 * math.pi * ((b + root) * root) ** 3)
        )


class Hernquist(Potential):
    """Hernquist (1990) sphere: Φ = −GM / (r + a), with a density cusp ρ ∝ 1/r.

    Arguments:
        m_tot: Total mass in Msun.
        a: Scale radius in kpc.

    References:
        Hernquist 1990, ApJ 356, 359; Binney & Tremaine 2008, eqs. 2.64 and 2.67.
    """

    _parameters = ("m_tot", "a")
    m_tot: float
    a: float

    def __init__(self, m_tot: float, a: float) -> None:
        super().__init__(m_tot=m_tot, a=a)

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        return -G * self.m_tot / (radius_of(positions(x)) + self.a)

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        r = torch.sqrt((radius2 + z2).clamp_min(TINY))
        g = G * self.m_tot / (r * (r + self.a).square())
        return g, g

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        r = radius_of(positions(x))
        return self.m_tot * self.a / (2 * math.pi * r * (r + self.a) ** 3)


class NFW(Potential):
    """Navarro, Frenk & White (1996) halo: ρ = ρ_s / [(r/r_s)(1 + r/r_s)²].

    Φ = −(G m / r) ln(1 + r/r_s), with the mass scale m = 4π ρ_s r_s³ (the total mass diverges).

    Arguments:
        m_tot: Mass scale 4π ρ_s r_s³ in Msun.
        r_s: Scale radius in kpc.

    References:
        Binney & Tremaine 2008, eqs. 2.64 to 2.67.
    """

    _parameters = ("m_tot", "r_s")
    m_tot: float
    r_s: float

    def __init__(self, m_tot: float, r_s: float) -> None:
        super().__init__(m_tot=m_tot, r_s=r_s)

    @classmethod
    def from_density(cls, rho_s: float, r_s: float) -> NFW:
        """Build the halo from its density scale ρ_s in Msun/kpc³ and scale radius r_s in kpc."""
        return cls(4 * math.pi * rho_s * r_s**3, r_s)

    @property
    def rho_s(self) -> float:
        """The density scale ρ_s in Msun/kpc³ (four times the density at r_s)."""
        return self.m_tot / (4 * math.pi * self.r_s**3)

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        s = radius_of(positions(x)) / self.r_s
        return -G * self.m_tot / self.r_s * torch.log1p(s) / s

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        s = torch.sqrt((radius2 + z2).clamp_min(TINY)) / self.r_s
        g = G * self.m_tot / self.r_s**3 * nfw_mean_density(s)
        return g, g

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        s = radius_of(positions(x)) / self.r_s
        return self.rho_s / (s * (1 + s) ** 2)


class DoublePowerLaw(Potential):
    """A sphere ρ = ρ₀ (r/r_s)^−γ [1 + (r/r_s)^α]^((γ−β)/α): cores, cusps and everything between.

    (α, β, γ) = (1, 3, 1) is NFW, (1, 4, 1) Hernquist, (2, 5, 0) Plummer. The enclosed mass and the outer
    part of the potential are incomplete beta functions, tabulated at construction to 1e-12.

    Arguments:
        rho_0: Density scale ρ₀ in Msun/kpc³ (the density at r_s is ρ₀ 2^((γ−β)/α)).
        r_s: Scale radius in kpc.
        alpha: Sharpness of the turn between the slopes, > 0.
        beta: Outer slope, > 2, or the potential would not vanish at infinity; > 3 for a finite mass.
        gamma: Inner slope, 0 ≤ γ < 3.

    Raises:
        GalrayError: A parameter out of range.

    References:
        Zhao 1996, MNRAS 278, 488.
    """

    _parameters = ("rho_0", "r_s", "alpha", "beta", "gamma")
    rho_0: float
    r_s: float
    alpha: float
    beta: float
    gamma: float

    def __init__(self, rho_0: float, r_s: float, alpha: float, beta: float, gamma: float) -> None:
        super().__init__(rho_0=rho_0, r_s=r_s, alpha=alpha, beta=beta)
        for name, value, good in (("beta", beta, beta > 2), ("gamma", gamma, 0 <= gamma < 3)):
            if not good:
                raise GalrayError(
                    f"DoublePowerLaw: {name} = {value!r} gives no gravity that vanishes at infinity and is "
                    "finite within every radius",
                    "give an outer slope beta > 2 and an inner slope 0 <= gamma < 3",
                )
        self.gamma = float(gamma)
        self._table = DoublePowerLawTable(self.alpha, self.beta, self.gamma)

    @property
    def total_mass(self) -> float:
        """M(∞) in Msun; infinite for β ≤ 3."""
        if self.beta <= 3:
            return math.inf
        a, b = (3 - self.gamma) / self.alpha, (self.beta - 3) / self.alpha
        log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        return 4 * math.pi * self.rho_0 * self.r_s**3 / self.alpha * math.exp(log_beta)

    def density(self, r: Any) -> Tensor:
        """ρ(r) in Msun/kpc³ at radius r in kpc, shape (*)."""
        return torch.exp(self._log_density(self._log_s(r)))

    def enclosed_mass(self, r: Any) -> Tensor:
        """M(<r) in Msun at radius r in kpc, shape (*)."""
        return 4 * math.pi * self.rho_0 * self.r_s**3 * torch.exp(self._table.log_mass(self._log_s(r)))

    def density_slope(self, r: Any) -> Tensor:
        """Give d ln ρ / d ln r at radius r in kpc, shape (*): −γ at the centre, −β far out."""
        return -self.gamma - (self.beta - self.gamma) * torch.sigmoid(self.alpha * self._log_s(r))

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        s = self._log_s(radius_of(positions(x)))
        depth = torch.exp(self._table.log_mass(s) - s) + torch.exp(self._table.log_outer(s))
        return -4 * math.pi * G * self.rho_0 * self.r_s**2 * depth

    def force_factors(self, radius2: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(g_R, g_z) in (km/s/kpc)², shape (*) each."""
        s = self._log_s(torch.sqrt((radius2 + z2).clamp_min(TINY)))
        g = 4 * math.pi * G * self.rho_0 * torch.exp(self._table.log_mass(s) - 3 * s)
        return g, g

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        return self.density(radius_of(positions(x)))

    def _log_s(self, r: Any) -> Tensor:
        return torch.log(float64(r).clamp_min(math.sqrt(TINY)) / self.r_s)

    def _log_density(self, log_s: Tensor) -> Tensor:
        turn = torch.nn.functional.softplus(self.alpha * log_s, threshold=40.0) / self.alpha
        return math.log(self.rho_0) - self.gamma * log_s + (self.gamma - self.beta) * turn


def nfw_mean_density(s: Tensor) -> Tensor:
    """[ln(1+s) − s/(1+s)] / s³; the difference loses digits as 2⁻⁵²/s, so s is kept above 10⁻⁶ of r_s."""
    s = s.clamp_min(1e-6)
    return (torch.log1p(s) - s / (1 + s)) / (s * s * s)
