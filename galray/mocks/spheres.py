"""Isotropic spheres with closed-form distribution functions: exact samples, log f and scores.

The stars carry the mass, so their density is the potential's own, and f depends on the energy alone:
f(x, v) = f(E), E = ½v² + Φ(x). Then ∂ₓ ln f = −a dln f/dE and ∂ᵥ ln f = v dln f/dE, and the
collisionless Boltzmann equation v·∂ₓ ln f + a·∂ᵥ ln f = 0 holds to round-off.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from galray.potentials import Hernquist, Isochrone, Plummer, Potential
from galray.units import G

__all__ = ["HernquistSphere", "IsochroneSphere", "IsotropicSphere", "PlummerSphere", "Seed"]

Seed = int | np.random.SeedSequence | np.random.Generator
"""What starts a stream of random numbers; nothing reads a global state."""


class IsotropicSphere(ABC):
    """A self-gravitating sphere with an ergodic distribution function f(E).

    Arguments:
        m_tot: Total mass in Msun.
        scale: Scale radius in kpc.
    """

    potential_field: Potential
    """The sphere's own gravity, exact."""

    def __init__(self, m_tot: float, scale: float) -> None:
        self.potential_field = self._potential(m_tot, scale)
        self.m_tot = float(m_tot)
        self.scale = float(scale)

    @staticmethod
    @abstractmethod
    def _potential(m_tot: float, scale: float) -> Potential: ...

    @abstractmethod
    def _log_df(self, energy: Tensor, complement: Tensor) -> tuple[Tensor, Tensor]:
        """Give ln f and dln f/dε of the unit system G = M = scale = 1, at 0 < ε < 1.

        Arguments:
            energy: ε = −E scale / GM, shape (*).
            complement: 1 − ε without cancellation, shape (*).
        """

    @abstractmethod
    def _radius_of_mass(self, fraction: np.ndarray) -> np.ndarray:
        """The radius, in scale radii, that holds a fraction of the mass."""

    @abstractmethod
    def _speed2_fraction(self, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw v² / v_esc² at places where −Φ scale / GM is `depth`."""

    @property
    def _energy_unit(self) -> float:
        return G * self.m_tot / self.scale

    def _energies(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(ε, 1 − ε) of states w."""
        kinetic = 0.5 * w[..., 3:].square().sum(-1) / self._energy_unit
        depth = -self.potential_field.potential(w[..., :3]) / self._energy_unit
        return depth - kinetic, (1.0 - depth) + kinetic

    def log_prob(self, w: Tensor) -> Tensor:
        """Give ln f(w), normalised so that ∫ f d³x d³v = 1, in ln[kpc⁻³ (km/s)⁻³]; −∞ for unbound states.

        Arguments:
            w: States (x, y, z, v_x, v_y, v_z) in kpc and km/s, shape (*, 6).

        Returns:
            Shape (*), float64.
        """
        w = torch.as_tensor(w, dtype=torch.float64)
        energy, complement = self._energies(w)
        bound = energy > 0
        half = torch.full_like(energy, 0.5)
        value, _ = self._log_df(torch.where(bound, energy, half), torch.where(bound, complement, half))
        value = value - 1.5 * math.log(G * self.m_tot * self.scale)
        return torch.where(bound, value, torch.full_like(value, -torch.inf))

    def score(self, w: Tensor) -> Tensor:
        """(∂ₓ ln f, ∂ᵥ ln f) in 1/kpc and 1/(km/s), in closed form; NaN for unbound states.

        Arguments:
            w: States, shape (*, 6).

        Returns:
            Shape (*, 6), float64.
        """
        w = torch.as_tensor(w, dtype=torch.float64)
        energy, complement = self._energies(w)
        bound = energy > 0
        half = torch.full_like(energy, 0.5)
        _, slope = self._log_df(torch.where(bound, energy, half), torch.where(bound, complement, half))
        slope = torch.where(bound, -slope / self._energy_unit, torch.full_like(slope, torch.nan))
        acceleration = self.potential_field.acceleration(w[..., :3])
        return slope.unsqueeze(-1) * torch.cat([-acceleration, w[..., 3:]], -1)

    def number_density(self, x: Tensor) -> Tensor:
        """n(x) = ∫ f d³v in kpc⁻³, shape (*), for x of shape (*, 3)."""
        return self.potential_field.mass_density(x) / self.m_tot

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw n independent states from f, exactly.

        Arguments:
            n: Number of stars.
            seed: Int, ``numpy.random.SeedSequence`` or ``Generator``.

        Returns:
            States in kpc and km/s, shape (n, 6), float64.
        """
        rng = np.random.default_rng(seed)
        radius = self.scale * self._radius_of_mass(1.0 - rng.random(n))
        x = torch.from_numpy(radius[:, None] * _directions(n, rng))
        return torch.cat([x, self.sample_velocity(x, 1, rng)[0]], -1)

    def sample_velocity(self, x: Tensor, n: int, seed: Seed) -> Tensor:
        """Draw n velocities from p(v|x) at every place, exactly.

        Arguments:
            x: Positions in kpc, shape (*, 3).
            n: Velocities per position.
            seed: Int, ``numpy.random.SeedSequence`` or ``Generator``.

        Returns:
            Velocities in km/s, shape (n, *, 3), float64.
        """
        rng = np.random.default_rng(seed)
        x = torch.as_tensor(x, dtype=torch.float64)
        depth = (-self.potential_field.potential(x) / self._energy_unit).cpu().numpy().reshape(-1)
        depth = np.broadcast_to(depth, (n, depth.size)).reshape(-1)
        speed = np.sqrt(2 * self._energy_unit * depth * self._speed2_fraction(depth, rng))
        velocity = speed[:, None] * _directions(speed.size, rng)
        return torch.from_numpy(velocity.reshape(n, *x.shape)).to(x.device)


class PlummerSphere(IsotropicSphere):
    """Plummer's sphere: f = 24√2 / (7π³) (−E)^{7/2} in units G = M = b = 1.

    References:
        Binney & Tremaine 2008, §4.3.3; speeds: Aarseth, Hénon & Wielen 1974 (v²/v_esc² is
        Beta(3/2, 9/2) everywhere).
    """

    @staticmethod
    def _potential(m_tot: float, scale: float) -> Potential:
        return Plummer(m_tot, scale)

    def _log_df(self, energy: Tensor, complement: Tensor) -> tuple[Tensor, Tensor]:
        return 3.5 * energy.log() + math.log(24 * math.sqrt(2) / (7 * math.pi**3)), 3.5 / energy

    def _radius_of_mass(self, fraction: np.ndarray) -> np.ndarray:
        return 1 / np.sqrt(fraction ** (-2 / 3) - 1)

    def _speed2_fraction(self, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.beta(1.5, 4.5, depth.shape)


class _ArcsineSphere(IsotropicSphere):
    """Distribution functions of the form f ∝ √ε (1−ε)^{−p} [P(ε) + Q(ε) A(ε)], A = arcsin√ε / √(ε(1−ε)).

    The bracket is O(ε²) by cancellation of its first two orders, so small ε goes through its series.
    """

    _p: ClassVar[int]
    _polynomial: ClassVar[tuple[float, ...]]
    _arcsine: ClassVar[tuple[float, ...]]
    _factor: ClassVar[float]
    _switch: ClassVar[float] = 0.15

    def _bracket_series(self, terms: int = 28) -> list[float]:
        """Coefficients d_k of the bracket / ε² = Σ d_k ε^k."""
        arcsine = [1.0]  # A = Σ c_k ε^k, c_k = c_{k−1} 2k / (2k+1)
        for k in range(1, terms + 2):
            arcsine.append(arcsine[-1] * 2 * k / (2 * k + 1))
        bracket = []
        for k in range(terms + 2):
            value = self._polynomial[k] if k < len(self._polynomial) else 0.0
            bracket.append(value + sum(q * arcsine[k - j] for j, q in enumerate(self._arcsine) if j <= k))
        return bracket[2:]

    def _log_df(self, energy: Tensor, complement: Tensor) -> tuple[Tensor, Tensor]:
        small = energy < self._switch
        # series: bracket = ε² S(ε)
        e = torch.where(small, energy, torch.full_like(energy, self._switch))
        series, slope = _horner(self._bracket_series(), e)
        log_small, slope_small = series.log() + 2 * e.log(), slope / series + 2 / e
        # closed form
        e = torch.where(small, torch.full_like(energy, self._switch), energy)
        q = torch.where(small, torch.full_like(energy, 1 - self._switch), complement)
        a = torch.atan2(e.sqrt(), q.sqrt()) / torch.sqrt(e * q)
        a_slope = (1 - (q - e) * a) / (2 * e * q)
        p_value, p_slope = _horner(self._polynomial, e)
        q_value, q_slope = _horner(self._arcsine, e)
        bracket = p_value + q_value * a
        slope_large = (p_slope + q_slope * a + q_value * a_slope) / bracket
        norm = math.log(self._factor / (math.sqrt(2) * (2 * math.pi) ** 3))
        value = torch.where(small, log_small, bracket.log()) + 0.5 * energy.log() - self._p * complement.log()
        derivative = torch.where(small, slope_small, slope_large) + 0.5 / energy + self._p / complement
        return value + norm, derivative

    def _shape(self, energy: np.ndarray, power: float) -> np.ndarray:
        """Give f ε^{−5/2} (1−ε)^power, which is bounded and smooth: what is left for rejection."""
        e = torch.from_numpy(np.clip(energy, 1e-300, None))
        log_f, _ = self._log_df(e, 1 - e)
        return np.exp((log_f - 2.5 * e.log() + power * torch.log1p(-e)).numpy())


class IsochroneSphere(_ArcsineSphere):
    """Hénon's isochrone with its isotropic distribution function.

    References:
        Hénon 1960; Binney & Tremaine 2008, eq. 4.54.
    """

    _p = 4
    _polynomial = (27.0, -66.0, 320.0, -240.0, 64.0)
    _arcsine = (-27.0, 84.0, 48.0)
    _factor = 1 / 16

    @staticmethod
    def _potential(m_tot: float, scale: float) -> Potential:
        return Isochrone(m_tot, scale)

    def _radius_of_mass(self, fraction: np.ndarray) -> np.ndarray:
        # With t = 1 − b/√(b²+r²) the enclosed mass m obeys t³ + m² t = 2 m²: one real root, in closed form.
        t = 2 * fraction / np.sqrt(3) * np.sinh(np.arcsinh(3 * np.sqrt(3) / fraction) / 3)
        return np.sqrt(t * (2 - t)) / (1 - t)

    def _speed2_fraction(self, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # f ε^{−5/2} grows with ε, so its value at zero speed bounds it.
        bound = self._shape(depth, 0.0)

        def propose(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            u = rng.beta(1.5, 3.5, index.size)
            return u, self._shape(depth[index] * (1 - u), 0.0) / bound[index]

        return _reject(depth.size, propose, rng)


class HernquistSphere(_ArcsineSphere):
    """Hernquist's sphere with its isotropic distribution function.

    References:
        Hernquist 1990; Binney & Tremaine 2008, eq. 4.51.
    """

    _p = 2
    _polynomial = (-3.0, -2.0, 24.0, -16.0)
    _arcsine = (3.0,)
    _factor = 1.0

    @staticmethod
    def _potential(m_tot: float, scale: float) -> Potential:
        return Hernquist(m_tot, scale)

    def _radius_of_mass(self, fraction: np.ndarray) -> np.ndarray:
        root = np.sqrt(fraction)
        return root / (1 - root)

    def _speed2_fraction(self, depth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Towards the centre f ∝ (1−ε)^{−5/2}. The proposal u^{1/2} (1 − depth + depth·u)^{−5/2} has the
        # closed cumulative [u / (1 − depth + depth·u)]^{3/2}; what is left falls with ε from its value at 0.
        bound = float(self._shape(np.array([1e-9]), 2.5)[0])

        def propose(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            psi = depth[index]
            c = rng.random(index.size) ** (2 / 3)
            u = c * (1 - psi) / (1 - c * psi)
            return u, (1 - u) ** 2.5 * self._shape(psi * (1 - u), 2.5) / bound

        return _reject(depth.size, propose, rng)


def _reject(
    n: int, propose: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], rng: np.random.Generator
) -> np.ndarray:
    """Rejection sampling of n values; propose(index) gives values and acceptance probabilities ≤ 1."""
    result = np.empty(n)
    left = np.arange(n)
    while left.size:
        value, chance = propose(left)
        assert chance.max() < 1 + 1e-9  # the bound is one, or the draw is not exact
        accepted = rng.random(left.size) < chance
        result[left[accepted]] = value[accepted]
        left = left[~accepted]
    return result


def _horner(coefficients: list[float] | tuple[float, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """A polynomial and its derivative, coefficients from the constant up."""
    value, slope = torch.zeros_like(x), torch.zeros_like(x)
    for c in reversed(coefficients):
        slope = slope * x + value
        value = value * x + c
    return value, slope


def _directions(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n unit vectors, isotropic, shape (n, 3)."""
    v = rng.standard_normal((n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)
