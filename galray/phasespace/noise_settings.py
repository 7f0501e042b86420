"""Settings of the treatment of measurement errors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from galray.settings import Settings

__all__ = ["NoiseSettings"]


class NoiseSettings(Settings):
    """What training does with the stars' measurement errors."""

    treatment: Literal["ignore", "deconvolve"] = "ignore"
    """``ignore``: f as measured, blurred by the errors; ``deconvolve``: f before the errors. It needs stars
    with covariances, and errors that are small beside the ball."""
    draws: int = Field(default=12, ge=2)
    """Places tried for each star in a step, an even number; the cost of a flow's step grows with it. Twelve
    are a whole frame of the six errors (see `galray.phasespace.noise.draw_errors`)."""
    observer: tuple[float, float, float, float, float, float] | None = None
    """Position (kpc) and velocity (km/s) from which parallaxes were measured: errors are then Gaussian in
    parallax. None: Gaussian in phase space. A run on a catalogue takes the Sun's where none is given."""

    @model_validator(mode="after")
    def _pairs(self) -> NoiseSettings:
        if self.draws % 2:
            raise ValueError(f"draws = {self.draws} must be even: draws come in antithetic pairs")
        return self
