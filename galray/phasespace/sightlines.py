"""Stars without radial velocity: the likelihood along the line of sight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.flow_parts import PartDensity
from galray.phasespace.transforms import Chart

__all__ = ["SightlineLikelihood", "completed_stars", "line_integral", "project_out"]

_CHUNK = 4096


def _directions(x: Tensor, observer: Tensor) -> Tensor:
    """Unit vectors from the observer to positions (n, 3)."""
    offset = x - observer
    return offset / offset.norm(dim=-1, keepdim=True)


def project_out(w: Tensor, has_velocity: Tensor, observer: tuple[float, float, float]) -> Tensor:
    """Stars as `SightlineLikelihood` takes them: the unknown part of the velocity removed, and a mark.

    Arguments:
        w: States (n, 6) in kpc and km/s, Galactocentric. Of stars without radial velocity any state on the
            line of sight will do: take the missing radial velocity as 0 in `galray.catalog.galactocentric`.
        has_velocity: Whether each star has a radial velocity, shape (n,), bool.
        observer: The Sun's position in kpc, in the frame of w.

    Returns:
        Rows (x, v, mark), shape (n, 7), float64: v the whole velocity and mark 1, or its part perpendicular
        to the line of sight and mark 0.

    Raises:
        GalrayError: A state that is not finite.
    """
    w = torch.as_tensor(w).to(torch.float64)
    if not bool(torch.isfinite(w).all()):
        row = int((~torch.isfinite(w).all(-1)).nonzero()[0, 0])
        raise GalrayError(
            f"star {row} has a state that is not finite", "take missing radial velocities as 0 km/s"
        )
    n = _directions(w[:, :3], torch.tensor(observer, dtype=torch.float64))
    known = torch.as_tensor(has_velocity).to(torch.bool).unsqueeze(1)
    v = torch.where(known, w[:, 3:], w[:, 3:] - (w[:, 3:] * n).sum(-1, keepdim=True) * n)
    return torch.cat([w[:, :3], v, known.to(torch.float64)], 1)


def line_integral(
    part: PartDensity, foot: Tensor, direction: Tensor, c: Tensor, *, nodes: int = 32, reach: float = 8.0
) -> Tensor:
    """Log ∫ p(foot + s e|c) ds along lines in standardised velocity.

    The trapezoidal rule on a smooth function that vanishes at both ends: its error for a Gaussian of width σ
    and spacing h is 2 exp(−2π²σ²/h²), so that the defaults are good to 10⁻³ for σ above a third of the
    standardised one. Mixtures of Gaussians with full covariances are integrated in closed form.

    Arguments:
        part: The density of the standardised velocity.
        foot: The point of each line nearest to the origin, shape (n, 3).
        direction: Unit vectors e, shape (n, 3).
        c: What the density is conditioned on, shape (n, 3).
        nodes: Points of each line.
        reach: Half length of the lines, in standardised units.

    Returns:
        Shape (n,).
    """
    mixture: Any = getattr(part, "mixture", None)
    if mixture is not None:
        return mixture.log_line_integral(foot, direction, c)
    s = torch.linspace(-reach, reach, nodes, dtype=foot.dtype, device=foot.device)[:, None, None]
    points = foot + s * direction
    log_p = part.log_prob(points.flatten(0, 1), c.expand(nodes, *c.shape).flatten(0, 1))
    return torch.logsumexp(log_p.view(nodes, -1), 0) + math.log(2.0 * reach / (nodes - 1))


class SightlineLikelihood:
    """Negative log likelihood of stars with and without radial velocity together.

    A star with all six coordinates gives −log f(x, v); one that lacks the velocity along its line of sight n̂
    gives −log ∫ f(x, v_t + λ n̂) dλ. Whether a star has its radial velocity may depend on its position and
    on anything else but the velocity: n(x) learns from all stars, p(v|x) from each what it knows.

    Stars are rows (x, v, mark) of `project_out`. Give `fit` rows of both kinds.

    Arguments:
        observer: The Sun's position in kpc, in the frame of the stars.
        nodes: Points on each line of sight.
        reach: Its half length, in standard deviations of all stars' velocities.
    """

    name = "negative log likelihood with and without radial velocities"

    def __init__(self, observer: tuple[float, float, float], *, nodes: int = 32, reach: float = 8.0) -> None:
        self.observer = tuple(float(q) for q in observer)
        self.nodes, self.reach = nodes, reach

    def prepare(self, model: nn.Module, w: Tensor, *, validation: bool = False) -> Tensor:
        """Rows of the flow, and the line of sight in standardised velocity (0, 0, 0 where v is known)."""
        net: Any = model
        if w.shape[-1] != 7:
            raise GalrayError(f"stars of {w.shape[-1]} columns", "make rows (x, v, mark) with project_out")
        if net.conditional.matched:
            raise GalrayError(
                "flow matching cannot marginalise a missing velocity", 'use another kind than "continuous"'
            )
        device = next(model.parameters()).device
        observer = torch.tensor(self.observer, dtype=torch.float64, device=device)
        parts = [
            _rows(net, part.to(device=device, dtype=torch.float64), observer) for part in w.split(_CHUNK)
        ]
        return torch.cat(parts)

    def per_star(self, model: nn.Module, rows: Tensor) -> Tensor:
        """The loss of each row: shape (n,)."""
        net: Any = model
        plain, direction = rows[:, :-3], rows[:, -3:]
        missing = direction.square().sum(-1) > 0.5
        known, lines = plain[~missing], plain[missing]
        log_p = torch.empty_like(rows[:, 0])
        log_p[~missing] = net.conditional.log_prob(known[:, 3:6], known[:, :3])
        log_p[missing] = line_integral(
            net.conditional,
            lines[:, 3:6],
            direction[missing],
            lines[:, :3],
            nodes=self.nodes,
            reach=self.reach,
        )
        return -(log_p + net.log_position_rows(plain))

    def loss(self, model: nn.Module, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mean of `per_star`."""
        return self.per_star(model, rows).mean()

    @torch.no_grad()
    def validate(self, model: nn.Module, rows: Tensor) -> Tensor:
        """`per_star` without gradient."""
        return torch.cat([self.per_star(model, part) for part in rows.split(_CHUNK)])


