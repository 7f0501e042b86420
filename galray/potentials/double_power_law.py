"""The integrals of a double power law density: enclosed mass and outer potential, tabulated to 1e-12."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["DoublePowerLawTable"]

_REACH = 34.0  # of ln s and of α ln s: beyond ± this the density is a pure power law to e^−34
_STEP = 0.02  # of α ln s between nodes


class DoublePowerLawTable:
    """ln m(s) and ln q(s) of a double power law in units of its scales, as functions of ln s.

    With s = r/r_s and d(s) = s^−γ (1 + s^α)^((γ−β)/α),

        m(s) = ∫₀ˢ d t² dt,      q(s) = ∫ₛ^∞ d t dt,

    so that M = 4π ρ₀ r_s³ m and Φ = −4πG ρ₀ r_s² (m/s + q). Both are incomplete beta functions; torch has
    none, so they are integrated panel by panel in ln s by Gauss–Legendre (every term positive: no digits
    are lost), and interpolated by quintic Hermite polynomials through exact values and first and second
    derivatives. Autograd may differentiate them three times.

    Arguments:
        alpha: Sharpness of the turn, > 0.
        beta: Outer slope, > 2.
        gamma: Inner slope, < 3.
    """

    def __init__(self, alpha: float, beta: float, gamma: float) -> None:
        self._alpha, self._beta, self._gamma = alpha, beta, gamma
        self._step = _STEP / alpha
        self._low = -_REACH * max(1.0, 1.0 / alpha)
        # np.arange with a fractional step would put the nodes off by 1e-11
        x = self._low + self._step * np.arange(1 + round(-2 * self._low / self._step))
        nodes, weights = np.polynomial.legendre.leggauss(12)
        t = x[:-1, None] + 0.5 * self._step * (nodes + 1)
        panel = 0.5 * self._step * weights
        inner = np.exp((3 - gamma) * x[0]) / (3 - gamma)
        mass = np.cumsum(np.concatenate([[inner], (np.exp(self._log_shell(t, 3)) * panel).sum(1)]))
        outer = np.exp((2 - beta) * x[-1]) / (beta - 2)
        tail = np.concatenate([[outer], (np.exp(self._log_shell(t, 2)) * panel).sum(1)[::-1]])
        self._mass = self._polynomials(x, np.log(mass), 3, +1)
        self._outer = self._polynomials(x, np.log(np.cumsum(tail)[::-1]), 2, -1)

    def log_mass(self, log_s: Tensor) -> Tensor:
        """Give ln m at ln s, shape (*)."""
        return self._evaluate(self._mass, log_s)

    def log_outer(self, log_s: Tensor) -> Tensor:
        """Give ln q at ln s, shape (*)."""
        return self._evaluate(self._outer, log_s)

    def _log_shell(self, x: np.ndarray, power: int) -> np.ndarray:
        """Give ln(d s^power), the integrand by ln s."""
        turn = np.logaddexp(0.0, self._alpha * x) / self._alpha
        return np.asarray((power - self._gamma) * x + (self._gamma - self._beta) * turn)

    def _polynomials(self, x: np.ndarray, value: np.ndarray, power: int, sign: int) -> Tensor:
        """Coefficients (panels, 6) of the quintic Hermite interpolant in the fraction of a panel."""
        first = sign * np.exp(self._log_shell(x, power) - value)
        chi = 1 / (1 + np.exp(-self._alpha * x))
        second = first * (power - self._gamma + (self._gamma - self._beta) * chi - first)
        h = self._step
        v0, v1 = value[:-1], value[1:]
        d0, d1 = h * first[:-1], h * first[1:]
        c0, c1 = h * h * second[:-1], h * h * second[1:]
        rise = v1 - v0
        coefficients = [
            v0,
            d0,
            0.5 * c0,
            10 * rise - 6 * d0 - 4 * d1 - 1.5 * c0 + 0.5 * c1,
            -15 * rise + 8 * d0 + 7 * d1 + 1.5 * c0 - c1,
            6 * rise - 3 * (d0 + d1) - 0.5 * (c0 - c1),
        ]
        return torch.from_numpy(np.stack(coefficients, -1))

    def _evaluate(self, table: Tensor, log_s: Tensor) -> Tensor:
        table = table.to(log_s.device)
        position = (log_s - self._low) / self._step
        end = float(len(table))
        inside = position.clamp(0.0, end)
        index = inside.detach().floor().clamp_max(end - 1).to(torch.int64)
        t, c = inside - index, table[index].unbind(-1)
        value = c[0] + t * (c[1] + t * (c[2] + t * (c[3] + t * (c[4] + t * c[5]))))
        last = table[-1]
        slope = torch.where(position < 0, table[0, 1], last @ torch.arange(6, dtype=last.dtype))
        return value + slope * (position - inside)  # a power law beyond the table
