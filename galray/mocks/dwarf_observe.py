"""A dwarf galaxy as a spectrograph on Earth sees it: heliocentric velocities, foreground, perspective."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
from scipy.interpolate import CubicSpline

from galray.errors import GalrayError
from galray.mocks.dwarfs import DwarfMock
from galray.mocks.settings import DwarfObserveSettings
from galray.units import K_PROPER_MOTION

__all__ = ["observe_dwarf"]


def observe_dwarf(mock: DwarfMock, num_stars: int, settings: DwarfObserveSettings, seed: int) -> pa.Table:
    """Observe stars of a dwarf from its distance.

    Each star stands at D p̂ + x and moves with the systemic velocity plus its own, p̂ being the direction of
    the centre; its radial velocity is the projection on its own line of sight. So the perspective rotation
    of an extended galaxy with a proper motion, and the depth of the galaxy, are in the data as in nature.
    The mock's axes (x, y, z) are (east, north, away).

    Arguments:
        mock: The galaxy.
        num_stars: Stars of the galaxy drawn; those beyond the field are not observed.
        settings: Place, motion, errors and foreground.
        seed: Root of the random streams.

    Returns:
        One row per star in random order: ``ra``, ``dec`` (deg), ``v_los``, ``v_los_error`` (km/s,
        heliocentric), ``membership`` (the probability, from the truth about both populations, that a star
        with that place and velocity belongs to the galaxy), ``pmra``, ``pmdec`` and their ``_error``
        (mas/yr), and the truth ``is_member``. The settings are in the table's metadata under ``galray``.

    Raises:
        GalrayError: The galaxy has no star in the field.
    """
    draw, noise, sky, order = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    away, east, north = _axes(settings.ra_deg, settings.dec_deg)
    axes = np.stack([east, north, away])
    w = mock.sample(num_stars, draw).numpy()
    place = settings.distance_kpc * away + w[:, :3] @ axes
    scale = K_PROPER_MOTION * settings.distance_kpc
    motion = (
        settings.systemic_velocity_km_s * away
        + scale * settings.pmra_mas_yr * east
        + scale * settings.pmdec_mas_yr * north
    )
    velocity = motion + w[:, 3:] @ axes
    distance = np.linalg.norm(place, axis=1)
    sight = place / distance[:, None]
    cosine = math.cos(math.radians(settings.field_radius_deg))
    seen = sight @ away > cosine
    if not seen.any():
        raise GalrayError(
            f"none of {num_stars} stars lies within {settings.field_radius_deg} deg of the centre",
            "raise field_radius_deg, distance_kpc or the number of stars",
        )
    sight, velocity, distance = sight[seen], velocity[seen], distance[seen]
    members = len(sight)
    others = round(members * settings.foreground_fraction / (1 - settings.foreground_fraction))

    sight = np.concatenate([sight, _cap(others, cosine, sky) @ axes])
    n = members + others
    v_los = np.concatenate(
        [
            (velocity * sight[:members]).sum(1),
            sky.normal(settings.foreground_velocity_km_s, settings.foreground_dispersion_km_s, others),
        ]
    )
    error = settings.velocity_error_km_s * np.exp(settings.velocity_error_spread * noise.standard_normal(n))
    v_los = v_los + error * noise.standard_normal(n)
    ra, dec, star_east, star_north = _sky(sight)
    proper = {}
    for name, axis in (("pmra", star_east), ("pmdec", star_north)):
        own = (velocity * axis[:members]).sum(1) / (K_PROPER_MOTION * distance)
        field = sky.normal(0.0, settings.foreground_proper_motion_mas_yr, others)
        noisy = settings.proper_motion_error_mas_yr * noise.standard_normal(n)
        proper[name] = np.concatenate([own, field]) + noisy

    # what an observer who knew both populations would say of each star
    separation = np.arccos(np.clip(sight @ away, -1.0, 1.0))
    R = settings.distance_kpc * np.maximum(separation, 1e-7)
    inside = float(mock.projected_fraction(np.array(settings.distance_kpc * math.acos(cosine))))
    grid = np.geomspace(R.min(), 1.001 * R.max(), 300)  # both profiles are smooth in ln R
    surface, dispersion = (
        np.exp(CubicSpline(np.log(grid), np.log(profile(grid)))(np.log(R)))
        for profile in (mock.surface_density, mock.sigma_los)
    )
    spread2 = dispersion**2 + error**2
    like_member = settings.distance_kpc**2 * surface / inside
    like_member = like_member * _normal(v_los - sight @ motion, spread2)
    like_field = _normal(
        v_los - settings.foreground_velocity_km_s, settings.foreground_dispersion_km_s**2 + error**2
    ) / (2 * math.pi * (1 - cosine))
    fraction = settings.foreground_fraction
    membership = (1 - fraction) * like_member / ((1 - fraction) * like_member + fraction * like_field)

    columns = {
        "ra": ra,
        "dec": dec,
        "v_los": v_los,
        "v_los_error": error,
        "membership": membership,
        **proper,
        "pmra_error": np.full(n, settings.proper_motion_error_mas_yr),
        "pmdec_error": np.full(n, settings.proper_motion_error_mas_yr),
        "is_member": np.arange(n) < members,
    }
    shuffle = order.permutation(n)
    description = {"model": mock.name, "observed": settings.model_dump(mode="json"), "seed": seed}
    table = pa.table({name: pa.array(values[shuffle]) for name, values in columns.items()})
    return table.replace_schema_metadata({"galray": json.dumps(description)})


def _axes(ra_deg: float, dec_deg: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors away, east and north at a place on the sky, in equatorial axes."""
    a, d = math.radians(ra_deg), math.radians(dec_deg)
    away = np.array([math.cos(d) * math.cos(a), math.cos(d) * math.sin(a), math.sin(d)])
    east = np.array([-math.sin(a), math.cos(a), 0.0])
    return away, east, np.cross(away, east)


def _sky(sight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """RA and Dec (deg) of lines of sight (n, 3), and the directions east and north there."""
    ra = np.arctan2(sight[:, 1], sight[:, 0])
    east = np.stack([-np.sin(ra), np.cos(ra), np.zeros(len(ra))], -1)
    dec = np.arctan2(sight[:, 2], np.hypot(sight[:, 0], sight[:, 1]))
    return np.degrees(ra) % 360.0, np.degrees(dec), east, np.cross(sight, east)


def _cap(n: int, cosine: float, rng: np.random.Generator) -> np.ndarray:
    """Draw n directions (n, 3), uniform on the cap around the third axis."""
    c = rng.uniform(cosine, 1.0, n)
    phi = rng.uniform(0.0, 2 * math.pi, n)
    s = np.sqrt(1 - c**2)
    return np.stack([s * np.cos(phi), s * np.sin(phi), c], -1)


def _normal(x: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x**2 / variance) / np.sqrt(2 * math.pi * variance)
