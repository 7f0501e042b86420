"""Plummer spheres (G = M = b = 1) seen through ε: what flows of the stars that are seen tell.

2¹⁸ stars are seen within 5 b: of the whole sphere, through a smooth ε, and through fields of dust of
P(k) ∝ k⁻³ around the middle, of 0.6 and of 0.9 mag per b. Two flows, averaged, give p(v|x) and n_obs. Φ, n
and ε = n_obs/n follow from `fit_dust` in two ways, both of p(v|x) alone: by moments of the stars weighed with
t/n_obs, and by the flows' scores. Errors are root mean squares over positions with r uniform in 0.3-3 b, and
over draws: of stars, and of the field of dust that they are behind.
Nothing tells ε where there are no stars: behind a field of dust, which has structure of any size, it is also
compared at the stars that are seen, in regions of some 512 stars each, and with the best that counts allow.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._dust_exact import SPHERE, acceleration_error, places, smooth_log_epsilon, thinned
from benchmarks._dust_limit import least_errors
from benchmarks._gravity_parts import part
from galray.gravity import DustField, DustSettings, Region, fit_dust
from galray.mocks import DustMap
from galray.mocks import DustSettings as MockDust
from galray.phasespace import Ball, FlowPart, FlowSettings, build_model, load_model, objective, save_model
from galray.training import TrainingSettings, fit, split

__all__ = ["measure"]

FLOW = FlowSettings(position=FlowPart(kind="gaussians", bins=128))
PEER = "p(v|x) 2 %, epsilon and n 5 % (Kalda & Green 2026)"
DUST = MockDust(
    extinction_mag_kpc=0.6,
    height_kpc=1e6,
    log_amplitude=0.8,
    outer_scale_kpc=4.0,
    clouds=0,
    limit_mag=None,
    cell_kpc=0.125,
)
FIT: dict[str, Any] = {
    "variant": "conditional",
    "num_potential_splines": (9, 13),
    "concentration": (2.0, 2.0),
    "selection_basis": "Rz",
    "num_selection_splines": (7, 9),
    "selection_concentration": (1.5, 1.5),
    "selection_amplitude": 10.0,
    "max_bound_fraction": 1.0,
}
WAYS: dict[str, dict[str, Any]] = {
    "moments": {"basis": "moments", "penalty": "evidence", "positive_mass": True, "max_stars": 2**20},
    "scores": {"basis": "spline", "max_stars": 60_000},
}
SMOOTH: dict[str, Any] = {
    "no dust": lambda x: torch.zeros(len(x), dtype=torch.float64),
    "smooth epsilon": smooth_log_epsilon,
}
FIELDS = {"field of dust": DUST.extinction_mag_kpc, "thick field of dust": 0.9}
BARRED = ("smooth epsilon", "field of dust")
VELOCITIES = 1000
REGION_STARS = 512
SEEDS = (31, 32, 33)  # of the draws: stars, and their field of dust
BALL = Region((0.0, 0.0, 0.0), 5.0)


@cache
def log_epsilon(case: str, seed: int) -> Any:
    """The selection of a case; fields of dust differ from draw to draw."""
    if case not in FIELDS:
        return SMOOTH[case]
    settings = DUST.model_copy(update={"extinction_mag_kpc": FIELDS[case]})
    dust = DustMap(settings, BALL.center, BALL.radius, seed)
    return lambda x: torch.from_numpy(dust.log_efficiency(x.numpy()))


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
    w = thinned(task["stars"], task["seed"], log_epsilon(task["case"], task["seed"]), ball=BALL)
    training = TrainingSettings(epochs=task["epochs"], batch_size=1024)
    seed = task["member"]
    train, held = split(len(w), training.validation_fraction, seed)
    model = build_model("flow", FLOW, Ball(BALL.center, BALL.radius), w[train], seed=seed)
    model.start_at(w[train], torch.Generator().manual_seed(seed))
    goal = objective("flow", FLOW)
    result = fit(model, goal, w[train].float(), w[held].float(), training, seed=seed)
    save_model(model, folder / "model")
    return {"best": result.best}


def _flows(quick: bool, case: str, seed: int) -> tuple[list[Any], dict[str, Any], float]:
    """Trained flows, what they are, and their CPU time."""
    count, epochs, members = (2**15, 4, 1) if quick else (2**18, 8, 2)
    flows, seconds = [], 0.0
    for member in range(members):
        task = {
            "what": "Plummer behind dust, flow",
            "case": case,
            "seed": seed,
            "radius": BALL.radius,
            "stars": count,
            "epochs": epochs,
            "member": member,
            "dust": DUST.model_dump(mode="json"),
            "flow": FLOW.model_dump(mode="json"),
        }
        found, folder = part(task, partial(_train, task))
        flows.append(load_model(folder / "model"))
        seconds += found["cpu_seconds"]
    about = {k: v for k, v in task.items() if k != "member"}
    return flows, about | {"members": members}, seconds


def _case(quick: bool, case: str, seed: int) -> tuple[dict[str, float], float]:
    flows, about, seconds = _flows(quick, case, seed)
    judged = about | {"what": "Plummer behind dust, judged", "fit": FIT | WAYS}
    out, _ = part(judged, lambda _: _judge(_Mean(flows), case, seed, about["stars"]))
    return out, seconds + out["cpu_seconds"]


def _by_regions(field: DustField, w: Tensor, log_true: Any) -> float:
    """The scatter of log ε̂/ε over regions of at least `REGION_STARS` stars, ε̂ = stars/∫ n̂ d³x.

    Integrals are means over stars of the sphere before the dust.
    """
    x, every = (y[y.norm(dim=1) < 0.95 * BALL.radius] for y in (w[:, :3], SPHERE.sample(2**20, 99)[:, :3]))
    truth = log_true(every).exp()
    found = torch.cat([field.log_density(part) for part in every.split(65_536)])
    ratio = (found - torch.log(SPHERE.number_density(every))).exp()
    open_, off = [(x, torch.arange(len(every)))], []
    while open_:
        stars, rows = open_.pop()
        if len(stars) < 2 * REGION_STARS:
            mean = float(truth[rows].mean())
            if mean > 0.05 and 0.3 < float(every[rows].norm(dim=1).mean()) < 3:
                off.append(np.log(len(stars) / float(ratio[rows].sum()) / mean))
            continue
        axis = int(stars.std(0).argmax())
        cut = stars[:, axis].median()
        low, below = stars[:, axis] < cut, every[rows, axis] < cut
        open_ += [(stars[low], rows[below]), (stars[~low], rows[~below])]
    return float(np.std(off))


def _judge(model: _Mean, case: str, seed: int, count: int) -> dict[str, float]:
    truth_of = log_epsilon(case, seed)
    w = thinned(count, seed, truth_of, ball=BALL)
    x = places(2048)
    log_true = truth_of(x)
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
    log_n = torch.log(SPHERE.number_density(x))
    observed = model.log_density(x) - log_n - log_true
    stars = w[:, :3][(w[:, :3].norm(dim=1) > 0.3) & (w[:, :3].norm(dim=1) < 3)]
    stars = stars[truth_of(stars) > np.log(0.05)][:4096]
    true_there = truth_of(stars)
    out = {
        "mean": float(mean),
        "dispersion": float(dispersion),
        "divergence": float(divergence.mean()),
        "observed": float(observed[bright].std()),
    }
    for way, options in WAYS.items():
        field = fit_dust(model, w, DustSettings.model_validate(FIT | options), seed=1, check=False)
        off = field.log_density(x) - log_n
        out |= {
            f"{way}: n": float(off[bright].std()),
            f"{way}: epsilon": float((observed - off)[bright].std()),
            f"{way}: stars": float((model.log_density(stars) - field.log_density(stars) - true_there).std()),
            f"{way}: regions": _by_regions(field, w, truth_of),
            f"{way}: acceleration": acceleration_error(field, x),
        }
    return out


def _draws(quick: bool, case: str) -> tuple[int, ...]:
    """Seeds of a case; what has no bar is told of one draw."""
    return SEEDS if not quick and case in ("no dust", *BARRED) else SEEDS[:1]


def _rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def measure(bench: Bench) -> None:
    """Every row of the group: the rms over draws, and beside its unit each draw's own."""
    found = {
        case: [_case(bench.quick, case, seed) for seed in _draws(bench.quick, case)]
        for case in (*SMOOTH, *FIELDS)
    }
    words = {
        "mean": "p(v|x): mean / dispersion, where epsilon > 0.02",
        "dispersion": "p(v|x): dispersion, where epsilon > 0.02",
        "divergence": "p(v|x): KL divergence, where epsilon > 0.02",
        "observed": "n of the stars seen, by the flows, where epsilon > 0.05",
    }
    for way in WAYS:
        words |= {
            f"{way}: n": f"n before the dust by {way}, where epsilon > 0.05",
            f"{way}: epsilon": f"epsilon by {way}, where > 0.05",
            f"{way}: stars": f"epsilon by {way} at the stars seen, where > 0.05",
            f"{way}: regions": f"epsilon by {way} in regions of {REGION_STARS} stars and more, where > 0.05",
            f"{way}: acceleration": f"acceleration by {way}",
        }
    bars = {"mean": 0.03, "dispersion": 0.03, "divergence": 0.03} | dict.fromkeys(
        ("moments: n", "moments: epsilon", "moments: regions"), 0.07
    )
    count = 2**15 if bench.quick else 2**18
    for case, draws in found.items():
        label = f"Plummer, {count} stars, {case}"
        seconds = sum(spent for _, spent in draws)

        def row(
            text: str,
            value: float,
            each: list[float],
            unit: str,
            label: str = label,
            seconds: float = seconds,
            **more: Any,
        ) -> None:
            of = f"draws: {' '.join(f'{v:.3g}' for v in each)}"
            bench.row(f"{label}: {text}", value, f"{unit}, {of}", cpu_seconds=seconds, **more)

        barred = not bench.quick and case in BARRED
        for name, text in words.items():
            each = [values[name] for values, _ in draws]
            row(
                text,
                _rms(each),
                each,
                "nats" if name == "divergence" else "rms",
                bar=bars.get(name) if barred else None,
                peer=PEER if name in bars else "",
            )
        for way in () if case == "no dust" else WAYS:
            key = f"{way}: acceleration"
            pairs = [(a[key], b[key]) for (a, _), (b, _) in zip(draws, found["no dust"], strict=False)]
            row(
                f"{words[key]}, error over that without dust",
                _rms([a for a, _ in pairs]) / _rms([b for _, b in pairs]),
                [a / b for a, b in pairs],
                "ratio of rms",
                bar=1.5 if barred and way == "moments" else None,
            )
    for case in FIELDS:
        with bench.cpu():
            limits = [_limit(bench, case, seed) for seed in _draws(bench.quick, case)]
        for text, values in zip(("", " at the stars seen"), zip(*limits, strict=True), strict=True):
            bench.row(
                f"Plummer, {count} stars, {case}: epsilon{text}, least error that counts allow",
                _rms(list(values)),
                "rms",
                peer="linear, n and the dust's spectrum known",
            )


def _limit(bench: Bench, case: str, seed: int) -> tuple[float, float]:
    truth_of = log_epsilon(case, seed)
    directions = torch.nn.functional.normalize(places(400), dim=1)

    def efficiency(r: np.ndarray) -> np.ndarray:
        return np.array([float(truth_of(directions * float(one)).exp().mean()) for one in r])

    return least_errors(
        DUST.model_copy(update={"extinction_mag_kpc": FIELDS[case]}),
        lambda r: -2.5 * np.log1p(r**2),
        efficiency,
        2**15 if bench.quick else 2**18,
        BALL.radius,
    )
