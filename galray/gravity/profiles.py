"""Halo profiles fitted to dark matter densities: NFW, generalised NFW and Einasto, spherical or flattened.

The density is A s(m)/s(R₀) with the spheroidal radius m² = R² + (z/q)² and A the density in the plane at R₀:

    nfw      s = (m/r_s)⁻¹ (1 + m/r_s)⁻²                Navarro, Frenk & White 1997, ApJ 490, 493
    gnfw     s = (m/r_s)^(−γ) (1 + m/r_s)^(γ−3)         Zhao 1996, MNRAS 278, 488
    einasto  s = exp{−(2/α)[(m/r_s)^α − 1]}             Einasto 1965; r_s is where the slope is −2

A ball of a few kpc fixes A and one slope, not r_s, γ and α one by one: these carry priors, and a fit says of
every parameter how much of its prior's variance the data took away.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from galray.errors import GalrayError
from galray.gravity.poisson import Kernel
from galray.gravity.settings import HaloSettings, ProfileName
from galray.gravity.splines import to_numpy

__all__ = ["HaloFit", "HaloPosterior", "ProfileFitter", "fit_profile"]

Array = NDArray[np.float64]

_SMALLEST_EIGENVALUE = 1e-4
"""Directions in which the data's correlation matrix claims less are not believed."""

SYMBOLS = {"density": "ρ(R₀)", "scale_radius": "r_s", "slope": "γ", "index": "α", "flattening": "q"}
UNITS = {
    "density": "solMass / kpc3",
    "scale_radius": "kpc",
    "slope": "",
    "index": "",
    "flattening": "",
}
_LOGARITHMIC = ("scale_radius", "index", "flattening")


@dataclass(frozen=True)
class HaloFit:
    """The most probable profile, and a Gaussian approximation of its posterior.

    Attributes:
        profile: ``nfw``, ``gnfw`` or ``einasto``.
        names: Free parameters, of ``density`` (A, Msun/kpc³), ``scale_radius`` (kpc), ``slope`` (γ),
            ``index`` (α), ``flattening`` (q).
        theta: Their values, shape (p,); scale radius, index and flattening as natural logarithms.
        covariance: Of theta, shape (p, p).
        prior: For each free parameter (mean, standard deviation) of theta; infinite for the density.
        fixed: Parameters that were held, in their own units.
        chi2: Of the densities alone, without the priors.
        dof: Their number less the parameters that the data decided (a number that need not be whole).
        reference_radius: R₀ in kpc.
    """

    profile: ProfileName
    names: tuple[str, ...]
    theta: Array
    covariance: Array
    prior: dict[str, tuple[float, float]]
    fixed: dict[str, float]
    chi2: float
    dof: float
    reference_radius: float

    def value(self, name: str) -> float:
        """A parameter in its own unit."""
        if name in self.fixed:
            return self.fixed[name]
        return _natural(name, float(self.theta[self.names.index(name)]))

    def error(self, name: str) -> float:
        """Standard error of a parameter in its own unit (of a logarithm times the value); 0 if held."""
        if name in self.fixed:
            return 0.0
        i = self.names.index(name)
        scale = self.value(name) if name in _LOGARITHMIC else 1.0
        return float(scale * np.sqrt(self.covariance[i, i]))

    def learned(self, name: str) -> float:
        """Part of the prior's variance that the data took away: 1 is a measurement, 0 the prior again."""
        i = self.names.index(name)
        return float(1 - self.covariance[i, i] / self.prior[name][1] ** 2)

    def mass_density(self, x: Any) -> Array:
        """ρ in Msun/kpc³ at positions (*, 3), or at radii in the plane (*), in kpc; shape (*)."""
        return _density(self.profile, self._parameters(self.theta), _spheroid(x), self.reference_radius)

    def mass_density_error(self, x: Any) -> Array:
        """Standard error of ρ at the same places, by linear propagation."""
        rows = []
        for i, sigma in enumerate(np.sqrt(np.diag(self.covariance))):
            step = np.zeros_like(self.theta)
            step[i] = 1e-3 * sigma
            up, down = (
                _density(self.profile, self._parameters(t), _spheroid(x), self.reference_radius)
                for t in (self.theta + step, self.theta - step)
            )
            rows.append((up - down) / (2 * step[i]))
        jacobian = np.stack(rows, -1)
        return np.sqrt(np.einsum("...i,ij,...j->...", jacobian, self.covariance, jacobian))

    def _parameters(self, theta: Array) -> dict[str, float]:
        return self.fixed | {n: _natural(n, float(t)) for n, t in zip(self.names, theta, strict=True)}

    def rows(self) -> list[dict[str, Any]]:
        """A row per free parameter: value, error, unit, prior (in its own unit) and what the data added."""
        out = []
        for name in self.names:
            mean, sigma = self.prior[name]
            flat = not math.isfinite(sigma)
            centre = _natural(name, mean)
            out.append(
                {
                    "profile": self.profile,
                    "parameter": name,
                    "symbol": SYMBOLS[name],
                    "value": self.value(name),
                    "error": self.error(name),
                    "unit": UNITS[name],
                    "prior": None if flat else centre,
                    "prior_error": None if flat else sigma * (centre if name in _LOGARITHMIC else 1.0),
                    "learned": self.learned(name),
                }
            )
        return out


