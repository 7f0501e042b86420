"""Tensor-product cubic B-splines of position: local evaluation, gradients and Laplacians."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.interpolate import BSpline

__all__ = ["Array", "SplineAxis", "SumBasis", "TensorBasis", "ball_axes", "cell_groups", "to_numpy"]

Array = NDArray[np.float64]
_DEGREE = 3
_AXIS_KPC = 1e-5  # radius below which 1/R is held constant: the splines are even in R there


def to_numpy(x: Any) -> Array:
    """A tensor, array or nested list as a float64 numpy array (no copy where possible)."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    return np.asarray(x, dtype=np.float64)


class SplineAxis:
    """Cubic B-splines along one coordinate, with clamped ends.

    Arguments:
        breaks: Ascending break points, shape (c + 1,); there are c cells and c + 3 splines.
    """

    def __init__(self, breaks: Any) -> None:
        self.breaks: Array = to_numpy(breaks)
        self.cells = len(self.breaks) - 1
        self.size = self.cells + _DEGREE
        knots = np.concatenate(
            [np.full(_DEGREE, self.breaks[0]), self.breaks, np.full(_DEGREE, self.breaks[-1])]
        )
        splines = BSpline(knots, np.eye(self.size), _DEGREE)
        local = np.arange(self.cells)[:, None] + np.arange(_DEGREE + 1)
        taylor = [
            splines(self.breaks[:-1], nu=power)[np.arange(self.cells)[:, None], local] / math.factorial(power)
            for power in range(_DEGREE, -1, -1)
        ]
        self._tables = [np.stack(taylor, 1)]  # (cell, power, 4), highest power first
        for order in range(1, _DEGREE + 1):
            powers = np.arange(_DEGREE - order + 1, 0, -1.0)
            self._tables.append(self._tables[-1][:, :-1] * powers[None, :, None])

    def locate(self, t: Array) -> NDArray[np.intp]:
        """The cell of each coordinate, shape (n,); coordinates beyond the ends go to the end cells."""
        return np.clip(np.searchsorted(self.breaks, t, side="right") - 1, 0, self.cells - 1)

    def local(self, t: Array, cell: Any, order: int = 0) -> Array:
        """The four splines that live on a cell, or their derivative.

        Arguments:
            t: Coordinates, shape (n,).
            cell: Their cells, shape (n,), or one integer for all.
            order: Order of the derivative, 0 to 3.

        Returns:
            Shape (n, 4): splines ``cell`` … ``cell + 3``.
        """
        table = self._tables[order][cell]  # (power, 4) or (n, power, 4)
        u = (t - self.breaks[cell])[:, None]
        if np.ndim(cell):
            table = table.transpose(1, 0, 2)
        out = np.broadcast_to(table[0], (len(t), _DEGREE + 1))
        for row in table[1:]:
            out = out * u + row
        return np.array(out)

    @cached_property
    def gram(self) -> Array:
        """∫ B_i B_j dt, shape (size, size), in units of the mean cell."""
        nodes, weights = np.polynomial.legendre.leggauss(4)
        out = np.zeros((self.size, self.size))
        for c in range(self.cells):
            width = self.breaks[c + 1] - self.breaks[c]
            values = self.local(self.breaks[c] + (nodes + 1) / 2 * width, c)
            out[c : c + 4, c : c + 4] += (values * weights[:, None]).T @ values * width / 2
        return out / np.mean(np.diff(self.breaks))

    @cached_property
    def roughness(self) -> Array:
        """Σ_cells (h³ B_i''')(h³ B_j'''), shape (size, size): third differences on uneven cells.

        The third derivative of a cubic spline is constant on a cell; h is the cell's width, so that
        detail is penalised relative to the resolution offered there. Its null space is the quadratics,
        that is, potentials of constant density.
        """
        out = np.zeros((self.size, self.size))
        for c in range(self.cells):
            width = self.breaks[c + 1] - self.breaks[c]
            row = self._tables[3][c][0] * width**3
            out[c : c + 4, c : c + 4] += np.outer(row, row)
        return out


