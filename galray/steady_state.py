"""Is a run's sample in equilibrium? Everything the verdict of a run rests on, and what it costs in error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from galray import gravity
from galray.catalog import ShardStore
from galray.ensemble import Estimate, MemberSpec
from galray.ensemble.fields import member_fields
from galray.frame import cylindrical
from galray.results import Places

__all__ = ["disturbance_sizes", "field_checks", "residual_maps", "stars_of", "verdict", "with_disturbances"]

NUM_TEST_STARS = 500_000
NUM_RESIDUAL_STARS = 20_000
_RESIDUAL_BINS = 8
NUM_FIELD_CHECKS = 64
_CHECKS = {
    "curl": "curl of a(x), relative",
    "divergence": "flux of a(x) against its own density, relative",
    "ahead and behind": "a(x) ahead of the Sun against behind, relative",
}


def stars_of(store: ShardStore) -> np.ndarray:
    """States of whole shards, which are random parts of the sample, up to `NUM_TEST_STARS` rows."""
    total = np.cumsum(store.shard_rows)
    number = max(1, int(np.searchsorted(total, NUM_TEST_STARS, side="right")))
    return store.states(range(number), dtype=np.float64)


def disturbance_sizes(
    estimates: Mapping[str, Estimate],
    places: Places,
    tests: Mapping[str, gravity.StellarTest],
    num_stars: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """What disequilibrium, a bar or spiral arms may have done to each kind of quantity.

    Arguments:
        estimates: Of every method and combined.
        places: Where the run measured.
        tests: Of the stars, from `galray.gravity.stellar_tests`.
        num_stars: How many were tested.

    Returns:
        By method, disturbance and kind of quantity: the error, alike at all places.
    """
    names = [q.name for q in places.quantities]
    out = {}
    for method, estimate in estimates.items():
        errors = gravity.disturbance_error(names, estimate.value, tests, num_stars)
        out[method] = {
            cause: dict(zip(names, error.tolist(), strict=True)) for cause, error in errors.items()
        }
    return out


def with_disturbances(estimate: Estimate, names: Sequence[str], errors: Mapping[str, np.ndarray]) -> Estimate:
    """Add to a budget what disturbances may have done to the result.

    Arguments:
        estimate: Of one method, or combined.
        names: Kind of each quantity.
        errors: One error per quantity, for each disturbance.
    """
    same = np.array(names)[:, None] == np.array(names)
    for cause, error in errors.items():
        # one cause, of unknown shape: alike within a kind of quantity, not from kind to kind
        estimate = estimate.with_term(cause, np.where(same, np.outer(error, error), 0.0))
    return estimate


def residual_maps(folder: Path, specs: Sequence[MemberSpec], w: np.ndarray) -> dict[str, dict[str, Any]]:
    """Boltzmann residuals of each network family's base member at some of the stars.

    Arguments:
        folder: The run directory.
        specs: Its design.
        w: States (n, 6).

    Returns:
        For each family that has one, what `galray.gravity.boltzmann_residuals` gives.
    """
    from galray.phasespace import load_model

    some = w[:NUM_RESIDUAL_STARS]
    out: dict[str, dict[str, Any]] = {}
    for spec in specs:
        home = folder / "members" / f"{spec.index:03d}"
        if spec.varied != "base" or spec.family in out:
            continue
        if not ((home / "model").is_dir() and (home / "field").exists()):
            continue
        model, field = load_model(home / "model"), gravity.load_field(home / "field")
        model = model.double()
        scores = torch.cat([model.score(chunk).detach() for chunk in torch.from_numpy(some).split(8192)])
        out[spec.family] = gravity.boltzmann_residuals(some, scores, field, bins=_RESIDUAL_BINS)
    return out


def field_checks(folder: Path, w: np.ndarray, kernel: gravity.Kernel) -> dict[str, dict[str, float]]:
    """Is each inversion's field the gradient of one potential, and alike ahead of the Sun and behind?

    Arguments:
        folder: The run directory.
        w: States (n, 6); the fields are looked at where some of them are, clear of the border.
        kernel: Of the run's densities.

    Returns:
        For each method: ``curl``, ``divergence`` where the field knows its density
        (`galray.gravity.curl_and_divergence`), and ``ahead and behind`` (`galray.gravity.ahead_and_behind`).
    """
    reach = (1.05 * kernel.reach[0], 1.05 * kernel.reach[1], 1.05 * kernel.reach[2])
    x = torch.from_numpy(w[: 20 * NUM_FIELD_CHECKS, :3])
    out: dict[str, dict[str, float]] = {}
    for method, members in member_fields(folder).items():
        field = next(f for spec, f in members if spec.varied == "base")
        clear = x[field.region.contains_kernel(x, reach)][:NUM_FIELD_CHECKS]
        if not len(clear):
            continue
        out[method] = gravity.curl_and_divergence(clear, field, kernel)
        mirrored = clear * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
        both = clear[field.region.contains(mirrored)]
        out[method]["ahead and behind"] = gravity.ahead_and_behind(both, field)["relative"]
    return out


def residual_cells(residuals: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ``maps.parquet``: the mean residual in 1/Gyr over a grid of (R, z)."""
    cells = []
    for family, found in residuals.items():
        grid = found["map"]
        # cells hold equal numbers of stars; drawn at the mean R of their column and the mean z of their row
        for i, u in enumerate(np.nanmean(grid["radius"], 1)):
            for j, v in enumerate(np.nanmean(grid["z"], 0)):
                row = {"map": "R-z", "quantity": "residual", "method": family, "u": float(u), "v": float(v)}
                value, error = float(grid["mean"][i, j]), float(grid["error"][i, j])
                cells.append(row | {"value": value, "error": error})
    return cells


