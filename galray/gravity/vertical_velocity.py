"""Vertical velocities without preference for stars that have a radial velocity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galray.gravity.vertical_selection import VerticalSample

__all__ = ["VelocityEstimate", "rv_probability", "vertical_velocities"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class VelocityEstimate:
    """The vertical velocity of each star, however it was got.

    Attributes:
        value: W − mean W, km/s, (N,).
        variance: Variance of its error, (km/s)², (N,).
        weight: 1/P(the velocity is known), 0 for stars without estimate, (N,).
        mean_motion: Mean (U, V, W) with respect to the Sun, km/s.
        plane_dispersion2: (σ_U², σ_V²) of the low-latitude stars without radial velocity.
        counts: Stars with radial velocity, from proper motion alone, and left out.
    """

    value: Array
    variance: Array
    weight: Array
    mean_motion: tuple[float, float, float]
    plane_dispersion2: tuple[float, float]
    counts: dict[str, int]


def vertical_velocities(
    sample: VerticalSample, low_latitude: float, *, reweight: bool = True, floor: float = 0.05
) -> VelocityEstimate:
    """Estimate every star's vertical velocity without preferring the stars that have a radial velocity.

    W = v_b cos b + v_r sin b where v_r is known. A star without v_r at |b| < `low_latitude` gets
    W = [v_b + sin b (Ū cos l + V̄ sin l)] / cos b, whose error tan b (U' cos l + V' sin l) has a variance
    known from v_l of the same stars. At higher latitude the stars with v_r stand for those without,
    weighted by 1/P(v_r is known). The proper-motion form matters: at low latitude the stars without
    radial velocity are the kinematically cold ones at every colour and magnitude, so no weight that
    knows colour, magnitude and height alone can replace them.

    Arguments:
        sample: The stars.
        low_latitude: rad.
        reweight: False leaves out the weights and the proper-motion velocities (to show what they do).
        floor: Smallest probability of a radial velocity that is used.
    """
    lon, lat = sample.longitude, sample.latitude
    cos_l, sin_l, cos_b, sin_b = np.cos(lon), np.sin(lon), np.cos(lat), np.sin(lat)
    known = sample.has_rv
    v_r = np.where(known, sample.v_r, 0.0)
    u = v_r * cos_b * cos_l - sample.v_l * sin_l - sample.v_b * sin_b * cos_l
    v = v_r * cos_b * sin_l + sample.v_l * cos_l - sample.v_b * sin_b * sin_l
    w = sample.v_b * cos_b + v_r * sin_b
    mean_u, mean_v = _clipped_mean(u[known], 100.0), _clipped_mean(v[known], 70.0)
    low = ~known & (np.abs(lat) < low_latitude) & reweight
    w_pm = (sample.v_b + sin_b * (mean_u * cos_l + mean_v * sin_l)) / cos_b
    v_l_peculiar = sample.v_l + mean_u * sin_l - mean_v * cos_l
    dispersion2 = _plane_dispersion(v_l_peculiar, sin_l, cos_l, low)
    value = np.where(known, w, w_pm)
    variance = np.where(
        known,
        sin_b**2 * np.where(known, sample.v_r_variance, 0.0) + cos_b**2 * sample.v_b_variance,
        (sin_b**2 * (dispersion2[0] * cos_l**2 + dispersion2[1] * sin_l**2) + sample.v_b_variance) / cos_b**2,
    )
    used = known | low
    weight = used.astype(float)
    high = np.abs(lat) >= low_latitude
    if reweight and (high & ~known).any():
        probability = rv_probability(sample, v_l_peculiar, w_pm, high)
        weight[high & known] = 1 / np.maximum(probability[high & known], floor)
    mean_w = _clipped_mean(value[used], 60.0, weight[used])
    return VelocityEstimate(
        value=value - mean_w,
        variance=variance,
        weight=weight,
        mean_motion=(mean_u, mean_v, mean_w),
        plane_dispersion2=dispersion2,
        counts={
            "radial velocity": int(known.sum()),
            "proper motion alone": int(low.sum()),
            "reweighted": int((~used).sum()),
        },
    )


def rv_probability(sample: VerticalSample, v_l: Array, w_pm: Array, fit: NDArray[np.bool_]) -> Array:
    """P(radial velocity known | G, colour, latitude, group, tangential velocity) by logistic regression.

    The tangential velocities enter because the stars that miss a radial velocity (hot, young, fast
    rotators) are kinematically cold: what proper motion tells about that is used.

    Arguments:
        sample: The stars.
        v_l: Peculiar v_l, km/s, (N,).
        w_pm: Vertical velocity from proper motion alone, km/s, (N,).
        fit: Stars to fit on, (N,).

    Returns:
        (N,) probabilities; meaningful where `fit`.
    """
    g = sample.magnitude - 11.0
    colour_known = np.isfinite(sample.colour)
    centre = np.median(sample.colour[colour_known]) if colour_known.any() else 0.0
    colour = np.where(colour_known, sample.colour - centre, 0.0).clip(-0.6, 0.6)
    sin_b = np.abs(np.sin(sample.latitude))
    slow_l = np.exp(-(v_l**2) / (2 * 25.0**2))
    slow_w = np.exp(-((w_pm - np.median(w_pm)) ** 2) / (2 * 15.0**2)) * np.cos(sample.latitude) ** 2
    columns = [np.ones(len(g)), g, g**2]
    columns += [np.maximum(g - knot, 0) for knot in (1.0, 1.5, 2.0)]
    columns += [colour, colour**2, np.maximum(-colour - 0.15, 0), (~colour_known).astype(float)]
    columns += [sin_b, sin_b**2, np.sign(sample.height), slow_l, slow_w, slow_l * sin_b, slow_l * slow_w]
    columns += [(sample.group == k).astype(float) for k in range(1, len(sample.group_names))]
    features = np.stack(columns, 1)
    target = sample.has_rv.astype(float)
    beta = np.zeros(features.shape[1])
    x, y = features[fit], target[fit]
    ridge = 1e-3 * np.eye(x.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, x.T @ (y - p) - ridge @ beta)
        beta = beta + np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-6:
            break
    return np.asarray(1 / (1 + np.exp(-np.clip(features @ beta, -30, 30))))


def _clipped_mean(values: Array, width: float, weights: Array | None = None) -> float:
    """Mean of what lies within `width` of itself (symmetric clipping keeps a symmetric mean unbiased)."""
    centre = float(np.median(values))
    weights = np.ones(len(values)) if weights is None else weights
    for _ in range(5):
        near = np.abs(values - centre) < width
        centre = float(np.average(values[near], weights=weights[near]))
    return centre


def _plane_dispersion(
    v_l: Array, sin_l: Array, cos_l: Array, stars: NDArray[np.bool_]
) -> tuple[float, float]:
    """(σ_U², σ_V²) of some stars from their own v_l: E v_l'² = σ_U² sin²l + σ_V² cos²l."""
    near = stars & (np.abs(v_l) < 120.0)
    if near.sum() < 50:
        return 30.0**2, 20.0**2  # too few stars for their spread to matter
    design = np.stack([sin_l[near] ** 2, cos_l[near] ** 2], 1)
    solution = np.linalg.lstsq(design, v_l[near] ** 2, rcond=None)[0]
    return float(max(solution[0], 25.0)), float(max(solution[1], 25.0))