@torch.no_grad()
def completed_stars(
    model: Any, rows: Tensor, observer: tuple[float, float, float], *, seed: int, nodes: int = 64
) -> Tensor:
    """Stars with the missing velocities drawn from a flow, given what is known of each: a sample of f.

    What holds for stars of f, such as Stein's identities, holds for these, and neither for the stars with
    radial velocity alone, whose places are chosen by it, nor for projected ones.

    Arguments:
        model: A trained flow.
        rows: Stars (n, 7) of `project_out`.
        observer: As there.
        seed: Of the draws.
        nodes: Cells of each line of sight, over ±8 standard deviations of the velocities.

    Returns:
        States, shape (n, 6), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    edges = torch.linspace(-8.0, 8.0, nodes + 1, dtype=torch.float64)
    found = []
    for part in rows.to(torch.float64).split(_CHUNK):
        w, missing = part[:, :6].clone(), part[:, 6] < 0.5
        lines = w[missing]
        n = _directions(lines[:, :3], torch.tensor(observer, dtype=torch.float64))
        line = _standardised_direction(model.chart, lines, n)
        length = line.norm(dim=-1, keepdim=True)
        start = (model.chart(lines)[:, 3:] * line).sum(-1, keepdim=True) / length
        speed = ((edges[:-1] + edges[1:]) / 2 - start) / length  # (n, nodes), in km/s along the line of sight
        points = lines[:, None].repeat(1, nodes, 1)
        points[..., 3:] += speed[..., None] * n[:, None]
        chance = torch.softmax(model.log_conditional(points.flatten(0, 1)).view(speed.shape), 1)
        cell = torch.multinomial(chance, 1, generator=generator)
        within = torch.rand(cell.shape, generator=generator, dtype=torch.float64) - 0.5
        drawn = speed.gather(1, cell) + within * (edges[1] - edges[0]) / length
        w[missing, 3:] = lines[:, 3:] + drawn * n
        found.append(w)
    return torch.cat(found)


def _rows(net: Any, w: Tensor, observer: Tensor) -> Tensor:
    """The flow's rows of stars (n, 7), with the foot of the line for v where it is not known."""
    rows = net.prepare(w[:, :6]).to(torch.float64)
    missing = w[:, 6] < 0.5
    line = _standardised_direction(net.chart, w[:, :6], _directions(w[:, :3], observer))
    length = line.norm(dim=-1, keepdim=True)
    direction = torch.where(missing.unsqueeze(1), line / length, torch.zeros_like(line))
    u = rows[:, 3:6]
    rows[:, 3:6] = u - (u * direction).sum(-1, keepdim=True) * direction
    # dλ of the velocity is ds/|line| of the standardised one.
    rows[:, 6] -= torch.where(missing, length.squeeze(1).log(), torch.zeros_like(length.squeeze(1)))
    return torch.cat([rows, direction], 1).to(net.dtype)


def _standardised_direction(chart: Chart, w: Tensor, n: Tensor) -> Tensor:
    """∂u_v/∂λ of v + λ n at stars w: shape (n, 3); the chart is linear in v at fixed x."""
    moved = torch.cat([w[:, :3], w[:, 3:] + n], 1)
    return chart(moved)[:, 3:] - chart(w)[:, 3:]
