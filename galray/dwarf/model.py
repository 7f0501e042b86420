"""The parameters of a spherical galaxy, their prior, and the profiles they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.dwarf.anisotropy import Anisotropy, symmetric, unsymmetric
from galray.dwarf.profiles import SlopeProfile
from galray.dwarf.projection import log_grid
from galray.dwarf.settings import HaloFitSettings
from galray.units import G

__all__ = ["GalaxyModel", "Prior", "Profiles"]

_STEP = math.log(2.0)
_FLANK = math.sqrt(12.0) / 20


@dataclass(frozen=True)
class Prior:
    """One parameter as a function of an unconstrained number q of order 1.

    Attributes:
        name: The parameter.
        kind: normal: a + b q, q ~ N(0, 1); uniform: a + (b − a) Φ(q), q ~ N(0, 1); box: linear in q, flat
            between a and b, with Gaussian flanks of a twentieth of its width (data hold such a parameter
            well, and a linear map keeps its posterior straight); fixed: a.
        a: Mean, lower end, or value.
        b: Standard deviation, or upper end.
    """

    name: str
    kind: str
    a: float
    b: float = 0.0

    def value(self, q: Tensor) -> Tensor:
        """The parameter at q, any shape."""
        if self.kind == "normal":
            return self.a + self.b * q
        if self.kind == "box":
            return 0.5 * (self.a + self.b) + (self.b - self.a) / math.sqrt(12.0) * q
        return self.a + (self.b - self.a) * (0.5 * torch.erfc(-q / math.sqrt(2.0))).clamp(1e-12, 1 - 1e-12)

    def log_prior(self, q: Tensor) -> Tensor:
        """Give ln prior + const at q, any shape."""
        if self.kind == "box":
            return -0.5 * ((q.abs() - math.sqrt(3.0)).clamp_min(0.0) / _FLANK).square()
        return -0.5 * q.square()

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw q from the prior, shape (count,)."""
        normal, uniform = rng.standard_normal(count), rng.uniform(-1.0, 1.0, count)
        if self.kind != "box":
            return normal
        inside = 2 * math.sqrt(3.0)
        flank = rng.random(count) < _FLANK * math.sqrt(2 * math.pi) / (
            inside + _FLANK * math.sqrt(2 * math.pi)
        )
        return np.where(
            flank, np.sign(uniform) * (math.sqrt(3.0) + _FLANK * np.abs(normal)), math.sqrt(3.0) * uniform
        )


@dataclass(frozen=True)
class Profiles:
    """Profiles of a batch of parameter vectors on the model's grid.

    Attributes:
        log_density: ln ρ, shape (*, k).
        halo_slopes: γ at the halo's knots, shape (*, K).
        log_number: ln n + const, shape (*, k).
        tracer_slopes: −dln n/dln r at the tracer's knots, shape (*, K').
        anisotropy: β(r).
    """

    log_density: Tensor
    halo_slopes: Tensor
    log_number: Tensor
    tracer_slopes: Tensor
    anisotropy: Anisotropy


