"""What a measured acceleration must agree with: its own curl and flux, its mirror image, the Sun's orbit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import stats

from galray.gravity.equilibrium import Agreement
from galray.gravity.poisson import Kernel, smooth, smoothed_density
from galray.gravity.region import as_positions
from galray.gravity.splines import to_numpy
from galray.units import KM_S2_PER_KPC_IN_M_S2

__all__ = ["ahead_and_behind", "curl_and_divergence", "solar_acceleration"]

_STEP = 0.02  # kpc: small against any structure, large against round-off
CIRCULAR_VELOCITY = (229.0, 4.6)
"""v_c at the Sun in km/s with a 2 % systematic error: Eilers et al. 2019, ApJ 871, 120."""
GAIA_ACCELERATION = (2.32e-10, 0.16e-10)
"""Acceleration of the Solar System in m/s² from quasars: Klioner et al. 2021, A&A 649, A9."""


def curl_and_divergence(x: Any, acceleration_field: Any, kernel: Kernel | None = None) -> dict[str, float]:
    """Is a(x) the gradient of one potential, and is its density the one of its flux?

    Arguments:
        x: Positions (n, 3) in kpc, with room for the kernel around each.
        acceleration_field: Anything with ``acceleration(x)``; ``mass_density(x)`` where it has a potential.
        kernel: Smooths the density that the flux of a gives; without one the divergence is not compared.

    Returns:
        ``curl``: rms of the curl over rms of the symmetric part of ∂a/∂x, 0 for a gradient; with a kernel
        and a field that knows its density, ``divergence``: rms difference of −∇·a/4πG through the kernel from
        that density smoothed alike, over its rms.
    """
    x = as_positions(x).reshape(-1, 3)
    slopes = []
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = _STEP
        up, down = (acceleration_field.acceleration(x + s * step).detach() for s in (1.0, -1.0))
        slopes.append((up - down) / (2 * _STEP))
    tensor = torch.stack(slopes, 1)  # ∂a_j/∂x_i
    odd, even = (tensor - tensor.mT) / 2, (tensor + tensor.mT) / 2
    out = {"curl": float(odd.norm() / even.norm().clamp_min(1e-300))}
    if kernel is not None and hasattr(acceleration_field, "mass_density"):
        flux = to_numpy(smoothed_density(acceleration_field, x, kernel))
        own = to_numpy(smooth(acceleration_field.mass_density, x, kernel))
        out["divergence"] = float(np.sqrt(((flux - own) ** 2).mean() / max((own**2).mean(), 1e-300)))
    return out


def ahead_and_behind(x: Any, acceleration_field: Any) -> dict[str, float]:
    """a_R, a_φ and a_z ahead of the Sun in azimuth against the same places behind it.

    Arguments:
        x: Positions (n, 3) with y ≠ 0; each is compared with its mirror image in y.
        acceleration_field: Anything with ``acceleration(x)``.

    Returns:
        ``relative``: rms of the differences of a_R and a_z and of the sum of a_φ, over the rms of |a|; all
        vanish in an axisymmetric Galaxy.
    """
    x = as_positions(x).reshape(-1, 3)
    mirror = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    here = acceleration_field.acceleration(x).detach()
    there = acceleration_field.acceleration(x * mirror).detach() * mirror
    radius = x[:, :2].norm(dim=1, keepdim=True)

    def parts(a: torch.Tensor) -> torch.Tensor:
        outward = x[:, :2] / radius
        along = torch.stack([x[:, 1], -x[:, 0]], 1) / radius
        return torch.stack([(a[:, :2] * outward).sum(1), (a[:, :2] * along).sum(1), a[:, 2]], 1)

    # in mirrored axes an axisymmetric a is the same vector
    difference = parts(here) - parts(there)
    return {"relative": float(difference.norm() / here.norm())}


def solar_acceleration(
    a_r: float,
    error: float,
    radius: float,
    *,
    circular_velocity: tuple[float, float] = CIRCULAR_VELOCITY,
    gaia: tuple[float, float] | None = GAIA_ACCELERATION,
) -> dict[str, Any]:
    """The radial acceleration at the Sun against v_c²/R0, and against Gaia's own measurement.

    Arguments:
        a_r: a_R at the Sun in (km/s)²/kpc, negative towards the centre.
        error: Its standard error.
        radius: R0 in kpc.
        circular_velocity: v_c and its error in km/s; of a mock, its own with error 0.
        gaia: |a| and its error in m/s²; None for a mock, which has another.

    Returns:
        ``a_m_s2`` and ``a_error_m_s2``; ``ratio`` to v_c²/R0 and ``rotation`` (`Agreement`); ``gaia``
        (`Agreement`) where compared.
    """
    speed, speed_error = circular_velocity
    expected = speed**2 / radius
    spread = math.hypot(error, 2 * expected * speed_error / speed)
    out: dict[str, Any] = {
        "a_m_s2": -a_r * KM_S2_PER_KPC_IN_M_S2,
        "a_error_m_s2": error * KM_S2_PER_KPC_IN_M_S2,
        "ratio": -a_r / expected,
        "rotation": _one(-a_r - expected, spread),
    }
    if gaia is not None:
        value, gaia_error = (g / KM_S2_PER_KPC_IN_M_S2 for g in gaia)
        out["gaia"] = _one(-a_r - value, math.hypot(error, gaia_error))
    return out


def _one(difference: float, error: float) -> Agreement:
    chi2 = (difference / error) ** 2 if error > 0 else math.inf
    return Agreement(chi2, 1, float(stats.chi2.sf(chi2, 1)))
