"""Dispersions of the stars' velocities by maximum likelihood, whole and in rings: the data beside a model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galray.dwarf.observation import Observation

__all__ = ["Rings", "dispersion", "rings", "surface_density"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rings:
    """Values of stars in rings.

    Arguments:
        radius: Mean radius of each ring, kpc, shape (k,).
        low: Radius of its innermost star.
        high: Radius of its outermost star.
        value: The value.
        error: Its standard error.
    """

    radius: Array
    low: Array
    high: Array
    value: Array
    error: Array


def dispersion(velocity: Array, error: Array, weight: Array) -> tuple[float, float, float]:
    """Mean and intrinsic dispersion of a Gaussian with errors, by maximum likelihood.

    Arguments:
        velocity: km/s, shape (n,).
        error: Errors, km/s.
        weight: Memberships: each star counts by its own.

    Returns:
        Mean, dispersion and the error of the dispersion (from the curvature of the likelihood), km/s.
    """
    mean = float(np.average(velocity, weights=weight))
    variance = max(float(np.average((velocity - mean) ** 2 - error**2, weights=weight)), 0.25)
    for _ in range(200):
        total = variance + error**2
        mean = float(np.average(velocity, weights=weight / total))
        # the fixed point of the likelihood's derivative in the variance
        part = weight / total**2
        new = float(np.sum(part * ((velocity - mean) ** 2 - error**2)) / np.sum(part))
        new = max(new, 1e-4)
        done = abs(new - variance) < 1e-9 * variance
        variance = new
        if done:
            break
    information = 0.5 * np.sum(weight / (variance + error**2) ** 2)
    sigma = float(np.sqrt(variance))
    return mean, sigma, float(information**-0.5 / (2 * sigma))


def rings(observation: Observation, count: int | None = None) -> Rings:
    """Line-of-sight dispersions in rings of equal numbers of members.

    Arguments:
        observation: The stars.
        count: Number of rings; by default rings of about 60 members, 4 to 16 of them.
    """
    radius, weight = observation.radius, observation.membership
    count = count or int(np.clip(observation.num_members / 60, 4, 16))
    order = np.argsort(radius)
    part = np.cumsum(weight[order]) / weight.sum()
    cuts = np.searchsorted(part, np.arange(1, count) / count)
    found = []
    for rows in np.split(order, cuts):
        if weight[rows].sum() < 5:
            continue
        _, sigma, error = dispersion(
            observation.velocity[rows], observation.velocity_error[rows], weight[rows]
        )
        mean = float(np.average(radius[rows], weights=weight[rows]))
        found.append((mean, radius[rows].min(), radius[rows].max(), sigma, error))
    return Rings(*np.array(found).T)


def surface_density(observation: Observation, count: int = 16) -> Rings:
    """Surface density of the light's sample, or without one of the stars with velocities, one star in all.

    Arguments:
        observation: The stars.
        count: Number of rings, of equal weight.
    """
    light = len(observation.light_x) > 0
    radius = observation.light_radius if light else observation.radius
    weight = observation.light_weight if light else observation.membership
    order = np.argsort(radius)
    part = np.cumsum(weight[order]) / weight.sum()
    cuts = np.searchsorted(part, np.arange(1, count) / count)
    edges = np.concatenate([[0.0], radius[order][np.minimum(cuts, len(order) - 1)], [radius.max()]])
    found = []
    for low, high in itertools.pairwise(edges):
        inside = (radius >= low) & (radius < high) if high < edges[-1] else radius >= low
        area = np.pi * (high**2 - low**2)
        if area <= 0 or not inside.any():
            continue
        w = weight[inside]
        density = w.sum() / weight.sum() / area
        mean = float(np.average(radius[inside], weights=w))
        found.append((mean, low, high, density, density * np.sqrt((w**2).sum()) / w.sum()))
    return Rings(*np.array(found).T)
