"""Gravity from weak-form moments of the stars: additive sums, one linear solve, no network.

For any smooth g(x, v) that vanishes at the border of the ball, a stationary f obeys

    E_stars[ v·∂ₓg + a(x)·∂ᵥg ] = 0.

With g = (a function of velocity) × h_k(x) and Φ = Σ_p θ_p B_p(x) this is linear in θ: the Jeans equation
in weak form, without a density estimate. h_k is a tensor B-spline times a window of |x − centre| that
falls to zero, with its first two derivatives, at the border. A selection efficiency ε(x) adds the term
E[g v·∂ₓlog ε], linear in log ε; a frame that turns with Ω about the Galactic centre adds −Ω E[∂g/∂φ]. Several
tracer populations have equations of their own in the same unknowns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from galray.errors import GalrayError
from galray.gravity.jets import StarErrors
from galray.gravity.moment_rotation import PatternSpeed, pattern_speed
from galray.gravity.moment_selection import Degeneracy, LogSelection, degeneracies
from galray.gravity.moment_sums import MomentSums, add_up
from galray.gravity.moment_system import MomentSystem
from galray.gravity.penalised import Equations, Solution, Whitener, solve
from galray.gravity.positivity import nonnegative
from galray.gravity.spline_field import SplineField
from galray.gravity.splines import Array, to_numpy
from galray.gravity.weak_form import KnownSelection, patch_directions

if TYPE_CHECKING:
    from galray.gravity.noisy_moments import NoisySums

__all__ = ["MomentResult", "MomentSums", "Moments", "Populations"]

Populations = Sequence[MomentSums] | Mapping[str, Sequence[MomentSums]]
"""Blocks of sums of one tracer population, or of several by name."""

_HELD_OUT = ("cv", "cv_1se")  # rules that judge a penalty by blocks left out
_CV_FOLDS = 5
_PILOT_PENALTY = 1e-3
_SECOND_PILOT_PENALTY = 0.1


@dataclass(frozen=True)
class MomentResult:
    """Everything that one solution of the moment equations says.

    Attributes:
        potential: Φ with its errors.
        selections: log ε of each population, or of all under the name ``shared``; empty where it is known.
        pattern_speed: Ω, where it was asked for.
        degeneracies: Directions in which Φ and log ε can hardly be told apart, the worst first.
        solution: The linear solution behind it, before any constraint.
    """

    potential: SplineField
    selections: dict[str, LogSelection] = field(default_factory=dict)
    pattern_speed: PatternSpeed | None = None
    degeneracies: tuple[Degeneracy, ...] = ()
    solution: Solution | None = None

    def notes(self) -> list[str]:
        """Sentences for the user: how well the moments fit, Ω, and what cannot be told apart."""
        numbers = self.potential.statistics
        freedom = numbers["num_moments"] - numbers["effective_dof"]
        lines = [
            f"{numbers['num_stars']:,.0f} stars, chi2 = {numbers['chi2']:.0f} for {freedom:.0f} degrees of "
            "freedom"
        ]
        if "bound_nodes" in numbers:
            lines.append(f"the solution is held at its bounds at {numbers['bound_nodes']:.0f} nodes")
        if self.pattern_speed is not None:
            lines.append(str(self.pattern_speed))
        if self.degeneracies:
            lines.append(str(self.degeneracies[0]))
        return lines


class Moments(MomentSystem):
    """The weak-form estimator on one ball.

    Arguments:
        settings: Bases, velocity functions and penalty.
        ball: Any object with ``center`` and ``radius`` in kpc.
    """

    # -- sums ------------------------------------------------------------------------------------------

    def sums(
        self,
        w: Any,
        weights: Any = None,
        pilot: Any = None,
        *,
        selection: KnownSelection | None = None,
        errors: StarErrors | None = None,
        scatter: bool = True,
    ) -> MomentSums:
        """Sum one block of stars.

        Arguments:
            w: States (n, 6) in kpc and km/s; stars outside the ball are counted and left out.
            weights: One factor per star (n,): bootstrap counts, or 1/ε of a known selection.
            pilot: Coefficients, or a field with ``parameters``, under which the scatter is summed. None
                solves a pilot from this block alone, which serves as well for the weighting.
            selection: ∇log ε of a known selection, a function of positions (n, 3): the stars keep equal
                weights, with less scatter than from 1/ε.
            errors: The stars' errors, where ``settings.noise`` is "deconvolve": every term g of the sums then
                becomes g − ½ C:∇∇g, whose mean is that of g over the stars before their errors.
            scatter: Whether to sum the scatter, which one of several blocks may hold for all.

        Raises:
            GalrayError: Wrong shapes, values that are not finite, no star in the ball, or errors missing.
        """
        stars, mass, outside = self._inside(w, weights)
        noisy = self._noisy(w, stars, mass, errors)
        if noisy and selection is not None:
            raise GalrayError(
                "a selection's ∇ log ε together with moments.noise = 'deconvolve'",
                "weigh the stars with 1/ε instead",
            )
        first = noisy.first_pass() if noisy else self.form.first(stars, mass, selection)
        matrix, vector, spin, counts, power = first
        covariance = None
        if scatter:
            if pilot is None:
                theta = self._own_pilot(matrix, vector - self._fixed_speed * spin, power, counts)
            else:
                theta = self._padded(to_numpy(getattr(pilot, "parameters", pilot)))
            if noisy:
                covariance = noisy.second_pass(theta)
            else:
                covariance = self.form.second(stars, mass, theta, self._fixed_speed, selection)
        return MomentSums(matrix, vector, spin, covariance, counts, len(stars), outside, self.key)

    def patch_sums(
        self, w: Any, weights: Any = None, *, selection: KnownSelection | None = None
    ) -> list[MomentSums]:
        """Sums of smooth patches of sky as seen from the centre of the ball, for a jackknife over them.

        The tests are multiplied with patches that add up to one, so that each patch obeys the equation on
        its own and the sums of all are those of the ball; the first holds the scatter of all. Arguments as
        in `sums`.
        """
        stars, mass, outside = self._inside(w, weights)
        directions = patch_directions(self.settings.num_patches)
        out = []
        for i in range(len(directions)):
            first = self.form.first(stars, mass, selection, np.roll(directions, -i, axis=0))
            num = (len(stars) + i) // len(directions)  # patches share the stars
            out.append(MomentSums(*first[:3], None, first[3] / len(directions), num, 0, self.key))
        total = add_up(out)
        theta = self._own_pilot(
            total.matrix, total.vector - self._fixed_speed * total.spin, first[4], total.counts
        )
        scatter = self.form.second(stars, mass, theta, self._fixed_speed, selection)
        out[0] = replace(out[0], scatter=scatter, num_outside=outside)
        return out

    def fit(
        self,
        w: Any,
        weights: Any = None,
        *,
        num_blocks: int = 10,
        selection: KnownSelection | None = None,
        errors: StarErrors | None = None,
    ) -> tuple[SplineField, list[MomentSums]]:
        """Two passes over stars in memory: a pilot, then the weighted solution.

        Arguments:
            w: States (n, 6).
            weights: One factor per star, or None.
            num_blocks: Blocks for cross-validation and the jackknife; star i goes to block i mod blocks,
                so that the sky is shared out evenly when the rows are in random order.
            selection: As in `sums`.
            errors: As in `sums`.

        Returns:
            The field, and the blocks' sums.
        """
        w = to_numpy(w)
        weights = np.ones(len(w)) if weights is None else to_numpy(weights)
        parts = [slice(i, None, num_blocks) for i in range(num_blocks)]
        known = [None if errors is None else errors[part] for part in parts]
        first = [
            self.sums(w[part], weights[part], selection=selection, errors=error)
            for part, error in zip(parts, known, strict=True)
        ]
        found = self.result(first, penalty=_SECOND_PILOT_PENALTY)
        theta = np.concatenate(
            [found.potential.parameters, *(s.parameters for s in found.selections.values())]
        )
        speed = self._fixed_speed
        if found.pattern_speed is not None and found.pattern_speed.known:
            speed = found.pattern_speed.value
        stars, mass, _ = self._inside(w, weights)
        noisy = self._noisy(w, stars, mass, errors)
        if noisy:
            scatter = noisy.second_pass(theta)
        else:
            scatter = self.form.second(stars, mass, theta, speed, selection)
        blocks = [replace(block, scatter=None) for block in first]
        blocks[0] = replace(blocks[0], scatter=scatter)
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

    def _padded(self, theta: Array) -> Array:
        """Coefficients of Φ alone, or of Φ and log ε, as both."""
        return np.concatenate([theta, np.zeros(self.form.num_columns - len(theta))])

    def _own_pilot(self, matrix: Array, vector: Array, power: Array, counts: Array) -> Array:
        """Rough coefficients for the weighting: moments scaled by their power, mild penalty."""
        usable = counts >= self.settings.min_stars
        if not usable.any():
            return np.zeros(self.form.num_columns)  # free flight weights well enough what says so little
        equations = Equations(matrix, vector, Whitener(np.maximum(power, 1e-12 * power.max()), usable))
        return solve(self._unknowns(self._selections(1)), [equations], penalty=(_PILOT_PENALTY,)).parameters

    # -- solution --------------------------------------------------------------------------------------

    def solve(self, sums: Populations, *, penalty: Any = None) -> SplineField:
        """Φ of `result`."""
        return self.result(sums, penalty=penalty).potential

    def result(self, sums: Populations, *, penalty: Any = None) -> MomentResult:
        """Solve the two-step GMM system.

        θ = argmin Σ_populations (b − Aθ)ᵀ Ω⁻¹ (b − Aθ) + Σ_d λ_d θᵀ P_d θ, with A, b, Ω the blocks' summed
        matrix, vector and scatter and P_d the third differences along coordinate d.

        Arguments:
            sums: One `MomentSums` per block; several tracer populations by name, with one Φ.
            penalty: Overrides ``settings.penalty``: a number, a tuple with one per penalty, or a rule.

        Raises:
            GalrayError: No block, blocks of other settings, or fewer usable moments than parameters.
        """
        populations = sums if isinstance(sums, Mapping) else {"": sums}
        if not populations:
            raise GalrayError("no sums to solve", "give at least one block of stars")
        if any(block.key != self.key for blocks in populations.values() for block in blocks):
            raise GalrayError(
                "these sums were made with other settings or another ball",
                "sum and solve with the same Moments",
            )
        rule = self.settings.penalty if penalty is None else penalty
        fewest = min(len(blocks) for blocks in populations.values())
        if rule in _HELD_OUT and 0 < fewest < 3:
            raise GalrayError(
                f"cross-validation of the penalty needs 3 blocks of stars, not {fewest}",
                "give more blocks or set moments.penalty = 'evidence'",
            )
        folds = min(fewest, _CV_FOLDS) if rule in _HELD_OUT else 0
        strength = rule if isinstance(rule, (str, tuple)) else (float(rule),)
        unknowns = self._unknowns(self._selections(len(populations)))
        equations = self._equations(populations, self._fixed_speed, folds)
        solution = solve(unknowns, equations, penalty=strength, steps=self.settings.penalty_steps)
        speed = None
        if self.settings.pattern_speed == "fit":
            if fewest < 3:
                raise GalrayError(
                    f"the pattern speed needs 3 blocks of stars, not {fewest}", "give more blocks"
                )
            num = min(fewest, self.settings.num_blocks)
            speed = pattern_speed(self._blocks(populations, 0.0, num), equations, solution)
            if speed.known:
                omega = speed.value
                equations = self._equations(populations, omega, folds)
                solution = solve(unknowns, equations, penalty=strength, steps=self.settings.penalty_steps)
                blocks = self._blocks(populations, omega, num)
                speed = pattern_speed(blocks, equations, solution, start=omega)
        stars = sum(block.num_stars for blocks in populations.values() for block in blocks)
        width = self.basis.size
        covariance = solution.covariance
        posterior = solution.posterior
        if speed is not None and speed.known:
            extra = unknowns.reduction @ np.outer(speed.response, speed.response) @ unknowns.reduction.T
            covariance, posterior = (c + speed.error**2 * extra for c in (covariance, posterior))
        parameters = solution.parameters
        statistics = {
            "chi2": solution.chi2,
            "num_moments": float(solution.num_moments),
            "effective_dof": solution.effective_dof,
            "num_stars": float(stars),
        }
        bounds = self._bounds(unknowns)
        if len(bounds):
            free, active = nonnegative(solution.hessian, solution.free, bounds)
            parameters = unknowns.reduction @ free
            statistics["bound_nodes"] = float(active)
        potential = SplineField(
            self.basis,
            self.region,
            parameters[:width],
            covariance=covariance[:width, :width],
            posterior=posterior[:width, :width],
            penalty=solution.penalty,
            statistics=statistics,
        )
        selections = {}
        if self.selection_basis is not None:
            step = self.selection_basis.size
            names = ["shared"] if self.settings.selection == "shared" else list(populations)
            for i, name in enumerate(names):
                part = slice(width + i * step, width + (i + 1) * step)
                selections[name] = LogSelection(
                    self.selection_basis, self.region, parameters[part], posterior[part, part]
                )
        result = MomentResult(potential, selections, speed, (), solution)
        if self.selection_basis is not None:
            found = degeneracies(unknowns, solution, self.basis, self.selection_basis, self.region)
            result = replace(result, degeneracies=found)
        return result

    def jackknife(self, sums: Populations, result: MomentResult | None = None) -> tuple[SplineField, Array]:
        """Leave out one block at a time, with the weights and penalty of the whole.

        The replicas are of first order in what is left out, θ₋ᵢ − θ = −H⁻¹(AᵀΩ⁻¹rᵢ + AᵢᵀΩ⁻¹r) with the
        residuals r = b − Aθ.

        Arguments:
            sums: As in `result`.
            result: What `result` found; solved for if not given.

        Returns:
            The field of all blocks, whose ``covariance`` is replaced by the jackknife's,
            (n−1)/n Σ (θ_i − θ̄)(θ_i − θ̄)ᵀ, and the n leave-one-out coefficients (n, splines).

        Raises:
            GalrayError: Fewer than 3 blocks.
        """
        populations = sums if isinstance(sums, Mapping) else {"": sums}
        num = min((len(blocks) for blocks in populations.values()), default=0)
        if num < 3:
            raise GalrayError(f"a jackknife over {num} blocks", "give at least 3 blocks of stars")
        result = self.result(sums) if result is None else result
        solution = result.solution
        assert solution is not None
        unknowns = self._unknowns(self._selections(len(populations)))
        found = result.pattern_speed
        speed = self._fixed_speed if found is None else found.value if found.known else 0.0
        pulls = np.zeros((num, len(solution.free)))
        blocks = {name: [add_up(parts[i::num]) for i in range(num)] for name, parts in populations.items()}
        for e in self._equations(blocks, speed, num):
            residual = e.whitener(e.vector - e.matrix @ solution.parameters)
            design = e.whitener(e.matrix @ unknowns.reduction)
            weighted = e.whitener.transposed(residual)
            for i, (matrix, vector) in enumerate(e.folds):
                pulls[i] += design.T @ e.whitener(vector - matrix @ solution.parameters)
                pulls[i] += unknowns.reduction.T @ (matrix.T @ weighted)
        free = solution.free - np.linalg.solve(solution.hessian, pulls.T).T
        bounds = self._bounds(unknowns)
        if len(bounds):
            free = np.array([nonnegative(solution.hessian, one, bounds)[0] for one in free])
        replicas = (free @ unknowns.reduction.T)[:, : self.basis.size]
        spread = replicas - replicas.mean(0)
        return result.potential.with_covariance((num - 1) / num * spread.T @ spread), replicas
