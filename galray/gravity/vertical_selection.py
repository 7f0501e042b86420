"""Stars near the Sun in cells whose selection is known: heights, velocities, effective areas."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galray.errors import GalrayError
from galray.units import K_PROPER_MOTION

__all__ = ["VerticalSample", "load_effective_areas"]

Array = NDArray[np.float64]

_POLE_RA, _POLE_DEC = np.radians(192.85948), np.radians(27.12825)  # north Galactic pole, ICRS
_AREA_NAME = re.compile(r"_(?P<l0>[\d.]+)-(?P<l1>[\d.]+)_(?P<z>[\d.]+)_(?P<r0>[\d.]+)-(?P<r1>[\d.]+)_")

REQUIRED_COLUMNS = (
    "ra", "dec", "parallax", "parallax_error", "pmra", "pmra_error", "pmdec", "pmdec_error",
    "radial_velocity", "radial_velocity_error", "phot_g_mean_mag", "cell",
)  # fmt: skip


@dataclass(frozen=True)
class VerticalSample:
    """Stars in cells round the Sun, each cell with its relative effective area at every height.

    The number of stars of a cell at height z above the Sun is n_group(z) S_cell(z) dz, with S the
    effective area; stars of one group are one tracer population. All arrays are (N,) unless said.

    Attributes:
        height: Height above the Sun (not the plane), kpc.
        longitude: Galactic longitude, rad.
        latitude: Galactic latitude, rad.
        distance: Inverse parallax, kpc.
        v_l: k d μ_l cos b, km/s.
        v_b: k d μ_b, km/s.
        v_r: Radial velocity, km/s; NaN where there is none.
        v_b_variance: Variance of v_b from proper motion and parallax errors, (km/s)².
        v_r_variance: Variance of v_r, (km/s)²; NaN where there is none.
        parallax: mas (kpc⁻¹).
        magnitude: Apparent G.
        colour: BP − RP, mag; NaN where absent.
        extinction: A_G already taken off the absolute magnitude, mag.
        cell: Index into `cell_names`.
        group: Index into `group_names`.
        area_height: (M,) heights above the Sun of the areas, kpc, increasing.
        area: (cells, M) relative effective area.
        cell_names: Name of each cell.
        group_names: Name of each tracer group.
    """

    height: Array
    longitude: Array
    latitude: Array
    distance: Array
    v_l: Array
    v_b: Array
    v_r: Array
    v_b_variance: Array
    v_r_variance: Array
    parallax: Array
    magnitude: Array
    colour: Array
    extinction: Array
    cell: NDArray[np.int64]
    group: NDArray[np.int64]
    area_height: Array
    area: Array
    cell_names: tuple[str, ...] = field(default=())
    group_names: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.height)

    @property
    def has_rv(self) -> NDArray[np.bool_]:
        """(N,) True where the radial velocity is known."""
        return np.isfinite(self.v_r)

    @property
    def absolute_magnitude(self) -> Array:
        """(N,) G − 5 log10(d/10 pc) − A_G."""
        return self.magnitude - 5 * np.log10(100 * self.distance) - self.extinction

    @property
    def vertical_velocity(self) -> Array:
        """(N,) W with respect to the Sun, v_b cos b + v_r sin b, km/s; NaN without radial velocity."""
        return self.v_b * np.cos(self.latitude) + self.v_r * np.sin(self.latitude)

    def star_area(self) -> Array:
        """(N,) effective area of each star's cell at its height."""
        out = np.empty(len(self))
        for index in range(len(self.area)):
            own = self.cell == index
            out[own] = np.interp(self.height[own], self.area_height, self.area[index])
        return out

    def select(self, mask: NDArray[np.bool_]) -> VerticalSample:
        """The stars of a mask, with the same cells, groups and areas."""
        per_star = {
            name: getattr(self, name)[mask]
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray) and name not in ("area", "area_height")
        }
        return replace(self, **per_star)

    def shift_parallax(self, shift: float) -> VerticalSample:
        """The same stars with `shift` mas added to every parallax (areas unchanged)."""
        parallax = self.parallax + shift
        scale = self.parallax / parallax
        return replace(
            self,
            parallax=parallax,
            height=self.height * scale,
            distance=self.distance * scale,
            v_l=self.v_l * scale,
            v_b=self.v_b * scale,
            v_b_variance=self.v_b_variance * scale**2,
        )

    @classmethod
    def from_observables(
        cls,
        *,
        longitude: Array,
        latitude: Array,
        parallax: Array,
        pm_l: Array,
        pm_b: Array,
        radial_velocity: Array,
        parallax_error: Array,
        pm_b_error: Array,
        radial_velocity_error: Array,
        magnitude: Array,
        cell: Any,
        areas: dict[str, tuple[Array, Array]],
        group: Any = None,
        colour: Array | None = None,
        extinction: Array | None = None,
    ) -> VerticalSample:
        """Build from Galactic observables.

        Arguments:
            longitude: l, rad, (N,).
            latitude: b, rad, (N,).
            parallax: mas, zero point already corrected, (N,).
            pm_l: μ_l cos b, mas/yr, (N,).
            pm_b: μ_b, mas/yr, (N,).
            radial_velocity: km/s, NaN where unknown, (N,).
            parallax_error: mas, (N,).
            pm_b_error: mas/yr, (N,).
            radial_velocity_error: km/s, (N,).
            magnitude: G, (N,).
            cell: Name of the cell of each star, (N,).
            areas: Per cell name: heights above the Sun (kpc) and relative effective area there.
            group: Name of the tracer population of each star, (N,); the cell's first letters by default.
            colour: BP − RP, (N,).
            extinction: A_G, (N,).

        Raises:
            GalrayError: A cell without effective area, or a parallax that is not positive.
        """
        cells = np.asarray(cell).astype(str)
        groups = (
            np.array([re.sub(r"\d+$", "", c) or c for c in cells])
            if group is None
            else np.asarray(group).astype(str)
        )
        cell_names, cell_index = np.unique(cells, return_inverse=True)
        group_names, group_index = np.unique(groups, return_inverse=True)
        missing = [name for name in cell_names if name not in areas]
        if missing:
            raise GalrayError(
                f"no effective area for cell {', '.join(missing[:5])}",
                "give the folder of the sample's effective areas, one .npz per cell",
            )
        if not (parallax > 0).all():
            raise GalrayError(
                f"{int((~(parallax > 0)).sum())} stars have a parallax that is not positive",
                "cut the sample on parallax before the vertical inversion",
            )
        grid = areas[str(cell_names[0])][0]
        table = np.stack([np.interp(grid, *areas[str(name)]) for name in cell_names])
        distance = 1 / parallax
        v_b = K_PROPER_MOTION * distance * pm_b
        nothing = np.full(len(parallax), np.nan)
        return cls(
            height=distance * np.sin(latitude),
            longitude=longitude,
            latitude=latitude,
            distance=distance,
            v_l=K_PROPER_MOTION * distance * pm_l,
            v_b=v_b,
            v_r=radial_velocity,
            v_b_variance=(K_PROPER_MOTION * distance * pm_b_error) ** 2
            + (v_b * parallax_error * distance) ** 2,
            v_r_variance=radial_velocity_error**2,
            parallax=parallax,
            magnitude=magnitude,
            colour=nothing if colour is None else colour,
            extinction=np.zeros(len(parallax)) if extinction is None else extinction,
            cell=cell_index.astype(np.int64),
            group=group_index.astype(np.int64),
            area_height=grid,
            area=table,
            cell_names=tuple(str(name) for name in cell_names),
            group_names=tuple(str(name) for name in group_names),
        )

    @classmethod
    def from_table(cls, table: Any, effective_area: str | Path) -> VerticalSample:
        """Build from a Gaia-like table (Polars) with a column `cell` and a folder of effective areas.

        Arguments:
            table: Columns of `REQUIRED_COLUMNS`; optional pmra_pmdec_corr, phot_bp_mean_mag,
                phot_rp_mean_mag, dust_correction (A_G). Missing radial velocities are null or NaN.
            effective_area: Folder of .npz files (see `load_effective_areas`).

        Raises:
            GalrayError: A column, the folder or a cell's area is missing.
        """
        absent = [name for name in REQUIRED_COLUMNS if name not in table.columns]
        if absent:
            raise GalrayError(
                f"the table has no column {', '.join(absent)}",
                "the vertical inversion needs Gaia's astrometry and the sample's column 'cell'",
            )

        def column(name: str) -> Array:
            return np.asarray(table[name].cast(float).fill_null(np.nan).to_numpy(), dtype=np.float64)

        ra, dec = np.radians(column("ra")), np.radians(column("dec"))
        sine = np.sin(_POLE_DEC) * np.cos(dec) - np.cos(_POLE_DEC) * np.sin(dec) * np.cos(ra - _POLE_RA)
        other = np.cos(_POLE_DEC) * np.sin(ra - _POLE_RA)
        norm = np.hypot(sine, other)
        c1, c2 = sine / norm, other / norm
        latitude = np.arcsin(
            np.sin(_POLE_DEC) * np.sin(dec) + np.cos(_POLE_DEC) * np.cos(dec) * np.cos(ra - _POLE_RA)
        )
        longitude = np.radians(122.93192) - np.arctan2(
            np.cos(dec) * np.sin(ra - _POLE_RA),
            np.cos(_POLE_DEC) * np.sin(dec) - np.sin(_POLE_DEC) * np.cos(dec) * np.cos(ra - _POLE_RA),
        )
        pmra, pmdec = column("pmra"), column("pmdec")
        era, edec = column("pmra_error"), column("pmdec_error")
        correlation = column("pmra_pmdec_corr") if "pmra_pmdec_corr" in table.columns else np.zeros(len(ra))
        pm_b_variance = (c2 * era) ** 2 + (c1 * edec) ** 2 - 2 * c1 * c2 * correlation * era * edec
        has_colour = {"phot_bp_mean_mag", "phot_rp_mean_mag"} <= set(table.columns)
        colour = column("phot_bp_mean_mag") - column("phot_rp_mean_mag") if has_colour else None
        cells = np.asarray(table["cell"].cast(str).to_numpy()).astype(str)
        parallax = column("parallax")
        areas = load_effective_areas(
            effective_area, cells, np.degrees(longitude) % 360, np.cos(latitude) / parallax
        )
        return cls.from_observables(
            longitude=longitude % (2 * np.pi),
            latitude=latitude,
            parallax=parallax,
            pm_l=c1 * pmra + c2 * pmdec,
            pm_b=-c2 * pmra + c1 * pmdec,
            radial_velocity=column("radial_velocity"),
            parallax_error=column("parallax_error"),
            pm_b_error=np.sqrt(np.maximum(pm_b_variance, 0)),
            radial_velocity_error=column("radial_velocity_error"),
            magnitude=column("phot_g_mean_mag"),
            cell=cells,
            areas=areas,
            colour=colour,
            extinction=column("dust_correction") if "dust_correction" in table.columns else None,
        )


