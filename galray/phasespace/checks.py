"""How good a model is, without knowing the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.findings import Finding, judge
from galray.phasespace.objectives import objective
from galray.phasespace.selection import SelectionEfficiency
from galray.phasespace.stein import curl_and_noise, local_identities, stein_identities

__all__ = ["agreement", "check_agreement", "held_out", "run_checks", "two_sample"]

NUM_BOOTSTRAP = 200
AGREEMENT_TOLERANCE = 0.3
"""Two models of the same stars may differ by the error of the poorer, which is the flow's: a fifth or so."""
_DIFFERENCED = 4_000
"""Stars of the checks that differentiate the score: twelve evaluations each."""


def held_out(
    model: Any, w: Tensor, *, seed: int, selection: SelectionEfficiency | None = None
) -> tuple[str, Finding]:
    """The objective's own figure on held-out stars, with its bootstrap error, and its name.

    Arguments:
        model: A trained flow or score network.
        w: Held-out stars, shape (n, 6), or (n, 27) with their errors.
        seed: Of the bootstrap.
        selection: Known selection of the stars.
    """
    goal = objective(model.kind, model.settings, selection=selection)
    losses = goal.validate(model, goal.prepare(model, w, validation=True)).to(torch.float64).cpu().numpy()
    return goal.name, Finding(float(losses.mean()), _bootstrap(losses, np.mean, seed))