@dataclass(frozen=True)
class HaloPosterior:
    """Samples of the posterior.

    Attributes:
        samples: Per free parameter, values in its own unit, shape (draws,).
        acceptance: Mean acceptance of the walkers.
        autocorrelation: Longest autocorrelation time, in steps; trust the samples if steps exceed 50 of it.
        steps: Steps per walker that were kept.
    """

    samples: dict[str, Array]
    acceptance: float
    autocorrelation: float
    steps: int = field(default=0)

    def quantiles(self, name: str, q: tuple[float, ...] = (0.16, 0.5, 0.84)) -> tuple[float, ...]:
        """Quantiles of one parameter."""
        return tuple(float(v) for v in np.quantile(self.samples[name], q))


class ProfileFitter:
    """Densities with their covariance, a profile and its priors: what is minimised and what is sampled.

    Arguments:
        x: Positions (n, 3) in kpc, or radii (n,) in the plane.
        density: Dark matter densities (n,) in Msun/kpc³.
        covariance: Their covariance (n, n), baryons included, or variances (n,).
        profile: ``nfw``, ``gnfw`` or ``einasto``.
        settings: The priors; a prior of width 0 holds the parameter.
        kernel: The kernel that smoothed the densities; the profile is smoothed with it too.
        reference_radius: R₀ in kpc.

    Raises:
        GalrayError: Shapes do not fit, values are not finite, or there are fewer densities than two.
    """

    def __init__(
        self,
        x: Any,
        density: Any,
        covariance: Any,
        profile: ProfileName = "nfw",
        settings: HaloSettings | None = None,
        *,
        kernel: Kernel | None = None,
        reference_radius: float = 8.122,
    ) -> None:
        settings = settings or HaloSettings()
        self.profile: ProfileName = profile
        self.density = to_numpy(density).astype(np.float64)
        self.reference_radius = float(reference_radius)
        radius, height = _spheroid(x)
        covariance = to_numpy(covariance).astype(np.float64)
        covariance = np.diag(covariance) if covariance.ndim == 1 else covariance
        n = self.density.size
        if radius.shape != (n,) or covariance.shape != (n, n):
            raise GalrayError(
                f"{n} densities at {radius.size} positions with a covariance of shape {covariance.shape}",
                "give one position and one row of covariance for each density",
            )
        if n < 2:
            raise GalrayError(f"{n} densities for a halo profile", "give two positions or more")
        if not (np.isfinite(self.density).all() and np.isfinite(covariance).all()):
            raise GalrayError("a density or its covariance is not finite", "leave that position out")
        self.whitener = _whitener(covariance)
        if kernel is None:
            self.places, self.node_weights = (radius[:, None], height[:, None]), np.ones(1)
        else:
            if np.ndim(to_numpy(x)) != 2:
                raise GalrayError("a kernel needs positions in three dimensions", "give x of shape (n, 3)")
            # Halo profiles bend over many kpc: few nodes average them over the kernel to 1e-5.
            coarse = Kernel(kernel.h, kernel.truncate, radial_nodes=3, polar_nodes=4, azimuthal_nodes=4)
            keep = coarse.weights.numpy() > 0
            nodes = to_numpy(x)[:, None, :] + coarse.offsets.numpy()[keep]
            self.places, self.node_weights = _spheroid(nodes), coarse.weights.numpy()[keep]
        self.prior, self.fixed = _priors(profile, settings)
        self.names = ("density", *self.prior)
        self.prior = {"density": (0.0, math.inf), **self.prior}
        self._mean = np.array([self.prior[n][0] for n in self.names])
        self._weight = np.array([1 / self.prior[n][1] for n in self.names])

    def model(self, theta: Any) -> Array:
        """The profile's (smoothed) densities at the data's positions, shape (n,)."""
        p = self.fixed | {n: _natural(n, float(t)) for n, t in zip(self.names, theta, strict=True)}
        return _density(self.profile, p, self.places, self.reference_radius) @ self.node_weights

    def residuals(self, theta: Any) -> Array:
        """Whitened residuals of the densities, then of the priors; half their squares' sum is −log P."""
        theta = np.asarray(theta, dtype=np.float64)
        data = self.whitener @ (self.model(theta) - self.density)
        return np.concatenate([data, ((theta - self._mean) * self._weight)[1:]])

    def log_posterior(self, theta: Any) -> float:
        """Logarithm of likelihood times prior, up to a constant; −∞ outside the bounds."""
        low, high = self._bounds()
        theta = np.asarray(theta, dtype=np.float64)
        if (theta <= low).any() or (theta >= high).any():
            return -math.inf
        return float(-0.5 * np.sum(self.residuals(theta) ** 2))

    def _bounds(self) -> tuple[Array, Array]:
        low, high = np.full(len(self.names), -np.inf), np.full(len(self.names), np.inf)
        if "slope" in self.names:
            i = self.names.index("slope")
            low[i], high[i] = -0.5, 2.5
        return low, high

    def fit(self) -> HaloFit:
        """The most probable parameters, by non-linear least squares with the priors as data."""
        start = self._mean.copy()
        unit = np.concatenate([[1.0], start[1:]])
        shape = self.whitener @ self.model(unit)
        start[0] = (shape @ (self.whitener @ self.density)) / (shape @ shape)
        scale = abs(start[0]) or 1.0
        low, high = self._bounds()
        # in units of the first amplitude, so that all parameters are of order one
        factor = np.concatenate([[scale], np.ones(len(start) - 1)])
        found = least_squares(
            lambda p: self.residuals(p * factor), start / factor, bounds=(low / factor, high / factor)
        )
        theta = found.x * factor
        inverse = np.linalg.pinv(found.jac.T @ found.jac, rcond=1e-14, hermitian=True)
        covariance = inverse * np.outer(factor, factor)
        n = self.density.size
        decided = sum(1 - covariance[i, i] * self._weight[i] ** 2 for i in range(len(theta)))
        return HaloFit(
            profile=self.profile,
            names=self.names,
            theta=theta,
            covariance=covariance,
            prior=self.prior,
            fixed=self.fixed,
            chi2=float(np.sum(self.residuals(theta)[:n] ** 2)),
            dof=float(n - decided),
            reference_radius=self.reference_radius,
        )

    def sample(
        self, *, num_walkers: int = 32, num_steps: int = 2000, burn: int = 500, seed: int = 0
    ) -> HaloPosterior:
        """Sample the posterior with emcee (Foreman-Mackey et al. 2013, PASP 125, 306).

        Arguments:
            num_walkers: Walkers, started in a ball of the Gaussian approximation.
            num_steps: Steps per walker that are kept.
            burn: Steps that are thrown away first.
            seed: Of the walkers' start and moves.

        Raises:
            GalrayError: emcee is not installed.
        """
        try:
            emcee = importlib.import_module("emcee")
        except ImportError:
            raise GalrayError(
                "sampling a profile's posterior needs emcee, which is not installed",
                "pip install galray[emcee], or use the Gaussian approximation of fit()",
            ) from None
        fit = self.fit()
        rng = np.random.default_rng(seed)
        start = rng.multivariate_normal(fit.theta, 0.1 * fit.covariance, size=num_walkers)
        low, high = self._bounds()
        start = np.clip(start, low + 1e-6, high - 1e-6)
        sampler = emcee.EnsembleSampler(num_walkers, len(fit.theta), self.log_posterior)
        sampler.random_state = np.random.RandomState(int(rng.integers(2**31))).get_state()
        sampler.run_mcmc(start, burn + num_steps, progress=False)
        chain = sampler.get_chain(discard=burn, flat=True)
        return HaloPosterior(
            samples={n: _natural(n, chain[:, i]) for i, n in enumerate(self.names)},
            acceptance=float(np.mean(sampler.acceptance_fraction)),
            autocorrelation=float(np.max(sampler.get_autocorr_time(discard=burn, tol=0))),
            steps=num_steps,
        )


