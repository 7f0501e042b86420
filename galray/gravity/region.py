"""The ball in which a field is known, and what each field promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from galray.errors import GalrayError

__all__ = ["AccelerationField", "Region", "as_positions", "as_region"]


@runtime_checkable
class AccelerationField(Protocol):
    """Anything with a(x); `potential` and `mass_density` where it has a potential.

    A field with an attribute ``region`` (a `Region`) is known inside it only.
    """

    def acceleration(self, x: Any) -> Tensor:
        """a(x) in (km/s)²/kpc, shape (*, 3), float64."""
        ...


@dataclass(frozen=True)
class Region:
    """A ball in which a field is known.

    Arguments:
        center: Its centre in kpc.
        radius: Its radius in kpc.
    """

    center: tuple[float, float, float]
    radius: float

    def distance(self, x: Any) -> Tensor:
        """Distance of positions x (*, 3) from the centre in kpc, shape (*)."""
        x = as_positions(x)
        return (x - torch.tensor(self.center, dtype=torch.float64, device=x.device)).norm(dim=-1)

    def contains(self, x: Any) -> Tensor:
        """Whether positions x (*, 3) lie in the ball, shape (*)."""
        return self.distance(x) <= self.radius * (1 + 1e-9)

    def contains_kernel(self, x: Any, reach: tuple[float, float, float]) -> Tensor:
        """Whether the whole ellipsoid x + S with half-axes `reach` (kpc) lies in the ball, shape (*).

        The farthest point of the ellipsoid is looked for on a fine grid of its surface, so the answer is
        good to about one part in a thousand of the reach.
        """
        x = as_positions(x)
        offset = x - torch.tensor(self.center, dtype=torch.float64, device=x.device)
        cosine = torch.linspace(-1, 1, 33, dtype=torch.float64, device=x.device)
        phi = torch.arange(48, dtype=torch.float64, device=x.device) * (2 * torch.pi / 48)
        sine = torch.sqrt((1 - cosine**2).clamp_min(0))
        surface = torch.stack(
            [
                sine[:, None] * torch.cos(phi),
                sine[:, None] * torch.sin(phi),
                cosine[:, None].expand(33, 48),
            ],
            -1,
        ).reshape(-1, 3) * torch.tensor(reach, dtype=torch.float64, device=x.device)
        inside = torch.empty(offset.shape[:-1], dtype=torch.bool, device=x.device).reshape(-1)
        for i, chunk in enumerate(offset.reshape(-1, 3).split(256)):
            far = (chunk[:, None] + surface).square().sum(-1).amax(-1).sqrt()
            inside[256 * i : 256 * i + len(chunk)] = far <= self.radius * (1 + 1e-9)
        return inside.reshape(offset.shape[:-1])


def as_region(ball: Any) -> Region:
    """A `Region` from any object with ``center`` (3 numbers) and ``radius``.

    Raises:
        GalrayError: The radius is not positive.
    """
    if isinstance(ball, Region):
        return ball
    center = torch.as_tensor(ball.center).detach().double().reshape(-1).tolist()
    radius = float(ball.radius)
    if len(center) != 3 or not radius > 0:
        raise GalrayError(
            f"a ball of centre {center} and radius {radius}",
            "give three coordinates and a radius above 0 kpc",
        )
    return Region((center[0], center[1], center[2]), radius)


def as_positions(x: Any) -> Tensor:
    """Positions as a float64 tensor of shape (*, 3)."""
    x = torch.as_tensor(x).to(torch.float64)
    if x.ndim == 0 or x.shape[-1] != 3:
        raise ValueError(f"positions must have shape (*, 3), not {tuple(x.shape)}")
    return x