class TensorBasis:
    """Products of B-splines in (R, z) or in (x, y, z).

    Arguments:
        kind: ``Rz`` (axially symmetric functions) or ``xyz``.
        axes: One `SplineAxis` per coordinate.
    """

    def __init__(self, kind: Literal["Rz", "xyz"], axes: tuple[SplineAxis, ...]) -> None:
        assert len(axes) == (2 if kind == "Rz" else 3)
        self.kind = kind
        self.axes = axes
        self.shape = tuple(axis.size for axis in axes)
        self.size = math.prod(self.shape)
        self.cell_shape = tuple(axis.cells for axis in axes)

    @property
    def parts(self) -> tuple[TensorBasis, ...]:
        """Itself, as a sum of one."""
        return (self,)

    def to_dict(self) -> dict[str, Any]:
        """Kind and break points as plain values."""
        return {"kind": self.kind, "breaks": [axis.breaks.tolist() for axis in self.axes]}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TensorBasis | SumBasis:
        """The basis that ``to_dict`` described."""
        if "parts" in values:
            return SumBasis(tuple(TensorBasis(p["kind"], _axes(p["breaks"])) for p in values["parts"]))
        return TensorBasis(values["kind"], _axes(values["breaks"]))

    def coordinates(self, x: Array) -> Array:
        """Positions (n, 3) to the basis's own coordinates (n, 2) or (n, 3), in kpc."""
        return np.stack([np.hypot(x[:, 0], x[:, 1]), x[:, 2]], 1) if self.kind == "Rz" else x

    def locate(self, t: Array) -> NDArray[np.intp]:
        """The flat cell number of coordinates (n, d), shape (n,)."""
        cells = [axis.locate(t[:, i]) for i, axis in enumerate(self.axes)]
        return np.ravel_multi_index(tuple(cells), self.cell_shape)

    def indices(self, cell: Any) -> NDArray[np.intp]:
        """The flat spline numbers that live on a cell, shape (*cell, 4^d)."""
        corner = np.unravel_index(cell, self.cell_shape)
        step = np.arange(_DEGREE + 1)
        out = np.asarray(corner[0])[..., None] + step
        for i in range(1, len(self.axes)):
            nxt = np.asarray(corner[i])[..., None] + step
            out = (out[..., :, None] * self.shape[i] + nxt[..., None, :]).reshape(*out.shape[:-1], -1)
        return out

    def local(self, t: Array, cell: Any, orders: tuple[int, ...]) -> Array:
        """Mixed derivative of the local splines with respect to the basis's own coordinates.

        Arguments:
            t: Coordinates, shape (n, d).
            cell: Flat cell numbers, shape (n,), or one integer for all.
            orders: Order of the derivative along each coordinate.

        Returns:
            Shape (n, 4^d), in the order of `indices`.
        """
        corner = np.unravel_index(cell, self.cell_shape)
        return _product([axis.local(t[:, i], corner[i], orders[i]) for i, axis in enumerate(self.axes)])

    def local_and_slopes(self, t: Array, cell: Any) -> tuple[Array, list[Array]]:
        """The local splines (n, 4^d) and their first derivatives along each own coordinate."""
        corner = np.unravel_index(cell, self.cell_shape)
        values = [axis.local(t[:, i], corner[i]) for i, axis in enumerate(self.axes)]
        slopes = []
        for i, axis in enumerate(self.axes):
            parts = list(values)
            parts[i] = axis.local(t[:, i], corner[i], 1)
            slopes.append(_product(parts))
        return _product(values), slopes

    def gradient(self, x: Array) -> tuple[NDArray[np.intp], Array]:
        """Cartesian gradients of the local splines at positions x (n, 3).

        Returns:
            Spline numbers (n, 4^d), and ∇B of shape (n, 3, 4^d) in 1/kpc.
        """
        t = self.coordinates(x)
        cell = self.locate(t)
        _, slopes = self.local_and_slopes(t, cell)
        if self.kind == "xyz":
            return self.indices(cell), np.stack(slopes, 1)
        unit = x[:, :2] / np.maximum(t[:, :1], _AXIS_KPC)
        return self.indices(cell), np.stack([slopes[0] * unit[:, :1], slopes[0] * unit[:, 1:], slopes[1]], 1)

    def laplacian(self, x: Array) -> tuple[NDArray[np.intp], Array]:
        """Spline numbers (n, 4^d) and ∇²B (n, 4^d) in 1/kpc² at positions x (n, 3)."""
        t = self.coordinates(x)
        cell = self.locate(t)
        d = len(self.axes)
        out = sum(self.local(t, cell, tuple(2 * (i == j) for j in range(d))) for i in range(d))
        if self.kind == "Rz":
            near = t[:, 0] < _AXIS_KPC
            t = np.stack([np.maximum(t[:, 0], _AXIS_KPC), t[:, 1]], 1)
            slope = self.local(t, cell, (1, 0)) / t[:, :1]
            slope[near] = self.local(t[near], cell[near], (2, 0))
            out = out + slope
        return self.indices(cell), np.asarray(out)

    def values(self, x: Array) -> tuple[NDArray[np.intp], Array]:
        """Spline numbers (n, 4^d) and B (n, 4^d) at positions x (n, 3)."""
        t = self.coordinates(x)
        cell = self.locate(t)
        return self.indices(cell), self.local(t, cell, (0,) * len(self.axes))

    def roughness(self) -> list[Array]:
        """One roughness matrix (size, size) per coordinate: third differences along it."""
        out = []
        for i in range(len(self.axes)):
            matrix: Any = np.ones((1, 1))
            for j, axis in enumerate(self.axes):
                matrix = np.kron(matrix, axis.roughness if i == j else axis.gram)
            out.append(matrix)
        return out

    def reduction(self, *, north_south: bool) -> Array:
        """Map from free parameters to spline coefficients, shape (size, free).

        It makes the function smooth on the axis R = 0 where the basis reaches it (∂Φ/∂R = 0 there), and
        even in z when ``north_south`` is set (the z breaks must then be symmetric).
        """
        maps = []
        for i, axis in enumerate(self.axes):
            m = np.eye(axis.size)
            if self.kind == "Rz" and i == 0 and axis.breaks[0] == 0.0:
                m = m[:, 1:].copy()
                m[0, 0] = 1.0  # the first two coefficients are one
            if i == len(self.axes) - 1 and north_south:
                half = (axis.size + 1) // 2
                m = np.zeros((axis.size, half))
                for k in range(axis.size):
                    m[k, min(k, axis.size - 1 - k)] = 1.0
            maps.append(m)
        out: Any = np.ones((1, 1))
        for m in maps:
            out = np.kron(out, m)
        return out


