"""Several methods that measured the same quantities from the same stars, combined into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from galray.ensemble.estimate import Estimate, Term
from galray.ensemble.settings import BudgetSettings
from galray.ensemble.variance import (
    effective_number,
    group_numbers,
    moderate,
    shrink_correlation,
    welch_satterthwaite,
)
from galray.errors import GalrayError

__all__ = ["combine_methods"]

Array = NDArray[np.float64]

_TINY = 1e-300
_OWN = ("network", "hyperparameters", "penalty")
"""Terms that are each method's own: independent between methods."""
_STEADY_DOF = 8.0
"""Degrees of freedom that smooth the variances by which methods are weighed."""


def combine_methods(
    estimates: Sequence[Estimate],
    *,
    groups: Sequence[str] | None = None,
    settings: BudgetSettings | None = None,
) -> Estimate:
    """Combine methods that measured the same quantities from the same stars, with random effects.

    What comes of the networks (seeds, hyperparameters) or of a spline's penalty is independent between
    methods; every other term is taken as fully correlated between them, because the stars are the same, so
    averaging does not reduce it. What the methods differ by beyond those independent errors is the variance
    between methods, τ² (by moments, as in DerSimonian & Laird 1986, Control. Clin. Trials 7, 177, pooled
    over similar quantities), and enters as the term "method". Weights go as the inverse of each method's
    whole variance, floored at half the median and capped, so that no accidentally small variance takes
    everything.

    Arguments:
        estimates: One per method, same Q quantities.
        groups: Kind of each quantity, as in `combine_family`.
        settings: How to combine.

    Returns:
        The combined estimate; with a single method, its own under the name "combined".
    """
    settings = settings or BudgetSettings()
    if not estimates:
        raise GalrayError("there is no method to combine", "run at least one of flow, score and moments")
    if len(estimates) == 1:
        only = estimates[0]
        return replace(
            only,
            method="combined",
            weights=np.ones((1, len(only.value))),
            methods=(only.method,),
            missing=tuple(dict.fromkeys((*only.missing, "method"))),
        )
    values = np.array([estimate.value for estimate in estimates])
    methods, quantities = values.shape
    labels = group_numbers(groups, quantities)
    zero = np.zeros((methods, quantities))
    own = {name: _stack(estimates, name, zero) for name in _OWN}
    network = sum((variance for variance, _ in own.values()), zero)
    common = list(dict.fromkeys(n for e in estimates for n in e.terms if n not in _OWN))
    shared = {name: _stack(estimates, name, zero)[0] for name in common}
    whole = network + sum(shared.values(), zero)

    # Between-method variance from equal weights at first: it must not depend on accidental ones.
    scale = np.sqrt(np.maximum(whole.mean(axis=0), _TINY))
    independent = np.mean(
        [effective_number(_root(e.terms, quantities) / scale, labels) for e in estimates], axis=0
    )
    raw = values.var(axis=0, ddof=1) - network.mean(axis=0)
    between, between_dof = moderate(raw, methods - 1, scale, labels, independent, settings.prior_dof)
    between = np.maximum(between, 0.0)

    variance = np.maximum(_steady(whole, np.array([e.dof for e in estimates]), labels) + between, _TINY)
    variance = np.maximum(variance, 0.5 * np.median(variance, axis=0))
    weights = _cap(1.0 / variance, max(settings.max_weight, 1.0 / methods))

    value = np.sum(weights * values, axis=0)
    terms: dict[str, Term] = {}
    for name, (variances, dofs) in own.items():
        have = [(w, e.terms[name]) for w, e in zip(weights, estimates, strict=True) if name in e.terms]
        if have:
            matrix = sum((np.outer(w, w) * term.covariance for w, term in have), np.zeros((quantities,) * 2))
            dof = welch_satterthwaite(list(weights**2 * variances), list(dofs))
            terms[name] = Term(matrix, sum(term.count for _, term in have), dof)
    for name in common:
        terms[name] = _shared_term(estimates, name, weights)
    root = [_root(e.terms, quantities) for e in estimates]
    typical = shrink_correlation(np.mean([shrink_correlation(r.T @ r) for r in root], axis=0))
    sigma = np.sqrt(between * np.sum(weights**2, axis=0))
    terms["method"] = Term(typical * np.outer(sigma, sigma), methods, between_dof)
    shifts = [e.bias for e in estimates]
    known = [shift for shift in shifts if shift is not None]
    bias = np.sum(weights * np.array(known), axis=0) if len(known) == methods else None
    return Estimate(
        method="combined",
        value=value,
        terms=terms,
        bias=bias,
        bias_corrected=all(e.bias_corrected for e in estimates),
        missing=tuple(dict.fromkeys(name for e in estimates for name in e.missing)),
        excluded={name: reason for e in estimates for name, reason in e.excluded.items()},
        weights=weights,
        methods=tuple(e.method for e in estimates),
    )


