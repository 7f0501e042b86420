"""Training: any objective, one process or many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galray.training.settings import ScoreTrainingSettings, TrainingSettings

if TYPE_CHECKING:
    from galray.phasespace.objectives import Objective, objective
    from galray.training.batches import split
    from galray.training.distributed import fit_distributed
    from galray.training.loop import TrainingResult, fit

__all__ = [
    "Objective",
    "ScoreTrainingSettings",
    "TrainingResult",
    "TrainingSettings",
    "fit",
    "fit_distributed",
    "objective",
    "split",
]

# torch is imported with what needs it, Ray with `fit_distributed` alone
_HOMES = {
    "Objective": "galray.phasespace.objectives",
    "TrainingResult": "galray.training.loop",
    "fit": "galray.training.loop",
    "fit_distributed": "galray.training.distributed",
    "objective": "galray.phasespace.objectives",
    "split": "galray.training.batches",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