class GalaxyModel:
    """ρ(r), n(r), β(r) and the nuisance parameters of one galaxy.

    Arguments:
        settings: The fit's settings.
        half_radius: Projected half-light radius in kpc, the unit of the knots.
        tracer_range: First and last knot of the tracer's slope in kpc.
        log_density_guess: Centre of the prior of ln ρ at the half-light radius.
        nuisance: Priors of the nuisance parameters, whatever the likelihood needs.
    """

    def __init__(
        self,
        settings: HaloFitSettings,
        half_radius: float,
        tracer_range: tuple[float, float],
        log_density_guess: float,
        nuisance: list[Prior] | None = None,
    ) -> None:
        self.settings = settings
        self.half_radius = float(half_radius)
        self.tracer_range = (float(tracer_range[0]), float(tracer_range[1]))
        self.log_density_guess = float(log_density_guess)
        self.nuisance = list(nuisance or [])
        self.grid = log_grid(self.half_radius)
        self.halo = SlopeProfile(self.half_radius * np.array(settings.halo.knots), self.half_radius)
        self.tracer = SlopeProfile(np.geomspace(*self.tracer_range, settings.tracer.knots), self.half_radius)
        self._halo_basis = self.halo.basis(self.grid).T.contiguous()
        self._tracer_basis = self.tracer.basis(self.grid).T.contiguous()
        self.priors = [*self._halo_priors(), *self._tracer_priors(), *self._beta_priors(), *self.nuisance]
        self.free = [p for p in self.priors if p.kind != "fixed"]
        self.index = {p.name: i for i, p in enumerate(self.free)}

    def _halo_priors(self) -> list[Prior]:
        s = self.settings.halo
        priors = [
            Prior("log_density", "normal", self.log_density_guess, s.log_density_sd),
            Prior("halo_slope", "box", *s.inner_slope),
        ]
        for i, (a, b) in enumerate(zip(s.knots, s.knots[1:], strict=False)):
            octaves = math.log(b / a) / _STEP
            # a random walk: the mean grows with the interval, the variance too
            priors.append(
                Prior(
                    f"halo_growth_{i}",
                    "normal",
                    s.steepening * octaves,
                    s.steepening_sd * math.sqrt(octaves),
                )
            )
        return priors

    def _tracer_priors(self) -> list[Prior]:
        s = self.settings.tracer
        growth = [
            Prior(f"tracer_growth_{i}", "normal", s.steepening, s.steepening_sd) for i in range(s.knots - 1)
        ]
        return [Prior("tracer_slope", "box", *s.inner_slope), *growth]

    def _beta_priors(self) -> list[Prior]:
        s = self.settings.anisotropy

        def prior(name: str, given: float | None, low: float, high: float, mapping: Any = None) -> Prior:
            if given is not None:
                return Prior(name, "fixed", mapping(given) if mapping else given)
            return Prior(name, "uniform", low, high)

        def sym(value: float) -> float:
            return float(symmetric(torch.tensor(value, dtype=torch.float64)))

        radius = prior(
            "beta_log_radius",
            s.radius,
            math.log(s.radius_range[0] * self.half_radius),
            math.log(s.radius_range[1] * self.half_radius),
            math.log,
        )
        if s.kind == "osipkov_merritt":
            return [radius]
        if s.kind == "constant":
            return [prior("beta_inner", s.inner, *s.inner_range, mapping=sym)]
        if s.kind == "baes_van_hese":
            return [
                prior("beta_inner", s.inner, *s.inner_range, mapping=sym),
                prior("beta_outer", s.outer, *s.outer_range, mapping=sym),
                radius,
                prior("beta_exponent", s.exponent, *s.exponent_range),
            ]
        return []

    @property
    def size(self) -> int:
        """Number of free parameters."""
        return len(self.free)

    def values(self, q: Tensor) -> dict[str, Tensor]:
        """Every parameter by name, each of shape (*), of q of shape (*, size)."""
        result = {}
        for prior in self.priors:
            if prior.kind == "fixed":
                result[prior.name] = torch.full_like(q[..., 0], prior.a)
            else:
                result[prior.name] = prior.value(q[..., self.index[prior.name]])
        return result

    def profiles(self, values: dict[str, Tensor]) -> Profiles:
        """The profiles of parameters as `values` gives them."""
        monotone = self.settings.halo.monotone

        def walk(first: str, growth: str, count: int, positive: bool) -> Tensor:
            steps = [values[first]]
            for i in range(count - 1):
                step = values[f"{growth}_{i}"]
                steps.append(torch.nn.functional.softplus(step, beta=8.0) if positive else step)
            return torch.stack(steps, -1).cumsum(-1)

        halo_slopes = walk("halo_slope", "halo_growth", len(self.halo.knots), monotone)
        tracer_slopes = walk("tracer_slope", "tracer_growth", len(self.tracer.knots), False)
        log_density = torch.cat([values["log_density"][..., None], halo_slopes], -1) @ self._halo_basis
        log_number = torch.cat([torch.zeros_like(tracer_slopes[..., :1]), tracer_slopes], -1)
        return Profiles(
            log_density=log_density,
            halo_slopes=halo_slopes,
            log_number=log_number @ self._tracer_basis,
            tracer_slopes=tracer_slopes,
            anisotropy=self.anisotropy(values),
        )

    def anisotropy(self, values: dict[str, Tensor]) -> Anisotropy:
        """β(r) of parameters as `values` gives them."""
        kind = self.settings.anisotropy.kind
        some = values["log_density"]
        zero, one = torch.zeros_like(some), torch.ones_like(some)
        if kind == "isotropic":
            return Anisotropy(zero, zero, one, one)
        if kind == "constant":
            beta = unsymmetric(values["beta_inner"])
            return Anisotropy(beta, beta, one, one)
        radius = torch.exp(values["beta_log_radius"])
        if kind == "osipkov_merritt":
            return Anisotropy(zero, one, radius, 2 * one)
        return Anisotropy(
            unsymmetric(values["beta_inner"]),
            unsymmetric(values["beta_outer"]),
            radius,
            values["beta_exponent"],
        )

    def draw_prior(self, count: int, seed: int) -> Tensor:
        """Draw q from the prior, shape (count, size)."""
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0x9A10]))
        return torch.from_numpy(np.stack([prior.draw(rng, count) for prior in self.free], -1))

    def log_prior(self, q: Tensor) -> Tensor:
        """Give ln prior + const of q, shape (*, size) → (*)."""
        return torch.stack([prior.log_prior(q[..., i]) for i, prior in enumerate(self.free)]).sum(0)

    def to_dict(self) -> dict[str, Any]:
        """The model as plain JSON values; `from_dict` builds it again."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "half_radius": self.half_radius,
            "tracer_range": list(self.tracer_range),
            "log_density_guess": self.log_density_guess,
            "nuisance": [[p.name, p.kind, p.a, p.b] for p in self.nuisance],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GalaxyModel:
        """Build the model that `to_dict` described."""
        return cls(
            HaloFitSettings.model_validate(data["settings"]),
            data["half_radius"],
            tuple(data["tracer_range"]),
            data["log_density_guess"],
            [Prior(*entry) for entry in data["nuisance"]],
        )


def virial_log_density(half_radius: float, dispersion: float) -> float:
    """Give ln ρ(R_half) in Msun/kpc³ if M(<4R_half/3) = 4 R_half σ²/G and γ = 1 (Wolf et al. 2010)."""
    radius = 4 / 3 * half_radius
    mass = 4 * half_radius * dispersion**2 / G
    return math.log(2 * mass / (4 * math.pi * radius**3)) + math.log(radius / half_radius)
