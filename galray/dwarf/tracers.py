"""The stars of one spherical galaxy, as they are observed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from galray.errors import GalrayError

__all__ = ["Tracers"]

_FEWEST = 30
_LARGEST_ANGLE = 0.35  # rad: offsets beyond it are no tangent plane, and usually degrees taken for radians
_STARS = ("x", "y", "v", "v_error", "membership", "z", "vx", "vy", "vx_error", "vy_error")
_PHOTOMETRY = ("photometry_x", "photometry_y", "photometry_membership")


@dataclass(frozen=True)
class Tracers:
    """Sky offsets and velocities of a galaxy's stars; arrays become float64 of shape (n,).

    Attributes:
        x: Offsets from the centre towards east, kpc.
        y: Offsets from the centre towards north, kpc.
        v: Line-of-sight velocities, heliocentric or in any one inertial frame, km/s.
        v_error: Their Gaussian errors, km/s.
        membership: Probabilities that each star belongs to the galaxy, or none.
        z: Offsets along the line of sight in kpc (mocks).
        vx: Velocities towards east, km/s, from proper motions.
        vy: Velocities towards north, km/s, from proper motions.
        vx_error: Their Gaussian errors, km/s.
        vy_error: Their Gaussian errors, km/s.
        photometry_x: Offsets of stars that trace the light fairly, kpc; velocities are not needed.
        photometry_y: Offsets of the same stars towards north, kpc.
        photometry_membership: Their membership probabilities, or none.
        distance_kpc: Distance of the galaxy, kpc.
        distance_error_kpc: Its error; every radius scales with it.
        direction: (RA, Dec) of the centre, degrees.
        centre_error_kpc: Error of the centre along each axis, kpc.
        name: What to call the galaxy.
    """

    x: np.ndarray
    y: np.ndarray
    v: np.ndarray
    v_error: np.ndarray
    membership: np.ndarray | None = None
    z: np.ndarray | None = None
    vx: np.ndarray | None = None
    vy: np.ndarray | None = None
    vx_error: np.ndarray | None = None
    vy_error: np.ndarray | None = None
    photometry_x: np.ndarray | None = None
    photometry_y: np.ndarray | None = None
    photometry_membership: np.ndarray | None = None
    distance_kpc: float | None = None
    distance_error_kpc: float = 0.0
    direction: tuple[float, float] | None = None
    centre_error_kpc: float = 0.0
    name: str = "galaxy"

    def __post_init__(self) -> None:
        for group in (_STARS, _PHOTOMETRY):
            length = None
            for key in group:
                value = getattr(self, key)
                if value is None:
                    continue
                value = np.asarray(value, dtype=np.float64)
                if value.ndim == 0 and key.endswith("error") and length is not None:
                    value = np.full(length, float(value))
                if value.ndim != 1 or (length is not None and len(value) != length):
                    raise GalrayError(
                        f"{self.name}: {key} has shape {value.shape}, the others ({length or 'n'},)",
                        "give one number per star",
                    )
                length = len(value)
                object.__setattr__(self, key, value)
        if (self.photometry_x is None) != (self.photometry_y is None):
            raise GalrayError(
                f"{self.name}: photometry needs both offsets", "give photometry_x and _y, or neither"
            )
        for velocity, error in (("vx", "vx_error"), ("vy", "vy_error")):
            if (getattr(self, velocity) is None) != (getattr(self, error) is None):
                raise GalrayError(f"{self.name}: {velocity} and {error} come together", f"give {error} too")
        if (self.vx is None) != (self.vy is None):
            raise GalrayError(f"{self.name}: proper motions need vx and vy", "give both, or neither")

    def __len__(self) -> int:
        return len(self.v)

    @classmethod
    def project(
        cls,
        w: Any,
        v_error: float = 2.0,
        seed: int | np.random.SeedSequence | np.random.Generator | None = None,
        dimensions: int = 3,
        **others: Any,
    ) -> Tracers:
        """Observe phase-space states along z.

        Arguments:
            w: States (x, y, z, v_x, v_y, v_z) in kpc and km/s, shape (n, 6).
            v_error: Gaussian velocity error, km/s.
            seed: Draws the errors; none leaves the velocities as they are (already noisy).
            dimensions: 3 keeps (x, y, v_z), 5 adds (v_x, v_y), 6 adds z.
            others: Further fields, for example ``distance_kpc`` or ``name``.
        """
        if dimensions not in (3, 5, 6):
            raise GalrayError(f"dimensions = {dimensions} is unknown", "use 3, 5 or 6")
        w = np.array(w, dtype=np.float64)
        if seed is not None:
            w[:, 3:] += v_error * np.random.default_rng(seed).standard_normal((len(w), 3))
        error = np.full(len(w), float(v_error))
        fields: dict[str, Any] = {"x": w[:, 0], "y": w[:, 1], "v": w[:, 5], "v_error": error}
        if dimensions >= 5:
            fields |= {"vx": w[:, 3], "vy": w[:, 4], "vx_error": error, "vy_error": error}
        if dimensions == 6:
            fields["z"] = w[:, 2]
        return cls(**fields, **others)

    def subset(self, rows: np.ndarray) -> Tracers:
        """The chosen stars (mask or indices), with the photometry and the galaxy's own numbers."""
        chosen = {k: getattr(self, k)[rows] for k in _STARS if getattr(self, k) is not None}
        return dataclasses.replace(self, **chosen)

    def radius(
        self, ellipticity: float = 0.0, position_angle: float = 0.0, photometry: bool = False
    ) -> np.ndarray:
        """Circularised projected radius R = √(q x'² + y'²/q) in kpc, shape (n,).

        Arguments:
            ellipticity: 1 − q, q the axis ratio on the sky.
            position_angle: Of the major axis x', degrees from +y towards +x.
            photometry: Of the photometric stars.
        """
        x, y = (self.photometry_x, self.photometry_y) if photometry else (self.x, self.y)
        if x is None or y is None:
            raise GalrayError(f"{self.name} has no photometry", "give photometry_x and photometry_y")
        angle, q = np.deg2rad(position_angle), 1.0 - ellipticity
        major = x * np.sin(angle) + y * np.cos(angle)
        minor = x * np.cos(angle) - y * np.sin(angle)
        return np.hypot(major * np.sqrt(q), minor / np.sqrt(q))

    def check(self) -> Tracers:
        """Refuse data that no fit should see.

        Returns:
            These tracers.

        Raises:
            GalrayError: A distance or its error below 0; NaN or infinite values; zero or negative errors;
                memberships outside [0, 1]; the same velocity (0, say) standing for a missing one; fewer than
                30 members; offsets too large for the distance (degrees taken for radians); a centre outside
                the data.
        """
        zero = "0 or more"
        for key, least in (
            ("distance_kpc", "above 0"),
            ("distance_error_kpc", zero),
            ("centre_error_kpc", zero),
        ):
            number = getattr(self, key)
            low = np.nextafter(0, 1) if least == "above 0" else 0.0
            if number is not None and not low <= number < np.inf:
                raise GalrayError(f"{self.name}: {key} = {number:g}", f"it must be {least}, in kpc")
        for key in (*_STARS, *_PHOTOMETRY):
            value = getattr(self, key)
            if value is None:
                continue
            bad = np.flatnonzero(~np.isfinite(value))
            if len(bad):
                raise GalrayError(
                    f"{self.name}: {key} of star {bad[0]} is {value[bad[0]]} ({len(bad)} such stars)",
                    "drop the stars without a measurement",
                )
            if key.endswith("_error"):
                bad = np.flatnonzero(value <= 0)
                if len(bad):
                    raise GalrayError(
                        f"{self.name}: {key} of star {bad[0]} is {value[bad[0]]:g} km/s ({len(bad)} such)",
                        "errors must be positive; drop these stars or give their true errors",
                    )
            if key.endswith("membership"):
                bad = np.flatnonzero((value < 0) | (value > 1))
                if len(bad):
                    raise GalrayError(
                        f"{self.name}: {key} of star {bad[0]} is {value[bad[0]]:g}, not a probability",
                        "probabilities lie between 0 and 1",
                    )
        self._check_placeholders()
        count = float(len(self) if self.membership is None else self.membership.sum())
        if count < _FEWEST:
            raise GalrayError(
                f"{self.name}: {count:.0f} members with a velocity, fewer than {_FEWEST}",
                "give more stars; so few do not fix a halo",
            )
        self._check_places()
        return self

    def _check_placeholders(self) -> None:
        values, counts = np.unique(self.v, return_counts=True)
        if len(self) >= _FEWEST and counts.max() > max(0.02 * len(self), 3):
            value = values[counts.argmax()]
            if value == 0 or counts.max() > 0.2 * len(self):
                raise GalrayError(
                    f"{self.name}: {counts.max()} of {len(self)} velocities are exactly {value:g} km/s",
                    "that is a placeholder for 'not measured': drop these stars",
                )

    def _check_places(self) -> None:
        sets = [("stars", self.x, self.y, self.membership)]
        if self.photometry_x is not None and self.photometry_y is not None:
            sets.append(("photometry", self.photometry_x, self.photometry_y, self.photometry_membership))
        for what, x, y, membership in sets:
            largest = float(np.hypot(x, y).max())
            if self.distance_kpc is not None and largest > _LARGEST_ANGLE * self.distance_kpc:
                raise GalrayError(
                    f"{self.name}: {what} up to {largest:.4g} kpc from the centre at a distance of "
                    f"{self.distance_kpc:g} kpc",
                    "check the units of the angles (degrees, arcminutes or radians?) and the distance",
                )
            keep = (
                membership > 0.5 if membership is not None and (membership > 0.5).sum() >= 10 else slice(None)
            )
            middle = np.median(x[keep]), np.median(y[keep])
            spread = float(np.median(np.hypot(x[keep] - middle[0], y[keep] - middle[1])))
            if spread == 0:
                raise GalrayError(f"{self.name}: all {what} stand at one place", "check the positions")
            if np.hypot(*middle) > 2.5 * spread:
                raise GalrayError(
                    f"{self.name}: the middle of the {what} lies {np.hypot(*middle):.4g} kpc from the given "
                    f"centre, their half-number radius is {spread:.4g} kpc",
                    "the centre lies outside the data: check its coordinates",
                )
