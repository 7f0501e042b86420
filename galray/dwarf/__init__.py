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
    from galray.dwarf.fit import HaloComparison, compare_haloes, fit_halo, heldout_log_likelihood
    from galray.dwarf.flow import OdeRadialFlow, RadialMap, SphereFlow
    from galray.dwarf.jeans import JeansSolver, inverse_jeans
    from galray.dwarf.jflow import FlowFit, fit_flow
    from galray.dwarf.posterior import HaloPosterior
    from galray.dwarf.tracers import Tracers

__all__ = [
    "AnisotropySettings",
    "FlowFit",
    "HaloComparison",
    "HaloFitSettings",
    "HaloPosterior",
    "HaloSettings",
    "JeansSolver",
    "LikelihoodSettings",
    "OdeRadialFlow",
    "RadialMap",
    "SamplerSettings",
    "SphereFlow",
    "TracerSettings",
    "Tracers",
    "compare_haloes",
    "fit_flow",
    "fit_halo",
    "heldout_log_likelihood",
    "inverse_jeans",
]

# torch is imported with what needs it; a configuration needs the settings alone
_HOMES = {
    "FlowFit": "jflow",
    "HaloComparison": "fit",
    "HaloPosterior": "posterior",
    "JeansSolver": "jeans",
    "OdeRadialFlow": "flow",
    "RadialMap": "flow",
    "SphereFlow": "flow",
    "Tracers": "tracers",
    "compare_haloes": "fit",
    "fit_flow": "jflow",
    "fit_halo": "fit",
    "heldout_log_likelihood": "fit",
    "inverse_jeans": "jeans",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
