"""Stars with errors: their draws are exact, and both objectives learn the noise-free f."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from galray.catalog import galactocentric, galactocentric_covariance
from galray.catalog.astrometry import jacobian
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.phasespace import (
    Ball,
    BaseSettings,
    ConvolvedLikelihood,
    FlowPart,
    FlowSettings,
    NoiseSettings,
    PosteriorScoreMatching,
    ScoreSettings,
    attach_errors,
    build_model,
    load_model,
    objective,
    posterior_stars,
    save_model,
)
from galray.phasespace.checks import held_out
from galray.phasespace.noise import displace, draw_errors, error_factors
from galray.phasespace.noise_objectives import log_ratio
from galray.phasespace.stein import stein_identities
from galray.training import TrainingSettings, fit

FRAME = GalacticFrame()
SUN = (*FRAME.sun_position, *FRAME.sun_velocity_km_s)
BALL = Ball((0.0, 0.0, 0.0), 6.0)
EYE = torch.eye(6, dtype=torch.float64)
DECONVOLVE = NoiseSettings(treatment="deconvolve")


def observed_stars(n: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Observables, and their errors with a parallax error of a tenth."""
    rng = np.random.default_rng(5)
    y = np.stack(
        [
            rng.uniform(0, 360, n),
            rng.uniform(-70, 70, n),
            rng.uniform(0.25, 2.0, n),
            *rng.normal(size=(2, n)) * 8,
            rng.normal(size=n) * 60,
        ],
        1,
    )
    errors = np.stack([np.zeros(n), np.zeros(n), 0.1 * y[:, 2], *np.full((2, n), 0.2), np.full(n, 3.0)], 1)
    return y, errors


class GaussianModel(nn.Module):
    """A unit Gaussian in all six coordinates, behind the interface that objectives use."""

    kind = "flow"

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.ball = Ball((0.0, 0.0, 0.0), 50.0)

    def prepare(self, w: torch.Tensor) -> torch.Tensor:
        return w

    def log_prob(self, w: torch.Tensor) -> torch.Tensor:
        return -0.5 * w.square().sum(-1) - 3 * math.log(2 * math.pi)

    log_prob_rows = log_prob


