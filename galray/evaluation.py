"""The measured field at positions of the user's choice: values with errors, units and provenance.

A run is evaluated as its own tables are: every member at every position, members to an error budget, methods
to one value. A single field gives the errors that it carries (splines do), or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from galray import gravity
from galray.blinding import hidden_offset, is_blind
from galray.catalog.storage import is_url
from galray.ensemble import BudgetSettings, Estimate, Term, combine_family, combine_methods
from galray.ensemble.fields import member_fields
from galray.errors import GalrayError
from galray.frame import GalacticFrame, cylindrical
from galray.gravity.exports import has_potential
from galray.positions import Positions
from galray.results import ACCELERATION_UNIT, DENSITY_UNIT
from galray.steady_state import with_disturbances
from galray.units import MSUN_PC3

__all__ = ["Evaluation", "FieldSource", "RunSource", "evaluate", "open_source"]

Array = NDArray[np.float64]

UNITS = {
    **dict.fromkeys(("a_x", "a_y", "a_z", "a_R", "a_phi"), ACCELERATION_UNIT),
    "potential": "km2 / s2",
    **dict.fromkeys(("rho", "rho_dm"), DENSITY_UNIT),
}
"""What is reported, in this order, with its unit; Φ is zero at the Sun."""
DENSITIES = ("rho", "rho_dm")
CHUNK = 32
"""Positions that are combined at once: their covariance is (8 · this)² numbers."""
NUM_BARYON_DRAWS = 32


@dataclass(frozen=True)
class Evaluation:
    """A table of values and errors at positions.

    Attributes:
        table: ``QTable``: the user's other columns, x, y, z, then every quantity with its error.
        num_outside: Positions outside the ball, whose values are NaN.
        num_without_density: Positions inside it whose density kernel reaches out of it: their ρ is NaN.
    """

    table: Any
    num_outside: int
    num_without_density: int


class FieldSource:
    """One field, with the errors that it carries.

    Arguments:
        field: The field.
        kernel: The kernel of its density.
        frame: Gives the Sun's place, at which Φ is zero.
    """

    name = "field"

    def __init__(self, field: Any, kernel: Any = None, frame: GalacticFrame | None = None) -> None:
        self.field = field
        self.kernel = kernel or gravity.Kernel()
        self.frame = frame or GalacticFrame()
        self.region = getattr(field, "region", None)
        self.quantities = [n for n in UNITS if n != "rho_dm" and (n != "potential" or has_potential(field))]
        self.meta: dict[str, Any] = {}

    def estimate(self, x: Array, names: Sequence[str]) -> Estimate:
        """Values (quantity-major: all positions of the first name, then of the next) and their errors."""
        value = field_values(self.field, x, names, self.kernel, self.frame)
        terms = {}
        covariance = field_covariance(self.field, x, names, self.kernel, self.frame)
        if covariance is not None:
            terms["statistics"] = Term(covariance, 0, np.full(len(value), np.inf))
        return Estimate("field", value, terms)


class RunSource:
    """The members of a finished run, combined at any position as they were at the run's own.

    Arguments:
        folder: The run directory.
        method: One inversion, or ``combined``.

    Raises:
        GalrayError: The run has no finished member, or not this method.
    """

    def __init__(self, folder: Path, method: str = "combined") -> None:
        from galray.rundir import load_run, read_json

        run = load_run(folder)
        config = run.config
        self.name = method
        self.kernel = gravity.Kernel.from_settings(config.gravity.kernel)
        self.frame = run.catalog.frame
        self.budget: BudgetSettings = config.ensemble.budget
        self.members = member_fields(folder)
        if not self.members:
            raise GalrayError(f"{folder}: holds no measured field", "run `galray run` on it first")
        if method != "combined" and method not in self.members:
            raise GalrayError(
                f"--method {method}: the run has {', '.join(self.members)}", "name one of them, or none"
            )
        self.blocks = len(list((folder / "fields" / "moments").glob("jackknife-*.safetensors")))
        regions = [getattr(field, "region", None) for pairs in self.members.values() for _, field in pairs]
        self.region = min((r for r in regions if r is not None), key=lambda r: r.radius, default=None)
        truth = read_json(folder / "truth.json") if config.mock is not None else None
        self.baryons = gravity.build(config.gravity.baryons, truth["baryons"] if truth else None)
        self.baryon_draws = [self.baryons.draw([config.seed, i]) for i in range(NUM_BARYON_DRAWS)]
        self.disturbances = run.summary.get("disturbances", {}).get(method, {})
        calibration = run.summary.get("calibration", {})
        factors, self.uncalibrated = calibration.get("factors", []), calibration.get("outside", ())
        self.inflation = {row["quantity"]: row["factor"] for row in factors if row["method"] == method}
        self.quantities = list(UNITS)
        self.offset = hidden_offset(config, run.folder)
        record = run.provenance
        self.meta = {
            "run": run.folder.name,
            "config_hash": record.get("config_hash"),
            "input_hash": record.get("input_hash"),
            "seed": record.get("seed"),
            "baryons": self.baryons.name,
            "blind": is_blind(config, run.folder),
        }

    def estimate(self, x: Array, names: Sequence[str]) -> Estimate:
        """Values (quantity-major) with the run's error budget: errors of the baryons and disturbances too."""
        groups = [name for name in names for _ in range(len(x))]
        wanted = list(self.members) if self.name == "combined" else [self.name]
        estimates = []
        for family in wanted:
            specs = [spec for spec, _ in self.members[family]]
            fields = [field for _, field in self.members[family]]
            values = np.array([field_values(f, x, names, self.kernel, self.frame) for f in fields])
            spread = None
            if family == "moments" and self.blocks:
                spread = field_covariance(fields[0], x, names, self.kernel, self.frame)
            estimate = combine_family(
                specs,
                values,
                groups=groups,
                jackknife=spread,
                jackknife_blocks=self.blocks if spread is not None else 0,
                settings=self.budget,
            )
            if spread is not None:
                both = field_covariance(fields[0], x, names, self.kernel, self.frame, "posterior")
                assert both is not None
                estimate = estimate.with_term("penalty", both - spread)
            estimates.append(estimate)
        whole = estimates[0]
        if self.name == "combined":
            whole = combine_methods(estimates, groups=groups, settings=self.budget)
        causes = {c: disturbed(sizes, x, names, self.frame) for c, sizes in self.disturbances.items()}
        whole = with_disturbances(whole, groups, causes)
        whole = whole.shifted(np.where(np.isin(groups, DENSITIES), self.offset, 0.0))
        factors = np.array([self.inflation.get(name, 1.0) for name in groups])
        whole = whole.inflated(factors, self.uncalibrated)
        if "rho_dm" not in names:
            return whole
        own = np.array(groups) == "rho_dm"
        value = whole.value.copy()
        points = torch.from_numpy(x)
        baryons = np.asarray(self.baryons.smoothed_density(points, self.kernel)) / MSUN_PC3
        value[own] -= baryons
        draws = [np.asarray(b.smoothed_density(points, self.kernel)) / MSUN_PC3 for b in self.baryon_draws]
        term = np.zeros((len(value), len(value)))
        term[np.ix_(own, own)] = np.cov(np.array(draws), rowvar=False)
        whole = Estimate(whole.method, value, whole.terms, missing=whole.missing, excluded=whole.excluded)
        return whole.with_term("baryons", term, NUM_BARYON_DRAWS) if term.any() else whole


