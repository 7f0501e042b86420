"""The one internal unit system (kpc, km/s, Msun), its constants, and conversions at the edges."""

from __future__ import annotations

from typing import Any

__all__ = [
    "GEV_PER_CM3",
    "INTERNAL_UNITS",
    "KM_S2_PER_KPC_IN_M_S2",
    "K_PROPER_MOTION",
    "MSUN_PC3",
    "MYR",
    "G",
    "density_to_gev",
    "density_to_msun_pc3",
    "to_internal",
]

# CODATA 2018 G and IAU 2015 GM_sun as astropy has them; written out because `import astropy.constants`
# costs half a second at every start, and compared with astropy in the tests.
G: float = 4.300917270036279e-06
"""Gravitational constant in kpc (km/s)² / Msun."""

K_PROPER_MOTION: float = 4.740470463533349
"""km/s per (mas/yr · kpc): one astronomical unit per Julian year."""

MSUN_PC3: float = 1e9
"""One Msun/pc³ in Msun/kpc³."""

GEV_PER_CM3: float = 37.965164572915
"""One Msun/pc³ (times c²) in GeV/cm³."""

KM_S2_PER_KPC_IN_M_S2: float = 1e6 / 3.085677581491367e19
"""One (km/s)²/kpc in m/s²."""

MYR: float = 977.7922216807891
"""One kpc/(km/s), the internal unit of time, in Myr."""

INTERNAL_UNITS: dict[str, str] = {
    "length": "kpc",
    "speed": "km / s",
    "mass": "solMass",
    "acceleration": "km2 / (s2 kpc)",
    "potential": "km2 / s2",
    "density": "solMass / kpc3",
}
"""The internal unit of each kind of quantity, as astropy spells it."""


def density_to_msun_pc3(density: Any) -> Any:
    """Convert Msun/kpc³ (internal) to Msun/pc³."""
    return density / MSUN_PC3


def density_to_gev(density: Any) -> Any:
    """Convert Msun/kpc³ (internal) to GeV/cm³."""
    return density / MSUN_PC3 * GEV_PER_CM3


def to_internal(value: Any, kind: str) -> Any:
    """Strip an astropy Quantity to internal units; numbers and arrays pass through unchanged.

    Arguments:
        value: A Quantity, or a number or array already in internal units.
        kind: A key of `INTERNAL_UNITS`.

    Raises:
        GalrayError: The Quantity's unit is not of that kind.
    """
    if not hasattr(value, "unit"):
        return value
    from astropy import units as u

    from galray.errors import GalrayError

    unit = u.Unit(INTERNAL_UNITS[kind])
    try:
        return value.to_value(unit)
    except u.UnitConversionError as error:
        raise GalrayError(f"a {kind} in '{value.unit}' cannot be converted to {unit}: {error}") from None
