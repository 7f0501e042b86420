"""Line-of-sight velocity distributions of given dispersion and kurtosis, with Gaussian errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EXCESS_RANGE", "Shape", "log_gaussian"]

EXCESS_RANGE = (-1.0, 12.0)
"""Excess kurtosis that the two-component form is given; velocities of bound stars stay well inside."""

_LOG_2PI = math.log(2 * math.pi)
_TINY = 1e-12  # keeps square roots differentiable at zero


def log_gaussian(u: Tensor, variance: Tensor) -> Tensor:
    """Give ln N(u; 0, variance); shapes broadcast."""
    return -0.5 * (u**2 / variance + torch.log(variance) + _LOG_2PI)


@dataclass(frozen=True)
class Shape:
    """A symmetric, positive velocity density with given variance and kurtosis: two Gaussians.

    Peaked (excess k > 0): both centred, of variances σ² [1 + s² ± s √(1 + s²)] and weights
    ½ [1 ∓ s/√(1 + s²)], s² = k/3, which has the sixth moment of a Gaussian whose variance is mixed by a
    gamma distribution. Flat-topped (k < 0): displaced by ±d, d² = σ² √(−k/2), of variance σ² − d² and equal
    weights. Each keeps its form when a Gaussian error of variance e² is added to both variances.

    Attributes:
        wide: Variance of the first Gaussian, (km/s)².
        narrow: Variance of the second.
        log_wide: ln weight of the first.
        log_narrow: ln weight of the second.
        shift: Displacement ±d in km/s.
    """

    wide: Tensor
    narrow: Tensor
    log_wide: Tensor
    log_narrow: Tensor
    shift: Tensor

    @classmethod
    def of(cls, variance: Tensor, excess: Tensor) -> Shape:
        """The shape of given variance in (km/s)² and excess kurtosis, errors not included."""
        excess = excess.clamp(*EXCESS_RANGE)
        s2 = excess.clamp_min(0.0) / 3
        s, root = torch.sqrt(s2 + _TINY), torch.sqrt(1 + s2)
        d2 = torch.where(excess < 0, torch.sqrt(-excess.clamp_max(0.0) / 2 + _TINY), torch.zeros_like(s))
        # 1 + s² − s √(1+s²) = √(1+s²) / (√(1+s²) + s), without cancellation
        return cls(
            wide=variance * (1 + s2 + s * root - d2),
            narrow=variance * (root / (root + s) - d2),
            log_wide=torch.log(0.5 / (root * (root + s))),
            log_narrow=torch.log(0.5 * (1 + s / root)),
            shift=torch.sqrt(variance * (d2 + _TINY)),
        )

    def log_prob(self, u: Tensor, error2: Tensor) -> Tensor:
        """Give ln p(u) at velocities u (*, m) about the mean, of error variances (*, m); shapes (*) cells."""
        wide, narrow, log_wide, log_narrow, shift = (
            part[..., None].to(u.dtype)
            for part in (self.wide, self.narrow, self.log_wide, self.log_narrow, self.shift)
        )
        wide, narrow = wide + error2, narrow + error2
        a = log_wide - 0.5 * ((u - shift) ** 2 / wide + torch.log(wide))
        b = log_narrow - 0.5 * ((u + shift) ** 2 / narrow + torch.log(narrow))
        return torch.logaddexp(a, b) - 0.5 * _LOG_2PI
