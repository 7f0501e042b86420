"""Analytic distribution functions behind the interface of the learned models."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["ExactModel"]


class _Sphere(Protocol):
    def log_prob(self, w: Tensor) -> Tensor: ...
    def score(self, w: Tensor) -> Tensor: ...
    def sample_velocity(self, x: Tensor, n: int, seed: Any) -> Tensor: ...


class ExactModel:
    """The truth as a `PhaseSpaceModel`, so that a solver's own error is measured apart from a network's.

    Arguments:
        sphere: A mock of `galray.mocks.spheres`.
    """

    kind = "exact"

    def __init__(self, sphere: _Sphere) -> None:
        self.sphere = sphere

    def log_prob(self, w: Tensor) -> Tensor:
        """Log f(w), w (*, 6) in kpc and km/s: shape (*,), float64."""
        return self.sphere.log_prob(w)

    def score(self, w: Tensor) -> Tensor:
        """∇ log f at w (*, 6): shape (*, 6), float64."""
        return self.sphere.score(w)

    def sample_velocity(self, x: Tensor, n: int, generator: torch.Generator | int) -> Tensor:
        """N velocities at each position (*, 3): shape (n, *, 3), in km/s.

        Arguments:
            x: Positions in kpc.
            n: Velocities per position.
            generator: Its next number seeds the draw; or a seed itself.
        """
        if isinstance(generator, torch.Generator):
            seed = int(torch.randint(2**62, (), generator=generator, dtype=torch.int64))
        else:
            seed = int(np.uint64(generator))
        return self.sphere.sample_velocity(x, n, seed)
