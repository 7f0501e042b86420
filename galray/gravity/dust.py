"""Φ(x) and a selection efficiency ε(x) together, from a model of the stars that are seen.

Stars of a stationary f behind dust are drawn from f_obs = ε f, and the Boltzmann equation of f is

    [v·∂ₓ + a·∂ᵥ] log f_obs − v·∂ₓ log ε = 0,    a = −∇Φ,

linear in Φ and log ε (the joint variant). The conditional variant reads the same equation with p(v|x), which
no selection of positions can touch,

    [v·∂ₓ + a·∂ᵥ] log p(v|x) + v·∂ₓ log n = 0,

linear in Φ and in the density n(x) before the dust; then ε = n_obs/n. Both are one problem, in Φ and a
function S = log ε or −log n: minimise E|v·sₓ + a·sᵥ − v·∂ₓS|² over the stars. Splines of both solve it at
once, with ρ ≥ 0 and ε that falls with distance as linear bounds; networks on top learn what the splines miss.

The residual vanishes star by star, so the stars may be weighed: those of large sᵥ, near the escape velocity,
where f ends and every model of it is worst, count less.

Noise in the scores pulls both functions towards zero, most where Φ and S act almost alike. Tested with
functions of velocity in their place the equation has no such bias: stars weighed with t/n_obs are a sample of
t(x) p(v|x), seen through the selection t/n, of which t is known and `Moments` solves for n. Any t will do;
one that follows n_obs as far as the splines of n can keeps the weights even and the noise low.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.gravity.degeneracy import Identifiability, identifiability
from galray.gravity.dust_functions import Efficiency, LogFunction
from galray.gravity.dust_maps import EfficiencyMap, StarCounts, counts_over_density, efficiency_map
from galray.gravity.dust_networks import train_networks
from galray.gravity.exports import Exportable
from galray.gravity.moment_selection import LogSelection, fit_log
from galray.gravity.moment_settings import MomentsSettings
from galray.gravity.moment_system import MomentSystem
from galray.gravity.moments import Moments
from galray.gravity.penalised import Equations, Solution, Unknowns, Whitener, solve
from galray.gravity.positivity import nonnegative
from galray.gravity.potential import PotentialField, scores_at, taper
from galray.gravity.region import Region, as_positions, as_region
from galray.gravity.settings import DustSettings
from galray.gravity.spline_field import SplineField
from galray.gravity.splines import Array, SumBasis, TensorBasis, to_numpy

__all__ = ["DustField", "fit_dust"]

_FOLDS = 5
_CHUNK = 8192
_PILOT_PENALTY = 1e-8
_WILD = 3.0  # velocity scores beyond so many times the typical one count less


class DustField(Exportable):
    """Gravity corrected for a selection that was fitted with it.

    Arguments:
        field: Φ.
        selection: S = log ε (joint) or −log n (conditional).
        settings: What was asked for.
        log_observed: Log n_obs + const of positions (*, 3), of the conditional variant; a stored field knows
            it on a grid.
        degeneracy: What the stars can tell of Φ and ε apart; None where it was not looked at.
        solution: Of the splines.
    """

    def __init__(
        self,
        field: SplineField | PotentialField,
        selection: LogFunction,
        settings: DustSettings,
        *,
        log_observed: Callable[[Any], Tensor] | None = None,
        degeneracy: Identifiability | None = None,
        solution: Solution | None = None,
    ) -> None:
        self.field = field
        self.region: Region = field.region
        self.selection = selection
        self.settings = settings
        self.degeneracy = degeneracy
        self.solution = solution
        self.log_observed = log_observed
        self.efficiency: Efficiency | None = None
        raw = selection.value
        if settings.variant == "conditional":
            if log_observed is None:
                return
            seen = log_observed

            def raw(x: Any) -> Tensor:
                return seen(as_positions(x)).detach() + selection.value(x)

        self.efficiency = Efficiency(
            raw, self.region, settings.convention, settings.min_efficiency, settings.max_radius
        )

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*)."""
        return self.field.potential(x)

    def acceleration(self, x: Any) -> Tensor:
        """a(x) in (km/s)²/kpc, shape (*, 3)."""
        return self.field.acceleration(x)

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³, shape (*)."""
        return self.field.mass_density(x)

    def log_efficiency(self, x: Any) -> Tensor:
        """Log ε(x) ≤ 0, shape (*).

        Raises:
            GalrayError: A conditional fit that was not told the density of the stars that are seen.
        """
        if self.efficiency is None:
            raise GalrayError(
                "p(v|x) alone does not tell ε", "give fit_dust log_density=..., of the stars that are seen"
            )
        return self.efficiency.log_efficiency(x)

    def efficiency_map(self, stars: StarCounts) -> EfficiencyMap:
        """ε in the cells in which the stars were counted."""
        if self.settings.variant == "joint":
            return efficiency_map(stars, self.log_efficiency, symmetric=False)
        return counts_over_density(stars, self.log_density)

    def log_density(self, x: Any) -> Tensor:
        """Log n(x) + const of the stars before the dust, of a conditional fit: shape (*)."""
        if self.settings.variant != "conditional":
            raise GalrayError("a joint fit has no n(x) of its own", "divide the density seen by ε")
        return -self.selection.value(x)


def fit_dust(
    model_or_scores: Any,
    w: Any,
    settings: DustSettings,
    *,
    seed: int,
    ball: Any = None,
    weights: Any = None,
    partner: Any = None,
    log_density: Callable[[Any], Tensor] | None = None,
    check: bool = True,
    on_epoch: Any = None,
) -> DustField:
    """Fit Φ and log ε, or Φ and log n, to a model of the stars that are seen.

    Arguments:
        model_or_scores: For ``joint``, ∇log f_obs at `w` (n, 6), or a model with ``score(w)``; for
            ``conditional``, ∇log p(v|x), or a model with ``conditional_score(w)``; not looked at by basis
            ``moments``, but for its ``ball`` and ``log_density``.
        w: States (n, 6) in kpc and km/s of stars that are seen.
        settings: Bases, networks, bounds.
        seed: Of the choice of stars and the networks.
        ball: The ball of the stars; None takes ``model.ball``.
        weights: One weight per star (n,), or None.
        partner: Scores, or a model, trained on other stars: the product of the two residuals is minimised,
            which has no noise floor and no bias.
        log_density: Log n_obs + const of positions (*, 3), for the ε of the conditional variant and for
            basis ``moments``; None takes the model's own, where it has one.
        check: Look first whether these stars can tell Φ and ε apart.
        on_epoch: Called with the dict of each epoch.

    Raises:
        GalrayError: No ball, shapes that do not match, too few stars for the splines, a tracer that is
            isothermal within the noise, or ε at its bounds in more than ``max_bound_fraction`` of the volume.
    """
    ball = ball if ball is not None else getattr(model_or_scores, "ball", None)
    if ball is None:
        raise GalrayError("fit_dust does not know the ball of the stars", "give ball=Ball(center, radius)")
    region = as_region(ball)
    stars = to_numpy(w)
    if stars.ndim != 2 or stars.shape[1] != 6:
        raise GalrayError(f"states of shape {stars.shape}", "give (x, y, z, vx, vy, vz), shape (n, 6)")
    system = MomentSystem(settings.splines(), region)
    assert system.selection_basis is not None
    distance = np.linalg.norm(stars[:, :3] - np.array(region.center), axis=1) / region.radius
    weight = taper(distance / settings.max_radius) * (1.0 if weights is None else to_numpy(weights))
    order = np.random.default_rng(seed).permutation(np.flatnonzero(weight > 0))[: settings.max_stars]
    unknown = system.basis.size + system.selection_basis.size
    if len(order) < 2 * unknown:
        raise GalrayError(
            f"{len(order)} stars within {settings.max_radius:g} of the ball for {system.basis.size} splines "
            f"of the potential and {system.selection_basis.size} of the selection",
            "take more stars, or fewer num_potential_splines and num_selection_splines",
        )
    told = None
    if check:
        told = identifiability(stars[order], region, amplitude=settings.selection_amplitude)
        told.require(settings.max_degeneracy)
    if settings.variant == "conditional" and log_density is None:
        log_density = getattr(model_or_scores, "log_density", None)
    solved: tuple[SplineField | PotentialField, LogFunction, Solution | None]
    if settings.basis == "moments":
        order = np.random.default_rng(seed).permutation(np.flatnonzero(distance < 1))[: settings.max_stars]
        mass = np.ones(len(stars)) if weights is None else to_numpy(weights)
        solved = _by_moments(system.settings, region, stars[order], mass[order], log_density)
    else:
        known = [model_or_scores] if partner is None else [model_or_scores, partner]
        scores = [_scores_of(one, stars, order, settings.variant) for one in known]
        finite = np.all([np.isfinite(s).all(1) for s in scores], axis=0)
        if (~finite).mean() > 0.01:
            raise GalrayError(
                f"{int((~finite).sum())} of {len(finite)} scores are not finite",
                "the model has diverged: train it again",
            )
        order, scores = order[finite], [s[finite] for s in scores]
        square = np.mean([(s[:, 3:] ** 2).sum(1) for s in scores], axis=0)
        weight = weight[order] / (1 + square / (_WILD**2 * np.median(square)))
        solved = _by_scores(system, settings, stars[order], scores, weight, seed, on_epoch)
    field, selection, solution = solved
    found = DustField(
        field, selection, settings, log_observed=log_density, degeneracy=told, solution=solution
    )
    if found.efficiency is not None and found.efficiency.bound_fraction > settings.max_bound_fraction:
        raise GalrayError(
            f"ε is at its bounds (1, or {settings.min_efficiency:g}) in "
            f"{100 * found.efficiency.bound_fraction:.0f} % of the volume",
            "the stars do not determine ε there: take fewer or smoother splines of it (a smaller "
            "selection_amplitude), a smaller ball, or convention = 'maximum'",
        )
    return found


def _scores_of(one: Any, stars: Array, order: Array, variant: str) -> Array:
    """Scores at a choice of the stars, given at all of them or by a model."""
    method = "score" if variant == "joint" else "conditional_score"
    if hasattr(one, method):
        return scores_at(one, stars[order], method)
    if np.shape(one) == stars.shape:
        return to_numpy(one)[order]
    raise GalrayError(
        f"{type(one).__name__} of shape {np.shape(one)} for {len(stars)} stars",
        f"give scores of shape (n, 6), or a model with {method}(w)",
    )


def _by_moments(
    settings: MomentsSettings,
    region: Region,
    stars: Array,
    weights: Array,
    log_density: Callable[[Any], Tensor] | None,
) -> tuple[SplineField, LogFunction, Solution | None]:
    """Φ and −log n from moments of stars that are weighed so that their density is as smooth as n."""
    if log_density is None:
        raise GalrayError(
            "moments of p(v|x) need the density of the stars that are seen", "give fit_dust log_density=..."
        )
    x = torch.from_numpy(stars[:, :3])
    seen = np.concatenate([to_numpy(log_density(part)) for part in x.split(_CHUNK)])
    if not np.isfinite(seen).all():
        raise GalrayError("log_density is not finite at every star", "give one that is positive in the ball")
    moments = Moments(settings, region)
    assert moments.selection_basis is not None
    target = fit_log(moments.selection_basis, region, x, seen, weights)
    rare = np.concatenate([to_numpy(target.log_efficiency(part)) for part in x.split(_CHUNK)]) - seen
    _, blocks = moments.fit(stars, weights * np.exp(rare - rare.max()), selection=target.gradient)
    found = moments.result(blocks)
    return found.potential, LogFunction(found.selections["shared"]), found.solution


def _by_scores(
    system: MomentSystem,
    settings: DustSettings,
    stars: Array,
    scores: list[Array],
    weight: Array,
    seed: int,
    on_epoch: Any,
) -> tuple[SplineField | PotentialField, LogFunction, Solution]:
    """Φ and S from the residuals of one or two scores: splines, and networks on them."""
    assert system.selection_basis is not None
    solution, free, unknowns = _solve_splines(system, settings, stars, scores, weight)
    theta = unknowns.reduction @ free
    width = system.basis.size
    base = SplineField(
        system.basis,
        system.region,
        theta[:width],
        covariance=solution.covariance[:width, :width],
        posterior=solution.posterior[:width, :width],
        penalty=solution.penalty,
        statistics={"num_stars": float(len(stars)), "effective_dof": solution.effective_dof},
    )
    covariance = solution.posterior[width:, width:]
    spline = LogSelection(system.selection_basis, system.region, theta[width:], covariance)
    if settings.basis == "spline":
        return base, LogFunction(spline), solution
    networks = train_networks(base, spline, stars, scores, weight, settings, seed, on_epoch)
    field = PotentialField(base, networks.potential, networks.curve)
    return field, LogFunction(spline, networks.selection), solution


def _solve_splines(
    system: MomentSystem, settings: DustSettings, stars: Array, scores: list[Array], weight: Array
) -> tuple[Solution, Array, Unknowns]:
    """The penalised least squares of both splines; with bounds, the nearest solution within them.

    Its normal equations are solved as moments whose scatter is the residuals' own.
    """
    size = system.basis.size + (system.selection_basis.size if system.selection_basis else 0)
    matrix, scatter = np.zeros((2, _FOLDS, size, size))
    vector = np.zeros((_FOLDS, size))
    square = 0.0
    for k in range(_FOLDS):
        for rows in np.array_split(np.arange(k, len(stars), _FOLDS), len(stars) // (_FOLDS * _CHUNK) + 1):
            parts = [_rows(system, stars[rows], s[rows]) for s in scores]
            (first, c1), (last, c2) = parts[0], parts[-1]
            w = weight[rows, None]
            cross = (w * first).T @ last
            matrix[k] += (cross + cross.T) / 2
            vector[k] -= (first.T @ (w[:, 0] * c2) + last.T @ (w[:, 0] * c1)) / 2
            for d, _ in parts:
                scatter[k] += (w * d).T @ d / len(parts)
            square += float((weight[rows] * c1**2).sum())
    unknowns = system._unknowns(1)
    total, right, noise = matrix.sum(0), vector.sum(0), scatter.sum(0)
    usable = np.diag(noise) > 1e-12 * np.diag(noise).max()
    folds = list(zip(matrix, vector, strict=True))

    def equations(variance: float) -> list[Equations]:
        return [Equations(total, right, Whitener(variance * noise, usable), folds)]

    variance = square / weight.sum()
    pilot = solve(unknowns, equations(variance), penalty=(_PILOT_PENALTY,)).parameters
    left = square - 2 * float(right @ pilot) + float(pilot @ total @ pilot)
    variance = max(left / weight.sum(), 1e-10 * variance)
    rule = settings.penalty if isinstance(settings.penalty, str) else (settings.penalty,)
    solution = solve(unknowns, equations(variance), penalty=rule)
    bounds = system._bounds(unknowns)
    free = solution.free
    if len(bounds):
        free, _ = nonnegative(solution.hessian, free, bounds)
    return solution, free, unknowns


def _rows(system: MomentSystem, stars: Array, scores: Array) -> tuple[Array, Array]:
    """D (n, splines) and c (n,) of the residual c + Dθ."""
    x, v = stars[:, :3], stars[:, 3:]
    assert system.selection_basis is not None

    def along(basis: TensorBasis | SumBasis, direction: Array) -> Array:
        index, gradient = basis.gradient(x)
        out = np.zeros((len(x), basis.size))
        np.put_along_axis(out, index, -np.einsum("njp,nj->np", gradient, direction), 1)
        return out

    design = np.hstack([along(system.basis, scores[:, 3:]), along(system.selection_basis, v)])
    return design, (v * scores[:, :3]).sum(1)
