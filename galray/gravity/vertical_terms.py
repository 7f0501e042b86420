"""One sample solved in many ways: the variants behind each error term of the vertical inversion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galray.gravity.vertical_moments import (
    FOUR_PI_G,
    DensityBasis,
    MomentFit,
    MomentSums,
    layer_basis,
    moment_sums,
    solve_moments,
)
from galray.gravity.vertical_selection import VerticalSample
from galray.gravity.vertical_settings import VerticalSettings
from galray.gravity.vertical_velocity import VelocityEstimate, vertical_velocities

__all__ = ["VerticalSolver", "error_term", "group_term", "radial_term", "tilt_term", "variant_terms"]

Array = NDArray[np.float64]


class VerticalSolver:
    """Sums and fits of one sample, with the variants that the error terms need."""

    def __init__(self, sample: VerticalSample, settings: VerticalSettings) -> None:
        self.sample, self.settings = sample, settings
        count = max(4, round(settings.height_limit_kpc / settings.bin_kpc))
        self.edges = np.linspace(0.0, settings.height_limit_kpc, count + 1)
        self.pilot = np.full(count, 0.08)
        self.velocity = self.velocities(sample)
        self.sun = 0.018 if settings.sun_height_kpc is None else settings.sun_height_kpc
        self.sun_error = 0.0

    def velocities(self, sample: VerticalSample, low_deg: float | None = None) -> VelocityEstimate:
        """Velocities with the settings' latitude limit, or another (deg)."""
        low = self.settings.low_latitude_deg if low_deg is None else low_deg
        return vertical_velocities(sample, np.radians(low))

    def basis(self, heights: tuple[float, ...] | None = None) -> DensityBasis:
        """Density basis of the settings' layers, or of others (kpc)."""
        return layer_basis(self.edges, self.settings.layer_heights_kpc if heights is None else heights)

    def sums(
        self,
        *,
        sample: VerticalSample | None = None,
        velocity: VelocityEstimate | None = None,
        sun: float | None = None,
        window: float | None = None,
        floor: float | None = None,
        use_area: bool = True,
    ) -> MomentSums:
        """Sums with the settings, except for what is given."""
        sample = self.sample if sample is None else sample
        return moment_sums(
            sample,
            self.velocity if velocity is None else velocity,
            sun_height=self.sun if sun is None else sun,
            height_limit=self.settings.height_limit_kpc,
            num_tests=self.settings.num_tests,
            window=self.settings.velocity_window if window is None else window,
            pilot=self.pilot,
            edges=self.edges,
            area_floor=self.settings.area_floor if floor is None else floor,
            use_area=use_area,
        )

    def fit(self, **changes: Any) -> MomentFit:
        """Solution of `sums(**changes)`."""
        return solve_moments(self.sums(**changes), self.basis())

    def prepare(self) -> None:
        """Find the Sun, and the pilot density that weighs the moments."""
        self.find_sun()
        self.pilot = np.maximum(self.basis().matrix @ self.fit().theta, 0.0)

    def find_sun(self) -> None:
        """The height of the Sun that makes the force vanish in the plane best: minimum of χ²."""
        if self.settings.sun_height_kpc is not None:
            return
        heights = np.linspace(0.0, 0.035, 8)
        chi2 = np.array([self.fit(sun=float(h)).chi2 for h in heights])
        best = int(np.clip(chi2.argmin(), 1, len(heights) - 2))
        near = slice(best - 1, best + 2)
        curve = np.polyfit(heights[near], chi2[near], 2)
        if curve[0] > 0:
            self.sun = float(np.clip(-curve[1] / (2 * curve[0]), heights[0], heights[-1]))
            self.sun_error = float(1 / np.sqrt(curve[0]))
        else:
            self.sun, self.sun_error = float(heights[chi2.argmin()]), 0.005


def error_term(name: str, error: float, count: int, what: str) -> dict[str, Any]:
    """One row of the error budget."""
    return {"term": name, "error": float(error), "count": int(count), "what": what}


