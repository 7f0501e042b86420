"""Velocity anisotropy β(r) of Baes & van Hese, and the integrating factor of the Jeans equation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Anisotropy", "symmetric", "unsymmetric"]


def symmetric(beta: Tensor) -> Tensor:
    """β / (2 − β) = (σ_r² − σ_θ²) / (σ_r² + σ_θ²): −1 for circular, +1 for radial orbits."""
    return beta / (2 - beta)


def unsymmetric(value: Tensor) -> Tensor:
    """β of its symmetric form: 2b / (1 + b)."""
    return 2 * value / (1 + value)


@dataclass(frozen=True)
class Anisotropy:
    """β(r) = [β0 + β∞ s] / (1 + s), s = (r/r_a)^η.

    β0 = β∞ is constant β; β0 = 0, β∞ = 1, η = 2 is Osipkov-Merritt. Each field has shape (*) and broadcasts
    against radii appended as a last axis.

    References:
        Baes & van Hese 2007, A&A 471, 419, eq. 11.
    """

    inner: Tensor
    outer: Tensor
    radius: Tensor
    exponent: Tensor

    def _ratio(self, r: Tensor) -> Tensor:
        log_r = torch.log(r) - torch.log(self.radius)[..., None]
        return torch.exp((self.exponent[..., None] * log_r).clamp(-200, 200))

    def beta(self, r: Tensor) -> Tensor:
        """β at radii r of shape (k,): shape (*, k)."""
        s = self._ratio(r)
        return self.inner[..., None] + (self.outer - self.inner)[..., None] * s / (1 + s)

    def slope(self, r: Tensor) -> Tensor:
        """dβ/dln r, shape (*, k)."""
        s = self._ratio(r)
        return ((self.outer - self.inner) * self.exponent)[..., None] * s / (1 + s) ** 2

    def log_factor(self, r: Tensor) -> Tensor:
        """Give ln g with dln g/dln r = 2β: g = r^{2β0} [1 + (r/r_a)^η]^{2(β∞−β0)/η}, shape (*, k)."""
        s = self._ratio(r)
        power = 2 * (self.outer - self.inner) / self.exponent
        return 2 * self.inner[..., None] * torch.log(r) + power[..., None] * torch.log1p(s)
