"""The form of a store's manifest: what a file from elsewhere must be before anything in it is believed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from galray.catalog.measures import DISTANCE_COLUMNS

__all__ = ["require_form"]

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.=+-]+(/[A-Za-z0-9_.=+-]+)*$", max_length=300)]
"""A relative name; one that leaves the store by ``..`` or a link is refused where it is opened."""

Count = Annotated[int, Field(ge=0)]
Triple = Annotated[list[float], Field(min_length=3, max_length=3)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)


class _File(_Form):
    file: FileName
    rows: Count
    bytes: Count
    xxh128: str | None = None
    sha256: str | None = None  # in place of it before format 3

    @model_validator(mode="after")
    def _sum(self) -> _File:
        if self.xxh128 is None and self.sha256 is None:
            raise ValueError("xxh128: absent")
        return self


class _Frame(_Form):
    """Of `galray.frame.GalacticFrame`; the store's is made of it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
    sun_galcen_distance_kpc: float = Field(gt=0, le=1e3)
    sun_height_kpc: float
    sun_velocity_km_s: Triple
    galcen_ra_deg: float
    galcen_dec_deg: float
    roll_deg: float


class _Column(_Form):
    dtype: str


class _Ball(_Form):
    center_kpc: Triple
    radius_kpc: float = Field(gt=0)


class _Bad(_Form):
    path: str
    reason: str


class _Tiles(_Form):
    files: list[_File]


class _Manifest(_Form):
    """Keys that are read from a manifest, with their types; others are kept as they are."""

    kind: Literal["6d", "no_rv", "margin"]
    source: Literal["gaia", "states"]
    num_rows: Count
    shards: list[_File]
    columns: dict[str, _Column]
    account: dict[str, int]
    hash: str
    frame: _Frame
    settings: dict[str, Any]
    ball: _Ball | None = None
    cuts: dict[str, str] = {}
    created: str = ""
    distance: Literal["inverse_parallax", "edsd", "joined"] = "inverse_parallax"
    parallax_zero_point: float | Literal["lindegren2021"] | None = None
    inputs: list[dict[str, Any]] = []
    quarantined: list[_Bad] = []
    seed: int = 0
    selection: dict[FileName, str] | None = None
    tiles: _Tiles | None = None

    @model_validator(mode="after")
    def _possible(self) -> _Manifest:
        if not abs(self.frame.sun_height_kpc) < self.frame.sun_galcen_distance_kpc:
            raise ValueError("frame: the Sun is higher above the plane than far from the centre")
        if not self.shards:
            raise ValueError("shards: there is none")
        per_star = ["parallax_zero_point"] if isinstance(self.parallax_zero_point, str) else []
        for name in (*DISTANCE_COLUMNS[self.distance], *per_star) if self.source == "gaia" else ():
            if name not in self.columns:
                raise ValueError(f"columns: there is no {name}, which the distances need")
        if self.source == "gaia" and self.parallax_zero_point is None:
            raise ValueError("parallax_zero_point: absent")
        return self


def require_form(manifest: Any) -> None:
    """Refuse what is no manifest.

    Arguments:
        manifest: What a file of that name holds.

    Raises:
        ValueError: A key is absent or of another type; it is named.
    """
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
