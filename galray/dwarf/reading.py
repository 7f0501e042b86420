"""Files of stars → one galaxy's `Observation`: forms, columns, units, and every check that data need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from galray.dwarf.observation import Array, Galaxy, Observation, counted, sky_offsets
from galray.dwarf.tables import Columns, read_columns
from galray.errors import GalrayError
from galray.provenance import file_hash
from galray.settings import Settings
from galray.units import K_PROPER_MOTION

__all__ = ["MIN_MEMBERS", "DataSettings", "read_observation"]

MIN_MEMBERS = 30
"""Fewer members than this say nothing of a profile."""

_MAX_SPEED = 2000.0
"""No dwarf of the Local Group moves as fast, km/s: a larger number is in other units."""
_MAX_ERROR = 100.0
"""km/s; a star measured worse than that says nothing of a dispersion of 10 km/s."""
_SAME_STAR_ARCSEC = 0.5
_SAME_STAR_SIGMA = 5.0


class DataSettings(Settings):
    """Where the stars are and how their files are to be read."""

    spectroscopy: str = Field(default="", description="File of the stars with velocities, also at a URL.")
    photometry: str = Field(
        default="",
        description="File or URL of a fair sample of the light: its profile then comes from these stars. "
        "Stars with velocities alone were chosen by a spectrograph, not by the light.",
    )
    format: Literal["auto", "walker", "gaia_challenge", "table"] = Field(
        default="auto",
        description="walker: 25 columns without header (20 of photometry); gaia_challenge: x y z vx vy vz; "
        "table: CSV, ECSV or Parquet with named columns; auto: by what the file holds.",
    )
    columns: dict[str, str] = Field(
        default={},
        description="Columns of a table by galray's names: ra, dec or x, y; velocity, velocity_error, "
        "membership, pmra, pmdec, pmra_error, pmdec_error.",
    )
    units: dict[str, str] = Field(
        default={},
        description="Units of a table's columns by galray's names, such as ra = 'rad', x = 'pc'. Absent: "
        "those of the file, else deg, kpc, km/s and mas/yr.",
    )
    photometry_columns: dict[str, str] = Field(default={}, description="`columns` of the photometry.")
    photometry_units: dict[str, str] = Field(default={}, description="`units` of the photometry.")
    min_membership: float = Field(
        default=0.05, ge=0, lt=1, description="Stars of a smaller membership probability are left out."
    )
    velocity_error: float | None = Field(
        default=None, gt=0, description="Error of all velocities, km/s, for files without a column of errors."
    )
    light: Literal["auto", "stars", "published"] = Field(
        default="auto",
        description="Without photometry, the light's profile is that of the stars with velocities, or the "
        "published one; auto: the published one of a galaxy on the sky, where there is one.",
    )
    line_of_sight: Literal["x", "y", "z"] = Field(
        default="z", description="Axis along which a file of six coordinates is seen."
    )
    perspective: bool = Field(
        default=True,
        description="Fit the galaxy's motion across the sky, its measured proper motion as prior: it tilts "
        "the velocities along the line of sight.",
    )
    proper_motions: bool = Field(
        default=False, description="Take proper motions (of a file of six: the two other velocities) too."
    )
    max_radius: float | None = Field(
        default=None, gt=0, description="Leave out what is further from the centre, kpc (circularised)."
    )
    num_stars: int | None = Field(
        default=None, ge=MIN_MEMBERS, description="Take only the first so many stars of the file."
    )


def read_observation(settings: DataSettings, galaxy: Galaxy) -> Observation:
    """Read a galaxy's stars and check them.

    Rows without a velocity (NaN, or the placeholder 0 of lists of targets) and those that are no members
    are left out and counted; one star in two rows becomes one, by inverse variance.

    Arguments:
        settings: Files, columns, units, cuts.
        galaxy: What is known of the galaxy; its centre is needed for positions on the sky. A systemic
            velocity that is not known becomes the members' median.

    Returns:
        The observation.

    Raises:
        GalrayError: A file is absent or of no known form, a column is missing, errors are zero or negative,
            degrees are taken for radians or the reverse, the centre lies outside the data, there are fewer
            than `MIN_MEMBERS` members; the message names file, row and column.
    """
    if not settings.spectroscopy:
        raise GalrayError("data.spectroscopy: no file of stars", "name it: --set data.spectroscopy=FILE")
    path = Path(settings.spectroscopy).expanduser()
    table = read_columns(path, settings.format, settings.columns, settings.units, settings.line_of_sight)
    if settings.num_stars is not None:
        table = table.take(np.arange(min(settings.num_stars, len(table))))
    account = {"rows": len(table)}
    table = _measured(table, account)
    table = _with_errors(table, settings.velocity_error)
    _check_velocities(table)
    _check_membership(table)
    table = _members(table, settings.min_membership, account)
    _check_positions(table, galaxy)
    notes: list[str] = []
    table = _merge_duplicates(table, account, notes)
    if not np.isfinite(galaxy.velocity) and len(table):
        galaxy = replace(galaxy, velocity=float(np.median(table["velocity"])))
    x, y = _offsets(table, galaxy)
    motions = _motions(table, galaxy) if settings.proper_motions else {}
    observation = Observation(
        galaxy=galaxy,
        x=x,
        y=y,
        velocity=table["velocity"],
        velocity_error=table["velocity_error"],
        membership=table["membership"],
        account=account,
        sources={str(path): file_hash(path)},
    )
    observation = replace(observation, **motions)  # type: ignore[arg-type]
    if settings.max_radius is not None:
        inside = observation.radius <= settings.max_radius
        account["beyond max_radius"] = int((~inside).sum())
        observation = observation.select(np.flatnonzero(inside))
    account["kept"] = len(observation)
    if observation.num_members < MIN_MEMBERS:
        raise GalrayError(
            f"{path}: {observation.num_members:.0f} members with velocities ({counted(account)})",
            f"a profile needs {MIN_MEMBERS} at the least; check the columns and data.min_membership",
        )
    _check_centre(path, observation, observation.x, observation.y)
    observation = replace(observation, notes=tuple(notes))
    if settings.photometry:
        return _with_photometry(observation, settings)
    published = settings.light == "published" or (settings.light == "auto" and "ra" in table)
    if published and galaxy.light is not None:
        kind = galaxy.light[0].capitalize()
        notes.append(f"no photometry: the light follows a published {kind} profile")
        return replace(observation.with_published_light(), notes=tuple(notes))
    if settings.light == "published":
        raise GalrayError(
            f"{galaxy.name}: data.light = 'published', but no profile of its light is known",
            "set galaxy.r_half, or data.photometry",
        )
    return observation


def _measured(table: Columns, account: dict[str, int]) -> Columns:
    """Leave out the rows without a velocity; anything else that is not a number is an error."""
    velocity = table["velocity"]
    missing, placeholder = np.isnan(velocity), velocity == 0.0
    if placeholder.sum() > 0.5 * len(table):
        raise GalrayError(
            f"{table.where('velocity')}: {placeholder.sum()} of {len(table)} velocities are 0",
            "is it the velocity's column? give the right one in data.columns",
        )
    account["no velocity (NaN)"] = int(missing.sum())
    account["no velocity (placeholder 0)"] = int(placeholder.sum())
    table = table.take(np.flatnonzero(~missing & ~placeholder))
    table.check_finite()
    return table


def _with_errors(table: Columns, common: float | None) -> Columns:
    if "velocity_error" in table:
        if (bad := table["velocity_error"] <= 0).any():
            row = int(np.flatnonzero(bad)[0])
            raise GalrayError(
                f"{table.where('velocity_error', row)}: an error of {table['velocity_error'][row]:g} km/s "
                f"({bad.sum()} rows have errors that are zero or negative)",
                "errors are standard deviations; remove those rows or mend them",
            )
        return table
    if common is None:
        raise GalrayError(
            f"{table.path}: no errors of the velocities",
            "name their column in data.columns.velocity_error, or set data.velocity_error (km/s)",
        )
    return table.with_column("velocity_error", np.full(len(table), common))


def _check_velocities(table: Columns) -> None:
    for name, most in (("velocity", _MAX_SPEED), ("velocity_error", _MAX_ERROR)):
        if (bad := np.abs(table[name]) > most).any():
            row = int(np.flatnonzero(bad)[0])
            raise GalrayError(
                f"{table.where(name, row)}: {table[name][row]:g} km/s is no {name.replace('_', ' ')} of a "
                f"dwarf galaxy's star ({bad.sum()} such rows)",
                f"give its unit, such as data.units.{name} = 'm/s', or remove those rows",
            )


def _check_membership(table: Columns) -> None:
    if "membership" not in table:
        return
    p = table["membership"]
    if (bad := (p < 0) | (p > 1)).any():
        row = int(np.flatnonzero(bad)[0])
        raise GalrayError(
            f"{table.where('membership', row)}: {p[row]:g} is no probability ({bad.sum()} such rows)",
            "give the membership's column in data.columns, from 0 to 1",
        )


def _members(table: Columns, least: float, account: dict[str, int]) -> Columns:
    if "membership" not in table:
        return table.with_column("membership", np.ones(len(table)))
    member = table["membership"] >= least
    account[f"membership below {least:g}"] = int((~member).sum())
    return table.take(np.flatnonzero(member))


def _check_positions(table: Columns, galaxy: Galaxy) -> None:
    """Catch angles in the wrong unit by their range, and by where the galaxy is."""
    if "ra" not in table or not len(table):
        return
    unit = table.units["ra"]
    ra, dec = table["ra"], table["dec"]
    if unit == "rad":
        ra, dec = np.degrees(ra), np.degrees(dec)
        beyond = (np.abs(table["ra"]) > 2 * np.pi + 1e-9) | (np.abs(table["dec"]) > np.pi / 2 + 1e-9)
        if beyond.any():
            row = int(np.flatnonzero(beyond)[0])
            name = "ra" if abs(table["ra"][row]) > 2 * np.pi else "dec"
            raise GalrayError(
                f"{table.where(name, row)}: {table[name][row]:g} rad is no angle on the sky: degrees were "
                "taken for radians",
                "set data.units.ra and data.units.dec to 'deg'",
            )
    else:
        beyond = (ra < -180) | (ra > 360) | (np.abs(dec) > 90)
        if beyond.any():
            row = int(np.flatnonzero(beyond)[0])
            name = "dec" if abs(dec[row]) > 90 else "ra"
            raise GalrayError(
                f"{table.where(name, row)}: {table[name][row]:g} deg lies outside the sky",
                "are ra and dec exchanged, or in another unit? set data.columns and data.units",
            )
        small = bool((np.abs(ra) <= 2 * np.pi).all() and (np.abs(dec) <= np.pi / 2).all())
        far = np.isfinite(galaxy.ra) and _separation(ra, dec, galaxy) > 5.0
        if small and (far or np.isnan(galaxy.ra)) and not table.units_given.get("ra"):
            raise GalrayError(
                f"{table.where('ra', 0)}: {ra[0]:g}, {dec[0]:g} and all other positions lie within 2π and "
                "π/2: radians were taken for degrees",
                "set data.units.ra and data.units.dec to 'rad' (or to 'deg' if the galaxy is there)",
            )
    if np.isnan(galaxy.ra) or np.isnan(galaxy.dec) or np.isnan(galaxy.distance):
        raise GalrayError(
            f"{table.path}: positions on the sky, but galaxy.ra, galaxy.dec or galaxy.distance is not known",
            "set them, or name a galaxy of the table with galaxy.key",
        )
    if (away := _separation(ra, dec, galaxy)) > 5.0:
        raise GalrayError(
            f"{table.path}: the stars lie {away:.1f} deg from the centre of {galaxy.name} "
            f"({galaxy.ra:.3f}, {galaxy.dec:.3f})",
            "check galaxy.ra and galaxy.dec, and that the file is of this galaxy",
        )


def _separation(ra: Array, dec: Array, galaxy: Galaxy) -> float:
    """Angle in deg between the stars' mean direction and the galaxy's centre."""
    a, d = np.radians(ra), np.radians(dec)
    mean = np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)]).mean(-1)
    a0, d0 = np.radians(galaxy.ra), np.radians(galaxy.dec)
    centre = np.array([np.cos(d0) * np.cos(a0), np.cos(d0) * np.sin(a0), np.sin(d0)])
    return float(np.degrees(np.arccos(np.clip(mean @ centre / np.linalg.norm(mean), -1, 1))))


def _merge_duplicates(table: Columns, account: dict[str, int], notes: list[str]) -> Columns:
    """Make one star of rows at the same place, by inverse variance."""
    from scipy.cluster.hierarchy import DisjointSet
    from scipy.spatial import cKDTree

    if "ra" in table:
        dec = np.radians(table.in_degrees("dec"))
        ra = np.radians(table.in_degrees("ra"))
        place = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], -1)
        within = np.radians(_SAME_STAR_ARCSEC / 3600)
    else:
        place, within = np.stack([table["x"], table["y"]], -1), 0.0
    pairs = cKDTree(place).query_pairs(within, output_type="ndarray")
    account["repeats of a star, combined"] = 0
    if not len(pairs):
        return table
    groups = DisjointSet(np.unique(pairs).tolist())
    for i, j in pairs.tolist():
        groups.merge(i, j)
    columns = {name: table[name].copy() for name in table.names}
    keep = np.ones(len(table), dtype=bool)
    unlike = 0
    for group in groups.subsets():
        rows = np.sort(list(group))
        error = table["velocity_error"][rows]
        weight = 1 / error**2
        mean = np.average(table["velocity"][rows], weights=weight)
        pull = np.abs(table["velocity"][rows] - mean) / error
        unlike += bool(pull.max() > _SAME_STAR_SIGMA)
        columns["velocity"][rows[0]] = mean
        columns["velocity_error"][rows[0]] = weight.sum() ** -0.5
        keep[rows[1:]] = False
    account["repeats of a star, combined"] = int((~keep).sum())
    notes.append(f"{(~keep).sum()} rows repeat a star of another row: combined by inverse variance")
    if unlike:
        notes.append(f"{unlike} of these stars changed their velocity by over {_SAME_STAR_SIGMA:g} sigma")
    return replace(table, values=columns).take(np.flatnonzero(keep))


def _offsets(table: Columns, galaxy: Galaxy) -> tuple[Array, Array]:
    """Offsets from the centre in kpc."""
    if "ra" not in table:
        return table["x"], table["y"]
    xi, eta = sky_offsets(table.in_degrees("ra"), table.in_degrees("dec"), galaxy.ra, galaxy.dec)
    return galaxy.distance * xi, galaxy.distance * eta


def _motions(table: Columns, galaxy: Galaxy) -> dict[str, Array]:
    """Proper motions about the galaxy's own, in km/s."""
    if "v_x" in table:  # a mock's velocities across the line of sight
        error = table["velocity_error"]
        return {"pm_x": table["v_x"], "pm_y": table["v_y"], "pm_x_error": error, "pm_y_error": error}
    needed = ("pmra", "pmdec", "pmra_error", "pmdec_error")
    if absent := [name for name in needed if name not in table]:
        raise GalrayError(
            f"{table.path}: data.proper_motions is set, but there is no {', '.join(absent)}",
            "name the columns in data.columns, or set data.proper_motions = false",
        )
    scale = K_PROPER_MOTION * galaxy.distance
    motions = {"pm_x": table["pmra"], "pm_y": table["pmdec"]}
    own = {"pm_x": galaxy.pmra, "pm_y": galaxy.pmdec}
    result = {}
    for name, values in motions.items():
        error = table["pmra_error" if name == "pm_x" else "pmdec_error"]
        if (bad := error <= 0).any():
            row = int(np.flatnonzero(bad)[0])
            column = "pmra_error" if name == "pm_x" else "pmdec_error"
            raise GalrayError(
                f"{table.where(column, row)}: an error of {error[row]:g} mas/yr ({bad.sum()} such rows)",
                "errors are standard deviations; remove those rows or mend them",
            )
        centre = own[name] if np.isfinite(own[name]) else float(np.average(values, weights=error**-2))
        result[name] = scale * (values - centre)
        result[f"{name}_error"] = scale * error
    return result


