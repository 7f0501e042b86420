"""From posteriors of one galaxy to what is asked of it: profiles, masses, J- and D-factors, core or cusp."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galray.dwarf.annihilation import d_factor, j_factor, tidal_radius
from galray.dwarf.core_or_cusp import verdict
from galray.dwarf.mass_estimators import walker_mass, wolf_mass
from galray.dwarf.pooled import PooledHalo, SampledHalo, stretch_of
from galray.dwarf.product_settings import ProductSettings

__all__ = ["LEVELS", "Products", "Quantity"]

Array = NDArray[np.float64]

LEVELS = (0.025, 0.16, 0.5, 0.84, 0.975)
"""Quantiles of every product: the median with its 68 and 95 % bands."""

_STAR_RADII = 80

_LEAST_DARK = 1e-3
"""Where stars would outweigh all mass, the dark density is this part of the total."""


@dataclass(frozen=True)
class Quantity:
    """A number with its posterior.

    Arguments:
        name: Such as ``rho_dm_150pc``.
        label: In words.
        unit: As astropy spells it.
        quantiles: At `LEVELS`.
        terms: Parts of the error: ``fit``, ``seeds``, ``bootstrap``, ``variants``; see `Products`.
        note: What must be known to use it.
        truth: The truth of a mock; None otherwise.
    """

    name: str
    label: str
    unit: str
    quantiles: tuple[float, float, float, float, float]
    terms: dict[str, float] = field(default_factory=dict)
    note: str = ""
    truth: float | None = None

    @property
    def value(self) -> float:
        """The median."""
        return self.quantiles[2]

    @property
    def minus(self) -> float:
        """68 % error downwards."""
        return self.quantiles[2] - self.quantiles[1]

    @property
    def plus(self) -> float:
        """68 % error upwards."""
        return self.quantiles[3] - self.quantiles[2]


class Products:
    """All products of one galaxy.

    The posterior is that of the base members (same model, other seeds) pooled. Beside its 68 and 95 %
    bands each quantity has terms: ``fit``, the mean posterior width of one member; ``seeds``, the standard
    deviation of the base members' medians (noise of the sampling); ``bootstrap``, that of fits to resampled
    stars about the base (a check: it repeats ``fit``); ``variants``, the root mean square shift of the fits
    with one assumption changed, an error that the bands do not hold.

    Arguments:
        base: Posteriors of the base members.
        settings: What to make.
        stellar_mass: Of the stars, Msun, taken off the total density.
        distance: kpc; NaN where there is none: no J and D then.
        outermost: Circularised radius of the outermost member star, kpc.
        dispersion: Velocity dispersion of the stars by maximum likelihood, km/s.
        half_light: Published half-light radius and its error, kpc; NaN takes the posterior's.
        bootstraps: Posteriors of resampled stars.
        variants: Posteriors of the variants by name.
        seed: Of the stars' mass-to-light draws.
    """

    def __init__(
        self,
        base: Sequence[SampledHalo],
        settings: ProductSettings,
        *,
        stellar_mass: float = 0.0,
        distance: float = np.nan,
        outermost: float,
        dispersion: float,
        half_light: tuple[float, float] = (np.nan, np.nan),
        bootstraps: Sequence[SampledHalo] = (),
        variants: Mapping[str, SampledHalo] | None = None,
        seed: int = 0,
    ) -> None:
        self.settings = settings
        self.base = list(base)
        self.halo = PooledHalo(base)
        self.bootstraps, self.variants = list(bootstraps), dict(variants or {})
        self.distance, self.outermost, self.dispersion = distance, outermost, dispersion
        self.stellar_mass, self._seed = stellar_mass, seed
        self.half_radius = float(np.median(self.halo.half_light_radius()))
        self.half_light = half_light if np.isfinite(half_light[0]) else (self.half_radius, 0.0)
        low, high = settings.radii
        self.r = self.half_radius * np.geomspace(low, high, settings.num_radii)
        self.notes: list[str] = []

    # Dark matter: what the stars do not weigh -----------------------------------------------------------

    def dark_density(self, halo: SampledHalo, r: Array) -> Array:
        """ρ_DM(r) = ρ − M★ n(r), shape (S, k), Msun/kpc³."""
        rho = np.asarray(halo.density(r))
        return np.maximum(rho - self._stars(halo, r), _LEAST_DARK * rho)

    def dark_slope(self, halo: SampledHalo, r: Array) -> Array:
        """γ_DM(r) = −dln ρ_DM/dln r, shape (S, k)."""
        if self.stellar_mass == 0:
            return np.asarray(halo.slope(r))
        step = 0.02
        outer, inner = (np.log(self.dark_density(halo, r * math.exp(s))) for s in (step, -step))
        return -(outer - inner) / (2 * step)

    def _stars(self, halo: SampledHalo, r: Array) -> Array:
        if self.stellar_mass == 0:
            return np.zeros(())
        n = _number_density(halo, r)
        rng = np.random.default_rng(self._seed)
        scatter = 10 ** (self.settings.stellar_mass_scatter * rng.standard_normal((len(n), 1)))
        # the stars were weighed by their light: further away they are brighter, and heavier
        return self.stellar_mass * stretch_of(halo)[:, None] ** 2 * scatter * n

    # Numbers -------------------------------------------------------------------------------------------

    def quantities(self) -> list[Quantity]:
        """Central density, masses beside the estimators, slopes, half-light radius, J- and D-factors."""
        at, where = np.array([self.settings.central_radius]), _length(self.settings.central_radius)
        half = np.array([self.half_radius])
        found = [
            self._quantity(f"rho_{where}", f"density at {where}", "solMass / kpc3", lambda h: h.density(at)),
            self._quantity(
                f"rho_dm_{where}",
                f"dark density at {where}",
                "solMass / kpc3",
                lambda h: self.dark_density(h, at),
            ),
            self._quantity(
                f"gamma_dm_{where}", f"dark slope at {where}", "", lambda h: self.dark_slope(h, at)
            ),
            self._quantity(
                "mass_half",
                f"mass within R_half = {self.half_radius:.3g} kpc",
                "solMass",
                lambda h: h.mass(half),
            ),
            self._quantity(
                "mass_half_3d",
                f"mass within 4 R_half/3 = {4 / 3 * self.half_radius:.3g} kpc",
                "solMass",
                lambda h: h.mass(4 / 3 * half),
            ),
            self._quantity(
                "half_light_radius",
                "projected half-light radius",
                "kpc",
                lambda h: h.half_light_radius()[:, None],
            ),
        ]
        if np.isfinite(self.distance):
            found += self._annihilation()
        return found

    def estimators(self) -> list[dict[str, Any]]:
        """Masses by one dispersion and one radius beside the posterior's at the same radius."""
        radius = self.half_light[0]
        rows = []
        for label, at, value in (
            ("Walker et al. 2009", radius, walker_mass(self.dispersion, radius)),
            ("Wolf et al. 2010", 4 / 3 * radius, wolf_mass(self.dispersion, radius)),
        ):
            own = np.quantile(self.halo.mass(np.array([at]))[:, 0], LEVELS)
            rows.append(
                {"estimator": label, "radius_kpc": at, "mass": float(value), "posterior": own.tolist()}
            )
        return rows

    def _annihilation(self) -> list[Quantity]:
        half_angle = math.degrees(math.atan(self.half_radius / self.distance))
        angles = [(f"{angle:g}deg", f"{angle:g}°", angle) for angle in self.settings.angles]
        angles.append(("half_light", f"{half_angle:.2f}° (half light)", half_angle))
        note = self._truncation_words()
        dark_of: dict[int, _Dark] = {}
        found = []
        for name, words, angle in angles:
            for symbol, unit, factor in (
                ("j", "GeV2 / cm5", j_factor),
                ("d", "GeV / cm2", d_factor),
            ):

                def value(h: SampledHalo, factor: Any = factor, angle: float = angle) -> Array:
                    dark = dark_of.setdefault(id(h), _Dark(self, h))
                    limit = self.truncation(h)
                    # ρ and r of each sample are those at its own distance: J ∝ s⁻³ where D has an error
                    distance = self.distance * stretch_of(h)
                    return np.log10(factor(dark, distance, angle, limit))[:, None]

                label = f"log10 {symbol.upper()} within {words}"
                found.append(self._quantity(f"log10_{symbol}_{name}", label, f"dex({unit})", value, note))
        return found

    def truncation(self, halo: SampledHalo) -> Array:
        """Radius at which the halo ends, of each sample, kpc."""
        choice, stretch = self.settings.truncation, stretch_of(halo)
        limit: Array
        if choice == "tidal":
            limit = tidal_radius(lambda r: np.asarray(halo.mass(r)), self.distance, self.settings.host_speed)
        else:
            limit = self.outermost * stretch if choice == "outermost" else choice + 0 * stretch
        return np.minimum(limit, 0.5 * self.distance * stretch)

    def _truncation_words(self) -> str:
        choice = self.settings.truncation
        if choice == "outermost":
            return f"halo cut at the outermost member, {self.outermost:.3g} kpc"
        if choice == "tidal":
            tidal = np.median(self.truncation(self.halo))
            return f"halo cut at the tidal radius, about {tidal:.3g} kpc"
        return f"halo cut at {choice:g} kpc"

    def _quantity(self, name: str, label: str, unit: str, of: Any, note: str = "") -> Quantity:
        members = [np.asarray(of(halo))[:, 0] for halo in self.base]
        least = min(len(samples) for samples in members)
        pooled = np.concatenate([s[np.linspace(0, len(s) - 1, least).round().astype(int)] for s in members])
        levels = np.quantile(pooled, LEVELS)
        medians = np.array([np.median(samples) for samples in members])
        terms = {"fit": float(np.mean([_half_width(samples) for samples in members]))}
        if len(members) > 1:
            terms["seeds"] = float(medians.std(ddof=1))
        if self.bootstraps:
            other = np.array([np.median(np.asarray(of(halo))[:, 0]) for halo in self.bootstraps])
            terms["bootstrap"] = float(np.sqrt(np.mean((other - levels[2]) ** 2)))
        if self.variants:
            other = np.array([np.median(np.asarray(of(halo))[:, 0]) for halo in self.variants.values()])
            terms["variants"] = float(np.sqrt(np.mean((other - levels[2]) ** 2)))
        a, b, c, d, e = (float(level) for level in levels)
        return Quantity(name, label, unit, (a, b, c, d, e), terms, note)

    # Profiles ------------------------------------------------------------------------------------------

    def profiles(self) -> dict[str, Array]:
        """Quantiles at `LEVELS` of every profile at the radii `r`, each of shape (5, k)."""
        halo, r = self.halo, self.r
        samples = {
            "density": halo.density(r),
            "dark_density": self.dark_density(halo, r),
            "mass": halo.mass(r),
            "slope": halo.slope(r),
            "dark_slope": self.dark_slope(halo, r),
            "number_density": halo.number_density(r),
            "surface_density": halo.surface_density(r),
            "dispersion_los": halo.dispersion_los(r),
            "dispersion_r": halo.dispersion_r(r),
            "anisotropy": halo.anisotropy(r),
        }
        return {name: np.quantile(values, LEVELS, axis=0) for name, values in samples.items()}

    def core_or_cusp(self) -> dict[str, Any]:
        """The verdict on the halo from γ_DM at the central radius, against the prior's own odds."""
        at = np.array([self.settings.central_radius])
        prior = None
        first = self.base[0]
        if hasattr(first, "prior"):
            prior = np.asarray(first.prior().slope(at))[:, 0]
        slope = self.dark_slope(self.halo, at)[:, 0]
        rho = np.asarray(self.halo.density(at))
        heavy = float(np.mean(self.dark_density(self.halo, at) <= 1.001 * _LEAST_DARK * rho))
        if heavy > 0.01:
            self.notes.append(
                f"at {_length(self.settings.central_radius)} the stars alone would outweigh all mass in "
                f"{100 * heavy:.0f} % of the samples: their mass-to-light ratio limits the dark density there"
            )
        found = verdict(slope, self.settings, prior)
        levels = [float(level) for level in np.quantile(slope, LEVELS)]
        return found | {"slope": levels, "radius_kpc": self.settings.central_radius}


class _Dark:
    """ρ_DM(r) of one posterior as a function of radius, which keeps its last values: angles share them."""

    def __init__(self, products: Products, halo: SampledHalo) -> None:
        self._products, self._halo = products, halo
        self._last: tuple[Array, Array] | None = None

    def __call__(self, r: Array) -> Array:
        if self._last is None or not np.array_equal(self._last[0], r):
            self._last = (r, self._products.dark_density(self._halo, r))
        return self._last[1]


def _number_density(halo: SampledHalo, r: Array) -> Array:
    """n(r), on many radii from fewer of them: samples at other distances need a matrix of their own each."""
    if len(r) <= _STAR_RADII:
        return np.asarray(halo.number_density(r))
    coarse = np.geomspace(r[0], r[-1], _STAR_RADII)
    logs = np.log(np.asarray(halo.number_density(coarse)))
    return np.exp(np.stack([np.interp(np.log(r), np.log(coarse), row) for row in logs]))


def _half_width(samples: Array) -> float:
    low, high = np.quantile(samples, (0.16, 0.84))
    return float(0.5 * (high - low))


def _length(radius: float) -> str:
    return f"{1000 * radius:g}pc" if radius < 1 else f"{radius:g}kpc"
