"""Three inversions of one vertical equation side by side: moments, a flow and a score of local stars.

All three see the same stars with the same weights (areas, missing radial velocities). Errors are of a
bootstrap over cells within their tracer groups, each replica trained with a seed of its own; replicas are the
same for the three, so that their differences have errors of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from galray.gravity.vertical_moments import FOUR_PI_G, MomentSums, layer_basis, solve_moments
from galray.gravity.vertical_networks import (
    VerticalStars,
    density_from_force,
    fit_vertical_flow,
    fit_vertical_score,
)
from galray.gravity.vertical_settings import VerticalSettings
from galray.gravity.vertical_terms import VerticalSolver
from galray.units import MSUN_PC3, G

__all__ = ["METHODS", "VerticalComparison", "VerticalInversions", "compare"]

Array = NDArray[np.float64]

METHODS = ("moments", "flow", "score")
KNOTS = np.linspace(-0.3, 0.3, 13)
"""Heights in kpc at which each inversion gives a_z."""
HEIGHTS = np.array([0.1, 0.2, 0.3])
"""Heights in kpc at which they are compared."""


@dataclass(frozen=True)
class VerticalInversions:
    """The stars prepared for all three inversions: small enough to be sent to workers.

    Arguments:
        sums: Of the moments, block by block.
        stars: Weighted draws from f(z, v_z).
        settings: Of the moments and the networks.
        seed: Root of the bootstraps and of the training.
    """

    sums: MomentSums
    stars: VerticalStars
    settings: VerticalSettings
    seed: int

    @classmethod
    def of(cls, solver: VerticalSolver, seed: int) -> VerticalInversions:
        """From the solver of a sample, its Sun and pilot found."""
        settings = solver.settings
        stars = VerticalStars.from_sample(
            solver.sample,
            solver.velocity,
            sun_height=solver.sun,
            limit=settings.height_limit_kpc,
            area_floor=settings.area_floor,
        )
        return cls(solver.sums(), stars, settings, seed)

    def replica(self, number: int) -> dict[str, list[float]]:
        """a_z at `KNOTS` by each method on one bootstrap of the cells; number 0 is the sample itself."""
        sums, stars = self.sums, self.stars
        training = np.random.SeedSequence([self.seed, number])
        if number:
            present = np.unique(np.stack([sums.block_cell, sums.block_group], 1), axis=0)
            cells = _drawn(present[:, 0], present[:, 1], np.random.default_rng(training.spawn(1)[0]))
            rows = np.concatenate([np.flatnonzero(sums.block_cell == cell) for cell in cells])
            names = ("source", "response", "noise", "block_cell", "block_group", "stars")
            sums = replace(sums, **{name: getattr(sums, name)[rows] for name in names})
            stars = stars.resampled(cells)
        basis = layer_basis(sums.edges, self.settings.layer_heights_kpc)
        own = int(training.generate_state(1)[0])
        forces = {
            "moments": -FOUR_PI_G * basis.column(KNOTS) @ solve_moments(sums, basis).theta,
            "flow": fit_vertical_flow(stars, self.settings.networks, seed=own).acceleration(KNOTS),
            "score": fit_vertical_score(stars, self.settings.networks, seed=own).acceleration(KNOTS, stars),
        }
        return {method: force.tolist() for method, force in forces.items()}


def _drawn(
    cells: NDArray[np.int64], groups: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """As many cells of each tracer group as it has, with replacement."""
    own = [cells[groups == group] for group in np.unique(groups)]
    return np.concatenate([rng.choice(one, len(one)) for one in own])


@dataclass(frozen=True)
class VerticalComparison:
    """What the three inversions give, and how far they agree.

    Attributes:
        z: Heights of the accelerations, kpc, (k,).
        a_z: By method, (km/s)²/kpc, with standard errors: (value (k,), error (k,)).
        rho0: By method: total density in the plane and its error over cells and seeds, Msun/pc³.
        heights: Heights at which K_z is compared, kpc, (h,).
        surface: By method: |K_z|/2πG at `heights`, north and south averaged, Msun/pc², and its error.
        north_south: By network: probability of a larger asymmetry of a_z between north and south.
        agreement: For each pair of methods: ``t2`` of the difference of K_z at `heights`, the ``p_value``
            (NaN with too few replicas), and ``relative``, the rms difference over the moments' K_z.
        replicas: Bootstraps behind the errors.
    """

    z: Array
    a_z: dict[str, tuple[Array, Array]]
    rho0: dict[str, tuple[float, float]]
    heights: Array
    surface: dict[str, tuple[Array, Array]]
    north_south: dict[str, float]
    agreement: dict[str, dict[str, float]]
    replicas: int

    def sentence(self) -> str:
        """One sentence for the report."""
        densities = ", ".join(f"{m} {value:.3f} ± {error:.3f}" for m, (value, error) in self.rho0.items())
        worst = min(self.agreement, key=lambda pair: self.agreement[pair]["p_value"])
        largest = max(a["relative"] for a in self.agreement.values())
        chance = self.agreement[worst]["p_value"]
        level = "agree" if chance > 0.01 / len(self.agreement) else "do not agree"
        return (
            f"Three inversions of the same stars: the density in the plane is {densities} Msun/pc³ (errors "
            f"over {self.replicas} bootstraps of the cells). Their K_z at 100, 200 and 300 pc {level}: the "
            f"least likely pair is {worst} with p = {chance:.2g}, and the largest rms difference is "
            f"{100 * largest:.0f} %."
        )


def compare(
    replicas: Sequence[Mapping[str, Any]], settings: VerticalSettings, shift: float
) -> VerticalComparison:
    """Densities, forces and agreement from the sample's own forces and those of its bootstraps.

    Arguments:
        replicas: From `VerticalInversions.replica`, number 0 first; at least three.
        settings: Of the vertical inversion: the layers that turn forces into a density.
        shift: What the radial and the tilt term add to the density in the plane, Msun/pc³.
    """
    bins = round(settings.height_limit_kpc / settings.bin_kpc)
    basis = layer_basis(np.linspace(0.0, settings.height_limit_kpc, bins + 1), settings.layer_heights_kpc)
    away = np.abs(KNOTS) > 0.01  # the moments' force is odd, and without error in the plane
    a_z, rho0, surface, halves, north_south = {}, {}, {}, {}, {}
    for method in METHODS:
        forces = np.array([replica[method] for replica in replicas])
        error = forces[1:].std(0, ddof=1)
        fits = [density_from_force(KNOTS[away], force[away], error[away], basis)[0] for force in forces]
        central = np.array([basis.centre @ theta for theta in fits]) + shift
        odd = np.array(
            [[np.interp([-z, z], KNOTS, force) @ [0.5, -0.5] for z in HEIGHTS] for force in forces]
        )
        halves[method] = odd / (2 * np.pi * G * MSUN_PC3) * 1e3  # 1 kpc = 1e3 pc
        a_z[method] = (forces[0], error)
        rho0[method] = (float(central[0]), float(central[1:].std(ddof=1)))
        surface[method] = (halves[method][0], halves[method][1:].std(0, ddof=1))
        if method != "moments":  # which are odd by construction
            sums = (forces + forces[:, ::-1])[:, len(KNOTS) // 2 + 2 :: 2]
            north_south[method] = _hotelling(sums[0], sums[1:])[1]
    agreement = {}
    for i, first in enumerate(METHODS):
        for second in METHODS[i + 1 :]:
            difference = halves[first] - halves[second]
            t2, chance = _hotelling(difference[0], difference[1:])
            relative = float(np.sqrt(np.mean((difference[0] / halves["moments"][0]) ** 2)))
            agreement[f"{first} and {second}"] = {"t2": t2, "p_value": chance, "relative": relative}
    return VerticalComparison(KNOTS, a_z, rho0, HEIGHTS, surface, north_south, agreement, len(replicas) - 1)


def _hotelling(value: Array, replicas: Array) -> tuple[float, float]:
    """T² of a vector whose covariance is estimated from a few replicas, and the chance of a larger one."""
    count, size = replicas.shape
    if count <= size:
        return math.nan, math.nan
    t2 = float(value @ np.linalg.solve(np.cov(replicas, rowvar=False), value))
    return t2, float(stats.f.sf(t2 * (count - size) / (size * (count - 1)), size, count - size))
