"""The ``[catalog]`` section of a run's configuration: which stars, how they become 6D, which are kept."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from galray.catalog.columns import STATE, columns, releases
from galray.catalog.distances import EdsdSettings, JoinedDistanceSettings
from galray.catalog.joins import JoinSettings
from galray.catalog.masks import MaskSettings
from galray.catalog.radial_velocities import RadialVelocitySettings
from galray.catalog.rvs_selection import RVSelectionSettings
from galray.catalog.storage import StorageSettings
from galray.catalog.tracers import CompletenessSettings, ExtinctionSettings, TracerSettings
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.settings import Settings

__all__ = ["BallSettings", "CatalogSettings", "FrameSettings", "StatesSettings", "TileSettings"]

Vector = tuple[float, float, float]


def _check_unit(value: str, wanted: str) -> None:
    from astropy import units as u

    try:
        u.Unit(value).to(wanted)
    except (ValueError, TypeError, u.UnitConversionError) as error:
        raise ValueError(f"'{value}' cannot be converted to {wanted}: {error}") from None


class FrameSettings(Settings):
    """The Galactocentric frame that observables are turned into; the defaults are `GalacticFrame`'s."""

    sun_galcen_distance_kpc: float = Field(
        default=8.122,
        gt=0,
        description="Distance of the Sun from the centre.",
    )
    sun_height_kpc: float = Field(
        default=0.0208,
        description="Height of the Sun above the plane.",
    )
    sun_velocity_km_s: Vector = Field(
        default=(12.9, 245.6, 7.78),
        description="Velocity of the Sun.",
    )
    galcen_ra_deg: float = Field(
        default=266.4051,
        description="Right ascension of the Galactic centre.",
    )
    galcen_dec_deg: float = Field(
        default=-28.936175,
        description="Declination of the Galactic centre.",
    )
    roll_deg: float = Field(
        default=0.0,
        description="Roll of the z axis away from the Galactic pole.",
    )

    def build(self) -> GalacticFrame:
        """The frame with these numbers."""
        return GalacticFrame(**self.model_dump())


