"""A potential of Gaussian masses that cannot be negative, in the tide of what lies outside the ball.

    Φ(x) = −G Σ_k m_k erf(u_k)/d_k + Σ_lm t_lm H_lm(x),   d_k = |x − c_k|,  u_k = d_k/(√2 σ_k),  m_k ≥ 0,

with solid harmonics H_lm for the mass beyond the ball. Accelerations are linear in the masses and the tide,
so an estimating equation gives them by non-negative least squares: positive density everywhere, an exact
Laplacian, no optimiser's choices. The centres are a random part of the stars and the widths follow their
distances, so the resolution is where the stars are, and no symmetry and no centre is assumed. What depends on
the chance of the centres goes with the mean over several sets of them, each solved for on its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, optimize
from scipy.spatial import cKDTree
from torch import Tensor

from galray.errors import GalrayError
from galray.gravity.equations import Equations
from galray.gravity.exports import Exportable
from galray.gravity.region import Region, as_positions
from galray.gravity.roundness import departure, shells
from galray.gravity.settings import PotentialSettings
from galray.gravity.splines import Array
from galray.units import G

__all__ = ["MassField", "MassSet", "fit_masses", "mass_sets"]

_CHUNK = 2048  # positions whose distances to all centres are held at once
_NEIGHBOUR = 8  # the centre whose distance is the width's unit
_FOLDS = 5
_RIDGES = 10.0 ** np.arange(-8.0, -1.0)
_SMALL = 1e-2  # u below which the enclosed mass goes through its series


class MassField(Exportable):
    """Gaussian masses and a tide inside a ball.

    Arguments:
        region: The ball.
        centres: c_k in kpc, shape (K, 3).
        widths: σ_k in kpc, shape (K,).
        masses: m_k in Msun, shape (K,).
        tide: Harmonic polynomial of (x − centre)/radius in (km/s)²: its coefficients of the monomials of
            degree 1, 2, … up to some order, each degree complete, shape (T,).
        statistics: Ridge and counts, for the report.
    """

    def __init__(
        self,
        region: Region,
        centres: Any,
        widths: Any,
        masses: Any,
        tide: Any = (),
        *,
        statistics: dict[str, float] | None = None,
    ) -> None:
        def as_double(values: Any) -> Tensor:
            return torch.as_tensor(values, dtype=torch.float64)

        self.region = region
        self.centres, self.widths, self.masses = as_double(centres), as_double(widths), as_double(masses)
        self.tide = as_double(tide)
        self.statistics = dict(statistics or {})
        self._exponents = _exponents(len(self.tide))

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*), up to a constant."""

        def part(chunk: Tensor) -> Tensor:
            d = torch.cdist(chunk, self.centres)
            u = d / (math.sqrt(2) * self.widths)
            # erf(u)/u is even in u: near 0 its series, 2/√π (1 − u²/3)
            kernel = torch.where(
                u < 1e-4, 2 / math.sqrt(math.pi) * (1 - u**2 / 3), torch.erf(u) / u.clamp_min(1e-4)
            )
            return -G * (kernel / (math.sqrt(2) * self.widths)) @ self.masses + self._tide(chunk)

        return self._over(part, x, ())

    def acceleration(self, x: Any) -> Tensor:
        """a(x) = −∇Φ in (km/s)²/kpc, shape (*, 3)."""

        def part(chunk: Tensor) -> Tensor:
            pull = G * _pull(chunk, self.centres, self.widths) * self.masses
            tide = torch.stack([self._tide(chunk, axis) for axis in range(3)], -1)
            return pull @ self.centres - pull.sum(1, keepdim=True) * chunk - tide

        return self._over(part, x, (3,))

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) = ∇²Φ/4πG in Msun/kpc³, shape (*): never negative; the tide has none."""
        peak = self.masses / ((2 * math.pi) ** 1.5 * self.widths**3)

        def part(chunk: Tensor) -> Tensor:
            q = torch.cdist(chunk, self.centres) / self.widths
            return torch.exp(-q.square() / 2) @ peak

        return self._over(part, x, ())

    def _tide(self, x: Tensor, axis: int | None = None) -> Tensor:
        """The tide's potential at x (n, 3), or its derivative along an axis."""
        if not len(self.tide):
            return x.new_zeros(len(x))
        return torch.from_numpy(_monomials(x.numpy(), self.region, self._exponents, axis)) @ self.tide

    def _over(self, part: Callable[[Tensor], Tensor], x: Any, tail: tuple[int, ...]) -> Tensor:
        x = as_positions(x).detach()
        parts = [part(chunk) for chunk in x.reshape(-1, 3).split(_CHUNK)]
        return torch.cat(parts).reshape(*x.shape[:-1], *tail)


