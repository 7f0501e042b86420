"""Fit a dark halo to a spherical galaxy's stars, and compare cored with cuspy haloes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from galray.dwarf.likelihood import GalaxyLikelihood
from galray.dwarf.posterior import HaloPosterior
from galray.dwarf.sampler import sample
from galray.dwarf.settings import HaloFitSettings
from galray.dwarf.tracers import Tracers
from galray.errors import GalrayError

__all__ = ["HaloComparison", "compare_haloes", "fit_halo", "heldout_log_likelihood"]


def fit_halo(tracers: Tracers, settings: HaloFitSettings | None = None, seed: int = 0) -> HaloPosterior:
    """Sample the posterior of the halo, the stars' density and anisotropy, and the nuisance parameters.

    A positive ρ(r) goes through the spherical Jeans equations to σ_los(R) and the kurtosis of the
    line-of-sight velocities; their likelihood, the likelihood of the positions, and the stated priors are
    sampled together by Hamiltonian Monte Carlo.

    Arguments:
        tracers: The stars.
        settings: None takes the defaults.
        seed: Of every random number.

    Returns:
        The posterior; its ``diagnostics`` hold ``rhat_max``, ``ess_min``, ``accept``, ``divergent``,
        ``converged``, ``seconds`` (wall) and ``cpu_seconds``.

    Raises:
        GalrayError: Bad data, or settings that the data cannot serve.
    """
    settings = settings or HaloFitSettings()
    began, cpu = time.perf_counter(), time.process_time()
    target = GalaxyLikelihood(tracers, settings, seed)
    model = target.model
    start = 0.5 * model.draw_prior(settings.sampler.chains, seed)
    chains = sample(target.log_posterior, start, settings.sampler, seed)
    steps, count, size = chains.draws.shape
    flat = chains.draws.reshape(-1, size)
    value = chains.log_prob.reshape(-1) - model.log_prior(flat)
    keep = np.unique(np.linspace(0, len(flat) - 1, min(settings.sampler.samples, len(flat))).astype(int))
    rhat, ess = float(chains.rhat.max()), float(chains.ess.min())
    diagnostics = {
        "stars": len(target.tracers),
        "parameters": size,
        "chains": count,
        "draws": steps,
        "rhat_max": rhat,
        "ess_min": ess,
        "worst_parameter": model.free[int(chains.rhat.argmax())].name,
        "accept": chains.accept,
        "divergent": chains.divergent,
        "converged": bool(rhat < 1.05 and ess > 100),
        "gradient_evaluations": chains.evaluations * count,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }
    return HaloPosterior(
        model,
        flat[keep],
        _stretch(tracers, len(keep), seed),
        diagnostics,
        value[keep],
        tracers.name,
    )


def _stretch(tracers: Tracers, count: int, seed: int) -> Tensor:
    """Distances drawn from their error, over the nominal one.

    A galaxy's angles and velocities do not change with its assumed distance: r → s r, M → s M, ρ → ρ/s².
    """
    if tracers.distance_kpc is None or tracers.distance_error_kpc == 0:
        return torch.ones(count, dtype=torch.float64)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0xD157]))
    relative = tracers.distance_error_kpc / tracers.distance_kpc
    return torch.from_numpy(np.exp(relative * rng.standard_normal(count)))


def heldout_log_likelihood(
    posterior: HaloPosterior, tracers: Tracers, most: int = 400, seed: int = 0
) -> np.ndarray:
    """Give ln of the posterior mean of p(v | R) for stars that were not fitted, shape (n,).

    Where stars count by their membership, one of next to none tells nothing and has 0.

    Arguments:
        posterior: Of a fit to other stars of the same galaxy.
        tracers: The held-out stars.
        most: Posterior samples used.
        seed: Of the fit: where the centre has an error, both draw the same centre.
    """
    target = GalaxyLikelihood(tracers, posterior.model.settings, seed, posterior.model)
    rows = np.unique(np.linspace(0, len(posterior) - 1, min(most, len(posterior))).astype(int))
    with torch.no_grad():
        parts = [target.log_likelihood_stars(q) for q in posterior.samples[rows].split(50)]
    result = np.zeros(len(tracers))
    result[target.rows] = (torch.logsumexp(torch.cat(parts), 0) - math.log(len(rows))).numpy()
    return result


@dataclass(frozen=True)
class HaloComparison:
    """Cored against cuspy haloes on held-out stars.

    Attributes:
        cored: Σ ln p of all stars, each predicted by cored haloes fitted without it.
        cuspy: The same of cuspy haloes.
        difference: cored − cuspy; positive favours a core.
        error: Standard error of the difference, from its scatter from star to star.
    """

    cored: float
    cuspy: float
    difference: float
    error: float


def compare_haloes(
    tracers: Tracers,
    settings: HaloFitSettings | None = None,
    seed: int = 0,
    folds: int = 2,
    cored: tuple[float, float] = (-0.3, 0.4),
    cuspy: tuple[float, float] = (0.7, 1.4),
) -> HaloComparison:
    """Cross-validate haloes whose inner slope is bound to a core against haloes bound to a cusp.

    Arguments:
        tracers: The stars.
        settings: None takes the defaults; ``halo.inner_slope`` is replaced.
        seed: Of every random number; both haloes share it.
        folds: Parts of the stars, each held out once.
        cored: Range of γ inside the first knot that counts as a core.
        cuspy: Range that counts as a cusp.

    Raises:
        GalrayError: Fewer than two folds, or too few stars in one.
    """
    if folds < 2:
        raise GalrayError(f"folds = {folds} hold no star out", "use 2 or more")
    settings = settings or HaloFitSettings()
    fold = np.random.default_rng(np.random.SeedSequence([seed, 0xF01D])).permutation(len(tracers)) % folds
    scores = np.zeros((2, len(tracers)))
    for k, limits in enumerate((cored, cuspy)):
        halo = settings.halo.model_copy(update={"inner_slope": limits})
        bound = settings.model_copy(update={"halo": halo})
        for part in range(folds):
            posterior = fit_halo(tracers.subset(fold != part), bound, seed)
            scores[k, fold == part] = heldout_log_likelihood(
                posterior, tracers.subset(fold == part), seed=seed
            )
    gap = scores[0] - scores[1]
    return HaloComparison(
        cored=float(scores[0].sum()),
        cuspy=float(scores[1].sum()),
        difference=float(gap.sum()),
        error=float(gap.std(ddof=1) * math.sqrt(len(gap))),
    )
