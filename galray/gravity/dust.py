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
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.gravity.degeneracy import Identifiability, identifiability
from galray.gravity.dust_maps import EfficiencyMap, StarCounts, counts_over_density, efficiency_map
from galray.gravity.dust_networks import train_networks
from galray.gravity.exports import Exportable
from galray.gravity.moment_selection import LogSelection, ball_lattice
from galray.gravity.moment_system import MomentSystem
from galray.gravity.penalised import Equations, Solution, Unknowns, Whitener, solve
from galray.gravity.positivity import nonnegative
from galray.gravity.potential import PotentialField, PotentialNetwork, scores_at, taper
from galray.gravity.region import Region, as_positions, as_region
from galray.gravity.settings import DustSettings
from galray.gravity.spline_field import SplineField
from galray.gravity.splines import Array, SumBasis, TensorBasis, to_numpy

__all__ = ["DustField", "Efficiency", "LogFunction", "fit_dust"]

Convention = Literal["maximum", "sun"]

_FOLDS = 5
_CHUNK = 8192
_PILOT_PENALTY = 1e-8
_PLACES = 4000  # of the ball, at which ε is compared with its bounds
_WILD = 3.0  # velocity scores beyond so many times the typical one count less
_TOLERANCE = 0.05  # of log ε above the Sun's that is no hit of the bound


class LogFunction:
    """S(x) = spline + network inside a ball, known up to a constant.

    Arguments:
        base: The spline.
        network: What it misses; None for none.
    """

    def __init__(self, base: LogSelection, network: PotentialNetwork | None = None) -> None:
        self.base = base
        self.region: Region = base.region
        self.network = None
        if network is not None:
            self.network = copy.deepcopy(network).double().eval().requires_grad_(False)

    def value(self, x: Any) -> Tensor:
        """S at positions (*, 3) less S at the centre of the ball: shape (*)."""
        x = as_positions(x)
        out = self.base.log_efficiency(x)
        if self.network is not None:
            center = x.new_tensor(self.region.center)[None]
            out = out + (self.network(x.reshape(-1, 3)) - self.network(center)).reshape(x.shape[:-1])
        return out

    def gradient(self, x: Any) -> Tensor:
        """∇S at positions (*, 3), in 1/kpc: shape (*, 3)."""
        x = as_positions(x)
        flat = x.reshape(-1, 3)
        out = torch.from_numpy(self.base.gradient(flat))
        if self.network is not None:
            parts = [self.network.gradient(*self.network.inputs(c)) for c in flat.split(65_536)]
            out = out + torch.cat(parts)
        return out.reshape(x.shape)


class Efficiency:
    """ε(x) ≤ 1, from a log ε that is known up to a constant.

    Arguments:
        raw: log ε + const of positions (*, 3).
        region: The ball.
        convention: What the constant is: ε = 1 at its ``maximum`` over the ball, or at its centre (``sun``).
        min_efficiency: The lower bound of ε.
        within: Fraction of the ball's radius over which the maximum and the bounds are looked at.
    """

    def __init__(
        self,
        raw: Callable[[Any], Tensor],
        region: Region,
        convention: Convention = "maximum",
        min_efficiency: float = 0.01,
        within: float = 0.95,
    ) -> None:
        self.raw = raw
        self.region = region
        self.convention: Convention = convention
        self.floor = math.log(min_efficiency)
        values = raw(torch.from_numpy(ball_lattice(region, _PLACES, within)))
        center = raw(torch.tensor([region.center], dtype=torch.float64))
        self.offset = float(values.max() if convention == "maximum" else center[0])
        beyond = values - self.offset
        self.bound_fraction = float(((beyond > _TOLERANCE) | (beyond < self.floor)).double().mean())
        """The part of the volume where ε would leave the range from its lower bound to 1."""

    def log_efficiency(self, x: Any) -> Tensor:
        """Log ε at positions (*, 3), from the bound's logarithm to 0: shape (*)."""
        return (self.raw(x) - self.offset).clamp(self.floor, 0.0)

    def efficiency(self, x: Any) -> Tensor:
        """ε at positions (*, 3): shape (*), from the bound to 1."""
        return self.log_efficiency(x).exp()


class DustField(Exportable):
    """Gravity corrected for a selection that was fitted with it.

    Arguments:
        field: Φ.
        selection: S = log ε (joint) or −log n (conditional).
        settings: What was asked for.
        log_observed: Log n_obs + const of positions (*, 3), of the conditional variant.
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
            ``conditional``, ∇log p(v|x), or a model with ``conditional_score(w)``.
        w: States (n, 6) in kpc and km/s of stars that are seen.
        settings: Bases, networks, bounds.
        seed: Of the choice of stars and the networks.
        ball: The ball of the stars; None takes ``model.ball``.
        weights: One weight per star (n,), or None.
        partner: Scores, or a model, trained on other stars: the product of the two residuals is minimised,
            which has no noise floor and no bias.
        log_density: Log n_obs + const of positions (*, 3), for the ε of the conditional variant; None takes
            the model's own, where it has one.
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
    method = "score" if settings.variant == "joint" else "conditional_score"
    known = [model_or_scores] if partner is None else [model_or_scores, partner]
    scores = []
    for one in known:
        if hasattr(one, method):
            scores.append(scores_at(one, stars[order], method))
        elif np.shape(one) == stars.shape:
            scores.append(to_numpy(one)[order])
        else:
            raise GalrayError(
                f"{type(one).__name__} of shape {np.shape(one)} for {len(stars)} stars",
                f"give scores of shape (n, 6), or a model with {method}(w)",
            )
    finite = np.all([np.isfinite(s).all(1) for s in scores], axis=0)
    if (~finite).mean() > 0.01:
        raise GalrayError(
            f"{int((~finite).sum())} of {len(finite)} scores are not finite",
            "the model has diverged: train it again",
        )
    stars, weight = stars[order][finite], weight[order][finite]
    scores = [s[finite] for s in scores]
    square = np.mean([(s[:, 3:] ** 2).sum(1) for s in scores], axis=0)
    weight = weight / (1 + square / (_WILD**2 * np.median(square)))
    solution, free, unknowns = _solve_splines(system, settings, stars, scores, weight)
    theta = unknowns.reduction @ free
    width = system.basis.size
    base = SplineField(
        system.basis,
        region,
        theta[:width],
        covariance=solution.covariance[:width, :width],
        posterior=solution.posterior[:width, :width],
        penalty=solution.penalty,
        statistics={"num_stars": float(len(stars)), "effective_dof": solution.effective_dof},
    )
    spline = LogSelection(system.selection_basis, region, theta[width:], solution.posterior[width:, width:])
    field: SplineField | PotentialField = base
    selection = LogFunction(spline)
    if settings.basis == "network":
        networks = train_networks(base, spline, stars, scores, weight, settings, seed, on_epoch)
        field = PotentialField(base, networks.potential, networks.curve)
        selection = LogFunction(spline, networks.selection)
    if settings.variant == "conditional" and log_density is None:
        log_density = getattr(model_or_scores, "log_density", None)
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
