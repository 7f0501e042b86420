"""The configuration of a run: TOML in, validated sections out; unknown keys are errors.

Every section belongs to the package that reads it; this module only joins them, finds configurations by
name, applies overrides and turns validation errors into one line each.
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from galray.calibration.settings import CalibrationSettings
from galray.catalog import CatalogSettings
from galray.catalog.mirror import Mirror, Place, join_url
from galray.catalog.storage import Location, is_url
from galray.cluster import ClusterSettings
from galray.ensemble import EnsembleSettings, TuneSettings
from galray.errors import GalrayError
from galray.gravity import GravitySettings
from galray.gravity.vertical import VerticalSettings
from galray.mocks import DustSettings, MilkyWaySettings, ObserveSettings
from galray.phasespace import FlowSettings, ScoreSettings
from galray.provenance import content_hash
from galray.results import PlacesSettings
from galray.settings import Settings
from galray.tracking import TrackingSettings
from galray.training import ScoreTrainingSettings, TrainingSettings

__all__ = [
    "MockSettings",
    "RunConfig",
    "load_config",
    "overrides_of",
    "read_toml",
    "ready_configs",
    "to_toml",
    "validate_settings",
    "with_values",
]

AnySettings = TypeVar("AnySettings", bound=BaseModel)
Method = Literal["flow", "score", "moments", "vertical"]


class MockSettings(Settings):
    """A mock galaxy that is generated, observed and written in Gaia's bulk form before the run reads it."""

    galaxy: MilkyWaySettings = MilkyWaySettings()
    observe: ObserveSettings = ObserveSettings()
    dust: DustSettings | None = None
    """Dust that dims, reddens and hides the stars; none where not given."""
    rows_per_file: int = Field(default=100_000, gt=0)
    """Rows of one ``GaiaSource_*.csv.gz``."""


class TrainingSection(Settings):
    """How each family of models is trained."""

    flow: TrainingSettings = TrainingSettings()
    score: ScoreTrainingSettings = ScoreTrainingSettings()


class VerticalSection(VerticalSettings):
    """The vertical inversion of local stars, and where their selection function lies."""

    effective_area: str = ""
    """Folder of the cells' effective areas; ``eff_area`` beside the first star file where not given."""


class CostSettings(Settings):
    """What a core-hour costs, for the extrapolation of ``--sample`` and ``--dry-run``."""

    dollars_per_core_hour: float = Field(default=0.05, ge=0)