def fit_profile(
    x: Any,
    density: Any,
    covariance: Any,
    profile: ProfileName = "nfw",
    settings: HaloSettings | None = None,
    *,
    kernel: Kernel | None = None,
    reference_radius: float = 8.122,
) -> HaloFit:
    """Fit one profile: `ProfileFitter` and its `fit`, with the same arguments."""
    fitter = ProfileFitter(
        x, density, covariance, profile, settings, kernel=kernel, reference_radius=reference_radius
    )
    return fitter.fit()


def _natural(name: str, theta: Any) -> Any:
    return np.exp(theta) if name in _LOGARITHMIC else theta


def _spheroid(x: Any) -> tuple[Array, Array]:
    """Cylindrical radius and height of positions (*, 3), or of radii (n,) in the plane."""
    x = to_numpy(x).astype(np.float64)
    if x.ndim >= 2 and x.shape[-1] == 3:
        return np.hypot(x[..., 0], x[..., 1]), x[..., 2]
    return x, np.zeros_like(x)


def _density(profile: ProfileName, p: dict[str, float], places: tuple[Array, Array], r0: float) -> Array:
    m = np.hypot(places[0], places[1] / p["flattening"])
    ratio = _log_shape(profile, p, m) - _log_shape(profile, p, np.asarray(r0))
    return p["density"] * np.exp(ratio)


