"""Distances from parallaxes with a prior, or from another catalogue's quantiles; their errors and draws."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from galray.errors import GalrayError
from galray.settings import Settings

__all__ = ["EdsdPosterior", "EdsdSettings", "JoinedDistanceSettings", "length_scales", "quantile_draws"]

POINTS = 48
"""Points of the quadrature on either side of the split."""

_PRESETS = {
    "bailer_jones_geo": ("r_med_geo", "r_lo_geo", "r_hi_geo", "pc"),
    "bailer_jones_photogeo": ("r_med_photogeo", "r_lo_photogeo", "r_hi_photogeo", "pc"),
    "starhorse": ("dist50", "dist16", "dist84", "kpc"),
}


class EdsdSettings(Settings):
    """The exponentially decreasing space density prior, p(d) ∝ d² exp(−d / L) (Bailer-Jones 2015)."""

    length_kpc: float = Field(
        default=1.35,
        gt=0,
        description="The prior's length scale L; 1.35 is that of Astraatmadja & Bailer-Jones 2016.",
    )
    table: str = Field(
        default="",
        description="CSV with l_min, l_max, b_min, b_max (deg) and length_kpc: the first row that "
        "holds a star gives its L, length_kpc where none does.",
    )
    estimate: Literal["mode", "mean", "median"] = Field(
        default="median",
        description="Which number of the posterior is the star's distance; its error is the posterior's sd.",
    )


class JoinedDistanceSettings(Settings):
    """Another catalogue's distances by source_id: a median and the 16 % and 84 % quantiles."""

    file: str = Field(description="Parquet or CSV file, or a glob pattern of Parquet files.")
    preset: Literal["", "bailer_jones_geo", "bailer_jones_photogeo", "starhorse"] = Field(
        default="",
        description="Column names and unit of a known catalogue (Bailer-Jones+ 2021, StarHorse).",
    )
    median: str = Field(default="", description="Column of the median.")
    low: str = Field(default="", description="Column of the 16 % quantile.")
    high: str = Field(default="", description="Column of the 84 % quantile.")
    unit: Literal["kpc", "pc"] = Field(default="kpc", description="Unit of the three columns.")
    key: str = Field(default="source_id", description="Column of the file that holds Gaia's source_id.")

    @model_validator(mode="after")
    def _columns_named(self) -> JoinedDistanceSettings:
        if not self.preset and not (self.median and self.low and self.high):
            raise ValueError("name the columns median, low and high, or give a preset")
        return self

    @property
    def quantities(self) -> tuple[str, str, str, float]:
        """Columns of median, low and high, and the factor to kpc."""
        given = (self.median, self.low, self.high, self.unit)
        *names, unit = _PRESETS[self.preset] if self.preset else given
        return names[0], names[1], names[2], 1e-3 if unit == "pc" else 1.0


