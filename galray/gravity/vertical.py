"""The local vertical inversion: a_z(z) and the density in the plane from stars with a known selection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galray.gravity.vertical_distribution import DistributionFit, fit_distribution
from galray.gravity.vertical_moments import (
    FOUR_PI_G,
    MomentFit,
    layer_basis,
    solve_moments,
)
from galray.gravity.vertical_notes import mckee_2015, write_notes
from galray.gravity.vertical_selection import VerticalSample
from galray.gravity.vertical_settings import VerticalSettings
from galray.gravity.vertical_terms import (
    VerticalSolver,
    error_term,
    group_term,
    radial_term,
    tilt_term,
    variant_terms,
)
from galray.gravity.vertical_velocity import vertical_velocities
from galray.units import MSUN_PC3

if TYPE_CHECKING:
    from galray.gravity.vertical_comparison import VerticalComparison

__all__ = ["VerticalResult", "VerticalSample", "VerticalSettings", "mckee_2015", "measure"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class VerticalResult:
    """What the vertical inversion found. Densities in Msun/pc³ unless the name says otherwise.

    Attributes:
        z: (Z,) heights above the plane, kpc.
        a_z: (Z,) vertical acceleration of the one-dimensional model, (km/s)²/kpc; odd in z.
        a_z_covariance: (Z, Z).
        rho: (Z,) total density with the radial and tilt terms, Msun/kpc³.
        rho_error: (Z,) statistical, Msun/kpc³.
        rho0: Total density in the plane at the resolution of `kernel`, Msun/pc³.
        rho0_error: All terms in quadrature, Msun/pc³.
        rho0_statistical: Jackknife over the cells, Msun/pc³.
        terms: {term, error, count, what} of rho0.
        mean_density: {z in kpc: (mean density within |z| with the same corrections, its statistical error)}.
        corrections: {name: (value, error)} added to −∂_z a_z/4πG.
        kernel_z: (J,) centres of the kernel's bins, kpc.
        kernel: (J,) response of rho0 to the density at |z|, 1/kpc; its integral is 1.
        chi2: Of the moment equations.
        dof: Degrees of freedom.
        sun_height: Height of the Sun above the plane and its error, kpc.
        mean_velocity: Mean W with respect to the Sun, km/s.
        estimators: One {name, rho0, error, mean_100pc, mean_100pc_error, chi2, dof} for each way of solving;
            rows with "check" ignore part of the selection on purpose and are not measurements.
        groups: The same per tracer group.
        counts: Stars by where their velocity comes from, and cells used.
        notes: Sentences for the report.
        comparison: Moments, flow and score side by side; None where the settings ask for no bootstraps.
    """

    z: Array
    a_z: Array
    a_z_covariance: Array
    rho: Array
    rho_error: Array
    rho0: float
    rho0_error: float
    rho0_statistical: float
    terms: list[dict[str, Any]]
    mean_density: dict[float, tuple[float, float]]
    corrections: dict[str, tuple[float, float]]
    kernel_z: Array
    kernel: Array
    chi2: float
    dof: int
    sun_height: tuple[float, float]
    mean_velocity: float
    estimators: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    counts: dict[str, int]
    notes: list[str]
    comparison: VerticalComparison | None = None

    def expected(self, density: Callable[[Array], Array]) -> float:
        """What rho0 would be, on average, if the density were `density(z in kpc)` (same unit out as in)."""
        width = 2 * self.kernel_z[0]
        return float((self.kernel * np.asarray(density(self.kernel_z))).sum() * width)


def measure(
    sample: VerticalSample,
    settings: VerticalSettings | None = None,
    seed: int = 0,
    *,
    reference: Callable[[Array], Array] = mckee_2015,
    mapper: Callable[[Callable[[int], Any], Sequence[int]], Iterable[Any]] = map,
) -> VerticalResult:
    """Measure a_z(z) and the total density in the plane, and compare three inversions.

    a_z from the weak form of the vertical Boltzmann equation for all tracer groups at once; the density
    ρ = −(1/4πG) [∂_z a_z + (1/R) ∂_R(R a_R)], where the second bracket is −(1/R) d(v_c²)/dR =
    −2(B² − A²), plus the tilt term (1/nR) ∂_R(R n σ_Rz) of a_z.

    Arguments:
        sample: The stars with their selection.
        settings: The settings.
        seed: Of the bootstraps and the training of the comparison's networks.
        reference: Density profile (Msun/pc³ of z in kpc) that the notes compare with.
        mapper: Applies a function to the numbers of the comparison's replicas, on a cluster perhaps; what it
            is given can be pickled.

    Raises:
        GalrayError: The areas do not cover the heights, or too few stars.
    """
    settings = settings or VerticalSettings()
    solver = VerticalSolver(sample, settings)
    solver.prepare()
    sums = solver.sums()
    fit = solve_moments(sums, solver.basis())
    corrections = {"radial": radial_term(settings), "tilt": tilt_term(sample, solver, settings)}
    shift = sum(value for value, _ in corrections.values())
    central, statistical = fit.central

    estimators = [_row("moments", fit, shift)]
    for window in settings.check_windows:
        estimators.append(_row(f"moments, velocity window {window:g} km/s", solver.fit(window=window), shift))
    middle = sums.test_centre
    step = middle[1] - middle[0]
    for name, tests in (("north", middle > 0.5 * step), ("south", middle < -0.5 * step)):
        estimators.append(_row(f"moments, {name}", solve_moments(sums, solver.basis(), tests=tests), shift))
    estimators += _halves(solver, shift)
    distribution = _distribution(solver, settings)
    if distribution is not None:
        estimators.append(_row("distribution function", distribution, shift))
    ignoring = vertical_velocities(sample, 0.0, reweight=False)
    for name, changes in (
        ("moments, which stars have velocities ignored", {"velocity": ignoring}),
        ("moments, effective area ignored", {"use_area": False}),
    ):
        estimators.append({**_row(name, solver.fit(**changes), shift), "check": True})
    groups = []
    for index, name in enumerate(sample.group_names):
        if (sums.block_group == index).any():
            own = solve_moments(sums, solver.basis(), groups=[index])
            groups.append(
                {**_row(str(name), own, shift), "stars": int(sums.stars[sums.block_group == index].sum())}
            )

    terms = [error_term("statistics", statistical, len(np.unique(sums.block_cell)), "jackknife over cells")]
    terms += variant_terms(solver, sums, central)
    terms.append(group_term(groups, statistical))
    if distribution is not None:
        half = 0.5 * abs(distribution.central[0] - central)
        terms.append(error_term("method", half, 2, "half the difference from the distribution function"))
    for name, (_, error) in corrections.items():
        terms.append(error_term(name, error, 1, f"{name} term of the Poisson or Jeans equation"))
    total = float(np.sqrt(sum(term["error"] ** 2 for term in terms)))

    z = np.linspace(0.01, min(0.3, settings.height_limit_kpc), 30)
    force = -FOUR_PI_G * fit.basis.column(z)
    rows = fit.basis.density(z)
    rho_error = np.sqrt(np.maximum(np.einsum("zp,pq,zq->z", rows, fit.jackknife, rows), 0))
    means = {q: fit.mean_within(q) for q in (0.06, 0.1, 0.2, 0.3) if q < settings.height_limit_kpc}
    result = VerticalResult(
        z=z,
        a_z=force @ fit.theta,
        a_z_covariance=force @ fit.jackknife @ force.T,
        rho=(rows @ fit.theta + shift) * MSUN_PC3,
        rho_error=rho_error * MSUN_PC3,
        rho0=central + shift,
        rho0_error=total,
        rho0_statistical=statistical,
        terms=terms,
        mean_density={q: (value + shift, error) for q, (value, error) in means.items()},
        corrections=corrections,
        kernel_z=0.5 * (solver.edges[1:] + solver.edges[:-1]),
        kernel=(fit.basis.centre @ fit.kernel) / np.diff(solver.edges),
        chi2=fit.chi2,
        dof=fit.dof,
        sun_height=(solver.sun, solver.sun_error),
        mean_velocity=solver.velocity.mean_motion[2],
        estimators=estimators,
        groups=groups,
        counts={"stars": len(sample), **solver.velocity.counts, "cells": len(np.unique(sums.block_cell))},
        notes=[],
    )
    if settings.bootstraps:
        from galray.gravity.vertical_comparison import VerticalInversions, compare

        replica = VerticalInversions.of(solver, seed).replica
        result = replace(
            result, comparison=compare(list(mapper(replica, range(settings.bootstraps + 1))), settings, shift)
        )
    return replace(result, notes=write_notes(result, sample, solver.velocity, reference))


def _row(name: str, fit: MomentFit | DistributionFit, shift: float) -> dict[str, Any]:
    value, error = fit.central
    mean, mean_error = fit.mean_within(0.1)
    chi2 = {"chi2": fit.chi2, "dof": fit.dof} if isinstance(fit, MomentFit) else {}
    row = {"name": name, "rho0": value + shift, "error": error, "mean_100pc": mean + shift}
    return {**row, "mean_100pc_error": mean_error, **chi2}


def _halves(solver: VerticalSolver, shift: float) -> list[dict[str, Any]]:
    """The brighter and the fainter half of every tracer group, as two populations in one potential."""
    sample, magnitude = solver.sample, solver.sample.absolute_magnitude
    middle = np.zeros(len(sample))
    for group in np.unique(sample.group):
        own = sample.group == group
        middle[own] = np.median(magnitude[own])
    rows = []
    for name, mask in (("brighter", magnitude < middle), ("fainter", magnitude >= middle)):
        part = sample.select(mask)
        rows.append(
            _row(f"moments, {name} half", solver.fit(sample=part, velocity=solver.velocities(part)), shift)
        )
    return rows


def _distribution(solver: VerticalSolver, settings: VerticalSettings) -> DistributionFit | None:
    if not settings.distribution_components:
        return None
    reach = settings.distribution_range_kpc + 0.06
    edges = np.linspace(0, reach, round(reach / settings.bin_kpc) + 1)
    return fit_distribution(
        solver.sample,
        solver.velocity,
        layer_basis(edges, settings.layer_heights_kpc),
        components=settings.distribution_components,
        range_kpc=settings.distribution_range_kpc,
        sun_height=solver.sun,
    )
