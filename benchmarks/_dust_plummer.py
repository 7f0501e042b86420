"""Plummer spheres (G = M = b = 1) seen through ε: what flows of the stars that are seen tell.

2¹⁸ stars are seen within 4 b: of the whole sphere, through a smooth ε, and through a field of dust of
P(k) ∝ k⁻³ around the middle. A few flows, averaged, give p(v|x) and n_obs. Φ, n and ε = n_obs/n follow
from them in two ways: by the conditional fit of p(v|x), and by moments of the stars, weighed by n_obs so that
an ε(R, z) is left to solve for. Errors are root mean squares over positions with r uniform in 0.3-3 b.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._dust_exact import BALL, SPHERE, acceleration_error, places, smooth_log_epsilon, thinned
from benchmarks._gravity_parts import part
from galray.gravity import DustSettings, Moments, MomentsSettings, fit_dust
from galray.mocks import DustMap
from galray.mocks import DustSettings as MockDust
from galray.phasespace import Ball, FlowPart, FlowSettings, build_model, load_model, objective, save_model
from galray.training import TrainingSettings, fit, split

__all__ = ["measure"]

FLOW = FlowSettings(position=FlowPart(kind="gaussians", bins=48))
PEER = "p(v|x) 2 %, epsilon and n 5 % (Kalda & Green 2026)"
DUST = MockDust(
    extinction_mag_kpc=0.9,
    height_kpc=1e6,
    log_amplitude=0.8,
    outer_scale_kpc=4.0,
    clouds=0,
    limit_mag=None,
    cell_kpc=0.125,
)
FIT: dict[str, Any] = {
    "variant": "conditional",
    "potential_basis": "Rz",
    "num_potential_splines": (9, 13),
    "concentration": (2.0, 2.0),
    "selection_basis": "Rz",
    "num_selection_splines": (7, 9),
    "selection_concentration": (1.5, 1.5),
    "selection_amplitude": 10.0,
    "max_bound_fraction": 1.0,
    "basis": "spline",
    "max_stars": 60_000,
}
MOMENTS = MomentsSettings(
    num_potential_splines=(9, 13),
    num_test_splines=(11, 17),
    concentration=(2.0, 2.0),
    selection="shared",
    num_selection_splines=(7, 9),
    selection_concentration=(1.5, 1.5),
    selection_amplitude=5.0,
    penalty="evidence",
    window=0.3,
)
AZIMUTHS = 24
VELOCITIES = 1000


def log_epsilons() -> dict[str, Any]:
    """The selections by name."""
    dust = DustMap(DUST, (0.0, 0.0, 0.0), BALL.radius, 3)
    return {
        "no dust": lambda x: torch.zeros(len(x), dtype=torch.float64),
        "smooth epsilon": smooth_log_epsilon,
        "field of dust": lambda x: torch.from_numpy(dust.log_efficiency(x.numpy())),
    }


class _Mean:
    """Flows averaged: differentiated inside each, combined after."""

    def __init__(self, flows: list[Any]) -> None:
        self.flows = flows
        self.ball = flows[0].ball

    def conditional_score(self, w: Tensor) -> Tensor:
        return torch.stack([flow.conditional_score(w) for flow in self.flows]).mean(0)

    @torch.no_grad()
    def log_density(self, x: Tensor) -> Tensor:
        return torch.stack([flow.log_density(x) for flow in self.flows]).mean(0)

    @torch.no_grad()
    def log_conditional(self, w: Tensor) -> Tensor:
        each = torch.stack([flow.log_conditional(w) for flow in self.flows])
        return torch.logsumexp(each, 0) - np.log(len(self.flows))


def _train(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    w = thinned(task["stars"], 11, log_epsilons()[task["case"]])
    training = TrainingSettings(epochs=task["epochs"], batch_size=1024)
    seed = task["member"]
    train, held = split(len(w), training.validation_fraction, seed)
    model = build_model("flow", FLOW, Ball(BALL.center, BALL.radius), w[train], seed=seed)
    goal = objective("flow", FLOW)
    result = fit(model, goal, w[train].float(), w[held].float(), training, seed=seed)
    save_model(model, folder / "model")
    return {"best": result.best}


def _case(bench: Bench, case: str) -> tuple[dict[str, float], float]:
    count, epochs, members = (2**15, 4, 1) if bench.quick else (2**18, 8, 3)
    flows, seconds = [], 0.0
    for member in range(members):
        task = {
            "what": "Plummer behind dust, flow",
            "case": case,
            "stars": count,
            "epochs": epochs,
            "member": member,
            "dust": DUST.model_dump(mode="json"),
            "flow": FLOW.model_dump(mode="json"),
        }
        found, folder = part(task, lambda f, t=task: _train(t, f))
        flows.append(load_model(folder / "model"))
        seconds += found["cpu_seconds"]
    begin = time.process_time()
    out = _judge(_Mean(flows), case, count)
    return out, seconds + time.process_time() - begin


def _axial_mean(model: _Mean, x: Tensor) -> Tensor:
    """Log of the density averaged over rings about the z axis, at positions (n, 3)."""
    radius = x[:, :2].norm(dim=1)
    parts = []
    for k in range(AZIMUTHS):
        angle = 2 * np.pi * (k + 0.5) / AZIMUTHS
        turned = torch.stack([radius * np.cos(angle), radius * np.sin(angle), x[:, 2]], 1)
        parts.append(torch.cat([model.log_density(part) for part in turned.split(65_536)]))
    return torch.logsumexp(torch.stack(parts), 0) - np.log(AZIMUTHS)


def _by_moments(model: _Mean, w: Tensor, x: Tensor, bright: Tensor, log_true: Tensor) -> dict[str, float]:
    """Errors of Φ, n and ε from moments of stars weighed by the flows' density."""
    deep = w[w[:, :3].norm(dim=1) < 0.99 * BALL.radius]
    seen = torch.cat([model.log_density(part) for part in deep[:, :3].split(65_536)])
    weights = (_axial_mean(model, deep[:, :3]) - seen).exp()
    moments = Moments(MOMENTS, BALL)
    _, blocks = moments.fit(deep.numpy(), weights.numpy())
    found = moments.result(blocks)
    log_n = _axial_mean(model, x) - found.selections["shared"].log_efficiency(x)
    truth = torch.log(SPHERE.number_density(x))
    return {
        "n": float((log_n - truth)[bright].std()),
        "epsilon": float((model.log_density(x) - log_n - log_true)[bright].std()),
        "acceleration": acceleration_error(found.potential, x),
    }


