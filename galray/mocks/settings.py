"""Settings of the mock galaxies and of how they are observed."""

from __future__ import annotations

from pydantic import Field, model_validator

from galray.settings import Settings

__all__ = [
    "BarSettings",
    "BarredGalaxySettings",
    "DiscSettings",
    "DustSettings",
    "DwarfObserveSettings",
    "KickSettings",
    "MilkyWayPotentialSettings",
    "MilkyWaySettings",
    "ObserveSettings",
    "StellarHaloSettings",
]


class MilkyWayPotentialSettings(Settings):
    """The mass model: two Miyamoto–Nagai discs, a Hernquist bulge, an NFW halo."""

    stellar_disc_mass: float = Field(default=4.8e10, gt=0)
    """Mass of the stellar disc in Msun."""
    stellar_disc_length_kpc: float = Field(default=2.6, gt=0)
    stellar_disc_height_kpc: float = Field(default=0.33, gt=0)
    gas_disc_mass: float = Field(default=0.95e10, gt=0)
    """Mass of the gas disc in Msun."""
    gas_disc_length_kpc: float = Field(default=6.0, gt=0)
    gas_disc_height_kpc: float = Field(default=0.15, gt=0)
    bulge_mass: float = Field(default=1.2e10, gt=0)
    """Mass of the bulge in Msun."""
    bulge_radius_kpc: float = Field(default=0.6, gt=0)
    halo_density_msun_pc3: float = Field(default=0.010, gt=0)
    """Density of the dark halo at the Sun in Msun/pc³: the truth that a run should find."""
    halo_scale_radius_kpc: float = Field(default=15.0, gt=0)
    halo_flattening: float = Field(default=1.0, ge=0.8, le=1.25)
    """Axis ratio q of the halo's equipotentials; its density is about twice as flat."""


class DiscSettings(Settings):
    """A disc of tracer stars, as a distribution of orbits.

    Guiding radii follow an exponential disc; the radial and vertical energies of the orbits are exponential
    with means σ_R² and σ_z² that fall with guiding radius as exp(−R_g / `sigma_length_kpc`).
    """

    fraction: float = Field(ge=0, le=1)
    """Share of the stars in the ball."""
    scale_length_kpc: float = Field(gt=0)
    """Scale length of the guiding radii in kpc."""
    sigma_r_km_s: float = Field(gt=0, le=90)
    """Radial velocity dispersion at the Sun's guiding radius in km/s."""
    sigma_z_km_s: float = Field(gt=0, le=90)
    """Vertical velocity dispersion there in km/s."""
    sigma_length_kpc: float = Field(gt=0)
    """Scale length of the dispersions in kpc."""


class StellarHaloSettings(Settings):
    """A non-rotating, isotropic stellar halo with f ∝ exp(−E/σ²) − 1 for E < 0."""

    fraction: float = Field(default=0.10, ge=0, le=1)
    """Share of the stars in the ball."""
    sigma_km_s: float = Field(default=130.0, gt=0, le=300)
    """Velocity dispersion σ in km/s; the density falls about as r^−(v_c/σ)²."""


class KickSettings(Settings):
    """A blow that threw the Galaxy out of equilibrium: part of the disc's stars kicked at once."""

    fraction: float = Field(default=0.10, gt=0, le=1)
    """Share of all stars that were kicked (stars of the discs, wherever they then were)."""
    velocity_km_s: float = 20.0
    """What was added to their v_z."""
    time_myr: float = Field(default=200.0, ge=0)
    """How long ago."""


