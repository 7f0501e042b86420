"""Parts of the sky to fetch: a cone, or HEALPix pixels of any level."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from galray.errors import GalrayError

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Region"]

_LEVEL = 8  # of the ranges that name ESA's bulk files
_ID_LEVEL = 12  # of the pixel that a source_id holds


_DRIFT = 0.05
"""Deg by which the place that a source_id holds may differ from the star's: more than any has moved."""


def _within(lon: Any, lat: Any, ra: float, dec: float, radius: float) -> Any:
    """Which places (arrays, deg) are within `radius` of one."""
    import numpy as np

    away = np.sin(np.radians(lat - dec) / 2) ** 2
    around = np.sin(np.radians(lon - ra) / 2) ** 2 * np.cos(np.radians(lat)) * np.cos(np.radians(dec))
    return away + around <= np.sin(np.radians(min(radius, 180.0)) / 2) ** 2


@dataclass(frozen=True)
class Region:
    """A part of the sky (ICRS).

    Arguments:
        level: HEALPix level of `pixels`; None for a cone.
        pixels: Nested HEALPix pixels. A star's is the one that its ``source_id`` holds, as in ESA's files.
        cone: Right ascension, declination and radius in deg; a star's is by ``ra`` and ``dec``.
    """

    level: int | None = None
    pixels: tuple[int, ...] = ()
    cone: tuple[float, float, float] | None = None

    @classmethod
    def from_healpix(cls, text: str) -> Region:
        """The region of ``LEVEL:PIX,PIX,…``; ``A-B`` stands for all pixels from A to B.

        Raises:
            GalrayError: It is not of that form, or a pixel is not of the level.
        """
        remedy = "write LEVEL:PIX,… with nested pixels, such as 5:1234,2000-2003"
        if not re.fullmatch(r"\d+:\d+(-\d+)?(,\d+(-\d+)?)*", text.replace(" ", "")):
            raise GalrayError(f"healpix '{text}' is not a list of pixels", remedy)
        level, pixels = text.replace(" ", "").split(":")
        if int(level) > _ID_LEVEL:
            raise GalrayError(f"healpix '{text}': a source_id knows levels up to {_ID_LEVEL}", remedy)
        found: set[int] = set()
        for part in pixels.split(","):
            first, _, last = part.partition("-")
            if int(last or first) >= 12 * 4 ** int(level) or int(last or first) < int(first):
                raise GalrayError(
                    f"healpix '{text}': level {level} has pixels 0 to {12 * 4 ** int(level) - 1}, not {part}",
                    remedy,
                )
            found.update(range(int(first), int(last or first) + 1))
        return cls(int(level), tuple(sorted(found)))

    @classmethod
    def from_cone(cls, text: str) -> Region:
        """The region of ``RA,DEC,RADIUS`` in deg.

        Raises:
            GalrayError: It is not of that form, or not a cone on the sky.
        """
        try:
            ra, dec, radius = (float(word) for word in text.split(","))
        except ValueError:
            ra = dec = radius = math.nan
        if not (math.isfinite(ra) and -90 <= dec <= 90 and 0 < radius <= 180):
            raise GalrayError(
                f"cone '{text}' is not a cone on the sky",
                "write RA,DEC,RADIUS in deg, such as 266.4,-29.0,1.5: dec from -90 to 90, radius above 0",
            )
        return cls(cone=(ra % 360.0, dec, radius))

    def ranges(self, margin: bool = False) -> list[tuple[int, int]]:
        """Inclusive ranges of nested level-8 pixels that hold the region, in order.

        Arguments:
            margin: With all neighbouring pixels, for tiles that were made by place and not by source_id.
        """
        import hpgeom
        import numpy as np

        nside = 1 << _LEVEL
        if self.cone is not None:
            ra, dec, radius = self.cone
            radius += _DRIFT
            if radius < 60:
                pixels = hpgeom.query_circle(nside, ra, dec, radius, inclusive=True, nest=True)
            else:  # hpgeom's wide cones lack pixels around the far pole
                lon, lat = hpgeom.pixel_to_angle(nside, np.arange(12 * nside**2), nest=True)
                radius += float(hpgeom.max_pixel_radius(nside))
                pixels = np.flatnonzero(_within(lon, lat, ra, dec, radius))
        else:
            assert self.level is not None
            shift = 2 * (_LEVEL - self.level)
            given = np.asarray(self.pixels, dtype=np.int64)
            if shift <= 0:
                pixels = np.unique(given >> -shift)
            else:
                pixels = (given[:, None] * (1 << shift) + np.arange(1 << shift)).ravel()
        if margin:
            around = hpgeom.neighbors(nside, pixels, nest=True).ravel()
            pixels = np.concatenate([pixels, around[around >= 0]])
        pixels = np.unique(pixels)
        breaks = np.flatnonzero(np.diff(pixels) > 1)
        first = pixels[np.concatenate([[0], breaks + 1])]
        last = pixels[np.concatenate([breaks, [len(pixels) - 1]])]
        return [(int(a), int(b)) for a, b in zip(first, last, strict=True)]

    def id_ranges(self) -> list[tuple[int, int]]:
        """Inclusive ranges of source_id of a region of pixels."""
        assert self.level is not None
        shift = 35 + 2 * (_ID_LEVEL - self.level)
        runs: list[tuple[int, int]] = []
        for pixel in self.pixels:
            if runs and pixel == runs[-1][1] + 1:
                runs[-1] = (runs[-1][0], pixel)
            else:
                runs.append((pixel, pixel))
        return [(a << shift, ((b + 1) << shift) - 1) for a, b in runs]

    def needs(self) -> tuple[str, ...]:
        """The columns that `condition` reads."""
        return ("source_id",) if self.cone is None else ("ra", "dec")

    def condition(self) -> pl.Expr:
        """True for the stars in the region."""
        import polars as pl

        if self.cone is None:
            inside = [pl.col("source_id").is_between(a, b) for a, b in self.id_ranges()]
            return pl.any_horizontal(inside)
        ra, dec, radius = (math.radians(value) for value in self.cone)
        # Half the chord's square: keeps its digits for small cones, which the cosine does not.
        y = pl.col("dec").radians()
        away = ((y - dec) / 2).sin() ** 2
        around = ((pl.col("ra").radians() - ra) / 2).sin() ** 2
        return away + around * y.cos() * math.cos(dec) <= math.sin(radius / 2) ** 2

    def adql(self) -> str:
        """The region as a condition of the Gaia archive's query language."""
        if self.cone is not None:
            ra, dec, radius = self.cone
            return (
                f"1 = CONTAINS(POINT('ICRS', ra, dec), CIRCLE('ICRS', {ra:.12g}, {dec:.12g}, {radius:.12g}))"
            )
        parts = [f"source_id BETWEEN {a} AND {b}" for a, b in self.id_ranges()]
        return parts[0] if len(parts) == 1 else f"({' OR '.join(parts)})"

    def state(self) -> dict[str, Any]:
        """The region in plain values, as manifests keep it."""
        if self.cone is not None:
            return {"cone": list(self.cone)}
        return {"level": self.level, "pixels": list(self.pixels)}