def gaussian_stars(n: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stars of a unit Gaussian, the same measured with unequal, correlated errors, and their covariances."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    size = 0.3 + 0.3 * torch.rand(n, generator=generator, dtype=torch.float64)
    factor = torch.zeros(n, 6, 6, dtype=torch.float64)
    factor[:, 2, 2], factor[:, 5, 2], factor[:, 0, 0], factor[:, 5, 5] = size, 0.8 * size, 0.3 * size, 0.2
    error = (factor @ torch.randn(n, 6, 1, generator=generator, dtype=torch.float64))[..., 0]
    kept = BALL.contains(true[:, :3]) & BALL.contains((true + error)[:, :3])
    return true[kept], (true + error)[kept], (factor @ factor.mT)[kept]


def test_factors_hold_the_covariances():
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(20, 6, 6, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, 6)[:, None]
    covariance = root @ root.mT
    covariance[0] = 0.0  # no error
    covariance[1] = torch.outer(root[1, :, 0], root[1, :, 0])  # the distance alone is uncertain
    rows = attach_errors(torch.zeros(20, 6), covariance)
    assert rows.shape == (20, 27)
    factor = error_factors(rows)
    size = covariance.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(1e-30)
    worst = ((factor @ factor.mT - covariance) / (size[:, :, None] * size[:, None, :])).abs().max()
    assert float(worst) < 1e-9
    assert float(factor.triu(1).abs().max()) == 0.0
    assert float(error_factors(rows[:, :6]).abs().max()) == 0.0


@pytest.mark.parametrize("fault", ["negative", "skew", "nan", "shape"])
def test_impossible_covariances_are_refused(fault):
    covariance = EYE.repeat(4, 1, 1)
    if fault == "shape":
        covariance = covariance[:3]
    elif fault == "skew":
        covariance[2, 0, 1] = 0.5
    else:
        covariance[2, 3, 3] = -1.0 if fault == "negative" else math.nan
    with pytest.raises(GalrayError, match="shape" if fault == "shape" else "star 2"):
        attach_errors(torch.zeros(4, 6), covariance)


def test_displacements_are_steps_of_the_observables():
    y, errors = observed_stars()
    step = errors * np.random.default_rng(6).normal(size=errors.shape)
    tangent = np.einsum("nij,nj->ni", jacobian(y, FRAME), step)
    w = torch.from_numpy(galactocentric(y, FRAME))
    moved, volume = displace(w, torch.from_numpy(tangent), SUN)
    np.testing.assert_allclose(moved.numpy(), galactocentric(y + step, FRAME), rtol=1e-9, atol=1e-9)
    volumes = [np.linalg.slogdet(jacobian(at, FRAME))[1] for at in (y, y + step)]
    np.testing.assert_allclose(volume.numpy(), volumes[1] - volumes[0], atol=1e-8)


def test_draws_have_the_catalogues_errors():
    y, errors = observed_stars(1)
    errors = errors / 50  # where the path is straight
    covariance = galactocentric_covariance(y, errors, np.zeros((1, 10)), FRAME)
    rows = attach_errors(torch.from_numpy(galactocentric(y, FRAME)), torch.from_numpy(covariance))
    w, volume = draw_errors(rows, 40_000, torch.Generator().manual_seed(3), SUN)
    found = (w[0] - rows[:, :6]).T @ (w[0] - rows[:, :6]) / len(w[0])
    size = np.sqrt(np.diag(covariance[0]))
    assert np.abs((found.numpy() - covariance[0]) / np.outer(size, size)).max() < 0.03
    assert float(volume.abs().max()) < 0.1


def test_convolved_likelihood_of_a_gaussian():
    _, w, covariance = gaussian_stars(200)
    rows = attach_errors(w, covariance)
    goal = ConvolvedLikelihood(NoiseSettings(treatment="deconvolve", draws=4000))
    found = goal.validate(GaussianModel(), rows)
    total = EYE + covariance
    exact = 0.5 * (w[:, None] @ torch.linalg.inv(total) @ w[..., None]).squeeze() + 0.5 * torch.logdet(total)
    # the star farthest out has the noisiest mean
    torch.testing.assert_close(found, exact + 3 * math.log(2 * math.pi), atol=0.1, rtol=0.0)
    # A pair is exact to first order in the covariance.
    small = attach_errors(w, 0.01 * covariance)
    pair = ConvolvedLikelihood(NoiseSettings(treatment="deconvolve", draws=2))
    mean = torch.stack(
        [pair.per_star(GaussianModel(), small, torch.Generator().manual_seed(i)) for i in range(40)]
    ).mean()
    total = EYE + 0.01 * covariance
    exact = 0.5 * (w[:, None] @ torch.linalg.inv(total) @ w[..., None]).squeeze() + 0.5 * torch.logdet(total)
    ignored = 0.5 * w.square().sum(-1).mean()
    assert abs(float(mean - 3 * math.log(2 * math.pi) - exact.mean())) < 0.1 * float(ignored - exact.mean())


def test_posterior_stars_are_a_sample_of_f():
    _, w, covariance = gaussian_stars(20_000)
    rows = attach_errors(w, covariance)
    drawn = posterior_stars(GaussianModel(), rows, NoiseSettings(draws=64), seed=4)
    measured, mended = torch.cov(w.T), torch.cov(drawn.T)
    assert float((measured - EYE).abs().max()) > 0.15
    assert float((mended - EYE).abs().max()) < 0.04


def test_log_ratio_by_potential_and_by_line_integral():
    true, _, _ = gaussian_stars(2000)
    base = BaseSettings(hidden=(16,), star_passes=1e5)
    models = [
        build_model("score", ScoreSettings(form=form, hidden=(16,), base=base), BALL, true, seed=0)
        for form in ("gradient", "vector")
    ]
    near = true[:100, None] + 0.05 * torch.randn(100, 4, 6, generator=torch.Generator().manual_seed(1))
    exact, line = (log_ratio(m, true[:100], near) for m in models)
    exact, line = exact - exact.mean(1, keepdim=True), line - line.mean(1, keepdim=True)
    assert float((exact - line).detach().abs().mean()) < 0.03 * float(exact.detach().abs().mean())


def test_without_errors_the_loss_is_the_ordinary_one():
    true, _, _ = gaussian_stars(1000)
    settings = ScoreSettings(hidden=(16,), base=BaseSettings(hidden=(16,), star_passes=2e4), noise=DECONVOLVE)
    model = build_model("score", settings, BALL, true, seed=0)
    nn.init.normal_(model.correction.out.weight, std=0.1)
    plain, noisy = objective("score"), objective("score", settings)
    assert isinstance(noisy, PosteriorScoreMatching)
    expected = plain.validate(model, plain.prepare(model, true, validation=True))
    found = noisy.validate(model, noisy.prepare(model, true, validation=True))
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-3, atol=1e-3)
    flow = FlowSettings(noise=DECONVOLVE)
    model = build_model("flow", flow, BALL, true, seed=0)
    plain, noisy = objective("flow"), objective("flow", flow)
    assert isinstance(noisy, ConvolvedLikelihood)
    expected = plain.validate(model, plain.prepare(model, true))
    found = noisy.validate(model, noisy.prepare(model, true))
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-3, atol=1e-3)


