"""J- and D-factors: the dark matter along the line of sight, for annihilation and for decay."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from galray.units import GEV_PER_CM3, MSUN_PC3, G

__all__ = ["CM_PER_KPC", "INNERMOST", "d_factor", "j_factor", "tidal_radius"]

Array = NDArray[np.float64]

CM_PER_KPC = 3.085677581491367e21
INNERMOST = 1e-3
"""Inside this radius (kpc) the density is held at its value there: a cusp of γ ≥ 3/2 would have no J."""

_GEV_CM3 = GEV_PER_CM3 / MSUN_PC3
_NODES = 400


def j_factor(
    density: Callable[[Array], Array], distance: Array | float, angle: float, truncation: Array | float
) -> Array:
    """J = ∫dΩ ∫dl ρ² over the cone of half-angle `angle` about the centre of a sphere.

    The sphere is seen from a finite distance: a shell of radius r inside the cone contributes
    (2π r/D) ln[(D + r)/(D − r)] ρ² dr, one that sticks out the part of it between the cone's two cuts at
    l± = D cos θ ± √(r² − D² sin² θ), so that one integral over r is exact (no far-field limit).

    Arguments:
        density: ρ(r) in Msun/kpc³ of radii (K,) in kpc; (S, K) for S samples of a posterior.
        distance: Distance D, kpc, one or one per sample, shape (S,).
        angle: θ in degrees, below 90.
        truncation: Radius beyond which there is nothing, kpc, one or one per sample; smaller than D.

    Returns:
        J in GeV² cm⁻⁵, shape () or (S,).
    """
    return _integral(density, distance, angle, truncation, power=2) * _GEV_CM3**2 * CM_PER_KPC


def d_factor(
    density: Callable[[Array], Array], distance: Array | float, angle: float, truncation: Array | float
) -> Array:
    """D = ∫dΩ ∫dl ρ over the cone of half-angle `angle` about the centre; arguments as of `j_factor`.

    Returns:
        D in GeV cm⁻², shape () or (S,).
    """
    return _integral(density, distance, angle, truncation, power=1) * _GEV_CM3 * CM_PER_KPC


def _integral(
    density: Callable[[Array], Array],
    distance: Array | float,
    angle: float,
    truncation: Array | float,
    power: int,
) -> Array:
    if not 0 < angle < 90:
        raise ValueError(f"angle = {angle} deg must lie between 0 and 90")
    d, limit = np.broadcast_arrays(np.asarray(distance, float), np.asarray(truncation, float))
    if (limit >= d).any():
        raise ValueError("the truncation radius must be smaller than the distance")
    theta = np.radians(angle)
    edge = d * np.sin(theta)
    grid = np.geomspace(INNERMOST, float(limit.max()), _NODES)
    rho = np.asarray(density(grid), float)
    nodes, weights = np.polynomial.legendre.leggauss(24)

    def shells(low: Array, high: Array, *, cut: bool) -> Array:
        """∫ between two radii, substituted so that the square root at r = D sin θ does no harm."""
        span = np.where(high > low, high - low, 0.0)
        total = np.zeros(span.shape)
        # r = low + span u², u in panels: fine near `low`, where the cut begins or the cusp sits
        for a, b in itertools.pairwise(np.linspace(0, 1, 9)):
            u = 0.5 * (a + b) + 0.5 * (b - a) * nodes
            r = low[..., None] + span[..., None] * u**2
            jacobian = span[..., None] * 2 * u * 0.5 * (b - a) * weights
            if cut:
                root = np.sqrt(np.maximum(r**2 - edge[..., None] ** 2, 0.0))
                base = (d * np.cos(theta))[..., None]
                ratio = (base - root) / (base + root) * (d[..., None] + r) / (d[..., None] - r)
            else:
                ratio = (d[..., None] + r) / (d[..., None] - r)
            value = _interpolate(grid, rho, np.maximum(r, INNERMOST)) ** power
            total = total + (2 * np.pi * r / d[..., None] * np.log(ratio) * value * jacobian).sum(-1)
        return total

    inside = np.minimum(edge, limit)
    floor = np.full(inside.shape, INNERMOST)
    core = shells(np.zeros(inside.shape), np.minimum(floor, inside), cut=False)
    # decades of a cusp are summed one by one
    total = core
    cuts = np.geomspace(1.0, np.maximum(inside / floor, 1.0), 6)
    for low, high in itertools.pairwise(cuts):
        total = total + shells(floor * low, floor * high, cut=False)
    return total + shells(inside, limit, cut=True)


def _interpolate(grid: Array, rho: Array, r: Array) -> Array:
    """ρ at radii of shape (K,) or (S, K), linear in logarithms."""
    position = np.log(r / grid[0]) / np.log(grid[-1] / grid[0]) * (len(grid) - 1)
    at = np.clip(position.astype(int), 0, len(grid) - 2)
    part = position - at
    logs = np.log(np.maximum(rho, 1e-300))
    if logs.ndim == 1:
        low, high = logs[at], logs[at + 1]
    else:
        at = np.broadcast_to(at, (logs.shape[0], at.shape[-1]))
        low, high = np.take_along_axis(logs, at, 1), np.take_along_axis(logs, at + 1, 1)
    return np.exp(low + part * (high - low))


def tidal_radius(
    mass: Callable[[Array], Array], distance_to_host: float, circular_speed: float = 200.0
) -> Array:
    """Jacobi radius of a satellite of an isothermal host: r³ = D³ m(<r) / (2 M(<D)), M = v² D/G.

    Binney & Tremaine (2008), eq. 8.108, for a host of constant circular speed.

    Arguments:
        mass: m(<r) in Msun of radii (K,) in kpc; (S, K) for samples.
        distance_to_host: Distance from the host's centre, kpc.
        circular_speed: Of the host there, km/s.

    Returns:
        Radius in kpc, shape () or (S,); half the distance at most.
    """
    r = np.geomspace(1e-2, 0.5 * distance_to_host, 300)
    host = circular_speed**2 * distance_to_host / G
    # m(<r)/r³ falls outwards, so the first radius at which the host wins is the answer
    excess = np.log(np.asarray(mass(r), float)) - np.log(2 * host * (r / distance_to_host) ** 3)
    held = excess > 0
    last = np.where(held.all(-1), len(r) - 1, np.argmin(held, axis=-1))
    if excess.ndim == 1:
        excess, last = excess[None], last[None]
    low = np.maximum(last - 1, 0)
    rows = np.arange(len(excess))
    a, b = excess[rows, low], excess[rows, last]
    part = np.where((b < 0) & (a > 0), a / np.where(a == b, 1.0, a - b), 1.0)
    found = np.exp(np.log(r[low]) + part * (np.log(r[last]) - np.log(r[low])))
    return found if np.asarray(mass(r)).ndim > 1 else found[0]
