"""Hamiltonian Monte Carlo with many chains side by side, and its convergence diagnostics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from galray.dwarf.settings import SamplerSettings

__all__ = ["Chains", "effective_sample_size", "sample", "split_rhat"]

LogProb = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chains:
    """What the sampler did.

    Attributes:
        draws: Positions, shape (steps, chains, size).
        log_prob: Of each, shape (steps, chains).
        accept: Mean acceptance probability after warm-up.
        divergent: Part of the kept trajectories that lost the energy by more than 50.
        rhat: Split R-hat of each parameter, rank-normalised, shape (size,).
        ess: Effective number of samples of each parameter, shape (size,).
        evaluations: Gradients of the log posterior, counted per chain.
    """

    draws: Tensor
    log_prob: Tensor
    accept: float
    divergent: float
    rhat: np.ndarray
    ess: np.ndarray
    evaluations: int


def _gradient(log_prob: LogProb, q: Tensor) -> tuple[Tensor, Tensor]:
    q = q.detach().requires_grad_(True)
    value = log_prob(q)
    (gradient,) = torch.autograd.grad(value.sum(), q)
    bad = ~torch.isfinite(value) | ~torch.isfinite(gradient).all(-1)
    value = torch.where(bad, torch.full_like(value, -torch.inf), value.detach())
    return value, torch.where(bad[:, None], torch.zeros_like(gradient), gradient)


def climb(log_prob: LogProb, start: Tensor, steps: int = 80, rate: float = 0.15) -> tuple[Tensor, Tensor]:
    """Adam on every chain towards a mode; returns the positions (C, size) and values (C,)."""
    q = start.clone()
    first, second = torch.zeros_like(q), torch.zeros_like(q)
    best, best_value = q.clone(), torch.full((len(q),), -torch.inf, dtype=q.dtype)
    for i in range(steps):
        value, gradient = _gradient(log_prob, q)
        better = value > best_value
        best[better], best_value[better] = q[better], value[better]
        first = 0.9 * first + 0.1 * gradient
        second = 0.98 * second + 0.02 * gradient**2
        pace = rate * 0.5 * (1 + math.cos(math.pi * i / steps)) + 1e-3
        q = q + pace * (first / (1 - 0.9 ** (i + 1))) / ((second / (1 - 0.98 ** (i + 1))).sqrt() + 1e-8)
    return best, best_value


def _newton(log_prob: LogProb, q: Tensor, value: float, steps: int = 12) -> tuple[Tensor, Tensor, float]:
    """Damped Newton steps to the mode; returns it, (size,), the metric's square root and the value there.

    First-order climbing stalls where widths differ by a factor of hundreds, as they do with 10,000 stars.
    """
    size, offset = len(q), 1e-3
    shifts = torch.cat([offset * torch.eye(size, dtype=q.dtype), -offset * torch.eye(size, dtype=q.dtype)])
    metric = torch.eye(size, dtype=q.dtype)
    fractions = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.03], dtype=q.dtype)
    for _ in range(steps):
        _, gradients = _gradient(log_prob, torch.cat([q + shifts, q[None]]))
        metric = _root((gradients[size : 2 * size] - gradients[:size]) / (2 * offset))
        move = metric @ (metric.T @ gradients[-1])
        trials = q + fractions[:, None] * move
        heights, _ = _gradient(log_prob, trials)
        best = int(heights.argmax())
        gain = float(heights[best]) - value
        if gain > 0:
            q, value = trials[best], float(heights[best])
        if gain < 1e-2:
            break
    return q, metric, value


def _root(precision: Tensor) -> Tensor:
    precision = 0.5 * (precision + precision.T)
    values, vectors = torch.linalg.eigh(precision)
    # the prior alone gives 1: less curvature than a quarter of it is noise or a flank, not a width
    return vectors * values.clamp_min(0.25).rsqrt()


def sample(log_prob: LogProb, start: Tensor, settings: SamplerSettings, seed: int) -> Chains:
    """Sample a log density whose scale is of order 1 (standard normal priors).

    The chains climb to the mode from their starts, take the Laplace approximation there as a metric, set out
    again overdispersed about it, and move by Hamiltonian trajectories of random length; half-way through the
    warm-up the metric becomes the chains' own pooled covariance.

    Arguments:
        log_prob: (C, size) → (C,), differentiable.
        start: Where the climb begins, shape (chains, size).
        settings: The sampler's settings.
        seed: Of every random number.
    """
    generator = torch.Generator().manual_seed(seed % (2**63))
    count, size = start.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    climbed, heights = climb(log_prob, start)
    mode, metric, height = _newton(log_prob, climbed[heights.argmax()], float(heights.max()))
    evaluations = 80 + 12 * 2 * size // count
    q = mode + 1.2 * normal(count, size) @ metric.T
    value, gradient = _gradient(log_prob, q)
    worst = value < height - 0.5 * size - 30  # where the Laplace form has no support: from the mode
    if bool(worst.any()):
        q = torch.where(worst[:, None], mode + 0.1 * normal(count, size) @ metric.T, q)
        value, gradient = _gradient(log_prob, q)

    step, averaged, memory = 0.5 / size**0.25, 0.0, 0.0
    log_step = math.log(step)
    centre = math.log(4 * step)
    since = 0
    kept, kept_value, accepts, divergences = [], [], [], 0
    history: list[Tensor] = []
    half = settings.warmup // 2
    for i in range(settings.warmup + settings.draws):
        warming = i < settings.warmup
        length = int(torch.randint(1, 2 * settings.leapfrog, (1,), generator=generator))
        jitter = 0.8 + 0.4 * float(torch.rand(1, generator=generator))
        epsilon = jitter * math.exp(log_step)
        momentum = normal(count, size)
        energy = -value + 0.5 * momentum.square().sum(-1)
        x, g, v = q, gradient, value
        p = momentum + 0.5 * epsilon * g @ metric
        for j in range(length):
            x = x + epsilon * p @ metric.T
            v, g = _gradient(log_prob, x)
            p = p + (epsilon if j < length - 1 else 0.5 * epsilon) * g @ metric
        evaluations += length
        loss = -v + 0.5 * p.square().sum(-1) - energy
        loss = torch.where(torch.isfinite(loss), loss, torch.full_like(loss, torch.inf))
        chance = torch.exp(-loss.clamp_min(0.0))
        accepted = torch.rand(count, generator=generator, dtype=torch.float64) < chance
        q = torch.where(accepted[:, None], x, q)
        value = torch.where(accepted, v, value)
        gradient = torch.where(accepted[:, None], g, gradient)
        if warming:
            # dual averaging of ln ε (Hoffman & Gelman 2014, algorithm 5)
            since += 1
            memory += settings.target_accept - float(chance.mean())
            log_step = centre - math.sqrt(since) / 0.05 * memory / (since + 10)
            weight = since**-0.75
            averaged = weight * log_step + (1 - weight) * averaged
            history.append(q)
            if i == half and size > 1:
                pooled = torch.cat(history[half // 2 :])
                covariance = torch.cov(pooled.T)
                covariance = covariance + 1e-3 * torch.diag(torch.diag(covariance))
                metric = torch.linalg.cholesky(covariance)
                centre, since, memory, averaged = math.log(0.8 / size**0.25), 0, 0.0, 0.0
                log_step = centre
            if i == settings.warmup - 1:
                log_step = averaged
        else:
            kept.append(q)
            kept_value.append(value)
            accepts.append(float(chance.mean()))
            divergences += int((loss > 50).sum())
    draws = torch.stack(kept)
    return Chains(
        draws=draws,
        log_prob=torch.stack(kept_value),
        accept=float(np.mean(accepts)),
        divergent=divergences / (settings.draws * count),
        rhat=split_rhat(draws.numpy()),
        ess=effective_sample_size(draws.numpy()),
        evaluations=evaluations,
    )


def _ranked(draws: np.ndarray) -> np.ndarray:
    """Normal scores of the ranks over all chains, per parameter."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    flat = draws.reshape(-1, draws.shape[-1])
    ranks = rankdata(flat, axis=0)
    return ndtri((ranks - 0.375) / (len(flat) + 0.25)).reshape(draws.shape)


