"""One galaxy's products: made from its members, written as tables with units, read again for a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from galray.dwarf.dispersion import Rings, dispersion, rings, surface_density
from galray.dwarf.known import published_haloes
from galray.dwarf.observation import Observation
from galray.dwarf.products import Products, Quantity
from galray.ensemble import MemberOutcome
from galray.galaxies.config import DwarfConfig
from galray.galaxies.members import COMPARISON, load_posterior
from galray.provenance import write_atomic
from galray.seeds import seed_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["GalaxyResult", "measure", "mock_truth", "sentence", "write_tables"]

_BANDS = ("low95", "low68", "median", "high68", "high95")
_UNITS = {
    "density": "solMass / kpc3",
    "dark_density": "solMass / kpc3",
    "mass": "solMass",
    "slope": "",
    "dark_slope": "",
    "number_density": "1 / kpc3",
    "surface_density": "1 / kpc2",
    "dispersion_los": "km / s",
    "dispersion_r": "km / s",
    "anisotropy": "",
}


@dataclass
class GalaxyResult:
    """What was measured of one galaxy.

    Arguments:
        name: Name of its run.
        title: Name of the galaxy.
        observation: Its stars.
        quantities: Numbers with their posteriors.
        r: Radii of the profiles, kpc.
        profiles: Quantiles of each profile, (5, k).
        estimators: Masses by simple estimators beside the posterior's.
        cusp: Core or cusp.
        comparison: Cored against cuspy haloes on held-out stars; None without that member.
        dispersion: Mean velocity, dispersion, its error, km/s.
        rings: Dispersion in rings.
        light: Surface density in rings.
        published: Published values of the galaxy.
        truth: Profiles of a mock's truth at `r`; empty for real stars.
        members: What became of each member.
        notes: What must be known.
        settings: Of the fit, in words.
        cpu_seconds: Of all members.
    """

    name: str
    title: str
    observation: Observation
    quantities: list[Quantity]
    r: NDArray[np.float64]
    profiles: dict[str, NDArray[np.float64]]
    estimators: list[dict[str, Any]]
    cusp: dict[str, Any]
    comparison: dict[str, Any] | None
    dispersion: tuple[float, float, float]
    rings: Rings
    light: Rings
    published: list[Any]
    truth: dict[str, NDArray[np.float64]]
    members: list[dict[str, Any]]
    notes: list[str]
    settings: str
    cpu_seconds: float = 0.0

    def quantity(self, name: str) -> Quantity:
        """A quantity by its name, or by the beginning of it."""
        return next(q for q in self.quantities if q.name == name or q.name.startswith(name))

    @property
    def summary(self) -> dict[str, Any]:
        """The numbers as plain values."""
        mean, sigma, error = self.dispersion
        return {
            "name": self.name,
            "galaxy": self.title,
            "sentence": sentence(self),
            "stars": len(self.observation),
            "members": self.observation.num_members,
            "velocity": mean,
            "dispersion": sigma,
            "dispersion_error": error,
            "quantities": [_plain(asdict(quantity)) for quantity in self.quantities],
            "estimators": self.estimators,
            "core_or_cusp": _plain(self.cusp),
            "held_out": _plain(self.comparison) if self.comparison else None,
            "published": [asdict(value) for value in self.published],
            "account": self.observation.account,
            "light_account": self.observation.light_account,
            "sources": self.observation.sources,
            "fits": _plain(self.members),
            "settings": self.settings,
            "notes": self.notes,
            "cpu_seconds": self.cpu_seconds,
        }


def measure(config: DwarfConfig, observation: Observation, outcomes: list[MemberOutcome]) -> GalaxyResult:
    """Make the products of one galaxy from its finished members.

    Arguments:
        config: Its configuration.
        observation: Its stars.
        outcomes: Its members; failed ones are left out and told of.

    Raises:
        GalrayError: No base member has finished.
    """
    done = [outcome for outcome in outcomes if outcome.finished]
    base, boots, others = [], [], {}
    comparison = None
    for outcome in done:
        variant = outcome.spec.family.partition("/")[2]
        if variant == COMPARISON:
            comparison = outcome.result.get("comparison")
        elif variant:
            others[variant] = load_posterior(outcome.folder)
        elif outcome.spec.bootstrap:
            boots.append(load_posterior(outcome.folder))
        else:
            base.append(load_posterior(outcome.folder))
    galaxy = observation.galaxy
    whole = dispersion(observation.velocity, observation.velocity_error, observation.membership)
    products = Products(
        base,
        config.products,
        stellar_mass=galaxy.stellar_mass,
        distance=galaxy.distance,
        outermost=observation.outermost,
        dispersion=whole[1],
        half_light=(galaxy.r_half, galaxy.r_half_error),
        bootstraps=boots,
        variants=others,
        seed=seed_for(config.seed, "stellar mass"),
    )
    quantities = products.quantities()
    truth: dict[str, Any] = {}
    if config.mock is not None:
        truth = mock_truth(config.mock.model, products.r)
        quantities = [_with_truth(q, config, products.half_radius) for q in quantities]
    cusp = products.core_or_cusp()
    notes = [*observation.notes, *products.notes]
    for outcome in outcomes:
        if not outcome.finished:
            notes.append(f"member {outcome.spec.name} failed: {outcome.error}")
        elif not outcome.result.get("diagnostics", {}).get("converged", True):
            found = outcome.result["diagnostics"]
            notes.append(
                f"the sampling of {outcome.spec.name} has not converged: R-hat {found['rhat_max']:.2f} of "
                f"{found['worst_parameter']}, {found['ess_min']:.0f} effective samples"
            )
    if galaxy.stellar_mass:
        notes.append(f"stars of {galaxy.stellar_mass:.2g} Msun are taken off the total for the dark density")
    return GalaxyResult(
        name=config.name,
        title=galaxy.name,
        observation=observation,
        quantities=quantities,
        r=products.r,
        profiles=products.profiles(),
        estimators=products.estimators(),
        cusp=cusp,
        comparison=comparison,
        dispersion=whole,
        rings=rings(observation),
        light=surface_density(observation),
        published=published_haloes(_key(config)),
        truth=truth,
        members=[_member(outcome) for outcome in outcomes],
        notes=notes,
        settings=_settings_words(config),
        cpu_seconds=float(sum(outcome.result.get("cpu_seconds", 0.0) for outcome in done)),
    )


def mock_truth(model: str, r: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Profiles of a model of the Gaia Challenge at radii in kpc."""
    sphere = _mock(model)
    density, slope = sphere.density(r), -sphere.slope(r)
    return {
        "density": density,
        "dark_density": density,
        "mass": sphere.mass(r),
        "slope": slope,
        "dark_slope": slope,
        "anisotropy": sphere.beta(r),
        "number_density": sphere.number_density(r),
        "surface_density": sphere.surface_density(r),
        "dispersion_los": sphere.sigma_los(r),
        "dispersion_r": sphere.sigma_r(r),
    }