def _judge(model: _Mean, case: str, count: int) -> dict[str, float]:
    log_epsilon = log_epsilons()[case]
    w = thinned(count, 11, log_epsilon)
    field = fit_dust(
        model, w, DustSettings.model_validate(FIT), seed=1, log_density=model.log_density, check=False
    )
    x = places(2048)
    log_true = log_epsilon(x)
    seen, bright = log_true > np.log(0.02), log_true > np.log(0.05)
    some = x[seen][:400]
    generator = torch.Generator().manual_seed(1)
    v = torch.cat([flow.sample_velocity(some, VELOCITIES, generator) for flow in model.flows])
    # the sphere's: isotropic, ⟨v²⟩ = −Φ/2 at every place
    sigma = torch.sqrt(-SPHERE.potential_field.potential(some) / 6)
    truth = SPHERE.sample_velocity(some, VELOCITIES, 7)
    pairs = torch.cat([some.expand(VELOCITIES, *some.shape), truth], -1).reshape(-1, 6)
    exact = SPHERE.log_prob(pairs) - torch.log(SPHERE.number_density(pairs[:, :3]))
    divergence = torch.cat(
        [e - model.log_conditional(p) for e, p in zip(exact.split(16_384), pairs.split(16_384), strict=True)]
    )
    # the scatter of the draw is in these figures too
    mean = (v.mean(0) / sigma[:, None]).square().mean().sqrt()
    dispersion = (v.square().sum(-1).mean(0).div(3).sqrt() / sigma - 1).square().mean().sqrt()
    log_n = field.log_density(x[bright]) - torch.log(SPHERE.number_density(x[bright]))
    log_e = model.log_density(x[bright]) - field.log_density(x[bright]) - log_true[bright]
    observed = model.log_density(x[bright]) - torch.log(SPHERE.number_density(x[bright])) - log_true[bright]
    out = _by_moments(model, w, x, bright, log_true)
    return out | {
        "mean": float(mean),
        "dispersion": float(dispersion),
        "divergence": float(divergence.mean()),
        "observed": float(observed.std()),
        "conditional n": float(log_n.std()),
        "conditional epsilon": float(log_e.std()),
        "conditional acceleration": acceleration_error(field, x),
    }


def measure(bench: Bench) -> None:
    """Every row of the group."""
    found = {case: _case(bench, case) for case in log_epsilons()}
    bars = {"mean": 0.03, "dispersion": 0.03, "divergence": 0.03, "epsilon": 0.07, "n": 0.07}
    words = {
        "mean": "p(v|x): mean / dispersion, where epsilon > 0.02",
        "dispersion": "p(v|x): dispersion, where epsilon > 0.02",
        "divergence": "p(v|x): KL divergence, where epsilon > 0.02",
        "observed": "n of the stars seen, by the flows, where epsilon > 0.05",
        "epsilon": "epsilon by moments, where > 0.05",
        "n": "n before the dust by moments, where epsilon > 0.05",
        "acceleration": "acceleration by moments",
        "conditional epsilon": "epsilon by the conditional fit, where > 0.05",
        "conditional n": "n before the dust by the conditional fit, where epsilon > 0.05",
        "conditional acceleration": "acceleration by the conditional fit",
    }
    count = 2**15 if bench.quick else 2**18
    for case, (values, seconds) in found.items():
        label = f"Plummer, {count} stars, {case}"
        for name, text in words.items():
            bench.row(
                f"{label}: {text}",
                values[name],
                "nats" if name == "divergence" else "rms",
                bar=None if bench.quick or case == "no dust" else bars.get(name),
                peer=PEER if name in bars else "",
                cpu_seconds=seconds,
            )
        for way in () if case == "no dust" else ("acceleration", "conditional acceleration"):
            bench.row(
                f"{label}: {words[way]}, error over that without dust",
                values[way] / found["no dust"][0][way],
                bar=None if bench.quick else 1.5,
                cpu_seconds=seconds,
            )
