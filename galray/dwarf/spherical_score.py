"""A score network for spheres, f(r, v_r, v_t), and the gravity and ρ(r) that follow from it.

The stars' density in (u = ln r, v_r, v_t as two components) is p = 4π r³ f, so ∂ ln f/∂ ln r = s_u − 3: the
volume term of the invariant coordinates. The collisionless Boltzmann equation reads

    v_r ∂_r ln f + (v_t²/r) ∂_{v_r} ln f − (v_r v_t/r) ∂_{v_t} ln f + a(r) ∂_{v_r} ln f = 0,

and the instrument v_r, in the Stein form E[v_r ∂_{v_r} ln f | r] = −1, gives a(r) = −GM/r² as

    G M(r)/r = −E[v_r (v_r (s_u − 3) + v_t² s_r − v_r v_t s_t) | r] + σ² dln n/dln r,

the last term for velocity errors σ. The score is the gradient of a scalar ψ = ln p, so the mean over
velocities at r is taken under exp ψ itself, by quadrature: then the score's Stein identities hold exactly
where the terms all but cancel, in the core. The result, averaged over the stars under splines in ln r, is
fitted by the same positive ρ(r) as the weak-form moments, whose scatter from star to star it is given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from galray.dwarf.invariant_score import InvariantScore, train_score
from galray.dwarf.spherical_mass import RadialMass, RadialMoments, TestFunctions, solve_mass
from galray.dwarf.spherical_moments import check_states, moments_3d, spherical_velocities
from galray.dwarf.spherical_settings import SphericalMassSettings, SphericalScoreSettings
from galray.errors import GalrayError

__all__ = ["SphericalScore", "fit_spherical_score"]

Array = NDArray[np.float64]

_REACH = 6.0  # of the base's dispersions: the range of the quadrature over velocities


@dataclass
class SphericalScore:
    """A trained score of a sphere; it stands wherever a phase-space model does.

    Attributes:
        network: The score in invariant coordinates.
        training: What the training did.
        velocity_error: Of the stars it was trained on, km/s: it is their noisy density's score.
    """

    network: InvariantScore
    training: Any
    velocity_error: float

    def invariant(self, r: Array, v_r: Array, v_t: Array) -> tuple[Array, Array, Array]:
        """(∂ ln f/∂ ln r, ∂ ln f/∂v_r, ∂ ln f/∂v_t) at radii (n,) in kpc and velocities (n,) in km/s."""
        s = self.network.score(np.log(r), np.column_stack([v_r, v_t]))
        return s[:, 0] - 3.0, s[:, 1], s[:, 2]

    def score(self, w: Tensor) -> Tensor:
        """∇ log f at states (*, 6) in kpc and km/s: shape (*, 6), in 1/kpc and 1/(km/s)."""
        flat = w.reshape(-1, 6).double().numpy()
        r, v_r, tangential2 = spherical_velocities(flat)
        v_t = np.sqrt(tangential2)
        s_u, s_r, s_t = self.invariant(r, v_r, v_t)
        outward = flat[:, :3] / r[:, None]
        across = flat[:, 3:] - v_r[:, None] * outward
        tangent = across / np.maximum(v_t, 1e-12)[:, None]
        # turning the position by dx⊥ turns v_r by v·dx⊥/r and v_t by −v_r of that
        turn = (v_t * s_r - v_r * s_t) / r
        by_x = (s_u / r)[:, None] * outward + turn[:, None] * tangent
        by_v = s_r[:, None] * outward + s_t[:, None] * tangent
        out = torch.from_numpy(np.concatenate([by_x, by_v], 1)).to(w.dtype)
        return out.reshape(w.shape)

    def circular_speed2(self, r: Array) -> Array:
        """GM(r)/r in (km/s)² from the score alone, radius by radius, shape (n,)."""
        u = np.log(r)
        node, weight = np.polynomial.legendre.leggauss(48)
        y_r, y_t = np.meshgrid(*(2 * [0.5 * (node + 1) * _REACH]), indexing="ij")
        y = np.stack([y_r, y_t], -1).reshape(-1, 2)
        volume = np.outer(weight, weight).reshape(-1) * y[:, 1]  # two tangential components: v_t dv_t
        out = np.empty(len(u))
        for i, sigma in enumerate(self.network.velocity_reach(u)):
            place, speeds = np.full(len(y), u[i]), y * sigma
            psi = self.network.log_density(place, speeds)
            p = volume * np.exp(psi - psi.max())
            p /= p.sum()
            s_u, s_r, s_t = (p * s for s in self.invariant(np.exp(place), *speeds.T))
            a, b = speeds.T
            free = (a**2 * s_u + a * b**2 * s_r - a**2 * b * s_t).sum()
            out[i] = -free + self.velocity_error**2 * s_u.sum()
        return out

    def moments(self, w: Array, count: int) -> RadialMoments:
        """What the score says of GM/r under `count` test functions, at stars (n, 6).

        The mean over stars is the score's; the stars' scatter about it is that of their weak-form moments.
        """
        error = np.full(len(w), self.velocity_error)
        weak = moments_3d(w, error, SphericalMassSettings(test_functions=count))
        r = weak.radii
        knots = np.linspace(np.log(r.min()), np.log(r.max()), 120)
        speed2 = np.interp(np.log(r), knots, self.circular_speed2(np.exp(knots)))
        mean = (TestFunctions(r, count)(r)[0] * speed2[:, None]).mean(0)
        return replace(weak, target=weak.target - weak.target.mean(0) + mean)


def fit_spherical_score(
    w: Any,
    velocity_error: float = 0.0,
    settings: SphericalScoreSettings | None = None,
    *,
    seed: int = 0,
) -> tuple[SphericalScore, RadialMass]:
    """Train the score of a sphere and solve the Boltzmann equation for M(r) and ρ(r).

    Arguments:
        w: States (x, y, z, v_x, v_y, v_z) around the centre, in its rest frame, kpc and km/s, shape (n, 6).
        velocity_error: Standard deviation of the Gaussian noise in each velocity component, km/s.
        settings: Network, training, halo.
        seed: Of initial weights, held-out stars, batches and jackknife blocks.

    Returns:
        The score and the halo. The halo's jackknife keeps the score fixed: the posterior and an ensemble of
        seeds and bootstraps say more.

    Raises:
        GalrayError: Wrong shapes, values that are not finite, negative errors, or too few stars.
    """
    settings = settings or SphericalScoreSettings()
    states, error = check_states(w, velocity_error)
    if states.shape[1] != 6:
        raise GalrayError(
            "the score of f(r, v_r, v_t) needs all six coordinates, not five",
            "use fit_spherical_moments, which needs no depths",
        )
    if len(states) < 300:
        raise GalrayError(f"{len(states)} stars are too few to train a score", "use fit_spherical_moments")
    r, v_r, tangential2 = spherical_velocities(states)
    speeds = np.column_stack([v_r, np.sqrt(tangential2)])
    network, training = train_score(np.log(r), speeds, (1, 2), settings, seed)
    score = SphericalScore(network, training, float(np.sqrt((error**2).mean())))
    moments = score.moments(states, settings.mass.test_functions)
    return score, solve_mass(moments, settings.mass, seed=seed)
