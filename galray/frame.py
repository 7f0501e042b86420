"""The Galactocentric frame: its numbers, the Sun's place, and cylindrical coordinates.

Right-handed Cartesian axes with the Galactic centre at the origin and the Sun at
(−8.121973, 0, +0.0208) kpc. The disc turns towards +y at the Sun, so L_z is negative in the
right-handed sense; the cylindrical coordinates defined here, and only here, are

    φ = atan2(y, −x)                zero at the Sun, growing along Galactic rotation,
                                    with its cut opposite the Sun,
    v_R = (x v_x + y v_y) / R,      v_φ = (y v_x − x v_y) / R     (positive along rotation).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["GalacticFrame", "cartesian", "cylindrical"]


@dataclass(frozen=True)
class GalacticFrame:
    """The numbers that fix the frame: astropy's ``galactocentric_frame_defaults`` v4.0.

    They are written into every shard manifest and never read from a library's defaults, which change
    with its version.

    References:
        | Distance: GRAVITY Collaboration 2018; height: Bennett & Bovy 2019;
        | solar motion: Drimmel & Poggio 2018, Reid & Brunthaler 2004; centre: Reid & Brunthaler 2004.
    """

    sun_galcen_distance_kpc: float = 8.122
    sun_height_kpc: float = 0.0208
    sun_velocity_km_s: tuple[float, float, float] = (12.9, 245.6, 7.78)
    galcen_ra_deg: float = 266.4051
    galcen_dec_deg: float = -28.936175
    roll_deg: float = 0.0

    @property
    def sun_position(self) -> tuple[float, float, float]:
        """The Sun's Galactocentric position in kpc."""
        x = -math.sqrt(self.sun_galcen_distance_kpc**2 - self.sun_height_kpc**2)
        return (x, 0.0, self.sun_height_kpc)

    @property
    def sun_radius(self) -> float:
        """The Sun's cylindrical Galactocentric radius R0 in kpc."""
        return -self.sun_position[0]

    def as_dict(self) -> dict[str, Any]:
        """The frame as plain numbers, for manifests."""
        return {**asdict(self), "sun_velocity_km_s": list(self.sun_velocity_km_s)}

    def matrix(self) -> list[list[float]]:
        """Rotation from ICRS Cartesian axes to Galactocentric axes about the Sun (before the tilt by z).

        The full transformation is x_gal = H (A x_icrs − (d, 0, 0)), with A this matrix and H the tilt of
        angle arcsin(z_sun / d) about y that puts the Sun at its height; velocities turn with H A and gain
        the Sun's own. It is astropy's ``Galactocentric`` definition.
        """
        ra, dec, roll = (math.radians(a) for a in (self.galcen_ra_deg, self.galcen_dec_deg, self.roll_deg))
        # astropy: roll0 is the roll at which the x-z plane contains the Galactic pole.
        roll0 = math.radians(58.5986320306)
        cr, sr = math.cos(roll0 - roll), math.sin(roll0 - roll)
        ca, sa, cd, sd = math.cos(ra), math.sin(ra), math.cos(dec), math.sin(dec)
        turn_ra = [[ca, sa, 0.0], [-sa, ca, 0.0], [0.0, 0.0, 1.0]]
        turn_dec = [[cd, 0.0, sd], [0.0, 1.0, 0.0], [-sd, 0.0, cd]]
        turn_roll = [[1.0, 0.0, 0.0], [0.0, cr, sr], [0.0, -sr, cr]]
        return _matmul(turn_roll, _matmul(turn_dec, turn_ra))

    def tilt(self) -> list[list[float]]:
        """The tilt H about y by arcsin(z_sun / d), which puts the Sun at its height above the plane."""
        s = self.sun_height_kpc / self.sun_galcen_distance_kpc
        c = math.sqrt(1.0 - s * s)
        return [[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]]

    def icrs_to_galactocentric(self) -> list[list[float]]:
        """The whole rotation H A from ICRS axes to Galactocentric axes."""
        return _matmul(self.tilt(), self.matrix())


def _matmul(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[sum(a[i][k] * b[k][j] for k in range(3)) for j in range(3)] for i in range(3)]


def _namespace(array: Any) -> Any:
    """Torch for tensors, numpy for the rest: the two lines below serve both."""
    if type(array).__module__.startswith("torch"):
        import torch

        return torch
    import numpy

    return numpy


def cylindrical(w: Any) -> Any:
    """Cartesian to cylindrical phase space.

    Arguments:
        w: (x, y, z) or (x, y, z, v_x, v_y, v_z), shape (*, 3) or (*, 6), in kpc and km/s; a numpy array or
            torch tensor.

    Returns:
        (R, φ, z) or (R, φ, z, v_R, v_φ, v_z) of the same shape and kind, in kpc, rad and km/s.
    """
    xp = _namespace(w)
    x, y, z = w[..., 0], w[..., 1], w[..., 2]
    radius = xp.hypot(x, y)
    position = [radius, xp.arctan2(y, -x), z]
    if w.shape[-1] == 3:
        return xp.stack(position, -1)
    vx, vy, vz = w[..., 3], w[..., 4], w[..., 5]
    return xp.stack([*position, (x * vx + y * vy) / radius, (y * vx - x * vy) / radius, vz], -1)


def cartesian(c: Any) -> Any:
    """Cylindrical to Cartesian phase space: the inverse of `cylindrical`, same shapes and units."""
    xp = _namespace(c)
    radius, phi, z = c[..., 0], c[..., 1], c[..., 2]
    cos, sin = xp.cos(phi), xp.sin(phi)
    position = [-radius * cos, radius * sin, z]
    if c.shape[-1] == 3:
        return xp.stack(position, -1)
    vr, vphi, vz = c[..., 3], c[..., 4], c[..., 5]
    return xp.stack([*position, -vr * cos + vphi * sin, vr * sin + vphi * cos, vz], -1)