@cache
def _mock(model: str) -> Any:
    from galray.mocks.dwarfs import gaia_challenge

    return gaia_challenge(model)


def _with_truth(quantity: Quantity, config: DwarfConfig, half: float) -> Quantity:
    """A quantity with the truth of the mock beside it, where it has one."""
    assert config.mock is not None
    sphere = _mock(config.mock.model)
    at = np.array([config.products.central_radius])
    truths = {
        "mass_half": lambda: sphere.mass(np.array([half]))[0],
        "mass_half_3d": lambda: sphere.mass(np.array([4 / 3 * half]))[0],
        "half_light_radius": lambda: sphere.half_light_radius,
    }
    if quantity.name.startswith("rho_"):
        value = float(sphere.density(at)[0])
    elif quantity.name.startswith("gamma_"):
        value = -float(sphere.slope(at)[0])
    elif quantity.name in truths:
        value = float(truths[quantity.name]())
    else:
        return quantity
    return replace(quantity, truth=value)


def sentence(result: GalaxyResult) -> str:
    """One sentence that can be quoted."""
    rho, mass = result.quantity("rho_dm_"), result.quantity("mass_half")
    slope = result.quantity("gamma_dm_")
    where = rho.name.removeprefix("rho_dm_").replace("pc", " pc")
    cusp = result.cusp
    called = {
        "core": f"a core (P(γ < {cusp['core_below']:g}) = {cusp['core']:.2f})",
        "cusp": f"a cusp (P(γ > {cusp['cusp_above']:g}) = {cusp['cusp']:.2f})",
        "no cusp": f"a cusp is excluded (P(γ > {cusp['cusp_above']:g}) = {cusp['cusp']:.2f})",
        "no core": f"a core is excluded (P(γ < {cusp['core_below']:g}) = {cusp['core']:.2f})",
        "undecided": "core or cusp stays open",
    }[cusp["verdict"]]
    return (
        f"{result.title}: from {result.observation.num_members:.0f} member velocities, "
        f"ρ_DM({where}) = {_scaled(rho)} Msun/kpc³ and M(<R_half) = {_scaled(mass)} Msun (68 %); "
        f"γ_DM({where}) = {slope.value:.2f} +{slope.plus:.2f} −{slope.minus:.2f}: {called}; "
        f"{result.settings}."
    )


