"""Gaia's parallax zero point by magnitude, colour and ecliptic latitude (Lindegren+ 2021)."""

from __future__ import annotations

import csv
import math
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import polars as pl

__all__ = [
    "ZERO_POINT_COLUMNS",
    "parallax_zero_point",
    "zero_point_expression",
    "zero_point_in_range",
]

ZERO_POINT_COLUMNS = (
    "phot_g_mean_mag",
    "nu_eff_used_in_astrometry",
    "pseudocolour",
    "ecl_lat",
    "astrometric_params_solved",
)
"""What the zero point depends on: mag, 1/um, 1/um, deg, and 31 or 95 for 5 or 6 parameters."""

MAGNITUDES = (6.0, 21.0)
COLOURS = {31: (1.1, 1.9), 95: (1.24, 1.72)}
"""Where the formula was fitted: G, and the colour of 5-parameter (31) and 6-parameter (95) solutions."""


@cache
def _table(solution: int) -> tuple[np.ndarray, list[tuple[int, int]], np.ndarray]:
    """Knots in G, indices (j, k) of the terms, and coefficients (knots, terms) in µas."""
    path = files("galray.catalog") / "data" / "zero_point_lindegren2021.csv"
    with path.open("r", encoding="utf-8") as stream:
        rows = list(csv.DictReader(line for line in stream if not line.startswith("#")))
    rows = [row for row in rows if int(row["params_solved"]) == solution]
    names = [name for name in rows[0] if name.startswith("q") and rows[0][name]]
    knots = np.array([float(row["g"]) for row in rows])
    values = np.array([[float(row[name]) for name in names] for row in rows])
    return knots, [(int(name[1]), int(name[2])) for name in names], values


def parallax_zero_point(
    g: np.ndarray,
    nu_eff: np.ndarray,
    pseudocolour: np.ndarray,
    ecl_lat: np.ndarray,
    params_solved: np.ndarray,
) -> np.ndarray:
    """The zero point, to be subtracted from the parallax.

    Z = Σ_jk q_jk(G) c_j(ν) b_k(β), with q_jk interpolated linearly between knots in G (constant beyond
    them), c = 1, clip(ν − 1.48, ±0.24), min(0.24, max(0, 1.48 − ν))³, min(0, ν − 1.24), max(0, ν − 1.72)
    and b = 1, sin β, sin² β − 1/3 (Lindegren+ 2021, A&A 649, A4, appendix A). ν is the effective wavenumber
    of 5-parameter solutions, the pseudo-colour of 6-parameter ones.

    Arguments:
        g: (n,) G in mag.
        nu_eff: (n,) effective wavenumber in 1/µm.
        pseudocolour: (n,) in 1/µm.
        ecl_lat: (n,) ecliptic latitude in deg.
        params_solved: (n,) 31 or 95; others have no parallax and so no zero point.

    Returns:
        (n,) in mas; NaN where an input is missing or the solution has no parallax.
    """
    result = np.full(len(g), np.nan)
    latitude = np.sin(np.radians(ecl_lat))
    for solution, colour in ((31, nu_eff), (95, pseudocolour)):
        chosen = params_solved == solution
        knots, terms, values = _table(solution)
        basis_c = _colour_basis(colour[chosen], np)
        basis_b = (1.0, latitude[chosen], latitude[chosen] ** 2 - 1 / 3)
        total = np.zeros(int(chosen.sum()))
        for (j, k), column in zip(terms, values.T, strict=True):
            total += np.interp(g[chosen], knots, column) * basis_c[j] * basis_b[k]
        result[chosen] = total / 1000
    return result


def zero_point_expression(have: list[str] | None = None) -> pl.Expr:
    """The same as Polars expression over `ZERO_POINT_COLUMNS`, null where there is no zero point.

    Arguments:
        have: The columns at hand; without ``ecl_lat`` the latitude comes from ``ra`` and ``dec``.
    """
    g = pl.col("phot_g_mean_mag").cast(pl.Float64)
    result = pl.lit(None, dtype=pl.Float64)
    for solution, name in ((31, "nu_eff_used_in_astrometry"), (95, "pseudocolour")):
        knots, terms, values = _table(solution)
        clipped = g.clip(knots[0], knots[-1])
        place = pl.sum_horizontal((clipped >= knot).cast(pl.UInt32) for knot in knots[1:-1])
        left = pl.lit(pl.Series(knots)).gather(place)
        width = pl.lit(pl.Series(np.diff(knots))).gather(place)
        part = (clipped - left) / width
        basis_c = _colour_basis(pl.col(name).cast(pl.Float64), pl)
        latitude = _sin_ecliptic_latitude(have)
        basis_b: tuple[Any, ...] = (1.0, latitude, latitude**2 - 1 / 3)
        total = pl.lit(0.0)
        for (j, k), column in zip(terms, values.T, strict=True):
            start = pl.lit(pl.Series(column)).gather(place)
            total = (
                total
                + (start + part * pl.lit(pl.Series(np.diff(column))).gather(place)) * basis_c[j] * basis_b[k]
            )
        result = pl.when(pl.col("astrometric_params_solved") == solution).then(total / 1000).otherwise(result)
    return result.alias("parallax_zero_point")


def zero_point_in_range() -> pl.Expr:
    """True for stars inside the magnitudes and colours to which the formula was fitted."""
    colour = pl.lit(False)
    for solution, name in ((31, "nu_eff_used_in_astrometry"), (95, "pseudocolour")):
        chosen = pl.col("astrometric_params_solved") == solution
        colour = pl.when(chosen).then(pl.col(name).is_between(*COLOURS[solution])).otherwise(colour)
    return colour & pl.col("phot_g_mean_mag").is_between(*MAGNITUDES)


def _colour_basis(colour: Any, xp: Any) -> tuple[Any, ...]:
    """The five functions of colour, for numpy arrays or Polars expressions."""
    clip = (lambda value, low, high: value.clip(low, high)) if xp is pl else np.clip
    return (
        1.0,
        clip(colour - 1.48, -0.24, 0.24),
        clip(1.48 - colour, 0.0, 0.24) ** 3,
        clip(colour - 1.24, -math.inf, 0.0),
        clip(colour - 1.72, 0.0, math.inf),
    )


def _sin_ecliptic_latitude(have: list[str] | None) -> pl.Expr:
    if have is None or "ecl_lat" in have:
        return pl.col("ecl_lat").cast(pl.Float64).radians().sin()
    tilt = math.radians(23.4392911)  # obliquity of J2000 (IAU 1976), as Gaia's own ecl_lat has it
    ra, dec = pl.col("ra").cast(pl.Float64).radians(), pl.col("dec").cast(pl.Float64).radians()
    return dec.sin() * math.cos(tilt) - dec.cos() * ra.sin() * math.sin(tilt)
