"""What a phase-space model must be able to do."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["ConditionalModel", "PhaseSpaceModel"]


@runtime_checkable
class PhaseSpaceModel(Protocol):
    """Anything with ∇ log f.

    Flows and exact densities also have ``log_prob(w) → (*,)`` and
    ``sample_velocity(x, n, generator) → (n, *, 3)``.
    """

    def score(self, w: Tensor) -> Tensor:
        """∇ log f at w (*, 6) in kpc and km/s: shape (*, 6), in 1/kpc and 1/(km/s)."""
        ...


@runtime_checkable
class ConditionalModel(Protocol):
    """A model of p(v|x) alone: it lacks ∇ log n, and no selection in position can bias it."""

    def conditional_score(self, w: Tensor) -> Tensor:
        """∇ log p(v|x) at w (*, 6): shape (*, 6)."""
        ...

    def sample_velocity(self, x: Tensor, n: int, generator: Any) -> Tensor:
        """N velocities at each position (*, 3): shape (n, *, 3)."""
        ...
