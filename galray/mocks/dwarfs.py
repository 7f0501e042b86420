"""Dwarf galaxies of known truth: stars of a double power law in a dark halo, among them the Gaia Challenge.

The twelve spherical models of the Gaia Challenge (https://astrowiki.surrey.ac.uk, tests:sphtri:spherical;
Walker & Peñarrubia 2011, ApJ 742, 20) are regenerated from their parameters, with any number of stars.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.mocks.eddington import EddingtonSphere
from galray.mocks.spheres import Seed
from galray.potentials import Composite, DoublePowerLaw, Potential
from galray.units import G

_Profile = Callable[[np.ndarray, np.ndarray], np.ndarray]

__all__ = ["GAIA_CHALLENGE", "DwarfMock", "GaiaChallengeModel", "gaia_challenge"]


class GaiaChallengeModel(NamedTuple):
    """The parameters of one model; the stars are ν ∝ (r/r*)^−γ* [1 + (r/r*)²]^((γ*−5)/2), without mass.

    The tangential models' own notes give the stars' α as 1/α; it is the same shape.
    """

    star_slope: float
    """γ*, inner slope of the stars."""
    star_radius: float
    """r* in kpc."""
    anisotropy_radius: float
    """r_a in kpc of Osipkov–Merritt; infinite for a constant β."""
    beta: float
    """β₀."""
    halo_density: float
    """ρ₀ in Msun/kpc³."""
    halo_radius: float
    """r_DM in kpc."""
    halo_outer_slope: float
    """β_DM; the halo's α is 1."""
    halo_slope: float
    """γ_DM: 0 for a core, 1 for a cusp."""


def _models() -> dict[str, GaiaChallengeModel]:
    models: dict[str, GaiaChallengeModel] = {}
    for stars, slope in (("Plum", 0.1), ("NonPlum", 1.0)):
        core, cusp = (4.0e8, 1.0, 3.0, 0.0), (6.4e7, 1.0, 3.0, 1.0)
        rows = {
            "CoreOm": (0.25, 0.25, 0.0, *core),
            "CuspOm": (0.10, 0.10, 0.0, *cusp),
            "CoreIso": (1.00, math.inf, 0.0, *core),
            "CuspIso": (0.25, math.inf, 0.0, *cusp),
            "CoreTan": (1.75, math.inf, -0.5, 3.021516e7, 4.0, 4.0, 0.0),
            "CuspTan": (0.50, math.inf, -0.5, 2.387329e7, 2.0, 4.0, 1.0),
        }
        models |= {stars + name: GaiaChallengeModel(slope, *row) for name, row in rows.items()}
    return models


GAIA_CHALLENGE: dict[str, GaiaChallengeModel] = _models()
"""The twelve models by name: {Plum, NonPlum} × {Core, Cusp} × {Om, Iso, Tan}."""


def gaia_challenge(name: str) -> DwarfMock:
    """One of the twelve spherical models of the Gaia Challenge, e.g. ``PlumCoreOm``.

    Raises:
        GalrayError: No model has that name.
    """
    if name not in GAIA_CHALLENGE:
        raise GalrayError(f"no Gaia Challenge model '{name}'", f"one of: {', '.join(GAIA_CHALLENGE)}")
    p = GAIA_CHALLENGE[name]
    return DwarfMock(
        DoublePowerLaw(1.0, p.star_radius, 2, 5, p.star_slope),
        DoublePowerLaw(p.halo_density, p.halo_radius, 1, p.halo_outer_slope, p.halo_slope),
        beta=p.beta,
        r_a=p.anisotropy_radius,
        name=name,
    )


