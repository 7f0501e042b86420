"""From f or its score to acceleration a(x), mass density ρ(x) and dark matter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from galray.gravity.moment_settings import MomentsSettings
from galray.gravity.settings import (
    BaryonSettings,
    DustSettings,
    GravitySettings,
    HaloSettings,
    KernelSettings,
    LeastSquaresSettings,
    PotentialSettings,
    RotatingSettings,
)

if TYPE_CHECKING:
    from galray.gravity.baryons import Baryons, build
    from galray.gravity.boltzmann import LeastSquaresField, least_squares
    from galray.gravity.consistency import ahead_and_behind, curl_and_divergence, solar_acceleration
    from galray.gravity.degeneracy import Identifiability, identifiability
    from galray.gravity.disturbance import disturbance_error
    from galray.gravity.dust import DustField, fit_dust
    from galray.gravity.dust_functions import Efficiency
    from galray.gravity.dust_maps import EfficiencyMap, StarCounts, efficiency_map, log_corrected, sky_map
    from galray.gravity.equilibrium import (
        Agreement,
        Verdict,
        agreement,
        azimuthal_acceleration,
        boltzmann_residuals,
        north_south,
        verdict,
    )
    from galray.gravity.exports import to_agama, to_gala, to_galpy
    from galray.gravity.halo import (
        AveragingPoints,
        averaging_points,
        circular_velocity,
        surface_density,
        valid_positions,
        vertical_force,
    )
    from galray.gravity.jets import StarErrors, noise_corrected
    from galray.gravity.masses import MassField
    from galray.gravity.moment_rotation import PatternSpeed
    from galray.gravity.moment_selection import Degeneracy, LogSelection
    from galray.gravity.moments import MomentResult, Moments, MomentSums
    from galray.gravity.poisson import Kernel, check_region, smooth, smoothed_density
    from galray.gravity.potential import PotentialField, choose_roundness, fit_potential
    from galray.gravity.profiles import HaloFit, HaloPosterior, ProfileFitter, fit_profile
    from galray.gravity.region import AccelerationField, Region
    from galray.gravity.rotating import CorotatingModel, RotatingFit, RotatingFrame, fit_rotating_frame
    from galray.gravity.spline_field import SplineField
    from galray.gravity.spline_fit import fit_spline_to_accelerations
    from galray.gravity.steadiness import StellarTest, stellar_tests
    from galray.gravity.store import MeanField, load_field, save_field

# Where each public name lives: settings are read at every start, torch and scipy only when used.
_HOMES = {
    "baryons": ("Baryons", "build"),
    "boltzmann": ("LeastSquaresField", "least_squares"),
    "consistency": ("ahead_and_behind", "curl_and_divergence", "solar_acceleration"),
    "disturbance": ("disturbance_error",),
    "dust": ("DustField", "fit_dust"),
    "dust_functions": ("Efficiency",),
    "dust_maps": ("EfficiencyMap", "StarCounts", "efficiency_map", "log_corrected", "sky_map"),
    "equilibrium": (
        "Agreement",
        "Verdict",
        "agreement",
        "azimuthal_acceleration",
        "boltzmann_residuals",
        "north_south",
        "verdict",
    ),
    "exports": ("to_agama", "to_gala", "to_galpy"),
    "degeneracy": ("Identifiability", "identifiability"),
    "halo": (
        "AveragingPoints",
        "averaging_points",
        "circular_velocity",
        "surface_density",
        "valid_positions",
        "vertical_force",
    ),
    "jets": ("StarErrors", "noise_corrected"),
    "masses": ("MassField",),
    "moment_rotation": ("PatternSpeed",),
    "moment_selection": ("Degeneracy", "LogSelection"),
    "moments": ("MomentResult", "MomentSums", "Moments"),
    "poisson": ("Kernel", "check_region", "smooth", "smoothed_density"),
    "potential": ("PotentialField", "choose_roundness", "fit_potential"),
    "profiles": ("HaloFit", "HaloPosterior", "ProfileFitter", "fit_profile"),
    "region": ("AccelerationField", "Region"),
    "rotating": ("CorotatingModel", "RotatingFit", "RotatingFrame", "fit_rotating_frame"),
    "spline_field": ("SplineField",),
    "spline_fit": ("fit_spline_to_accelerations",),
    "steadiness": ("StellarTest", "stellar_tests"),
    "store": ("MeanField", "load_field", "save_field"),
}

__all__ = [
    "AccelerationField",
    "Agreement",
    "AveragingPoints",
    "BaryonSettings",
    "Baryons",
    "CorotatingModel",
    "Degeneracy",
    "DustField",
    "DustSettings",
    "Efficiency",
    "EfficiencyMap",
    "GravitySettings",
    "HaloFit",
    "HaloPosterior",
    "HaloSettings",
    "Identifiability",
    "Kernel",
    "KernelSettings",
    "LeastSquaresField",
    "LeastSquaresSettings",
    "LogSelection",
    "MassField",
    "MeanField",
    "MomentResult",
    "MomentSums",
    "Moments",
    "MomentsSettings",
    "PatternSpeed",
    "PotentialField",
    "PotentialSettings",
    "ProfileFitter",
    "Region",
    "RotatingFit",
    "RotatingFrame",
    "RotatingSettings",
    "SplineField",
    "StarCounts",
    "StarErrors",
    "StellarTest",
    "Verdict",
    "agreement",
    "ahead_and_behind",
    "averaging_points",
    "azimuthal_acceleration",
    "boltzmann_residuals",
    "build",
    "check_region",
    "choose_roundness",
    "circular_velocity",
    "curl_and_divergence",
    "disturbance_error",
    "efficiency_map",
    "fit_dust",
    "fit_potential",
    "fit_profile",
    "fit_rotating_frame",
    "fit_spline_to_accelerations",
    "identifiability",
    "least_squares",
    "load_field",
    "log_corrected",
    "noise_corrected",
    "north_south",
    "save_field",
    "sky_map",
    "smooth",
    "smoothed_density",
    "solar_acceleration",
    "stellar_tests",
    "surface_density",
    "to_agama",
    "to_gala",
    "to_galpy",
    "valid_positions",
    "verdict",
    "vertical_force",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"galray.gravity.{module}"), name)
    raise AttributeError(f"module 'galray.gravity' has no attribute '{name}'")