def fit_masses(equations: Equations, region: Region, settings: PotentialSettings, *, seed: int) -> MassField:
    """Non-negative masses, in a free tide, that solve an estimating equation: the mean over sets of centres.

    Minimises ½mᵀMm − Vᵀm, M and V the equation in the basis with M symmetrised, plus a ridge in units of
    M's diagonal whose strength predicts held-out fifths of the stars best, plus ½ `roundness` (mᵀMm) D with
    the departure D from spheres of `galray.gravity.roundness`, where mᵀMm and ρ̄ are those of D left out.

    Arguments:
        equations: What the stars say.
        region: The ball.
        settings: Number, widths and sets of the masses, tide and roundness.
        seed: Decides which stars are centres.

    Raises:
        GalrayError: Fewer stars than unknowns, or scores that determine no potential.
    """
    sets = mass_sets(equations, region, settings, seed=seed)
    fields = [one.field(settings.roundness) for one in sets]
    centres, widths, masses = (
        torch.cat([getattr(field, name) for field in fields]) for name in ("centres", "widths", "masses")
    )
    held = masses > 0  # most are not needed
    return MassField(
        region,
        centres[held],
        widths[held],
        masses[held] / len(sets),
        torch.stack([field.tide for field in fields]).mean(0),
        statistics={k: float(np.mean([f.statistics[k] for f in fields])) for k in fields[0].statistics},
    )


def mass_sets(
    equations: Equations, region: Region, settings: PotentialSettings, *, seed: int
) -> list[MassSet]:
    """The equation in the basis of each set of centres; arguments and errors as those of `fit_masses`."""
    _, first = np.unique(equations.star, return_index=True)
    number = settings.num_masses
    if len(first) < 2 * number:
        raise GalrayError(f"{len(first)} stars for {number} masses", "take more stars or fewer num_masses")
    draws = np.random.default_rng(seed)
    return [
        MassSet(equations, region, equations.x[draws.permutation(first)[:number]], settings)
        for _ in range(settings.mass_sets)
    ]


