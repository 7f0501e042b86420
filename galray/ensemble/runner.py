"""Run the members of an ensemble: what is missing, side by side, and lose nothing when anything dies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from galray.catalog.mirror import Place
from galray.cluster import TaskNeeds, is_connected, may_grow, require, resources
from galray.ensemble.execute import MemberFunction, execute, limit_threads
from galray.ensemble.members import MemberSpec
from galray.ensemble.settings import EnsembleSettings
from galray.ensemble.store import MemberOutcome, MemberStore
from galray.errors import GalrayError

__all__ = ["concurrent_members", "run_members"]

logger = logging.getLogger(__name__)


def run_members(
    specs: Sequence[MemberSpec],
    function: str | MemberFunction,
    folder: Path | str | Place,
    context: Mapping[str, Any] | None = None,
    settings: EnsembleSettings | None = None,
    on_done: Callable[[MemberSpec, MemberOutcome], None] | None = None,
    on_progress: Callable[[MemberSpec, float, str], None] | None = None,
    workers: Mapping[str, int] | None = None,
) -> list[MemberOutcome]:
    """Run every member that has no finished result yet.

    On a connected Ray cluster the members are Ray Tune trials, as many at a time as fit; without one,
    or with `settings.concurrent = 0`, they run one after another in this process. A member whose function
    starts Ray Train workers of its own is a trial that holds no CPU itself, and only so many run at a time as
    have all their workers placed: none waits for what another holds. A member that raises
    is a failed outcome with its traceback in `error.txt`, and the others go on; the next call runs it
    again. A call after a kill runs what is missing and ends with the same members.

    Arguments:
        specs: The design.
        function: `function(spec, folder, context)` or "package.module:callable"; spec is
            `MemberSpec.to_dict()`, folder is where it may write (and find its own checkpoints again),
            and the dictionary it returns becomes `result`.
        folder: The run's `members/`; on a cluster of several nodes on storage that they share, or at a URL.
        context: What all members share: paths, settings, small arrays.
        settings: How they are run; defaults when absent.
        on_done: Called in this process with (spec, outcome) for each member as it ends, first for those
            that were finished before.
        on_progress: Called in this process with (spec, fraction, note) from `report_progress`.
        workers: Ray Train workers that a member of each family starts; 1, or absent: none, it works itself.

    Returns:
        One outcome per member, in the order of `specs`.

    Raises:
        GalrayError: All members failed, no node can hold one, or another process runs them.
    """
    settings = settings or EnsembleSettings()
    store = MemberStore(folder)
    outcomes: dict[str, MemberOutcome] = {}
    callback_errors: list[Exception] = []

    def done(outcome: MemberOutcome) -> None:
        outcomes[outcome.spec.id] = outcome
        if not outcome.finished:
            logger.warning("member %s failed: %s", outcome.spec.name, outcome.error)
        if on_done is None:
            return
        try:
            on_done(outcome.spec, outcome)
        except Exception as error:
            # A faulty listener must not stop hours of training; it is raised when the members are safe.
            callback_errors.append(error)

    with store.lock():
        for outcome in store.arrange(specs):
            done(outcome)
        missing = [spec for spec in specs if spec.id not in outcomes]
        sizes = {spec.id: (workers or {}).get(spec.family, 1) for spec in missing}
        for size in sorted(set(sizes.values())):
            part = [spec for spec in missing if sizes[spec.id] == size]
            concurrent = concurrent_members(settings, len(part), size)
            if concurrent:
                from galray.ensemble.trials import run_trials

                run_trials(
                    part, function, store, context or {}, settings, concurrent, done, on_progress, size > 1
                )
                continue
            for spec in part:
                with limit_threads(settings.threads):
                    outcome = execute(function, spec, store.place, context or {})
                done(outcome)
    result = [outcomes[spec.id] for spec in specs]
    if callback_errors:
        raise callback_errors[0]
    if result and not any(outcome.finished for outcome in result):
        first = result[0]
        raise GalrayError(
            f"all {len(result)} members failed; the first ({first.spec.name}): {first.error}",
            f"read {first.folder / 'error.txt'}, mend the cause, and run again",
        )
    return result


def concurrent_members(settings: EnsembleSettings, num_members: int, workers: int = 1) -> int:
    """Say how many members run at a time on the cluster; 0 for one by one in this process.

    Arguments:
        settings: Resources of a member.
        num_members: How many there are.
        workers: Ray Train workers that each starts, of one CPU and on one GPU where there are GPUs.

    Raises:
        GalrayError: No node can hold a member, or the nodes with its labels not all of its workers.
    """
    if not is_connected() or not num_members or (settings.concurrent == 0 and workers == 1):
        return 0
    import ray

    if ray.util.client.ray.is_connected():
        raise GalrayError(
            "an ensemble cannot be driven through a Ray Client address (ray://)",
            "run galray on the cluster: submit it as a job, or use the head node's host:6379 address",
        )
    if workers > 1:
        one = TaskNeeds(labels=settings.labels)
        require(needs=one, what="a worker of a member's training")
        have = resources(one)
        slots = have.num_cpus / workers
        if have.num_gpus >= workers:
            slots = min(slots, have.num_gpus / workers)
        if slots < 1 and not may_grow():
            labels = ", ".join(f"{key} = {value}" for key, value in settings.labels.items())
            raise GalrayError(
                f"a member trains on {workers} workers, the Ray cluster"
                f"{f' with the labels {labels}' if labels else ''} has {have.num_cpus:g} CPUs",
                f"set training.*.workers = {max(int(have.num_cpus), 1)} or fewer, or join a larger cluster",
            )
    else:
        have = require(needs=settings.needs, what="a member of the ensemble")
        slots = have.num_cpus / settings.cpus_per_member
        if settings.gpus_per_member:
            slots = min(slots, have.num_gpus / settings.gpus_per_member)
        if may_grow():
            slots = num_members  # nodes come for those that wait
    most = num_members if settings.concurrent is None else settings.concurrent
    return min(max(int(slots + 1e-6), 1), num_members, most)
