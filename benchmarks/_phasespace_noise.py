"""Noise: the part of the bias of ignored errors in σ_z and a_z that noise-aware training removes.

A disc mock is observed with the errors of Gaia DR3 for stars some two magnitudes fainter than its giants:
2.6 % of the distance at 1 kpc, 5 % at 2 kpc, 8 % at 3 kpc. Each method is trained three times on the same
stars: before their errors, on the measured ones with the errors ignored, and deconvolved. With q averaged
over places at 1.5 to 2.6 kpc from the Sun, 0.4 to 1.5 kpc from the plane, the part removed is

    1 − |Σ (q_deconvolved − q_free) / Σ (q_ignored − q_free)|,

sums over realisations, its error from a jackknife over them. The sampling noise of the stars is common to the
three and cancels; the truth is not used.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._phasespace_common import PARTS, part
from benchmarks._phasespace_noisy_stars import OBSERVER, NoisyStars, noisy_stars
from galray.gravity import (
    Moments,
    MomentsSettings,
    PotentialSettings,
    StarErrors,
    fit_potential,
    noise_corrected,
)
from galray.mocks import MilkyWay
from galray.phasespace import (
    BaseSettings,
    FlowSettings,
    NoiseSettings,
    ScoreSettings,
    attach_errors,
    build_model,
    load_model,
    objective,
    posterior_stars,
    save_model,
)
from galray.provenance import content_hash
from galray.training import TrainingSettings, fit, split

__all__ = ["measure"]

TREATMENTS = ("free", "ignore", "deconvolve")
STARS: dict[str, Any] = {"count": 400_000, "parts": 4, "scale": 2.0, "radius": 3.3, "beyond": 4.5, "seed": 7}
DECONVOLVE = NoiseSettings(treatment="deconvolve", observer=OBSERVER)
MODELS: dict[str, dict[str, Any]] = {
    "flow": {"coordinates": "cylindrical"},
    "score": {"coordinates": "cylindrical", "base": BaseSettings().model_dump()},
}
TRAINING = {
    "flow": {"epochs": 12, "batch_size": 512},
    "score": {"epochs": 10, "batch_size": 512, "learning_rate": 1e-2},
}
MOMENTS = {"num_potential_splines": (6, 9), "num_test_splines": (8, 14), "penalty": 1.0}
VELOCITIES = 2000
LIMIT = 3.0
REALISED: dict[str, list[NoisyStars]] = {}


def places() -> Tensor:
    """Where σ_z and a_z are judged: shape (200, 3), in kpc."""
    generator = torch.Generator().manual_seed(1)
    offset = 5.2 * torch.rand(20_000, 3, generator=generator, dtype=torch.float64) - 2.6
    distance, height = offset.norm(dim=1), (offset[:, 2] + OBSERVER[2]).abs()
    kept = (distance > 1.5) & (distance < 2.6) & (height > 0.4) & (height < 1.5)
    return (offset[kept] + torch.tensor(OBSERVER[:3], dtype=torch.float64))[:200]


def realisation(stars: dict[str, Any], number: int) -> NoisyStars:
    """One realisation of the stars, kept while the process lives."""
    key = repr(stars)
    if key not in REALISED:
        REALISED.clear()
        REALISED[key] = noisy_stars(**stars)
    return REALISED[key][number]


def pull(field: Any) -> float:
    """a_z against that of the mock over the places: Σ a a_true / Σ a_true²."""
    x = places()
    truth = MilkyWay().potential.acceleration(x)[:, 2]
    a = field.acceleration(x).detach()[:, 2]
    return float((a * truth).sum() / truth.square().sum())


def dispersion(model: Any, stars: NoisyStars) -> float:
    """σ_z of a model, rms over the places, from p(v|x) within three standard deviations of the mean.

    By importance sampling. Mean and covariance are those of the nearest stars before their errors, the same
    for all models; beyond, where there are hardly any stars, a score network says nothing.
    """
    x = places()[::2]
    generator = torch.Generator().manual_seed(2)
    near = torch.cdist(x, stars.true[:, :3]).topk(300, largest=False).indices
    v = stars.true[near][..., 3:]
    mean = v.mean(1, keepdim=True)
    root = torch.linalg.cholesky((v - mean).mT @ (v - mean) / v.shape[1])
    # directions with radii of density ∝ r² exp(−r²/4) up to 3: a normal of twice the variance
    grid = torch.linspace(0.0, LIMIT, 1001, dtype=torch.float64)
    mass = (grid.square() * torch.exp(-grid.square() / 4)).cumsum(0)
    uniform = torch.rand(len(x), VELOCITIES, generator=generator, dtype=torch.float64)
    radius = grid[torch.searchsorted(mass / mass[-1], uniform).clamp_max(1000)]
    direction = torch.randn(len(x), VELOCITIES, 3, generator=generator, dtype=torch.float64)
    z = radius.unsqueeze(-1) * direction / direction.norm(dim=-1, keepdim=True)
    drawn = mean + z @ root.mT
    w = torch.cat([x.unsqueeze(1).expand_as(drawn), drawn], -1)
    with torch.no_grad():
        log_f = log_density(model, w.flatten(0, 1)).view(radius.shape)
    weight = torch.softmax(log_f + radius.square() / 4, 1)
    vz = drawn[..., 2]
    variance = (weight * vz.square()).sum(1) - (weight * vz).sum(1).square()
    return math.sqrt(float(variance.mean()))


def log_density(model: Any, w: Tensor) -> Tensor:
    """Log f but for a constant at each position, w (n, 6): shape (n,)."""
    if model.kind == "flow":
        return torch.cat([model.log_conditional(p) for p in w.split(50_000)])
    found = []
    for p in w.split(50_000):
        u = model.chart(p).to(next(model.parameters()).dtype)
        found.append((model.base.log_prob(u) + model.correction.potential(u)).double())
    return torch.cat(found)


def train_part(task: dict[str, Any]) -> dict[str, Any]:
    """Train one model in one way on one realisation: its σ_z and a_z."""
    stars = realisation(task["stars"], task["realisation"])
    kind, treatment, seed = task["model"], task["treatment"], task["realisation"]
    w = stars.true if treatment == "free" else stars.measured
    noise = {"noise": DECONVOLVE} if treatment == "deconvolve" else {}
    settings = (FlowSettings if kind == "flow" else ScoreSettings).model_validate(
        {**task["settings"], **noise}
    )
    rows = attach_errors(w, stars.covariance) if treatment == "deconvolve" else w
    training = TrainingSettings.model_validate(task["training"])
    train, held = split(len(w), training.validation_fraction, seed)
    folder = PARTS / "noise-models" / content_hash(task)
    if (folder / "model.safetensors").is_file():
        model = load_model(folder)
    else:
        model = build_model(kind, settings, stars.ball, w[train], seed=seed)
        fit(model, objective(kind, settings), rows[train], rows[held], training, seed=seed)
        save_model(model, folder)
    at = posterior_stars(model, rows, DECONVOLVE, seed=seed) if treatment == "deconvolve" else w
    field = fit_potential(model, at, PotentialSettings(basis="spline", form="instrument"), seed=seed)
    return {"sigma_z": dispersion(model, stars), "a_z": pull(field)}


def moments_part(task: dict[str, Any]) -> dict[str, Any]:
    """Gravity by moments in one way on one realisation, and σ_z from freed means of v_z and v_z²."""
    stars = realisation(task["stars"], task["realisation"])
    treatment = task["treatment"]
    w = (stars.true if treatment == "free" else stars.measured).numpy()
    errors = StarErrors(stars.covariance.numpy(), OBSERVER) if treatment == "deconvolve" else None
    noise = "deconvolve" if errors else "ignore"
    settings = MomentsSettings.model_validate({**task["settings"], "noise": noise})
    field, _ = Moments(settings, stars.ball).fit(w, num_blocks=5, errors=errors)
    return {"sigma_z": weighted_dispersion(w, errors), "a_z": pull(field)}


def weighted_dispersion(w: np.ndarray, errors: StarErrors | None) -> float:
    """σ_z of the stars under smooth windows about the Sun's radius and heights of ±0.3 kpc, rms over both."""
    still = errors or StarErrors(np.zeros((len(w), 6, 6)))
    variances = []
    for center in (-0.3, 0.3):
        means = []
        for power in range(3):

            def function(s: Any, center: float = center, power: int = power) -> Any:
                offset = [s[:, i] - OBSERVER[i] for i in range(3)]
                square = offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2
                window = np.clip(1.0 - square / 3.2**2, 0.0, 1.0) ** 3
                offset_r = np.hypot(s[:, 0], s[:, 1]) - 8.1
                window = window * np.exp(-0.5 * (offset_r / 0.5) ** 2)
                window = window * np.exp(-0.5 * ((s[:, 2] - center) / 0.25) ** 2)
                return window * s[:, 5] ** power if power else window

            means.append(noise_corrected(function, w, still).mean())
        variances.append(means[2] / means[0] - (means[1] / means[0]) ** 2)
    return math.sqrt(float(np.mean(variances)))