class MilkyWaySettings(Settings):
    """A Milky Way whose mass is known exactly and whose tracers are stationary."""

    num_stars: int = Field(default=450_000, gt=0)
    """Stars in the ball."""
    ball_radius_kpc: float = Field(default=4.0, gt=0, le=6.0)
    """Radius of the ball around the Sun that holds the stars, in kpc."""
    potential: MilkyWayPotentialSettings = MilkyWayPotentialSettings()
    thin_disc: DiscSettings = DiscSettings(
        fraction=0.66, scale_length_kpc=2.7, sigma_r_km_s=35.0, sigma_z_km_s=20.0, sigma_length_kpc=7.5
    )
    thick_disc: DiscSettings = DiscSettings(
        fraction=0.24, scale_length_kpc=2.3, sigma_r_km_s=60.0, sigma_z_km_s=40.0, sigma_length_kpc=10.0
    )
    stellar_halo: StellarHaloSettings = StellarHaloSettings()
    mixing_periods: float = Field(default=16.0, ge=3)
    """Longest time that an orbit is followed, in radial periods of its guiding radius."""
    energy_tolerance: float = Field(default=1e-5, gt=0, le=1e-3)
    """Largest |ΔE / E| of an orbit; one that exceeds it is integrated again with shorter steps."""
    kick: KickSettings | None = None
    """A disturbance of the stationary tracers; none where not given."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> MilkyWaySettings:
        if self.kick is not None and self.kick.fraction > 1 - self.stellar_halo.fraction:
            raise ValueError("kick.fraction: more than the discs' share, and the halo is not kicked")
        total = self.thin_disc.fraction + self.thick_disc.fraction + self.stellar_halo.fraction
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"the fractions of thin_disc, thick_disc and stellar_halo add up to {total:g}, not 1"
            )
        return self


class BarSettings(Settings):
    """A steadily turning bar of the Long–Murali form."""

    mass: float = Field(default=3.0e10, gt=0)
    """Mass in Msun."""
    half_length_kpc: float = Field(default=6.0, gt=0)
    width_kpc: float = Field(default=1.0, gt=0)
    height_kpc: float = Field(default=0.5, gt=0)
    angle_deg: float = 27.0
    """Azimuth of its near end, from the Sun along Galactic rotation."""
    pattern_speed_km_s_kpc: float = Field(default=34.0, gt=0, le=100)
    """Ω_p, positive along Galactic rotation."""


class BarredGalaxySettings(Settings):
    """A barred Galaxy whose mass and pattern speed are known and whose tracers are stationary as it turns.

    The bar is long and heavy on purpose: gravity at the Sun depends on azimuth by a tenth and more.
    """

    num_stars: int = Field(default=200_000, gt=0)
    """Stars in the ball."""
    ball_radius_kpc: float = Field(default=4.0, gt=0, le=6.0)
    """Radius of the ball around the Sun that holds the stars, in kpc."""
    bar: BarSettings = BarSettings()
    disc_mass: float = Field(default=3.6e10, gt=0)
    """Mass of the Miyamoto–Nagai disc in Msun."""
    disc_length_kpc: float = Field(default=3.2, gt=0)
    disc_height_kpc: float = Field(default=0.3, gt=0)
    halo_density_msun_pc3: float = Field(default=0.010, gt=0)
    """Density of the NFW halo at the Sun in Msun/pc³."""
    halo_scale_radius_kpc: float = Field(default=15.0, gt=0)
    discs: tuple[DiscSettings, ...] = (
        DiscSettings(
            fraction=0.7, scale_length_kpc=3.0, sigma_r_km_s=35.0, sigma_z_km_s=22.0, sigma_length_kpc=8.0
        ),
        DiscSettings(
            fraction=0.3, scale_length_kpc=2.8, sigma_r_km_s=60.0, sigma_z_km_s=45.0, sigma_length_kpc=10.0
        ),
    )
    """Tracers, by their guiding radii and energies before the bar has stirred them."""
    guiding_radii_kpc: tuple[float, float] = (3.0, 14.0)
    """Smallest and largest guiding radius."""
    mixing_periods: float = Field(default=9.0, ge=3)
    """Longest time that an orbit is followed, in radial periods of its guiding radius."""
    energy_tolerance: float = Field(default=1e-3, gt=0, le=1e-2)
    """Largest |ΔE_J| of an orbit in units of v_c²; one beyond it is integrated again with shorter steps."""

    @model_validator(mode="after")
    def _consistent(self) -> BarredGalaxySettings:
        total = sum(disc.fraction for disc in self.discs)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the fractions of discs add up to {total:g}, not 1")
        low, high = self.guiding_radii_kpc
        if not 0 < low < high:
            raise ValueError("guiding_radii_kpc: give two radii above zero, the smaller first")
        return self


class ObserveSettings(Settings):
    """What Gaia sees of a mock."""

    noise_scale: float = Field(default=1.0, ge=0)
    """Factor on the measurement errors, those drawn and those reported; 0 gives exact observables."""
    rv_missing_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the stars without a radial velocity, independent of everything else."""
    correlation_strength: float = Field(default=0.35, ge=0, le=2)
    """How strongly the five astrometric errors of a star are correlated; 0.35 gives |ρ| of about 0.1."""