def _scaled(quantity: Quantity) -> str:
    """A large number as (a +b −c) × 10ⁿ."""
    power = math.floor(math.log10(quantity.value)) if quantity.value > 0 else 0
    unit = 10.0**power
    raised = str(power).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    value, plus, minus = (number / unit for number in (quantity.value, quantity.plus, quantity.minus))
    return f"({value:.2f} +{plus:.2f} −{minus:.2f}) × 10{raised}"


def _settings_words(config: DwarfConfig) -> str:
    beta = config.fit.anisotropy
    given = [key for key in ("inner", "outer", "radius", "exponent") if getattr(beta, key) is not None]
    kind = beta.kind.replace("_", " ")
    if beta.kind == "isotropic":
        return "isotropic orbits given"
    if beta.kind == "osipkov_merritt" and given:
        return f"Osipkov–Merritt anisotropy with r_a = {beta.radius:g} kpc given"
    how = "given" if len(given) == 4 else "marginalised"
    return f"anisotropy {how} ({kind})"


def _key(config: DwarfConfig) -> str:
    from galray.dwarf.known import find_dwarf

    return find_dwarf(config.galaxy.key).key if config.galaxy.key else ""


def _member(outcome: MemberOutcome) -> dict[str, Any]:
    spec = outcome.spec
    _, _, variant = spec.family.partition("/")
    found = outcome.result
    return {
        "index": spec.index,
        "what": variant or (f"bootstrap {spec.bootstrap}" if spec.bootstrap else f"seed {spec.seed}"),
        "status": outcome.status,
        "seconds": outcome.seconds,
        "error": outcome.error,
        **{key: found[key] for key in ("rho150", "mass_half", "cpu_seconds", "comparison") if key in found},
        **{key: found.get("diagnostics", {}).get(key) for key in ("rhat_max", "ess_min", "converged")},
    }


def write_tables(result: GalaxyResult, folder: Path, about: dict[str, Any]) -> None:
    """Write a galaxy's tables: ``summary.json``, and quantities and profiles as ECSV and Parquet with units.

    Arguments:
        result: The galaxy.
        folder: ``results/`` of its run directory.
        about: Provenance, stored in the tables' metadata.
    """
    from astropy.table import QTable, Table

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "summary.json", result.summary | {"provenance": about})
    profiles = QTable(meta={"galaxy": result.title, **_flat(about)})
    profiles["r"] = result.r
    profiles["r"].unit = "kpc"
    for name, quantiles in result.profiles.items():
        for band, values in zip(_BANDS, quantiles, strict=True):
            profiles[f"{name}_{band}"] = values
            profiles[f"{name}_{band}"].unit = _UNITS[name] or None
    for name, values in result.truth.items():
        profiles[f"{name}_truth"] = values
        profiles[f"{name}_truth"].unit = _UNITS[name] or None
    numbers = Table(meta={"galaxy": result.title, **_flat(about)})
    numbers["name"] = [q.name for q in result.quantities]
    numbers["label"] = [q.label for q in result.quantities]
    numbers["unit"] = [q.unit for q in result.quantities]
    for at, band in enumerate(_BANDS):
        numbers[band] = [q.quantiles[at] for q in result.quantities]
    for term in ("fit", "seeds", "bootstrap", "variants"):
        numbers[term] = [q.terms.get(term, math.nan) for q in result.quantities]
    numbers["truth"] = [math.nan if q.truth is None else q.truth for q in result.quantities]
    numbers["note"] = [q.note for q in result.quantities]
    for table, name in ((profiles, "profiles"), (numbers, "quantities")):
        table.write(folder / f"{name}.ecsv", format="ascii.ecsv", overwrite=True)
        _write_parquet(table, folder / f"{name}.parquet")


def _write_parquet(table: Any, path: Path) -> None:
    """Columns with their unit in the field's metadata, as the tables of a run have it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays, fields = [], []
    for name in table.colnames:
        column = table[name]
        values = column.value if hasattr(column, "value") else column
        array = pa.array(np.asarray(values).tolist())
        unit = str(getattr(column, "unit", None) or "")
        fields.append(pa.field(name, array.type, metadata={"unit": unit} if unit else None))
        arrays.append(array)
    meta = {str(key): json.dumps(value, default=str) for key, value in table.meta.items()}
    pq.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=meta)), path)


def _flat(about: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if not isinstance(value, dict)}


def _plain(value: Any) -> Any:
    """Numbers that JSON knows: NaN becomes null."""
    from galray.ensemble.store import plain

    return plain(value)
