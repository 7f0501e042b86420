"""The settings of a dwarf galaxy's fit: tracers, anisotropy, halo, likelihood and sampler."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from galray.settings import Settings

__all__ = [
    "AnisotropySettings",
    "HaloFitSettings",
    "HaloSettings",
    "LikelihoodSettings",
    "SamplerSettings",
    "TracerSettings",
]


def _check_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    if not low <= value[0] < value[1] <= high:
        raise ValueError(f"{name} = {value} must rise within [{low:g}, {high:g}]")


class TracerSettings(Settings):
    """The stars' own density n(r): its logarithmic slope is piecewise linear in ln r."""

    knots: int = Field(default=7, ge=3, le=20)
    """Knots of the slope, equidistant in ln r over the bulk of the stars."""
    inner_slope: tuple[float, float] = (-0.2, 2.2)
    """Flat prior of γ* = −dln n/dln r inside the first knot."""
    steepening: float = Field(default=0.8, ge=0)
    """Prior mean of the slope's growth from knot to knot."""
    steepening_sd: float = Field(default=1.2, gt=0)
    """Prior standard deviation of that growth."""

    @model_validator(mode="after")
    def _ordered(self) -> TracerSettings:
        _check_range("tracer.inner_slope", self.inner_slope, -1.0, 2.9)
        return self


class AnisotropySettings(Settings):
    """β(r) = 1 − σ_t²/(2σ_r²), σ_t² being both tangential components together.

    Every kind is a case of Baes & van Hese (2007):
    β = [β0 + β∞ (r/r_a)^η] / [1 + (r/r_a)^η]. A value that is given is fixed; one that is not is
    marginalised over its prior.
    """

    kind: Literal["isotropic", "constant", "osipkov_merritt", "baes_van_hese"] = "baes_van_hese"
    """isotropic: β = 0; constant: β0 alone; osipkov_merritt: β0 = 0, β∞ = 1, η = 2; baes_van_hese: all."""
    inner: float | None = Field(default=None, lt=1)
    """β0 (constant, baes_van_hese); none marginalises."""
    outer: float | None = Field(default=None, le=1)
    """β∞ (baes_van_hese); none marginalises."""
    radius: float | None = Field(default=None, gt=0)
    """r_a in kpc (osipkov_merritt, baes_van_hese); none marginalises."""
    exponent: float | None = Field(default=None, gt=0)
    """η (baes_van_hese); none marginalises."""
    inner_range: tuple[float, float] = (-0.5, 0.5)
    """Flat prior of β0 / (2 − β0), which is −1 for circular and +1 for radial orbits."""
    outer_range: tuple[float, float] = (-0.5, 1.0)
    """Flat prior of β∞ / (2 − β∞)."""
    radius_range: tuple[float, float] = (0.3, 10.0)
    """Flat prior of ln r_a between these multiples of the half-light radius."""
    exponent_range: tuple[float, float] = (1.0, 3.0)
    """Flat prior of η."""

    @model_validator(mode="after")
    def _consistent(self) -> AnisotropySettings:
        _check_range("anisotropy.inner_range", self.inner_range, -1.0, 1.0)
        _check_range("anisotropy.outer_range", self.outer_range, -1.0, 1.0)
        _check_range("anisotropy.radius_range", self.radius_range, 1e-3, 1e3)
        _check_range("anisotropy.exponent_range", self.exponent_range, 0.1, 10.0)
        used: set[str] = {
            "isotropic": set(),
            "constant": {"inner"},
            "osipkov_merritt": {"radius"},
            "baes_van_hese": {"inner", "outer", "radius", "exponent"},
        }[self.kind]
        for key in ("inner", "outer", "radius", "exponent"):
            if getattr(self, key) is not None and key not in used:
                raise ValueError(f"anisotropy.{key} means nothing for kind '{self.kind}': remove it")
        return self


