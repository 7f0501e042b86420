"""Values with their error budget: terms, covariance, bands widened for small numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galray.ensemble.variance import student_factor, welch_satterthwaite

__all__ = ["Estimate", "Term"]

Array = NDArray[np.float64]

_TINY = 1e-300


@dataclass(frozen=True)
class Term:
    """One term of a budget.

    Arguments:
        covariance: Best estimate `(Q, Q)`, without allowance for the small number of members.
        count: Members or blocks it was estimated from.
        dof: Degrees of freedom of its variances `(Q,)`; infinite for a term taken from elsewhere.
    """

    covariance: Array
    count: int
    dof: Array

    @property
    def variance(self) -> Array:
        """Variances `(Q,)`."""
        return np.diag(self.covariance).copy()


@dataclass(frozen=True)
class Estimate:
    """Values with their error budget.

    Errors are one-sigma bands that hold 68 %: the sum of the terms, widened by Student's t where few
    members stand behind them. The same factor is shared by all terms of a quantity, so that the terms'
    squares add up to the total's.

    Arguments:
        method: Family, or "combined".
        value: Values `(Q,)`.
        terms: The terms by name.
        bias: Shift under redrawn measurement errors `(Q,)`: an estimate of how far the values are off
            because the stars are measured with error; None without redraws. Already subtracted if
            `bias_corrected`.
        bias_corrected: Whether the bias was subtracted from the values.
        missing: Terms that could not be estimated for want of members.
        excluded: Members left out, with the reason, by member name.
        weights: Weights of the methods `(M, Q)` of a combined estimate.
        methods: Names that go with the weights.
    """

    method: str
    value: Array
    terms: dict[str, Term]
    bias: Array | None = None
    bias_corrected: bool = False
    missing: tuple[str, ...] = ()
    excluded: dict[str, str] = field(default_factory=dict)
    weights: Array | None = None
    methods: tuple[str, ...] = ()

    @property
    def dof(self) -> Array:
        """Effective degrees of freedom of the total variances `(Q,)`."""
        if not self.terms:
            return np.full(len(self.value), np.inf)
        terms = list(self.terms.values())
        return welch_satterthwaite([t.variance for t in terms], [t.dof for t in terms])

    @property
    def factor(self) -> Array:
        """Widening of each quantity's band for the small number of members `(Q,)`."""
        return student_factor(self.dof)

    @property
    def covariance(self) -> Array:
        """Total covariance `(Q, Q)`, widened."""
        total = np.zeros((len(self.value), len(self.value)))
        for term in self.terms.values():
            total += term.covariance
        return total * np.outer(self.factor, self.factor)

    @property
    def error(self) -> Array:
        """Total errors `(Q,)`."""
        return np.sqrt(np.diag(self.covariance))

    def term_error(self, name: str) -> Array:
        """Give one term's errors `(Q,)`, widened like the total."""
        return np.sqrt(self.terms[name].variance) * self.factor

    def term_uncertainty(self, name: str) -> Array:
        """Give the standard error of one term's error `(Q,)`: σ/√(2ν) of ν degrees of freedom.

        Arguments:
            name: A term, or "total".
        """
        error, dof = (
            (self.error, self.dof) if name == "total" else (self.term_error(name), self.terms[name].dof)
        )
        return error / np.sqrt(2.0 * np.maximum(dof, 0.5))

    def with_term(self, name: str, covariance: Array, count: int = 1, dof: float = np.inf) -> Estimate:
        """Add a term from elsewhere, such as the baryons' error.

        Arguments:
            name: Its name.
            covariance: Covariance `(Q, Q)`, or variances `(Q,)`.
            count: Draws behind it.
            dof: Degrees of freedom of its variances.
        """
        covariance = np.asarray(covariance, dtype=float)
        if covariance.ndim == 1:
            covariance = np.diag(covariance)
        term = Term(covariance, count, np.full(len(self.value), float(dof)))
        return replace(self, terms=self.terms | {name: term})

    def shifted(self, shift: Array) -> Estimate:
        """Give the estimate with its values shifted by known amounts `(Q,)`."""
        return replace(self, value=self.value + shift)

    def inflated(self, factors: Array, outside: Sequence[str] = ()) -> Estimate:
        """Multiply the errors of each quantity by a factor `(Q,)`, every term alike but those `outside`."""
        terms = {
            name: term
            if name in outside
            else replace(term, covariance=term.covariance * np.outer(factors, factors))
            for name, term in self.terms.items()
        }
        return replace(self, terms=terms)

    def transform(self, matrix: Array) -> Estimate:
        """Give linear combinations of the quantities (averages, differences) with their budget.

        Arguments:
            matrix: Coefficients `(P, Q)`.
        """
        matrix = np.atleast_2d(np.asarray(matrix, dtype=float))
        share = np.abs(matrix)
        terms = {}
        for name, term in self.terms.items():
            # The band of an average rests on its parts' variances: their dof, weighted by what they add.
            part = share**2 * term.variance + _TINY
            inverse = (part / term.dof).sum(axis=1) / part.sum(axis=1)
            with np.errstate(divide="ignore"):
                dof = 1.0 / inverse
            terms[name] = Term(matrix @ term.covariance @ matrix.T, term.count, dof)
        bias = None if self.bias is None else matrix @ self.bias
        return replace(self, value=matrix @ self.value, terms=terms, bias=bias, weights=None)

    def rows(self, names: Sequence[str], units: Sequence[str]) -> list[dict[str, Any]]:
        """Give the budget as table rows: quantity, method, term, value, uncertainty, count, dof, bias, unit.

        Arguments:
            names: Names of the quantities, Q of them.
            units: Their units.
        """
        rows: list[dict[str, Any]] = []
        for q, (name, unit) in enumerate(zip(names, units, strict=True)):
            common: dict[str, Any] = {"quantity": name, "method": self.method, "unit": unit}
            for term_name, term in self.terms.items():
                bias = self.bias[q] if term_name == "measurement" and self.bias is not None else None
                rows.append(
                    common
                    | {
                        "term": term_name,
                        "value": float(self.term_error(term_name)[q]),
                        "uncertainty": float(self.term_uncertainty(term_name)[q]),
                        "count": term.count,
                        "dof": float(term.dof[q]) if np.isfinite(term.dof[q]) else None,
                        "bias": None if bias is None else float(bias),
                    }
                )
            dof = self.dof[q]
            rows.append(
                common
                | {
                    "term": "total",
                    "value": float(self.error[q]),
                    "uncertainty": float(self.term_uncertainty("total")[q]),
                    "count": max((term.count for term in self.terms.values()), default=0),
                    "dof": float(dof) if np.isfinite(dof) else None,
                    "bias": None,
                }
            )
        return rows