def split_rhat(draws: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat of draws (steps, chains, size): 1 where the chains agree.

    References:
        Vehtari et al. 2021, Bayesian Analysis 16, 667.
    """
    half = len(draws) // 2
    halves = np.concatenate([draws[:half], draws[half : 2 * half]], 1)
    scores = _ranked(halves)
    within = scores.var(0, ddof=1).mean(0)
    between = half * scores.mean(0).var(0, ddof=1)
    return np.sqrt((half - 1) / half + between / (half * within))


def effective_sample_size(draws: np.ndarray) -> np.ndarray:
    """Effective number of independent draws of (steps, chains, size), by Geyer's initial positive pairs."""
    steps, chains, size = draws.shape
    centred = draws - draws.mean(0)
    padded = np.fft.rfft(centred, 2 * steps, axis=0)
    covariance = np.fft.irfft(padded * padded.conj(), axis=0)[:steps] / steps
    within = covariance[0].mean(0) * steps / (steps - 1)
    pooled = (steps - 1) / steps * within
    if chains > 1:
        pooled = pooled + draws.mean(0).var(0, ddof=1)
    correlation = 1 - (within - covariance.mean(1)) / np.maximum(pooled, 1e-300)
    result = np.empty(size)
    for k in range(size):
        pairs = correlation[0 : 2 * (steps // 2) : 2, k] + correlation[1 : 2 * (steps // 2) : 2, k]
        negative = np.flatnonzero(pairs < 0)
        pairs = pairs[: negative[0]] if len(negative) else pairs
        time = max(
            2 * np.minimum.accumulate(pairs).sum() - 1 if len(pairs) else 1.0, 1 / math.log10(steps * chains)
        )
        result[k] = steps * chains / time
    return result