class SumBasis:
    """Several tensor bases side by side: Φ is the sum of one function of each.

    Arguments:
        parts: The bases; coefficients stand in their order.
    """

    kind = "sum"

    def __init__(self, parts: tuple[TensorBasis, ...]) -> None:
        self.parts = parts
        self.size = sum(part.size for part in parts)
        self.offsets = tuple(itertools.accumulate([0, *(part.size for part in parts[:-1])]))

    def to_dict(self) -> dict[str, Any]:
        """The parts as plain values."""
        return {"parts": [part.to_dict() for part in self.parts]}

    def _side_by_side(self, name: str, x: Array) -> tuple[NDArray[np.intp], Array]:
        found = [getattr(part, name)(x) for part in self.parts]
        index = [i + offset for (i, _), offset in zip(found, self.offsets, strict=True)]
        return np.concatenate(index, -1), np.concatenate([values for _, values in found], -1)

    def values(self, x: Array) -> tuple[NDArray[np.intp], Array]:
        """As `TensorBasis.values`, the parts' splines one after the other."""
        return self._side_by_side("values", x)

    def gradient(self, x: Array) -> tuple[NDArray[np.intp], Array]:
        """As `TensorBasis.gradient`, the parts' splines one after the other."""
        return self._side_by_side("gradient", x)

    def laplacian(self, x: Array) -> tuple[NDArray[np.intp], Array]:
        """As `TensorBasis.laplacian`, the parts' splines one after the other."""
        return self._side_by_side("laplacian", x)

    def reduction(self, *, north_south: bool) -> Array:
        """As `TensorBasis.reduction`, part by part."""
        maps = [part.reduction(north_south=north_south) for part in self.parts]
        return np.asarray(linalg.block_diag(*maps), dtype=np.float64)


def _axes(breaks: list[list[float]]) -> tuple[SplineAxis, ...]:
    return tuple(SplineAxis(b) for b in breaks)


def _product(parts: list[Array]) -> Array:
    out = parts[0]
    for part in parts[1:]:
        out = (out[:, :, None] * part[:, None, :]).reshape(len(out), out.shape[1] * part.shape[1])
    return out


def ball_axes(
    kind: Literal["Rz", "xyz"],
    center: tuple[float, float, float],
    radius: float,
    sizes: tuple[int, ...],
    concentration: tuple[float, ...],
) -> tuple[SplineAxis, ...]:
    """Axes that cover a ball.

    Arguments:
        kind: ``Rz`` or ``xyz``.
        center: Centre of the ball, kpc.
        radius: Its radius, kpc.
        sizes: Number of splines along each coordinate (at least 4).
        concentration: β along each coordinate of the break points ∝ sinh(βt)/sinh β, t uniform in [−1, 1]:
            the middle cells are β/sinh β times the mean width; 0 gives equal cells. The middle is the
            ball's centre, for z the plane z = 0, and for R the axis where the ball reaches it.
    """
    distance = math.hypot(center[0], center[1])
    spans = [(distance - radius, distance + radius)] if kind == "Rz" else []
    spans = spans or [(center[i] - radius, center[i] + radius) for i in range(2)]
    reach = radius + abs(center[2])
    axes: list[SplineAxis] = []
    for (lo, hi), size, beta in zip([*spans, (-reach, reach)], sizes, concentration, strict=True):
        cells = size - _DEGREE
        if kind == "Rz" and not axes and lo < 0:
            breaks = hi * _stretch(np.linspace(0.0, 1.0, cells + 1), beta)
        else:
            breaks = (lo + hi) / 2 + (hi - lo) / 2 * _stretch(np.linspace(-1.0, 1.0, cells + 1), beta)
        axes.append(SplineAxis(breaks))
    return tuple(axes)


def _stretch(t: Array, beta: float) -> Array:
    """An odd map of [−1, 1] onto itself."""
    return t if beta == 0 else np.sinh(beta * t) / math.sinh(beta)


def cell_groups(cell: NDArray[np.intp], limit: int = 16384) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Rows grouped by cell: yields (cell, rows), at most `limit` rows at a time.

    Sums over rows of products of local splines then become small dense matrix products.
    """
    order = np.argsort(cell, kind="stable")
    sorted_cells = cell[order]
    edges = np.flatnonzero(np.diff(sorted_cells)) + 1
    starts = np.concatenate([[0], edges])
    ends = np.concatenate([edges, [len(cell)]])
    for start, end in zip(starts, ends, strict=True):
        for begin in range(start, end, limit):
            yield int(sorted_cells[start]), order[begin : min(begin + limit, end)]
