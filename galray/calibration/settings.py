"""The [calibration] section: which mock galaxies a measurement is repeated on, and what it is applied to."""

from __future__ import annotations

from pydantic import Field, model_validator

from galray.catalog.storage import Location
from galray.mocks import MilkyWaySettings, ObserveSettings
from galray.settings import Settings

__all__ = ["CalibrationGalaxySettings", "CalibrationSettings", "PriorSettings"]

Range = tuple[float, float]


class PriorSettings(Settings):
    """What differs between the mock galaxies: each number is drawn evenly between its two ends."""

    halo_density_msun_pc3: Range = Field(
        default=(0.006, 0.015), description="Density of the dark halo at the Sun, Msun/pc³."
    )
    halo_flattening: Range = Field(
        default=(0.9, 1.05),
        description="Axis ratio q of the halo's equipotentials; the density is twice as flat.",
    )
    stellar_disc_mass: Range = Field(default=(4.0e10, 5.6e10), description="Mass of the stellar disc, Msun.")
    thin_disc_fraction: Range = Field(
        default=(0.55, 0.75), description="Share of the thin disc's stars; the thick disc has the rest."
    )
    stellar_halo_fraction: Range = Field(
        default=(0.06, 0.14), description="Share of the stellar halo's stars."
    )

    @model_validator(mode="after")
    def _inside(self) -> PriorSettings:
        for name, (low, high) in self:
            if low > high:
                raise ValueError(f"{name}: the lower end {low:g} is above the upper end {high:g}")
            least, most = _LIMITS[name]
            if not least <= low or not high <= most:
                raise ValueError(
                    f"{name}: {low:g} to {high:g} reaches beyond {least:g} to {most:g}, where the mock "
                    "galaxies are sound"
                )
        if (most := self.thin_disc_fraction[1] + self.stellar_halo_fraction[1]) > 0.98:
            raise ValueError(
                f"thin_disc_fraction and stellar_halo_fraction: up to {most:g} together leaves nothing "
                "to the thick disc"
            )
        return self


_LIMITS = {
    "halo_density_msun_pc3": (1e-4, 0.05),
    "halo_flattening": (0.8, 1.25),
    "stellar_disc_mass": (1e10, 1e11),
    "thin_disc_fraction": (0.0, 0.98),
    "stellar_halo_fraction": (0.0, 0.5),
}


class CalibrationGalaxySettings(MilkyWaySettings):
    """A mock galaxy of a calibration: small, and mixed no longer than its noise can tell."""

    num_stars: int = Field(default=50_000, gt=0, description="Stars in the ball.")
    mixing_periods: float = Field(
        default=6.0, ge=3, description="Longest time that an orbit is followed, in radial periods."
    )


class CalibrationSettings(Settings):
    """Repeats of the whole measurement on mock galaxies of known truth."""

    mocks: int = Field(default=100, ge=4, description="Mock galaxies.")
    prior: PriorSettings = Field(default=PriorSettings(), description="What differs between them.")
    galaxy: CalibrationGalaxySettings = Field(
        default=CalibrationGalaxySettings(),
        description="All else of the mock galaxies; their ball reaches a twentieth beyond the run's own.",
    )
    observe: ObserveSettings = Field(default=ObserveSettings(), description="How they are observed.")
    cache: Location = Field(
        default="",
        description="Folder or URL of simulated galaxies and finished measurements, which calibrations "
        "share; calibration-cache in `output` where not given.",
    )
    apply: Location = Field(
        default="",
        description="calibration.ecsv of a finished calibration, by path or URL: a run multiplies its errors "
        "by the inflation factors found there. Empty: errors as they come out of the budget.",
    )
