"""The errors of the stars of a store in phase space."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import polars as pl

from galray.catalog.astrometry import galactocentric_covariance
from galray.catalog.columns import CORRELATIONS, ERRORS, OBSERVABLES
from galray.catalog.shards import ShardStore
from galray.errors import GalrayError

__all__ = ["observer_of", "state_covariances"]


def observer_of(store: ShardStore) -> tuple[float, float, float, float, float, float]:
    """The Sun's position (kpc) and velocity (km/s) in the store's frame: where parallaxes are measured."""
    x, y, z = store.frame.sun_position
    vx, vy, vz = store.frame.sun_velocity_km_s
    return (x, y, z, vx, vy, vz)


def state_covariances(store: ShardStore, shards: Iterable[int] | None = None) -> np.ndarray:
    """Covariances of the states in the order of `ShardStore.states`, to first order in the errors.

    Arguments:
        store: Stars with radial velocities from Gaia's columns, at distances 1/ϖ.
        shards: Numbers of the shards; all where not given.

    Returns:
        Shape (n, 6, 6), in kpc², kpc km/s and (km/s)².

    Raises:
        GalrayError: The store has no observables, misses errors, or its distances come from a prior or from
            elsewhere, whose errors are not those of a measurement.
    """
    store._require_observables()
    distance = store.manifest.get("distance", "inverse_parallax")
    if distance != "inverse_parallax":
        raise GalrayError(
            f"{store.location}: distances of kind '{distance}' are no measurements with Gaussian errors",
            "set catalog.distance = 'inverse_parallax' to deconvolve errors, or noise to 'ignore'",
        )
    zero_points = ["parallax_zero_point"] if "parallax_zero_point" in store.columns else []
    table = store.measured(zero_points, shards)
    # Errors of the place on the sky may be absent: at microarcseconds they are nothing beside the rest.
    missing = table.select(ERRORS[2:]).null_count().row(0, named=True) if len(table) else {}
    if any(missing.values()):
        name = max(missing, key=lambda key: missing[key])
        raise GalrayError(
            f"{store.location}: '{name}' is missing for {missing[name]:,} stars: their errors are not known",
            "ingest files that have the error columns, or set noise to 'ignore'",
        )
    values = table.select(*OBSERVABLES, *ERRORS, *CORRELATIONS).cast(pl.Float64).fill_null(0.0).to_numpy()
    constant = 0.0 if zero_points else float(store.manifest["parallax_zero_point"])
    zero_point = table["parallax_zero_point"].to_numpy() if zero_points else constant
    return galactocentric_covariance(values[:, :6], values[:, 6:12], values[:, 12:], store.frame, zero_point)
