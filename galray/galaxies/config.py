"""The configuration of a dwarf galaxy's fit: TOML in, validated sections out; unknown keys are errors."""

from __future__ import annotations

import difflib
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from galray.catalog.mirror import Mirror, Place, join_url
from galray.catalog.storage import Location, StorageSettings, is_url
from galray.cluster import ClusterSettings
from galray.config import read_toml, validate_settings
from galray.dwarf import HaloFitSettings
from galray.dwarf.known import find_dwarf
from galray.dwarf.observation import Galaxy
from galray.dwarf.product_settings import ProductSettings
from galray.dwarf.reading import DataSettings
from galray.ensemble import EnsembleSettings
from galray.errors import GalrayError
from galray.provenance import content_hash
from galray.settings import Settings
from galray.tracking import TrackingSettings

__all__ = [
    "DwarfConfig",
    "GalaxySettings",
    "MemberSettings",
    "SphereMockSettings",
    "load_dwarf_config",
    "ready_dwarf_configs",
    "recognise",
]

REMEDY = "`galray dwarf show CONFIG` prints every key"
_WALKER_FILE = re.compile(r"^(?P<name>[a-z0-9]+)_justin1_spec\.dat(\.gz)?$")


class GalaxySettings(Settings):
    """The galaxy as a whole: a row of the table of known dwarfs, and what shall be other than there."""

    key: str = Field(default="", description="A galaxy of `galray dwarf list`, by key, name or abbreviation.")
    ra: float | None = Field(default=None, ge=-180, le=360, description="Centre, deg.")
    dec: float | None = Field(default=None, ge=-90, le=90, description="Centre, deg.")
    centre_error: float | None = Field(
        default=None, ge=0, description="Of the centre along each axis, kpc; each fit draws its own centre."
    )
    distance: float | None = Field(default=None, gt=0, description="kpc.")
    distance_error: float | None = Field(default=None, ge=0, description="kpc.")
    r_half: float | None = Field(default=None, gt=0, description="Circularised half-light radius, kpc.")
    ellipticity: float | None = Field(default=None, ge=0, lt=0.9, description="1 − b/a on the sky.")
    position_angle: float | None = Field(default=None, description="Of the major axis, deg, north to east.")
    velocity: float | None = Field(default=None, description="Systemic heliocentric velocity, km/s.")
    pmra: float | None = Field(default=None, description="Systemic proper motion, mas/yr.")
    pmdec: float | None = Field(default=None, description="Systemic proper motion, mas/yr.")
    pm_error: float | None = Field(default=None, gt=0, description="Error of both, mas/yr.")
    stellar_mass: float | None = Field(
        default=None, ge=0, description="Msun; taken off the total density for the dark one."
    )

    def resolve(self, name: str) -> Galaxy:
        """The galaxy with all that is known of it.

        Arguments:
            name: Its name, where the table gives none.

        Raises:
            GalrayError: The table has no such galaxy.
        """
        values: dict[str, Any] = {"name": name}
        if self.key:
            known = find_dwarf(self.key)
            q = 1 - (known.ellipticity if math.isfinite(known.ellipticity) else 0.0)
            arcmin = known.distance * math.radians(1 / 60) * math.sqrt(q)
            values = {
                "name": known.name,
                "ellipticity": 1 - q,
                "position_angle": known.position_angle if math.isfinite(known.position_angle) else 0.0,
                "r_half": known.r_half_kpc,
                "r_half_error": known.r_half_kpc * known.r_half_error / known.r_half,
                "stellar_mass": 10**known.log10_stellar_mass,
                "light": _light(known, arcmin),
            }
            same = "ra dec distance distance_error velocity pmra pmra_error pmdec pmdec_error"
            values |= {field: getattr(known, field) for field in same.split()}
        own = self.model_dump(exclude={"key", "pm_error"}, exclude_none=True)
        if self.pm_error is not None:
            own |= {"pmra_error": self.pm_error, "pmdec_error": self.pm_error}
        if self.r_half is not None:
            own["light"] = ("plummer", self.r_half, 0.0)
        return Galaxy(**(values | own))


def _light(known: Any, arcmin: float) -> tuple[str, float, float]:
    """The best published profile of a galaxy's light, circularised, kpc."""
    if math.isfinite(known.sersic_radius):
        return ("sersic", known.sersic_radius * arcmin, known.sersic_index)
    if math.isfinite(known.king_limit):
        return ("king", known.king_core * arcmin, known.king_limit * arcmin)
    return ("plummer", known.r_half * arcmin, 0.0)


class SphereMockSettings(Settings):
    """A mock galaxy of known truth instead of files."""

    model: str = Field(description="A model of the Gaia Challenge, such as PlumCoreOm.")
    num_stars: int = Field(default=1000, ge=30, description="Stars with velocities.")
    velocity_error: float = Field(default=2.0, gt=0, description="Gaussian error of velocities, km/s.")
    seed: int = Field(default=0, ge=0, description="Of the stars and their errors.")


