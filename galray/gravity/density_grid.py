"""A function of position kept on a cubic grid: the density of the stars seen, without the model of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from galray.gravity.region import Region, as_positions
from galray.gravity.splines import Array, to_numpy

__all__ = ["BallGrid"]

_NODES = 49  # along each side
_EDGE = 0.999  # of the radius: nodes beyond take the value at the border
_CHUNK = 65_536


class BallGrid:
    """A function of positions in a ball: the cubic spline through its values at the nodes of a cube.

    Arguments:
        region: The ball, which the cube encloses.
        values: At the nodes, shape (n, n, n).
    """

    def __init__(self, region: Region, values: Array) -> None:
        self.region = region
        self.values = values
        self._spline = ndimage.spline_filter(values, order=3, mode="nearest")

    @classmethod
    def of(cls, function: Callable[[Any], Any], region: Region) -> BallGrid:
        """The grid of a function of positions (n, 3)."""
        step = np.linspace(-1.0, 1.0, _NODES)
        offset = np.stack(np.meshgrid(step, step, step, indexing="ij"), -1).reshape(-1, 3)
        offset /= np.maximum(np.linalg.norm(offset, axis=1, keepdims=True) / _EDGE, 1.0)
        x = torch.from_numpy(np.array(region.center) + region.radius * offset)
        values = np.concatenate([to_numpy(function(part)) for part in x.split(_CHUNK)])
        return cls(region, values.reshape((_NODES,) * 3))

    def __call__(self, x: Any) -> Tensor:
        """The function at positions (*, 3): shape (*)."""
        x = as_positions(x)
        offset = (to_numpy(x).reshape(-1, 3) - np.array(self.region.center)) / self.region.radius
        at = (offset.T + 1) * (len(self.values) - 1) / 2
        found = ndimage.map_coordinates(self._spline, at, order=3, prefilter=False, mode="nearest")
        return torch.from_numpy(found).reshape(x.shape[:-1])
