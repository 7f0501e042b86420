"""A checked figure, and when it is far enough from what it should be to say so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

__all__ = ["FALSE_ALARMS", "Finding", "judge"]

FALSE_ALARMS = 0.01
"""Chance that a right model is flagged by any of its checks; each alone may do so that much more rarely."""


@dataclass(frozen=True)
class Finding:
    """One figure.

    Attributes:
        value: What was found; of a mean square, with the square's own noise taken off.
        error: Its standard error.
        expected: What a right model gives; None for a figure that has no such value.
        tolerance: A deviation so small is no fault, however well it is measured.
        square: Whether value and error are of a mean square: it is judged as such, and shown as its root.
    """

    value: float
    error: float
    expected: float | None = None
    tolerance: float = 0.05
    square: bool = False

    def row(self, deviations: float) -> dict[str, Any]:
        """Value, error, expectation, allowed deviation and verdict, for that many standard errors."""
        value, error = float(self.value), float(self.error)
        if self.square:
            limit = self.tolerance**2 + deviations * error
            ok: bool | None = value <= limit
            allowed: float | None = math.sqrt(limit)
            # d√q = dq / 2√q, and where the square is lost in its noise the root of that noise.
            error = 0.5 * error / math.sqrt(max(value, error, 1e-30))
            value = math.sqrt(max(value, 0.0))
        elif self.expected is None:
            ok, allowed = None, None
        else:
            allowed = self.tolerance + deviations * error
            ok = abs(value - self.expected) <= allowed
        if not math.isfinite(value):
            ok = False
        return {"value": value, "error": error, "expected": self.expected, "allowed": allowed, "ok": ok}


def judge(findings: Mapping[str, Finding]) -> dict[str, dict[str, Any]]:
    """Rows {value, error, expected, allowed, ok} of all checks of a model.

    A check fails when its deviation exceeds the tolerance by more standard errors than chance explains:
    the quantile of `FALSE_ALARMS` divided by the number of checks (Bonferroni), so that looking at many does
    not make an alarm of the largest.
    """
    count = sum(f.expected is not None for f in findings.values())
    deviations = NormalDist().inv_cdf(1.0 - 0.5 * FALSE_ALARMS / max(count, 1))
    return {name: finding.row(deviations) for name, finding in findings.items()}