def length_scales(settings: EdsdSettings, ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
    """The prior's length scale at each place.

    Arguments:
        settings: A fixed length, and a table where one is given.
        ra: (n,) in deg.
        dec: (n,) in deg.

    Returns:
        (n,) in kpc.

    Raises:
        GalrayError: The table cannot be read or lacks a column.
    """
    result = np.full(len(ra), settings.length_kpc)
    if not settings.table:
        return result
    names = ["l_min", "l_max", "b_min", "b_max", "length_kpc"]
    try:
        table = pl.read_csv(settings.table, comment_prefix="#", glob=False)
        cells = table.select(pl.col(names).cast(pl.Float64)).to_numpy()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise GalrayError(
            f"catalog.edsd.table: {settings.table}: {str(error).splitlines()[0]}",
            f"give a CSV file with {', '.join(names)}",
        ) from None
    if not np.all(cells[:, 4] > 0):
        raise GalrayError(f"catalog.edsd.table: {settings.table}: length_kpc must be positive in every row")
    longitude, latitude = _galactic(ra, dec)
    for l_min, l_max, b_min, b_max, length in cells[::-1]:
        inside = (longitude >= l_min) & (longitude < l_max) & (latitude >= b_min) & (latitude <= b_max)
        result[inside] = length
    return result


def _galactic(ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Galactic longitude in [0, 360) and latitude in deg (the IAU pole as Hipparcos and Gaia define it)."""
    pole_ra, pole_dec, node = np.radians([192.85948, 27.12825, 32.93192])
    a, d = np.radians(ra) - pole_ra, np.radians(dec)
    sin_b = np.sin(d) * np.sin(pole_dec) + np.cos(d) * np.cos(pole_dec) * np.cos(a)
    east = np.sin(d) * np.cos(pole_dec) - np.cos(d) * np.sin(pole_dec) * np.cos(a)
    longitude = np.degrees(np.arctan2(east, np.cos(d) * np.sin(a)) + node) % 360
    return longitude, np.degrees(np.arcsin(np.clip(sin_b, -1, 1)))


class EdsdPosterior:
    """Posteriors of distances, p(d | ϖ) ∝ d² exp(−d / L) exp(−(ϖ − 1 / d)² / 2 σ²).

    Proper for every parallax, negative ones too (Bailer-Jones 2015, PASP 127, 994). Integrals are over ln d,
    by the trapezoidal rule with its first end correction on a grid that spans the posterior down to e⁻⁴⁰ of
    its peak, split at the mode or, where there are two, between them.

    Arguments:
        parallax: (n,) zero-point corrected, in mas.
        error: (n,) standard errors in mas, positive.
        length: (n,) or one, the prior's length scale in kpc.
    """

    def __init__(self, parallax: np.ndarray, error: np.ndarray, length: np.ndarray | float) -> None:
        self.parallax, self.error, self.length = (
            np.array(a)
            for a in np.broadcast_arrays(*(np.asarray(x, float) for x in (parallax, error, length)))
        )
        if not (np.all(self.error > 0) and np.all(self.length > 0)):
            raise ValueError("errors and length scales must be positive")

    def _log(self, u: np.ndarray) -> np.ndarray:
        """Ln of the density in u = ln d, not normalised."""
        extra = (..., *(None,) * (u.ndim - 1))
        residual = (self.parallax[extra] - np.exp(-u)) / self.error[extra]
        return np.asarray(3 * u - np.exp(u) / self.length[extra] - 0.5 * residual**2)

    def _slope(self, u: np.ndarray) -> np.ndarray:
        """Derivative of `_log` by u."""
        extra = (..., *(None,) * (u.ndim - 1))
        near = np.exp(-u)
        pull = (self.parallax[extra] - near) * near / self.error[extra] ** 2
        return np.asarray(3 - np.exp(u) / self.length[extra] - pull)

    @cached_property
    def _roots(self) -> np.ndarray:
        """The (n, 3) real roots in 1/d of the cubic for the density's extrema, NaN for complex ones.

        With q = 1/d: q³ − ϖ q² + 2 σ² q − σ²/L = 0.
        """
        b, c, d = -self.parallax, 2 * self.error**2, -(self.error**2) / self.length
        p, q = c - b**2 / 3, 2 * b**3 / 27 - b * c / 3 + d
        discriminant = (q / 2) ** 2 + (p / 3) ** 3
        roots = np.full((len(b), 3), np.nan)
        one = discriminant > 0
        root = np.sqrt(discriminant[one])
        # The larger of the two cube roots first: the other follows without cancellation.
        large = np.cbrt(-q[one] / 2 - np.copysign(root, q[one]))
        with np.errstate(invalid="ignore", divide="ignore"):
            roots[one, 0] = large - np.where(large == 0, 0, p[one] / (3 * large))
        three = ~one
        size = 2 * np.sqrt(np.maximum(-p[three] / 3, 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = np.clip(np.nan_to_num(3 * q[three] / (p[three] * size)), -1, 1)
        for k in range(3):
            roots[three, k] = size * np.cos((np.arccos(cosine) - 2 * np.pi * k) / 3)
        roots = roots - b[:, None] / 3
        for _ in range(3):  # Newton: the closed form loses digits where σ ≪ ϖ
            value = ((roots + b[:, None]) * roots + c[:, None]) * roots + d[:, None]
            slope = (3 * roots + 2 * b[:, None]) * roots + c[:, None]
            step = np.where(np.abs(slope) > 0, value / np.where(slope == 0, 1, slope), 0)
            roots = np.where(np.abs(step) < 0.5 * np.abs(roots), roots - step, roots)
        return np.where(roots > 0, roots, np.nan)

    @cached_property
    def mode(self) -> np.ndarray:
        """Distance in kpc of the posterior's highest peak."""
        with np.errstate(divide="ignore", invalid="ignore"):
            u = -np.log(self._roots)
        height = np.where(np.isnan(u), -np.inf, self._log(np.nan_to_num(u)) - np.nan_to_num(u))
        return np.asarray(np.exp(np.take_along_axis(u, np.argmax(height, 1)[:, None], 1)[:, 0]))

    @cached_property
    def _grid(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points in u, density there and its cumulative integral, (n, 2 POINTS + 1) each, normalised."""
        with np.errstate(divide="ignore", invalid="ignore"):
            u = np.sort(-np.log(self._roots), 1)  # NaN last
        peak = self._log(np.log(self.mode))
        first, last = u[:, 0], np.nanmax(u, 1)
        split = np.log(self.mode)
        # Two peaks that both matter: the middle root is the dip between them.
        second = np.where(np.isnan(u[:, 2]), -np.inf, np.minimum(self._log(first), self._log(last)) - peak)
        double = second > -40
        split = np.where(double, u[:, 1], split)
        low = self._edge(np.where(double, first, np.log(self.mode)), peak, -1.0)
        high = self._edge(np.where(double, last, np.log(self.mode)), peak, 1.0)
        step = np.linspace(0, 1, POINTS + 1)
        left = low[:, None] + (split - low)[:, None] * step
        right = split[:, None] + (high - split)[:, None] * step[1:]
        points = np.concatenate([left, right], 1)
        density = np.exp(self._log(points) - peak[:, None])
        cumulative = _cumulative(points, density, density * self._slope(points))
        total = cumulative[:, -1:]
        return points, density / total, cumulative / total

    def _edge(self, start: np.ndarray, peak: np.ndarray, side: float) -> np.ndarray:
        """Where the density has fallen to e⁻⁴⁰ of the peak, by bisection outwards from a mode."""
        near, far = start.copy(), start.copy()
        width = np.full(len(start), 0.01)
        for _ in range(14):
            inside = self._log(far) - peak > -40
            far = np.where(inside, far + side * width, far)
            width = np.where(inside, width * 2, width)
        for _ in range(24):
            middle = (near + far) / 2
            inside = self._log(middle) - peak > -40
            near, far = np.where(inside, middle, near), np.where(inside, far, middle)
        return far

    def moment(self, power: int) -> np.ndarray:
        """Mean of d^power, (n,) in kpc^power."""
        points, density, _ = self._grid
        value = np.exp(power * points)
        slope = density * value * (self._slope(points) + power)
        return np.asarray(_cumulative(points, density * value, slope)[:, -1])

    @cached_property
    def mean(self) -> np.ndarray:
        """Posterior mean, (n,) in kpc."""
        return self.moment(1)

    @cached_property
    def sd(self) -> np.ndarray:
        """Posterior standard deviation, (n,) in kpc."""
        points, density, _ = self._grid
        offset = np.exp(points) - self.mean[:, None]
        slope = density * (self._slope(points) * offset**2 + 2 * offset * np.exp(points))
        return np.asarray(np.sqrt(_cumulative(points, density * offset**2, slope)[:, -1]))

    def quantile(self, probability: np.ndarray | float) -> np.ndarray:
        """Distance below which the posterior holds this probability.

        Arguments:
            probability: (n,) or one, in [0, 1]; uniform random numbers give draws from the posterior.

        Returns:
            (n,) in kpc.
        """
        points, density, cumulative = self._grid
        rows = np.arange(len(points))
        wanted = np.broadcast_to(np.asarray(probability, float), rows.shape)
        place = np.clip(np.sum(cumulative <= wanted[:, None], 1) - 1, 0, points.shape[1] - 2)
        width = points[rows, place + 1] - points[rows, place]
        f0, f1 = density[rows, place] * width, density[rows, place + 1] * width
        rise = cumulative[rows, place + 1] - cumulative[rows, place]
        target = wanted - cumulative[rows, place]
        t = np.clip(target / np.maximum(rise, 1e-300), 0, 1)
        a, b = f0 + f1 - 2 * rise, 3 * rise - 2 * f0 - f1
        for _ in range(6):  # Newton on the cubic with these ends and slopes
            value, slope = ((a * t + b) * t + f0) * t - target, (3 * a * t + 2 * b) * t + f0
            t = np.clip(t - value / np.where(slope > 1e-300, slope, np.inf), 0, 1)
        return np.asarray(np.exp(points[rows, place] + t * width))


def _cumulative(points: np.ndarray, values: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Integral up to each point: trapezoids with the end correction h² (f₀′ − f₁′) / 12 in each cell."""
    h = np.diff(points, axis=1)
    cells = h / 2 * (values[:, 1:] + values[:, :-1]) + h**2 / 12 * (slopes[:, :-1] - slopes[:, 1:])
    return np.concatenate([np.zeros((len(points), 1)), np.cumsum(cells, 1)], 1)


def quantile_draws(median: np.ndarray, low: np.ndarray, high: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Distances drawn from a split log-normal with given 16 %, 50 % and 84 % quantiles; always positive.

    Arguments:
        median: (n,) median.
        low: (n,) 16 % quantile.
        high: (n,) 84 % quantile.
        normal: (n,) standard normal numbers.

    Returns:
        (n,) in the unit of the quantiles.
    """
    return np.asarray(median * np.exp(normal * np.log(np.where(normal > 0, high / median, median / low))))
