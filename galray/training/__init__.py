"""Training: any objective, one process or many."""

from galray.training.loop import TrainingResult, fit, split
from galray.training.objectives import Objective, objective
from galray.training.settings import TrainingSettings

__all__ = ["Objective", "TrainingResult", "TrainingSettings", "fit", "objective", "split"]
