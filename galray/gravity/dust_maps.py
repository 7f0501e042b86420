"""Maps of the selection: ε in cells finer than any fit of it, from counts of stars.

Kinematics tell log ε at the resolution of its splines; the stars that are seen tell the rest. If the density
n before the dust is axially symmetric, the counts' departure from their mean m over rings about the Galactic
axis, q = n_obs/m, is all of ε's own asymmetry: stars weighed with 1/q have the density m(R, z), what is left
of the selection is a function e^S = m/n of R and z alone, for which the moments solve, and in every cell
ε = q e^S. Without that symmetry S is a fit of log ε in space, and n is the counts over e^S, both smoothed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from galray.errors import GalrayError
from galray.gravity.region import Region, as_positions, as_region
from galray.gravity.splines import Array, to_numpy

__all__ = [
    "EfficiencyMap",
    "StarCounts",
    "counts_over_density",
    "efficiency_map",
    "log_corrected",
    "sky_map",
]

_SUBCELLS = 4  # along each side, for the part of a cell that lies in the ball
_MAG = 2.5 / np.log(10)
_WIDTHS = (
    0.0,
    0.6,
    1.2,
    2.4,
    4.8,
)  # of the Gaussians that smooth counts, in cells: the first that has enough
_ENOUGH = 30.0  # stars under it
_LARGEST_WEIGHT = 30.0


@dataclass(frozen=True)
class StarCounts:
    """Stars in cubic cells over a ball; counts of parts of the stars add with ``+``.

    Attributes:
        region: The ball.
        cell: Side of the cells, kpc.
        counts: Stars, shape (n, n, n).
    """

    region: Region
    cell: float
    counts: Array

    @classmethod
    def of(cls, w: Any, ball: Any, cell: float = 0.25) -> StarCounts:
        """Count stars.

        Arguments:
            w: States or positions, (n, ≥3).
            ball: Their ball.
            cell: Side of the cells, kpc.
        """
        region = as_region(ball)
        half = int(np.ceil(region.radius / cell))
        empty = cls(region, cell, np.zeros((2 * half,) * 3))
        stars = to_numpy(w)[:, :3]
        inside = np.linalg.norm(stars - np.array(region.center), axis=1) < region.radius
        counts, _ = np.histogramdd(stars[inside], bins=empty.edges)
        return replace(empty, counts=counts)

    def __add__(self, other: StarCounts) -> StarCounts:
        return replace(self, counts=self.counts + other.counts)

    @property
    def edges(self) -> tuple[Array, Array, Array]:
        """Of the cells along x, y, z, kpc."""
        half = len(self.counts) // 2
        steps = self.cell * np.arange(-half, half + 1.0)
        x, y, z = self.region.center
        return np.asarray(x + steps), np.asarray(y + steps), np.asarray(z + steps)

    @property
    def centres(self) -> Array:
        """Middles of the cells, (n, n, n, 3)."""
        middle = [0.5 * (e[1:] + e[:-1]) for e in self.edges]
        return np.stack(np.meshgrid(*middle, indexing="ij"), -1)

    def volume(self) -> Array:
        """The part of each cell inside the ball, kpc³."""
        offset = self.centres - np.array(self.region.center)
        sub = self.cell * ((np.arange(_SUBCELLS) + 0.5) / _SUBCELLS - 0.5)
        inside = np.zeros(self.counts.shape)
        for step in np.stack(np.meshgrid(sub, sub, sub), -1).reshape(-1, 3):
            inside += ((offset + step) ** 2).sum(-1) < self.region.radius**2
        return inside * (self.cell / _SUBCELLS) ** 3

    def ring_mean(self, volume: Array) -> Array:
        """Density m of the stars seen, averaged over rings about the Galactic axis: kpc⁻³, at every cell."""
        place = self.centres
        radius = np.hypot(place[..., 0], place[..., 1]) / self.cell
        size = int(radius.max()) + 3
        layer = np.arange(self.counts.shape[2])
        lower = np.floor(radius - 0.5).astype(np.intp) + 1  # rings overlap: each cell belongs to two
        share = radius + 0.5 - lower
        numbers = [(lower + i) * len(layer) + layer for i in range(2)]
        total = np.zeros((2, size * len(layer)))
        for number, part in zip(numbers, (1 - share, share), strict=True):
            for row, values in zip(total, (self.counts, volume), strict=True):
                row += np.bincount(number.ravel(), (part * values).ravel(), size * len(layer))
        mean = total[0] / np.maximum(total[1], 1e-12)
        return (1 - share) * mean[numbers[0]] + share * mean[numbers[1]]

    def departure(self) -> Array:
        """The ratio q = n_obs/m in every cell, smoothed as far as stars are few; 1 where there are none."""
        volume = self.volume()
        expected = self.ring_mean(volume) * volume
        out = np.ones(self.counts.shape)
        left = volume > 0
        for width in _WIDTHS:
            smooth = [ndimage.gaussian_filter(a, width) if width else a for a in (self.counts, expected)]
            # a Gaussian of that width holds the stars of (2 √π width)³ cells
            held = smooth[0] * max(1.0, (2 * np.sqrt(np.pi) * width) ** 3)
            good = left & (smooth[1] > 0) & ((held >= _ENOUGH) | (width == _WIDTHS[-1]))
            out[good] = smooth[0][good] / smooth[1][good]
            left &= ~good
        return np.maximum(out, 1 / _LARGEST_WEIGHT)

    def weights(self, w: Any, departure: Array | None = None) -> Array:
        """1/q at stars (n, ≥3): weighed so, they have the axially symmetric density m. Shape (n,).

        Arguments:
            w: States or positions.
            departure: Of all stars, where these counts are not theirs alone.
        """
        q = self.departure() if departure is None else departure
        offset = to_numpy(w)[:, :3] - np.array([e[0] for e in self.edges])
        index = np.clip((offset / self.cell).astype(np.intp), 0, len(q) - 1)
        return 1 / q[index[:, 0], index[:, 1], index[:, 2]]


@dataclass(frozen=True)
class EfficiencyMap:
    """ε in cubic cells over a ball.

    Attributes:
        stars: The counts.
        volume: Volume of each cell inside the ball, kpc³.
        density: n of the stars before the dust, kpc⁻³; NaN outside the ball.
        efficiency: ε; NaN outside the ball.
    """

    stars: StarCounts
    volume: Array
    density: Array
    efficiency: Array

    @property
    def relative_error(self) -> Array:
        """Counting error of ε: 1/√N, infinite in empty cells."""
        with np.errstate(divide="ignore"):
            return 1 / np.sqrt(self.stars.counts)

    def log_efficiency(self, x: Any) -> Tensor:
        """Log ε of the cells in which positions (*, 3) lie: shape (*), NaN where it is not known."""
        x = as_positions(x)
        with np.errstate(divide="ignore"):
            found = torch.from_numpy(-np.log(self.stars.weights(x.reshape(-1, 3), self.efficiency)))
        region = self.stars.region
        beyond = (x - x.new_tensor(region.center)).norm(dim=-1) > region.radius
        return found.reshape(x.shape[:-1]).masked_fill(beyond, torch.nan)

    def corrected_counts(self) -> Array:
        """Stars before the dust, f_obs/ε summed over each cell."""
        return self.density * self.volume

    def loss_per_kpc(self, smoothing: float = 1.0) -> Array:
        """What a kpc along the line of sight from the Sun takes away, −2.5 ∂ log₁₀ ε/∂s in mag/kpc.

        It is the extinction per kpc where stars are lost in proportion to their light; behind a magnitude
        limit it is the extinction times the slope of the counts.

        Arguments:
            smoothing: Width, in cells, of the Gaussian by which counts are smoothed first.
        """
        good = np.isfinite(self.efficiency)
        smooth = [
            ndimage.gaussian_filter(np.where(good, part, 0.0), smoothing)
            for part in (self.stars.counts, self.corrected_counts())
        ]
        with np.errstate(divide="ignore", invalid="ignore"):
            log = np.log(smooth[0] / smooth[1])
        log[~np.isfinite(log)] = np.nan
        slopes = np.stack([np.gradient(log, self.stars.cell, axis=i) for i in range(3)], -1)
        away = self.stars.centres - np.array(self.stars.region.center)
        away /= np.maximum(np.linalg.norm(away, axis=-1, keepdims=True), 1e-9)
        return np.where(good, -_MAG * (slopes * away).sum(-1), np.nan)


def efficiency_map(
    stars: StarCounts,
    log_efficiency: Callable[[Array], Any],
    *,
    symmetric: bool = True,
    width: float = 0.5,
    within: float = 0.95,
) -> EfficiencyMap:
    """ε in cells from the counts of stars and the fitted S; its largest value, over smoothed cells, is 1.

    Arguments:
        stars: The counts of the stars that are seen.
        log_efficiency: S + const of positions (n, 3): of stars with `StarCounts.weights` (symmetric), or
            log ε itself.
        symmetric: Whether n is axially symmetric.
        width: Standard deviation, kpc, of the Gaussian over which n is smoothed where it is not.
        within: Cells beyond this fraction of the radius are left out.

    Raises:
        GalrayError: Fewer than one star per hundred cells.
    """
    if stars.counts.sum() < 0.01 * stars.counts.size:
        raise GalrayError(
            f"{int(stars.counts.sum())} stars for {stars.counts.size} cells of {stars.cell:g} kpc",
            "take larger cells",
        )
    volume, places, seen = _deep(stars, within)
    share = np.zeros(stars.counts.shape)
    share[seen] = np.exp(to_numpy(log_efficiency(places[seen])))
    density = np.full(stars.counts.shape, np.nan)
    if symmetric:
        density[seen] = stars.ring_mean(volume)[seen] / share[seen]
    else:
        inside = np.where(seen, stars.counts, 0.0)
        top, bottom = (ndimage.gaussian_filter(a, width / stars.cell) for a in (inside, share * volume))
        density[seen] = top[seen] / bottom[seen]
    return _normalised(stars, volume, density)


def counts_over_density(
    stars: StarCounts, log_density: Callable[[Array], Any], *, within: float = 0.95
) -> EfficiencyMap:
    """ε in cells from the counts of stars and a fitted log n + const of positions (n, 3)."""
    volume, places, seen = _deep(stars, within)
    density = np.full(stars.counts.shape, np.nan)
    density[seen] = np.exp(to_numpy(log_density(places[seen])))
    return _normalised(stars, volume, density)


def _deep(stars: StarCounts, within: float) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Volumes and middles of the cells, and which lie in the ball up to a fraction of its radius."""
    volume, places = stars.volume(), stars.centres
    distance = np.linalg.norm(places - np.array(stars.region.center), axis=-1)
    return volume, places, (volume > 0) & (distance < within * stars.region.radius)


