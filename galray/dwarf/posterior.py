"""The posterior of a spherical galaxy: samples of its profiles, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.dwarf.jeans import JeansSolver
from galray.dwarf.model import GalaxyModel
from galray.dwarf.projection import cylinder_weights, interpolation_matrix
from galray.errors import GalrayError

__all__ = ["HaloPosterior"]


class HaloPosterior:
    """S samples of a galaxy; every profile method gives shape (S, k) for k radii in kpc.

    Arguments:
        model: What the parameters mean.
        samples: Unconstrained parameters q, shape (S, model.size).
        stretch: Distance of each sample over the nominal one, shape (S,): radii scale with it, masses too.
        diagnostics: Convergence and counts, plain JSON values.
        log_likelihood: Of each sample, shape (S,), or none.
        name: The galaxy.
    """

    def __init__(
        self,
        model: GalaxyModel,
        samples: Tensor,
        stretch: Tensor | None = None,
        diagnostics: dict[str, Any] | None = None,
        log_likelihood: Tensor | None = None,
        name: str = "galaxy",
    ) -> None:
        self.model = model
        self.samples = samples.detach().to(torch.float64)
        self.stretch = torch.ones(len(samples), dtype=torch.float64) if stretch is None else stretch
        self.diagnostics = dict(diagnostics or {})
        self.log_likelihood = log_likelihood
        self.name = name
        self.parameters = model.values(self.samples)
        self._profiles = model.profiles(self.parameters)
        self._cache: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def half_radius(self) -> float:
        """Projected half-light radius of the data in kpc, at the nominal distance."""
        return self.model.half_radius

    @property
    def nuisance(self) -> dict[str, np.ndarray]:
        """Samples of the parameters beside the profiles: v_sys, foreground fraction and so on, (S,) each."""
        return {p.name: self.parameters[p.name].numpy() for p in self.model.nuisance}

    def _scaled(self, r: Any) -> Tensor:
        """Radii at the nominal distance, shape (S, k)."""
        r = np.atleast_1d(np.asarray(r, dtype=np.float64))
        if not (r > 0).all():
            raise GalrayError(f"a radius of {r.min():g} kpc has no profile", "give positive radii in kpc")
        return torch.from_numpy(r) / self.stretch[:, None]

    def _evaluate(self, log_values: Tensor, r: Any) -> Tensor:
        """Interpolate samples of a quantity on the grid, (S, grid), to the radii of each sample."""
        scaled = self._scaled(r)
        grid = self.model.grid
        if bool((self.stretch == 1).all()):
            return log_values @ torch.from_numpy(interpolation_matrix(grid, scaled[0].numpy())).T
        matrix = torch.from_numpy(interpolation_matrix(grid, scaled.numpy()))
        return torch.einsum("sk,smk->sm", log_values, matrix)

    def _on_grid(self, quantity: str) -> Tensor:
        if quantity not in self._cache:
            self._fill()
        return self._cache[quantity]

    def _fill(self) -> None:
        p = self._profiles
        solver = JeansSolver(self.model.grid, self.model.half_radius * np.geomspace(0.01, 40.0, 90))
        mass = solver.enclosed(torch.exp(p.log_density), p.halo_slopes[..., 0])
        radial2, _ = solver.radial_moments(p.log_number, mass, p.anisotropy)
        moments = solver.moments(p.log_number, mass, p.anisotropy)
        # stars per kpc³, normalised to one star within the grid
        total = torch.exp(p.log_number) @ torch.from_numpy(
            cylinder_weights(self.model.grid, 0.999 * self.model.grid[-1])
        )
        self._cache = {
            "mass": torch.log(mass),
            "radial2": torch.log(radial2.clamp_min(1e-300)),
            "number": p.log_number - torch.log(total)[:, None],
            "surface": torch.log(moments.surface) - torch.log(total)[:, None],
            "los2": torch.log(moments.los2),
            "kurtosis": moments.los4 / moments.los2**2,
        }

    def density(self, r: Any) -> np.ndarray:
        """ρ(r) of the halo in Msun/kpc³."""
        # exact: the profile is analytic, only its distance scale differs by sample
        r_scaled = self._scaled(r)
        return (torch.exp(self._analytic(r_scaled, "halo")) / self.stretch[:, None].square()).numpy()

    def _analytic(self, r: Tensor, which: str) -> Tensor:
        profile = self.model.halo if which == "halo" else self.model.tracer
        slopes = self._profiles.halo_slopes if which == "halo" else self._profiles.tracer_slopes
        first = self.parameters["log_density"] if which == "halo" else torch.zeros(len(self))
        coefficients = torch.cat([first.to(torch.float64)[:, None], slopes], -1)
        if bool((self.stretch == 1).all()):
            return coefficients @ profile.basis(r[0].numpy()).T
        return torch.einsum("sp,smp->sm", coefficients, profile.basis(r.numpy()))

    def mass(self, r: Any) -> np.ndarray:
        """M(<r) of the halo in Msun."""
        return (torch.exp(self._evaluate(self._on_grid("mass"), r)) * self.stretch[:, None]).numpy()

    def slope(self, r: Any) -> np.ndarray:
        """γ(r) = −dln ρ/dln r, positive where the density falls."""
        scaled = self._scaled(r)
        if bool((self.stretch == 1).all()):
            return (self._profiles.halo_slopes @ self.model.halo.slope_basis(scaled[0].numpy()).T).numpy()
        basis = self.model.halo.slope_basis(scaled.numpy())
        return torch.einsum("sp,smp->sm", self._profiles.halo_slopes, basis).numpy()

    def number_density(self, r: Any) -> np.ndarray:
        """n(r) of the stars in kpc⁻³, one star in all."""
        return (torch.exp(self._evaluate(self._on_grid("number"), r)) / self.stretch[:, None] ** 3).numpy()

    def surface_density(self, radius: Any) -> np.ndarray:
        """Σ(R) of the stars in kpc⁻², one star in all."""
        return (
            torch.exp(self._projected(self._on_grid("surface"), radius)) / self.stretch[:, None] ** 2
        ).numpy()

    def dispersion_r(self, r: Any) -> np.ndarray:
        """σ_r(r) in km/s."""
        return torch.exp(0.5 * self._evaluate(self._on_grid("radial2"), r)).numpy()

    def dispersion_los(self, radius: Any) -> np.ndarray:
        """σ_los(R) in km/s."""
        return torch.exp(0.5 * self._projected(self._on_grid("los2"), radius)).numpy()

    def kurtosis_los(self, radius: Any) -> np.ndarray:
        """⟨v_los⁴⟩ / ⟨v_los²⟩² at R, 3 for a Gaussian."""
        return self._projected(self._on_grid("kurtosis"), radius).numpy()

    def _projected(self, values: Tensor, radius: Any) -> Tensor:
        grid = self.model.half_radius * np.geomspace(0.01, 40.0, 90)
        scaled = self._scaled(radius).clamp(float(grid[0]), float(grid[-1]))
        if bool((self.stretch == 1).all()):
            return values @ torch.from_numpy(interpolation_matrix(grid, scaled[0].numpy())).T
        return torch.einsum(
            "sk,smk->sm", values, torch.from_numpy(interpolation_matrix(grid, scaled.numpy()))
        )

    def anisotropy(self, r: Any) -> np.ndarray:
        """β(r)."""
        scaled = self._scaled(r)
        return torch.stack(
            [
                self._profiles.anisotropy.beta(column[:, None])[..., 0]
                if column.ndim == 2
                else self._beta_column(column)
                for column in scaled.T
            ],
            -1,
        ).numpy()

    def _beta_column(self, r: Tensor) -> Tensor:
        a = self._profiles.anisotropy
        s = torch.exp((a.exponent * (torch.log(r) - torch.log(a.radius))).clamp(-200, 200))
        return a.inner + (a.outer - a.inner) * s / (1 + s)

    def half_light_radius(self) -> np.ndarray:
        """Projected half-number radius of each sample's n(r) in kpc, shape (S,)."""
        radii = self.model.half_radius * np.geomspace(0.2, 5.0, 60)
        weights = torch.from_numpy(np.stack([cylinder_weights(self.model.grid, r) for r in radii]))
        inside = torch.exp(self._on_grid("number")) @ weights.T
        log_r = np.log(radii)
        found = [np.interp(0.5, row, log_r) for row in inside.numpy()]
        return np.exp(np.array(found)) * self.stretch.numpy()

    def band(
        self, quantity: str, r: Any, levels: Sequence[float] = (0.025, 0.16, 0.5, 0.84, 0.975)
    ) -> np.ndarray:
        """Quantiles of a profile over the samples, shape (levels, k).

        Arguments:
            quantity: The name of a profile method: ``density``, ``mass``, ``slope``, ``dispersion_los``, …
            r: Radii in kpc.
            levels: Quantiles; the default is the median with its 68 and 95 % bands.

        Raises:
            GalrayError: The quantity is none of these.
        """
        if quantity not in _QUANTITIES:
            raise GalrayError(f"'{quantity}' is no profile", f"choose one of {', '.join(_QUANTITIES)}")
        return np.quantile(getattr(self, quantity)(r), list(levels), axis=0)

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Arrays and string metadata that safetensors stores; `from_arrays` builds the posterior again."""
        arrays = {"samples": self.samples.numpy(), "stretch": self.stretch.numpy()}
        if self.log_likelihood is not None:
            arrays["log_likelihood"] = self.log_likelihood.numpy()
        meta = {
            "model": json.dumps(self.model.to_dict()),
            "diagnostics": json.dumps(self.diagnostics),
            "name": self.name,
        }
        return arrays, meta

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], meta: dict[str, str]) -> HaloPosterior:
        """Build the posterior that `to_arrays` stored."""

        def tensor(key: str) -> Tensor:
            return torch.from_numpy(np.array(arrays[key], dtype=np.float64))

        return cls(
            GalaxyModel.from_dict(json.loads(meta["model"])),
            tensor("samples"),
            tensor("stretch"),
            json.loads(meta["diagnostics"]),
            tensor("log_likelihood") if "log_likelihood" in arrays else None,
            meta["name"],
        )

    def prior(self, count: int = 4000, seed: int = 0) -> HaloPosterior:
        """Draw from the prior of the same model, for Bayes factors and for prior bands."""
        return HaloPosterior(self.model, self.model.draw_prior(count, seed), name=f"{self.name} (prior)")


_QUANTITIES = (
    "density",
    "mass",
    "slope",
    "number_density",
    "surface_density",
    "dispersion_r",
    "dispersion_los",
    "kurtosis_los",
    "anisotropy",
)