def evaluate(source: FieldSource | RunSource, positions: Positions, *, outside: str = "error") -> Evaluation:
    """Values and errors at positions, as a table.

    Arguments:
        source: A field or a run.
        positions: Where.
        outside: ``error``, or ``nan`` for positions outside the ball of the stars.

    Raises:
        GalrayError: A position lies outside and `outside` is ``error``.
    """
    x, count = positions.x, len(positions)
    inside = np.ones(count, dtype=bool)
    dense = inside.copy()
    if source.region is not None:
        inside = source.region.contains(torch.from_numpy(x)).numpy()
        dense = inside.copy()
        reach = tuple(1.001 * half for half in source.kernel.reach)
        dense[inside] = source.region.contains_kernel(torch.from_numpy(x[inside]), reach).numpy()
    if source.region is not None and not inside.all() and outside == "error":
        first = int(np.flatnonzero(~inside)[0])
        where = ", ".join(f"{v:.3f}" for v in x[first])
        raise GalrayError(
            f"{positions.row(first)}: ({where}) kpc lies outside the ball of {source.region.radius:g} kpc in "
            f"which gravity was measured ({int((~inside).sum())} of {count} rows do)",
            "leave such rows out, or give --outside nan",
        )
    value = {name: np.full(count, np.nan) for name in source.quantities}
    error = {name: np.full(count, np.nan) for name in source.quantities}
    plain = [name for name in source.quantities if name not in DENSITIES]
    for mask, names in ((inside & ~dense, plain), (dense, list(source.quantities))):
        rows = np.flatnonzero(mask)
        for chunk in np.split(rows, range(CHUNK, len(rows), CHUNK)) if len(rows) else []:
            found = source.estimate(x[chunk], names)
            sigma = found.error if found.terms else np.full(len(found.value), np.nan)
            for i, name in enumerate(names):
                part = slice(i * len(chunk), (i + 1) * len(chunk))
                value[name][chunk], error[name][chunk] = found.value[part], sigma[part]
    table = _table(source, positions, value, error)
    return Evaluation(table, int((~inside).sum()), int((inside & ~dense).sum()))


