"""Gravity from weak-form moments of the stars: additive sums, one linear solve, no network.

For any smooth g(x, v) that vanishes at the border of the ball, a stationary f obeys

    E_stars[ v·∂ₓg + a(x)·∂ᵥg ] = 0.

With g = (a function of velocity) × h_k(x) and Φ = Σ_p θ_p B_p(x) this is linear in θ: the Jeans equation
in weak form, without a density estimate. h_k is a tensor B-spline times a window of |x − centre| that
falls to zero, with its first two derivatives, at the border. In the (R, z) basis the velocity functions
are R v_R = x v_x + y v_y, R v_φ and v_z: their free-flight derivatives, v_R² + v_φ², 0 and 0, carry the
metric terms and stay smooth on the axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galray.errors import GalrayError
from galray.gravity.jets import StarErrors
from galray.gravity.region import Region, as_region
from galray.gravity.settings import MomentsSettings
from galray.gravity.solve import LinearSystem, Solution, solve
from galray.gravity.spline_field import SplineField
from galray.gravity.splines import Array, TensorBasis, ball_axes, cell_groups, to_numpy

if TYPE_CHECKING:
    from galray.gravity.noisy_moments import NoisySums

__all__ = ["MomentSums", "Moments"]

# Each velocity function u(v): which accelerations its ∂ᵥu involves. Filled in by _velocity_functions.
_Terms = tuple[Array, Array | None, dict[int, Array]]


@dataclass
class MomentSums:
    """Sums over a block of stars; add blocks with ``+``.

    Attributes:
        matrix: Σ w (∂ᵥg_k · ∇B_p), shape (moments, splines).
        vector: Σ w (v·∂ₓg_k), shape (moments,).
        scatter: Σ w² ψ ψᵀ of the residual moments ψ under a pilot potential, (moments, moments): the
            covariance of ``vector − matrix @ θ``.
        counts: Stars under each test function, shape (moments,).
        num_stars: Stars inside the ball.
        num_outside: Stars given that lie outside it.
        key: Identifies the settings and the ball; only equal keys add.
    """

    matrix: Array
    vector: Array
    scatter: Array
    counts: Array
    num_stars: int
    num_outside: int
    key: str

    def __add__(self, other: MomentSums) -> MomentSums:
        if self.key != other.key:
            raise GalrayError(
                "sums of moments with different settings or balls cannot be added",
                "make both with one Moments",
            )
        return MomentSums(
            self.matrix + other.matrix,
            self.vector + other.vector,
            self.scatter + other.scatter,
            self.counts + other.counts,
            self.num_stars + other.num_stars,
            self.num_outside + other.num_outside,
            self.key,
        )

    def __radd__(self, other: Any) -> MomentSums:
        return self if isinstance(other, int) and other == 0 else NotImplemented


class Moments:
    """The weak-form estimator on one ball.

    Arguments:
        settings: Bases, velocity functions and penalty.
        ball: Any object with ``center`` and ``radius`` in kpc.
    """

    def __init__(self, settings: MomentsSettings, ball: Any) -> None:
        self.settings = settings
        self.region: Region = as_region(ball)
        center, radius = self.region.center, self.region.radius
        axes = [
            ball_axes(settings.basis, center, radius, sizes, settings.concentrations)
            for sizes in (settings.potential_splines, settings.test_splines)
        ]
        self.basis = TensorBasis(settings.basis, axes[0])
        self.tests = TensorBasis(settings.basis, axes[1])
        self.functions = settings.functions
        self.num_moments = len(self.functions) * self.tests.size
        self.key = f"{settings.model_dump_json()} {self.region}"

    # -- sums ------------------------------------------------------------------------------------------

    def sums(
        self, w: Any, weights: Any = None, pilot: Any = None, errors: StarErrors | None = None
    ) -> MomentSums:
        """Sum one block of stars.

        Arguments:
            w: States (n, 6) in kpc and km/s; stars outside the ball are counted and left out.
            weights: One factor per star (n,): bootstrap counts, or 1/ε of a known selection.
            pilot: Spline coefficients, or a field with ``parameters``, under which `scatter` is summed.
                None solves a pilot from this block alone, which serves as well for the weighting.
            errors: The stars' errors, where ``settings.noise`` is "deconvolve": every term g of the sums then
                becomes g − ½ C:∇∇g, whose mean is that of g over the stars before their errors.

        Raises:
            GalrayError: Wrong shapes, values that are not finite, no star in the ball, or errors missing.
        """
        stars, mass, outside = self._inside(w, weights)
        noisy = self._noisy(w, stars, mass, errors)
        matrix, vector, counts, power = noisy.first_pass() if noisy else self._first_pass(stars, mass)
        if pilot is None:
            theta = self._own_pilot(matrix, vector, power, counts)
        else:
            theta = to_numpy(getattr(pilot, "parameters", pilot))
        scatter = noisy.second_pass(theta) if noisy else self._second_pass(stars, mass, theta)
        return MomentSums(matrix, vector, scatter, counts, len(stars), outside, self.key)

    def fit(
        self, w: Any, weights: Any = None, *, num_blocks: int = 10, errors: StarErrors | None = None
    ) -> tuple[SplineField, list[MomentSums]]:
        """Two passes over stars in memory: a pilot, then the weighted solution.

        Arguments:
            w: States (n, 6).
            weights: One factor per star, or None.
            num_blocks: Blocks for cross-validation and the jackknife; star i goes to block i mod blocks,
                so that the sky is shared out evenly when the rows are in random order.
            errors: As in `sums`.

        Returns:
            The field, and the blocks' sums.
        """
        w = to_numpy(w)
        weights = np.ones(len(w)) if weights is None else to_numpy(weights)
        parts = [slice(i, None, num_blocks) for i in range(num_blocks)]
        known = [errors[part] if errors is not None else None for part in parts]
        first = [self.sums(w[p], weights[p], errors=e) for p, e in zip(parts, known, strict=True)]
        pilot = self.solve(first).parameters
        blocks = []
        for block, part, error in zip(first, parts, known, strict=True):
            stars, mass, _ = self._inside(w[part], weights[part])
            noisy = self._noisy(w[part], stars, mass, error)
            scatter = noisy.second_pass(pilot) if noisy else self._second_pass(stars, mass, pilot)
            blocks.append(replace(block, scatter=scatter))
        return self.solve(blocks), blocks

    def _inside(self, w: Any, weights: Any) -> tuple[Array, Array, int]:
        w = to_numpy(w)
        if w.ndim != 2 or w.shape[1] != 6:
            raise GalrayError(f"states of shape {w.shape}", "give (x, y, z, vx, vy, vz), shape (n, 6)")
        mass = np.ones(len(w)) if weights is None else to_numpy(weights)
        if mass.shape != (len(w),):
            raise GalrayError(f"weights of shape {mass.shape} for {len(w)} stars", "give one weight per star")
        if not (np.isfinite(w).all() and np.isfinite(mass).all()):
            bad = int(np.flatnonzero(~(np.isfinite(w).all(1) & np.isfinite(mass)))[0])
            raise GalrayError(f"star {bad} has a state or weight that is not finite", "remove such rows")
        offset = w[:, :3] - np.array(self.region.center)
        inside = (offset**2).sum(1) < self.region.radius**2
        if not inside.any():
            raise GalrayError(
                f"none of {len(w)} stars lies within {self.region.radius} kpc of {self.region.center}",
                "check the units and the frame of the states",
            )
        return w[inside], mass[inside], int((~inside).sum())

    def _noisy(self, w: Any, stars: Array, mass: Array, errors: StarErrors | None) -> NoisySums | None:
        """The passes that free the sums from the stars' errors, where the settings ask for them."""
        if self.settings.noise == "ignore":
            return None
        if errors is None or len(errors.covariance) != len(w):
            raise GalrayError(
                f"moments.noise = 'deconvolve' needs the error covariances of all {len(w)} stars",
                "give errors, or set moments.noise = 'ignore'",
            )
        from galray.gravity.noisy_moments import NoisySums

        offset = to_numpy(w)[:, :3] - np.array(self.region.center)
        factors = errors[(offset**2).sum(1) < self.region.radius**2].factors()
        return NoisySums(self, stars, mass, factors, errors.observer)

    def _groups(self, stars: Array) -> Iterator[tuple[int, int, NDArray[np.intp], Array]]:
        """Stars by pairs of (test cell, potential cell): (test cell, potential cell, rows, coordinates)."""
        t = self.basis.coordinates(stars[:, :3])
        num = int(np.prod(self.basis.cell_shape))
        joint = self.tests.locate(t) * num + self.basis.locate(t)
        for cell, rows in cell_groups(joint):
            yield cell // num, cell % num, rows, t[rows]

    def _tests_at(self, stars: Array, t: Array, cell: int) -> tuple[Array, Array]:
        """h_k and v·∇h_k of the tests on a cell, each (n, 4^d)."""
        values, slopes = self.tests.local_and_slopes(t, cell)
        offset = stars[:, :3] - np.array(self.region.center)
        window, slope = _window((offset**2).sum(1) / self.region.radius**2, self.settings.window)
        slope = slope * 2 * (offset * stars[:, 3:]).sum(1) / self.region.radius**2
        flow = sum(u[:, None] * d for u, d in zip(self._speeds(stars), slopes, strict=True))
        return window[:, None] * values, slope[:, None] * values + window[:, None] * flow

    def _speeds(self, stars: Array) -> list[Array]:
        """Velocities along the basis's own coordinates."""
        if self.basis.kind == "xyz":
            return [stars[:, 3], stars[:, 4], stars[:, 5]]
        radius = np.maximum(np.hypot(stars[:, 0], stars[:, 1]), 1e-12)
        return [(stars[:, 0] * stars[:, 3] + stars[:, 1] * stars[:, 4]) / radius, stars[:, 5]]

    def _first_pass(self, stars: Array, mass: Array) -> tuple[Array, Array, Array, Array]:
        num_tests, num = self.tests.size, len(self.functions)
        matrix = np.zeros((num, num_tests, self.basis.size))
        vector = np.zeros((num, num_tests))
        power = np.zeros((num, num_tests))  # the moments' scatter before gravity is known
        counts = np.zeros(num_tests)
        for test_cell, cell, rows, t in self._groups(stars):
            block, weight = stars[rows], mass[rows]
            h, flow = self._tests_at(block, t, test_cell)
            _, slopes = self.basis.local_and_slopes(t, cell)
            k, p = self.tests.indices(test_cell), self.basis.indices(cell)
            counts[k] += len(rows)
            for i, (value, free, pulls) in enumerate(self._velocity_functions(block)):
                psi = (weight * value)[:, None] * flow
                if free is not None:
                    psi += (weight * free)[:, None] * h
                vector[i, k] += psi.sum(0)
                power[i, k] += np.einsum("nk,nk->k", psi, psi)
                for j, pull in pulls.items():
                    matrix[i][np.ix_(k, p)] += ((weight * pull)[:, None] * h).T @ slopes[j]
        return (
            matrix.reshape(-1, self.basis.size),
            vector.reshape(-1),
            np.tile(counts, num),
            power.reshape(-1),
        )

    def _second_pass(self, stars: Array, mass: Array, theta: Array) -> Array:
        num_tests, num = self.tests.size, len(self.functions)
        scatter = np.zeros((self.num_moments, self.num_moments))
        for test_cell, cell, rows, t in self._groups(stars):
            block = stars[rows]
            h, flow = self._tests_at(block, t, test_cell)
            _, slopes = self.basis.local_and_slopes(t, cell)
            local = theta[self.basis.indices(cell)]
            psi = np.empty((len(rows), num, h.shape[1]))
            for i, (value, free, pulls) in enumerate(self._velocity_functions(block)):
                rate = np.zeros(len(rows)) if free is None else free.copy()
                for j, pull in pulls.items():
                    rate -= pull * (slopes[j] @ local)
                psi[:, i] = value[:, None] * flow + rate[:, None] * h
            flat = (mass[rows, None, None] * psi).reshape(len(rows), -1)
            k = (np.arange(num)[:, None] * num_tests + self.tests.indices(test_cell)).reshape(-1)
            scatter[np.ix_(k, k)] += flat.T @ flat
        return scatter

    def _velocity_functions(self, stars: Array) -> list[_Terms]:
        """For each velocity function u: its value, its free-flight derivative, and {j: ∂u/∂v_j}.

        j counts the coordinates of the basis, (R, z) or (x, y, z); the acceleration along them is −∂_jΦ.
        """
        one = np.ones(len(stars))
        x, y, vx, vy, vz = stars[:, 0], stars[:, 1], stars[:, 3], stars[:, 4], stars[:, 5]
        out: list[_Terms] = []
        if self.basis.kind == "xyz":
            for name in self.functions:
                table: dict[str, _Terms] = {
                    "1": (one, None, {}),
                    "v_x": (vx, None, {0: one}),
                    "v_y": (vy, None, {1: one}),
                    "v_z": (vz, None, {2: one}),
                    "v_z v_z": (vz**2, None, {2: 2 * vz}),
                }
                out.append(table[name])
            return out
        radius = np.hypot(x, y)
        radial = x * vx + y * vy  # R v_R
        square = vx**2 + vy**2  # d(R v_R)/dt in free flight
        for name in self.functions:
            table = {
                "1": (one, None, {}),
                "v_R": (radial, square, {0: radius}),
                "v_phi": (y * vx - x * vy, None, {}),
                "v_z": (vz, None, {1: one}),
                "v_z v_z": (vz**2, None, {1: 2 * vz}),
                "v_R v_z": (radial * vz, square * vz, {0: radius * vz, 1: radial}),
                "v_R v_R": (radial**2, 2 * radial * square, {0: 2 * radial * radius}),
            }
            out.append(table[name])
        return out

    # -- solution --------------------------------------------------------------------------------------

    def _system(self) -> LinearSystem:
        return LinearSystem(
            self.basis.reduction(north_south=self.settings.north_south), self.basis.roughness()
        )

    def _own_pilot(self, matrix: Array, vector: Array, power: Array, counts: Array) -> Array:
        """A rough θ for the weighting: moments scaled by their power, mild penalty."""
        usable = counts >= self.settings.min_stars
        if not usable.any():
            return np.zeros(self.basis.size)  # free flight weights well enough what says so little
        scatter = np.diag(np.maximum(power, 1e-12 * power.max()))
        return solve(self._system(), matrix, vector, scatter, usable, penalty=(1e-3,)).parameters

    def solve(self, sums: Sequence[MomentSums], *, penalty: Any = None) -> SplineField:
        """Solve the two-step GMM system.

        θ = argmin (b − Aθ)ᵀ Ω⁻¹ (b − Aθ) + Σ_d λ_d θᵀ P_d θ, with A, b, Ω the blocks' summed matrix, vector
        and scatter and P_d the third differences along coordinate d.

        Arguments:
            sums: One `MomentSums` per block.
            penalty: Overrides ``settings.penalty``: a number, a tuple with one per direction, or a rule.

        Raises:
            GalrayError: No block, blocks of other settings, or fewer usable moments than parameters.
        """
        total, usable = self._total(sums)
        rule = self.settings.penalty if penalty is None else penalty
        if rule == "cv" and len(sums) < 3:
            raise GalrayError(
                f"cross-validation of the penalty needs 3 blocks of stars, not {len(sums)}",
                "give more blocks or set moments.penalty = 'evidence'",
            )
        folds = [(block.matrix, block.vector) for block in sums] if rule == "cv" else None
        solution = solve(
            self._system(),
            total.matrix,
            total.vector,
            total.scatter,
            usable,
            penalty=rule if isinstance(rule, (str, tuple)) else (float(rule),),
            folds=folds,
            steps=self.settings.penalty_steps,
        )
        return self._field(solution, total.num_stars)

    def jackknife(self, sums: Sequence[MomentSums]) -> tuple[SplineField, Array]:
        """Leave out one block at a time, with the weights and penalty of the whole.

        Returns:
            The field of all blocks, whose ``covariance`` is replaced by the jackknife's,
            (n−1)/n Σ (θ_i − θ̄)(θ_i − θ̄)ᵀ, and the n leave-one-out coefficients (n, splines).

        Raises:
            GalrayError: Fewer than 3 blocks.
        """
        if len(sums) < 3:
            raise GalrayError(f"a jackknife over {len(sums)} blocks", "give at least 3 blocks of stars")
        total, usable = self._total(sums)
        field = self.solve(sums)
        replicas = np.array(
            [
                solve(
                    self._system(),
                    total.matrix - block.matrix,
                    total.vector - block.vector,
                    total.scatter * (1 - block.num_stars / total.num_stars),
                    usable,
                    penalty=field.penalty,
                ).parameters
                for block in sums
            ]
        )
        spread = replicas - replicas.mean(0)
        covariance = (len(sums) - 1) / len(sums) * spread.T @ spread
        return field.with_covariance(covariance), replicas

    def _total(self, sums: Sequence[MomentSums]) -> tuple[MomentSums, NDArray[np.bool_]]:
        if not sums:
            raise GalrayError("no sums to solve", "give at least one block of stars")
        total = sums[0]
        for block in sums[1:]:
            total = total + block
        if total.key != self.key:
            raise GalrayError(
                "these sums were made with other settings or another ball",
                "sum and solve with the same Moments",
            )
        usable = total.counts >= self.settings.min_stars
        if usable.sum() < self.basis.size // 2 or total.num_stars < self.basis.size:
            raise GalrayError(
                f"{total.num_stars} stars give {int(usable.sum())} usable moments for {self.basis.size} "
                "splines",
                "take more stars, fewer gravity.moments.num_potential_splines or a smaller "
                "gravity.moments.min_stars",
            )
        return total, usable

    def _field(self, solution: Solution, num_stars: int) -> SplineField:
        return SplineField(
            self.basis,
            self.region,
            solution.parameters,
            covariance=solution.covariance,
            posterior=solution.posterior,
            penalty=solution.penalty,
            statistics={
                "chi2": solution.chi2,
                "num_moments": float(solution.num_moments),
                "effective_dof": solution.effective_dof,
                "num_stars": float(num_stars),
            },
        )


def _window(s2: Array, flat: float) -> tuple[Array, Array]:
    """The window and its derivative by s² = |x − centre|²/radius²: 1 inside `flat`, 0 from 1 on."""
    inner = flat**2
    u = np.clip((1.0 - s2) / (1.0 - inner), 0.0, 1.0)
    return u**3 * (10 - 15 * u + 6 * u * u), -30 * u**2 * (1 - u) ** 2 / (1.0 - inner)
