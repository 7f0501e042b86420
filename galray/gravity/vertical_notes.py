"""What the numbers of a vertical inversion say, in plain sentences for the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from galray.gravity.vertical_selection import VerticalSample
from galray.gravity.vertical_velocity import VelocityEstimate

if TYPE_CHECKING:
    from galray.gravity.vertical import VerticalResult

__all__ = ["PUBLISHED_RANGE", "mckee_2015", "write_notes"]

Array = NDArray[np.float64]

PUBLISHED_RANGE = (0.08, 0.12)
"""Published total densities in the plane, Msun/pc³."""


def mckee_2015(z: Array) -> Array:
    """A Solar-neighbourhood density after McKee et al. 2015 (1509.05334), Msun/pc³.

    Gas by their Table 2, stars and remnants 0.043 in a sech² layer of the effective height 388 pc, dark
    matter 0.013. Their stellar layers by type are not public here, so only the total should be compared.

    Arguments:
        z: kpc.
    """
    pc = 1000 * np.abs(np.asarray(z))
    gas = 0.0052 * np.exp(-((pc / 105) ** 2)) + 0.0277 * np.exp(-((pc / 127) ** 2))
    gas = gas + 0.0045 * np.exp(-((pc / 318) ** 2)) + 0.0027 * np.exp(-pc / 403) + 0.0005 * np.exp(-pc / 1590)
    return gas + 0.043 / np.cosh(pc / 388) ** 2 + 0.013


def write_notes(
    result: VerticalResult,
    sample: VerticalSample,
    velocity: VelocityEstimate,
    reference: Callable[[Array], Array],
) -> list[str]:
    """Sentences from the numbers of a result.

    Arguments:
        result: The result.
        sample: The stars it is from.
        velocity: Their velocities.
        reference: Density profile to compare with, Msun/pc³ of z in kpc.
    """
    notes = [*_density_notes(result, reference), *_selection_notes(result, sample), *_force_notes(result)]
    asymmetry = _asymmetry(sample, velocity, result.sun_height[0])
    if asymmetry is not None:
        verdict = "no sign of" if abs(asymmetry[0]) < 3 * asymmetry[1] else "a sign of"
        percent, error = 100 * np.expm1(asymmetry[0]), 100 * asymmetry[1]
        notes.append(
            f"At 100 to 300 pc from the plane σ_W² in the south differs by {percent:+.1f} ± {error:.1f} % "
            f"from the north: {verdict} departure from a steady disc symmetric about its plane."
        )
    radial, tilt = (result.corrections[name][0] for name in ("radial", "tilt"))
    notes.append(
        f"Sun {1000 * result.sun_height[0]:.1f} ± {1000 * result.sun_height[1]:.1f} pc above the plane, "
        f"mean W "
        f"{result.mean_velocity:.2f} km/s; the radial term {radial:+.4f} and the tilt term {tilt:+.4f} "
        f"Msun/pc³ are "
        "included. A disc that changes with time (phase spiral, breathing) is not in the error."
    )
    return notes


def _density_notes(result: VerticalResult, reference: Callable[[Array], Array]) -> list[str]:
    chance = float(chi2.sf(result.chi2, result.dof))
    biggest = sorted(result.terms, key=lambda term: -term["error"])[:3]
    below = result.kernel_z[np.flatnonzero(result.kernel < 0.5 * result.kernel[0])[:1]]
    reach = f"{1000 * below[0]:.0f}" if len(below) else "all"
    low, high = PUBLISHED_RANGE
    notes = [
        f"Total density in the plane {result.rho0:.3f} ± {result.rho0_error:.3f} Msun/pc³ "
        f"(± {result.rho0_statistical:.3f} from the stars alone); χ² = {result.chi2:.1f} for {result.dof} "
        f"degrees "
        f"of freedom (probability {chance:.2g}). Largest terms: "
        + ", ".join(f"{t['term']} {t['error']:.3f}" for t in biggest)
        + ".",
        f"The value has a resolution: its kernel falls to half at |z| = {reach} pc. The reference profile "
        f"(after McKee et al. 2015 unless another is given) has {reference(np.array([0.0]))[0]:.3f} in "
        f"the plane and {result.expected(reference):.3f} through the same kernel.",
    ]
    if 0.1 in result.mean_density:
        mean, error = result.mean_density[0.1]
        fine = np.linspace(0.0005, 0.0995, 100)
        notes.append(
            f"Mean density within 100 pc of the plane, which hardly depends on the density model: "
            f"{mean:.4f} ± {error:.4f} Msun/pc³ (statistical); reference {np.mean(reference(fine)):.4f}."
        )
    if low <= result.rho0 <= high:
        notes.append(
            f"Published total densities lie between {low:.2f} and {high:.2f} Msun/pc³: so does this one."
        )
    else:
        above = result.rho0 > high
        sigma = abs(result.rho0 - (high if above else low)) / result.rho0_error
        notes.append(
            f"The value lies {'above' if above else 'below'} the published range {low:.2f} to {high:.2f} "
            f"Msun/pc³ by {sigma:.1f} of its error; the terms and the tracer groups show what it rests on."
        )
    return notes


def _selection_notes(result: VerticalResult, sample: VerticalSample) -> list[str]:
    counts = result.counts
    ignored = "; ".join(
        f"{row['name'].removeprefix('moments, ')}: {row['rho0']:.3f} ± {row['error']:.3f}, "
        f"χ² = {row['chi2']:.0f} for {row['dof']}"
        for row in result.estimators
        if row.get("check")
    )
    notes = [
        f"Velocities: {counts['radial velocity']} stars with radial velocity, "
        f"{counts['proper motion alone']} at low "
        f"latitude from proper motion alone, {counts['reweighted']} stood for by reweighting. Stars "
        f"without radial "
        "velocity move differently from their neighbours with one, so they may not just be left out."
        + _cold_note(sample),
        f"What the selection does ({ignored}): these two are not measurements.",
    ]
    if len(result.groups) > 1:
        each = ", ".join(f"{g['name']} {g['rho0']:.3f} ± {g['error']:.3f}" for g in result.groups)
        notes.append(f"Tracer groups alone (statistical errors): {each} Msun/pc³.")
    return notes


def _force_notes(result: VerticalResult) -> list[str]:
    by_name = {row["name"]: row for row in result.estimators}
    last = max(result.mean_density)
    mean, error = result.mean_density[last]
    column = 2000 * last * (mean - sum(value for value, _ in result.corrections.values()))
    bright, faint = by_name["moments, brighter half"], by_name["moments, fainter half"]
    north, south = by_name["moments, north"], by_name["moments, south"]
    notes = [
        f"|K_z|/2πG at {1000 * last:.0f} pc is {column:.1f} ± {2000 * last * error:.1f} Msun/pc² "
        f"(statistical). "
        "Published |K_z| at 1.1 kpc (Bovy & Rix 2013, 68 ± 4 at the Sun) lies beyond the sample: it must "
        "be larger, and is no test.",
        f"North and south of the plane alone: {north['rho0']:.3f} ± {north['error']:.3f} and "
        f"{south['rho0']:.3f} ± "
        f"{south['error']:.3f}; the brighter and the fainter half of the tracers: {bright['rho0']:.3f} ± "
        f"{bright['error']:.3f} and {faint['rho0']:.3f} ± {faint['error']:.3f}.",
    ]
    if "distribution function" in by_name:
        other = by_name["distribution function"]
        notes.append(
            f"The distribution function gives {other['rho0']:.3f} ± {other['error']:.3f} (within its "
            f"model) and "
            f"{other['mean_100pc']:.4f} ± {other['mean_100pc_error']:.4f} for the mean within 100 pc."
        )
    return notes


def _asymmetry(sample: VerticalSample, velocity: VelocityEstimate, sun: float) -> tuple[float, float] | None:
    """Logarithm of σ_W² south over north at 0.1 to 0.3 kpc from the plane, and its error."""
    z = sample.height + sun
    fine = (velocity.weight > 0) & (np.abs(velocity.value) < 70) & (np.abs(z) > 0.1) & (np.abs(z) < 0.3)
    square, weight = velocity.value**2 - velocity.variance, velocity.weight
    side = []
    for own in (fine & (z < 0), fine & (z > 0)):
        if own.sum() < 500:
            return None
        mean = np.average(square[own], weights=weight[own])
        error = np.sqrt((weight[own] ** 2 * (square[own] - mean) ** 2).sum()) / weight[own].sum()
        side.append((mean, error))
    (south, south_error), (north, north_error) = side
    return float(np.log(south / north)), float(np.hypot(south_error / south, north_error / north))


def _cold_note(sample: VerticalSample) -> str:
    """σ_W² of low-latitude stars with and without radial velocity, from proper motion for both."""
    low = np.abs(sample.latitude) < np.radians(6.0)
    w = (sample.v_b / np.cos(sample.latitude))[low]
    if len(w) < 200:
        return ""
    w = w - np.median(w)
    near, known = np.abs(w) < 60, sample.has_rv[low]
    if min((near & known).sum(), (near & ~known).sum()) < 100:
        return ""
    with_rv, without = np.mean(w[near & known] ** 2), np.mean(w[near & ~known] ** 2)
    values = f"{with_rv:.0f} with and {without:.0f} (km/s)² without"
    return f" At |b| < 6°, from proper motion for both, σ_W² = {values}."
