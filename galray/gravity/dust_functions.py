"""What a fit behind dust finds beside Φ: a function S(x) that is log ε or −log n, and ε with its bounds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from galray.gravity.moment_selection import LogSelection, ball_lattice
from galray.gravity.potential import PotentialNetwork
from galray.gravity.region import Region, as_positions

__all__ = ["Efficiency", "LogFunction"]

Convention = Literal["maximum", "sun"]

_PLACES = 4000  # of the ball, at which ε is compared with its bounds
_TOLERANCE = 0.05  # of log ε above the Sun's that is no hit of the bound


class LogFunction:
    """S(x) = spline + network inside a ball, known up to a constant.

    Arguments:
        base: The spline.
        network: What it misses; None for none.
    """

    def __init__(self, base: LogSelection, network: PotentialNetwork | None = None) -> None:
        self.base = base
        self.region: Region = base.region
        self.network = None
        if network is not None:
            self.network = copy.deepcopy(network).double().eval().requires_grad_(False)

    def value(self, x: Any) -> Tensor:
        """S at positions (*, 3) less S at the centre of the ball: shape (*)."""
        x = as_positions(x)
        out = self.base.log_efficiency(x)
        if self.network is not None:
            center = x.new_tensor(self.region.center)[None]
            out = out + (self.network(x.reshape(-1, 3)) - self.network(center)).reshape(x.shape[:-1])
        return out

    def gradient(self, x: Any) -> Tensor:
        """∇S at positions (*, 3), in 1/kpc: shape (*, 3)."""
        x = as_positions(x)
        flat = x.reshape(-1, 3)
        out = torch.from_numpy(self.base.gradient(flat))
        if self.network is not None:
            parts = [self.network.gradient(*self.network.inputs(c)) for c in flat.split(65_536)]
            out = out + torch.cat(parts)
        return out.reshape(x.shape)


class Efficiency:
    """ε(x) ≤ 1, from a log ε that is known up to a constant.

    Arguments:
        raw: log ε + const of positions (*, 3).
        region: The ball.
        convention: What the constant is: ε = 1 at its ``maximum`` over the ball, or at its centre (``sun``).
        min_efficiency: The lower bound of ε.
        within: Fraction of the ball's radius over which the maximum and the bounds are looked at.
    """

    def __init__(
        self,
        raw: Callable[[Any], Tensor],
        region: Region,
        convention: Convention = "maximum",
        min_efficiency: float = 0.01,
        within: float = 0.95,
    ) -> None:
        self.raw = raw
        self.region = region
        self.convention: Convention = convention
        self.floor = math.log(min_efficiency)
        values = raw(torch.from_numpy(ball_lattice(region, _PLACES, within)))
        center = raw(torch.tensor([region.center], dtype=torch.float64))
        self.offset = float(values.max() if convention == "maximum" else center[0])
        beyond = values - self.offset
        self.bound_fraction = float(((beyond > _TOLERANCE) | (beyond < self.floor)).double().mean())
        """The part of the volume where ε would leave the range from its lower bound to 1."""

    def log_efficiency(self, x: Any) -> Tensor:
        """Log ε at positions (*, 3), from the bound's logarithm to 0: shape (*)."""
        return (self.raw(x) - self.offset).clamp(self.floor, 0.0)

    def efficiency(self, x: Any) -> Tensor:
        """ε at positions (*, 3): shape (*), from the bound to 1."""
        return self.log_efficiency(x).exp()
