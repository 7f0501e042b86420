"""What the ranks of one training run say to each other."""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Alone", "Communicator", "ProcessGroup", "average_gradients"]


class Communicator(Protocol):
    """The ranks of a run.

    Attributes:
        rank: This one.
        world_size: How many there are.
        seconds: Wall time spent in `average_` so far, waiting for the others included.
    """

    rank: int
    world_size: int
    seconds: float

    def average_(self, flat: Tensor) -> None:
        """Replace a tensor by its mean over ranks, in place."""
        ...


class Alone:
    """A run of one process."""

    rank, world_size, seconds = 0, 1, 0.0

    def average_(self, flat: Tensor) -> None:
        """The mean over one."""


class ProcessGroup:
    """The ranks of the torch.distributed process group: gloo on CPUs, nccl on GPUs; without one, alone."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist = dist if dist.is_available() and dist.is_initialized() else None
        self.rank = self._dist.get_rank() if self._dist else 0
        self.world_size = self._dist.get_world_size() if self._dist else 1
        self.seconds = 0.0

    def average_(self, flat: Tensor) -> None:
        """Replace a tensor by its mean over ranks, in place."""
        if self._dist is None or self.world_size == 1:
            return
        begin = time.perf_counter()
        self._dist.all_reduce(flat)
        flat /= self.world_size
        self.seconds += time.perf_counter() - begin


def average_gradients(parameters: list[nn.Parameter], comm: Communicator) -> None:
    """One flat all-reduce per step: small networks are bound by latency, not by bytes."""
    if comm.world_size == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    comm.average_(flat)
    for p, g in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        p.grad = g.view_as(p)
