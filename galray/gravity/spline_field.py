"""A potential that is a tensor spline, with the errors of everything linear in it."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.gravity.exports import Exportable
from galray.gravity.poisson import Kernel, check_region
from galray.gravity.region import Region, as_positions
from galray.gravity.splines import Array, SumBasis, TensorBasis, to_numpy
from galray.units import G

__all__ = ["Quantity", "SplineField"]

Quantity = Literal["potential", "acceleration", "mass_density", "smoothed_density"]
"""What is linear in the spline coefficients."""


class SplineField(Exportable):
    """Φ(x) = Σ_p θ_p B_p(x) inside a ball.

    Arguments:
        basis: The tensor splines B_p.
        region: The ball inside which the coefficients mean something.
        parameters: θ in (km/s)², shape (splines,).
        covariance: Sampling covariance of θ.
        posterior: Covariance that holds the penalty's squared bias too; None takes `covariance`.
        penalty: The penalty's strengths, for the record and for refits.
        statistics: χ², effective degrees of freedom and so on, for the report.
    """

    def __init__(
        self,
        basis: TensorBasis | SumBasis,
        region: Region,
        parameters: Any,
        *,
        covariance: Any = None,
        posterior: Any = None,
        penalty: tuple[float, ...] = (),
        statistics: dict[str, float] | None = None,
    ) -> None:
        self.basis = basis
        self.region = region
        self.parameters: Array = to_numpy(parameters)
        size = basis.size
        self.covariance: Array = np.zeros((size, size)) if covariance is None else to_numpy(covariance)
        self.posterior: Array = self.covariance if posterior is None else to_numpy(posterior)
        self.penalty = tuple(penalty)
        self.statistics = dict(statistics or {})

    @property
    def effective_dof(self) -> float:
        """Parameters that the data decide; the others are the penalty's."""
        return self.statistics.get("effective_dof", float(self.basis.size))

    def with_covariance(self, covariance: Array) -> SplineField:
        """The same potential with another sampling covariance (a jackknife's)."""
        excess = self.posterior - self.covariance
        return SplineField(
            self.basis,
            self.region,
            self.parameters,
            covariance=covariance,
            posterior=covariance + excess,
            penalty=self.penalty,
            statistics=self.statistics,
        )

    def with_parameters(self, parameters: Array) -> SplineField:
        """The same splines and covariance with other coefficients."""
        return SplineField(
            self.basis,
            self.region,
            parameters,
            covariance=self.covariance,
            posterior=self.posterior,
            penalty=self.penalty,
            statistics=self.statistics,
        )

    def potential(self, x: Any) -> Tensor:
        """Φ(x) in (km/s)², shape (*), up to a constant."""
        x = as_positions(x)
        index, values = self.basis.values(to_numpy(x).reshape(-1, 3))
        return self._shaped((values * self.parameters[index]).sum(1), x, ())

    def acceleration(self, x: Any) -> Tensor:
        """a(x) = −∇Φ in (km/s)²/kpc, shape (*, 3)."""
        x = as_positions(x)
        index, gradient = self.basis.gradient(to_numpy(x).reshape(-1, 3))
        return self._shaped(-np.einsum("njp,np->nj", gradient, self.parameters[index]), x, (3,))

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) = ∇²Φ/4πG in Msun/kpc³, shape (*)."""
        x = as_positions(x)
        index, laplacian = self.basis.laplacian(to_numpy(x).reshape(-1, 3))
        return self._shaped((laplacian * self.parameters[index]).sum(1) / (4 * math.pi * G), x, ())

    def _shaped(self, values: Array, x: Tensor, tail: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).reshape(*x.shape[:-1], *tail).to(x.device)

    def linear_response(
        self, x: Any, quantity: Quantity = "acceleration", kernel: Kernel | None = None
    ) -> Tensor:
        """Rows L with (quantity at x) = L θ, so that its covariance is L C Lᵀ.

        Arguments:
            x: Positions (n, 3) in kpc.
            quantity: ``potential``, ``acceleration``, ``mass_density`` or ``smoothed_density``.
            kernel: The kernel of ``smoothed_density``.

        Returns:
            Shape (n, splines), or (n, 3, splines) for accelerations.

        Raises:
            GalrayError: ``smoothed_density`` without a kernel, or positions outside the region.
        """
        x = as_positions(x)
        points = to_numpy(x).reshape(-1, 3)
        if quantity == "smoothed_density":
            if kernel is None:
                raise GalrayError("a smoothed density needs its kernel", "give kernel=Kernel(...)")
            check_region(self, x, kernel)
            return torch.from_numpy(self._smoothed_rows(points, kernel))
        check_region(self, x)
        if quantity == "acceleration":
            index, gradient = self.basis.gradient(points)
            rows = np.zeros((len(points), 3, self.basis.size))
            n, j = np.ogrid[: len(points), :3]
            rows[n[..., None], j[..., None], index[:, None, :]] = -gradient
            return torch.from_numpy(rows)
        if quantity == "mass_density":
            index, local = self.basis.laplacian(points)
            local = local / (4 * math.pi * G)
        else:
            index, local = self.basis.values(points)
        flat = np.zeros((len(points), self.basis.size))
        np.put_along_axis(flat, index, local, 1)
        return torch.from_numpy(flat)

    def _smoothed_rows(self, points: Array, kernel: Kernel) -> Array:
        offsets, weights = to_numpy(kernel.offsets), to_numpy(kernel.divergence_weights)
        rows = np.empty((len(points), self.basis.size))
        for i, point in enumerate(points):
            index, gradient = self.basis.gradient(point + offsets)
            local = np.einsum("mjp,mj->mp", gradient, weights)
            rows[i] = np.bincount(index.ravel(), local.ravel(), minlength=self.basis.size)
        return rows / (4 * math.pi * G)

    def predict(
        self,
        x: Any,
        quantity: Quantity = "acceleration",
        kernel: Kernel | None = None,
        *,
        errors: Literal["statistics", "total"] = "total",
    ) -> tuple[Tensor, Tensor]:
        """A quantity at positions x (n, 3) with its full covariance.

        Arguments:
            x: Positions (n, 3).
            quantity: As in `linear_response`.
            kernel: As in `linear_response`.
            errors: ``statistics`` for the sampling errors alone, ``total`` with the penalty's bias.

        Returns:
            Values (n,) and covariance (n, n); for accelerations (n, 3) and (3n, 3n) in the order of
            ``values.reshape(-1)``.
        """
        rows = self.linear_response(x, quantity, kernel)
        flat = rows.reshape(-1, self.basis.size).numpy()
        values = (flat @ self.parameters).reshape(rows.shape[:-1])
        covariance = flat @ (self.covariance if errors == "statistics" else self.posterior) @ flat.T
        return torch.from_numpy(values), torch.from_numpy(covariance)
