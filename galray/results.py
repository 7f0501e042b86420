"""Where a run measures and what it reports: places, quantities, and their values from a field.

Every member of an ensemble evaluates its own field at the same places; the values are one vector, so
that covariances between positions survive the combination.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from galray.errors import GalrayError
from galray.frame import GalacticFrame, cylindrical
from galray.settings import Settings
from galray.units import MSUN_PC3, G

__all__ = [
    "ACCELERATION_UNIT",
    "DENSITY_UNIT",
    "HEADLINE",
    "SPEED_UNIT",
    "SURFACE_UNIT",
    "Places",
    "PlacesSettings",
    "Quantity",
]

ACCELERATION_UNIT = "km2 / (s2 kpc)"
DENSITY_UNIT = "solMass / pc3"
SURFACE_UNIT = "solMass / pc2"
SPEED_UNIT = "km / s"
HEADLINE = "rho_dm_average"
"""The quantity that a run exists for."""
SPHERE = "rho_dm_sphere"
MIN_SPHERE_POSITIONS = 6
"""Spheres of which the ball holds fewer positions are left out."""
COLUMN_NODES = 6
"""Heights at which the horizontal part of Σ is taken."""
COLUMN_STEP = 0.2
"""Half the distance of the positions that are differenced for it, kpc: v_c bends over many kpc."""


class PlacesSettings(Settings):
    """Where accelerations and densities are reported; lengths in kpc, the Sun's place from the frame."""

    heights: tuple[float, ...] = (0.5, 1.0, 1.5)
    """Heights |z| above and below the Sun's place in the plane at which a and ρ are tabulated."""
    vertical_extent: float = Field(default=2.0, gt=0)
    """The vertical profile runs from minus to plus this height, at R0."""
    radial_extent: float = Field(default=2.0, gt=0)
    """The radial profile runs over R0 ± this, in the plane z = 0 and at `dark_height`."""
    dark_height: float = Field(default=1.0, ge=0)
    """Height of the radial profile of ρ_DM, clear of the disc."""
    num_profile_points: int = Field(default=17, ge=3)
    average_heights: tuple[float, float] = (0.5, 2.0)
    """ρ_DM is averaged over these |z|, both sides, on the cylinder R = R0."""
    average_arc: float = Field(default=1.5, ge=0)
    """Half length along the Solar circle of the region of that average."""
    num_map_points: int = Field(default=17, ge=3)
    """Points per side of the x–z map."""
    column_height: float = Field(default=1.1, gt=0)
    """Σ, the mass per area within this height of the plane, and |K_z|/2πG are reported here."""
    sphere_offsets: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    """ρ_DM is averaged over spheres of radius R0 + these about the Galactic centre, inside the ball."""
    sphere_height: float = Field(default=0.5, ge=0)
    """Heights |z| below this are left out of those averages."""
    sphere_step: float = Field(default=0.5, gt=0)
    """Distance of neighbouring positions on such a sphere, in height; twice as much along its circles."""

    @model_validator(mode="after")
    def _ordered(self) -> PlacesSettings:
        low, high = self.average_heights
        if not 0 <= low < high:
            raise ValueError(f"average_heights: need 0 <= low < high, got {low}, {high}")
        if not self.heights or min(self.heights) <= 0 or len(set(self.heights)) < len(self.heights):
            raise ValueError(f"heights: need one or more, above zero, each once, got {list(self.heights)}")
        return self