class HaloSettings(Settings):
    """The dark halo ρ(r): positive, its slope γ = −dln ρ/dln r piecewise linear in ln r."""

    knots: tuple[float, ...] = Field(default=(0.25, 0.5, 1.0, 2.0, 4.0, 8.0), min_length=2)
    """Radii of the slope's knots in projected half-light radii, rising."""
    inner_slope: tuple[float, float] = (-0.3, 2.0)
    """Flat prior of γ inside the first knot: cores and cusps alike."""
    steepening: float = Field(default=0.3, ge=-3, le=5)
    """Prior mean of the slope's growth per factor 2 in radius (an NFW halo has 0 to 0.35)."""
    steepening_sd: float = Field(default=0.4, gt=0)
    """Prior standard deviation of that growth: the smoothness of the halo."""
    monotone: bool = False
    """Let the slope never flatten outwards: a growth below zero then counts as (nearly) none, so that its
    prior has a peak at zero."""
    log_density_sd: float = Field(default=2.0, gt=0, le=20)
    """Prior standard deviation of ln ρ(R_half) about the value of the virial estimate."""

    @model_validator(mode="after")
    def _consistent(self) -> HaloSettings:
        _check_range("halo.inner_slope", self.inner_slope, -1.0, 2.9)
        if any(b <= a for a, b in zip(self.knots, self.knots[1:], strict=False)) or self.knots[0] <= 0:
            raise ValueError("halo.knots must rise and be positive")
        return self


class LikelihoodSettings(Settings):
    """What the stars are compared with."""

    velocities: Literal["fourth_moment", "gaussian"] = "fourth_moment"
    """The line-of-sight velocity distribution at R: σ_los and kurtosis from the Jeans equations of second
    and fourth order, or σ_los alone in a Gaussian."""
    positions: Literal["auto", "stars", "photometry"] = "auto"
    """What fixes n(r): the stars with velocities (a fair sample), photometry, or photometry where given."""
    membership: Literal["auto", "weights", "mixture", "none"] = "auto"
    """weights: each star counts by its membership probability; mixture: a foreground component with its
    own fraction and velocities is fitted; none: all are members; auto: weights where there are some."""
    foreground_mean: tuple[float, float] | None = None
    """Mixture: prior mean and standard deviation of the foreground's velocity in km/s; none takes the
    stars' own median and three times their spread."""
    foreground_sigma: tuple[float, float] = (20.0, 150.0)
    """Mixture: range of the foreground's velocity dispersion in km/s (flat in its logarithm)."""
    perspective: bool = False
    """Let the systemic motion across the sky tilt the line-of-sight velocities (needs the distance)."""
    systemic_motion: tuple[float, float, float] | None = None
    """Perspective: systemic velocity along x and along y on the sky and its error, km/s; none leaves
    both free within 300 km/s."""
    ellipticity: float = Field(default=0.0, ge=0, lt=0.9)
    """1 − b/a: radii are circularised, R² = q x'² + y'²/q with q = 1 − ellipticity."""
    position_angle: float = 0.0
    """Of the major axis, degrees from +y (north) towards +x (east)."""
    footprint: float | None = Field(default=None, gt=0)
    """Radius in kpc within which positions are complete; none takes the outermost star."""
    slope_inequality: bool = True
    """Keep the centre's β0 ≤ γ*/2, without which no positive phase-space density of separable form
    exists (An & Evans 2006)."""
    draw_centre: bool = True
    """Shift the centre by a draw from its error, one draw per fit (so per member of an ensemble)."""
    nodes: int = Field(default=200, ge=20)
    """Radii at which the projected moments are evaluated: neighbours in R share one."""

    @model_validator(mode="after")
    def _widths(self) -> LikelihoodSettings:
        _check_range("likelihood.foreground_sigma", self.foreground_sigma, 0.1, 1e4)
        for name in ("foreground_mean", "systemic_motion"):
            value = getattr(self, name)
            if value is not None and value[-1] <= 0:
                raise ValueError(f"likelihood.{name} = {value}: its last number is an error, above 0")
        return self


class SamplerSettings(Settings):
    """Hamiltonian Monte Carlo on whitened parameters, chains side by side."""

    chains: int = Field(default=16, ge=4)
    """Chains that advance together."""
    warmup: int = Field(default=160, ge=20)
    """Steps per chain that tune step size and metric and are then forgotten."""
    draws: int = Field(default=250, ge=50)
    """Steps per chain that are kept."""
    leapfrog: int = Field(default=4, ge=1)
    """Mean leapfrog steps per draw."""
    target_accept: float = Field(default=0.85, gt=0.4, lt=0.99)
    """Acceptance the step size is tuned to."""
    samples: int = Field(default=1000, ge=100)
    """Posterior samples stored, thinned evenly from the draws."""


class HaloFitSettings(Settings):
    """Everything `fit_halo` reads."""

    tracer: TracerSettings = TracerSettings()
    """The stars' density."""
    anisotropy: AnisotropySettings = AnisotropySettings()
    """The stars' velocity anisotropy."""
    halo: HaloSettings = HaloSettings()
    """The dark halo."""
    likelihood: LikelihoodSettings = LikelihoodSettings()
    """The comparison with the data."""
    sampler: SamplerSettings = SamplerSettings()
    """The sampler."""
