"""The log posterior of a spherical galaxy's parameters, batched and differentiable."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from galray.dwarf.jeans import JeansSolver, Moments
from galray.dwarf.model import GalaxyModel, Prior, virial_log_density
from galray.dwarf.projection import cylinder_weights
from galray.dwarf.settings import HaloFitSettings
from galray.dwarf.tracers import Tracers
from galray.dwarf.velocities import Shape, log_gaussian
from galray.errors import GalrayError

__all__ = ["GalaxyLikelihood"]

_LEAST_WEIGHT = 0.01  # stars less likely members than this tell nothing and cost as much as the others
_LARGEST_RADIUS = 30.0  # in half-light radii: no galaxy is measured further out
_SMALLEST_RADIUS = 0.011  # in half-light radii: inside it neither Σ nor σ_los is resolved by any data


def weighted_quantile(values: np.ndarray, weights: np.ndarray, level: float) -> float:
    """The quantile of weighted values."""
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order]) - 0.5 * weights[order]
    return float(np.interp(level * weights.sum(), cumulative, values[order]))


@dataclass(frozen=True)
class _Cells:
    """Stars sorted by radius and dealt into cells of neighbours that share one projected radius.

    Attributes:
        radius: Of each cell in kpc, the mean of ln R, shape (j,).
        index: Star of each place, shape (j, m).
        present: 1 where the place holds a star, else 0, shape (j, m).
    """

    radius: np.ndarray
    index: np.ndarray
    present: np.ndarray

    @classmethod
    def build(cls, radius: np.ndarray, nodes: int) -> _Cells:
        size = max(math.ceil(len(radius) / nodes), 1)
        order = np.argsort(radius, kind="stable")
        count = math.ceil(len(order) / size)
        padding = count * size - len(order)
        index = np.concatenate([order, np.repeat(order[-1], padding)]).reshape(count, size)
        present = np.repeat([1.0, 0.0], [len(order), padding]).reshape(count, size)
        mean = (np.log(radius)[index] * present).sum(-1) / present.sum(-1)
        return cls(np.exp(mean), index, present)

    def deal(self, values: np.ndarray) -> Tensor:
        """Per-star values in cells, shape (j, m)."""
        return torch.from_numpy(np.ascontiguousarray(values[self.index]))


class GalaxyLikelihood:
    """Σ over stars of ln p(v | R) and ln p(R), and the prior, for batches of parameter vectors.

    Arguments:
        tracers: The stars; they are checked.
        settings: The fit's settings.
        seed: Draws the centre's offset where the centre has an error.
        model: Take this model (a posterior's) rather than one built from the data: for held-out stars.

    Raises:
        GalrayError: Bad data, or settings that the data cannot serve.
    """

    def __init__(
        self, tracers: Tracers, settings: HaloFitSettings, seed: int, model: GalaxyModel | None = None
    ) -> None:
        self.settings = settings
        choice = settings.likelihood
        tracers.check()
        if choice.draw_centre and tracers.centre_error_kpc > 0:
            rng = np.random.default_rng(np.random.SeedSequence([seed, 0xCE27]))
            tracers = _shifted(tracers, tracers.centre_error_kpc * rng.standard_normal(2))
        self.membership = choice.membership
        if self.membership == "auto":
            self.membership = "none" if tracers.membership is None else "weights"
        if self.membership == "weights":
            if tracers.membership is None:
                raise GalrayError(
                    f"{tracers.name}: likelihood.membership = 'weights', but no star has a probability",
                    "give membership probabilities, or use 'mixture' or 'none'",
                )
            self.rows = np.flatnonzero(tracers.membership > _LEAST_WEIGHT)
            tracers = tracers.subset(self.rows)
        else:
            self.rows = np.arange(len(tracers))
        self.tracers = tracers
        photometry = tracers.photometry_x is not None
        if choice.positions == "photometry" and not photometry:
            raise GalrayError(
                f"{tracers.name}: likelihood.positions = 'photometry', but there is none",
                "give photometry, or use positions = 'stars' or 'auto'",
            )
        self.photometric = photometry and choice.positions != "stars"

        shape = (choice.ellipticity, choice.position_angle)
        radius = tracers.radius(*shape)
        weight = np.ones(len(tracers)) if self.membership != "weights" else tracers.membership
        assert weight is not None
        if self.photometric:
            place = tracers.radius(*shape, photometry=True)
            place_weight = tracers.photometry_membership
            if place_weight is None:
                place_weight = np.ones(len(place))
            keep = place_weight > _LEAST_WEIGHT
            place, place_weight = place[keep], place_weight[keep]
        else:
            place, place_weight = radius, weight
        # a handful of stars beyond tens of half-light radii would only stretch the grid
        half = weighted_quantile(place, place_weight, 0.5)
        self.footprint = float(choice.footprint or min(place.max() * (1 + 1e-9), _LARGEST_RADIUS * half))
        inside = place <= self.footprint
        if inside.sum() < 10:
            raise GalrayError(
                f"{tracers.name}: likelihood.footprint = {self.footprint:g} kpc holds {inside.sum()} stars",
                "it is the radius within which positions are complete: give it in kpc, or leave it away",
            )
        place, place_weight = place[inside], place_weight[inside]
        self.background = (self.photometric and tracers.photometry_membership is None) or (
            self.membership == "mixture" and not self.photometric
        )
        self.model = model or self._build(radius, weight, place, place_weight)
        floor = _SMALLEST_RADIUS * self.model.half_radius
        ceiling = 1.3 * _LARGEST_RADIUS * self.model.half_radius
        radius, place = radius.clip(floor, ceiling), place.clip(floor, ceiling)

        self._stars = _Cells.build(radius, choice.nodes)
        nodes = self._stars.radius
        self._star_nodes = len(nodes)
        if self.photometric or len(place) != len(radius):
            self._places = _Cells.build(place, choice.nodes)
            nodes = np.concatenate([nodes, self._places.radius])
            self._place_slice = slice(self._star_nodes, len(nodes))
        else:
            self._places = self._stars
            self._place_slice = slice(0, self._star_nodes)
        self.solver = JeansSolver(self.model.grid, nodes)
        self._inside = torch.from_numpy(cylinder_weights(self.model.grid, self.footprint))
        # single precision star by star: the sum over 10,000 stars is then good to 1e-4, at half the price;
        # velocities are counted from their median first
        self._zero = weighted_quantile(tracers.v, weight, 0.5)
        self._v = self._stars.deal(tracers.v - self._zero).float()
        self._e2 = self._stars.deal(tracers.v_error**2).float()
        self._w = (self._stars.deal(weight) * torch.from_numpy(self._stars.present)).float()
        self._place_w = self._places.deal(place_weight) * torch.from_numpy(self._places.present)
        if choice.perspective:
            if tracers.distance_kpc is None:
                raise GalrayError(
                    f"{tracers.name}: likelihood.perspective needs the distance", "give distance_kpc"
                )
            self._tilt_x = self._stars.deal(tracers.x / tracers.distance_kpc).float()
            self._tilt_y = self._stars.deal(tracers.y / tracers.distance_kpc).float()
        self._proper = tracers.vx is not None
        if self._proper:
            self._prepare_proper_motions(tracers)

    def _prepare_proper_motions(self, tracers: Tracers) -> None:
        assert tracers.vx is not None
        assert tracers.vy is not None
        assert tracers.vx_error is not None
        assert tracers.vy_error is not None
        r = np.hypot(tracers.x, tracers.y).clip(1e-12)

        def deal(values: np.ndarray) -> Tensor:
            return self._stars.deal(values).float()

        self._cos, self._sin = deal(tracers.x / r), deal(tracers.y / r)
        self._vx, self._vy = deal(tracers.vx), deal(tracers.vy)
        self._ex2, self._ey2 = deal(tracers.vx_error**2), deal(tracers.vy_error**2)

    def _build(
        self, radius: np.ndarray, weight: np.ndarray, place: np.ndarray, place_weight: np.ndarray
    ) -> GalaxyModel:
        settings, tracers = self.settings, self.tracers
        half = weighted_quantile(place, place_weight, 0.5)
        low = max(weighted_quantile(place, place_weight, min(20 / len(place), 0.2)), 0.1 * half)
        high = max(weighted_quantile(place, place_weight, 0.985), 2.5 * half)
        # robust width: a foreground has long tails
        middle = weighted_quantile(tracers.v, weight, 0.5)
        width = 0.5 * (
            weighted_quantile(tracers.v, weight, 0.84) - weighted_quantile(tracers.v, weight, 0.16)
        )
        noise = float(np.median(tracers.v_error))
        dispersion = math.sqrt(max(width**2 - noise**2, 0.05 * width**2))
        guess = virial_log_density(half, dispersion)
        choice = settings.likelihood
        nuisance = [Prior("v_sys", "normal", middle, max(width, 1.0))]
        if choice.perspective:
            mx, my, error = choice.systemic_motion or (0.0, 0.0, 300.0)
            nuisance += [Prior("v_x", "normal", mx, error), Prior("v_y", "normal", my, error)]
        if self.membership == "mixture":
            mean, sd = choice.foreground_mean or (middle, 3 * float(np.std(tracers.v)))
            nuisance += [
                Prior("member_fraction", "uniform", 0.0, 1.0),
                Prior("foreground_mean", "normal", mean, sd),
                Prior(
                    "foreground_log_sigma",
                    "uniform",
                    math.log(choice.foreground_sigma[0]),
                    math.log(choice.foreground_sigma[1]),
                ),
            ]
        if self.photometric and self.background:
            nuisance.append(Prior("photometry_fraction", "uniform", 0.0, 1.0))
        if tracers.vx is not None and tracers.vy is not None:
            for name, values in (("v_east", tracers.vx), ("v_north", tracers.vy)):
                nuisance.append(
                    Prior(name, "normal", float(np.median(values)), max(float(np.std(values)), 1))
                )
        return GalaxyModel(settings, half, (low, high), guess, nuisance)

    def moments(self, q: Tensor) -> tuple[Moments, dict[str, Tensor], Tensor, Tensor]:
        """Projected moments at the nodes, the parameters, ln of the stars within the footprint, penalty."""
        values = self.model.values(q)
        p = self.model.profiles(values)
        mass = self.solver.enclosed(torch.exp(p.log_density), p.halo_slopes[..., 0])
        moments = self.solver.moments(p.log_number, mass, p.anisotropy)
        inside = torch.log(torch.exp(p.log_number) @ self._inside)
        penalty = torch.zeros_like(inside)
        if self.settings.likelihood.slope_inequality:
            excess = (2 * p.anisotropy.inner - p.tracer_slopes[..., 0]).clamp_min(0.0)
            penalty = penalty - 0.5 * (excess / 0.1) ** 2
        # the tracer's mass and number must converge inwards and outwards
        penalty = penalty - 50.0 * (p.halo_slopes[..., 0] - 2.8).clamp_min(0.0) ** 2
        return moments, values, inside, penalty

    def log_posterior(self, q: Tensor) -> Tensor:
        """Give ln posterior + const of q, shape (C, size) → (C,)."""
        moments, values, inside, penalty = self.moments(q)
        total = self._velocities(moments, values, inside).sum(-1).double().sum(-1)
        total = total + self._positions(moments, values, inside)
        return total + penalty + self.model.log_prior(q)

    def log_likelihood_stars(self, q: Tensor) -> Tensor:
        """Give ln p(v | R) of every star, shape (C, n), in the order of `tracers`; for held-out stars.

        In a mixture it is ln p(v, R), foreground and members together.
        """
        moments, values, inside, _ = self.moments(q)
        cells = self._velocities(moments, values, inside)
        result = torch.zeros(len(q), len(self.tracers), dtype=torch.float64)
        present = torch.from_numpy(self._stars.present) > 0
        result[:, torch.from_numpy(self._stars.index)[present]] = cells[:, present].double()
        return result

    def _velocities(self, moments: Moments, values: dict[str, Tensor], inside: Tensor) -> Tensor:
        """Give the weighted ln p of every cell, shape (C, j, m)."""
        stars = slice(0, self._star_nodes)
        los2 = moments.los2[..., stars].clamp_min(1e-4)
        each = {k: v[:, None, None].float() for k, v in values.items()}
        u = self._v - (values["v_sys"] - self._zero)[:, None, None].float()
        if self.settings.likelihood.perspective:
            u = u - each["v_x"] * self._tilt_x - each["v_y"] * self._tilt_y
        if self.settings.likelihood.velocities == "gaussian":
            log_p = log_gaussian(u, los2[..., None].float() + self._e2)
        else:
            excess = moments.los4[..., stars] / los2**2 - 3
            log_p = Shape.of(los2, excess).log_prob(u, self._e2)
        if self._proper:
            log_p = log_p + self._proper_motions(moments, values)
        if self.membership == "mixture":
            log_f, log_b = torch.log(each["member_fraction"]), torch.log1p(-each["member_fraction"])
            log_place = (torch.log(moments.surface[..., stars]) - inside[:, None])[..., None].float()
            log_flat = -math.log(math.pi * self.footprint**2)
            away = self._v - (values["foreground_mean"] - self._zero)[:, None, None].float()
            log_field = log_gaussian(away, torch.exp(2 * each["foreground_log_sigma"]) + self._e2)
            joint = torch.logaddexp(log_f + log_place + log_p, log_b + log_flat + log_field)
            if self.photometric:  # spectra chosen unevenly over the sky: only p(v | R) counts
                joint = joint - torch.logaddexp(log_f + log_place, log_b + log_flat)
            return self._w * joint
        return self._w * log_p

    def _proper_motions(self, moments: Moments, values: dict[str, Tensor]) -> Tensor:
        stars = slice(0, self._star_nodes)
        east = self._vx - values["v_east"][:, None, None].float()
        north = self._vy - values["v_north"][:, None, None].float()
        outward = east * self._cos + north * self._sin
        across = north * self._cos - east * self._sin
        e2_out = self._ex2 * self._cos**2 + self._ey2 * self._sin**2
        e2_across = self._ey2 * self._cos**2 + self._ex2 * self._sin**2
        radial2 = moments.radial2[..., stars, None].float()
        tangential2 = moments.tangential2[..., stars, None].float()
        return log_gaussian(outward, radial2 + e2_out) + log_gaussian(across, tangential2 + e2_across)

    def _positions(self, moments: Moments, values: dict[str, Tensor], inside: Tensor) -> Tensor:
        if self.membership == "mixture" and not self.photometric:
            return torch.zeros_like(inside)  # already in the joint density of velocities and places
        log_place = torch.log(moments.surface[..., self._place_slice]) - inside[:, None]
        if self.photometric and self.background:
            fraction = values["photometry_fraction"][:, None]
            log_flat = -math.log(math.pi * self.footprint**2)
            log_place = torch.logaddexp(torch.log(fraction) + log_place, torch.log1p(-fraction) + log_flat)
        return log_place @ self._place_w.sum(-1)


def _shifted(tracers: Tracers, shift: np.ndarray) -> Tracers:
    changes = {"x": tracers.x - shift[0], "y": tracers.y - shift[1]}
    if tracers.photometry_x is not None and tracers.photometry_y is not None:
        changes |= {
            "photometry_x": tracers.photometry_x - shift[0],
            "photometry_y": tracers.photometry_y - shift[1],
        }
    return dataclasses.replace(tracers, **changes)
