"""How a step is computed: device, precision, compilation, and the memory it takes."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from galray.errors import GalrayError, GalrayWarning
from galray.phasespace.objectives import Objective
from galray.training.settings import TrainingSettings

__all__ = ["StepLoss", "arithmetic", "choose_device", "memory_in_use"]

Loss = Callable[[Tensor, torch.Generator], Tensor]


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU when there is one.

    Raises:
        GalrayError: A GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise GalrayError("training.device = 'cuda', but torch sees no GPU", "use device = 'auto' or 'cpu'")
    return torch.device(name)


@contextlib.contextmanager
def arithmetic(settings: TrainingSettings) -> Iterator[None]:
    """Threads and rounding of matrix products inside the block; both are put back after it."""
    threads, rounding = torch.get_num_threads(), torch.get_float32_matmul_precision()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(rounding)


class StepLoss:
    """The loss of a batch in the precision asked for, compiled if asked for.

    Called with rows and a generator. When the compiled form fails, at its first call, the plain one takes its
    place with a warning: a machine without a compiler trains all the same.

    Arguments:
        objective: What is minimised.
        model: Its model.
        settings: ``precision`` and ``compile``.
        device: Where the rows are.
    """

    def __init__(
        self, objective: Objective, model: nn.Module, settings: TrainingSettings, device: torch.device
    ) -> None:
        self._objective, self._model, self._device = objective, model, device
        self._mixed = settings.precision == "bf16"
        self._compiled: Loss | None = torch.compile(self._plain) if settings.compile else None
        self._proven = False

    def _plain(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return self._objective.loss(self._model, rows, generator)

    def __call__(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The mean loss of a batch: a scalar with gradient."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
            if self._compiled is None:
                return self._plain(rows, generator)
            if self._proven:
                return self._compiled(rows, generator)
            state = generator.get_state()
            try:
                # The backward pass may be compiled only when it is first asked for: ask here.
                trained = [p for p in self._model.parameters() if p.requires_grad]
                torch.autograd.grad(self._compiled(rows, generator), trained, allow_unused=True)
                self._proven = True
                generator.set_state(state)
                return self._compiled(rows, generator)
            except Exception as error:
                self._compiled = None
                generator.set_state(state)
                reason = str(error).strip().splitlines() or [type(error).__name__]
                warnings.warn(
                    f"training.compile: torch.compile failed ({reason[0][:200]}); training goes on without",
                    GalrayWarning,
                    stacklevel=2,
                )
                return self._plain(rows, generator)


def memory_in_use(device: torch.device) -> float:
    """Gigabytes (10⁹ bytes): the most that tensors took on a GPU, what the process holds on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 1e9
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    import resource
    import sys

    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1.0 if sys.platform == "darwin" else 1e3) / 1e9