class DustSettings(Settings):
    """Dust around the observer, and the magnitude limit by which it hides stars."""

    extinction_mag_kpc: float = Field(default=0.7, ge=0)
    """Mean extinction A_G per kpc in the plane z = 0."""
    height_kpc: float = Field(default=0.12, gt=0)
    """Exponential scale height of the layer."""
    log_amplitude: float = Field(default=0.8, ge=0, le=3)
    """Standard deviation of the logarithm of the density, a Gaussian random field; 0 for a smooth layer."""
    spectrum_slope: float = Field(default=3.0, ge=0, le=6)
    """γ of the field's power spectrum P(k) ∝ k^−γ."""
    outer_scale_kpc: float = Field(default=1.5, gt=0)
    """Wavelength beyond which the spectrum is flat."""
    clouds: int = Field(default=8, ge=0, le=1000)
    """Gaussian clouds, at random places near the plane."""
    cloud_extinction_mag: float = Field(default=0.8, ge=0)
    """Extinction through the middle of a cloud."""
    cloud_radius_kpc: float = Field(default=0.12, gt=0)
    """Standard deviation of a cloud."""
    cell_kpc: float = Field(default=0.1, gt=0)
    """Spacing of the grid on which the field is drawn and the extinction is kept."""
    limit_mag: float | None = None
    """Apparent G at which half of the stars are seen; where not given, a star is seen with the probability
    10^(−0.4 A), the light that passes, wherever it is."""
    limit_width_mag: float = Field(default=0.35, gt=0)
    """Width of the limit, a logistic function of magnitude."""
    reddening: float = Field(default=0.5, ge=0)
    """E(BP − RP) / A_G."""


class DwarfObserveSettings(Settings):
    """Where a mock dwarf stands, how it moves and what is seen of it."""

    ra_deg: float = Field(default=0.0, ge=0, lt=360)
    """Right ascension of the centre."""
    dec_deg: float = Field(default=0.0, gt=-90, lt=90)
    """Declination of the centre."""
    distance_kpc: float = Field(default=100.0, gt=0)
    """Distance of the centre."""
    systemic_velocity_km_s: float = 0.0
    """Heliocentric radial velocity of the centre."""
    pmra_mas_yr: float = 0.0
    """Heliocentric proper motion of the centre in right ascension, with cos δ."""
    pmdec_mas_yr: float = 0.0
    """Heliocentric proper motion of the centre in declination."""
    field_radius_deg: float = Field(default=2.0, gt=0, le=45)
    """Stars further from the centre are not observed."""
    velocity_error_km_s: float = Field(default=2.0, gt=0)
    """Median error of the radial velocities."""
    velocity_error_spread: float = Field(default=0.0, ge=0, le=2)
    """Standard deviation of ln(error) from star to star."""
    proper_motion_error_mas_yr: float = Field(default=0.02, ge=0)
    """Error of both proper motions; 0.004 mas/yr is 2 km/s at 100 kpc."""
    foreground_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the observed stars that belong to the Milky Way, uniform on the sky."""
    foreground_velocity_km_s: float = 0.0
    """Mean heliocentric radial velocity of the foreground."""
    foreground_dispersion_km_s: float = Field(default=80.0, gt=0)
    """Its standard deviation."""
    foreground_proper_motion_mas_yr: float = Field(default=3.0, ge=0)
    """Standard deviation of its proper motions."""