class MassSet:
    """An estimating equation in the basis of one set of centres, and its solutions.

    Arguments:
        equations: What the stars say.
        region: The ball.
        centres: Of the Gaussians, (K, 3).
        settings: Their widths in units of the distance to the eighth nearest other centre, and the tide.
    """

    def __init__(
        self, equations: Equations, region: Region, centres: Array, settings: PotentialSettings
    ) -> None:
        self.number = len(centres)
        distance = cKDTree(centres).query(centres, k=min(_NEIGHBOUR, self.number - 1) + 1)[0][:, -1]
        self._region, self._centres = region, centres
        self._basis = _Basis(region, centres, settings.mass_width * distance, settings.tide_order)
        self._shells = shells(equations.x)
        matrix, vector = self._folds(equations)
        diagonal = np.diagonal(matrix.sum(0))
        if not diagonal.min() > 0:
            raise GalrayError(
                "the scores do not determine a potential: E[z·sᵥ] has the wrong sign",
                "the score is far from ∇log f: train it longer, or check that it belongs to these stars",
            )
        self._scale = 1 / np.sqrt(diagonal)
        matrix, vector = matrix * np.outer(self._scale, self._scale), vector * self._scale
        self._matrix, self._vector = matrix.sum(0), vector.sum(0)
        held_out = np.zeros(len(_RIDGES))
        for m, g in zip(matrix, vector, strict=True):
            for i, solution in enumerate(
                _non_negative(self._matrix - m, self._vector - g, _RIDGES, self.number)
            ):
                held_out[i] += solution @ m @ solution / 2 - g @ solution
        self.ridge = float(_RIDGES[int(np.argmin(held_out))])
        (self._free,) = _non_negative(self._matrix, self._vector, np.array([self.ridge]), self.number)

    def solution(self, roundness: float) -> Array:
        """Gm of the masses and the tide's harmonics under a prior of a round mass, (K + T,)."""
        if roundness == 0:
            return self._scale * self._free
        matrix = self._matrix + roundness * self._prior
        (found,) = _non_negative(matrix, self._vector, np.array([self.ridge]), self.number)
        return self._scale * found

    @cached_property
    def _prior(self) -> Array:
        """(mᵀMm) D as a quadratic form, that of masses and harmonics in the solver's scale."""
        n = self.number
        scale, masses = self._scale[:n], self._scale[:n] * self._free[:n]
        prior = np.zeros_like(self._matrix)
        prior[:n, :n] = departure(self._shells, self._centres, self._basis.widths, masses)
        prior[:n, :n] *= np.outer(scale, scale) * (self._free @ self._matrix @ self._free)
        return prior

    def field(self, roundness: float) -> MassField:
        """The potential under a prior of a round mass."""
        solution, number = self.solution(roundness), self.number
        return MassField(
            self._region,
            self._centres,
            self._basis.widths,
            solution[:number] / G,
            self._basis.harmonics @ solution[number:],
            statistics={
                "ridge": self.ridge,
                "masses": float(number),
                "positive": float((solution[:number] > 0).sum()),
            },
        )

    def missed(self, equations: Equations, roundness: Sequence[float]) -> Array:
        """½mᵀMm − Vᵀm of other stars' equation at the solutions of these: smallest at the true gravity."""
        matrix, vector = (part.sum(0) for part in self._folds(equations))
        solutions = [self.solution(one) for one in roundness]
        return np.array([s @ matrix @ s / 2 - vector @ s for s in solutions])

    def _folds(self, equations: Equations) -> tuple[Array, Array]:
        """M (5, K + T, K + T) and V (5, K + T) of each fifth of the stars."""
        matrix = np.zeros((_FOLDS, self._basis.size, self._basis.size))
        vector = np.zeros((_FOLDS, self._basis.size))
        fold = equations.star % _FOLDS
        for k in range(_FOLDS):
            mine = np.flatnonzero(fold == k)
            for rows in np.array_split(mine, len(mine) // _CHUNK + 1):
                along = equations.z[rows] * equations.weight[rows, None]
                left = self._basis.along(equations.x[rows], along)
                matrix[k] -= left.T @ self._basis.along(equations.x[rows], equations.slope[rows])
                vector[k] += left.T @ equations.streaming[rows]
        return (matrix + matrix.transpose(0, 2, 1)) / 2, vector


def _non_negative(matrix: Array, vector: Array, ridges: Array, number: int) -> list[Array]:
    """Minimise ½mᵀ(M + ridge)m − Vᵀm with the first `number` unknowns not negative and the others free."""
    values, vectors = linalg.eigh(matrix)
    found = []
    for ridge in ridges:
        # a symmetrised sample may have directions below zero: they carry no information
        root = np.sqrt(np.clip(values, 0, None) + ridge)
        design, target = root[:, None] * vectors.T, (vectors.T @ vector) / root
        # the free unknowns are projected out, and put back for the masses found
        q, r = linalg.qr(design[:, number:], mode="economic")
        inner = design[:, :number] - q @ (q.T @ design[:, :number])
        masses = optimize.nnls(inner, target - q @ (q.T @ target), maxiter=30 * number)[0]
        free = linalg.solve_triangular(r, q.T @ (target - design[:, :number] @ masses))
        found.append(np.concatenate([masses, free]))
    return found


class _Basis:
    """Accelerations of unit Gm and of unit solid harmonics."""

    def __init__(self, region: Region, centres: Array, widths: Array, tide_order: int) -> None:
        self.region, self.widths = region, widths
        self._centres, self._widths = torch.from_numpy(centres), torch.from_numpy(widths)
        self.harmonics = _solid_harmonics(tide_order)
        self._exponents = _exponents(len(self.harmonics))
        self.size = len(centres) + self.harmonics.shape[1]

    def along(self, x: Array, vector: Array) -> Array:
        """Give vector·a of every element at x (n, 3), shape (n, size)."""
        place, direction = torch.from_numpy(x), torch.from_numpy(vector)
        pull = _pull(place, self._centres, self._widths)
        masses = pull * (direction @ self._centres.T - (place * direction).sum(1, keepdim=True))
        slopes = [_monomials(x, self.region, self._exponents, axis) for axis in range(3)]
        tide = -sum(vector[:, [axis]] * slope for axis, slope in enumerate(slopes)) @ self.harmonics
        return np.hstack([masses.numpy(), tide])


def _pull(x: Tensor, centres: Tensor, widths: Tensor) -> Tensor:
    """M(<d)/d³ of unit Gaussians, shape (n, K): the acceleration is −G times this times x − c."""
    square = torch.cdist(x, centres).square()
    u2 = square / (2 * widths**2)
    u = u2.sqrt()
    enclosed = torch.erf(u) - 2 / math.sqrt(math.pi) * u * torch.exp(-u2)
    series = 4 / (3 * math.sqrt(math.pi)) * (2 * widths**2) ** -1.5 * (1 - 0.6 * u2)
    return torch.where(u < _SMALL, series, enclosed / square.clamp_min(1e-300) ** 1.5)


def _degree(degree: int) -> list[tuple[int, ...]]:
    return [e for e in itertools.product(range(degree + 1), repeat=3) if sum(e) == degree]


def _exponents(number: int) -> NDArray[np.int64]:
    """Exponents of the first `number` monomials of degree 1, 2, …, shape (number, 3)."""
    rows: list[tuple[int, ...]] = []
    for degree in itertools.count(1):
        if len(rows) >= number:
            break
        rows += _degree(degree)
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _solid_harmonics(order: int) -> Array:
    """Polynomials of degree 1 to `order` without a Laplacian, shape (monomials, harmonics)."""
    blocks = []
    for degree in range(1, order + 1):
        own = _degree(degree)
        below = {e: i for i, e in enumerate(_degree(degree - 2))} if degree > 1 else {}
        laplacian = np.zeros((max(len(below), 1), len(own)))
        for column, exponents in enumerate(own):
            for axis in range(3):
                lowered = tuple(e - 2 * (axis == i) for i, e in enumerate(exponents))
                if lowered in below:
                    laplacian[below[lowered], column] += exponents[axis] * (exponents[axis] - 1)
        blocks.append(linalg.null_space(laplacian))
    return linalg.block_diag(*blocks) if blocks else np.zeros((0, 0))


def _monomials(x: Array, region: Region, exponents: NDArray[np.int64], axis: int | None) -> Array:
    """The monomials of t = (x − centre)/radius at x (n, 3), or their derivatives along x_axis, (n, T)."""
    t = (x - np.array(region.center)) / region.radius
    if axis is None:
        return np.prod(t[:, None, :] ** exponents, axis=-1)
    lowered = exponents.copy()
    lowered[:, axis] = np.maximum(exponents[:, axis] - 1, 0)
    return np.prod(t[:, None, :] ** lowered, axis=-1) * exponents[:, axis] / region.radius