def verdict(
    places: Places,
    estimates: dict[str, Estimate],
    moments: dict[str, Any],
    *,
    tests: Mapping[str, gravity.StellarTest] | None = None,
    residuals: Mapping[str, dict[str, Any]] | None = None,
    checks: Mapping[str, Mapping[str, float]] | None = None,
    truth: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Is the sample in equilibrium, and do the inversions agree? Numbers, a level and a sentence.

    Arguments:
        places: Where the run measured.
        estimates: Of every method and combined, without the terms of disturbances: those are what is tested.
        moments: Outcome of the moments stage: ``chi2``, ``num_moments``, ``effective_dof``; or empty.
        tests: Of the stars.
        residuals: From `residual_maps`.
        checks: From `field_checks`.
        truth: Of a mock: its circular velocity is what the Sun's acceleration is compared with.
    """
    table = [i for i, q in enumerate(places.quantities) if q.profile is None]

    def rows(*names: str) -> list[int]:
        return [i for i in table if places.quantities[i].name in names]

    def chi2(values: np.ndarray, covariance: np.ndarray) -> gravity.Agreement:
        return gravity.agreement(values, np.zeros_like(values), covariance, np.zeros_like(covariance))

    combined = estimates["combined"]
    over = None
    if moments:
        dof = round(moments["num_moments"] - moments["effective_dof"])
        over = gravity.Agreement(moments["chi2"], dof, float(stats.chi2.sf(moments["chi2"], dof)))
    a_phi, a_r = rows("a_phi"), rows("a_R")
    along = chi2(combined.value[a_phi], combined.covariance[np.ix_(a_phi, a_phi)])
    scale = np.abs(combined.value[a_r]).mean()
    azimuthal = None
    if along.dof:  # potentials that assume axial symmetry have no azimuthal acceleration to test
        azimuthal = {"ratio": float(combined.value[a_phi].mean() / scale), "p_value": along.p_value}

    a_z = {p: i for i in rows("a_z") if (p := places.quantities[i].position) is not None}
    pairs = [(i, a_z[(x, y, -z)]) for (x, y, z), i in a_z.items() if z > 0 and (x, y, -z) in a_z]
    both = np.zeros((len(pairs), len(places.quantities)))
    for k, (north, south) in enumerate(pairs):
        both[k, [north, south]] = 1.0
    total = both @ combined.value
    size = np.abs(combined.value[[i for pair in pairs for i in pair]]).mean()
    asymmetry = {
        "relative": float(np.sqrt((total**2).mean()) / (2 * size)),
        "p_value": chi2(total, both @ combined.covariance @ both.T).p_value,
    }
    agreements = {}
    names = [name for name in estimates if name != "combined"]
    compared = rows("a_R", "a_z")
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            one, other = estimates[first], estimates[second]
            agreements[f"{first} and {second}"] = gravity.agreement(
                one.value[compared],
                other.value[compared],
                one.covariance[np.ix_(compared, compared)],
                other.covariance[np.ix_(compared, compared)],
            )
    found = gravity.verdict(
        overidentification=over,
        azimuthal=azimuthal,
        asymmetry=asymmetry,
        agreements=agreements,
        stellar=tests,
        solar=_solar(places, combined, a_r, truth),
        figures={
            f"Boltzmann residual of the {family}, relative": r["relative_rms"]
            for family, r in (residuals or {}).items()
        }
        | {f"{_CHECKS[name]}, {m}": v for m, c in (checks or {}).items() for name, v in c.items()},
    )
    return found.to_dict()


def _solar(
    places: Places, combined: Estimate, a_r: list[int], truth: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The acceleration at the place nearest to the Sun."""
    sun = np.array(places.frame.sun_position)
    at = [(float(np.linalg.norm(np.array(places.quantities[i].position) - sun)), i) for i in a_r]
    if not at or min(at)[0] > 0.1:
        return None
    i = min(at)[1]
    known: dict[str, Any] = {}
    if truth is not None:
        known = {"circular_velocity": (float(truth["sun"]["circular_velocity_km_s"]), 0.0), "gaia": None}
    radius = float(cylindrical(sun)[0])
    return gravity.solar_acceleration(float(combined.value[i]), float(combined.error[i]), radius, **known)