class MemberSettings(Settings):
    """The fits of one galaxy: equal ones with other random numbers, and ones that change one thing."""

    seeds: int = Field(default=4, ge=1, description="Fits with different seeds; they make the posterior.")
    bootstraps: int = Field(
        default=2,
        ge=0,
        description="Fits to stars drawn again with replacement: their spread checks the posterior's width.",
    )
    velocities: bool = Field(
        default=True, description="One fit with the other shape of the velocity distribution."
    )
    smoothness: bool = Field(default=True, description="One fit with a halo slope twice as free to change.")
    anisotropies: tuple[Literal["isotropic", "constant", "osipkov_merritt", "baes_van_hese"], ...] = Field(
        default=(), description="One fit for each of these kinds of anisotropy."
    )
    comparison: bool = Field(
        default=False,
        description="Fit cored and cuspy haloes to parts of the stars and compare them on the others (about "
        "four fits more).",
    )
    longer: int = Field(
        default=1,
        ge=0,
        description="How often a fit whose chains have not converged is done again with three times as many "
        "draws; what has not converged then is said in the report.",
    )
    concurrent: int | None = Field(
        default=None, ge=0, description="Fits at the same time; 0: one by one in this process."
    )
    cpus_per_member: float = Field(default=1, gt=0, description="CPUs of a fit.")
    max_crashes: int = Field(default=2, ge=0, description="How often a fit whose process died starts again.")

    def ensemble(self) -> EnsembleSettings:
        """How the fits are run."""
        return EnsembleSettings(
            concurrent=self.concurrent, cpus_per_member=self.cpus_per_member, max_crashes=self.max_crashes
        )


class DwarfConfig(Settings):
    """One galaxy: its stars, the fit, the members, what is made of them."""

    name: str = Field(default="dwarf", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its directory under `output`."""
    description: str = ""
    """One line for the report."""
    seed: int = Field(default=1, ge=0)
    """The root of every random stream."""
    output: Location = "runs"
    """Folder or URL (s3://…, gs://…) that holds run directories."""
    storage: StorageSettings = StorageSettings()
    """How the object stores of `output` and `data` are reached."""
    galaxy: GalaxySettings = GalaxySettings()
    data: DataSettings = DataSettings()
    mock: SphereMockSettings | None = None
    fit: HaloFitSettings = HaloFitSettings()
    members: MemberSettings = MemberSettings()
    products: ProductSettings = ProductSettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _consistent(self) -> DwarfConfig:
        if self.mock is not None and self.data.spectroscopy:
            raise ValueError("data.spectroscopy: leave it empty when [mock] makes the stars")
        return self

    @property
    def place(self) -> Place:
        """Where the run lives: its directory, or its URL."""
        if is_url(self.output):
            return Mirror(join_url(self.output, self.name), self.storage.signed)
        return Place(self.run_dir.resolve())

    @property
    def run_dir(self) -> Path:
        """The run's directory; of a run at a URL, this node's copy."""
        if is_url(self.output):
            return self.place.folder
        try:
            return Path(self.output).expanduser() / self.name
        except RuntimeError:
            raise GalrayError(f"output: '{self.output}': no such home folder", "write the path out") from None

    @property
    def hash(self) -> str:
        """Hash of everything that can change a number."""
        elsewhere = {"name", "description", "output", "storage", "tracking", "cluster"}
        resources = {"concurrent", "cpus_per_member", "max_crashes"}
        return content_hash(
            self.model_dump(mode="json", exclude={**dict.fromkeys(elsewhere, True), "members": resources})
        )


def ready_dwarf_configs() -> dict[str, Path]:
    """The configurations of dwarf galaxies that ship with galray, by name."""
    folder = Path(str(resources.files("galray") / "configs" / "dwarf"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_dwarf_config(source: str | Path, overrides: list[str] | None = None) -> DwarfConfig:
    """Read a configuration, or make one for a file of stars.

    Arguments:
        source: A TOML file, the name of a ready configuration such as ``fornax``, or a file of stars; one of
            the known file names brings galaxy and photometry with it.
        overrides: ``a.b=value`` each.

    Raises:
        GalrayError: There is no such file or configuration, a key is unknown, a value is of the wrong type.
    """
    ready = ready_dwarf_configs()
    path = ready.get(str(source), Path(source).expanduser())
    if is_url(source):
        raise GalrayError(
            f"'{source}': a configuration is a file of this machine, which may name stars at a URL",
            f"use --set data.spectroscopy={source} with one, or `galray dwarf fit-all` for a folder at a URL",
        )
    if not path.is_file():
        close = difflib.get_close_matches(str(source), ready, 1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise GalrayError(
            f"'{source}': neither a configuration nor a file of stars",
            f"{hint}ready configurations are {', '.join(ready)}",
        )
    if path.suffix == ".toml":
        return validate_settings(DwarfConfig, read_toml(path), overrides, str(path), REMEDY)
    return validate_settings(DwarfConfig, recognise(path) or _unknown(path), overrides, str(path), REMEDY)


def recognise(path: Path) -> dict[str, Any] | None:
    """The configuration of a file of stars by its name: ``car_justin1_spec.dat.gz`` and its like.

    Photometry of the same name beside it is taken with it. None for a name that says nothing.
    """
    match = _WALKER_FILE.match(path.name)
    if match is None:
        return None
    try:
        known = find_dwarf(match["name"])
    except GalrayError:
        return None
    data = {"spectroscopy": str(path), "format": "walker"}
    light = path.with_name(path.name.replace("_spec.", "_phot."))
    if light.is_file():
        data["photometry"] = str(light)
    name = known.key.removesuffix("_1").replace("_", "-")
    return {"name": name, "galaxy": {"key": known.key}, "data": data}


def _unknown(path: Path) -> dict[str, Any]:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name.split(".")[0]).strip("-._") or "dwarf"
    return {"name": name, "data": {"spectroscopy": str(path)}}