class DwarfMock:
    """A spherical dwarf galaxy whose every property is known.

    Arguments:
        stars: The shape of the stars' density.
        halo: The dark halo, spherical with a finite centre.
        beta: β₀, central anisotropy.
        r_a: Anisotropy radius in kpc: β(r) = (r² + β₀ r_a²) / (r² + r_a²).
        stellar_mass: Mass of all stars in Msun; 0 makes them tracers.
        name: What to call it.

    Raises:
        GalrayError: No distribution function f ≥ 0 gives these stars this anisotropy in this halo.
    """

    def __init__(
        self,
        stars: DoublePowerLaw,
        halo: Potential,
        *,
        beta: float = 0.0,
        r_a: float = math.inf,
        stellar_mass: float = 0.0,
        name: str = "",
    ) -> None:
        self.name, self.halo, self.stars = name, halo, stars
        potential = halo
        if stellar_mass:
            shape = (stars.r_s, stars.alpha, stars.beta, stars.gamma)
            mass = DoublePowerLaw(stars.rho_0 * stellar_mass / stars.total_mass, *shape)
            potential = Composite({"halo": halo, "stars": mass})
        self.sphere = EddingtonSphere(stars, potential, beta=beta, r_a=r_a)

    # -- the halo --------------------------------------------------------------------------------------

    def density(self, r: np.ndarray) -> np.ndarray:
        """ρ(r) of the halo in Msun/kpc³ at radii in kpc, shape (*)."""
        return self.halo.mass_density(_on_axis(r)).numpy()

    def mass(self, r: np.ndarray) -> np.ndarray:
        """M(<r) of the halo in Msun, shape (*)."""
        return np.asarray(r, dtype=float) ** 2 * -self.halo.acceleration(_on_axis(r))[..., 0].numpy() / G

    def slope(self, r: np.ndarray) -> np.ndarray:
        """Give −γ = d ln ρ / d ln r of the halo, shape (*)."""
        log_r = torch.as_tensor(np.log(np.asarray(r, dtype=float))).requires_grad_()
        x = torch.stack([log_r.exp(), torch.zeros_like(log_r), torch.zeros_like(log_r)], -1)
        return torch.autograd.grad(self.halo.mass_density(x).log().sum(), log_r)[0].numpy()

    # -- the stars -------------------------------------------------------------------------------------

    def number_density(self, r: np.ndarray) -> np.ndarray:
        """ν(r) of the stars in kpc⁻³, normalised to one star, shape (*)."""
        return self.sphere.number_density(_on_axis(r)).numpy()

    def sigma_r(self, r: np.ndarray) -> np.ndarray:
        """Radial velocity dispersion in km/s, shape (*)."""
        return self.sphere.radial_dispersion(r)

    def beta(self, r: np.ndarray) -> np.ndarray:
        """Anisotropy β(r), shape (*)."""
        return self.sphere.anisotropy(r)

    def surface_density(self, R: np.ndarray) -> np.ndarray:
        """Σ(R) of the stars in kpc⁻², normalised to one star, at projected radii in kpc, shape (*)."""
        return self._along_sight(R, lambda r, s: self.number_density(r))

    def sigma_los(self, R: np.ndarray) -> np.ndarray:
        """Line-of-sight velocity dispersion in km/s at projected radii in kpc, shape (*).

        Σ σ_los² = 2 ∫_R^∞ (1 − β R²/r²) ν σ_r² r dr / √(r² − R²) (Binney & Mamon 1982).
        """

        def pressure(r: np.ndarray, s2: np.ndarray) -> np.ndarray:
            return self.number_density(r) * self.sigma_r(r) ** 2 * (1 - self.beta(r) * s2)

        return np.sqrt(self._along_sight(R, pressure) / self.surface_density(R))

    def projected_fraction(self, R: np.ndarray) -> np.ndarray:
        """The fraction of the stars within projected radii in kpc, shape (*)."""
        R = np.asarray(R, dtype=float)
        t, step = _sinh_grid()
        r = R[..., None] * np.cosh(t)
        # outside R each shell shows the part √(1 − R²/r²) of itself beyond R
        outside = (4 * np.pi * r**3 * self.number_density(r) * np.tanh(t) ** 2) @ step
        return np.asarray(1 - outside)

    @property
    def half_light_radius(self) -> float:
        """The projected radius in kpc that holds half the stars."""
        low, high = 1e-3 * self.sphere.profiles.half_mass_radius, self.sphere.profiles.half_mass_radius
        for _ in range(50):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.projected_fraction(np.array(middle)) < 0.5 else (low, middle)
        return math.sqrt(low * high)

    def _along_sight(self, R: np.ndarray, profile: _Profile) -> np.ndarray:
        """2 ∫_R^∞ profile(r, R²/r²) r dr / √(r² − R²), with r = R cosh t."""
        R = np.asarray(R, dtype=float)
        t, step = _sinh_grid()
        r = R[..., None] * np.cosh(t)
        return np.asarray(2 * (profile(r, np.cosh(t) ** -2 + 0 * r) * r) @ step)

    # -- stars -----------------------------------------------------------------------------------------

    def sample(self, n: int, seed: Seed) -> Tensor:
        """Draw n independent stars, exactly.

        Returns:
            States (x, y, z, v_x, v_y, v_z) in kpc and km/s, shape (n, 6), float64.
        """
        return self.sphere.sample(n, seed)

    def sample_noisy(self, n: int, seed: int, *, velocity_error: float = 2.0) -> Tensor:
        """Draw n stars with Gaussian noise in each velocity component: the Gaia Challenge's ``_err`` form.

        The same seed gives the same stars for every error; columns (0, 1, 5) are what a spectrograph sees,
        (0, 1, 3, 4, 5) what proper motions add.

        Arguments:
            n: Number of stars.
            seed: Root of the random streams.
            velocity_error: Standard deviation in km/s.

        Returns:
            States in kpc and km/s, shape (n, 6), float64.
        """
        stars, noise = np.random.SeedSequence(seed).spawn(2)
        w = self.sample(n, stars)
        w[:, 3:] += velocity_error * torch.from_numpy(np.random.default_rng(noise).standard_normal((n, 3)))
        return w


def _sinh_grid() -> tuple[np.ndarray, np.ndarray]:
    """Nodes t and weights of ∫₀^∞ dt of an even function: the trapezium rule is exact to round-off."""
    step = 0.2  # the nearest singularity lies π/2 off the real axis: an error of exp(−π²/0.2)
    t = step * np.arange(150)
    weight = np.full(len(t), step)
    weight[0] *= 0.5
    return t, weight


def _on_axis(r: np.ndarray) -> Tensor:
    x = np.asarray(r, dtype=float)
    return torch.from_numpy(np.stack([x, 0 * x, 0 * x], -1))