class RunConfig(Settings):
    """A whole run: what to read, which inversions to run, how many members, where to report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name, and the name of its directory under `output`."""
    description: str = ""
    """One line for the report."""
    seed: int = Field(default=1, ge=0)
    """The root of every random stream of the run."""
    output: Location = "runs"
    """Folder or URL (s3://…, gs://…) that holds run directories. Of a run at a URL each node keeps a copy of
    what it works on; the object store is reached as `catalog.storage` says."""
    methods: tuple[Method, ...] = Field(default=("flow", "score", "moments"), min_length=1)
    """The inversions to run: ``flow``, ``score`` and ``moments``, or ``vertical`` alone."""
    blind: bool = False
    """Report every density with a hidden offset until ``galray unblind``, so that nobody tunes to a value."""
    mock: MockSettings | None = None
    """Generate a mock Milky Way and run on its files (`catalog.files` is then left empty)."""
    catalog: CatalogSettings
    flow: FlowSettings = FlowSettings()
    score: ScoreSettings = ScoreSettings()
    training: TrainingSection = TrainingSection()
    gravity: GravitySettings = GravitySettings()
    vertical: VerticalSection | None = None
    places: PlacesSettings = PlacesSettings()
    ensemble: EnsembleSettings = EnsembleSettings()
    tune: TuneSettings = TuneSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()
    cost: CostSettings = CostSettings()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if "vertical" in self.methods and (len(self.methods) > 1 or self.vertical is None):
            raise ValueError("methods: 'vertical' runs alone and needs a [vertical] section")
        if "vertical" in self.methods and self.blind:
            raise ValueError("blind: the vertical inversion has no blinding")
        if self.mock is not None and self.catalog.files:
            raise ValueError("catalog.files: leave it empty when [mock] generates the files")
        if self.mock is None and not self.catalog.files:
            raise ValueError("catalog.files: no input; name files or add a [mock] section")
        if "vertical" not in self.methods and self.catalog.ball is None:
            raise ValueError("catalog.ball: needed by flow, score and moments; set catalog.ball.radius_kpc")
        if "flow" in self.methods and self.flow.conditional:
            raise ValueError("flow.conditional: the run's accelerations need n(x) too; leave it false")
        dust = self.gravity.dust
        if dust is not None and dust.variant == "conditional" and "score" in self.methods:
            raise ValueError("gravity.dust.variant: 'conditional' needs p(v|x), which a score network lacks")
        if dust is not None and "moments" in self.methods and self.gravity.moments.selection == "known":
            raise ValueError("gravity.dust: set gravity.moments.selection = 'shared' for the moments' own ε")
        if "flow" in self.methods and self.flow.missing_rv == "marginalise":
            if self.catalog.require_rv:
                raise ValueError("flow.missing_rv: 'marginalise' needs catalog.require_rv = false")
            if self.ensemble.flow.draws:
                raise ValueError(
                    "flow.missing_rv: 'marginalise' redraws no errors; set ensemble.flow.draws = 0"
                )
        if len(set(self.methods)) != len(self.methods):
            raise ValueError("methods: each inversion may be named once")
        return self

    @property
    def place(self) -> Place:
        """Where the run lives: its directory, or its URL."""
        if is_url(self.output):
            return Mirror(join_url(self.output, self.name), self.catalog.storage.signed)
        return Place(self.run_dir.resolve())

    @property
    def run_dir(self) -> Path:
        """The run's directory; of a run at a URL, this node's copy."""
        if is_url(self.output):
            return self.place.folder
        try:
            return Path(self.output).expanduser() / self.name
        except RuntimeError:  # ~name of a user who is not known
            raise GalrayError(f"output: '{self.output}': no such home folder", "write the path out") from None

    @property
    def hash(self) -> str:
        """Hash of everything that can change a number: where it runs and how it is logged cannot."""
        elsewhere = dict.fromkeys(
            ("name", "description", "output", "tune", "calibration", "tracking", "cluster", "cost"), True
        )
        resources = {"concurrent", "cpus_per_member", "gpus_per_member", "threads", "max_crashes"}
        resources |= {"memory_gb_per_member", "labels"}
        # How many bad files are forgiven changes no star (the store's own hash tells which stars it has), and
        # tiles are for looking at.
        catalog = {"allow_bad", "views", "tiles"}
        exclude: dict[str, Any] = {**elsewhere, "ensemble": resources, "catalog": catalog}
        return content_hash(self.model_dump(mode="json", exclude=exclude))


