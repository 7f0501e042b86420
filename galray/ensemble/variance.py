"""Variances and correlations from a handful of members: pooled, shrunk, and honest about their number.

Two or three members tell a variance to a factor of a few only. Quantities of one kind (the same
acceleration at neighbouring heights) have similar variances in units of their own scale, so each is
moderated towards the pooled one as in Smyth (2004, Stat. Appl. Genet. Mol. Biol. 3, 3), with a prior no
stronger than the number of independent quantities allows; what uncertainty remains goes into the band
through Student's t with Welch-Satterthwaite degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "correlation",
    "effective_number",
    "group_numbers",
    "jackknife_covariance",
    "moderate",
    "shrink_correlation",
    "student_factor",
    "welch_satterthwaite",
]

Array = NDArray[np.float64]
_ONE_SIGMA = 0.5 * (1.0 + math.erf(1.0 / math.sqrt(2.0)))


def student_factor(dof: Array | float) -> Array:
    """Give the factor that makes a one-sigma band of few degrees of freedom hold 68.3 %.

    Arguments:
        dof: Degrees of freedom, any shape; infinite gives 1. Below 1 they count as 1.
    """
    from scipy.special import stdtrit  # scipy costs half a second that the settings' readers need not pay

    dof = np.maximum(np.asarray(dof, dtype=float), 1.0)
    finite = np.isfinite(dof) & (dof < 1e6)
    return np.where(finite, stdtrit(np.where(finite, dof, 1e6), _ONE_SIGMA), 1.0)


def welch_satterthwaite(variances: Sequence[Array], dofs: Sequence[Array]) -> Array:
    """Give the degrees of freedom of a sum of independent variance estimates.

    ν = (Σ Vₖ)² / Σ (Vₖ² / νₖ) (Satterthwaite 1946, Biometrics Bull. 2, 110).

    Arguments:
        variances: Terms `(Q,)` each.
        dofs: Their degrees of freedom `(Q,)` each.
    """
    total = np.sum(variances, axis=0)
    spread = np.sum([v**2 / np.maximum(d, 1.0) for v, d in zip(variances, dofs, strict=True)], axis=0)
    return np.where(spread > 0, total**2 / np.where(spread > 0, spread, 1.0), np.inf)


def moderate(
    variance: Array, dof: float, scale: Array, groups: NDArray[np.int64], independent: Array, prior_dof: float
) -> tuple[Array, Array]:
    """Shrink each quantity's variance towards what quantities of its group have in units of their scale.

    s̃² = (d₀ g² scale² + d s²) / (d₀ + d), g² the group's mean of s²/scale², and
    d₀ = min(prior_dof, d (n − 1)) with n independent quantities in the group: a group of perfectly
    correlated quantities teaches nothing beyond one of them.

    Arguments:
        variance: Estimates s² `(Q,)`.
        dof: Their degrees of freedom d.
        scale: Natural scale of each quantity `(Q,)`, positive.
        groups: Group number of each quantity `(Q,)`.
        independent: Number of independent quantities in each one's group `(Q,)`.
        prior_dof: Most degrees of freedom that the pool may add.

    Returns:
        Moderated variances and their degrees of freedom, `(Q,)` each.
    """
    moderated, total = np.empty_like(variance), np.empty_like(variance)
    for group in np.unique(groups):
        mask = groups == group
        pooled = np.mean(variance[mask] / scale[mask] ** 2) * scale[mask] ** 2
        prior = np.clip(dof * (independent[mask] - 1.0), 0.0, prior_dof)
        moderated[mask] = (prior * pooled + dof * variance[mask]) / (prior + dof)
        total[mask] = prior + dof
    return moderated, total


def effective_number(deviations: Array, groups: NDArray[np.int64]) -> Array:
    """Estimate how many independent quantities each group holds: (tr C)² / tr C².

    From few deviations this is an underestimate, which makes pooling weaker and bands wider.

    Arguments:
        deviations: Scaled deviations of mean zero `(n, Q)`.
        groups: Group number of each quantity `(Q,)`.

    Returns:
        The number for the group of each quantity `(Q,)`, at least 1.
    """
    number = np.ones(len(groups))
    for group in np.unique(groups):
        mask = groups == group
        part = deviations[:, mask]
        norm = np.sqrt(np.mean(part**2, axis=0))
        part = part / np.where(norm > 0, norm, 1.0)
        matrix = part.T @ part / max(len(part), 1)
        square = np.sum(matrix**2)
        number[mask] = max(np.trace(matrix) ** 2 / square, 1.0) if square > 0 else 1.0
    return number


def correlation(deviations: Array, groups: NDArray[np.int64]) -> Array:
    """Estimate the correlation between quantities, shrunk so that it is positive definite.

    The sample correlation shrinks towards a constant one within each group and none between groups, by
    the intensity of Schäfer & Strimmer (2005, Stat. Appl. Genet. Mol. Biol. 4, 32, target F) of at least
    10 %. Independence as the target would make the error of an average over a profile too small.

    Arguments:
        deviations: Scaled deviations of mean zero `(n, Q)`; none gives the target of half-correlated
            groups, one is worth as much as that target.
        groups: Group number of each quantity `(Q,)`.

    Returns:
        Correlation matrix `(Q, Q)`.
    """
    number, quantities = deviations.shape
    same = (groups[:, None] == groups[None, :]) & ~np.eye(quantities, dtype=bool)
    norm = np.sqrt(np.mean(deviations**2, axis=0)) if number else np.zeros(quantities)
    scaled = deviations / np.where(norm > 0, norm, 1.0)
    sample = scaled.T @ scaled / max(number, 1)
    target = np.eye(quantities)
    for group in np.unique(groups):
        block = same & (groups == group)[:, None]
        if block.any():
            typical = float(np.clip(sample[block].mean(), 0.0, 0.95)) if number > 1 else 0.5
            target[block] = typical
    intensity = 1.0 if number == 0 else 0.5
    if number > 1:
        off = ~np.eye(quantities, dtype=bool)
        noise = ((scaled**2).T @ (scaled**2) / number - sample**2) / (number - 1)
        distance = np.sum((sample - target)[off] ** 2)
        intensity = float(np.clip(np.sum(noise[off]) / distance, 0.1, 1.0)) if distance > 0 else 1.0
    # A target of equal correlations up to 0.95 is positive definite, and so is the mixture.
    return shrink_correlation((1.0 - intensity) * sample + intensity * target, 0.0)


def shrink_correlation(matrix: Array, intensity: float = 0.05) -> Array:
    """Shrink a covariance or correlation towards independence and give its correlation.

    Arguments:
        matrix: Symmetric positive semi-definite `(Q, Q)`; rows of zero variance become independent.
        intensity: Weight of the unit matrix, 0 to 1.
    """
    sigma = np.sqrt(np.clip(np.diag(matrix), 0.0, None))
    safe = np.where(sigma > 0, sigma, 1.0)
    result = (1.0 - intensity) * matrix / np.outer(safe, safe)
    result = 0.5 * (result + result.T)
    np.fill_diagonal(result, 1.0)
    return result


def jackknife_covariance(
    estimates: Array, full: Array | None = None, sizes: Array | None = None
) -> tuple[Array, Array]:
    """Turn delete-one-block estimates into a covariance and a bias.

    Equal blocks: C = (B−1)/B Σ (xᵦ − x̄)(xᵦ − x̄)ᵀ. Blocks of different sizes: the delete-mⱼ jackknife of
    Busing, Meijer & van der Leeden (1999, Stat. Comput. 9, 3).

    Arguments:
        estimates: Results with block b left out `(B, Q)`.
        full: Result of all blocks `(Q,)`; the estimates' mean when absent (then no bias can be told).
        sizes: Rows in each block `(B,)`; equal when absent.

    Returns:
        Covariance `(Q, Q)` of the full result, and its bias `(Q,)`.
    """
    estimates = np.asarray(estimates, dtype=float)
    blocks = len(estimates)
    if blocks < 2:
        raise ValueError(f"a jackknife needs at least 2 blocks, not {blocks}")
    sizes = np.ones(blocks) if sizes is None else np.asarray(sizes, dtype=float)
    ratio = sizes.sum() / sizes
    keep = 1.0 - 1.0 / ratio
    if full is None:
        full = (keep @ estimates) / keep.sum()
    corrected = blocks * full - keep @ estimates
    pseudo = ratio[:, None] * full - (ratio - 1.0)[:, None] * estimates
    centred = (pseudo - corrected) / np.sqrt(ratio - 1.0)[:, None]
    return centred.T @ centred / blocks, full - corrected


def group_numbers(groups: Sequence[str] | None, quantities: int) -> NDArray[np.int64]:
    """Number the kinds of `quantities` quantities; one kind when none are given."""
    if groups is None:
        return np.zeros(quantities, dtype=np.int64)
    if len(groups) != quantities:
        raise ValueError(f"{len(groups)} groups for {quantities} quantities")
    return np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)
