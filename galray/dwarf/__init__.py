"""Spherical galaxies: from sky positions and line-of-sight velocities to a dark halo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galray.dwarf.settings import (
    AnisotropySettings,
    HaloFitSettings,
    HaloSettings,
    LikelihoodSettings,
    SamplerSettings,
    TracerSettings,
)

if TYPE_CHECKING:
    from galray.dwarf.fit import HaloComparison, compare_haloes, fit_halo
    from galray.dwarf.posterior import HaloPosterior
    from galray.dwarf.tracers import Tracers

__all__ = [
    "AnisotropySettings",
    "HaloComparison",
    "HaloFitSettings",
    "HaloPosterior",
    "HaloSettings",
    "LikelihoodSettings",
    "SamplerSettings",
    "TracerSettings",
    "Tracers",
    "compare_haloes",
    "fit_halo",
]

# torch is imported with what needs it; a configuration needs the settings alone
_HOMES = {
    "HaloComparison": "fit",
    "HaloPosterior": "posterior",
    "Tracers": "tracers",
    "compare_haloes": "fit",
    "fit_halo": "fit",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