def _bootstrap(values: np.ndarray, statistic: Any, seed: int) -> float:
    """Standard deviation of a statistic over resamplings of its values."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    count = len(values)
    return float(
        np.std([statistic(values[rng.integers(count, size=count)]) for _ in range(NUM_BOOTSTRAP)], ddof=1)
    )


def two_sample(model: Any, w: Tensor, *, seed: int, steps: int = 400) -> Finding:
    """A classifier between the model's samples and held-out stars: its area under the ROC curve.

    A small network is trained on one half of both and judged on the other; 0.5 means it cannot tell them
    apart. A model of p(v|x) alone draws velocities at the stars' own positions.

    Arguments:
        model: A flow with ``sample(n, generator)`` or ``sample_velocity(x, n, generator)``.
        w: Held-out stars, shape (n, 6).
        seed: Of samples, weights and batches.
        steps: Training steps of 512 stars.

    Raises:
        GalrayError: The model cannot sample.
    """
    generator = torch.Generator().manual_seed(seed)
    real = w.to(torch.float64)
    if hasattr(model, "sample"):
        fake = model.sample(len(real), generator).to(torch.float64)
    elif hasattr(model, "sample_velocity"):
        fake = torch.cat([real[:, :3], model.sample_velocity(real[:, :3], 1, generator)[0]], 1)
    else:
        raise GalrayError("a two-sample test needs a model that samples", "use a flow")
    shift, scale = real.mean(0), real.std(0)
    u = ((torch.cat([real, fake]) - shift) / scale).to(torch.float32).clamp(-20, 20)
    label = torch.cat([torch.ones(len(real)), torch.zeros(len(fake))])
    order = torch.randperm(len(u), generator=generator)
    train, test = order[::2], order[1::2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (512,), generator=generator)]
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(u[batch]).squeeze(-1), label[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        logit = net(u[test]).squeeze(-1)
    positive, negative = label[test] > 0.5, label[test] < 0.5
    rank = torch.empty(len(logit), dtype=torch.float64)
    rank[logit.argsort()] = torch.arange(1, len(logit) + 1, dtype=torch.float64)
    n1, n0 = int(positive.sum()), int(negative.sum())
    area = (float(rank[positive].sum()) - n1 * (n1 + 1) / 2) / (n1 * n0)
    # Of two equal samples (Mann & Whitney 1947).
    return Finding(area, math.sqrt((n1 + n0 + 1) / (12.0 * n1 * n0)), 0.5)


def agreement(first: Any, second: Any, w: Tensor, *, seed: int = 0) -> Finding:
    """Median over stars of |s₁ − s₂| / |½(s₁ + s₂)|, components in units of the coordinates' scales.

    Arguments:
        first: Anything with ``score``.
        second: Another model of the same stars.
        w: Stars that neither was trained on, shape (n, 6).
        seed: Of the bootstrap that gives the error.
    """
    w = w.to(torch.float64)
    scale = w.std(0)
    a, b = (model.score(w).to(torch.float64) * scale for model in (first, second))
    ratio = ((a - b).norm(dim=-1) / (0.5 * (a + b)).norm(dim=-1)).cpu().numpy()
    error = _bootstrap(ratio, np.median, seed)
    return Finding(float(np.median(ratio)), error, 0.0, tolerance=AGREEMENT_TOLERANCE)


def check_agreement(first: Any, second: Any, w: Tensor, *, seed: int) -> dict[str, dict[str, Any]]:
    """`agreement` as the rows that `run_checks` gives."""
    w = _some(w, _DIFFERENCED, seed)
    return judge({"difference of the scores": agreement(first, second, w, seed=seed)})


class _SeenStars:
    """The score of the stars that are seen, which are what the identities are tested on.

    With a known selection that is ∇ log f + ∇ log ε; of a model of p(v|x) alone it is that part.
    """

    def __init__(self, model: Any, selection: SelectionEfficiency | None) -> None:
        self.ball = model.ball
        self._score = model.score if hasattr(model, "score") else model.conditional_score
        self._selection = selection
        self._last: tuple[Tensor, Tensor] | None = None

    def score(self, w: Tensor) -> Tensor:
        """The score at w (n, 6); that of the same stars again is not computed again."""
        if self._last is not None and self._last[0] is w:
            return self._last[1]
        s: Tensor = self._score(w)
        if self._selection is not None:
            s = s + nn.functional.pad(self._selection.log_and_gradient(w[:, :3])[1], (0, 3))
        self._last = (w, s)
        return s


def run_checks(
    model: Any,
    w: Tensor,
    *,
    seed: int,
    max_stars: int = 20_000,
    selection: SelectionEfficiency | None = None,
) -> dict[str, dict[str, Any]]:
    """Every check that applies to a trained model.

    Arguments:
        model: A flow or a score network; of a flow of p(v|x) alone, what concerns velocities is checked.
        w: Held-out stars, shape (n, 6), in kpc and km/s; with their errors, (n, 27), for a model that
            deconvolves them: the identities are then tested on draws of the stars' true places; rows (n, 7)
            of `project_out` for a flow that marginalises radial velocities: those missing are then drawn.
        seed: Of bootstrap, samples, places and classifier.
        max_stars: Most stars used.
        selection: Known smooth selection of the stars that the model was trained with.

    Returns:
        Rows {value, error, expected, allowed, ok} by name; see `judge`. ``expected``, ``allowed`` and ``ok``
        are None where nothing is expected.
    """
    rows = _some(w.to(torch.float64), max_stars, seed)
    states = rows[:, :6]
    if rows.shape[1] == 7:
        from galray.phasespace.sightlines import completed_stars

        states = completed_stars(model, rows, model.settings.sun_position, seed=seed)
    elif rows.shape[1] > 6 and model.settings.noise.treatment == "deconvolve":
        from galray.phasespace.noise_objectives import posterior_stars

        states = posterior_stars(model, rows, model.settings.noise, seed=seed)
    seen = _SeenStars(model, selection)
    found = stein_identities(seen, states)
    found |= local_identities(seen, states, seed=seed)
    found |= curl_and_noise(seen, _some(states, _DIFFERENCED, seed))
    if not hasattr(model, "score"):
        found = {name: row for name, row in found.items() if "s_v" in name or "curl" in name}
    name, figure = held_out(model, rows, seed=seed, selection=selection)
    found[f"held-out {name}"] = figure
    if hasattr(model, "sample_velocity"):
        found["two-sample classifier (AUC)"] = two_sample(model, states, seed=seed)
    return judge(found)


def _some(w: Tensor, count: int, seed: int) -> Tensor:
    """A random part of the stars where there are more."""
    if len(w) <= count:
        return w
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))
    return w[order[:count]]