@dataclass(frozen=True)
class Quantity:
    """One reported number: what, where, in which unit, and how it is drawn."""

    name: str
    label: str
    where: str
    unit: str
    position: tuple[float, float, float] | None = None
    profile: str | None = None
    """``vertical``, ``radial`` or ``vertical_dm``/``radial_dm`` where the number is a point of a profile."""
    coordinate: float | None = None
    """Height or radius in kpc of that point."""
    rows: tuple[int, ...] = field(default=(), repr=False)
    """Rows of the places that enter, averaged with equal weights."""
    forces: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Coefficients (rows, 3) of the Cartesian accelerations there, for what is linear in them."""

    @property
    def key(self) -> str:
        """Unique name of the quantity."""
        return (
            f"{self.name}@{self.where}"
            if self.profile is None
            else f"{self.profile}:{self.name}@{self.coordinate:+.3f}"
        )


class Places:
    """The positions at which every member evaluates its field, and the quantities made from them.

    Arguments:
        settings: Where to report.
        frame: The Galactocentric frame.
        center: Centre of the ball of stars, shape (3,), kpc.
        radius: Its radius in kpc.
        reach: Half axes (3,) of the region that the density kernel needs around a position, kpc.

    Raises:
        GalrayError: The average of ρ_DM, or a tabulated height, does not fit into the ball.
    """

    def __init__(
        self,
        settings: PlacesSettings,
        frame: GalacticFrame,
        center: Any,
        radius: float,
        reach: Any,
    ) -> None:
        from galray.gravity import Region  # torch: not needed by whoever only reads a configuration

        self.settings = settings
        self.frame = frame
        self.region = Region((float(center[0]), float(center[1]), float(center[2])), float(radius))
        self.radius = float(radius)
        self.reach = (float(reach[0]), float(reach[1]), float(reach[2]))
        self._positions: list[np.ndarray] = []
        self._with_density: list[bool] = []
        self.quantities: list[Quantity] = []
        self._tables()
        self._average()
        self._spheres()
        self._column()
        self._profiles()
        self._map()
        self.x = np.array(self._positions)
        """All positions, shape (N, 3), kpc."""

    @property
    def density_rows(self) -> np.ndarray:
        """Rows of the positions around which the ball holds the whole density kernel."""
        wanted = np.flatnonzero(self._with_density)
        return np.array([i for i in wanted if self.holds(self.x[i], density=True)], dtype=np.intp)

    @property
    def num_values(self) -> int:
        """Length of the vector of values."""
        return len(self.quantities)

    def index(self, key: str) -> int:
        """Place of a quantity in the vector of values, by its key or by its name if that is unique."""
        found = [i for i, q in enumerate(self.quantities) if key in (q.key, q.name)]
        if len(found) != 1:
            raise KeyError(f"{key}: {len(found)} quantities of that name")
        return found[0]

    def holds(self, x: np.ndarray, *, density: bool) -> bool:
        """Whether the ball holds a position, and with `density` the kernel's whole reach around it."""
        if density:
            # A hair of room, so that a field that checks the same condition in another way agrees.
            reach = tuple(1.001 * half for half in self.reach)
            return bool(self.region.contains_kernel(x, (reach[0], reach[1], reach[2])))
        return bool(self.region.contains(x))

    def values(self, acceleration: np.ndarray, density: np.ndarray, baryons: np.ndarray) -> np.ndarray:
        """All quantities of a field.

        Arguments:
            acceleration: a at the places, shape (*, N, 3), (km/s)²/kpc.
            density: Smoothed total density there, shape (*, N), Msun/kpc³.
            baryons: Baryonic density smoothed with the same kernel, shape (N,) or (*, N), Msun/kpc³.

        Returns:
            Values, shape (*, Q), each in its quantity's unit.
        """
        c = cylindrical(self.x)
        e_r = np.stack([-np.cos(c[:, 1]), np.sin(c[:, 1]), np.zeros(len(c))], -1)
        e_phi = np.stack([np.sin(c[:, 1]), np.cos(c[:, 1]), np.zeros(len(c))], -1)
        fields = {
            "a_R": (acceleration * e_r).sum(-1),
            "a_phi": (acceleration * e_phi).sum(-1),
            "a_z": acceleration[..., 2],
            "rho": density / MSUN_PC3,
            "rho_dm": (density - baryons) / MSUN_PC3,
            "rho_baryons": np.broadcast_to(baryons, density.shape) / MSUN_PC3,
        }
        fields[HEADLINE] = fields[SPHERE] = fields["rho_dm"]
        columns = []
        for q in self.quantities:
            if q.forces is None:
                columns.append(fields[q.name][..., list(q.rows)].mean(-1))
                continue
            value = (acceleration[..., list(q.rows), :] * q.forces).sum((-1, -2))
            columns.append(np.sqrt(np.maximum(value, 0.0)) if q.name == "v_c" else value)
        return np.stack(columns, -1)

    # What is measured where ---------------------------------------------------------------------------

    def _add(self, x: np.ndarray, *, density: bool = True) -> int:
        self._positions.append(np.asarray(x, dtype=float))
        self._with_density.append(density)
        return len(self._positions) - 1

    def _tables(self) -> None:
        r0 = self.frame.sun_radius
        sun = np.array(self.frame.sun_position)
        spots = [("Sun", sun)]
        for height in self.settings.heights:
            spots += [
                (f"z=+{height:g} kpc", np.array([-r0, 0, height])),
                (f"z=-{height:g} kpc", np.array([-r0, 0, -height])),
            ]
        for where, x in spots:
            if not self.holds(x, density=False):
                raise GalrayError(
                    f"places.heights: {where} lies outside the ball of {self.radius:g} kpc",
                    "lower the height or enlarge catalog.ball.radius_kpc",
                )
            row = self._add(x)
            position = (float(x[0]), float(x[1]), float(x[2]))
            for name, label in (("a_R", "a_R"), ("a_phi", "a_φ"), ("a_z", "a_z")):
                self.quantities.append(Quantity(name, label, where, ACCELERATION_UNIT, position, rows=(row,)))
            if self.holds(x, density=True):
                for name, label in (("rho", "ρ"), ("rho_dm", "ρ_DM")):
                    self.quantities.append(Quantity(name, label, where, DENSITY_UNIT, position, rows=(row,)))

    def _average(self) -> None:
        """Positions of the headline average: R = R0, both sides of the plane, along the Solar circle."""
        low, high = self.settings.average_heights
        r0 = self.frame.sun_radius
        edges = np.linspace(low, high, 7)
        heights = 0.5 * (edges[1:] + edges[:-1])
        rows = []
        for arc in np.linspace(-1, 1, 5) * self.settings.average_arc:
            for z in np.concatenate([-heights, heights]):
                x = np.array([-r0 * np.cos(arc / r0), r0 * np.sin(arc / r0), z])
                if self.holds(x, density=True):
                    rows.append(self._add(x))
        wanted = 5 * 2 * len(heights)
        if len(rows) < 0.6 * wanted:
            raise GalrayError(
                f"places.average_heights: only {len(rows)} of {wanted} positions of the average fit into the "
                f"ball of {self.radius:g} kpc less the density kernel's reach",
                "enlarge catalog.ball.radius_kpc, or shrink gravity.kernel or places.average_heights",
            )
        where = f"{low:g} < |z| < {high:g} kpc at the Solar radius"
        self.quantities.append(Quantity(HEADLINE, "ρ_DM", where, DENSITY_UNIT, rows=tuple(rows)))

    def _spheres(self) -> None:
        """ρ_DM averaged over spheres about the Galactic centre: equal steps in z are equal areas there."""
        r0, step = self.frame.sun_radius, self.settings.sphere_step
        for offset in self.settings.sphere_offsets:
            radius = r0 + offset
            rows = []
            heights = np.arange(self.settings.sphere_height + step / 2, min(self.radius, radius), step)
            for z in heights:
                ring = np.sqrt(radius**2 - z**2)
                for phi in np.arange(0, self.radius, 2 * step) / radius:
                    # mirrored about the plane and the Sun's azimuth, all or none: the mean stays even
                    signs = [(1, 1), (-1, 1)] if phi == 0 else [(1, 1), (-1, 1), (1, -1), (-1, -1)]
                    group = [
                        np.array([-ring * np.cos(phi), side * ring * np.sin(phi), up * z])
                        for up, side in signs
                    ]
                    if all(self.holds(x, density=True) for x in group):
                        rows += [self._add(x) for x in group]
            if len(rows) >= MIN_SPHERE_POSITIONS:
                where = f"r = {radius:.2f} kpc, |z| > {self.settings.sphere_height:g} kpc"
                self.quantities.append(Quantity(SPHERE, "ρ_DM", where, DENSITY_UNIT, rows=tuple(rows)))

    def _column(self) -> None:
        """|K_z|/2πG, Σ by Gauss's theorem and the circular speed, all at R0: linear in accelerations."""
        r0, height = self.frame.sun_radius, self.settings.column_height
        x = np.array([-r0, 0.0, 0.0])
        row = self._add(x, density=False)
        self.quantities.append(
            Quantity("v_c", "v_c", "R0", SPEED_UNIT, rows=(row,), forces=np.array([[r0, 0.0, 0.0]]))
        )
        heights = sorted({*self.settings.heights, height})
        for z in heights:
            ends = [x + [0, 0, z], x - [0, 0, z]]
            if not all(self.holds(end, density=False) for end in ends):
                continue
            rows = [self._add(end, density=False) for end in ends]
            pull = np.array([[0, 0, -1.0], [0, 0, 1.0]])  # inwards on both sides
            where = f"|z|={z:g} kpc"
            force = pull / (4 * np.pi * G) / 1e6
            self.quantities.append(
                Quantity("K_z", "|K_z|/2πG", where, SURFACE_UNIT, rows=tuple(rows), forces=force)
            )
            if z == height:
                self._surface(x, height, rows, pull)

    def _surface(self, x: np.ndarray, height: float, ends: list[int], pull: np.ndarray) -> None:
        """Σ = −∫∇·a dz / 4πG over |z| < height: a_z at the ends, the horizontal part by differences."""
        nodes, weights = np.polynomial.legendre.leggauss(COLUMN_NODES)
        rows, forces = list(ends), list(pull)
        for z, weight in zip(nodes * height, weights * height, strict=True):
            for axis in (0, 1):
                for sign in (-1, 1):
                    place = x + [0, 0, z]
                    place[axis] += sign * COLUMN_STEP
                    if not self.holds(place, density=False):
                        return
                    rows.append(self._add(place, density=False))
                    force = np.zeros(3)
                    force[axis] = -sign * weight / (2 * COLUMN_STEP)
                    forces.append(force)
        where = f"|z|<{height:g} kpc"
        coefficients = np.array(forces) / (4 * np.pi * G) / 1e6
        self.quantities.append(
            Quantity("sigma", "Σ", where, SURFACE_UNIT, rows=tuple(rows), forces=coefficients)
        )

    def _profiles(self) -> None:
        number = self.settings.num_profile_points
        r0 = self.frame.sun_radius
        up, out = self.settings.vertical_extent, self.settings.radial_extent
        for z in np.linspace(-up, up, number):
            self._point(
                "vertical", float(z), np.array([-r0, 0, z]), ("a_R", "a_z"), ("rho", "rho_dm", "rho_baryons")
            )
        for r in np.linspace(r0 - out, r0 + out, number):
            self._point("radial", float(r), np.array([-r, 0, 0]), ("a_R", "a_z"), ("rho",))
            self._point("radial_dm", float(r), np.array([-r, 0, self.settings.dark_height]), (), ("rho_dm",))

    def _point(
        self, profile: str, coordinate: float, x: np.ndarray, accelerations: tuple, densities: tuple
    ) -> None:
        names = (accelerations if self.holds(x, density=False) else ()) + (
            densities if self.holds(x, density=True) else ()
        )
        if not names:
            return
        row = self._add(x)
        for name in names:
            unit = ACCELERATION_UNIT if name.startswith("a_") else DENSITY_UNIT
            where = f"{profile} {coordinate:+.2f} kpc"
            position = (float(x[0]), float(x[1]), float(x[2]))
            self.quantities.append(Quantity(name, name, where, unit, position, profile, coordinate, (row,)))

    def _map(self) -> None:
        number = self.settings.num_map_points
        sun = np.array(self.frame.sun_position)
        grid = np.linspace(-self.radius, self.radius, number)
        self.map_rows = []
        self.map_density: list[bool] = []
        for dx in grid:
            for dz in grid:
                x = sun + np.array([dx, 0.0, dz])
                if self.holds(x, density=False):
                    self.map_rows.append(self._add(x))
                    self.map_density.append(self.holds(x, density=True))