def ready_configs() -> dict[str, Path]:
    """The configurations that ship with galray, by name."""
    folder = Path(str(resources.files("galray") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_config(source: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run configuration.

    Arguments:
        source: A TOML file, or the name of a ready configuration such as ``demo``.
        overrides: ``a.b=value`` each; the value is TOML, or a bare string.

    Raises:
        GalrayError: The file is absent or broken, a key is unknown, a value is of the wrong type.
    """
    ready = ready_configs()
    path = ready.get(str(source), Path(source))
    if not path.is_file():
        close = difflib.get_close_matches(str(source), ready, 1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise GalrayError(
            f"no configuration '{source}': neither a file nor a ready one",
            f"{hint}ready ones are {', '.join(ready)}",
        )
    return validate_settings(RunConfig, read_toml(path), overrides, str(path))


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """Values by dotted key, or in nested sections, as overrides ``a.b=value``."""
    import tomli_w

    texts = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            texts += [f"{key}.{text}" for text in overrides_of(value)]
        else:
            plain = list(value) if isinstance(value, tuple) else value
            texts.append(f"{key}={tomli_w.dumps({'value': plain}).partition('=')[2].strip()}")
    return texts


def with_values(
    config: RunConfig,
    values: Mapping[str, Any],
    source: str,
    remedy: str = "`galray config show` prints every key",
) -> RunConfig:
    """A configuration with some keys changed.

    Arguments:
        config: The configuration.
        values: By dotted key.
        source: Where the values come from, for the message.
        remedy: What to do about a wrong one.

    Raises:
        GalrayError: A key is unknown, a value is not allowed.
    """
    return validate_settings(RunConfig, config.model_dump(mode="json"), overrides_of(values), source, remedy)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        GalrayError: It cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GalrayError(f"{path}: not a TOML file: {error}", "mend the line it names") from None
    except OSError as error:
        raise GalrayError(f"{path}: cannot be read: {error.strerror}", "check its permissions") from None


def validate_settings(
    model: type[AnySettings],
    data: dict[str, Any],
    overrides: list[str] | None = None,
    source: str = "configuration",
    remedy: str = "`galray config show` prints every key",
) -> AnySettings:
    """Build settings from nested values and overrides, with one line for what is wrong.

    Arguments:
        model: The class of the settings.
        data: Nested values, changed in place by the overrides.
        overrides: ``a.b=value`` each; the value is TOML, or a bare string.
        source: Where the values come from, for the message.
        remedy: What to do about a wrong key.

    Raises:
        GalrayError: A key is unknown, a value is of the wrong type.
    """
    for override in overrides or []:
        _override(data, override, model, remedy)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise GalrayError(f"{source}: {_explain(error, model)}", remedy) from None


def _override(data: dict[str, Any], text: str, model: type[BaseModel], remedy: str) -> None:
    """Apply one ``a.b=value`` in place."""
    key, separator, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise GalrayError(
            f"--set {text}: not of the form a.b=value", "for example --set ensemble.concurrent=2"
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word or path is a string
    wanted = _annotation(parts, model)
    if wanted is str and not isinstance(parsed, str):
        parsed = value.strip()  # so is a name such as 2026-11-21 or 007
    if isinstance(parsed, str) and typing.get_origin(wanted) in (list, tuple):
        parsed = [parsed]  # one bare value stands for a list of one
    section = data
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise GalrayError(f"--set {text}: '{part}' is a value, not a section", remedy)
    section[parts[-1]] = parsed


def _annotation(parts: list[str], root: type[BaseModel]) -> Any:
    """The type of the field at this path; None where there is no such field."""
    model: Any = root
    for part in parts[:-1]:
        model = _section_of(model, part)
        if model is None:
            return None
    field = model.model_fields.get(parts[-1])
    return None if field is None else field.annotation


def _section_of(model: type[BaseModel], part: str) -> type[BaseModel] | None:
    """The model of a section, through ``Section | None``; None where there is no such section."""
    field = model.model_fields.get(part)
    if field is None:
        return None
    options = [field.annotation]
    if typing.get_origin(field.annotation) in (typing.Union, types.UnionType):
        options = list(typing.get_args(field.annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Validation errors as ``key: what is wrong``, with the nearest known key for an unknown one."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _keys(model, [str(part) for part in item["loc"][:-1]])
            close = difflib.get_close_matches(str(item["loc"][-1]), known, 1)
            lines.append(f"{where}: unknown key" + (f", did you mean '{close[0]}'?" if close else ""))
        elif item["type"] == "value_error":
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {message}" if where else message)
        else:
            given = repr(item["input"])
            given = given if len(given) < 60 else given[:57] + "..."
            lines.append(f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}, got {given}")
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _keys(model: type[BaseModel], parts: list[str]) -> list[str]:
    """The keys of the section at this path."""
    for part in parts:
        section = _section_of(model, part)
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def to_toml(config: BaseModel) -> str:
    """A configuration as TOML, every key written out; keys whose value is None are left out."""
    import tomli_w

    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value if item is not None]
    return value
