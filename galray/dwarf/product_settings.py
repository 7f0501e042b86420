"""What is made of a galaxy's posterior: radii, angles, and what counts as a core or a cusp."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from galray.settings import Settings

__all__ = ["ProductSettings"]


class ProductSettings(Settings):
    """What is made of a galaxy's posterior."""

    radii: tuple[float, float] = Field(
        default=(0.1, 5.0), description="First and last radius of the profiles, in half-light radii."
    )
    num_radii: int = Field(default=41, ge=5, description="Radii of the profiles, equal steps in ln r.")
    central_radius: float = Field(default=0.15, gt=0, description="Radius of the central density, kpc.")
    angles: tuple[float, ...] = Field(
        default=(0.1, 0.5),
        description="Half-angles of the J- and D-factors, deg; the half-light angle joins.",
    )
    truncation: Literal["outermost", "tidal"] | float = Field(
        default="outermost",
        description="Where the halo ends for J and D: at the outermost member star (the cautious choice), "
        "at the tidal radius in the Milky Way, or at a radius in kpc.",
    )
    host_speed: float = Field(default=200.0, gt=0, description="Circular speed of the host, km/s, for tides.")
    stellar_mass_scatter: float = Field(
        default=0.15, ge=0, description="Error of the stars' mass, dex: of their mass-to-light ratio."
    )
    core_below: float = Field(
        default=0.5, description="A dark slope γ below this at the central radius counts as a core."
    )
    cusp_above: float = Field(default=0.8, description="One above this counts as a cusp.")
    certain: float = Field(
        default=0.95,
        gt=0.5,
        lt=1,
        description="Probability that calls a core or a cusp, or that excludes one.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> ProductSettings:
        if not 0 < self.radii[0] < self.radii[1]:
            raise ValueError(f"products.radii = {self.radii} must rise and be positive")
        if self.core_below > self.cusp_above:
            raise ValueError("products.core_below must not exceed products.cusp_above")
        if any(not 0 < angle < 90 for angle in self.angles):
            raise ValueError(f"products.angles = {self.angles} must lie between 0 and 90 deg")
        if isinstance(self.truncation, float) and self.truncation <= 0:
            raise ValueError("products.truncation must be positive")
        return self
