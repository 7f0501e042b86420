"""Charts of phase space: the ball made unbounded, standardised coordinates, and how scores pull back.

Models learn in internal coordinates u; every quantity they give is carried back to Cartesian phase space
with the exact Jacobian, so that no symmetry is assumed by the choice of coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.settings import Coordinates

__all__ = ["Ball", "Chart"]

# u = (x − x_c) / (c r_max): a star on the border must stay strictly inside the unit ball.
_INSIDE = 1.000001


@dataclass(frozen=True)
class Ball:
    """The ball of positions in which a model is defined.

    Arguments:
        center: Its centre in kpc, Galactocentric Cartesian.
        radius: Its radius in kpc.
    """

    center: tuple[float, float, float]
    radius: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "center", tuple(float(c) for c in self.center))
        if len(self.center) != 3 or not all(map(math.isfinite, self.center)):
            raise GalrayError(f"ball center {self.center} is not three finite numbers", "give x, y, z in kpc")
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise GalrayError(f"ball radius {self.radius} kpc is not positive", "give a radius in kpc > 0")

    def scaled(self, x: Tensor) -> Tensor:
        """Positions in units of the radius, seen from the centre: shape (*, 3), norm below 1 inside."""
        center = torch.as_tensor(self.center, dtype=x.dtype, device=x.device)
        return (x - center) / (_INSIDE * self.radius)

    def contains(self, x: Tensor) -> Tensor:
        """Whether each position (*, 3) lies in the ball, within the rounding of float32: shape (*,), bool."""
        center = torch.as_tensor(self.center, dtype=x.dtype, device=x.device)
        rounding = 2e-7 * (math.hypot(*self.center) + self.radius)
        return (x - center).square().sum(-1) <= (self.radius + rounding) ** 2

    def to_unbounded(self, x: Tensor) -> Tensor:
        """Map the ball onto R³: y = (u/|u|) artanh|u|, u = (x − x_c)/(c r_max).

        Arguments:
            x: Positions inside the ball, shape (*, 3), in kpc.

        Returns:
            Dimensionless y, shape (*, 3). Positions outside are taken to lie on the border.
        """
        u = self.scaled(x)
        r = u.square().sum(-1, keepdim=True).clamp(1e-12, _INSIDE**-2).sqrt()
        return u * (torch.atanh(r) / r)

    def from_unbounded(self, y: Tensor) -> Tensor:
        """The inverse of `to_unbounded`: shape (*, 3) to (*, 3), in kpc."""
        r = y.square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt()
        u = y * (torch.tanh(r) / r)
        center = torch.as_tensor(self.center, dtype=y.dtype, device=y.device)
        return center + _INSIDE * self.radius * u

    def log_det(self, x: Tensor) -> Tensor:
        """Log |∂y/∂x| of `to_unbounded` = log[(artanh r / r)² / (1 − r²)] − 3 log(c r_max), shape (*,)."""
        r = self.scaled(x).square().sum(-1).clamp(1e-12, _INSIDE**-2).sqrt()
        stretch = 2.0 * torch.log(torch.atanh(r) / r) - torch.log1p(-r.square())
        return stretch - 3.0 * math.log(_INSIDE * self.radius)

    def edge_weight(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weight h = 1 − (d/r_max)² that vanishes at the border, and its gradient.

        Arguments:
            x: Positions, shape (*, 3), in kpc.

        Returns:
            h, shape (*,), zero outside the ball; ∇h in 1/kpc, shape (*, 3).
        """
        center = torch.as_tensor(self.center, dtype=x.dtype, device=x.device)
        offset = x - center
        h = 1.0 - offset.square().sum(-1) / self.radius**2
        inside = h > 0
        gradient = -2.0 / self.radius**2 * offset * inside.unsqueeze(-1)
        return h.clamp_min(0.0), gradient

    def sample_uniform(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n positions uniformly in the ball: shape (n, 3), float64, in kpc."""
        direction = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        r = torch.rand(n, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
        center = torch.tensor(self.center, dtype=torch.float64)
        return center + self.radius * r * direction / direction.norm(dim=-1, keepdim=True)


class Chart(nn.Module):
    """Standardised internal coordinates u of Cartesian phase space w.

    ``cartesian``: u = (w − shift) / scale. ``cylindrical``: the same of q = (R, φ, z, v_R, v_φ, v_z) with
    φ measured from the ball's centre (zero there, growing along Galactic rotation), so that its cut lies
    opposite the ball. The azimuth stays a coordinate: nothing is assumed about symmetry. A density turns as
    p_w = p_u |∂u/∂w| with |∂q/∂w| = 1/R (the velocity part is a rotation), a score as
    ∇_w log p_w = (∂u/∂w)ᵀ ∇_u log p_u + ∇_w log|∂u/∂w|.

    Arguments:
        ball: The ball of positions.
        coordinates: ``cartesian`` or ``cylindrical``.

    Raises:
        GalrayError: Cylindrical coordinates in a ball that touches the axis R = 0.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, ball: Ball, coordinates: Coordinates = "cartesian") -> None:
        super().__init__()
        self.ball = ball
        self.coordinates = coordinates
        radius = math.hypot(ball.center[0], ball.center[1])
        if coordinates == "cylindrical" and radius <= ball.radius:
            raise GalrayError(
                f"a ball of radius {ball.radius} kpc at R = {radius:.3g} kpc contains the axis R = 0",
                'use coordinates = "cartesian" or a smaller ball',
            )
        self._phi0 = math.atan2(ball.center[1], -ball.center[0])
        self.register_buffer("shift", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(6, dtype=torch.float64))

    def _apply(self, fn, recurse=True):
        # Standardisation keeps float64 when the networks are cast: kpc and km/s lose digits in float32.
        shift, scale = self.shift, self.scale
        super()._apply(fn, recurse)
        self.shift = shift.to(self.shift.device)
        self.scale = scale.to(self.scale.device)
        return self

    def fit(self, w: Tensor) -> None:
        """Take shift and scale from the mean and standard deviation of stars w, shape (n, 6)."""
        q = self._curvilinear(w.to(torch.float64))
        self.shift.copy_(q.mean(0))
        self.scale.copy_(q.std(0))
        if not bool((self.scale > 0).all() and torch.isfinite(self.scale).all()):
            raise GalrayError(
                "the stars have no spread in some coordinate, or values that are not finite",
                "check the selection: positions and velocities must vary and be finite",
            )

    def _curvilinear(self, w: Tensor) -> Tensor:
        if self.coordinates == "cartesian":
            return w
        x, y, z, vx, vy, vz = w.unbind(-1)
        radius = torch.hypot(x, y)
        cos0, sin0 = math.cos(self._phi0), math.sin(self._phi0)
        # The components of (−x, y) along and across the centre's azimuth: φ − φ0 without a cut nearby.
        phi = torch.atan2(y * cos0 + x * sin0, -x * cos0 + y * sin0)
        return torch.stack(
            [radius, phi, z, (x * vx + y * vy) / radius, (y * vx - x * vy) / radius, vz], dim=-1
        )

    def forward(self, w: Tensor) -> Tensor:
        """Phase-space points (*, 6) in kpc and km/s to u (*, 6)."""
        return (self._curvilinear(w) - self.shift.to(w.dtype)) / self.scale.to(w.dtype)

    def position(self, x: Tensor) -> Tensor:
        """Positions (*, 3) in kpc to the first three internal coordinates (*, 3)."""
        return self.forward(torch.cat([x, torch.zeros_like(x)], -1))[..., :3]

    def position_inverse(self, u: Tensor) -> Tensor:
        """Internal positions (*, 3) back to Cartesian positions (*, 3) in kpc."""
        q = u * self.scale[:3].to(u.dtype) + self.shift[:3].to(u.dtype)
        if self.coordinates == "cartesian":
            return q
        radius, phi, z = q.unbind(-1)
        phi = phi + self._phi0
        return torch.stack([-radius * torch.cos(phi), radius * torch.sin(phi), z], -1)

    def velocity_inverse(self, x: Tensor, u: Tensor) -> Tensor:
        """Internal velocities u (*, 3) at Cartesian positions x (*, 3) back to Cartesian km/s (*, 3)."""
        v = u * self.scale[3:].to(u.dtype) + self.shift[3:].to(u.dtype)
        if self.coordinates == "cartesian":
            return v
        radius = torch.hypot(x[..., 0], x[..., 1])
        ex, ey = x[..., 0] / radius, x[..., 1] / radius  # e_R = (ex, ey), e_φ = (ey, −ex)
        vr, vphi, vz = v.unbind(-1)
        return torch.stack([vr * ex + vphi * ey, vr * ey - vphi * ex, vz], -1)

    def inverse(self, u: Tensor) -> Tensor:
        """The inverse of `forward`: u (*, 6) to w (*, 6)."""
        x = self.position_inverse(u[..., :3])
        return torch.cat([x, self.velocity_inverse(x, u[..., 3:])], -1)

    def log_det(self, w: Tensor) -> Tensor:
        """Log |∂u/∂w| at w (*, 6): shape (*,)."""
        constant = -self.scale.log().sum().to(w.dtype)
        if self.coordinates == "cartesian":
            return constant.expand(w.shape[:-1])
        return constant - torch.log(torch.hypot(w[..., 0], w[..., 1]))

    def pull_covector(self, w: Tensor, s: Tensor) -> Tensor:
        """(∂u/∂w)ᵀ s: a gradient in internal coordinates (*, 6) turned to Cartesian ones (*, 6)."""
        s = s / self.scale.to(s.dtype)
        if self.coordinates == "cartesian":
            return s
        x, y, _, vx, vy, _ = w.unbind(-1)
        radius = torch.hypot(x, y)
        ex, ey = x / radius, y / radius
        vr, vphi = ex * vx + ey * vy, ey * vx - ex * vy
        s_r, s_phi, s_z, s_vr, s_vphi, s_vz = s.unbind(-1)
        # At fixed Cartesian velocity the components turn with azimuth: ∂v_R/∂φ = v_φ, ∂v_φ/∂φ = −v_R.
        turn = (s_phi + s_vr * vphi - s_vphi * vr) / radius
        return torch.stack(
            [
                s_r * ex + turn * ey,
                s_r * ey - turn * ex,
                s_z,
                s_vr * ex + s_vphi * ey,
                s_vr * ey - s_vphi * ex,
                s_vz,
            ],
            -1,
        )

    def pull_score(self, w: Tensor, s: Tensor) -> Tensor:
        """The Cartesian score at w (*, 6) from the score s (*, 6) of the density in u."""
        pulled = self.pull_covector(w, s)
        if self.coordinates == "cartesian":
            return pulled
        x, y = w[..., 0], w[..., 1]
        r2 = x.square() + y.square()
        zero = torch.zeros_like(x)
        return pulled - torch.stack([x / r2, y / r2, zero, zero, zero, zero], -1)

    def edge_weight(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The ball's edge weight h (*,) and its gradient in internal positions, ∂h/∂u (*, 3)."""
        h, gradient = self.ball.edge_weight(w[..., :3])
        return h, self.position_covector(w, gradient)

    def position_covector(self, w: Tensor, gradient: Tensor) -> Tensor:
        """A function of position's gradient by x (*, 3), in 1/kpc, turned to that by internal positions."""
        scale = self.scale[:3].to(w.dtype)
        if self.coordinates == "cartesian":
            return gradient * scale
        x, y = w[..., 0], w[..., 1]
        radius = torch.hypot(x, y)
        gx, gy, gz = gradient.unbind(-1)
        # ∂x/∂R = e_R, ∂x/∂φ = R e_φ with e_φ = (y, −x)/R.
        return torch.stack([(gx * x + gy * y) / radius, gx * y - gy * x, gz], -1) * scale