def open_source(path: str | Path, method: str = "combined") -> FieldSource | RunSource:
    """A run directory, also at a URL, or a field's folder, by what lies in it.

    Raises:
        GalrayError: It is neither.
    """
    from galray.rundir import load_run

    folder = load_run(path).folder if is_url(path) else Path(path).expanduser()
    if (folder / "config.toml").is_file():
        return RunSource(folder, method)
    if (folder / "field.json").is_file():
        if method != "combined":
            raise GalrayError(f"--method {method}: {folder} holds one field", "leave --method out")
        source = FieldSource(gravity.load_field(folder))
        source.meta["field"] = str(folder)
        return source
    raise GalrayError(
        f"{folder}: neither a run directory nor a field",
        "name what `galray run` made, or a folder of save_field",
    )


def disturbed(sizes: Mapping[str, float], x: Array, names: Sequence[str], frame: GalacticFrame) -> Array:
    """Errors of one disturbance at positions (n, 3), quantity-major.

    Arguments:
        sizes: Its error by kind of quantity: ``a_R``, ``a_phi``, ``a_z``, ``rho``, ``rho_dm``.
        x: Positions in kpc.
        names: Quantities. Those of a_x and a_y follow by direction; that of Φ is the work that shifts alike
            everywhere would do on the way from the Sun.
        frame: Where the Sun is.
    """
    outward, along = _directions(x)
    radial, around, vertical = (sizes.get(name, 0.0) for name in ("a_R", "a_phi", "a_z"))
    here, sun = cylindrical(x), cylindrical(np.array(frame.sun_position))
    way = np.stack([here[:, 0] - sun[0], sun[0] * (here[:, 1] - sun[1]), here[:, 2] - sun[2]], -1)
    found = {
        "a_x": np.hypot(radial * outward[:, 0], around * along[:, 0]),
        "a_y": np.hypot(radial * outward[:, 1], around * along[:, 1]),
        "potential": np.linalg.norm(way * [radial, around, vertical], axis=-1),
    }
    return np.concatenate([found.get(name, np.full(len(x), sizes.get(name, 0.0))) for name in names])