def _stack(estimates: Sequence[Estimate], name: str, zero: Array) -> tuple[Array, Array]:
    """Variances and dof of one term `(M, Q)`; zero and infinite where a method has none."""
    variances, dofs = zero.copy(), np.full(zero.shape, np.inf)
    for place, estimate in enumerate(estimates):
        if name in estimate.terms:
            variances[place] = estimate.terms[name].variance
            dofs[place] = estimate.terms[name].dof
    return variances, dofs


def _shared_term(estimates: Sequence[Estimate], name: str, weights: Array) -> Term:
    """A term that all methods have in common, so that averaging does not reduce it: Σ wₘ sₘ².

    A method that has no estimate of the term is given the mean of the others'.
    """
    have = [e.terms[name] for e in estimates if name in e.terms]
    mean = np.mean([term.variance for term in have], axis=0)
    total, spread = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for weight, estimate in zip(weights, estimates, strict=True):
        term = estimate.terms.get(name)
        part = weight * (term.variance if term is not None else mean)
        total += part
        if term is not None:
            spread += part**2 / np.maximum(term.dof, 1.0)
    dof = np.where(spread > 0, total**2 / np.where(spread > 0, spread, 1.0), np.inf)
    sigma = np.sqrt(total)
    matrix = np.mean([shrink_correlation(term.covariance, 0.0) for term in have], axis=0)
    return Term(shrink_correlation(matrix) * np.outer(sigma, sigma), sum(t.count for t in have), dof)


def _steady(variance: Array, dof: Array, labels: NDArray[np.int64]) -> Array:
    """Variances `(M, Q)` to weigh methods by, with the accidents of few members smoothed out.

    Weights that follow the noise of a variance prefer the values whose error is underestimated; so each
    method's variance, relative to the methods' mean, is drawn towards its mean over similar quantities.
    """
    typical = np.maximum(variance.mean(axis=0), _TINY)
    relative = variance / typical
    steady = relative.copy()
    for group in np.unique(labels):
        mask = labels == group
        known = np.minimum(dof[:, mask], 1e6)
        pooled = relative[:, mask].mean(axis=1, keepdims=True)
        steady[:, mask] = (known * relative[:, mask] + _STEADY_DOF * pooled) / (known + _STEADY_DOF)
    # And towards each other: a method of few members may not claim to be much better than the rest.
    few = np.minimum(dof, 1e6)
    return typical * (few * steady + _STEADY_DOF) / (few + _STEADY_DOF)


def _root(terms: Mapping[str, Term], quantities: int) -> Array:
    """A square root of an estimate's whole covariance, as rows of deviations `(Q, Q)`."""
    total = np.zeros((quantities, quantities))
    for term in terms.values():
        total += term.covariance
    eigenvalues, vectors = np.linalg.eigh(total)
    return (vectors * np.sqrt(np.clip(eigenvalues, 0.0, None))).T * np.sqrt(quantities)


def _cap(weights: Array, largest: float) -> Array:
    """Normalise weights `(M, Q)` over the methods with none above `largest`."""
    weights = weights / weights.sum(axis=0)
    for _ in range(len(weights)):
        over = weights > largest
        if not over.any():
            break
        capped = np.where(over, largest, weights)
        free = np.where(over, 0.0, weights)
        room = 1.0 - np.where(over, capped, 0.0).sum(axis=0)
        weights = np.where(over, largest, free * room / np.maximum(free.sum(axis=0), _TINY))
    return weights / weights.sum(axis=0)