class BallSettings(Settings):
    """The ball that is kept, in Galactocentric kpc."""

    radius_kpc: float = Field(
        gt=0,
        description="Radius of the ball.",
    )
    center_kpc: Vector | None = Field(
        default=None,
        description="Centre of the ball; the Sun where not given.",
    )
    margin_kpc: float = Field(
        default=0.0,
        ge=0,
        description="Keep Gaia's stars up to this far outside the ball too, apart, for members that redraw "
        "errors or move all stars: without them such members lose stars at the border and gain none.",
    )

    @model_serializer(mode="wrap")
    def _as_before_margins(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a margin the settings are those of stores that knew none, and so is their hash."""
        values: dict[str, Any] = plain(self)
        if not self.margin_kpc:
            values.pop("margin_kpc", None)
        return values


class SnapshotSettings(Settings):
    """Where an HDF5 snapshot of a simulation holds its stars, and what to do to their places."""

    particles: str = Field(
        default="PartType4",
        description="Group of the particles; 4 is the stars in Gadget's counting.",
    )
    positions: str = Field(
        default="Coordinates",
        description="Dataset of the positions.",
    )
    velocities: str = Field(
        default="Velocities",
        description="Dataset of the velocities.",
    )
    ids: str | None = Field(
        default=None,
        description="Dataset to take source_id from; it must be unique (FIRE's ParticleIDs are not).",
    )
    length_unit: str | None = Field(
        default=None,
        description="Unit of the stored positions; what the file says where not given.",
    )
    speed_unit: str | None = Field(
        default=None,
        description="Unit of the stored velocities; what the file says where not given.",
    )
    center_kpc: Vector = Field(
        default=(0.0, 0.0, 0.0),
        description="The galaxy's centre in the snapshot, in physical kpc; it is subtracted.",
    )
    center_velocity_km_s: Vector = Field(
        default=(0.0, 0.0, 0.0),
        description="The galaxy's velocity in the snapshot; it is subtracted.",
    )
    rotation: tuple[Vector, Vector, Vector] | None = Field(
        default=None,
        description="Rotation about the centre, row by row, that lays the disc into the x-y plane.",
    )

    @field_validator("length_unit", "speed_unit")
    @classmethod
    def _unit(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            _check_unit(value, "kpc" if info.field_name == "length_unit" else "km / s")
        return value

    @field_validator("rotation")
    @classmethod
    def _is_rotation(cls, value: Any) -> Any:
        import numpy as np

        if value is not None:
            matrix = np.array(value)
            if not np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-6) or np.linalg.det(matrix) < 0:
                raise ValueError("is not a rotation: its rows must be orthonormal and right-handed")
        return value


class StatesSettings(Settings):
    """How a ready 6D table of a simulation is to be read."""

    columns: tuple[str, str, str, str, str, str] = Field(
        default=("x", "y", "z", "vx", "vy", "vz"),
        description="Names of the position and velocity columns.",
    )
    length_unit: str = Field(
        default="kpc",
        description="Unit of the positions, as astropy spells it.",
    )
    speed_unit: str = Field(
        default="km / s",
        description="Unit of the velocities, as astropy spells it.",
    )
    handedness: Literal["right", "left"] = Field(
        default="right",
        description="left: x and v_x change sign (galpy's frame, with the Sun at +x).",
    )
    origin_kpc: Vector = Field(
        default=(0.0, 0.0, 0.0),
        description="Galactocentric place of the table's origin, added to the positions.",
    )
    origin_velocity_km_s: Vector = Field(
        default=(0.0, 0.0, 0.0),
        description="Galactocentric velocity of the table's origin, added to the velocities.",
    )

    snapshot: SnapshotSettings = Field(
        default_factory=SnapshotSettings,
        description="Where an HDF5 snapshot holds its stars.",
    )

    @field_validator("length_unit", "speed_unit")
    @classmethod
    def _unit(cls, value: str, info: ValidationInfo) -> str:
        _check_unit(value, "kpc" if info.field_name == "length_unit" else "km / s")
        return value

    def scales(self) -> tuple[float, float]:
        """Factors from the table's units to kpc and km/s."""
        from astropy import units as u

        return float(u.Unit(self.length_unit).to("kpc")), float(u.Unit(self.speed_unit).to("km / s"))


class TileSettings(Settings):
    """The store's view in sky order: HEALPix tiles of bounded size, in the form of a HATS catalogue."""

    max_rows: int = Field(
        default=1_000_000,
        ge=1,
        description="Rows that a tile may hold.",
    )
    max_mb: float = Field(
        default=200.0,
        gt=0,
        description="Size that a tile's file may have in MB.",
    )
    max_level: int = Field(
        default=8,
        ge=0,
        le=11,
        description="Deepest HEALPix level of a tile (nested, ICRS): 8 is 0.23 deg, 10 is 0.06 deg.",
    )


class CatalogSettings(Settings):
    """Which star files are read and how they become shards of 6D stars."""

    files: tuple[str, ...] = Field(
        default=(),
        description="Paths, folders or glob patterns of the input files.",
    )
    format: Literal["auto", "gaia", "states"] = Field(
        default="auto",
        description="gaia: observables as in gaia_source; states: ready 6D tables; auto: by columns.",
    )
    release: str = Field(
        default="dr3",
        description="Gaia release whose column types apply, or the path of a column table (.csv).",
    )
    storage: StorageSettings = Field(
        default_factory=StorageSettings,
        description="How object stores (s3://) are reached.",
    )
    unit_megabytes: float = Field(
        default=256.0,
        gt=0,
        description="Parquet files larger than this are read as several units of work.",
    )
    rename: dict[str, str] = Field(
        default_factory=dict,
        description="Columns of the files that carry other names: {theirs: ours}.",
    )
    states: StatesSettings = Field(
        default_factory=StatesSettings,
        description="Units and frame of ready 6D tables.",
    )
    frame: FrameSettings = Field(
        default_factory=FrameSettings,
        description="The Galactocentric frame.",
    )
    parallax_zero_point: float | Literal["lindegren2021"] = Field(
        default=0.0,
        description="Zero point in mas, subtracted from every parallax (-0.017 … -0.04 in DR3), or "
        "lindegren2021: each star's own, by magnitude, colour and ecliptic latitude.",
    )
    zero_point_outside: Literal["extrapolate", "cut"] = Field(
        default="extrapolate",
        description="Stars beyond the range of lindegren2021 (G 6 to 21; nu_eff 1.1 to 1.9, pseudo-colour "
        "1.24 to 1.72): extrapolate takes the formula as it is, with G held at its ends, and counts them in "
        "the manifest's notes.",
    )
    distance: Literal["inverse_parallax", "edsd", "joined"] = Field(
        default="inverse_parallax",
        description="How distances are found: 1/parallax, a posterior under a prior of exponentially "
        "decreasing space density (negative parallaxes too), or joined from another catalogue.",
    )
    edsd: EdsdSettings = Field(
        default_factory=EdsdSettings,
        description="The prior and estimate of distance = edsd.",
    )
    joined_distance: JoinedDistanceSettings | None = Field(
        default=None,
        description="The catalogue of distance = joined.",
    )
    joins: dict[str, JoinSettings] = Field(
        default_factory=dict,
        description="Columns of other catalogues, joined by source_id, by name of the catalogue.",
    )
    radial_velocities: RadialVelocitySettings = Field(
        default_factory=RadialVelocitySettings,
        description="Radial velocities of other surveys, joined by source_id.",
    )
    masks: dict[str, MaskSettings] = Field(
        default_factory=dict,
        description="Regions of the sky and lists of stars to leave out, by name.",
    )
    tracer: Literal["upper_rgb", "red_clump", "upper_main_sequence"] | TracerSettings | None = Field(
        default=None,
        description="Keep one population, by colour and absolute magnitude: a name or a window.",
    )
    extinction: ExtinctionSettings | None = Field(
        default=None,
        description="Columns of extinction that the tracer's colour and magnitude are corrected with.",
    )
    completeness: CompletenessSettings | None = Field(
        default=None,
        description="Keep only stars bright enough to be seen anywhere in the ball.",
    )
    cuts: dict[str, str | bool | float] = Field(
        default_factory=dict,
        description="Named cuts in order: an SQL condition that stars must meet ('parallax_over_error > 5'), "
        "or the threshold of a built-in one: ruwe, parallax_snr, fidelity, rv_error, visibility_periods, "
        "excess_noise_sig, multi_peak, flux_excess; has_rv, single_star, not_duplicated = true.",
    )
    ball: BallSettings | None = Field(
        default=None,
        description="Keep only stars in this ball.",
    )
    require_rv: bool = Field(
        default=True,
        description="Cut stars without radial velocity; false keeps them in a 5D store of their own.",
    )
    keep_columns: tuple[str, ...] = Field(
        default=(),
        description="Further columns to keep in the shards.",
    )
    weight_column: str | None = Field(
        default=None,
        description="Column kept as each star's weight.",
    )
    sample: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Fraction of the stars to keep, by hash of source_id.",
    )
    rv_selection: RVSelectionSettings = Field(
        default_factory=RVSelectionSettings,
        description="Cells in which the fraction of stars with radial velocity is estimated.",
    )
    num_shards: Annotated[int, Field(ge=1, le=65536)] = Field(
        default=16,
        description="Number of shards.",
    )
    views: tuple[Literal["shards", "tiles"], ...] = Field(
        default=("shards", "tiles"),
        description="What the store holds: shards dealt by hash (always), and tiles in sky order beside.",
    )
    tiles: TileSettings = Field(
        default_factory=TileSettings,
        description="Limits of the tiles.",
    )
    compression: Literal["lz4", "zstd"] = Field(
        default="lz4",
        description="Of shards and tiles: zstd takes an eighth less room, and twice the time both ways.",
    )
    allow_bad: int = Field(
        default=0,
        ge=0,
        description="How many unreadable files may be quarantined.",
    )

    @field_validator("release")
    @classmethod
    def _known_release(cls, value: str) -> str:
        if value.endswith(".csv"):
            try:
                columns(value)
            except GalrayError as error:
                raise ValueError(error.what) from None
        elif value not in releases():
            raise ValueError(f"unknown release '{value}'; known are {', '.join(releases())}")
        return value

    @model_validator(mode="after")
    def _cuts_are_conditions(self) -> CatalogSettings:
        from galray.catalog.quality import parse_cuts

        parse_cuts(self.cuts)
        if self.parallax_zero_point == "lindegren2021" and self.release == "dr2":
            raise ValueError("parallax_zero_point: lindegren2021 is for edr3 and dr3, not for dr2")
        if self.distance == "joined" and self.joined_distance is None:
            raise ValueError("distance = 'joined' needs a section joined_distance with a file")
        if self.extinction is not None and self.tracer is None:
            raise ValueError("extinction corrects the tracer's window: name a tracer too")
        if self.completeness is not None and not (self.completeness.distance_max_kpc or self.ball):
            raise ValueError("completeness needs a ball, or completeness.distance_max_kpc")
        joined = [name for join in self.joins.values() for name in join.names.values()]
        if twice := {name for name in joined if joined.count(name) > 1}:
            raise ValueError(f"joins: two of them give a column '{min(twice)}'; rename one in its columns")
        for kind in (self.joins, self.masks, self.radial_velocities.surveys):
            for name in kind:
                if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                    raise ValueError(
                        f"'{name}': names of joins, masks and surveys are letters, digits, _ and -"
                    )
        reserved = {*STATE, "source_id", "weight"} & set(self.keep_columns)
        if reserved:
            raise ValueError(f"keep_columns names {', '.join(sorted(reserved))}, which shards always hold")
        return self

    def completeness_distance(self) -> float:
        """The largest distance in kpc at which `completeness` asks a star to be seen."""
        assert self.completeness is not None
        if self.completeness.distance_max_kpc is not None:
            return self.completeness.distance_max_kpc
        assert self.ball is not None
        sun = self.frame.build().sun_position
        return self.ball.radius_kpc + math.dist(self.ball_center(), sun)

    def ball_center(self) -> Vector:
        """The ball's centre in kpc: as given, or the Sun's place in the frame."""
        if self.ball is not None and self.ball.center_kpc is not None:
            return self.ball.center_kpc
        return self.frame.build().sun_position
