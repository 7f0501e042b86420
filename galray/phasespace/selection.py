"""A known selection efficiency ε(x): the stars that are seen are drawn from f_obs = ε f."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from galray.errors import GalrayError

__all__ = ["SelectionEfficiency"]


class SelectionEfficiency:
    """The probability ε(x) that a star at x is in the catalogue, known up to a factor.

    Score matching then finds the score of f itself: that of the stars seen is ∇ log f + ∇ log ε, and the
    network learns only what the known second term leaves.

    Where ε has a hard edge (a mask, a magnitude limit that stops stars at one distance) the stars end as
    they do at the ball's border, and `weight` must vanish there; a smooth fall of ε needs none.

    Arguments:
        log_efficiency: log ε(x) + const of positions (n, 3) in kpc: shape (n,), differentiable by torch,
            finite wherever there are stars.
        weight: A weight ≥ 0 of positions (n, 3), shape (n,): continuous, piecewise differentiable by torch,
            and zero wherever ε ends at once.
    """

    def __init__(
        self,
        log_efficiency: Callable[[Tensor], Tensor],
        weight: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.log_efficiency = log_efficiency
        self.weight = weight

    def log_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log ε (n,) and ∇ log ε (n, 3) in 1/kpc at positions x (n, 3).

        Raises:
            GalrayError: Not finite at some star, or not a function of each position alone.
        """
        value, gradient = _with_gradient(self.log_efficiency, x, "log_efficiency")
        bad = ~(torch.isfinite(value) & torch.isfinite(gradient).all(-1))
        if bool(bad.any()):
            place = ", ".join(f"{c:.4g}" for c in x[bad][0].tolist())
            raise GalrayError(
                f"the selection's log ε or its gradient is not finite at {int(bad.sum())} of {len(x)} stars, "
                f"first at ({place}) kpc",
                "stars lie only where ε > 0: cut the others, or mend the efficiency",
            )
        return value, gradient

    def weight_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weight (n,) and its gradient (n, 3); one and zero where none was given."""
        if self.weight is None:
            return x.new_ones(len(x)), torch.zeros_like(x)
        return _with_gradient(self.weight, x, "weight")


def _with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = function(x)
        if value.shape != x.shape[:-1]:
            raise GalrayError(
                f"the selection's {name} gave shape {tuple(value.shape)} for {len(x)} positions",
                "it must give one number per position",
            )
        if not value.requires_grad:  # a constant
            return value.detach(), torch.zeros_like(x)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]
