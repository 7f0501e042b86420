"""Moments over the shards of a store, on all nodes: one pass, one linear solve; and so for every member."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from galray.catalog import ShardStore, observer_of
from galray.config import RunConfig
from galray.efficiency_maps import save_map, star_counts
from galray.ensemble import MemberSpec
from galray.gravity import (
    Kernel,
    MomentResult,
    Moments,
    MomentsSettings,
    MomentSums,
    SplineField,
    StarCounts,
    StarErrors,
    efficiency_map,
    save_field,
)
from galray.gravity.moment_sums import fold
from galray.measurement import evaluate, places_of
from galray.member_stars import error_covariances, member_config, rows_of, seen
from galray.provenance import write_atomic
from galray.results import Places

__all__ = ["measure_moment_members", "measure_moments", "moment_blocks", "penalty_covariance", "shard_sums"]


def shard_sums(
    task: tuple[ShardStore, int, Mapping[str, Any] | None, dict[str, Any], Any, StarCounts | None],
) -> list[MomentSums]:
    """Moment sums of one shard, with the stars' weights: one block, or one per patch of sky.

    Arguments:
        task: The store, number of the shard, the member that looks at it (None: as measured), the
            settings of the moments as JSON, the ball, and the counts whose asymmetry weights undo, or None.
    """
    store, shard, spec, values, ball, counts = task
    settings = MomentsSettings.model_validate(values)
    stars = seen(store, spec, [shard])
    weights = None
    if store.weights([shard]) is not None:
        weights = rows_of(store, spec, lambda one: cast(np.ndarray, one.weights([shard])))[stars.index]
    if counts is not None:
        weights = counts.weights(stars.states) * (1.0 if weights is None else weights)
    errors = None
    if settings.noise == "deconvolve":
        errors = StarErrors(error_covariances(store, spec, [shard])[stars.index], observer_of(store))
    moments = Moments(settings, ball)
    if settings.jackknife == "sky":
        return moments.patch_sums(stars.states, weights)
    return [moments.sums(stars.states, weights, errors=errors)]


def moment_blocks(
    store: ShardStore,
    settings: MomentsSettings,
    spec: Mapping[str, Any] | None = None,
    progress: Any = None,
    *,
    ball: Any = None,
    counts: StarCounts | None = None,
) -> list[MomentSums]:
    """One pass over the shards of a store, on the cluster where there is one.

    Arguments:
        store: The shards.
        settings: Splines, test functions, blocks of the jackknife.
        spec: The member that looks at them, as of `MemberSpec.to_dict`; None sees them as measured.
        progress: Called with (done, all) after every shard.
        ball: The ball, that of the store if not given.
        counts: Its stars in cells of ``settings.selection_cells_kpc``, where they were counted before.

    Returns:
        At most ``settings.num_blocks`` blocks of shards, or the patches of sky.
    """
    from galray.cluster import stream_shards

    ball = store.ball if ball is None else ball
    values = settings.model_dump(mode="json")
    if counts is None and settings.selection_cells_kpc:
        counts = star_counts(store, settings.selection_cells_kpc, spec, ball)
    tasks = [(store, i, spec, values, ball, counts) for i in range(len(store.shards))]
    blocks = stream_shards(shard_sums, tasks, progress=progress)
    num = settings.num_patches if settings.jackknife == "sky" else settings.num_blocks
    return fold((block for of_shard in blocks for block in of_shard), num)


def measure_moments(
    store: ShardStore,
    settings: MomentsSettings,
    spec: Mapping[str, Any] | None = None,
    progress: Any = None,
    *,
    penalty: Any = None,
    counts: StarCounts | None = None,
) -> tuple[SplineField, np.ndarray, MomentResult]:
    """The weak-form inversion of a whole store: one pass over its shards, one linear solve.

    Blocks of shards are those of the jackknife: stars are dealt to shards by a hash, so that the blocks are
    random parts of the sample.

    Arguments:
        store: The shards.
        settings: Splines, test functions, penalty.
        spec: The member that looks at them, as of `MemberSpec.to_dict`; None sees them as measured.
        progress: Called with (done, all) after every shard.
        penalty: Strengths to take in place of what ``settings.penalty`` says, such as another field's.
        counts: As in `moment_blocks`.

    Returns:
        The field, the coefficients of the leave-one-out solutions, shape (blocks, splines), and all else.
    """
    moments = Moments(settings, store.ball)
    blocks = moment_blocks(store, settings, spec, progress, counts=counts)
    result = moments.result(blocks, penalty=penalty)
    field, replicas = moments.jackknife(blocks, result)
    return field, replicas, result


def penalty_covariance(field: SplineField, places: Places, kernel: Kernel) -> np.ndarray:
    """What the penalty on a spline's roughness may hide of each quantity, as a covariance (Q, Q).

    It is the posterior of the penalised solution less its scatter from sample to sample: the squared bias, on
    average over potentials as rough as the penalty expects (Wahba 1983, J. R. Stat. Soc. B 45, 133; Nychka
    1988, J. Am. Stat. Assoc. 83, 1134).
    """
    rows = np.unique([row for quantity in places.quantities for row in quantity.rows])
    dense = np.intersect1d(rows, places.density_rows)
    size = len(field.parameters)
    a, density = np.zeros((size, *places.x.shape)), np.full((size, len(places.x)), np.nan)
    x = torch.from_numpy(places.x)
    a[:, rows] = np.moveaxis(np.asarray(field.linear_response(x[rows], "acceleration")), -1, 0)
    density[:, dense] = np.asarray(field.linear_response(x[dense], "smoothed_density", kernel)).T
    found = evaluate(field, places, kernel)
    nothing = np.zeros(len(places.x))
    here = places.values(found["acceleration"], found["density"], nothing)
    response = places.values(found["acceleration"] + a, found["density"] + density, nothing) - here
    return np.asarray(response.T @ (field.posterior - field.covariance) @ response)


def measure_moment_members(
    config: RunConfig,
    store: ShardStore,
    specs: Sequence[MemberSpec],
    folder: Path,
    progress: Callable[[float, str], None],
) -> dict[str, float]:
    """The moments' part of an ensemble: the stars as measured, with their jackknife, then every other member.

    Arguments:
        config: The run's.
        store: Its shards.
        specs: Members; the one that varies nothing comes first.
        folder: Takes the fields, what they are at the places, and the error of the penalty.
        progress: Called with the part that is done and the member's name.

    Returns:
        Figures of the first member's fit.
    """
    from safetensors.numpy import save

    places, kernel = places_of(config, store), Kernel.from_settings(config.gravity.kernel)
    penalty = None
    outcome: dict[str, float] = {}
    for number, spec in enumerate(specs):

        def passed(done: int, total: int, number: int = number, name: str = spec.name) -> None:
            progress((number + done / total) / len(specs), name)

        member = spec.to_dict()
        settings = member_config(config, member).gravity.moments
        is_base = spec.varied == "base"
        counts = None
        if is_base and settings.selection_cells_kpc:
            counts = star_counts(store, settings.selection_cells_kpc, member)
        # Members differ from the base by their stars alone: what the choice of a penalty may do is a term of
        # its own, and a choice made anew would bring it in once more.
        same = None if settings != config.gravity.moments else penalty
        field, replicas, found = measure_moments(store, settings, member, passed, penalty=same, counts=counts)
        evaluate(field, places, kernel, folder / f"{spec.slug}.safetensors")
        save_field(field, folder / ("field" if is_base else spec.slug))
        if not is_base:
            continue
        penalty = field.penalty
        outcome = {name: float(value) for name, value in field.statistics.items()}
        if counts is not None:
            seen_map = efficiency_map(counts, found.selections["shared"].log_efficiency)
            save_map(seen_map, folder / "dust.safetensors")
        hidden = penalty_covariance(field, places, kernel)
        write_atomic(folder / "penalty.safetensors", save({"covariance": hidden}))
        for i, replica in enumerate(replicas):
            path = folder / f"jackknife-{i:03d}.safetensors"
            evaluate(field.with_parameters(replica), places, kernel, path)
    return outcome