def removed(found: dict[str, list[dict[str, Any]]], name: str) -> tuple[float, float, float]:
    """The part of the bias removed, its jackknife error, and the relative bias of ignoring the errors."""
    free, ignored, mended = (np.array([f[name] for f in found[t]]) for t in TREATMENTS)
    value = lambda keep: 1 - abs((mended - free)[keep].sum() / (ignored - free)[keep].sum())  # noqa: E731
    n = len(free)
    every = np.arange(n)
    replicas = np.array([value(every != i) for i in range(n)])
    error = math.sqrt((n - 1) / n * ((replicas - replicas.mean()) ** 2).sum()) if n > 1 else math.nan
    return float(value(every >= 0)), error, float((ignored / free - 1).mean())


def measure(bench: Bench) -> None:
    """Rows: part of the bias removed in σ_z and in a_z, for moments, flow and score."""
    for method in ("moments", *MODELS):
        rows_of(bench, method)


def rows_of(bench: Bench, method: str) -> None:
    """The two rows of one method."""
    stars = {**STARS, "count": 100_000, "parts": 2} if bench.quick else STARS
    if method == "moments":
        do, common = moments_part, {"settings": MOMENTS}
    else:
        do = train_part
        common = {"model": method, "settings": MODELS[method], "training": TRAINING[method]}
    found: dict[str, list[dict[str, Any]]] = {t: [] for t in TREATMENTS}
    for number in range(1 if bench.quick else STARS["parts"]):
        for treatment in TREATMENTS:
            task = {"stars": stars, "realisation": number, "treatment": treatment, **common}
            found[treatment].append(part(bench, "noise", task, do))
    seconds = {t: float(np.mean([f["cpu_seconds"] for f in found[t]])) for t in TREATMENTS}
    for name in ("sigma_z", "a_z"):
        value, error, bias = removed(found, name)
        bench.row(
            f"noise: {method}, part of the bias in {name} removed",
            value,
            at_least=True,
            bar=None if bench.quick else 0.8,
            peer=f"± {error:.2f}; bias of ignoring {100 * bias:+.2f} %, {seconds['ignore']:.0f} CPU-s",
            cpu_seconds=seconds["deconvolve"],
        )