def _normalised(stars: StarCounts, volume: Array, density: Array) -> EfficiencyMap:
    """ε = counts / (density · volume), the density scaled so that ε is 1 at its largest."""
    density = np.where(density > 0, density, np.nan)
    efficiency = stars.counts / np.where(volume > 0, density * volume, np.nan)
    known = np.isfinite(efficiency)
    counted, expected = (
        ndimage.gaussian_filter(np.where(known, part, 0.0), 1.0) for part in (stars.counts, density * volume)
    )
    full = known & (counted > _ENOUGH)
    top = np.percentile(counted[full] / expected[full], 99) if full.any() else np.nanmax(efficiency)
    return EfficiencyMap(stars, volume, density * top, efficiency / top)


def log_corrected(
    log_density: Callable[[Any], Any], efficiency: Any, w: Any, *, least: float = 0.02
) -> Tensor:
    """Log f_corr = log f_obs − log ε: the stars before the dust, star by star or anywhere.

    Arguments:
        log_density: Log f_obs of states (*, 6), a flow's ``log_prob``; or log n_obs of positions.
        efficiency: A `DustField`, an `EfficiencyMap`, or anything else with ``log_efficiency(x)``.
        w: States (*, 6), or positions (*, 3).
        least: A smaller ε counts as this: 1/ε would be noise.

    Returns:
        Shape (*); NaN where ε is not known.
    """
    w = torch.as_tensor(w).to(torch.float64)
    with torch.no_grad():
        seen = torch.as_tensor(log_density(w)).to(torch.float64)
    return seen - torch.as_tensor(efficiency.log_efficiency(w[..., :3])).clamp_min(float(np.log(least)))


