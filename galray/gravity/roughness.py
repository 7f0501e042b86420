"""Quadratic penalties on tensor splines: third differences, mixed ones, and departure from axial symmetry."""

from __future__ import annotations

import math

import numpy as np

from galray.gravity.splines import Array, SplineAxis, TensorBasis

__all__ = ["axial_departure", "third_differences"]

_ORDER = 3


def third_differences(basis: TensorBasis) -> list[Array]:
    """Roughness as cells see it: derivatives in units of the cell's width, squared and summed over the cells.

    Detail is so penalised relative to the resolution that is offered there. The null space of the sum is
    the quadratics of the coordinates, that is, potentials of constant density.

    Returns:
        For (R, z): the pure third differences along R and along z. For (x, y, z): two parts of the
        rotationally fair seminorm Σ 3!/(i!j!k!) |∂ₓⁱ∂ᵧʲ∂_zᵏ Φ|², i + j + k = 3: all but the pure z term,
        and the pure z term. Each of shape (size, size).
    """
    if basis.kind == "Rz":
        return basis.roughness()
    tables = [[_cell_gram(axis, order) for order in range(_ORDER + 1)] for axis in basis.axes]
    plane = np.zeros((basis.size, basis.size))
    for i in range(_ORDER + 1):
        for j in range(_ORDER + 1 - i):
            k = _ORDER - i - j
            if k < _ORDER:
                share = math.factorial(_ORDER) / (math.factorial(i) * math.factorial(j) * math.factorial(k))
                plane += share * np.kron(np.kron(tables[0][i], tables[1][j]), tables[2][k])
    return [plane, np.kron(np.kron(tables[0][0], tables[1][0]), tables[2][_ORDER])]


def axial_departure(basis: TensorBasis) -> Array:
    """∫ (∂Φ/∂φ)², ∂/∂φ = x ∂/∂y − y ∂/∂x about the Galactic axis, cells counting alike: (size, size)."""
    assert basis.kind == "xyz"
    x, y, z = basis.axes
    height = _cell_integral(z, 0, 0, 0)
    mixed = np.kron(_cell_integral(x, 0, 1, 1), _cell_integral(y, 1, 0, 1))
    plane = (
        np.kron(_cell_integral(x, 0, 0, 2), _cell_integral(y, 1, 1, 0))
        + np.kron(_cell_integral(x, 1, 1, 0), _cell_integral(y, 0, 0, 2))
        - mixed
        - mixed.T
    )
    return np.kron(plane, height)


def _cell_gram(axis: SplineAxis, order: int) -> Array:
    """Mean over each cell of (hᵒ B_i⁽ᵒ⁾)(hᵒ B_j⁽ᵒ⁾), summed over cells; h is the cell's width."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    out = np.zeros((axis.size, axis.size))
    for c in range(axis.cells):
        width = axis.breaks[c + 1] - axis.breaks[c]
        values = axis.local(axis.breaks[c] + (nodes + 1) / 2 * width, c, order) * width**order
        out[c : c + 4, c : c + 4] += (values * weights[:, None] / 2).T @ values
    return out


def _cell_integral(axis: SplineAxis, left: int, right: int, power: int) -> Array:
    """Mean over each cell of B_i⁽ˡ⁾ tᵖ B_j⁽ʳ⁾, summed over cells."""
    nodes, weights = np.polynomial.legendre.leggauss(5)
    out = np.zeros((axis.size, axis.size))
    for c in range(axis.cells):
        t = axis.breaks[c] + (nodes + 1) / 2 * (axis.breaks[c + 1] - axis.breaks[c])
        first, second = axis.local(t, c, left), axis.local(t, c, right)
        out[c : c + 4, c : c + 4] += (first * (weights * t**power / 2)[:, None]).T @ second
    return out
