"""Galaxies whose truth is known: exact spheres, an orbit-mixed Milky Way, and Gaia-like observations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galray.mocks.settings import (
    DiscSettings,
    MilkyWayPotentialSettings,
    MilkyWaySettings,
    ObserveSettings,
    StellarHaloSettings,
)

if TYPE_CHECKING:
    from galray.mocks.discs import MilkyWay
    from galray.mocks.eddington import EddingtonSphere
    from galray.mocks.spheres import HernquistSphere, IsochroneSphere, PlummerSphere

__all__ = [
    "DiscSettings",
    "EddingtonSphere",
    "HernquistSphere",
    "IsochroneSphere",
    "MilkyWay",
    "MilkyWayPotentialSettings",
    "MilkyWaySettings",
    "ObserveSettings",
    "PlummerSphere",
    "StellarHaloSettings",
]

# torch and pyarrow are imported with what needs them; a configuration needs the settings alone
_HOMES = {
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