def field_values(field: Any, x: Array, names: Sequence[str], kernel: Any, frame: GalacticFrame) -> Array:
    """Quantities of one field at positions (n, 3), quantity-major, in the units of `UNITS`."""
    points = torch.from_numpy(x)
    out: dict[str, Array] = {}
    a = np.asarray(field.acceleration(points).detach())
    out |= dict(zip(("a_x", "a_y", "a_z"), a.T, strict=True))
    outward, along = _directions(x)
    out["a_R"], out["a_phi"] = (a * outward).sum(-1), (a * along).sum(-1)
    if "potential" in names:
        sun = torch.tensor([frame.sun_position], dtype=torch.float64)
        out["potential"] = np.asarray((field.potential(points) - field.potential(sun)).detach())
    if "rho" in names:
        out["rho"] = np.asarray(gravity.smoothed_density(field, points, kernel).detach()) / MSUN_PC3
        out["rho_dm"] = out["rho"]  # less the baryons, which are the same for every member
    return np.concatenate([out[name] for name in names])


def field_covariance(
    field: Any, x: Array, names: Sequence[str], kernel: Any, frame: GalacticFrame, which: str = "covariance"
) -> Array | None:
    """Covariance of the same quantities of a spline field, or None where a field carries no errors.

    Arguments:
        field: The field.
        x: Positions (n, 3).
        names: Quantities.
        kernel: The kernel of its density.
        frame: Gives the Sun's place.
        which: ``covariance`` from sample to sample, or ``posterior`` with what the penalty hides.
    """
    if not isinstance(field, gravity.SplineField) or not np.any(field.covariance):
        return None
    points = torch.from_numpy(x)
    a = np.asarray(field.linear_response(points, "acceleration"))
    outward, along = _directions(x)
    out = {"a_x": a[:, 0], "a_y": a[:, 1], "a_z": a[:, 2]}
    out["a_R"], out["a_phi"] = (np.einsum("nj,njp->np", e, a) for e in (outward, along))
    if "potential" in names:
        sun = torch.tensor([frame.sun_position], dtype=torch.float64)
        there = np.asarray(field.linear_response(sun, "potential"))
        out["potential"] = np.asarray(field.linear_response(points, "potential")) - there
    if "rho" in names:
        out["rho"] = np.asarray(field.linear_response(points, "smoothed_density", kernel)) / MSUN_PC3
        out["rho_dm"] = out["rho"]
    rows = np.concatenate([out[name] for name in names])
    return rows @ getattr(field, which) @ rows.T


def _directions(x: Array) -> tuple[Array, Array]:
    """Unit vectors away from the axis and along Galactic rotation, (n, 3) each."""
    phi = cylindrical(x)[:, 1]
    zero = np.zeros_like(phi)
    return np.stack([-np.cos(phi), np.sin(phi), zero], -1), np.stack([np.sin(phi), np.cos(phi), zero], -1)


def _table(
    source: FieldSource | RunSource, positions: Positions, value: dict[str, Array], error: dict[str, Array]
) -> Any:
    from astropy import units as u
    from astropy.table import QTable

    from galray import __version__
    from galray.provenance import git_revision, now

    table = QTable()
    added = {"x", "y", "z", *value, *(f"{name}_error" for name in value)}
    for name in positions.table.colnames:
        if name in positions.columns[:3] and positions.columns[0] == "x":
            continue
        if name in added:
            raise GalrayError(
                f"{positions.source}: has a column '{name}' already, which the result would write",
                "rename or drop it",
            )
        table[name] = positions.table[name]
    for name, column in zip(("x", "y", "z"), positions.x.T, strict=True):
        table[name] = column * u.kpc
    for name, column in value.items():
        table[name] = u.Quantity(column, UNITS[name])
        if np.isfinite(error[name]).any():
            table[f"{name}_error"] = u.Quantity(error[name], UNITS[name])
    table.meta = {
        "description": "galray: measured acceleration, potential and mass density",
        "method": source.name,
        "kernel_kpc": list(source.kernel.h),
        "kernel_truncate": source.kernel.truncate,
        "potential_zero": "the Sun",
        "frame": source.frame.as_dict(),
        "galray": __version__,
        "git": git_revision(),
        "created": now(),
        **source.meta,
    }
    return table
