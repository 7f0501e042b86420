"""Is it in equilibrium, and do the inversions agree? Residuals, symmetries, χ², and one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats

from galray.errors import GalrayError
from galray.frame import cylindrical
from galray.gravity.region import as_positions
from galray.gravity.splines import Array, to_numpy
from galray.gravity.steadiness import StellarTest

__all__ = [
    "Agreement",
    "Verdict",
    "agreement",
    "azimuthal_acceleration",
    "boltzmann_residuals",
    "north_south",
    "verdict",
]

_STELLAR = {
    "vertical": "the stars' vertical streaming",
    "radial": "the stars' radial streaming",
    "azimuth": "the stars' velocities ahead of the Sun and behind",
}


def boltzmann_residuals(w: Any, scores: Any, acceleration_field: Any, *, bins: int = 8) -> dict[str, Any]:
    """The Boltzmann residual r = v·sₓ + a·sᵥ = −∂ln f/∂t of the stars, and its map in (R, z).

    Arguments:
        w: States (n, 6).
        scores: ∇log f there, (n, 6).
        acceleration_field: Anything with ``acceleration(x)``.
        bins: Bins along R and along z, at equal numbers of stars.

    Returns:
        ``relative_rms``, |r| over the root sum of squares of its two terms (0 in equilibrium with a perfect
        score; about 1 for unrelated ones); ``median_rate``, the median |r| in 1/Gyr; and ``map``: arrays
        ``radius``, ``z``, ``mean`` (1/Gyr), ``error`` and ``count``, each (bins, bins).
    """
    states, s = to_numpy(w), to_numpy(scores)
    if states.shape != s.shape or states.shape[-1] != 6:
        raise GalrayError(f"states {states.shape} and scores {s.shape}", "both must be (n, 6)")
    a = to_numpy(acceleration_field.acceleration(torch.from_numpy(states[:, :3])))
    streaming, pull = (states[:, 3:] * s[:, :3]).sum(1), (a * s[:, 3:]).sum(1)
    per_gyr = 1.0 / 0.9777922216807891  # km/s/kpc in 1/Gyr is 1/0.97779
    rate = (streaming + pull) * per_gyr
    c = cylindrical(states[:, :3])
    edges = [np.quantile(c[:, k], np.linspace(0, 1, bins + 1)) for k in (0, 2)]
    i, j = (
        np.clip(np.searchsorted(e, c[:, k], side="right") - 1, 0, bins - 1)
        for e, k in zip(edges, (0, 2), strict=True)
    )
    cell = i * bins + j
    count = np.bincount(cell, minlength=bins * bins)
    some = np.maximum(count, 1)

    def mean_of(values: Array) -> Array:
        return np.bincount(cell, values, minlength=bins * bins) / some

    mean = mean_of(rate)
    spread = np.sqrt(np.maximum(mean_of(rate**2) - mean**2, 0))
    return {
        "relative_rms": float(np.sqrt(((streaming + pull) ** 2).mean() / (streaming**2 + pull**2).mean())),
        "median_rate": float(np.median(np.abs(rate))),
        "map": {
            "radius": mean_of(c[:, 0]).reshape(bins, bins),
            "z": mean_of(c[:, 2]).reshape(bins, bins),
            "mean": mean.reshape(bins, bins),
            "error": (spread / np.sqrt(some)).reshape(bins, bins),
            "count": count.reshape(bins, bins),
        },
    }


def azimuthal_acceleration(x: Any, acceleration: Any, covariance: Any = None) -> dict[str, Any]:
    """a_φ against a_R: an axisymmetric Galaxy in equilibrium has none.

    Arguments:
        x: Positions (n, 3).
        acceleration: Accelerations there (n, 3).
        covariance: Of ``acceleration.reshape(-1)``, (3n, 3n).

    Returns:
        ``ratio``: mean a_φ / mean |a_R|, ``error`` (NaN without covariance), ``rms_ratio`` and, with a
        covariance, ``chi2``, ``dof`` and ``p_value`` of a_φ = 0 everywhere.
    """
    positions, a = to_numpy(as_positions(x)).reshape(-1, 3), to_numpy(acceleration).reshape(-1, 3)
    radius = np.hypot(positions[:, 0], positions[:, 1])
    zero = np.zeros(len(radius))
    outward = np.stack([positions[:, 0] / radius, positions[:, 1] / radius, zero], 1)
    along = np.stack([positions[:, 1] / radius, -positions[:, 0] / radius, zero], 1)
    a_r, a_phi = (a * outward).sum(1), (a * along).sum(1)
    scale = float(np.abs(a_r).mean())
    out: dict[str, Any] = {
        "ratio": float(a_phi.mean()) / scale,
        "error": math.nan,
        "rms_ratio": float(np.sqrt((a_phi**2).mean())) / scale,
    }
    if covariance is not None:
        rows = np.zeros((len(radius), 3 * len(radius)))
        for k in range(3):
            rows[np.arange(len(radius)), 3 * np.arange(len(radius)) + k] = along[:, k]
        c = rows @ to_numpy(covariance) @ rows.T
        out["error"] = float(np.sqrt(max(c.mean(), 0.0))) / scale
        out.update(asdict(_chi2(a_phi, c)))
    return out


def north_south(x: Any, acceleration_field: Any, covariance: Any = None) -> dict[str, Any]:
    """a_z(x, y, z) + a_z(x, y, −z), which vanishes in a Galaxy that is symmetric about its plane.

    Arguments:
        x: Positions (n, 3) on one side.
        acceleration_field: Anything with ``acceleration(x)``.
        covariance: Covariance (n, n) of the n sums, where it is known.

    Returns:
        ``relative``: rms of the sum over rms of the difference; with a covariance ``chi2``, ``dof`` and
        ``p_value``.
    """
    x = as_positions(x).reshape(-1, 3)
    mirror = x * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    north = to_numpy(acceleration_field.acceleration(x)[:, 2])
    south = to_numpy(acceleration_field.acceleration(mirror)[:, 2])
    total, difference = north + south, north - south
    out: dict[str, Any] = {
        "relative": float(np.sqrt((total**2).mean() / max((difference**2).mean(), 1e-300))),
    }
    if covariance is not None:
        out.update(asdict(_chi2(total, to_numpy(covariance))))
    return out


@dataclass(frozen=True)
class Agreement:
    """χ² of a set of numbers against zero."""

    chi2: float
    dof: int
    p_value: float


def agreement(first: Any, second: Any, first_covariance: Any, second_covariance: Any) -> Agreement:
    """χ² between two inversions of the same quantities.

    The inversions share their stars, so adding their covariances overstates the error of the difference: the
    test is conservative.

    Arguments:
        first: Values (n,).
        second: Values (n,).
        first_covariance: (n, n), or variances (n,).
        second_covariance: The same.
    """
    difference = to_numpy(first).reshape(-1) - to_numpy(second).reshape(-1)
    total = np.zeros((len(difference), len(difference)))
    for c in (to_numpy(first_covariance), to_numpy(second_covariance)):
        total += np.diag(c) if c.ndim == 1 else c
    return _chi2(difference, total)


def _chi2(values: Array, covariance: Array) -> Agreement:
    """χ² over the directions whose scaled variance exceeds 1e-4: the others are not measured apart."""
    scale = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    eigenvalues, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
    known = eigenvalues > 1e-4
    projected = vectors.T @ (values / scale)
    chi2 = float((projected[known] ** 2 / eigenvalues[known]).sum())
    dof = int(known.sum())
    return Agreement(chi2, dof, float(stats.chi2.sf(chi2, dof)))


@dataclass(frozen=True)
class Verdict:
    """What a reader may quote.

    Attributes:
        level: ``ok``, ``warn`` or ``fail``.
        sentence: One sentence.
        numbers: What it rests on.
    """

    level: Literal["ok", "warn", "fail"]
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """``{"verdict", "level", "numbers"}`` for summary.json."""
        return {"verdict": self.sentence, "level": self.level, "numbers": self.numbers}


def verdict(
    *,
    overidentification: Agreement | None = None,
    azimuthal: dict[str, Any] | None = None,
    asymmetry: dict[str, Any] | None = None,
    agreements: dict[str, Agreement] | None = None,
    stellar: Mapping[str, StellarTest] | None = None,
    solar: dict[str, Any] | None = None,
    figures: Mapping[str, float] | None = None,
    threshold: float = 0.01,
) -> Verdict:
    """Combine the tests into a sentence.

    With m tests the lowest p-value warns below threshold/m (Bonferroni) and fails below a tenth of that.

    Arguments:
        overidentification: χ² of the moments against their solution: more moments than parameters.
        azimuthal: From `azimuthal_acceleration`.
        asymmetry: From `north_south`.
        agreements: Pairs of inversions, by name.
        stellar: From `stellar_tests`.
        solar: From `solar_acceleration`.
        figures: Further numbers to report, without a test.
        threshold: Chance of a warning in equilibrium.
    """
    tests: dict[str, float] = {}
    if overidentification is not None:
        tests["the moments of the stars against one stationary potential"] = overidentification.p_value
    if azimuthal is not None and "p_value" in azimuthal:
        tests["an azimuthal acceleration of zero"] = azimuthal["p_value"]
    if asymmetry is not None and "p_value" in asymmetry:
        tests["symmetry of north and south"] = asymmetry["p_value"]
    for name, result in (agreements or {}).items():
        tests[f"the agreement of {name}"] = result.p_value
    for name, test in (stellar or {}).items():
        tests[_STELLAR[name]] = test.p_value
    if solar is not None:
        tests["the Sun's acceleration against the rotation curve"] = solar["rotation"].p_value
        if "gaia" in solar:
            tests["the Sun's acceleration against Gaia's"] = solar["gaia"].p_value
    numbers = {name: float(p) for name, p in tests.items()}
    for name, test in (stellar or {}).items():
        numbers[f"asymmetry of {_STELLAR[name]}"] = test.amplitude
    if solar is not None:
        numbers["acceleration at the Sun (m/s²)"] = float(solar["a_m_s2"])
        numbers["acceleration at the Sun / (v_c²/R0)"] = float(solar["ratio"])
    numbers.update({name: float(value) for name, value in (figures or {}).items()})
    if azimuthal is not None:
        numbers["a_phi / a_R"] = float(azimuthal["ratio"])
    if asymmetry is not None:
        numbers["north-south asymmetry of a_z"] = float(asymmetry["relative"])
    if not tests:
        return Verdict("warn", "Equilibrium was not tested: no test has errors to test against.", numbers)
    worst = min(tests, key=lambda name: tests[name])
    p = tests[worst]
    size = f"; a_φ is {100 * azimuthal['ratio']:+.1f} % of a_R" if azimuthal is not None else ""
    p = min(1.0, p * len(tests))
    if p >= threshold:
        return Verdict(
            "ok",
            f"Consistent with equilibrium: the weakest of {len(tests)} tests is {worst}, with p = {p:.2g} "
            f"after allowing for their number{size}.",
            numbers,
        )
    level: Literal["warn", "fail"] = "fail" if p < threshold / 10 else "warn"
    word = (
        "Not in equilibrium, or with errors that are too small" if level == "fail" else "Doubtful equilibrium"
    )
    return Verdict(level, f"{word}: {worst} has p = {p:.2g} ({len(tests)} tests){size}.", numbers)
