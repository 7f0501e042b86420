"""Positive radial profiles whose logarithmic slope is piecewise linear in ln r."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["SlopeProfile"]


class SlopeProfile:
    """ln f(r) = a − ∫ γ dln r with γ piecewise linear in ln r: linear in its parameters (a, γ_1 … γ_K).

    Inside the first knot and outside the last the slope is constant, so f is a power law there, and
    ln f is once continuously differentiable with exact slope.

    Arguments:
        knots: Radii of the slope's knots in kpc, rising, shape (K,).
        reference: Radius in kpc where ln f = a.
    """

    def __init__(self, knots: np.ndarray, reference: float) -> None:
        self.knots = np.asarray(knots, dtype=np.float64)
        self.reference = float(reference)

    def basis(self, r: np.ndarray) -> Tensor:
        """B with ln f(r) = [a, γ] Bᵀ: shape (*r, 1 + K)."""
        integral = self._integrals(np.asarray(r, dtype=np.float64)) - self._integrals(
            np.asarray(self.reference)
        )
        return torch.from_numpy(np.concatenate([np.ones((*np.shape(r), 1)), -integral], -1))

    def slope_basis(self, r: np.ndarray) -> Tensor:
        """S with γ(r) = −dln f/dln r = γ Sᵀ: shape (*r, K)."""
        u, x = np.log(self.knots), np.log(np.asarray(r, dtype=np.float64))
        x = np.clip(x, u[0], u[-1])
        i = np.clip(np.searchsorted(u, x, side="right") - 1, 0, len(u) - 2)
        t = (x - u[i]) / (u[i + 1] - u[i])
        matrix = np.zeros((*np.shape(x), len(u)))
        np.put_along_axis(matrix, i[..., None], (1 - t)[..., None], -1)
        np.put_along_axis(matrix, i[..., None] + 1, t[..., None], -1)
        return torch.from_numpy(matrix)

    def _integrals(self, r: np.ndarray) -> np.ndarray:
        """∫_{ln knot_1}^{ln r} of each knot's hat function, shape (*r, K)."""
        u, x = np.log(self.knots), np.log(r)
        result = np.zeros((*np.shape(x), len(u)))
        for k in range(len(u)):
            if k > 0:  # the rising side of hat k
                s = np.clip(x, u[k - 1], u[k]) - u[k - 1]
                result[..., k] += s**2 / (2 * (u[k] - u[k - 1]))
            else:  # constant inside the first knot
                result[..., k] += np.minimum(x - u[0], 0.0)
            if k < len(u) - 1:  # the falling side
                s = np.clip(x, u[k], u[k + 1]) - u[k]
                result[..., k] += s - s**2 / (2 * (u[k + 1] - u[k]))
            else:  # constant outside the last knot
                result[..., k] += np.maximum(x - u[-1], 0.0)
        return result
