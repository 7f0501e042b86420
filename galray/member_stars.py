"""The stars that a member of an ensemble sees: as measured, redrawn, moved, selected, weighed by patch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from galray.catalog import Draw, ShardStore, galactocentric, state_covariances
from galray.catalog.columns import STATE
from galray.config import RunConfig, with_values
from galray.ensemble import SystematicsSettings
from galray.errors import GalrayError
from galray.gravity.weak_form import patch_directions
from galray.phasespace import Ball, SelectionEfficiency, attach_errors

__all__ = [
    "error_covariances",
    "member_config",
    "member_states",
    "noisy_states",
    "patch_bootstrap",
    "rows_of",
    "seen",
    "sightline_states",
]

_CORE = 0.15  # of the ball's radius: inside it all patches share the stars
_SHARPNESS = 2.0  # of a patch's border, per patch: the more patches, the narrower


def member_config(config: RunConfig, spec: Mapping[str, Any]) -> RunConfig:
    """The configuration of a member: the run's own but for the hyperparameters that the member varies."""
    choices = spec.get("variation", {}).get("choices")
    return with_values(config, choices, "ensemble.hyperparameters") if choices else config


def seen(store: ShardStore, spec: Mapping[str, Any] | None, shards: Iterable[int] | None = None) -> Draw:
    """States of the stars that a member sees, and their rows in what `rows_of` gives.

    Arguments:
        store: The run's stars.
        spec: The member, as of `MemberSpec.to_dict`; None sees the stars as measured.
        shards: Numbers of the shards; all where not given.
    """
    shards = None if shards is None else list(shards)
    spec = spec or {}
    variation = spec.get("variation", {})
    if spec.get("draw"):
        found = store.draw(spec["streams"]["draw"], shards, cut="systematics" not in variation)
    else:
        states = rows_of(store, spec, lambda one: one.states(shards, dtype=np.float64))
        found = Draw(states, np.arange(len(states)), {"rows": len(states), "kept": len(states)})
    if "systematics" in variation:
        errors = SystematicsSettings.model_validate(variation["systematics"])
        moved = store.shifted(found.states, *errors.draw(spec["streams"]["systematic"]))
        found = Draw(moved.states, found.index[moved.index], moved.account)
    if "where" in variation:
        kept = rows_of(store, spec, lambda one: one.where(variation["where"], shards))[found.index]
        account = {"rows": len(kept), "kept": int(kept.sum()), "not_selected": int((~kept).sum())}
        found = Draw(found.states[kept], found.index[kept], account)
    return found


def rows_of(
    store: ShardStore, spec: Mapping[str, Any] | None, of: Callable[[ShardStore], np.ndarray]
) -> np.ndarray:
    """Something of every row that a member's stars are drawn from, which `Draw.index` counts.

    Whoever redraws or moves the stars brings in some from the margin of the ball, where it was kept.

    Arguments:
        store: The run's stars.
        spec: The member.
        of: Gives an array with a row per star of a store.
    """
    spec = spec or {}
    moves = spec.get("draw") or "systematics" in spec.get("variation", {})
    margin = store.margin if moves else None
    return of(store) if margin is None else np.concatenate([of(store), of(margin)])


def member_states(store: ShardStore, spec: Mapping[str, Any]) -> np.ndarray:
    """The same, shape (N, 6), float32."""
    return seen(store, spec).states.astype(np.float32)


def error_covariances(
    store: ShardStore, spec: Mapping[str, Any] | None, shards: list[int] | None = None
) -> np.ndarray:
    """Covariances of the errors in the rows of `rows_of`, (n, 6, 6); a redraw holds the noise twice."""
    covariances = rows_of(store, spec, lambda one: state_covariances(one, shards))
    return covariances * (2.0 if spec and spec.get("draw") else 1.0)


def noisy_states(store: ShardStore, spec: Mapping[str, Any]) -> np.ndarray:
    """The member's stars with their errors: rows of `attach_errors`, (N, 27), float32."""
    found = seen(store, spec)
    return attach_errors(found.states, error_covariances(store, spec)[found.index]).numpy().astype(np.float32)


def sightline_states(store: ShardStore, spec: Mapping[str, Any] | None = None) -> np.ndarray:
    """Stars without radial velocity as states with a radial velocity of 0: shape (n, 6), float64.

    Raises:
        GalrayError: None were kept, or the member moves or selects its stars.
    """
    varied = {"systematics", "where"} & set((spec or {}).get("variation", {}))
    if varied or (spec or {}).get("draw"):
        raise GalrayError(
            "flow.missing_rv = 'marginalise' in a member that redraws, moves or selects its stars",
            "leave such members out of ensemble.flow: stars without radial velocity are taken as measured",
        )
    if store.no_rv is None:
        raise GalrayError(
            f"{store.path}: no stars without radial velocity were kept, but flow.missing_rv = 'marginalise'",
            "set catalog.require_rv = false and ingest again",
        )
    table = store.no_rv.table([*STATE[:3], "ra", "dec", "pmra", "pmdec"]).cast(pl.Float64).to_numpy()
    sun = np.array(store.frame.sun_position)
    observed = np.zeros((len(table), 6))
    observed[:, [0, 1, 3, 4]] = table[:, 3:]
    observed[:, 2] = 1.0 / np.linalg.norm(table[:, :3] - sun, axis=1)  # whatever the distance came from
    w = galactocentric(observed, store.frame)
    w[:, :3] = table[:, :3]  # as they were cut at the ball
    return w


def patch_bootstrap(ball: Ball, patches: int, seed: int) -> SelectionEfficiency:
    """A bootstrap over patches of sky, as weights of positions that score matching takes.

    Patches of sky as seen from the centre of the ball, drawn as often as a bootstrap draws: w(x) = Σ gₖ pₖ(x)
    with smooth pₖ that add up to one. The weight stands in the loss and in the fit of Φ, not in f, and its
    gradient is known, so the score stays that of f; stars left out or doubled behind a border would have a
    flux through it. What the overlap of patches takes from the weights' variance is given back.

    Arguments:
        ball: The ball of the stars.
        patches: Number of patches.
        seed: Of the draw.
    """
    directions = torch.from_numpy(patch_directions(patches))
    counts = np.random.default_rng(seed).multinomial(patches, np.full(patches, 1.0 / patches))
    probes = torch.from_numpy(patch_directions(50 * patches))
    overlap = float(_shares(probes, directions, patches).square().sum(-1).mean())
    drawn = torch.from_numpy((counts - 1.0) / np.sqrt(overlap))
    center = torch.tensor(ball.center, dtype=torch.float64)

    def weight(x: Tensor) -> Tensor:
        offset = x - center
        unit = offset / (offset.square().sum(-1, keepdim=True) + (_CORE * ball.radius) ** 2).sqrt()
        return (1.0 + _shares(unit, directions, patches) @ drawn).clamp(min=0.0)

    return SelectionEfficiency(lambda x: x.new_zeros(len(x)), weight)


def _shares(unit: Tensor, directions: Tensor, patches: int) -> Tensor:
    """Shares of the patches in each direction, (n, patches)."""
    return torch.softmax(_SHARPNESS * patches * unit @ directions.T, -1)
