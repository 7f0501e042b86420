"""Networks of Φ and log ε on top of their splines, trained together by the Boltzmann residual."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from galray.gravity.moment_selection import LogSelection
from galray.gravity.potential import PotentialNetwork, negative_mass
from galray.gravity.settings import DustSettings
from galray.gravity.spline_field import SplineField
from galray.gravity.splines import Array

__all__ = ["Networks", "train_networks"]

_RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_HELD_OUT = 0.1
_DENSITY_STARS = 256  # at which the mass is looked at in each step


@dataclass
class Networks:
    """What was trained.

    Attributes:
        potential: ψ of Φ = spline + ψ.
        selection: χ of S = spline + χ.
        curve: Held-out loss of each epoch.
    """

    potential: PotentialNetwork
    selection: PotentialNetwork
    curve: list[dict[str, float]]


class _Rows:
    """Stars in units in which everything is of order one."""

    def __init__(
        self, base: SplineField, spline: LogSelection, stars: Array, scores: list[Array], weight: Array
    ) -> None:
        region = base.region
        self.speed = math.sqrt(float((stars[:, 3:] ** 2).mean()))
        self.x = torch.from_numpy(stars[:, :3])
        v = torch.from_numpy(stars[:, 3:])
        a, slope = base.acceleration(self.x), torch.from_numpy(spline.gradient(stars[:, :3]))
        self.v = (v / self.speed).float()
        self.weight = torch.from_numpy(weight / weight.mean()).float()
        self.sv, self.start = [], []
        for score in scores:
            s = torch.from_numpy(score)
            residual = (v * (s[:, :3] - slope)).sum(1) + (s[:, 3:] * a).sum(1)
            self.sv.append((s[:, 3:] * self.speed).float())
            self.start.append((residual * region.radius / self.speed).float())
        away = self.x - self.x.new_tensor(region.center)
        self.away = (away / away.norm(dim=1, keepdim=True).clamp_min(1e-9)).float()
        self.outward = (slope * self.away).sum(1).float() * region.radius


def train_networks(
    base: SplineField,
    spline: LogSelection,
    stars: Array,
    scores: list[Array],
    weight: Array,
    settings: DustSettings,
    seed: int,
    on_epoch: Any = None,
) -> Networks:
    """Minimise E[r₁r₂] over ψ and χ, r the residuals of one or two scores.

    Adam finds the hidden layers; the output layers, in which the residual is linear, are then solved for
    together, with the ridge that held-out stars prefer.

    Arguments:
        base: The spline of Φ.
        spline: The spline of S.
        stars: States (n, 6).
        scores: Of one model or two, (n, 6) each.
        weight: One per star.
        settings: Networks, training, bounds.
        seed: Of the networks' start and of the batches.
        on_epoch: Called with the dict of each epoch.
    """
    data = _Rows(base, spline, stars, scores, weight)
    rng = np.random.default_rng([seed, 1])
    radius = base.region.radius
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        psi = PotentialNetwork(base.region, settings.hidden, data.speed**2)
        chi = PotentialNetwork(base.region, settings.hidden, 1.0)
    pair = nn.ModuleList([psi, chi])
    for net in (psi, chi):
        nn.init.zeros_(_output(net))  # the fit starts from the splines
    features, jacobian = (t.float() for t in psi.double().inputs(data.x))
    pair.float()

    def slopes(rows: Tensor) -> tuple[Tensor, Tensor]:
        f, j = features[rows], jacobian[rows]
        return psi.gradient(f, j) * (radius / data.speed**2), chi.gradient(f, j) * radius

    def loss(rows: Tensor, *, training: bool) -> Tensor:
        force, fall = slopes(rows)
        drift = (data.v[rows] * fall).sum(1)
        r = [c[rows] - (sv[rows] * force).sum(1) - drift for c, sv in zip(data.start, data.sv, strict=True)]
        total = (data.weight[rows] * r[0] * r[-1]).mean()
        if settings.monotone:
            rise = data.outward[rows] + (data.away[rows] * fall).sum(1)
            total = total + rise.clamp_min(0).square().mean()
        if settings.positive_mass and training:
            total = total + negative_mass(psi, base, data.x[rows[:_DENSITY_STARS]])
        return total

    order = torch.from_numpy(rng.permutation(len(stars)))
    cut = max(1, round(_HELD_OUT * len(order)))
    held, train = order[:cut], order[cut:]

    def validate() -> float:
        with torch.no_grad():
            parts = [float(loss(part, training=False)) * len(part) for part in held.split(8192)]
        return sum(parts) / len(held)

    curve = [{"epoch": 0.0, "validation": validate()}]
    best = (curve[0]["validation"], copy.deepcopy(pair.state_dict()))

    def judge(row: dict[str, float]) -> None:
        nonlocal best
        row["validation"] = validate()
        curve.append(row)
        if row["validation"] < best[0]:
            best = (row["validation"], copy.deepcopy(pair.state_dict()))
        if on_epoch is not None:
            on_epoch(row)

    optimiser = torch.optim.Adam(pair.parameters(), lr=settings.learning_rate)
    steps = settings.epochs * -(-len(train) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(1, settings.epochs + 1):
        shuffled = train[torch.from_numpy(rng.permutation(len(train)))]
        for rows in shuffled.split(settings.batch_size):
            value = loss(rows, training=True)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(pair.parameters(), 10.0)
            optimiser.step()
            schedule.step()
        judge({"epoch": float(epoch)})
    pair.load_state_dict(best[1])
    _solve_outputs(psi, chi, data, features, jacobian, train, radius, judge, settings.epochs)
    pair.load_state_dict(best[1])
    return Networks(psi, chi, curve)


def _output(network: PotentialNetwork) -> Tensor:
    """The weights of the output layer, (1, H)."""
    last = network.layers[-1]
    assert isinstance(last, nn.Linear)
    return last.weight


@torch.no_grad()
def _solve_outputs(
    psi: PotentialNetwork,
    chi: PotentialNetwork,
    data: _Rows,
    features: Tensor,
    jacobian: Tensor,
    train: Tensor,
    radius: float,
    judge: Any,
    epochs: int,
) -> None:
    """Both output layers from their joint normal equations, one ridge after another."""
    width = _output(psi).shape[1]
    matrix = torch.zeros(2 * width, 2 * width, dtype=torch.float64)
    vector = torch.zeros(2 * width, dtype=torch.float64)
    for rows in train.split(4096):
        f, j = features[rows], jacobian[rows]
        force, fall = psi.hidden_gradient(f, j) * radius, chi.hidden_gradient(f, j) * radius
        drift = (data.v[rows, :, None] * fall).sum(1)
        designs = [torch.cat([(sv[rows, :, None] * force).sum(1), drift], 1) for sv in data.sv]
        w = data.weight[rows, None]
        cross = ((w * designs[0]).T @ designs[-1]).double()
        matrix += (cross + cross.T) / 2
        right = designs[0].T @ (w[:, 0] * data.start[-1][rows])
        right += designs[-1].T @ (w[:, 0] * data.start[0][rows])
        vector += right.double() / 2
    size = matrix.diagonal().clamp_min(1e-12 * float(matrix.diagonal().max())).sqrt()
    scaled = matrix / size / size[:, None]
    for ridge in _RIDGES:
        solution = torch.linalg.solve(scaled + ridge * torch.eye(2 * width), vector / size) / size
        _output(psi).copy_(solution[None, :width])
        _output(chi).copy_(solution[None, width:])
        judge({"epoch": epochs + 1.0, "ridge": ridge})