def variant_terms(solver: VerticalSolver, sums: MomentSums, central: float) -> list[dict[str, Any]]:
    """Error terms from doing it otherwise: the largest change, or the spread for the density models."""
    settings, sample = solver.settings, solver.sample

    def largest(values: list[float]) -> float:
        return max((abs(value - central) for value in values), default=0.0)

    models = [solve_moments(sums, solver.basis(h)).central[0] for h in settings.other_layers_kpc]
    spread = float(np.std([central, *models], ddof=1)) if models else 0.0
    terms = [error_term("density model", spread, len(models) + 1, "spread over the layers' heights")]
    low = [
        solver.fit(velocity=solver.velocities(sample, deg)).central[0]
        for deg in settings.other_low_latitudes_deg
    ]
    noisier = replace(sample, v_r_variance=sample.v_r_variance * settings.rv_error_scale**2)
    low.append(solver.fit(sample=noisier, velocity=solver.velocities(noisier)).central[0])
    terms.append(
        error_term("velocity selection", largest(low), len(low), "latitude limit, radial-velocity errors")
    )
    floors = [solver.fit(floor=floor).central[0] for floor in settings.other_area_floors]
    terms.append(
        error_term("effective area", largest(floors), len(floors), "which cells with masks are used")
    )
    if settings.parallax_shift_mas > 0:
        moved = [sample.shift_parallax(sign * settings.parallax_shift_mas) for sign in (-1, 1)]
        values = [solver.fit(sample=m, velocity=solver.velocities(m)).central[0] for m in moved]
        terms.append(error_term("parallax zero point", largest(values), 2, "shift of every parallax"))
    if (sample.extinction > 0).any() and settings.dust_scale != 1:
        before, after = (solver_of.central[0] for solver_of in _dust_fits(solver))
        terms.append(
            error_term("dust", abs(after - before), 2, f"A_G × {settings.dust_scale:g} in a narrower window")
        )
    if solver.sun_error > 0:
        values = [solver.fit(sun=solver.sun + sign * solver.sun_error).central[0] for sign in (-1, 1)]
        terms.append(error_term("height of the Sun", largest(values), 2, "one standard error either way"))
    return terms


def _dust_fits(solver: VerticalSolver) -> tuple[MomentFit, MomentFit]:
    """Fits with A_G as given and rescaled, both in a window of absolute magnitude complete in either."""
    sample, scale = solver.sample, solver.settings.dust_scale
    magnitude = sample.absolute_magnitude
    changed = magnitude + (1 - scale) * sample.extinction
    margin = float(np.percentile(np.abs(changed - magnitude), 99))
    bright, faint = (np.empty(len(sample)) for _ in range(2))
    for group in range(len(sample.group_names)):
        own = sample.group == group
        if own.any():
            bright[own], faint[own] = magnitude[own].min() + margin, magnitude[own].max() - margin
    fits = []
    for value in (magnitude, changed):
        chosen = sample.select((value > bright) & (value < faint))
        fits.append(solver.fit(sample=chosen, velocity=solver.velocities(chosen)))
    return fits[0], fits[1]


def group_term(groups: list[dict[str, Any]], statistical: float) -> dict[str, Any]:
    """What the scatter between tracer groups adds to the error of their mean (DerSimonian & Laird 1986)."""
    what = "scatter between tracer groups beyond their own errors"
    if len(groups) < 2:
        return error_term("tracer groups", 0.0, len(groups), what)
    value = np.array([group["rho0"] for group in groups])
    variance = np.array([group["error"] ** 2 for group in groups])
    w = 1 / variance
    mean = (w * value).sum() / w.sum()
    excess = (w * (value - mean) ** 2).sum() - (len(value) - 1)
    tau2 = max(0.0, excess / (w.sum() - (w**2).sum() / w.sum()))
    extra = 1 / (1 / (variance + tau2)).sum() - 1 / w.sum()
    return error_term("tracer groups", float(np.sqrt(max(extra, 0.0))), len(groups), what)


def radial_term(settings: VerticalSettings) -> tuple[float, float]:
    """(1/4πG)(1/R) d(v_c²)/dR = 2(B² − A²)/4πG and its error, Msun/pc³."""
    factor = 2 * settings.circular_speed / settings.solar_radius_kpc / FOUR_PI_G
    return factor * settings.circular_speed_slope, factor * settings.circular_speed_slope_error


def tilt_term(
    sample: VerticalSample, solver: VerticalSolver, settings: VerticalSettings
) -> tuple[float, float]:
    """Density from the tilt of the velocity ellipsoid, with σ_Rz = κ z measured on the stars, Msun/pc³.

    n a_z = ∂_z(n σ_z²) + (1/R) ∂_R(R n σ_Rz); with n σ_Rz falling as exp(−R/h) the second term is
    κ z (1/R − 1/h_n − 1/h_σ), so ρ gains κ (1/h_n + 1/h_σ − 1/R)/4πG. The scales are worth a factor of 1.5.
    """
    known = sample.has_rv
    lon, lat = sample.longitude[known], sample.latitude[known]
    u = sample.v_r[known] * np.cos(lat) * np.cos(lon) - sample.v_l[known] * np.sin(lon)
    u = u - sample.v_b[known] * np.sin(lat) * np.cos(lon) - solver.velocity.mean_motion[0]
    w = solver.velocity.value[known]
    z = sample.height[known] + solver.sun
    near = (np.abs(u) < 100) & (np.abs(w) < 60) & (np.abs(z) < settings.height_limit_kpc)
    z, product = z[near], -u[near] * w[near]
    kappa = float((z * product).sum() / (z**2).sum())
    error = float(np.sqrt((z**2 * product**2).sum()) / (z**2).sum())
    rate = 1 / settings.density_scale_kpc + 1 / settings.dispersion_scale_kpc - 1 / settings.solar_radius_kpc
    value = kappa * rate / FOUR_PI_G
    return value, float(np.hypot(error * rate / FOUR_PI_G, 0.5 * value))
