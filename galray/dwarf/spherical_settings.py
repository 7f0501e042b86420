"""The settings of the estimators for stars with known radii and velocities in space."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from galray.settings import Settings

__all__ = ["SphericalMassSettings", "SphericalScoreSettings"]


class SphericalMassSettings(Settings):
    """The moments of the stars, and the halo that is fitted to them."""

    test_functions: int = Field(default=14, ge=4, le=60)
    """Cubic B-splines in ln r under which moments are taken."""
    knots: int = Field(default=8, ge=3, le=30)
    """Knots of the halo's logarithmic slope, equidistant in ln r."""
    inner_quantile: float = Field(default=0.01, gt=0, lt=0.5)
    """The first knot stands at this quantile of the stars' radii."""
    outer_quantile: float = Field(default=0.98, gt=0.5, lt=1)
    """The last knot stands at this quantile."""
    inner_slope: float = Field(default=0.7, ge=-1, lt=3)
    """Prior mean of γ = −dln ρ/dln r at the first knot: halfway between a core and a cusp."""
    inner_slope_sd: float = Field(default=0.6, gt=0)
    """Its standard deviation."""
    growth: float = Field(default=0.2, ge=0)
    """Prior mean of the growth of γ from knot to knot."""
    growth_sd: float | Literal["cv"] = Field(default=0.35)
    """Its standard deviation, or ``cv`` to choose it by cross-validation over the blocks."""
    growth_sd_grid: tuple[float, ...] = Field(default=(0.1, 0.2, 0.4, 0.8), min_length=1)
    """What ``cv`` chooses from."""
    blocks: int = Field(default=20, ge=3)
    """Equal random parts of the stars for the jackknife and cross-validation."""

    @model_validator(mode="after")
    def _positive(self) -> SphericalMassSettings:
        values = self.growth_sd_grid if self.growth_sd == "cv" else (self.growth_sd,)
        if not all(isinstance(v, float) and v > 0 for v in values):
            raise ValueError("growth_sd and growth_sd_grid must be above zero")
        return self


class SphericalScoreSettings(Settings):
    """The score network of a sphere, f(r, v_r, v_t) or its projection, and its training."""

    hidden: tuple[int, ...] = Field(default=(24, 24), min_length=1)
    """Hidden widths of the scalar network whose gradient is the score's correction."""
    base_splines: int = Field(default=10, ge=4, le=30)
    """Splines in ln r of the analytic base: of ln n and of the logarithms of both dispersions."""
    base_roughness: float = Field(default=3e-5, ge=0)
    """Penalty on the base's third differences, per star."""
    steps: int = Field(default=1000, ge=1)
    """Optimiser steps, whatever the number of stars: whole passes over them are made up from these."""
    batch_size: int = Field(default=1024, ge=8, multiple_of=8)
    """Stars per step."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=1e-3, ge=0)
    """Decoupled weight decay."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Part of the stars held out; the weights of the best held-out loss are kept."""
    mass: SphericalMassSettings = SphericalMassSettings()
    """The halo that is fitted to the scores."""
