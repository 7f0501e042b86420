"""Run a pure function on every shard and add the results up, on a cluster or in this process."""

from __future__ import annotations

import functools
import logging
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np

from galray.cluster.connection import is_connected, may_grow, require, resources, task_needs
from galray.cluster.needs import TaskNeeds
from galray.errors import GalrayError

__all__ = ["ClusterExecutor", "map_shards", "stream_shards", "wanted_tasks"]

logger = logging.getLogger(__name__)
Shard = TypeVar("Shard")
Result = TypeVar("Result")

_STALL_SECONDS = 60.0


def map_shards(
    function: Callable[[Shard], Result],
    shards: Sequence[Shard],
    *,
    reduce: Callable[[Any, Any], Any] = operator.add,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    max_in_flight: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Apply `function` to every shard and fold the results together.

    The fold runs in the order of the shards whatever order they end in, so floating-point sums are the
    same on a cluster, on a laptop and in one process. At most `max_in_flight` results exist at a time.

    Arguments:
        function: Pure function of one shard; sent to each worker once. Arrays inside it arrive
            read-only on a worker.
        shards: What it is called with: paths, or arrays of a few MB at most.
        reduce: How two results become one; addition by default.
        num_cpus: CPUs of one task; that of ``cluster.tasks`` where not given.
        num_gpus: GPUs (also a fraction) of one task, likewise.
        max_in_flight: Tasks that may be unfinished or not yet added up; twice what runs at once by default.
        progress: Called with (done, all) after every shard.

    Returns:
        The sum of the results.

    Raises:
        GalrayError: There are no shards, or no node can hold a task.
        Exception: Whatever `function` raises, with the shard named in a note.
    """
    total: Any = None
    results = stream_shards(
        function, shards, num_cpus=num_cpus, num_gpus=num_gpus, max_in_flight=max_in_flight, progress=progress
    )
    for index, result in enumerate(results):
        total = result if index == 0 else reduce(total, result)
    return total


def stream_shards(
    function: Callable[[Shard], Result],
    shards: Sequence[Shard],
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    max_in_flight: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Result]:
    """Apply `function` to every shard and yield the results in the order of the shards.

    What a jackknife needs, where each shard's sums are kept apart. Arguments as in `map_shards`.
    """
    shards = list(shards)
    if not shards:
        raise GalrayError("there is no shard to work on", "check that the selection keeps any star at all")
    if max_in_flight is not None and max_in_flight < 1:
        raise ValueError(f"max_in_flight must be at least 1, not {max_in_flight}")
    if is_connected():
        asked = {"cpus": num_cpus, "gpus": num_gpus}
        given = {name: value for name, value in asked.items() if value is not None}
        results = _on_cluster(function, shards, task_needs().model_copy(update=given), max_in_flight)
    else:
        results = _in_process(function, shards)
    for done, result in enumerate(results, start=1):
        if progress is not None:
            progress(done, len(shards))
        yield result


class ClusterExecutor(Executor):
    """`concurrent.futures.Executor.map` on the cluster, or in this process where there is none.

    For pure packages that know nothing of Ray but can take an executor. Worker processes of Ray do not import
    the caller's main module again, so a plain script or a notebook can use it.
    """

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **options: Any) -> Iterator[Any]:
        """Apply `fn` to the items of all iterables together; results in their order. No options are known."""
        if any(value is not None for value in options.values()):
            raise TypeError(f"unknown options: {', '.join(options)}")
        return stream_shards(functools.partial(_spread, fn), list(zip(*iterables, strict=True)))


def _spread(fn: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    # Arrays of the object store are read-only; a function may use its own as scratch.
    return fn(*(a.copy() if isinstance(a, np.ndarray) and not a.flags.writeable else a for a in arguments))


def _in_process(function: Callable[[Any], Any], shards: Sequence[Any]) -> Iterator[Any]:
    for shard in shards:
        try:
            yield function(shard)
        except Exception as error:
            error.add_note(f"while working on shard {shard!r:.200}")
            raise


def _on_cluster(
    function: Callable[[Any], Any],
    shards: Sequence[Any],
    needs: TaskNeeds,
    max_in_flight: int | None,
) -> Iterator[Any]:
    import ray

    require(needs=needs, what="a task over one shard")
    most = max_in_flight or wanted_tasks(needs)
    task = ray.remote(**needs.options())(_call)
    shared = ray.put(function)  # once into the object store, not once per task
    waiting: deque[tuple[Any, Any]] = deque()
    todo = iter(shards)
    try:
        while True:
            # A window over the shards in their order bounds what lies in memory even if the first is slow.
            if may_grow() and max_in_flight is None:
                most = wanted_tasks(needs)
            while len(waiting) < most:
                try:
                    shard = next(todo)
                except StopIteration:
                    break
                waiting.append((shard, task.remote(shared, shard)))
            if not waiting:
                return
            shard, reference = waiting.popleft()
            yield _fetch(reference, shard, needs)
    finally:
        for _, reference in waiting:
            ray.cancel(reference, force=False)


def wanted_tasks(needs: TaskNeeds) -> int:
    """Twice as many tasks as the nodes that are there now can run: on a cluster that grows, more later."""
    have = resources(needs)
    slots = have.num_cpus / needs.cpus
    if needs.gpus:
        slots = min(slots, have.num_gpus / needs.gpus)
    return max(2, int(2 * slots))


def _call(function: Callable[[Any], Any], shard: Any) -> Any:
    return function(shard)


def _fetch(reference: Any, shard: Any, needs: TaskNeeds) -> Any:
    """Wait for one result, say so when nothing moves, and raise the function's own exception."""
    import ray

    while not ray.wait([reference], timeout=_STALL_SECONDS, fetch_local=False)[0]:
        free = resources()
        if free.free_cpus + 1e-6 < needs.cpus or free.free_gpus + 1e-6 < needs.gpus:
            logger.warning(
                "a task waits for %g CPUs and %g GPUs; %g and %g are free",
                needs.cpus,
                needs.gpus,
                free.free_cpus,
                free.free_gpus,
            )
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        cause.add_note(f"while working on shard {shard!r:.200}")
        raise cause from error
    except ray.exceptions.WorkerCrashedError as error:
        raise GalrayError(
            f"the worker on shard {shard!r:.200} died again and again (out of memory?)",
            "use smaller shards (catalog.num_shards) or fewer CPUs at a time (cluster.num_cpus)",
        ) from error
