"""The radial-velocity selection function: the fraction of stars with one, by magnitude, colour and sky."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import Field, field_validator, model_validator

from galray.catalog.counting import counted, first_of_runs
from galray.errors import GalrayError
from galray.settings import Settings

__all__ = ["SELECTION_FILES", "RVSelection", "RVSelectionSettings", "RVTally"]

SELECTION_FILES = ("rv_fraction.json", "rv_fraction.parquet")
"""What a store keeps of it, in its folder ``selection``."""

_HELD_ROWS = 1 << 20
"""Stars whose cells are held until they are counted."""

_COUNTS = {"cell": pl.Int64(), "stars": pl.Int64(), "with_rv": pl.Int64()}


class RVSelectionSettings(Settings):
    """The cells in which stars with and without radial velocity are counted."""

    healpix_level: int = Field(
        default=4,
        ge=0,
        le=5,
        description="HEALPix level of the sky cells (nested, ICRS): 3 is 7.3 deg, 4 is 3.7, 5 is 1.8.",
    )
    magnitude_edges: tuple[float, ...] = Field(
        default=tuple(4.0 + 0.25 * i for i in range(57)),
        description="Edges of the bins in G; the first and last bin beyond them are open.",
    )
    colour_edges: tuple[float, ...] = Field(
        default=(0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5),
        description="Edges of the bins in BP-RP; the first and last bin beyond them are open.",
    )

    @field_validator("magnitude_edges", "colour_edges")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(b <= a for a, b in itertools.pairwise(value)):
            raise ValueError("edges must rise")
        return value

    @model_validator(mode="after")
    def _not_too_many(self) -> RVSelectionSettings:
        cells = int(np.prod(self.shape))
        if cells > 20_000_000:
            raise ValueError(f"{cells:,} cells are too many: use fewer bins or a lower healpix_level")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of cells on the sky, in G and in BP-RP; the last two with open ends and one for missing."""
        return 12 * 4**self.healpix_level, len(self.magnitude_edges) + 2, len(self.colour_edges) + 2

    def cells(self, g: np.ndarray, bp_rp: np.ndarray, ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
        """The cell of each star.

        Arguments:
            g: (n,) G in mag; NaN where missing.
            bp_rp: (n,) colour in mag; NaN where missing.
            ra: (n,) right ascension in deg.
            dec: (n,) declination in deg.

        Returns:
            (n,) int64 indices into an array of `shape`, flattened.
        """
        return self._join(self.pixels(ra, dec), g, bp_rp)

    def pixels(self, ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
        """The HEALPix cell of each place in deg, (n,) int64."""
        import hpgeom

        found = hpgeom.angle_to_pixel(2**self.healpix_level, ra, dec, nest=True, lonlat=True, degrees=True)
        return found.astype(np.int64)

    def _join(self, pixel: np.ndarray, g: np.ndarray, bp_rp: np.ndarray) -> np.ndarray:
        _, num_g, num_colour = self.shape
        in_g = _bins(g, self.magnitude_edges)
        return (pixel * num_g + in_g) * num_colour + _bins(bp_rp, self.colour_edges)


def _bins(values: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    """Number of each value's bin: 0 below the first edge, the last but one above the last, last for NaN."""
    step = (edges[-1] - edges[0]) / max(len(edges) - 1, 1)
    if len(edges) > 16 and np.allclose(np.diff(edges), step, rtol=1e-12):
        # Equal bins: arithmetic is several times faster than a search.
        place = np.floor((values.astype(np.float64, copy=False) - edges[0]) / step) + 1
        place = np.where(np.isnan(place), len(edges) + 1, np.clip(place, 0, len(edges)))
        return place.astype(np.int64)
    # NaN sorts above every number, and so into a last bin beyond that of the infinite.
    return np.searchsorted(np.array([*edges, np.nan]), values.astype(np.float64, copy=False), side="right")


class RVTally:
    """Counts of stars, and of those with radial velocity, by cell; tallies of parts of a catalogue add up.

    Arguments:
        settings: The cells.
    """

    def __init__(self, settings: RVSelectionSettings) -> None:
        self.settings = settings
        self._parts: list[pl.DataFrame] = []
        self._held: list[np.ndarray] = []

    def add(self, stars: pl.DataFrame) -> None:
        """Count stars.

        Arguments:
            stars: With ``source_id``, ``ra``, ``dec``, ``has_rv`` and, where known, ``phot_g_mean_mag`` and
                ``bp_rp``. Where ``source_id`` is Gaia's its bits give the sky cell.
        """
        if stars.height == 0:
            return
        g, bp_rp = (_floats(stars, name) for name in ("phot_g_mean_mag", "bp_rp"))
        cell = self.settings._join(self._pixels(stars), g, bp_rp)
        # With and without velocity side by side, to be counted in one go; there are no more than 2e7 cells.
        self._held.append((2 * cell + stars["has_rv"].to_numpy()).astype(np.int32))
        if sum(map(len, self._held)) >= _HELD_ROWS:
            self._count()

    def _pixels(self, stars: pl.DataFrame) -> np.ndarray:
        """Sky cells: by shifting source_id where that agrees with the places of a few of the stars."""
        # The bits above the 35th are the HEALPix cell of level 12 where the source was first seen.
        by_id = stars["source_id"].to_numpy() >> (59 - 2 * self.settings.healpix_level)
        every = max(1, stars.height // 200)
        ra, dec = stars["ra"].to_numpy(), stars["dec"].to_numpy()
        some = self.settings.pixels(ra[::every], dec[::every])
        return by_id if np.mean(by_id[::every] == some) > 0.98 else self.settings.pixels(ra, dec)

    def _count(self) -> None:
        """Count the stars that are held."""
        values, numbers = counted(np.concatenate(self._held))
        self._held = []
        cells = values >> 1
        first = first_of_runs(cells)
        stars, with_rv = (np.add.reduceat(n, first) for n in (numbers, numbers * (values & 1)))
        part = {"cell": cells[first], "stars": stars, "with_rv": with_rv}
        self._parts.append(pl.DataFrame(part).select(pl.col(n).cast(k) for n, k in _COUNTS.items()))
        if len(self._parts) > 32:
            self._parts = [self.counts()]

    def counts(self) -> pl.DataFrame:
        """The cells that hold stars, with numbers of ``stars`` and of those ``with_rv``, in order."""
        if self._held:
            self._count()
        if len(self._parts) == 1:
            return self._parts[0].sort("cell")
        whole = pl.concat([pl.DataFrame(schema=_COUNTS), *self._parts])
        return whole.group_by("cell").agg(pl.col("stars", "with_rv").sum()).sort("cell")

    def write(self, path: Path) -> None:
        """Write the counts as Parquet, for `merge`."""
        self.counts().write_parquet(path)

    @classmethod
    def merge(cls, settings: RVSelectionSettings, paths: Iterable[Path]) -> RVTally:
        """The sum of tallies that were written; memory is bounded by the number of cells."""
        tally = cls(settings)
        for path in paths:
            tally._parts.append(pl.read_parquet(path, glob=False))
            if len(tally._parts) > 32:
                tally._parts = [tally.counts()]
        return tally

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write `SELECTION_FILES` into a folder, which `RVSelection` reads.

        Arguments:
            folder: Made where absent.
            about: What else to say of the stars counted: the cuts, the sources of velocities.
        """
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"cells": self.settings.model_dump(mode="json"), **about}, indent=1)
        (folder / SELECTION_FILES[0]).write_text(text + "\n", encoding="utf-8")
        self.counts().write_parquet(folder / SELECTION_FILES[1], compression="zstd", statistics=True)


def _floats(frame: pl.DataFrame, name: str) -> np.ndarray:
    if name not in frame.columns:
        return np.full(frame.height, np.nan)
    values = frame[name]
    values = values if values.dtype.is_float() else values.cast(pl.Float64)
    return values.fill_null(float("nan")).to_numpy()


class RVSelection:
    """The known ε of the radial-velocity sample: the fraction of stars with radial velocity.

    In a cell of n stars, k of them with radial velocity, the estimate is the beta-binomial mean

        f = (k + m f₀) / (n + m),    var f = f (1 − f) / (n + m + 1) + (m / (n + m))² var f₀,

    where f₀ is the estimate of the next coarser cell without this one's stars: the sky cell one level up,
    and so on to the whole sky, then without colour. The prior's weight m says how alike the children of a
    cell are; it comes from the counts themselves, level by level and magnitude by magnitude, by moments: with
    E (k − n f₀)² = n f₀ (1 − f₀) (1 + (n − 1) ρ), ρ = 1 / (m + 1). So cells with many stars speak for
    themselves and empty ones repeat their parent, with the spread of its children as error.

    Arguments:
        settings: The cells.
        counts: As `RVTally.counts` gives it.
        about: What the tally says of itself.
    """

    def __init__(
        self, settings: RVSelectionSettings, counts: pl.DataFrame, about: Mapping[str, Any] | None = None
    ) -> None:
        self.settings = settings
        self.about = dict(about or {})
        self.stars = np.zeros(settings.shape, dtype=np.int64)
        self.with_rv = np.zeros(settings.shape, dtype=np.int64)
        cell = counts["cell"].to_numpy()
        self.stars.reshape(-1)[cell] = counts["stars"].to_numpy()
        self.with_rv.reshape(-1)[cell] = counts["with_rv"].to_numpy()

    @classmethod
    def open(cls, folder: Path | str) -> RVSelection:
        """Read what `RVTally.save` wrote.

        Raises:
            GalrayError: The files are absent or broken.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / SELECTION_FILES[0]).read_text(encoding="utf-8"))
            settings = RVSelectionSettings.model_validate(about.pop("cells"))
            counts = pl.read_parquet(folder / SELECTION_FILES[1], glob=False)
            return cls(settings, counts, about)
        except (OSError, ValueError, KeyError, IndexError, pl.exceptions.PolarsError) as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise GalrayError(
                f"{folder}: the radial-velocity selection cannot be read: {text}",
                "ingest the catalogue again",
            ) from None

    def fraction(
        self,
        stars: pl.DataFrame | tuple[Any, Any, Any, Any],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The fraction with radial velocity at stars' magnitudes, colours and places.

        Arguments:
            stars: A table with ``phot_g_mean_mag``, ``bp_rp``, ``ra`` and ``dec``, or these four as arrays
                (mag, mag, deg, deg); NaN or null where a magnitude or colour is missing.

        Returns:
            The fraction and its standard error, (n,) each.

        Raises:
            GalrayError: The table lacks a column.
        """
        if isinstance(stars, pl.DataFrame):
            names = ("phot_g_mean_mag", "bp_rp", "ra", "dec")
            if absent := [name for name in names if name not in stars.columns]:
                raise GalrayError(
                    f"the table has no column '{absent[0]}'", f"give a table with {', '.join(names)}"
                )
            values = [_floats(stars, name) for name in names]
        else:
            values = [np.atleast_1d(np.asarray(each, dtype=float)) for each in stars]
        cell = self.settings.cells(*np.broadcast_arrays(*values))
        value, error = self.estimate
        return value.reshape(-1)[cell], error.reshape(-1)[cell]

    def compare(self, stars: pl.DataFrame, published: Any) -> dict[str, float]:
        """Compare with another selection function, cell by cell.

        For GaiaUnlimited's (Castro-Ginard et al. 2023, arXiv 2303.17738), which asks for G − G_RP and fetches
        its counts when first used::

            from gaiaunlimited.selectionfunctions import DR3RVSSelectionFunction
            published = DR3RVSSelectionFunction().query(SkyCoord(ra, dec, unit="deg"), g=g, c=g - g_rp)
            store.rv_selection.compare(table, published)

        Arguments:
            stars: Stars at which both are asked, as for `fraction`.
            published: The other's fraction at these stars, shape (n,).

        Returns:
            ``cells`` compared; ``mean_difference``, published minus own weighted by stars, and its
            ``mean_difference_error``; ``reduced_chi2`` of the cells' differences under own errors.

        Raises:
            GalrayError: The numbers of stars differ, a fraction lies outside 0 … 1, or none is given.
        """
        value, error = self.fraction(stars)
        other = np.asarray(published, dtype=float)
        if other.shape != value.shape or not len(other):
            raise GalrayError(
                f"{other.shape} published fractions for {len(value)} stars", "give one fraction for each star"
            )
        if not bool(((other >= 0) & (other <= 1)).all()):
            raise GalrayError(
                "a published fraction lies outside 0 … 1", "leave out stars that it does not cover"
            )
        columns = [_floats(stars, name) for name in ("phot_g_mean_mag", "bp_rp", "ra", "dec")]
        _, first, cell, count = np.unique(
            self.settings.cells(*columns), return_index=True, return_inverse=True, return_counts=True
        )
        difference = np.bincount(cell, other) / count - value[first]
        weight = count / count.sum()
        return {
            "cells": float(len(count)),
            "mean_difference": float(weight @ difference),
            "mean_difference_error": float(np.sqrt(weight**2 @ error[first] ** 2)),
            "reduced_chi2": float(np.mean((difference / error[first]) ** 2)),
        }

    @cached_property
    def estimate(self) -> tuple[np.ndarray, np.ndarray]:
        """Fraction and standard error in every cell, each of the settings' `shape`."""
        levels = [(self.stars, self.with_rv)]
        for _ in range(self.settings.healpix_level):
            stars, with_rv = levels[-1]
            shape = (len(stars) // 4, 4, *stars.shape[1:])
            levels.append((stars.reshape(shape).sum(1), with_rv.reshape(shape).sum(1)))
        # From the coarsest down: all the sky and all colours, all the sky by colour, sky cells by colour.
        sky = tuple(array.sum(0, keepdims=True) for array in levels[-1])
        stars, with_rv = (array.sum(2, keepdims=True) for array in sky)
        # Jeffreys' prior where there is nothing coarser.
        level = _Level(stars, with_rv, np.full(stars.shape, 0.5), np.full(stars.shape, 0.125), np.ones(1))
        for stars, with_rv in (sky, *reversed(levels)):
            level = level.children(stars, with_rv)
        value, variance = _posterior(level.stars, level.with_rv, level.base, level.base_variance, level.prior)
        return value, np.sqrt(variance)


@dataclass(frozen=True)
class _Level:
    """Counts of one level's cells, with the estimate from around them, its variance, and its weight."""

    stars: np.ndarray
    with_rv: np.ndarray
    base: np.ndarray
    base_variance: np.ndarray
    prior: np.ndarray

    def children(self, stars: np.ndarray, with_rv: np.ndarray) -> _Level:
        """The next finer level.

        A cell's base is its parent's estimate without the cell's own stars, which would count twice.
        """
        repeat = len(stars) // len(self.stars)

        def handed_down(array: np.ndarray) -> np.ndarray:
            whole = np.broadcast_to(array, self.stars.shape)
            return np.broadcast_to(np.repeat(whole, repeat, 0), stars.shape)

        total, total_with = handed_down(self.stars), handed_down(self.with_rv)
        base, base_variance = _posterior(
            total - stars,
            total_with - with_rv,
            handed_down(self.base),
            handed_down(self.base_variance),
            handed_down(self.prior),
        )
        # How far apart a parent's children are: the squared residuals beyond the binomial ones.
        mean = total_with / np.maximum(total, 1)
        bernoulli = mean * (1 - mean) * total / np.maximum(total - 1, 1) * (1 - stars / np.maximum(total, 1))
        excess = (with_rv - stars * mean) ** 2 - stars * bernoulli
        weight = np.maximum(stars - 1, 0) * stars * bernoulli
        # By magnitude: near the survey's limit the sky is patchy, among bright stars not. Where few pairs of
        # stars say it, all magnitudes do; where these are few, a tenth of a binomial's spread is assumed.
        pooled = (excess.sum() + 20 * 0.01) / (weight.sum() + 20)
        own = excess.sum((0, 2), keepdims=True) + 20 * pooled
        rho = np.clip(own / (weight.sum((0, 2), keepdims=True) + 20), 1e-4, 0.5)
        return _Level(stars, with_rv, base, base_variance, 1 / rho - 1)


def _posterior(
    stars: np.ndarray, with_rv: np.ndarray, base: np.ndarray, base_variance: np.ndarray, prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the beta-binomial estimate round a base that is itself uncertain."""
    value = (with_rv + prior * base) / (stars + prior)
    variance = value * (1 - value) / (stars + prior + 1) + (prior / (stars + prior)) ** 2 * base_variance
    return value, variance