def load_effective_areas(
    folder: str | Path, cells: NDArray[Any], longitude: Array, radius: Array
) -> dict[str, tuple[Array, Array]]:
    """Read one effective area per cell, matched by the ranges of longitude and radius in the file names.

    Files are named `eff_area_sample_<l0>-<l1>_<zmax>_<R0>-<R1>_….npz` (degrees, kpc) and hold
    `eff_area_z_vec` (heights above the Sun, kpc) and `eff_area` (relative).

    Arguments:
        folder: The folder.
        cells: Name of each star's cell, (N,).
        longitude: deg in [0, 360), (N,).
        radius: Distance in the plane, kpc, (N,).

    Returns:
        Per cell name: heights and areas.

    Raises:
        GalrayError: The folder holds no such file, or a cell matches none.
    """
    found = []
    for path in sorted(Path(folder).glob("*.npz")):
        match = _AREA_NAME.search(path.name)
        if match:
            l0, l1, r0, r1 = (float(match[key]) for key in ("l0", "l1", "r0", "r1"))
            found.append((path, l0, l1, r0, r1))
    if not found:
        raise GalrayError(
            f"{folder} holds no effective areas (eff_area_sample_….npz)", "check the folder's name"
        )
    areas: dict[str, tuple[Array, Array]] = {}
    for name in np.unique(cells):
        own = cells == name
        where, l0, l1 = (
            float(np.median(radius[own])),
            float(longitude[own].min()),
            float(longitude[own].max()),
        )
        fits = [
            row[0] for row in found if row[3] < where < row[4] and row[1] <= l0 + 1e-6 and l1 <= row[2] + 1e-6
        ]
        if len(fits) != 1:
            raise GalrayError(
                f"cell {name} (l {l0:.1f} to {l1:.1f} deg, R about {where:.3f} kpc) matches {len(fits)} "
                f"files in {folder}",
                "every cell needs exactly one effective area",
            )
        with np.load(fits[0], allow_pickle=False) as data:
            areas[str(name)] = (data["eff_area_z_vec"].astype(float), data["eff_area"].astype(float))
    return areas
