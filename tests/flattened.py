"""A flattened NFW halo whose force is exact: the truth for everything that measures flattening."""

import math

import numpy as np
import torch

from galray.gravity.region import as_positions
from galray.units import G


class FlattenedNFW:
    """ρ = ρ_s / [(m/r_s)(1 + m/r_s)²] with m² = R² + z²/q², q ≤ 1.

    With s = (1 + τ)^(−1/2) in the homoeoid integrals of Binney & Tremaine (2008, eqs. 2.125 to 2.140):
    a_i = −4πGq x_i ∫₀¹ ρ(m_s) s² / h_i ds, m_s² = s²(R² + z²/(1 − e²s²)), with h_R = (1 − e²s²)^½ and
    h_z = (1 − e²s²)^(3/2).
    """

    def __init__(self, rho_s, r_s, q, nodes=200):
        self.rho_s, self.r_s, self.q = rho_s, r_s, q
        t, weight = np.polynomial.legendre.leggauss(nodes)
        self._s = torch.from_numpy((t + 1) / 2)
        self._weight = torch.from_numpy(weight / 2)

    def density(self, m):
        t = m / self.r_s
        return self.rho_s / (t * (1 + t) ** 2)

    def mass_density(self, x):
        x = as_positions(x)
        return self.density(torch.sqrt(x[..., 0] ** 2 + x[..., 1] ** 2 + (x[..., 2] / self.q) ** 2))

    def _shells(self, x):
        s, h2 = self._s, 1 - (1 - self.q**2) * self._s**2
        radius2 = (x[..., :2] ** 2).sum(-1)[..., None]
        return s, h2, s * torch.sqrt(radius2 + x[..., 2, None] ** 2 / h2)

    def acceleration(self, x):
        x = as_positions(x)
        s, h2, m = self._shells(x)
        amount = self._weight * s**2 * self.density(m)
        radial, vertical = (amount / h2**0.5).sum(-1), (amount / h2**1.5).sum(-1)
        return -4 * math.pi * G * self.q * x * torch.stack([radial, radial, vertical], -1)

    def potential(self, x):
        _, h2, m = self._shells(as_positions(x))
        shells = 2 * self.rho_s * self.r_s**2 / (1 + m / self.r_s)
        return -2 * math.pi * G * self.q * (self._weight * shells / h2**0.5).sum(-1)
