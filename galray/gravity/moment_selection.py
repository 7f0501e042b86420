"""A selection efficiency solved for together with the potential, and what of the two cannot be told apart.

For g of first order in v and stars of one velocity dispersion σ, E[v·∂ₓg + a·∂ᵥg + g v·∂ₓlog ε] = 0 is
unchanged by δΦ = σ² δlog ε. Other orders, other dispersions and other populations break that; how far is
read from the posterior of the solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from galray.gravity.penalised import Solution, Unknowns
from galray.gravity.region import Region, as_positions
from galray.gravity.roughness import third_differences
from galray.gravity.splines import Array, SumBasis, TensorBasis, to_numpy

__all__ = ["Degeneracy", "LogSelection", "ball_lattice", "degeneracies", "fit_log"]

_CORRELATED = 0.9
_CHUNK = 8192
_ROUGH = 1e-6  # of the trace of the normal equations: carries a fit on where there are no stars


class LogSelection:
    """Log ε(x) = Σ_q e_q S_q(x), known up to a constant.

    Arguments:
        basis: The splines S_q.
        region: The ball.
        parameters: e, shape (splines,).
        covariance: Its posterior covariance.
    """

    def __init__(self, basis: TensorBasis, region: Region, parameters: Array, covariance: Array) -> None:
        self.basis = basis
        self.region = region
        self.parameters = parameters
        self.covariance = covariance

    def log_efficiency(self, x: Any, reference: Any = None) -> Tensor:
        """Log ε(x) − log ε(reference), shape (*); the reference is the centre of the ball if not given."""
        x = as_positions(x)
        rows = self._rows(x, reference)
        return torch.from_numpy(rows @ self.parameters).reshape(x.shape[:-1])

    def predict(self, x: Any, reference: Any = None) -> tuple[Tensor, Tensor]:
        """Log ε(x) − log ε(reference) at positions (n, 3), and its covariance (n, n)."""
        rows = self._rows(as_positions(x), reference)
        return torch.from_numpy(rows @ self.parameters), torch.from_numpy(rows @ self.covariance @ rows.T)

    def gradient(self, x: Any) -> Array:
        """∇log ε at positions (n, 3), in 1/kpc: what the sums take as a known selection."""
        index, slopes = self.basis.gradient(to_numpy(x).reshape(-1, 3))
        return np.einsum("njp,np->nj", slopes, self.parameters[index])

    def _rows(self, x: Tensor, reference: Any) -> Array:
        at = as_positions(self.region.center if reference is None else reference).reshape(1, 3)
        points = to_numpy(torch.cat([x.reshape(-1, 3).cpu(), at]))
        index, values = self.basis.values(points)
        rows = np.zeros((len(points), self.basis.size))
        np.put_along_axis(rows, index, values, 1)
        return rows[:-1] - rows[-1]


def fit_log(basis: TensorBasis, region: Region, x: Any, values: Array, weights: Array) -> LogSelection:
    """The splines nearest to values (n,) at positions (n, 3), by weighted least squares."""
    index, local = basis.values(to_numpy(x))
    matrix, vector = np.zeros((basis.size, basis.size)), np.zeros(basis.size)
    for begin in range(0, len(values), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        rows = np.zeros((len(values[part]), basis.size))
        np.put_along_axis(rows, index[part], local[part], 1)
        weighted = weights[part, None] * rows
        matrix += weighted.T @ rows
        vector += weighted.T @ values[part]
    rough = sum(third_differences(basis), np.zeros(()))
    matrix += _ROUGH * np.trace(matrix) * (rough / np.trace(rough) + 1e-6 * np.eye(basis.size))
    return LogSelection(basis, region, linalg.solve(matrix, vector, assume_a="pos"), np.zeros_like(matrix))


@dataclass(frozen=True)
class Degeneracy:
    """A direction in which Φ and log ε vary together within their errors.

    Attributes:
        correlation: Of the two, in the posterior; 1 is a full degeneracy.
        acceleration_error: Its share of the error of a, rms over the ball, relative to the rms of a.
        selection_error: Its share of the error of log ε, rms over the ball after removal of the mean.
        dispersion: σ in δΦ = σ² δlog ε that describes the direction best, km/s; NaN where the two go
            against each other.
        potential: δΦ, coefficients at one standard deviation.
        selections: δlog ε, coefficients at one standard deviation, all selections one after the other.
    """

    correlation: float
    acceleration_error: float
    selection_error: float
    dispersion: float
    potential: Array
    selections: Array

    def __str__(self) -> str:
        return (
            f"potential and selection are {100 * self.correlation:.0f} % correlated along a direction that "
            f"moves accelerations by {100 * self.acceleration_error:.1f} % and log efficiencies by "
            f"{self.selection_error:.2g}"
        )


def degeneracies(
    unknowns: Unknowns,
    solution: Solution,
    potential: TensorBasis | SumBasis,
    selection: TensorBasis,
    region: Region,
    *,
    num_points: int = 400,
) -> tuple[Degeneracy, ...]:
    """Canonical correlations above 0.9 of Φ and log ε under the posterior, largest error of a first.

    Arguments:
        unknowns: Φ's free unknowns, then those of log ε.
        solution: Their solution.
        potential: Splines of Φ.
        selection: Splines of log ε.
        region: The ball over which the errors are averaged.
        num_points: Positions of that average.
    """
    split = unknowns.parts[len(potential.parts) - 1].stop
    posterior = linalg.cho_solve(linalg.cho_factor(solution.hessian, lower=True), np.eye(len(solution.free)))
    roots = [_root(posterior[:split, :split]), _root(posterior[split:, split:])]
    cross = linalg.solve_triangular(roots[0], posterior[:split, split:], lower=True)
    cross = linalg.solve_triangular(roots[1], cross.T, lower=True).T
    left, correlation, right = np.linalg.svd(cross, full_matrices=False)
    x = ball_lattice(region, num_points, 0.8)
    index, gradient = potential.gradient(x)
    theta = solution.parameters[: potential.size]
    typical = np.sqrt(np.mean(np.einsum("njp,np->nj", gradient, theta[index]) ** 2))
    found = []
    for i in np.flatnonzero(correlation > _CORRELATED):
        direction = np.concatenate([roots[0] @ left[:, i], roots[1] @ right[i]])
        full = unknowns.reduction @ direction
        phi, selections = full[: potential.size], full[potential.size :]
        change = np.sqrt(np.mean(np.einsum("njp,np->nj", gradient, phi[index]) ** 2))
        delta_phi = _centred(potential, x, phi)
        delta_log = [_centred(selection, x, part) for part in selections.reshape(-1, selection.size)]
        slope = float(np.mean([d @ delta_phi for d in delta_log]) / np.mean([d @ d for d in delta_log]))
        found.append(
            Degeneracy(
                float(min(correlation[i], 1.0)),
                float(change / typical),
                float(np.sqrt(np.mean(np.square(delta_log)))),
                float(np.sqrt(slope)) if slope > 0 else float("nan"),
                phi,
                selections,
            )
        )
    return tuple(sorted(found, key=lambda d: -d.acceleration_error))


def _root(matrix: Array) -> Array:
    jitter = 1e-12 * float(np.trace(matrix)) / len(matrix)
    return np.asarray(np.linalg.cholesky(matrix + jitter * np.eye(len(matrix))))


def ball_lattice(region: Region, number: int, within: float = 1.0) -> Array:
    """Positions (number, 3) spread evenly over the ball up to a fraction of its radius."""
    i = np.arange(number) + 0.5
    return np.array(region.center) + within * region.radius * np.cbrt(i / number)[:, None] * _lattice(number)


def _lattice(number: int) -> Array:
    i = np.arange(number) + 0.5
    z = np.modf(i * (np.sqrt(5) - 1) / 2)[0] * 2 - 1  # neither sorted with radius nor with azimuth
    phi = 2 * np.pi * np.modf(i * np.sqrt(2))[0]
    return np.stack([np.sqrt(1 - z**2) * np.cos(phi), np.sqrt(1 - z**2) * np.sin(phi), z], 1)


def _centred(basis: TensorBasis | SumBasis, x: Array, coefficients: Sequence[float] | Array) -> Array:
    index, values = basis.values(x)
    out = (values * np.asarray(coefficients)[index]).sum(1)
    return np.asarray(out - out.mean())
