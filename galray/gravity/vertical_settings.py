"""Settings of the local vertical inversion."""

from __future__ import annotations

from pydantic import Field, field_validator

from galray.settings import Settings

__all__ = ["VerticalNetworkSettings", "VerticalSettings"]


class VerticalNetworkSettings(Settings):
    """The two networks of f(z, v_z) and their training."""

    hidden: tuple[int, ...] = Field(default=(32, 32), min_length=1, description="Widths of hidden layers.")
    degree: int = Field(default=8, ge=2, description="Of the polynomial log n(z) of the flow.")
    bins: int = Field(default=8, ge=2, description="Bins of the flow's splines in velocity.")
    epochs: int = Field(default=12, ge=1, description="Passes over the stars.")
    batch_size: int = Field(default=1024, ge=16, description="Stars per step.")
    learning_rate: float = Field(default=1e-2, gt=0, description="Adam's first step; falls along a cosine.")
    velocity_window: float = Field(default=40.0, gt=0, description="s of the instrument, km/s.")
    height_scale_kpc: float = Field(default=0.15, gt=0, description="Unit of height inside the networks.")
    velocity_scale: float = Field(default=20.0, gt=0, description="Unit of velocity inside them, km/s.")


class VerticalSettings(Settings):
    """How the vertical inversion of a local sample is done."""

    height_limit_kpc: float = Field(
        default=0.36, gt=0, description="Test functions vanish beyond this |z| from the plane."
    )
    num_tests: int = Field(default=13, ge=4, description="Cubic B-spline test functions per tracer group.")
    velocity_window: float = Field(
        default=40.0, gt=0, description="s of the test functions v exp(-v²/2s²), km/s."
    )
    check_windows: tuple[float, ...] = Field(
        default=(25.0, 1000.0), description="Other s, reported beside the result."
    )
    layer_heights_kpc: tuple[float, ...] = Field(
        default=(0.1, 100.0),
        min_length=1,
        description="Density = sum of sech²(z/h) layers; a large h is a uniform density.",
    )
    other_layers_kpc: tuple[tuple[float, ...], ...] = Field(
        default=((0.07, 100.0), (0.15, 100.0), (0.2, 100.0)),
        description="Other density models: their spread is an error.",
    )
    bin_kpc: float = Field(default=0.005, gt=0, description="Width of the density bins of the sums.")
    low_latitude_deg: float = Field(
        default=20.0,
        ge=0,
        lt=60,
        description="Below it, stars without radial velocity use proper motion alone.",
    )
    other_low_latitudes_deg: tuple[float, ...] = Field(
        default=(12.0, 28.0), description="Variants of the same."
    )
    area_floor: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Leave out a cell whose area falls below this part of its median in range.",
    )
    other_area_floors: tuple[float, ...] = Field(default=(0.02, 0.5), description="Variants of the same.")
    sun_height_kpc: float | None = Field(
        default=None, description="Height of the Sun above the plane; fitted when absent."
    )
    parallax_shift_mas: float = Field(
        default=0.02, ge=0, description="Uncertainty of the parallax zero point."
    )
    dust_scale: float = Field(
        default=0.85, gt=0, description="A_G is rescaled by this to see what the extinction does."
    )
    rv_error_scale: float = Field(
        default=1.3, gt=0, description="Radial-velocity errors are rescaled by this in a variant."
    )
    distribution_components: int = Field(
        default=5, ge=0, description="Isothermal components of the second estimator; 0: none."
    )
    distribution_range_kpc: float = Field(default=0.34, gt=0, description="Heights above the Sun used by it.")
    circular_speed: float = Field(default=229.0, gt=0, description="v_c at the Sun, km/s.")
    circular_speed_slope: float = Field(default=-1.7, description="dv_c/dR at the Sun, km/s/kpc.")
    circular_speed_slope_error: float = Field(default=1.0, ge=0, description="Its uncertainty, km/s/kpc.")
    solar_radius_kpc: float = Field(default=8.122, gt=0, description="R₀.")
    density_scale_kpc: float = Field(
        default=2.6, gt=0, description="Radial scale length of the tracers (tilt term)."
    )
    dispersion_scale_kpc: float = Field(
        default=7.0, gt=0, description="Radial scale length of σ² (tilt term)."
    )
    bootstraps: int = Field(
        default=8,
        ge=0,
        description="Bootstraps over the cells on which moments, flow and score are compared; 0: no network "
        "is trained.",
    )
    networks: VerticalNetworkSettings = Field(
        default=VerticalNetworkSettings(), description="The flow and the score of that comparison."
    )

    @field_validator("bootstraps")
    @classmethod
    def _enough(cls, value: int) -> int:
        if 0 < value < 4:
            raise ValueError("fewer than 4 bootstraps give no covariance of K_z at three heights; or set 0")
        return value