def _check_centre(path: Path, observation: Observation, x: Array, y: Array) -> None:
    """The centre must lie among the stars: within the radius that holds nine tenths of them."""
    weight = observation.membership if len(x) == len(observation) else np.ones(len(x))
    middle = np.array([_weighted_median(x, weight), _weighted_median(y, weight)])
    spread = np.hypot(x - middle[0], y - middle[1])
    reach = np.quantile(spread, 0.9)
    if (away := float(np.hypot(*middle))) > reach:
        raise GalrayError(
            f"{path}: the centre of {observation.galaxy.name} lies outside the data: {away:.3g} kpc from "
            f"their middle, nine tenths of them lie within {reach:.3g} kpc",
            "check galaxy.ra and galaxy.dec, or shift the offsets of the file to the centre",
        )


def _weighted_median(values: Array, weight: Array) -> float:
    order = np.argsort(values)
    summed = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(summed, 0.5 * summed[-1])])


def _with_photometry(observation: Observation, settings: DataSettings) -> Observation:
    """Add the photometric sample: positions and memberships, no velocities."""
    path = Path(settings.photometry).expanduser()
    maps: tuple[Mapping[str, str], Mapping[str, str]]
    maps = (settings.photometry_columns, settings.photometry_units)
    table = read_columns(path, settings.format, *maps, settings.line_of_sight, photometry=True)
    account = {"rows": len(table)}
    table.check_finite()
    _check_membership(table)
    # A fair sample must keep its faint tail: the background is the fit's own to tell apart.
    if "membership" not in table:
        table = table.with_column("membership", np.ones(len(table)))
    _check_positions(table, observation.galaxy)
    x, y = _offsets(table, observation.galaxy)
    rows: NDArray[np.intp] = np.arange(len(table))
    if settings.max_radius is not None:
        probe = replace(observation, light_x=x, light_y=y)
        rows = np.flatnonzero(probe.light_radius <= settings.max_radius)
        account["beyond max_radius"] = len(table) - len(rows)
    account["kept"] = len(rows)
    _check_centre(path, observation, x[rows], y[rows])
    return replace(
        observation,
        light_x=x[rows],
        light_y=y[rows],
        light_weight=table["membership"][rows],
        light_account=account,
        sources=observation.sources | {str(path): file_hash(path)},
    )
