"""Gravity of a shard store alone, by moments: no configuration, no training, no run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from galray.cluster import ClusterSettings, connect, is_connected
from galray.config import validate_settings
from galray.errors import GalrayError
from galray.gravity import GravitySettings
from galray.results import PlacesSettings
from galray.settings import Settings

__all__ = ["StoreConfig", "measure_store"]

RAY_PAYS_OFF = 1_000_000
"""Stars from which the sums are worth the start of Ray."""


class StoreConfig(Settings):
    """What of a configuration a store alone can use."""

    gravity: GravitySettings = GravitySettings()
    places: PlacesSettings | None = None
    """Where the field is reported; absent: the default heights, as far as they lie in the ball."""
    cluster: ClusterSettings = ClusterSettings()


def measure_store(
    store_path: Path | str,
    *,
    others: Sequence[Path] = (),
    overrides: list[str] | None = None,
    field: Path | None = None,
) -> dict[str, Any]:
    """Moments on a shard store alone: a(x) and ρ(x) at the default places, no training and no run directory.

    A store of more than a million stars, or one with a cluster named in the overrides, is summed on Ray.

    Arguments:
        store_path: A shard store, or its URL.
        others: Stores of other tracer populations in the same potential.
        overrides: ``gravity.…=value``, ``places.…=value``, ``cluster.…=value``, as for a configuration.
        field: Where to write the field.

    Returns:
        A summary with the quantities, as `galray gravity STORE` prints it.

    Raises:
        GalrayError: A store without a ball, with another frame or ball than the first, or with too few stars.
    """
    from galray.catalog import ShardStore
    from galray.combination import moments_summary

    settings = validate_settings(
        StoreConfig, {}, overrides, "--set", "a store takes gravity.*, places.* and cluster.*"
    )
    stores = {str(path): ShardStore(path) for path in (store_path, *others)}
    first = stores[str(store_path)]
    for path, store in stores.items():
        store.require_stars()
        if store.ball is None:
            raise GalrayError(f"{path}: was not cut at a ball", "ingest with catalog.ball.radius_kpc set")
        if store.frame != first.frame or store.ball != first.ball:
            raise GalrayError(
                f"{path}: another frame or ball than {store_path}",
                "ingest all populations with the same ball",
            )
    if len(stores) < 1 + len(others):
        raise GalrayError(f"{store_path}: the same store twice", "name each population once")
    assert first.ball is not None
    places = settings.places or _places_within(first.ball.radius)
    rows = sum(store.num_rows for store in stores.values())
    wanted = settings.cluster.enabled and (rows > RAY_PAYS_OFF or bool(settings.cluster.address))
    with contextlib.ExitStack() as stack:
        if wanted and not is_connected():
            stack.enter_context(connect(settings.cluster))
        return moments_summary(stores, settings.gravity, places, field_folder=field)


def _places_within(radius: float) -> PlacesSettings:
    """The default places, at such of the default heights as lie in a ball around the Sun."""
    default = PlacesSettings()
    heights = tuple(height for height in default.heights if height < 0.95 * radius)
    return default.model_copy(update={"heights": heights or (radius / 2,)})
