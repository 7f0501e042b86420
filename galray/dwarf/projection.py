"""Integrals over a logarithmic radial grid as matrices: enclosed sums, outward sums, the sky projection."""

from __future__ import annotations

import numpy as np

__all__ = ["cumulative_matrix", "cylinder_weights", "interpolation_matrix", "log_grid", "projection_matrices"]


def log_grid(scale: float, low: float = 1e-3, high: float = 3e2, per_decade: int = 28) -> np.ndarray:
    """Radii in kpc, equidistant in ln r, from low·scale to high·scale."""
    count = int(np.ceil(per_decade * np.log10(high / low))) + 1
    return scale * np.geomspace(low, high, count)


def interpolation_matrix(grid: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Cubic Lagrange interpolation in ln r from an equidistant grid: f(points) = A f(grid).

    Arguments:
        grid: Radii, equidistant in ln r, shape (k,).
        points: Radii, shape (*,); beyond the grid the end polynomials go on.

    Returns:
        Shape (*, k).
    """
    index, weights = _lagrange(grid, points)
    matrix = np.zeros((*np.shape(points), len(grid)))
    np.put_along_axis(matrix, index, weights, -1)
    return matrix


def _lagrange(grid: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights, shape (*, 4), of the four grid points about each point."""
    u = np.log(grid)
    t = (np.log(points) - u[0]) / (u[1] - u[0])
    first = np.clip(np.floor(t).astype(np.int64) - 1, 0, len(grid) - 4)
    s = t - first  # position among the nodes 0, 1, 2, 3
    weights = np.stack(
        [
            -(s - 1) * (s - 2) * (s - 3) / 6,
            s * (s - 2) * (s - 3) / 2,
            -s * (s - 1) * (s - 3) / 2,
            s * (s - 1) * (s - 2) / 6,
        ],
        -1,
    )
    return first[..., None] + np.arange(4), weights


def cumulative_matrix(grid: np.ndarray) -> np.ndarray:
    """C with (C f)_i = ∫_{ln r_0}^{ln r_i} f dln r, f a local cubic; shape (k, k), its first row zero."""
    k, h = len(grid), np.log(grid[1] / grid[0])
    panels = np.zeros((k, k))
    middle = h / 24 * np.array([-1.0, 13.0, 13.0, -1.0])
    edge = h / 24 * np.array([9.0, 19.0, -5.0, 1.0])
    panels[1, :4] = edge
    for i in range(2, k - 1):
        panels[i, i - 2 : i + 2] = middle
    panels[k - 1, -4:] = edge[::-1]
    return np.cumsum(panels, 0)


def projection_matrices(grid: np.ndarray, radii: np.ndarray, powers: int = 3, nodes: int = 32) -> np.ndarray:
    """Line-of-sight integrals P_p with (P_p f)_j = 2 ∫_{R_j}^∞ (R_j/r)^{2p} f(r) r dr / √(r² − R_j²).

    With r = R cosh t the integrand is smooth; composite Gauss-Legendre panels in t that are no wider than
    the grid's step, and f interpolated by local cubics of f r³ in ln r, which carries steep densities.

    Arguments:
        grid: Radii of f in kpc, equidistant in ln r, shape (k,).
        radii: Projected radii R_j in kpc, within the grid, shape (j,).
        powers: How many p, from 0.
        nodes: Gauss-Legendre nodes per panel of four.

    Returns:
        Shape (powers, j, k), kpc.
    """
    result = np.zeros((powers, len(radii), len(grid)))
    x, w = np.polynomial.legendre.leggauss(nodes)
    step = np.log(grid[1] / grid[0])
    for j, radius in enumerate(radii):
        last = np.arccosh(grid[-1] / radius)
        # small t matters most where r ≈ R: panels grow from half a grid step
        count = max(int(np.ceil(last / (8 * step))), 4)
        edges = last * np.linspace(0, 1, count + 1) ** 1.5
        half = 0.5 * np.diff(edges)
        t = (0.5 * (edges[1:] + edges[:-1])[:, None] + half[:, None] * x).ravel()
        weight = (half[:, None] * w).ravel()
        r = radius * np.cosh(t)
        index, lagrange = _lagrange(grid, r)
        values = lagrange * (grid[index] / r[:, None]) ** 3 * (2 * weight * r)[:, None]
        for p in range(powers):
            np.add.at(result[p, j], index, values * ((radius / r) ** (2 * p))[:, None])
    return result


def cylinder_weights(grid: np.ndarray, radius: float) -> np.ndarray:
    """Weights c with c·f = ∫_{R < radius} 2πR Σ dR, Σ the projection of f; shape (k,), kpc³.

    Equal to ∫ 4πr² f [1 − √(1 − radius²/r²)_{r > radius}] dr, whose kink is integrated by its own panels.
    """
    x, w = np.polynomial.legendre.leggauss(24)
    result = np.zeros(len(grid))
    low, edge, high = np.log(grid[0]), np.log(radius), np.log(grid[-1])
    # u = edge + s² beyond the kink takes the square root out of the integrand
    inner = np.linspace(low, edge, 25)
    outer = np.sqrt(high - edge) * np.linspace(0, 1, 25)
    for edges, beyond in ((inner, False), (outer, True)):
        half = 0.5 * np.diff(edges)
        s = (0.5 * (edges[1:] + edges[:-1])[:, None] + half[:, None] * x).ravel()
        weight = (half[:, None] * w).ravel()
        if beyond:
            weight = weight * 2 * s
            r = radius * np.exp(s**2)
            fraction = radius**2 / r**2 / (1 + np.sqrt(1 - radius**2 / r**2))
        else:
            r, fraction = np.exp(s), np.ones_like(s)
        index, lagrange = _lagrange(grid, r)
        np.add.at(
            result,
            index,
            lagrange * (grid[index] / r[:, None]) ** 3 * (4 * np.pi * r**3 * fraction * weight)[:, None],
        )
    return result
