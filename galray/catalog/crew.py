"""Who does an ingest's jobs: this process, or Ray actors that each take the next job when they are free."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from galray.catalog.mirror import Place
from galray.catalog.workers import Worker
from galray.errors import GalrayError
from galray.provenance import write_atomic

__all__ = ["Crew", "Job"]

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a job is given to a worker when workers die over it."""

START_FAILURES = 20
"""How many workers in a row may fail to start before the crew gives up."""

_STALL_SECONDS = 60.0

Job = tuple[str, Any]
"""Name of a method of `Worker`, and its arguments."""


class Crew:
    """Workers for one ingest; a context manager, at whose end they are gone.

    One job at a time is with each worker, and its answer is a few plain values: slow files hold up nobody,
    nothing piles up, and this process holds no rows. A job whose worker dies is given to another, up to
    `ATTEMPTS` times. A worker that cannot be placed (its node is gone) waits without a job.

    Arguments:
        settings: The catalogue's configuration in JSON.
        place: Where workers write: a folder that all of them share, or a URL.
        seed: Salt of the hash that deals stars into shards.
        num_workers: Number of actors, of what ``cluster.tasks`` says each; 0 to work in this process. On a
            cluster that grows, twice as many as its nodes hold at the time: those that wait ask for nodes.

    Raises:
        GalrayError: Ray is asked for but not connected.
    """

    def __init__(self, settings: str, place: Place, seed: int, num_workers: int) -> None:
        self._arguments = (settings, place, seed)
        self._least = num_workers
        self._here: Worker | None = None
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._failures = 0
        # A worker that does not find this file writes to another machine's folder of the same name.
        write_atomic(place.folder / "visible", str(os.getpid()))
        place.push("visible")
        if num_workers < 1:
            self._here = Worker(*self._arguments)
            return
        import ray

        if not ray.is_initialized():
            raise GalrayError(
                f"{num_workers} ingest workers are asked for, but Ray is not connected",
                "connect first (galray.cluster.connect), or use num_workers = 0",
            )
        from galray.cluster import require, task_needs

        require(needs=task_needs(), what="a worker of the ingest")
        environment = {"env_vars": {"POLARS_MAX_THREADS": os.environ.get("POLARS_MAX_THREADS", "1")}}
        self._ray = ray
        self._actor_class = ray.remote(**task_needs().options(), runtime_env=environment)(Worker)

    @property
    def num_workers(self) -> int:
        """How many are wanted now; 0 in this process."""
        from galray.cluster import may_grow, task_needs, wanted_tasks

        grown = self._here is None and may_grow()
        return max(self._least, wanted_tasks(task_needs())) if grown else self._least

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in (*self._idle, *self._starting.values()):
            self._kill(actor)
        self._idle, self._starting = [], {}

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Do jobs.

        Yields:
            Each job's number and answer, as they end; ``error`` in the answer of one that failed.

        Raises:
            GalrayError: The workers do not see the folder, or cannot be started.
        """
        if self._here is not None:
            for number, job in enumerate(jobs):
                yield number, self._here.run(job)
            return
        yield from self._on_ray(jobs)

    def _on_ray(self, jobs: Sequence[Job]) -> Iterator[tuple[int, dict[str, Any]]]:
        ray = self._ray
        waiting = deque((number, 1) for number in range(len(jobs)))
        running: dict[Any, tuple[Any, int, int]] = {}
        try:
            while waiting or running:
                workers = len(self._idle) + len(self._starting) + len(running)
                for _ in range(min(self.num_workers, len(waiting) + len(running)) - workers):
                    self._start()
                while waiting and self._idle:
                    actor = self._idle.pop()
                    number, attempt = waiting.popleft()
                    running[actor.run.remote(jobs[number])] = (actor, number, attempt)
                done, _ = ray.wait([*running, *self._starting], num_returns=1, timeout=_STALL_SECONDS)
                if not done:
                    if not running:
                        logger.warning("no ingest worker could be placed: they wait for a free CPU")
                    continue
                if done[0] in self._starting:
                    self._greet(done[0])
                    continue
                actor, number, attempt = running.pop(done[0])
                try:
                    answer = ray.get(done[0])
                    self._idle.append(actor)
                except ray.exceptions.RayTaskError:
                    raise  # a bug in galray, with its own traceback
                except ray.exceptions.RayError as error:
                    self._kill(actor)
                    if attempt < ATTEMPTS:
                        waiting.appendleft((number, attempt + 1))
                        continue
                    answer = _deaths(jobs[number], attempt, error)
                yield number, answer
        finally:
            for actor, _, _ in running.values():
                self._kill(actor)

    def _start(self) -> None:
        actor: Any = self._actor_class.remote(*self._arguments)
        self._starting[actor.visible.remote(str(os.getpid()))] = actor

    def _greet(self, reference: Any) -> None:
        """Take a worker that has started into the crew, if it sees the folder."""
        actor = self._starting.pop(reference)
        try:
            problem = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            self._kill(actor)
            self._failures += 1
            if self._failures >= START_FAILURES:
                reason = str(error).splitlines()[0]
                raise GalrayError(
                    f"{self._failures} ingest workers in a row did not start: {reason}",
                    "look at the nodes' memory and Ray's logs, or use fewer workers",
                ) from None
            return
        self._failures = 0
        if problem is not None:
            self._kill(actor)
            raise GalrayError(problem, "use a folder on storage that all nodes of the cluster share")
        self._idle.append(actor)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(actor)


def _deaths(job: Job, attempt: int, error: Exception) -> dict[str, Any]:
    name, arguments = job
    what = arguments[0].name if name == "read" else f"{name} {arguments[0]}"
    return {
        "error": f"{what}: {attempt} workers died over it: {str(error).splitlines()[0]}",
        "remedy": "look at the memory of the nodes, or leave the file out with catalog.allow_bad",
        "bad_file": name == "read",
        "died": True,
    }
