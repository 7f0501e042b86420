"""Maps of the selection efficiency ε in cells: stars of a store counted on all nodes, and the map's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from galray.catalog import ShardStore
from galray.gravity import EfficiencyMap, StarCounts
from galray.member_stars import seen
from galray.provenance import write_atomic

__all__ = ["DUST_CELLS_KPC", "save_map", "star_counts"]

DUST_CELLS_KPC = 0.25
"""Side of the cells of the maps of ε, where the moments do not say."""


def save_map(found: EfficiencyMap, path: Path) -> None:
    """Write a map of ε: its counts, and per cell ε, n and −2.5 ∂log₁₀ε/∂s."""
    from safetensors.numpy import save

    arrays = {"efficiency": found.efficiency, "density": found.density, "loss": found.loss_per_kpc()}
    arrays |= {"counts": found.stars.counts, "volume": found.volume, "cell": np.array([found.stars.cell])}
    write_atomic(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def shard_counts(task: tuple[ShardStore, int, Mapping[str, Any] | None, float, Any]) -> StarCounts:
    """Stars of one shard in cells; of the store, shard, member that looks, side in kpc, and ball."""
    store, shard, spec, cell, ball = task
    return StarCounts.of(seen(store, spec, [shard]).states, ball, cell)


def star_counts(
    store: ShardStore, cell: float, spec: Mapping[str, Any] | None = None, ball: Any = None
) -> StarCounts:
    """Stars of a whole store in cells of a side in kpc, shard by shard."""
    from galray.cluster import stream_shards

    ball = store.ball if ball is None else ball
    tasks = [(store, i, spec, cell, ball) for i in range(len(store.shards))]
    first, *others = stream_shards(shard_counts, tasks)
    return sum(others, first)
