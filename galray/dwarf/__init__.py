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
from galray.dwarf.spherical_settings import SphericalMassSettings, SphericalScoreSettings

if TYPE_CHECKING:
    from galray.dwarf.annihilation import d_factor, j_factor, tidal_radius
    from galray.dwarf.fit import HaloComparison, compare_haloes, fit_halo, heldout_log_likelihood
    from galray.dwarf.flow import OdeRadialFlow, RadialMap, SphereFlow
    from galray.dwarf.jeans import JeansSolver, inverse_jeans
    from galray.dwarf.jflow import FlowFit, fit_flow
    from galray.dwarf.known import KnownDwarf, find_dwarf, known_dwarfs, published_haloes
    from galray.dwarf.mass_estimators import walker_mass, wolf_mass
    from galray.dwarf.observation import Galaxy, Observation
    from galray.dwarf.posterior import HaloPosterior
    from galray.dwarf.product_settings import ProductSettings
    from galray.dwarf.products import Products
    from galray.dwarf.projected_score import ProjectedScore, fit_projected_score, projected_virial
    from galray.dwarf.reading import DataSettings, read_observation
    from galray.dwarf.spherical_mass import RadialMass
    from galray.dwarf.spherical_moments import fit_spherical_moments
    from galray.dwarf.spherical_score import SphericalScore, fit_spherical_score
    from galray.dwarf.tracers import Tracers

__all__ = [
    "AnisotropySettings",
    "DataSettings",
    "FlowFit",
    "Galaxy",
    "HaloComparison",
    "HaloFitSettings",
    "HaloPosterior",
    "HaloSettings",
    "JeansSolver",
    "KnownDwarf",
    "LikelihoodSettings",
    "Observation",
    "OdeRadialFlow",
    "ProductSettings",
    "Products",
    "ProjectedScore",
    "RadialMap",
    "RadialMass",
    "SamplerSettings",
    "SphereFlow",
    "SphericalMassSettings",
    "SphericalScore",
    "SphericalScoreSettings",
    "TracerSettings",
    "Tracers",
    "compare_haloes",
    "d_factor",
    "find_dwarf",
    "fit_flow",
    "fit_halo",
    "fit_projected_score",
    "fit_spherical_moments",
    "fit_spherical_score",
    "heldout_log_likelihood",
    "inverse_jeans",
    "j_factor",
    "known_dwarfs",
    "projected_virial",
    "published_haloes",
    "read_observation",
    "tidal_radius",
    "walker_mass",
    "wolf_mass",
]

# torch is imported with what needs it; a configuration needs the settings alone
_HOMES = {
    "DataSettings": "reading",
    "FlowFit": "jflow",
    "Galaxy": "observation",
    "HaloComparison": "fit",
    "HaloPosterior": "posterior",
    "JeansSolver": "jeans",
    "KnownDwarf": "known",
    "Observation": "observation",
    "OdeRadialFlow": "flow",
    "ProductSettings": "product_settings",
    "Products": "products",
    "ProjectedScore": "projected_score",
    "RadialMap": "flow",
    "RadialMass": "spherical_mass",
    "SphereFlow": "flow",
    "SphericalScore": "spherical_score",
    "Tracers": "tracers",
    "compare_haloes": "fit",
    "d_factor": "annihilation",
    "find_dwarf": "known",
    "fit_flow": "jflow",
    "fit_halo": "fit",
    "fit_projected_score": "projected_score",
    "fit_spherical_moments": "spherical_moments",
    "fit_spherical_score": "spherical_score",
    "heldout_log_likelihood": "fit",
    "inverse_jeans": "jeans",
    "j_factor": "annihilation",
    "known_dwarfs": "known",
    "projected_virial": "projected_score",
    "published_haloes": "known",
    "read_observation": "reading",
    "tidal_radius": "annihilation",
    "walker_mass": "mass_estimators",
    "wolf_mass": "mass_estimators",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
