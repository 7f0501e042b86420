"""Line-of-sight velocity distributions of given dispersion and kurtosis, with Gaussian errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["EXCESS_RANGE", "log_gaussian", "log_shaped"]

EXCESS_RANGE = (-1.0, 2.7)
"""Excess kurtosis that the two-component form can take and stay positive and sensible."""

_LOG_2PI = math.log(2 * math.pi)


def log_gaussian(u: Tensor, variance: Tensor) -> Tensor:
    """Give ln N(u; 0, variance); shapes broadcast."""
    return -0.5 * (u**2 / variance + torch.log(variance) + _LOG_2PI)


def log_shaped(u: Tensor, variance: Tensor, excess: Tensor) -> Tensor:
    """Give ln p(u) of a symmetric, positive density with given variance and excess kurtosis.

    Flat-topped (excess k < 0): two Gaussians displaced by ±d, d² = σ² √(−k/2). Peaked (k > 0): two Gaussians
    of variances σ² (1 ± c), c² = k/3. Both keep their form under convolution with a Gaussian of variance e²
    (σ² → σ² + e², k → k σ⁴/(σ² + e²)²), so measurement errors enter exactly.

    Arguments:
        u: Velocities about the mean in km/s.
        variance: Of the density, errors included, (km/s)².
        excess: Excess kurtosis of the density, errors included.
    """
    excess = excess.clamp(*EXCESS_RANGE)
    tiny = 1e-10  # keeps the square roots differentiable at zero; the densities there are equal to 1e-10
    flat = torch.sqrt((-excess).clamp_min(0.0) / 2 + tiny)
    peak = torch.sqrt(excess.clamp_min(0.0) / 3 + tiny)
    below = excess < 0
    shift2 = torch.where(below, flat, torch.zeros_like(flat))
    spread = torch.where(below, torch.zeros_like(peak), peak)
    shift = torch.sqrt(variance * (shift2 + tiny))
    wide, narrow = variance * (1 - shift2 + spread), variance * (1 - shift2 - spread)
    a = (u - shift) ** 2 / wide + torch.log(wide)
    b = (u + shift) ** 2 / narrow + torch.log(narrow)
    return torch.logaddexp(-0.5 * a, -0.5 * b) - 0.5 * _LOG_2PI - math.log(2.0)
