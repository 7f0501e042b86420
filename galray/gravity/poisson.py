"""Kernel-smoothed mass density −∇·a/4πG without differentiating a.

With a Gaussian kernel K of widths h_i, truncated at the ellipsoid S where Σ(δ_i/h_i)² = k² and renormalised,
integration by parts of ∫K ∇·a gives

    (ρ*K)(x) = −(1/4πG) { E_{δ~K}[ Σ_i a_i(x+δ) δ_i/h_i² ] + ∮_S K a·dS }.

With δ = q h∘û both terms are averages over directions û of a(x + q h∘û)·(û/h): the volume over q with
weight q³e^{−q²/2}, the surface at q = k. The directions are a product of Gauss–Legendre nodes in cos θ and
equal steps in φ, mirrored through the centre, so that what is odd in δ cancels exactly; every position
shares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.gravity.region import Region, as_positions
from galray.gravity.settings import KernelSettings
from galray.units import G

__all__ = ["Kernel", "check_region", "smooth", "smoothed_density"]


class Kernel:
    """A truncated, renormalised Gaussian and its quadrature nodes.

    Arguments:
        h: Standard deviations along x, y and z in kpc.
        truncate: k, the ellipsoid at which the kernel ends, in standard deviations.
        radial_nodes: Nodes in q ∈ (0, k).
        polar_nodes: Nodes in cos θ, even.
        azimuthal_nodes: Nodes in φ, even.
    """

    def __init__(
        self,
        h: tuple[float, float, float] = (0.5, 0.5, 0.2),
        truncate: float = 2.0,
        *,
        radial_nodes: int = 6,
        polar_nodes: int = 16,
        azimuthal_nodes: int = 8,
    ) -> None:
        if min(h) <= 0 or truncate <= 0:
            raise GalrayError(
                f"kernel widths {h} cut at {truncate}", "give positive widths in kpc and a positive cut"
            )
        self.h = (float(h[0]), float(h[1]), float(h[2]))
        self.truncate = float(truncate)
        nodes, weights = np.polynomial.legendre.leggauss(radial_nodes)
        q = (nodes + 1) / 2 * truncate
        radial = weights / 2 * truncate * q**2 * np.exp(-(q**2) / 2)  # volume element times kernel
        norm = radial.sum()
        cosine, polar = np.polynomial.legendre.leggauss(2 * math.ceil(polar_nodes / 2))
        num_phi = 2 * math.ceil(azimuthal_nodes / 2)
        phi = (np.arange(num_phi) + 0.5) * 2 * math.pi / num_phi
        sine = np.sqrt(1 - cosine**2)
        unit = np.stack(
            [np.outer(sine, np.cos(phi)), np.outer(sine, np.sin(phi)), np.outer(cosine, np.ones(num_phi))], -1
        ).reshape(-1, 3)
        angular = np.repeat(polar / polar.sum(), num_phi) / num_phi
        inner = (q[:, None, None] * unit).reshape(-1, 3)
        self._offsets = torch.tensor(np.concatenate([inner, truncate * unit]) * self.h)
        self._volume = torch.tensor(np.concatenate([np.outer(radial / norm, angular).ravel(), 0 * angular]))
        # the volume term carries δ/h² = q û/h, the surface K a·dS = k² e^{−k²/2} a·(û/h) dΩ / norm
        edge = truncate**2 * math.exp(-(truncate**2) / 2) / norm
        amount = np.concatenate([np.outer(radial / norm * q, angular).ravel(), edge * angular])
        direction = np.concatenate([np.tile(unit, (len(q), 1)), unit]) / np.array(self.h)
        self._divergence = torch.tensor(amount[:, None] * direction)

    @classmethod
    def from_settings(cls, settings: KernelSettings) -> Kernel:
        """The kernel of a configuration."""
        return cls(
            settings.widths_kpc,
            settings.truncate,
            radial_nodes=settings.radial_nodes,
            polar_nodes=settings.polar_nodes,
            azimuthal_nodes=settings.azimuthal_nodes,
        )

    @property
    def reach(self) -> tuple[float, float, float]:
        """Half-axes of the ellipsoid at which the kernel ends, in kpc."""
        return (self.h[0] * self.truncate, self.h[1] * self.truncate, self.h[2] * self.truncate)

    @property
    def offsets(self) -> Tensor:
        """Node offsets δ in kpc, shape (m, 3): the volume's, then the surface's."""
        return self._offsets

    @property
    def weights(self) -> Tensor:
        """Weights of an average over the kernel, shape (m,), summing to 1 (zero on the surface)."""
        return self._volume

    @property
    def divergence_weights(self) -> Tensor:
        """D of shape (m, 3), in 1/kpc, with (∇·a * K)(x) = Σ_m a(x + δ_m)·D_m."""
        return self._divergence

    def __repr__(self) -> str:
        return f"Kernel(h={self.h}, truncate={self.truncate})"


def smoothed_density(field: Any, x: Any, kernel: Kernel, *, batch_size: int = 200_000) -> Tensor:
    """(ρ*K)(x) of an acceleration field in Msun/kpc³.

    Arguments:
        field: Anything with ``acceleration(x)``; one with a ``region`` is not asked beyond it.
        x: Positions (*, 3) in kpc.
        kernel: The kernel.
        batch_size: Accelerations evaluated at once.

    Returns:
        Smoothed densities of shape (*), float64.

    Raises:
        GalrayError: A kernel around a position reaches beyond the field's region.
    """
    x = as_positions(x)
    check_region(field, x, kernel)
    d = kernel.divergence_weights.to(x.device)

    def divergence(a: Tensor) -> Tensor:
        return (a.to(torch.float64) * d).sum((-1, -2))

    return _over_nodes(field.acceleration, x, kernel, divergence, batch_size) / (-4 * math.pi * G)


def smooth(
    function: Callable[[Tensor], Tensor], x: Any, kernel: Kernel, *, batch_size: int = 200_000
) -> Tensor:
    """Average a scalar function over the kernel: for true densities and baryons, with the same nodes.

    Arguments:
        function: Maps positions (*, 3) in kpc to values (*).
        x: Positions (*, 3) in kpc.
        kernel: The kernel.
        batch_size: Values evaluated at once.
    """
    x = as_positions(x)
    weights = kernel.weights.to(x.device)

    def average(values: Tensor) -> Tensor:
        return (values.to(torch.float64) * weights).sum(-1)

    return _over_nodes(function, x, kernel, average, batch_size)


def check_region(field: Any, x: Any, kernel: Kernel | None = None) -> None:
    """Refuse positions at which a field is not known.

    Raises:
        GalrayError: A position, or the kernel around it, lies outside ``field.region``.
    """
    region: Region | None = getattr(field, "region", None)
    if region is None:
        return
    x = as_positions(x).detach()
    inside = region.contains(x) if kernel is None else region.contains_kernel(x, kernel.reach)
    if bool(inside.all()):
        return
    first = x[~inside].reshape(-1, 3)[0].tolist()
    where = ", ".join(f"{value:.3f}" for value in first)
    reach = "" if kernel is None else f" with a kernel of half-axes {kernel.reach} kpc"
    raise GalrayError(
        f"{int((~inside).sum())} of {inside.numel()} positions, the first at ({where}){reach}, "
        f"reach beyond the ball of {region.radius} kpc around {tuple(round(c, 4) for c in region.center)}",
        "keep to the ball minus the kernel's reach, or use a larger ball or a smaller kernel",
    )


def _over_nodes(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    kernel: Kernel,
    reduce: Callable[[Tensor], Tensor],
    batch_size: int,
) -> Tensor:
    flat = x.reshape(-1, 3)
    offsets = kernel.offsets.to(x.device)
    step = max(1, batch_size // len(offsets))
    parts = []
    for chunk in flat.split(step):
        nodes = (chunk[:, None] + offsets).reshape(-1, 3)
        values = function(nodes)
        parts.append(reduce(values.reshape(len(chunk), len(offsets), *values.shape[1:])))
    return torch.cat(parts).reshape(x.shape[:-1]) if parts else flat.new_empty(x.shape[:-1])
