"""Positive radial profiles whose logarithmic slope is piecewise linear in ln r."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["SlopeProfile", "SmoothLogProfile"]


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


class SmoothLogProfile(nn.Module):
    """ln f(r) as a smooth broken line in ln r, trainable, with exact derivatives of every order.

    ln f = b + b_0 u + Σ_k b_k δ softplus((u − u_k)/δ), u = ln(r/r_1): straight outside the knots.

    Arguments:
        knots: Radii of the bends in kpc, rising, shape (K,).
        start: ln f before training, a constant.
    """

    u_knots: Tensor

    def __init__(self, knots: np.ndarray, start: float) -> None:
        super().__init__()
        u = torch.log(torch.from_numpy(np.asarray(knots, dtype=np.float64)))
        self.register_buffer("u_knots", u)
        self.width = 0.5 * float(u[1:].sub(u[:-1]).mean())
        self.level = nn.Parameter(torch.tensor(float(start), dtype=torch.float64))
        self.slope = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.bends = nn.Parameter(torch.zeros(len(u), dtype=torch.float64))

    def forward(self, r: Tensor) -> Tensor:
        """Give ln f(r), any shape."""
        u = torch.log(r)
        t = (u[..., None] - self.u_knots) / self.width
        return (
            self.level
            + self.slope * (u - self.u_knots[0])
            + self.width * (nn.functional.softplus(t) @ self.bends)
        )

    def log_slope(self, r: Tensor) -> Tensor:
        """Dln f/dln r, any shape."""
        t = (torch.log(r)[..., None] - self.u_knots) / self.width
        return self.slope + torch.sigmoid(t) @ self.bends

    def roughness(self) -> Tensor:
        """Σ b_k², what a smoothness prior holds down."""
        return self.bends.square().sum()
