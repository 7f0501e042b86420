"""Rows of score networks where few stars are far faster than the rest: a Plummer sphere with contaminants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._phasespace_common import BALL, HELD_OUT, median_error, part
from galray.mocks import PlummerSphere
from galray.phasespace import ScoreSettings, build_model, objective
from galray.training import ScoreTrainingSettings, TrainingSettings, fit, split
from galray.units import G

__all__ = ["FastStars", "measure"]


class FastStars:
    """A Plummer sphere of which a part has Gaussian velocities of several times the dispersion.

    f = n(x) [(1 − p) p_Plummer(v|x) + p N(v; 0, (k σ)²)], σ the sphere's 1-D dispersion over all its stars.

    Arguments:
        part: p.
        times: k.
    """

    def __init__(self, part: float = 0.01, times: float = 7.0) -> None:
        self.sphere = PlummerSphere(1.0 / G, 1.0)
        self.part = part
        # ⟨v²⟩ = GM/b 3π/32, virial theorem
        self.dispersion = times * (torch.pi / 32.0) ** 0.5

    def sample(self, n: int, seed: int) -> Tensor:
        """Stars, shape (n, 6)."""
        w = self.sphere.sample(n, seed)
        generator = torch.Generator().manual_seed(seed)
        fast = torch.rand(n, generator=generator, dtype=torch.float64) < self.part
        v = self.dispersion * torch.randn(n, 3, generator=generator, dtype=torch.float64)
        w[:, 3:] = torch.where(fast.unsqueeze(-1), v, w[:, 3:])
        return w

    def score(self, w: Tensor) -> Tensor:
        """∇ log f, shape (n, 6)."""
        x = w[:, :3].clone().requires_grad_(True)
        log_n = self.sphere.number_density(x).log()
        by_x = torch.autograd.grad(log_n.sum(), x)[0]
        slow = self.sphere.log_prob(w) + torch.log(torch.tensor(1.0 - self.part))
        square = w[:, 3:].square().sum(-1) / self.dispersion**2
        norm = 1.5 * torch.log(torch.tensor(2.0 * torch.pi * self.dispersion**2))
        fast = log_n.detach() - 0.5 * square - norm + torch.log(torch.tensor(self.part))
        r = torch.sigmoid(slow - fast).unsqueeze(-1)
        of_fast = torch.cat([by_x, -w[:, 3:] / self.dispersion**2], -1)
        return torch.where(r > 0, r * self.sphere.score(w).nan_to_num(), 0.0) + (1.0 - r) * of_fast


FAST = 2.0  # speed beyond which only the contaminants are found: the sphere's escape speed is below √2
FORMS: dict[str, dict[str, Any]] = {
    "as ever": {},
    "velocity_weight = 2": {"velocity_weight": 2.0},
    "base of two Gaussians": {"base": {"components": 2}},
    "both": {"base": {"components": 2}, "velocity_weight": 2.0},
}


def tails_part(task: dict[str, Any]) -> dict[str, Any]:
    """Train one network on stars of which one in a hundred is fast, and compare it with the truth.

    Arguments:
        task: ``stars``, ``seed``, ``score`` and ``training`` (settings as JSON values).
    """
    truth = FastStars()
    w = truth.sample(int(1.2 * (task["stars"] + 2 * HELD_OUT)), task["seed"])
    w = w[BALL.contains(w[:, :3])]
    w, held = w[: task["stars"]], w[task["stars"] :][: 2 * HELD_OUT]
    settings = ScoreSettings.model_validate(task["score"])
    training = TrainingSettings.model_validate(task["training"])
    train, other = split(len(w), training.validation_fraction, task["seed"])
    model = build_model("score", settings, BALL, w[train], seed=task["seed"])
    goal = objective("score", settings)
    result = fit(model, goal, w[train].float(), w[other].float(), training, seed=task["seed"])
    score, exact = model.score(held), truth.score(held)
    fast = held[:, 3:].norm(dim=-1) > FAST
    return {
        "slow": median_error(score[~fast], exact[~fast]),
        "fast": median_error(score[fast], exact[fast]),
        "num_fast": int(fast.sum()),
        "loss": result.best,
    }


def measure(bench: Bench) -> None:
    """Errors of the slow and of the fast stars, for every remedy."""
    count, epochs = (2**13, 5) if bench.quick else (2**15, 15)
    for name, score in FORMS.items():
        task = {
            "stars": count,
            "seed": 1,
            "score": ScoreSettings.model_validate(score).model_dump(mode="json"),
            "training": ScoreTrainingSettings(epochs=epochs).model_dump(mode="json"),
        }
        found = part(bench, "tails", task, tails_part)
        label = f"Plummer with 1 % of stars at 7 σ, {count} stars, {name}"
        for which in ("slow", "fast"):
            bench.row(f"{label}: {which} stars", found[which], cpu_seconds=found["cpu_seconds"])
