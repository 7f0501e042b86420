"""The spherical Jeans equations of second and fourth order: forward (ρ → σ) and inverse (σ → ρ)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from galray.dwarf.anisotropy import Anisotropy
from galray.dwarf.projection import cumulative_matrix, interpolation_matrix, projection_matrices
from galray.units import G

__all__ = ["JeansSolver", "Moments", "inverse_jeans"]


@dataclass(frozen=True)
class Moments:
    """Projected moments at radii R_j, each of shape (*, j).

    Attributes:
        surface: Σ(R), the projection of n, in kpc⁻² (times n's norm).
        los2: ⟨v_los²⟩ in (km/s)².
        los4: ⟨v_los⁴⟩ in (km/s)⁴.
        radial2: ⟨v_R²⟩ on the sky, towards the centre, in (km/s)².
        tangential2: ⟨v_T²⟩ on the sky, across, in (km/s)².
    """

    surface: Tensor
    los2: Tensor
    los4: Tensor
    radial2: Tensor
    tangential2: Tensor


class JeansSolver:
    """Quadrature matrices on one radial grid; every method is batched and differentiable.

    Arguments:
        grid: Radii in kpc, equidistant in ln r, wide enough that nothing lies beyond, shape (k,).
        radii: Projected radii of the moments in kpc, shape (j,).
    """

    def __init__(self, grid: np.ndarray, radii: np.ndarray) -> None:
        self.grid = torch.from_numpy(np.asarray(grid, dtype=np.float64))
        self.radii = torch.from_numpy(np.asarray(radii, dtype=np.float64))
        inward = cumulative_matrix(self.grid.numpy())
        self._inward = torch.from_numpy(inward.T.copy())
        self._outward = torch.from_numpy((inward[-1:] - inward).T.copy())
        self._project = torch.from_numpy(
            np.ascontiguousarray(
                projection_matrices(self.grid.numpy(), self.radii.numpy()).transpose(0, 2, 1)
            )
        )

    def enclosed(self, density: Tensor, slope: Tensor) -> Tensor:
        """M(<r) = ∫ 4πr²ρ dr on the grid, shape (*, k).

        Arguments:
            density: ρ on the grid, shape (*, k).
            slope: γ < 3 of the power law inside the grid, shape (*).
        """
        shell = 4 * math.pi * density * self.grid**3
        return shell[..., :1] / (3 - slope[..., None]) + shell @ self._inward

    def radial_moments(self, log_n: Tensor, mass: Tensor, anisotropy: Anisotropy) -> tuple[Tensor, Tensor]:
        """⟨v_r²⟩ and ⟨v_r⁴⟩ on the grid, each of shape (*, k).

        n⟨v_r²⟩ = g⁻¹ ∫_r^∞ g n GM/s² ds with dln g/dln r = 2β; and, where the fourth-order anisotropy
        1 − (3/2)⟨v_r²v_t²⟩/⟨v_r⁴⟩ equals β (true of f = f(E) L^{−2β} and of f(E + L²/2r_a²)),
        n⟨v_r⁴⟩ = 3 g⁻¹ ∫_r^∞ g n⟨v_r²⟩ GM/s² ds.

        Arguments:
            log_n: ln n on the grid, shape (*, k).
            mass: M(<r) on the grid, shape (*, k).
            anisotropy: β(r).

        References:
            Binney & Tremaine 2008 §4.8; Łokas 2002, MNRAS 333, 697; Richardson & Fairbairn 2013.
        """
        force = G * mass / self.grid
        log_weight = anisotropy.log_factor(self.grid) + log_n
        # the ratio of neighbouring values stays finite where n itself underflows
        shift = log_weight.amax(-1, keepdim=True).detach()
        weight = torch.exp(log_weight - shift)
        first = (weight * force) @ self._outward
        floor = 1e-290
        radial2 = first / weight.clamp_min(floor)
        radial4 = 3 * ((first * force) @ self._outward) / weight.clamp_min(floor)
        return radial2, radial4

    def project(self, f: Tensor, power: int = 0) -> Tensor:
        """2 ∫ (R/r)^{2p} f r dr / √(r² − R²) at the solver's radii, shape (*, j)."""
        return f @ self._project[power]

    def moments(self, log_n: Tensor, mass: Tensor, anisotropy: Anisotropy) -> Moments:
        """Project the moments of a galaxy; arguments as in `radial_moments`.

        With s = R²/r²: ⟨v_los²⟩ = ⟨v_r²⟩ (1 − βs) and ⟨v_los⁴⟩ = ⟨v_r⁴⟩ [1 − 2βs + ½(β + β² − ½ β')s²],
        β' = dβ/dln r, which is (1 − βs)² for Osipkov-Merritt.
        """
        radial2, radial4 = self.radial_moments(log_n, mass, anisotropy)
        beta, slope = anisotropy.beta(self.grid), anisotropy.slope(self.grid)
        n = torch.exp(log_n)
        p2, p4 = n * radial2, n * radial4
        surface = self.project(n)
        along, across = self.project(p2), self.project(beta * p2, 1)
        los4 = (
            self.project(p4)
            - 2 * self.project(beta * p4, 1)
            + self.project(0.5 * (beta + beta**2 - 0.5 * slope) * p4, 2)
        )
        tangential = self.project((1 - beta) * p2)
        return Moments(
            surface=surface,
            los2=(along - across) / surface,
            los4=los4 / surface,
            radial2=(tangential + across) / surface,
            tangential2=tangential / surface,
        )


def inverse_jeans(
    r: Tensor, log_slope_n: Tensor, radial2: Tensor, log_slope_radial2: Tensor, beta: Tensor
) -> Tensor:
    """M(<r) = −(r σ_r²/G) [dln n/dln r + dln σ_r²/dln r + 2β] in Msun, shape (*).

    Arguments:
        r: Radius in kpc.
        log_slope_n: dln n/dln r.
        radial2: σ_r² in (km/s)².
        log_slope_radial2: dln σ_r²/dln r.
        beta: β(r).

    References:
        Binney & Tremaine 2008, eq. 4.216.
    """
    return -(r * radial2 / G) * (log_slope_n + log_slope_radial2 + 2 * beta)


def interpolate(grid: np.ndarray, values: Tensor, r: np.ndarray) -> Tensor:
    """Values (*, k) of the grid at radii r of shape (m,), by local cubics in ln r."""
    return values @ torch.from_numpy(interpolation_matrix(grid, r)).T
