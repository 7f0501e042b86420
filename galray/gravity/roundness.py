"""How far masses are from round, and how round the stars say that they are.

In a sample of stars the broad modes of the density, its dipole and its quadrupole, are the least certain: the
stars themselves are not quite as round as what they were drawn from, and no smoothing takes that away. Where
the mass may be nearly round, a prior says so: the departure of ρ from its mean ρ̄ over spheres about the
stars' median,

    D = ⟨(ρ − ρ̄)²/ρ̄²⟩,

is added to what the masses minimise, in units of the mean square that the potential explains. Its strength
is not chosen by eye: of two halves of the stars, each with a model of its own, one is fitted and the other
judges (`choose_roundness`). Mass that is far from round refuses the prior, for the judge then loses.
"""

from __future__ import annotations

import math

import numpy as np

from galray.gravity.splines import Array

__all__ = ["ROUNDNESSES", "departure", "shells"]

ROUNDNESSES = (0.0, *(10.0 ** np.arange(-2.0, 2.5, 0.5)))
"""Strengths that are tried; 100 leaves the masses no more than their own lumps."""

_SHELLS = 16
_DIRECTIONS = 96
_EMPTY = 1e-6  # of the highest mean density on a sphere


def shells(stars: Array) -> Array:
    """Points on spheres about the stars' median, each sphere with as many stars between it and the next.

    Arguments:
        stars: Positions (n, 3) in kpc.

    Returns:
        Points (16, 96, 3), on each sphere in the directions of Fibonacci's spiral.
    """
    center = np.median(stars, axis=0)
    radii = np.quantile(np.linalg.norm(stars - center, axis=1), (np.arange(_SHELLS) + 0.5) / _SHELLS)
    i = np.arange(_DIRECTIONS) + 0.5
    height, azimuth = 1 - 2 * i / _DIRECTIONS, math.pi * (1 + math.sqrt(5)) * i
    across = np.sqrt(1 - height**2)
    directions = np.stack([across * np.cos(azimuth), across * np.sin(azimuth), height], -1)
    return center + radii[:, None, None] * directions


def departure(points: Array, centres: Array, widths: Array, masses: Array) -> Array:
    """The quadratic form whose value at masses near the given ones is their D.

    Arguments:
        points: Points on spheres, (S, P, 3).
        centres: Of the Gaussians, (K, 3).
        widths: Their standard deviations, (K,).
        masses: Those whose ρ̄ is the unit on each sphere, (K,).

    Returns:
        Symmetric and positive, (K, K).
    """
    square = np.square(points.reshape(-1, 1, 3) - centres).sum(-1)
    density = np.exp(-square / (2 * widths**2)) / ((2 * math.pi) ** 1.5 * widths**3)
    density = density.reshape(*points.shape[:2], -1)
    mean = density.mean(1, keepdims=True)
    unit = mean @ masses
    # where the masses have left a sphere empty, a ratio to them would say nothing
    unit = np.maximum(unit, _EMPTY * unit.max())
    relative = ((density - mean) / unit[..., None]).reshape(-1, len(masses))
    return relative.T @ relative / len(relative)
