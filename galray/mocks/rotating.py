"""An exact stationary solution in turning gravity: every function of E_J alone is one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.mocks.spheres import Seed
from galray.phasespace.transforms import Ball
from galray.potentials import Potential

__all__ = ["RotatingIsothermal"]

_PROPOSALS = 65_536


class RotatingIsothermal:
    """f ∝ exp(−E_J/σ²) in a ball, E_J = ½v² + Φ(x) − Ω_p L: steady in the frame that turns with Φ.

    Velocities are Gaussian about u = Ω_p × x with dispersion σ, positions follow exp(−Φ_eff/σ²) with
    Φ_eff = Φ − ½Ω_p²R². Put a' and Ω' in the Boltzmann equation of a turning frame, and with c = v − u what
    is left is c·(a' − a) + (Ω' − Ω_p) R a_φ, up to a factor: a' = a always, and Ω' = Ω_p exactly where
    gravity has a torque R a_φ. In an axisymmetric potential Ω_p cannot be known, as it must be.

    Arguments:
        potential: Gravity, as it stands now.
        pattern_speed: Ω_p in km/s/kpc, positive along Galactic rotation.
        sigma: Velocity dispersion in km/s.
        ball: Where the stars are.
    """

    def __init__(self, potential: Potential, pattern_speed: float, sigma: float, ball: Ball) -> None:
        if not sigma > 0:
            raise GalrayError(f"a velocity dispersion of {sigma} km/s", "give a number above zero")
        self.potential_field = potential
        self.pattern_speed = float(pattern_speed)
        self.sigma = float(sigma)
        self.ball = ball
        x = self._uniform(_PROPOSALS, np.random.default_rng(0))
        log_density = self._log_density(x)
        self._highest = float(log_density.max())
        volume = 4 / 3 * math.pi * ball.radius**3
        self._log_norm = (
            self._highest
            + float((log_density - self._highest).exp().mean().log())
            + math.log(volume)
            + 1.5 * math.log(2 * math.pi * sigma**2)
        )

    def mean_velocity(self, x: Tensor) -> Tensor:
        """The mean velocity u = Ω_p × x in km/s, shape (*, 3)."""
        return self.pattern_speed * torch.stack([x[..., 1], -x[..., 0], torch.zeros_like(x[..., 0])], -1)

    def _log_density(self, x: Tensor) -> Tensor:
        spin = 0.5 * self.pattern_speed**2 * x[..., :2].square().sum(-1)
        return (spin - self.potential_field.potential(x)) / self.sigma**2

    def log_prob(self, w: Tensor) -> Tensor:
        """Give ln f(w) in ln[kpc⁻³ (km/s)⁻³], shape (*); its norm is good to about one per cent.

        Arguments:
            w: States in kpc and km/s, shape (*, 6).
        """
        w = torch.as_tensor(w, dtype=torch.float64)
        peculiar = w[..., 3:] - self.mean_velocity(w[..., :3])
        kinetic = 0.5 * peculiar.square().sum(-1) / self.sigma**2
        return self._log_density(w[..., :3]) - kinetic - self._log_norm

    def score(self, w: Tensor) -> Tensor:
        """(∂ₓ ln f, ∂ᵥ ln f) = −(Ω × v − a, v − u)/σ², shape (*, 6), float64."""
        w = torch.as_tensor(w, dtype=torch.float64)
        x, v = w[..., :3], w[..., 3:]
        # Ω × v, like Ω × x, with Ω along Galactic rotation
        turned = self.mean_velocity(v)
        pull = self.potential_field.acceleration(x) - turned
        return torch.cat([pull, self.mean_velocity(x) - v], -1) / self.sigma**2

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw n independent states, shape (n, 6): positions by rejection.

        Raises:
            GalrayError: Nearly all of the stars sit in one place of the ball.
        """
        rng = np.random.default_rng(seed)
        parts: list[Tensor] = []
        have = drawn = 0
        highest = self._highest + 0.2  # the pilot may have missed the highest place
        while have < n:
            x = self._uniform(_PROPOSALS, rng)
            keep = torch.from_numpy(np.log(rng.random(len(x)))) < self._log_density(x) - highest
            parts.append(x[keep])
            have, drawn = have + int(keep.sum()), drawn + len(x)
            if drawn > 50 * _PROPOSALS and have < 1e-4 * drawn:
                raise GalrayError(
                    f"only {have} of {drawn} places drawn in the ball were kept",
                    "give a larger sigma or a smaller ball",
                )
        x = torch.cat(parts)[:n]
        return torch.cat([x, self.sample_velocity(x, 1, rng)[0]], -1)

    def sample_velocity(self, x: Tensor, n: int, seed: Any) -> Tensor:
        """Draw n velocities at each of the positions (*, 3): shape (n, *, 3) in km/s."""
        rng = np.random.default_rng(seed)
        noise = torch.from_numpy(rng.standard_normal((n, *x.shape)))
        return self.mean_velocity(x) + self.sigma * noise

    def _uniform(self, n: int, rng: np.random.Generator) -> Tensor:
        direction = rng.standard_normal((n, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        offset = self.ball.radius * np.cbrt(rng.random((n, 1))) * direction
        return torch.from_numpy(np.array(self.ball.center) + offset)
