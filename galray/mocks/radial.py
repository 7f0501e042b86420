"""Radial profiles of a tracer in a spherical potential, tabulated in ln r so that no digits are lost."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline
from torch import Tensor

from galray.errors import GalrayError
from galray.potentials import Potential
from galray.units import G

__all__ = ["CubicTable", "RadialProfiles"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(10)
_SPAN = (-13.0, 11.0)  # of ln(r / half-mass radius)
_STEP = 0.02


class CubicTable:
    """A piecewise cubic in torch: values, first derivatives, and straight lines beyond its ends.

    Arguments:
        x: Increasing nodes, shape (n,).
        y: Values at the nodes, shape (n,).
        slope: Derivatives at the nodes, shape (n,).
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, slope: np.ndarray) -> None:
        spline = CubicHermiteSpline(x, y, slope)
        self.nodes = torch.from_numpy(np.ascontiguousarray(x))
        self._coefficients = torch.from_numpy(np.ascontiguousarray(spline.c.T))  # (n − 1, 4), cubic first

    def __call__(self, x: Tensor) -> Tensor:
        """The value at x, shape (*)."""
        return self.value_and_slope(x)[0]

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The value and the derivative at x, shape (*) each."""
        inside = x.clamp(float(self.nodes[0]), float(self.nodes[-1]))
        index = torch.searchsorted(self.nodes, inside.detach().contiguous(), right=True) - 1
        index = index.clamp(0, len(self.nodes) - 2)
        c = self._coefficients[index].unbind(-1)
        t = inside - self.nodes[index]
        value = c[3] + t * (c[2] + t * (c[1] + t * c[0]))
        slope = c[2] + t * (2 * c[1] + 3 * t * c[0])
        return value + slope * (x - inside), slope


class RadialProfiles:
    """What a tracer and a potential are along the radius.

    Arguments:
        tracer: Its `mass_density` is the tracers' density up to a factor.
        potential: The gravity, spherical, with a finite centre.

    Raises:
        GalrayError: A potential that is not spherical or has an infinite centre, or a tracer whose total
            mass is infinite.
    """

    def __init__(self, tracer: Potential, potential: Potential) -> None:
        self.tracer, self.potential = tracer, potential
        self._refuse_what_is_no_sphere()
        center = self._half_mass_scale()
        self.x = x = math.log(center) + np.arange(_SPAN[0], _SPAN[1] + 0.5 * _STEP, _STEP)
        mass, rest = self._both_ways(lambda t: 4 * math.pi * np.exp(3 * t) * self._tracer_density(t))
        self.total = float(mass[0] + rest[0])
        shell = 4 * math.pi * np.exp(3 * x) * self._tracer_density(x)
        logit = np.log(mass / rest)
        slope = shell * self.total / (mass * rest)
        self._radius_of_logit = CubicTable(logit, x, 1 / slope)
        self.half_mass_radius = math.exp(float(self._radius_of_logit(torch.zeros(1, dtype=torch.float64))[0]))
        depth = self.from_inside(lambda t: self.speed2(torch.from_numpy(t)).numpy())
        speed2 = self.speed2(torch.from_numpy(x)).numpy()
        self._log_rise = CubicTable(x, np.log(depth), speed2 / depth)
        middle = len(x) // 2
        self.central_depth = float(depth[middle] + self.depth(torch.from_numpy(x[middle : middle + 1]))[0])

    # -- functions of x = ln r -------------------------------------------------------------------------

    def density(self, x: Tensor) -> Tensor:
        """ν at ln r, normalised to ∫ν d³x = 1, in kpc⁻³, shape (*)."""
        return self.tracer.mass_density(_on_axis(x)) / self.total

    def speed2(self, x: Tensor) -> Tensor:
        """GM/r = −dΨ/dx in (km/s)² at ln r, shape (*)."""
        r2 = torch.exp(2 * x)
        return r2 * self.potential.force_factors(r2, torch.zeros_like(r2))[0]

    def depth(self, x: Tensor) -> Tensor:
        """Ψ = −Φ in (km/s)² at ln r, shape (*)."""
        return -self.potential.potential(_on_axis(x))

    def rise(self, x: Tensor) -> Tensor:
        """Ψ(0) − Ψ in (km/s)² at ln r without cancellation, shape (*)."""
        return torch.exp(self._log_rise(x))

    def radius_of_mass(self, fraction: np.ndarray) -> np.ndarray:
        """The radius in kpc that holds a fraction (0 < fraction < 1) of the tracers, shape (*)."""
        logit = torch.from_numpy(np.log(fraction) - np.log1p(-fraction))
        return np.exp(self._radius_of_logit(logit).numpy())

    # -- integrals over ln r ---------------------------------------------------------------------------

    def from_inside(self, integrand: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """∫ integrand dx from the centre to each node of `x`; a power law inside the first node."""
        panels = self._panels(integrand)
        return np.cumsum(np.concatenate([[self._tail(integrand, 0, +1)], panels]))

    def from_outside(self, integrand: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """∫ integrand dx from each node of `x` to infinity; a power law outside the last node."""
        panels = self._panels(integrand)
        return np.cumsum(np.concatenate([[self._tail(integrand, -1, -1)], panels[::-1]]))[::-1]

    def _both_ways(self, integrand: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return self.from_inside(integrand), self.from_outside(integrand)

    def _panels(self, integrand: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        t = self.x[:-1, None] + 0.5 * _STEP * (_NODES + 1)
        return np.asarray(integrand(t) @ (0.5 * _STEP * _WEIGHTS))

    def _tail(self, integrand: Callable[[np.ndarray], np.ndarray], end: int, sign: int) -> float:
        """What lies beyond one end, where the integrand is a power of r."""
        edge = self.x[end]
        here, beside = integrand(np.array([edge, edge - sign * 1e-3]))
        power = -(math.log(abs(beside)) - math.log(abs(here))) / 1e-3 if here else math.inf
        return float(here / -power) if power < 0 else float(here / power)

    def _tracer_density(self, x: np.ndarray) -> np.ndarray:
        return self.tracer.mass_density(_on_axis(torch.from_numpy(x))).numpy()

    # -- checks ----------------------------------------------------------------------------------------

    def _refuse_what_is_no_sphere(self) -> None:
        one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for name, field in (("tracer", self.tracer), ("potential", self.potential)):
            along, across = field.force_factors(one, none)[0], field.force_factors(none, one)[1]
            if not torch.allclose(along, across, rtol=1e-9):
                raise GalrayError(f"the {name} {field!r} is not a sphere", "give a spherical potential")
        tiny = torch.log(torch.tensor([1e-8, 1e-7], dtype=torch.float64))
        inner = torch.diff(self.speed2(tiny).log()) / math.log(10.0)
        if float(inner) < 0.02:
            raise GalrayError(
                f"the potential {self.potential!r} is infinite at its centre",
                "give an inner density slope gamma < 2",
            )

    def _half_mass_scale(self) -> float:
        """The half-mass radius in kpc, roughly, by bisection of M(<r) from the tracer's own gravity."""

        def mass(log_r: float) -> float:
            r2 = torch.tensor([math.exp(2 * log_r)], dtype=torch.float64)
            return math.exp(3 * log_r) * float(self.tracer.force_factors(r2, 0 * r2)[0]) / G

        far = 25.0
        if mass(far) > 1.02 * mass(far - 5.0):
            raise GalrayError(
                f"the tracer {self.tracer!r} has an infinite mass", "give an outer density slope beta > 3"
            )
        low, high, goal = -25.0, far, 0.5 * mass(far)
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if mass(middle) < goal else (low, middle)
        return math.exp(low)


def _on_axis(x: Tensor) -> Tensor:
    r = torch.exp(x)
    none = torch.zeros_like(r)
    return torch.stack([r, none, none], -1)