def sky_map(
    w: Any,
    weights: Any,
    center: tuple[float, float, float],
    distance: float,
    *,
    depth: float = 0.25,
    max_latitude: float = 30.0,
    step: float = 5.0,
) -> tuple[Array, Array, Array]:
    """Stars per square degree in a shell about the Sun, weighed.

    Arguments:
        w: States or positions, (n, ≥3), in the Galactocentric frame.
        weights: One per star: 1 for the stars as seen, 1/ε for those before the dust.
        center: The Sun, kpc.
        distance: Middle of the shell, kpc.
        depth: Its half thickness, kpc.
        max_latitude: |b| up to which the map goes, deg.
        step: Side of a pixel, deg.

    Returns:
        Edges of l and of b in deg, and the map (l, b).
    """
    offset = to_numpy(w)[:, :3] - np.array(center)
    length = np.linalg.norm(offset, axis=1)
    shell = np.abs(length - distance) < depth
    offset, length = offset[shell], length[shell]
    longitude = (np.degrees(np.arctan2(offset[:, 1], offset[:, 0])) + 180.0) % 360.0 - 180.0
    latitude = np.degrees(np.arcsin(np.clip(offset[:, 2] / length, -1, 1)))
    l_edges, b_edges = (
        np.arange(-180, 180 + step / 2, step),
        np.arange(-max_latitude, max_latitude + step / 2, step),
    )
    found, _, _ = np.histogram2d(
        longitude, latitude, bins=(l_edges, b_edges), weights=to_numpy(weights)[shell]
    )
    area = np.outer(np.diff(l_edges), np.degrees(np.diff(np.sin(np.radians(b_edges)))))
    return l_edges, b_edges, found / area
