"""Dark matter near the Sun: averages over the Solar radius, vertical forces, surface densities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.frame import GalacticFrame, cartesian
from galray.gravity.poisson import Kernel
from galray.gravity.region import as_region
from galray.gravity.settings import HaloSettings
from galray.gravity.splines import to_numpy
from galray.units import G

__all__ = [
    "AveragingPoints",
    "averaging_points",
    "circular_velocity",
    "surface_density",
    "valid_positions",
    "vertical_force",
]


@dataclass(frozen=True)
class AveragingPoints:
    """Where a density is evaluated to be averaged.

    Attributes:
        x: Positions (n, 3) in kpc.
        weight: Their share of the volume, shape (n,), summing to 1.
    """

    x: Tensor
    weight: Tensor

    def average(self, values: Any, covariance: Any = None) -> tuple[float, float]:
        """Weighted mean of values (n,), and its standard error from their covariance (n, n), or NaN.

        Errors of neighbouring densities are strongly correlated: without a covariance there is no error.
        """
        values = to_numpy(values)
        weight = self.weight.numpy()
        mean = float(weight @ values)
        if covariance is None:
            return mean, math.nan
        return mean, float(np.sqrt(max(weight @ to_numpy(covariance) @ weight, 0.0)))


def averaging_points(
    settings: HaloSettings, ball: Any, kernel: Kernel, frame: GalacticFrame | None = None
) -> AveragingPoints:
    """The grid of the average over the Solar radius: |R − R0| small, z_min < |z| < z_max, both sides.

    The grid is regular in (R, arc, |z|), mirrored in z about the plane and in φ about the Sun; a mirrored
    group is kept when the kernel around every one of its positions lies in the ball, so the average stays
    even in z and φ.

    Arguments:
        settings: The region of the average.
        ball: The ball in which the field is known.
        kernel: The smoothing kernel, whose reach is taken off the ball.
        frame: Gives R0.

    Raises:
        GalrayError: No position is left.
    """
    radius = (frame or GalacticFrame()).sun_radius
    region = as_region(ball)

    def nodes(low: float, high: float, step: float) -> Tensor:
        count = max(1, math.ceil((high - low) / step))
        return low + (torch.arange(count, dtype=torch.float64) + 0.5) * (high - low) / count

    offset = settings.max_radius_offset_kpc
    r = radius + nodes(-offset, offset, 0.2)
    phi = nodes(0.0, settings.max_distance_y_kpc, 0.5) / radius
    z = nodes(settings.min_height_kpc, settings.max_height_kpc, 0.15)
    grid = torch.cartesian_prod(r, phi, z)
    signs = torch.tensor([[1, 1, 1], [1, -1, 1], [1, 1, -1], [1, -1, -1]], dtype=torch.float64)
    groups = cartesian(grid[:, None] * signs)  # (n, 4, 3)
    inside = region.contains_kernel(groups, kernel.reach).all(-1)
    if not bool(inside.any()):
        raise GalrayError(
            f"no position with |R − {radius:.3f}| ≤ {offset} and {settings.min_height_kpc} < |z| < "
            f"{settings.max_height_kpc} kpc has its kernel inside the ball of {region.radius} kpc",
            "use a larger ball, a smaller kernel, or lower gravity.halo.min_height_kpc",
        )
    x = groups[inside].reshape(-1, 3)
    volume = grid[inside][:, :1].expand(-1, 4).reshape(-1)  # dV ∝ R dR dφ dz
    return AveragingPoints(x, volume / volume.sum())


def valid_positions(x: Any, ball: Any, kernel: Kernel | None = None) -> Tensor:
    """Whether a (smoothed) quantity at positions x (*, 3) rests inside the ball, shape (*)."""
    region = as_region(ball)
    return region.contains(x) if kernel is None else region.contains_kernel(x, kernel.reach)


def vertical_force(field: Any, z: Any, *, radius: float, phi: float = 0.0) -> Tensor:
    """K_z(z) = a_z at cylindrical radius R (kpc) and azimuth φ, in (km/s)²/kpc, shape of z."""
    return field.acceleration(_column(z, radius, phi))[..., 2]


def surface_density(field: Any, height: float, *, radius: float, phi: float = 0.0, order: int = 16) -> float:
    """Σ(|z| < height) in Msun/kpc² by Gauss's theorem: −∫∇·a dz / 4πG.

    The vertical part is [a_z(−h) − a_z(h)]/4πG; the horizontal part, −∫(1/R) ∂(R a_R)/∂R dz / 4πG plus the
    azimuthal one, is taken from finite differences of 50 pc.

    Arguments:
        field: Anything with ``acceleration(x)``.
        height: In kpc.
        radius: Cylindrical radius in kpc.
        phi: Azimuth from the Sun's, rad.
        order: Gauss–Legendre nodes of the integral over z.
    """
    ends = vertical_force(field, torch.tensor([-height, height]), radius=radius, phi=phi)
    vertical = float(ends[0] - ends[1])
    nodes, weights = np.polynomial.legendre.leggauss(order)
    x = _column(torch.from_numpy(nodes * height), radius, phi)
    step = 0.05
    horizontal = torch.zeros(order, dtype=torch.float64)
    for axis in (0, 1):
        d = torch.zeros(3, dtype=torch.float64)
        d[axis] = step
        horizontal -= (field.acceleration(x + d) - field.acceleration(x - d))[..., axis] / (2 * step)
    return (vertical + float(torch.from_numpy(weights * height) @ horizontal)) / (4 * math.pi * G)


def circular_velocity(field: Any, radius: float, *, phi: float = 0.0) -> float:
    """v_c = √(−R a_R) in km/s in the plane z = 0.

    Raises:
        GalrayError: The radial acceleration there points outwards.
    """
    x = _column(torch.zeros(1, dtype=torch.float64), radius, phi)
    a = field.acceleration(x)[0]
    inward = -float((a[:2] * x[0, :2]).sum())
    if inward <= 0:
        raise GalrayError(f"a_R at R = {radius} kpc points outwards", "the field is not usable there")
    return math.sqrt(inward)


def _column(z: Any, radius: float, phi: float) -> Tensor:
    z = torch.as_tensor(z).to(torch.float64)
    return cartesian(torch.stack([torch.full_like(z, radius), torch.full_like(z, phi), z], -1))
