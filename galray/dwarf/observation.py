"""The stars of one galaxy as they are seen: offsets on the sky in kpc, velocities, memberships, its light."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from galray.dwarf.light import king_radii, plummer_radii, sersic_radii
from galray.units import K_PROPER_MOTION

if TYPE_CHECKING:
    from galray.dwarf.settings import HaloFitSettings
    from galray.dwarf.tracers import Tracers

__all__ = ["Galaxy", "Observation", "counted", "sky_offsets"]

Array = NDArray[np.float64]

_LIGHT_STARS = 2000
"""Stars that stand for a published profile of the light: it is as certain as their number, 2 %."""
_GOLDEN = np.pi * (3 - np.sqrt(5))


def counted(account: Mapping[str, int]) -> str:
    """The fate of rows in words: what did not happen is left out."""
    return ", ".join(f"{name} {count:,}" for name, count in account.items() if count)


@dataclass(frozen=True)
class Galaxy:
    """What is known of a galaxy as a whole; NaN where it is not.

    Arguments:
        name: Its name.
        ra, dec: Centre, deg; NaN for data that are offsets already.
        distance, distance_error: kpc.
        centre_error: Of the centre along each axis, kpc.
        r_half, r_half_error: Circularised half-light radius, kpc.
        ellipticity: 1 − b/a on the sky.
        position_angle: Of the major axis, deg, from y (north) to x (east).
        velocity: Systemic heliocentric velocity, km/s.
        pmra, pmdec: Systemic proper motion, mas/yr.
        pmra_error, pmdec_error: Their errors.
        stellar_mass: Mass of the stars, Msun; 0 for massless tracers.
        light: Published profile of the light, circularised, kpc: ``("sersic", R_e, n)``,
            ``("king", R_c, R_t)`` or ``("plummer", a, 0)``; None where there is none.
    """

    name: str
    ra: float = np.nan
    dec: float = np.nan
    distance: float = np.nan
    distance_error: float = 0.0
    r_half: float = np.nan
    r_half_error: float = np.nan
    ellipticity: float = 0.0
    position_angle: float = 0.0
    velocity: float = np.nan
    pmra: float = np.nan
    pmra_error: float = np.nan
    pmdec: float = np.nan
    pmdec_error: float = np.nan
    stellar_mass: float = 0.0
    centre_error: float = 0.0
    light: tuple[str, float, float] | None = None

    @property
    def has_proper_motion(self) -> bool:
        """Whether the systemic proper motion is known."""
        return bool(np.isfinite(self.pmra) and np.isfinite(self.pmdec))


@dataclass(frozen=True)
class Observation:
    """The members of a galaxy with velocities, and where there is photometry, its light.

    Arguments:
        galaxy: The galaxy as a whole.
        x, y: Offsets from the centre, east and north (or as in the file), kpc, shape (N,).
        velocity, velocity_error: Along the line of sight, km/s; heliocentric where the sky is known.
        membership: Probability of each star to belong to the galaxy.
        light_x, light_y, light_weight: Stars of the photometric sample, a fair sample of the light; empty
            without one.
        pm_x, pm_y, pm_x_error, pm_y_error: Proper motions about the galaxy's own, km/s; empty without.
        account: The fate of every row of the velocity file.
        light_account: The same of the photometry.
        notes: What else was noticed, in words.
        sources: Files and their checksums.
    """

    galaxy: Galaxy
    x: Array
    y: Array
    velocity: Array
    velocity_error: Array
    membership: Array
    light_x: Array = field(default_factory=lambda: np.empty(0))
    light_y: Array = field(default_factory=lambda: np.empty(0))
    light_weight: Array = field(default_factory=lambda: np.empty(0))
    pm_x: Array = field(default_factory=lambda: np.empty(0))
    pm_y: Array = field(default_factory=lambda: np.empty(0))
    pm_x_error: Array = field(default_factory=lambda: np.empty(0))
    pm_y_error: Array = field(default_factory=lambda: np.empty(0))
    account: dict[str, int] = field(default_factory=dict)
    light_account: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def num_members(self) -> float:
        """Sum of the membership probabilities."""
        return float(self.membership.sum())

    @property
    def radius(self) -> Array:
        """Circularised distance of each star with a velocity from the centre, kpc, shape (N,)."""
        return self.tracers().radius(self.galaxy.ellipticity, self.galaxy.position_angle)

    @property
    def light_radius(self) -> Array:
        """Circularised distance of each star of the light's sample from the centre, kpc."""
        own = (self.galaxy.ellipticity, self.galaxy.position_angle)
        return self.tracers().radius(*own, photometry=True)

    @property
    def outermost(self) -> float:
        """Circularised radius of the outermost probable member with a velocity, kpc."""
        return float(self.radius[self.membership > 0.5].max(initial=0.0))

    def with_published_light(self) -> Observation:
        """Put stars in the place of photometry that follow the galaxy's published profile of light.

        One star stands at each middle quantile of the circularised profile, at angles that fill the
        ellipse evenly, so that nothing is random.
        """
        if self.galaxy.light is None:
            return self
        kind, first, second = self.galaxy.light
        if kind == "sersic":
            radius = sersic_radii(first, second, _LIGHT_STARS)
        elif kind == "king":
            radius = king_radii(first, second, _LIGHT_STARS)
        else:
            radius = plummer_radii(first, _LIGHT_STARS)
        q, angle = 1 - self.galaxy.ellipticity, np.radians(self.galaxy.position_angle)
        around = _GOLDEN * np.arange(_LIGHT_STARS)
        major, minor = radius * np.cos(around) / np.sqrt(q), radius * np.sin(around) * np.sqrt(q)
        return replace(
            self,
            light_x=major * np.sin(angle) + minor * np.cos(angle),
            light_y=major * np.cos(angle) - minor * np.sin(angle),
            light_weight=np.ones(_LIGHT_STARS),
        )

    def tracers(self) -> Tracers:
        """The stars as a fit reads them."""
        from galray.dwarf.tracers import Tracers

        known = np.isfinite(self.galaxy.distance)
        on_sky = np.isfinite(self.galaxy.ra) and np.isfinite(self.galaxy.dec)
        moving = len(self.pm_x) > 0
        light = len(self.light_x) > 0
        return Tracers(
            x=self.x,
            y=self.y,
            v=self.velocity,
            v_error=self.velocity_error,
            membership=None if bool((self.membership == 1).all()) else self.membership,
            vx=self.pm_x if moving else None,
            vy=self.pm_y if moving else None,
            vx_error=self.pm_x_error if moving else None,
            vy_error=self.pm_y_error if moving else None,
            photometry_x=self.light_x if light else None,
            photometry_y=self.light_y if light else None,
            photometry_membership=self.light_weight if light else None,
            distance_kpc=self.galaxy.distance if known else None,
            distance_error_kpc=self.galaxy.distance_error if known else 0.0,
            centre_error_kpc=self.galaxy.centre_error,
            direction=(self.galaxy.ra, self.galaxy.dec) if on_sky else None,
            name=self.galaxy.name,
        )

    def adapted(self, settings: HaloFitSettings, *, perspective: bool = True) -> HaloFitSettings:
        """A fit's settings with what is known of this galaxy: its shape, its motion across the sky.

        Arguments:
            settings: The fit's settings.
            perspective: Let the motion across the sky, a parameter with the measured value as its prior, tilt
                the line-of-sight velocities; needs sky positions and a known proper motion.
        """
        g = self.galaxy
        changes: dict[str, object] = {
            "ellipticity": g.ellipticity,
            "position_angle": g.position_angle,
        }
        if perspective and g.has_proper_motion and np.isfinite(g.ra):
            scale = K_PROPER_MOTION * g.distance
            error = scale * float(np.hypot(g.pmra_error, g.pmdec_error)) / np.sqrt(2)
            changes |= {
                "perspective": True,
                "systemic_motion": (scale * g.pmra, scale * g.pmdec, max(error, 1.0)),
            }
        return settings.model_copy(update={"likelihood": settings.likelihood.model_copy(update=changes)})

    def select(self, rows: NDArray[np.intp], light_rows: NDArray[np.intp] | None = None) -> Observation:
        """The same galaxy with these stars, each as often as its row is named (a bootstrap).

        Arguments:
            rows: Rows of the stars with velocities.
            light_rows: Rows of the photometric stars; all where absent.
        """
        names = ("x", "y", "velocity", "velocity_error", "membership")
        changes = {name: getattr(self, name)[rows] for name in names}
        if len(self.pm_x):
            changes |= {n: getattr(self, n)[rows] for n in ("pm_x", "pm_y", "pm_x_error", "pm_y_error")}
        if light_rows is not None and len(self.light_x):
            changes |= {n: getattr(self, n)[light_rows] for n in ("light_x", "light_y", "light_weight")}
        return replace(self, **changes)


def sky_offsets(ra: Array, dec: Array, ra0: float, dec0: float) -> tuple[Array, Array]:
    """Tangent-plane offsets (ξ, η) of stars from a centre, towards east and north.

    Arguments:
        ra: Right ascensions of the stars, deg, shape (N,).
        dec: Their declinations, deg.
        ra0: Right ascension of the centre, deg.
        dec0: Its declination, deg.

    Returns:
        ξ and η in radians, shape (N,); NaN for stars of the other half of the sky.
    """
    a, d = np.radians(ra - ra0), np.radians(dec)
    d0 = np.radians(dec0)
    depth = np.sin(d0) * np.sin(d) + np.cos(d0) * np.cos(d) * np.cos(a)
    depth = np.where(depth > 0, depth, np.nan)
    xi = np.cos(d) * np.sin(a) / depth
    eta = (np.cos(d0) * np.sin(d) - np.sin(d0) * np.cos(d) * np.cos(a)) / depth
    return xi, eta