def _log_shape(profile: ProfileName, p: dict[str, float], m: Array) -> Array:
    s = m / p["scale_radius"]
    if profile == "einasto":
        return -2 / p["index"] * (s ** p["index"] - 1)
    gamma = p["slope"] if profile == "gnfw" else 1.0
    return -gamma * np.log(s) - (3 - gamma) * np.log1p(s)


def _priors(
    profile: ProfileName, settings: HaloSettings
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Priors of the free shape parameters (of the logarithm where one is used), and the fixed ones."""
    given = {"scale_radius": settings.scale_radius_kpc, "flattening": settings.flattening}
    if profile == "gnfw":
        given["slope"] = settings.inner_slope
    if profile == "einasto":
        given["index"] = settings.einasto_index
    free, fixed = {}, {}
    for name, (centre, sigma) in given.items():
        if sigma == 0:
            fixed[name] = float(centre)
        else:
            free[name] = (math.log(centre) if name in _LOGARITHMIC else float(centre), float(sigma))
    return free, fixed


def _whitener(covariance: Array) -> Array:
    """W with W C Wᵀ = 1, small eigenvalues of the correlation matrix raised to what can be believed."""
    sigma = np.sqrt(np.diag(covariance))
    if not (sigma > 0).all():
        raise GalrayError("a density has no error", "give every density a positive variance")
    values, vectors = np.linalg.eigh(covariance / np.outer(sigma, sigma))
    values = np.maximum(values, _SMALLEST_EIGENVALUE * values[-1])
    return (vectors / np.sqrt(values)).T / sigma
