"""What `tests.training_kill` trains, so that the test can train the same without kills."""

from __future__ import annotations

import numpy as np
import torch

from galray.phasespace import Ball, BaseSettings, ScoreSettings
from galray.training import TrainingSettings

BALL = Ball((0.0, 0.0, 0.0), 2.0)
MODEL = ScoreSettings(hidden=(16, 16), base=BaseSettings(components=1, hidden=(8,), star_passes=5_000))
SEED = 3
EPOCHS = 40
SETTINGS = TrainingSettings(epochs=EPOCHS, batch_size=128, learning_rate=1e-2, checkpoint_every=2)


def stars(n: int = 12_000, seed: int = 0) -> torch.Tensor:
    """Gaussian stars in a ball: shape (n, 6)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * n, 3))
    x = x[np.linalg.norm(x, axis=1) < 1.999][:n]
    return torch.from_numpy(np.concatenate([x, 50.0 * rng.normal(size=(n, 3))], 1))