def slopes(model) -> np.ndarray:
    """Linear part of the score: s_z by z, s_z by v_z, s_vz by v_z; (−1, 0, −1) for a unit Gaussian."""
    w = torch.randn(4000, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    matrix = torch.linalg.lstsq(w, model.score(w)).solution
    return np.array([matrix[2, 2], matrix[2, 5], matrix[5, 5]])


@pytest.mark.parametrize("kind", ["flow", "gradient"])
def test_both_families_learn_the_score_before_the_errors(kind, tmp_path):
    true, w, covariance = gaussian_stars(2**13)
    part = FlowPart(hidden=(16, 16), bins=4, rotate=False)
    many = NoiseSettings(treatment="deconvolve", draws=16 if kind == "flow" else 8)
    models = {}
    for name, stars in (("free", true), ("ignore", w), ("deconvolve", w)):
        noise = many if name == "deconvolve" else NoiseSettings()
        if kind == "flow":
            settings = FlowSettings(position=part, velocity=part, noise=noise)
        else:
            base = BaseSettings(hidden=(16,), star_passes=2e5)
            settings = ScoreSettings(form=kind, hidden=(32, 32), base=base, noise=noise)
        rows = attach_errors(stars, covariance) if name == "deconvolve" else stars
        family = "flow" if kind == "flow" else "score"
        model = build_model(family, settings, BALL, stars[800:], seed=0)
        training = TrainingSettings(epochs=10, batch_size=512 if kind == "flow" else 256)
        fit(model, objective(family, settings), rows[800:], rows[:800], training, seed=0)
        models[name] = model
    free, ignored, found = (slopes(models[name]) for name in ("free", "ignore", "deconvolve"))
    assert np.abs(ignored - free).max() > 0.1
    assert np.linalg.norm(found - free) < 0.6 * np.linalg.norm(ignored - free)
    # What the checks of a model ask of stars of f holds for the posterior's.
    stars = posterior_stars(models["deconvolve"], attach_errors(w, covariance)[:800], many, seed=1)
    assert abs(stein_identities(models["deconvolve"], stars)["E[v_z s_vz]"].value + 1) < 0.15
    assert held_out(models["deconvolve"], stars, seed=0)[0].endswith("of noisy stars")
    save_model(models["deconvolve"], tmp_path)
    assert load_model(tmp_path).settings.noise == many


def test_stars_that_cannot_be_in_the_ball_stand_where_measured():
    ball = Ball((0.0, 0.0, 0.0), 1.0)
    rng = torch.Generator().manual_seed(3)
    w = torch.randn(400, 6, generator=rng, dtype=torch.float64).clamp(-2, 2) * 0.25
    model = build_model("flow", FlowSettings(), ball, w, seed=0)
    edge = torch.tensor([[0.999, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    rows = attach_errors(edge.repeat(500, 1), (25.0 * EYE).repeat(500, 1, 1))
    goal = ConvolvedLikelihood(NoiseSettings(draws=2))
    assert bool(torch.isfinite(goal.validate(model, rows)).all())
    stars = posterior_stars(model, rows, NoiseSettings(draws=2), seed=0)
    assert bool(ball.contains(stars[:, :3]).all())
    assert bool((stars == edge).all(-1).any())


def test_draws_come_in_pairs():
    with pytest.raises(ValidationError, match="must be even"):
        NoiseSettings(draws=3)


@pytest.mark.parametrize("which", ["conditional", "continuous"])
def test_flows_without_a_likelihood_of_f_are_refused(which):
    form = {"conditional": True} if which == "conditional" else {"position": {"kind": "continuous"}}
    with pytest.raises(ValidationError, match="deconvolved from the likelihood"):
        FlowSettings.model_validate({**form, "noise": {"treatment": "deconvolve"}})
    with pytest.raises(ValidationError, match="an objective of its own"):
        ScoreSettings(objective="sliced", noise=DECONVOLVE)
