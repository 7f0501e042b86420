"""Galaxies whose truth is known: exact spheres, dwarfs, orbit-mixed Milky Ways, and how they are seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galray.mocks.settings import (
    BarredGalaxySettings,
    BarSettings,
    DiscSettings,
    DustSettings,
    DwarfObserveSettings,
    KickSettings,
    MilkyWayPotentialSettings,
    MilkyWaySettings,
    ObserveSettings,
    StellarHaloSettings,
)

if TYPE_CHECKING:
    from galray.mocks.bars import BarredGalaxy
    from galray.mocks.discs import MilkyWay
    from galray.mocks.dust import DustMap
    from galray.mocks.dwarf_observe import observe_dwarf
    from galray.mocks.dwarfs import GAIA_CHALLENGE, DwarfMock, gaia_challenge
    from galray.mocks.eddington import EddingtonSphere
    from galray.mocks.rotating import RotatingIsothermal
    from galray.mocks.spheres import HernquistSphere, IsochroneSphere, PlummerSphere

__all__ = [
    "GAIA_CHALLENGE",
    "BarSettings",
    "BarredGalaxy",
    "BarredGalaxySettings",
    "DiscSettings",
    "DustMap",
    "DustSettings",
    "DwarfMock",
    "DwarfObserveSettings",
    "EddingtonSphere",
    "HernquistSphere",
    "IsochroneSphere",
    "KickSettings",
    "MilkyWay",
    "MilkyWayPotentialSettings",
    "MilkyWaySettings",
    "ObserveSettings",
    "PlummerSphere",
    "RotatingIsothermal",
    "StellarHaloSettings",
    "gaia_challenge",
    "observe_dwarf",
]

# torch and pyarrow are imported with what needs them; a configuration needs the settings alone
_HOMES = {
    "BarredGalaxy": "bars",
    "RotatingIsothermal": "rotating",
    "DustMap": "dust",
    "DwarfMock": "dwarfs",
    "GAIA_CHALLENGE": "dwarfs",
    "gaia_challenge": "dwarfs",
    "observe_dwarf": "dwarf_observe",
    "EddingtonSphere": "eddington",
    "HernquistSphere": "spheres",
    "IsochroneSphere": "spheres",
    "PlummerSphere": "spheres",
    "MilkyWay": "discs",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
