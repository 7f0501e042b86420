"""What disequilibrium, a bar or spiral arms may have done to a result, by the signs in the stars themselves.

Each disturbance was put into a mock and inverted as if it were not there. The shifts of the result, divided
by the amplitude that `stellar_tests` sees on the same stars, are kept in ``data/disturbances.toml``; times
the amplitude of a run's own stars they are its error. Where a test sees nothing its resolution takes the
place of the amplitude, so that the term falls with the number of stars and never vanishes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from galray.gravity.splines import Array
from galray.gravity.steadiness import StellarTest

__all__ = ["disturbance_error", "disturbances"]

# quantity: (entry of the table, whose typical size it is relative to, factor); densities are absolute
_SHIFTS = {
    "a_R": ("a_R", "a_R", 1.0),
    "a_phi": ("a_phi", "a_R", 1.0),
    "a_z": ("a_z", "a_z", 1.0),
    "v_c": ("a_R", "v_c", 0.5),
    "K_z": ("a_z", "K_z", 1.0),
    "sigma": ("a_z", "sigma", 1.0),
    "rho": ("rho", "", 1.0),
    "rho_dm": ("rho_dm", "", 1.0),
    "rho_dm_average": ("rho_dm", "", 1.0),
    "rho_dm_sphere": ("rho_dm", "", 1.0),
}


@cache
def disturbances() -> dict[str, dict[str, Any]]:
    """The table: of each disturbance its test, the mock's amplitude, the shifts and their provenance."""
    source = resources.files("galray.gravity") / "data" / "disturbances.toml"
    return tomllib.loads(source.read_text(encoding="utf-8"))


def disturbance_error(
    names: Sequence[str], values: Array, tests: Mapping[str, StellarTest], num_stars: int
) -> dict[str, Array]:
    """Errors that the disturbances may have left in a result.

    Arguments:
        names: Kind of each value: ``a_R``, ``a_phi``, ``a_z``, ``v_c``, ``K_z`` and ``sigma`` in any unit,
            ``rho``, ``rho_dm``, ``rho_dm_average`` and ``rho_dm_sphere`` in Msun/pc³; others get no error.
        values: The values (Q,).
        tests: From `stellar_tests`, of the stars behind the result.
        num_stars: How many they are.

    Returns:
        For each disturbance one error per value, shape (Q,): shifts of accelerations are relative to their
        typical size (a_φ to that of a_R), those of densities absolute.
    """
    kinds = np.array(names)
    out = {}
    for name, entry in disturbances().items():
        test = tests[entry["test"]]
        resolution2 = np.sqrt(2 * test.dof) / num_stars
        ratio = np.sqrt(test.amplitude**2 + resolution2) / entry["amplitude"]
        error = np.zeros(len(values))
        for kind in set(names) & set(_SHIFTS):
            shift, relative_to, factor = _SHIFTS[kind]
            size = np.sqrt(np.nanmean(values[kinds == relative_to] ** 2)) if relative_to else 1.0
            error[kinds == kind] = ratio * factor * entry["shift"][shift] * size
        out[name] = error
    return out
