"""Ranks of one training run as threads of one process: what they compute, without processes to start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["as_ranks"]


class _Threads:
    """A communicator that adds in the order of the ranks, as a two-rank all-reduce does."""

    def __init__(self, rank: int, world_size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self.seconds = rank, world_size, 0.0
        self._slots, self._barrier = slots, barrier

    def average_(self, flat: torch.Tensor) -> None:
        self._slots[self.rank] = flat.clone()
        self._barrier.wait()
        total = self._slots[0].clone()
        for other in self._slots[1:]:
            total += other
        flat.copy_(total / self.world_size)
        self._barrier.wait()


def as_ranks(world_size: int, run: Callable[[Any], Any]) -> list[Any]:
    """Call ``run(communicator)`` on every rank at once; what each returns, or the first error."""
    slots: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size)
    found: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            found[rank] = run(_Threads(rank, world_size, slots, barrier))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
