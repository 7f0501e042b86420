"""Distribution functions of tracers in any spherical potential, by Eddington-type inversion.

The anisotropy is that of Cuddeford (1991), which holds the isotropic, the constant-β and the
Osipkov–Merritt models as special cases:

    f = L^−2β₀ f₁(Q),   Q = Ψ − v²/2 − L²/(2 r_a²),   β(r) = (r² + β₀ r_a²) / (r² + r_a²),

with Ψ = −Φ. The tracers' density ν and g(Ψ) = r^2β₀ (1 + r²/r_a²)^(1−β₀) ν give, with n = ⌊3/2 − β₀⌋ and
λ = 3/2 − β₀ − n (Cuddeford 1991; An & Evans 2006, AJ 131, 782),

    f₁(Q) = 2^β₀ / [(2π)^3/2 Γ(1−λ) Γ(1−β₀)] ∫₀^Q (dⁿ⁺¹g/dΨⁿ⁺¹) (Q − Ψ)^−λ dΨ,

which for half-integer β₀ (λ = 0) is the n-th derivative itself. For β₀ = 0 it is Eddington's formula.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from galray.errors import GalrayError
from galray.mocks.radial import CubicTable, RadialProfiles
from galray.mocks.spheres import Seed
from galray.potentials import Potential

__all__ = ["EddingtonSphere"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_SPAN = (-11.0, 9.0)  # of ln(r / half-mass radius): the energies at which f₁ is computed
_ENERGIES = 700
_BIN = 4  # energies per bin of the sampler's envelope
_CHUNK = 8192


class EddingtonSphere:
    """Tracer stars in equilibrium in a spherical potential, with their exact distribution function.

    The interface is that of the isotropic spheres: `log_prob`, `score`, `sample`, `sample_velocity`,
    `number_density`; so it stands wherever a phase-space model does.

    Arguments:
        tracer: Its `mass_density` is the tracers' density, up to a factor. Add the tracers to `potential`
            (a `Composite`) if they have mass.
        potential: The whole gravity: any spherical potential with a finite centre.
        beta: β₀, the anisotropy at the centre, −2.5 ≤ β₀ < 1; everywhere if r_a is infinite.
        r_a: Anisotropy radius in kpc.

    Raises:
        GalrayError: A parameter out of range, no sphere, or no distribution function f ≥ 0.
    """

    def __init__(
        self, tracer: Potential, potential: Potential, *, beta: float = 0.0, r_a: float = math.inf
    ) -> None:
        if not (math.isfinite(beta) and -2.5 <= beta < 1):
            raise GalrayError(f"anisotropy beta = {beta!r}", "give a number with -2.5 <= beta < 1")
        if not r_a > 0:
            raise GalrayError(f"anisotropy radius r_a = {r_a!r}", "give a radius in kpc above zero, or inf")
        self.tracer, self.potential_field = tracer, potential
        self.beta, self.r_a = float(beta), float(r_a)
        self._inverse_r_a2 = 1 / self.r_a**2
        self.profiles = RadialProfiles(tracer, potential)
        x = math.log(self.profiles.half_mass_radius) + np.linspace(*_SPAN, _ENERGIES)
        f = self._invert(torch.from_numpy(x))
        bad = ~(f > 0)
        if bad.any():
            radius = math.exp(x[np.flatnonzero(bad)[-1]])
            raise GalrayError(
                f"no distribution function: f < 0 on {int(bad.sum())} of {len(x)} energies, as for orbits "
                f"that turn at {radius:.3g} kpc, with beta = {beta}, r_a = {r_a} kpc, tracer {tracer!r} "
                f"in {potential!r}",
                "raise r_a, lower beta (the inner slope of the tracers must be at least 2 beta), or steepen "
                "the tracers",
            )
        rise, depth = self._rise_and_depth(torch.from_numpy(x))
        nodes, log_f = (rise / depth).log().numpy(), np.log(f)
        self._log_f1 = CubicTable(nodes, log_f, CubicSpline(nodes, log_f)(nodes, 1))
        self._edges, self._ceiling = self._envelope(rise.numpy(), log_f)
        x = self.profiles.x
        pressure = self.profiles.from_outside(lambda t: self._pull(torch.from_numpy(t)).numpy())
        self._log_pressure = CubicTable(
            x, np.log(pressure), -self._pull(torch.from_numpy(x)).numpy() / pressure
        )

    # -- the inversion ---------------------------------------------------------------------------------

    def _augmented(self, x: Tensor) -> Tensor:
        """Give g = r^2β₀ (1 + r²/r_a²)^(1−β₀) ν at ln r."""
        stretch = torch.log1p(torch.exp(2 * x) * self._inverse_r_a2)
        return torch.exp(2 * self.beta * x + (1 - self.beta) * stretch) * self.profiles.density(x)

    def _pull(self, x: Tensor) -> Tensor:
        return self._augmented(x) * self.profiles.speed2(x)

    def _derivative(self, x: Tensor, order: int) -> Tensor:
        """dᵏg/dΨᵏ at ln r, by automatic differentiation."""
        x = x.detach().requires_grad_()
        value = self._augmented(x)
        for _ in range(order):
            value = -torch.autograd.grad(value.sum(), x, create_graph=True)[0] / self.profiles.speed2(x)
        return value.detach()

    def _invert(self, x: Tensor) -> np.ndarray:
        """f₁ at the energies Q = Ψ(r) of the radii exp(x)."""
        power = 1.5 - self.beta
        order = math.floor(power)
        lam = power - order
        factor = 2**self.beta / ((2 * math.pi) ** 1.5 * math.gamma(1 - lam) * math.gamma(1 - self.beta))
        if lam == 0:
            return factor * self._derivative(x, order).numpy()
        # ∫ over x' = x + y with dg⁽ⁿ⁾; y = exp(t − e⁻ᵗ) makes a trapezium sum of the singular integral exact,
        # if it begins where y^(1−λ) is nothing.
        t = torch.arange(-math.log(36 / (1 - lam)), 4.0, 0.07, dtype=torch.float64)
        log_y = t - torch.exp(-t)
        y = torch.exp(log_y.clamp_min(-600.0))
        weight = torch.exp((1 - lam) * log_y) * (1 + torch.exp(-t)) * 0.07
        start = torch.cat([torch.zeros(1, dtype=torch.float64), y[:-1]])
        # Q − Ψ as a sum of positive terms: the plain difference would have no digits left near y = 0
        inner = start[:, None] + 0.5 * (y - start)[:, None] * torch.from_numpy(_NODES + 1)
        drop = self.profiles.speed2(x[:, None, None] + inner) @ torch.from_numpy(_WEIGHTS)
        fall = torch.cumsum(0.5 * (y - start) * drop, -1) / y
        there = x[:, None] + y
        growth = self._derivative(there, order + 1) * self.profiles.speed2(there)
        return factor * (growth * fall**-lam @ weight).numpy()

    def _rise_and_depth(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.profiles.rise(x), self.profiles.depth(x)

    # -- phase space -----------------------------------------------------------------------------------

    def _integrals(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, Ψ(0) − Q and L² of states (*, 6)."""
        x, v = w[..., :3], w[..., 3:]
        log_r = 0.5 * x.square().sum(-1).clamp_min(1e-40).log()
        momentum2 = torch.linalg.cross(x, v).square().sum(-1)
        kinetic = 0.5 * (v.square().sum(-1) + momentum2 * self._inverse_r_a2)
        rise, depth = self._rise_and_depth(log_r)
        return depth - kinetic, rise + kinetic, momentum2

    def log_prob(self, w: Tensor) -> Tensor:
        """Give ln f(w), normalised so that ∫ f d³x d³v = 1, in ln[kpc⁻³ (km/s)⁻³]; −∞ where f = 0.

        Arguments:
            w: States (x, y, z, v_x, v_y, v_z) in kpc and km/s, shape (*, 6).

        Returns:
            Shape (*), float64.
        """
        energy, complement, momentum2 = self._integrals(torch.as_tensor(w, dtype=torch.float64))
        inside = energy > 0
        safe = torch.where(inside, energy, torch.ones_like(energy))
        value = self._log_f1(torch.log(complement / safe))
        if self.beta:
            value = value - self.beta * momentum2.log()
        return torch.where(inside, value, torch.full_like(value, -torch.inf))

    def score(self, w: Tensor) -> Tensor:
        """(∂ₓ ln f, ∂ᵥ ln f) in 1/kpc and 1/(km/s), by the chain rule through Q and L; NaN where f = 0.

        Arguments:
            w: States, shape (*, 6).

        Returns:
            Shape (*, 6), float64.
        """
        w = torch.as_tensor(w, dtype=torch.float64)
        x, v = w[..., :3], w[..., 3:]
        energy, complement, momentum2 = self._integrals(w)
        inside = energy > 0
        safe = torch.where(inside, energy, torch.ones_like(energy))
        _, slope = self._log_f1.value_and_slope(torch.log(complement / safe))
        by_energy = -slope * (1 / complement + 1 / safe)
        by_energy = torch.where(inside, by_energy, torch.full_like(by_energy, torch.nan)).unsqueeze(-1)
        along = (x * v).sum(-1, keepdim=True)
        momentum_x = 2 * (v.square().sum(-1, keepdim=True) * x - along * v)
        momentum_v = 2 * (x.square().sum(-1, keepdim=True) * v - along * x)
        by_momentum = -0.5 * self._inverse_r_a2 * by_energy
        if self.beta:
            by_momentum = by_momentum - self.beta / momentum2.unsqueeze(-1)
        acceleration = self.potential_field.acceleration(x)
        return torch.cat(
            [
                by_energy * acceleration + by_momentum * momentum_x,
                -by_energy * v + by_momentum * momentum_v,
            ],
            -1,
        )

    # -- profiles --------------------------------------------------------------------------------------

    def number_density(self, x: Tensor) -> Tensor:
        """n(x) = ∫ f d³v in kpc⁻³, shape (*), for x of shape (*, 3)."""
        return self.tracer.mass_density(x) / self.profiles.total

    def anisotropy(self, r: np.ndarray) -> np.ndarray:
        """β(r) = 1 − σ_t²/(2σ_r²) at radii in kpc, shape (*)."""
        u = np.asarray(r, dtype=float) ** 2 * self._inverse_r_a2
        return np.asarray((u + self.beta) / (u + 1))

    def radial_dispersion(self, r: np.ndarray) -> np.ndarray:
        """σ_r(r) in km/s from the Jeans equation, independent of f: σ_r² = ∫ᵣ^∞ g GM/r² dr / g."""
        x = torch.log(torch.as_tensor(np.asarray(r, dtype=float)))
        return torch.exp(0.5 * (self._log_pressure(x) - self._augmented(x).log())).numpy()

    # -- samples ---------------------------------------------------------------------------------------

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw n independent states from f, exactly.

        Arguments:
            n: Number of stars.
            seed: Int, ``numpy.random.SeedSequence`` or ``Generator``.

        Returns:
            States in kpc and km/s, shape (n, 6), float64.
        """
        rng = np.random.default_rng(seed)
        radius = self.profiles.radius_of_mass(rng.uniform(1e-15, 1 - 1e-15, n))
        direction = rng.standard_normal((n, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        x = torch.from_numpy(radius[:, None] * direction)
        return torch.cat([x, self.sample_velocity(x, 1, rng)[0]], -1)

    def sample_velocity(self, x: Tensor, n: int, seed: Seed) -> Tensor:
        """Draw n velocities from p(v|x) at every place, exactly.

        With v_r = u c and v_t √(1 + r²/r_a²) = u √(1 − c²), Q = Ψ − u²/2 depends on u alone and
        (1 + c)/2 is Beta(1−β₀, 1−β₀); u²/2 is drawn by rejection from a piecewise envelope of f₁.

        Arguments:
            x: Positions in kpc, shape (*, 3); not the centre itself.
            n: Velocities per position.
            seed: Int, ``numpy.random.SeedSequence`` or ``Generator``.

        Returns:
            Velocities in km/s, shape (n, *, 3), float64.
        """
        rng = np.random.default_rng(seed)
        x = torch.as_tensor(x, dtype=torch.float64)
        places = np.tile(x.cpu().numpy().reshape(-1, 3), (n, 1))
        radius = np.linalg.norm(places, axis=1)
        kinetic = np.empty(len(places))
        for start in range(0, len(places), _CHUNK):
            part = slice(start, start + _CHUNK)
            kinetic[part] = self._kinetic(radius[part], rng)
        speed = np.sqrt(2 * kinetic)
        cosine = 2 * rng.beta(1 - self.beta, 1 - self.beta, len(places)) - 1
        outward = places / radius[:, None]
        across = np.cross(outward, rng.standard_normal((len(places), 3)))
        across /= np.linalg.norm(across, axis=1, keepdims=True)
        tangential = speed * np.sqrt((1 - cosine**2) / (1 + radius**2 * self._inverse_r_a2))
        v = (speed * cosine)[:, None] * outward + tangential[:, None] * across
        return torch.from_numpy(v.reshape(n, *x.shape)).to(x.device)

    def _envelope(self, rise: np.ndarray, log_f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bins of Ψ(0) − Q and a ceiling of ln f₁ in each: the last bin reaches to Q = 0."""
        edges = rise[::_BIN]
        highest = [log_f[i : i + _BIN + 1].max() for i in range(0, len(rise), _BIN)]
        return edges, np.array(highest) + 0.02  # the spline may swing a little between its nodes

    def _kinetic(self, radius: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw k = u²/2 from p(k|r) ∝ k^(1/2−β₀) f₁(Ψ − k)."""
        rise, depth = (a.numpy()[:, None] for a in self._rise_and_depth(torch.from_numpy(np.log(radius))))
        power = 1.5 - self.beta
        # Below the first edge f₁ is that of the first bin: less than one star in 10⁹ is born there.
        edges = np.concatenate([np.zeros((len(radius), 1)), np.clip(self._edges - rise, 0, depth), depth], 1)
        ceiling = np.concatenate([self._ceiling[:1], self._ceiling])
        volume = np.diff(edges**power, axis=1)
        top = np.where(volume > 0, ceiling, -np.inf).max(1, keepdims=True)
        total = np.cumsum(volume * np.exp(np.minimum(ceiling - top, 0.0)), axis=1)
        out = np.empty(len(radius))
        left = np.arange(len(radius))
        while left.size:
            goal = rng.random(left.size) * total[left, -1]
            index = (total[left] <= goal[:, None]).sum(1).clip(max=volume.shape[1] - 1)
            low = edges[left, index]
            k = (low**power + rng.random(left.size) * volume[left, index]) ** (1 / power)
            energy = np.maximum(depth[left, 0] - k, 1e-300)
            log_f = self._log_f1(torch.from_numpy(np.log((rise[left, 0] + k) / energy))).numpy()
            accepted = rng.random(left.size) < np.exp(log_f - ceiling[index])
            out[left[accepted]] = k[accepted]
            left = left[~accepted]
        return out
