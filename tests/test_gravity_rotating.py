"""Turning frames: pattern speed and gravity from scores, exact ones first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.gravity import (
    CorotatingModel,
    PotentialSettings,
    RotatingFrame,
    RotatingSettings,
    fit_potential,
    fit_rotating_frame,
    least_squares,
)
from galray.mocks import BarredGalaxy, RotatingIsothermal
from galray.phasespace import Ball, ExactModel

BALL = Ball((-8.122, 0.0, 0.02), 3.0)
SPEED = 34.0
SPLINE = PotentialSettings(base="xyz", basis="spline")


@pytest.fixture(scope="module")
def galaxy():
    return BarredGalaxy()


@pytest.fixture(scope="module")
def isothermal(galaxy):
    return RotatingIsothermal(galaxy.potential, SPEED, 45.0, BALL)


@pytest.fixture(scope="module")
def stars(isothermal):
    return isothermal.sample(12_000, 1)


@pytest.fixture(scope="module")
def places(stars):
    x = stars[:3000, :3]
    return x[(x - torch.tensor(BALL.center)).norm(dim=1) < 2.0]


def relative_error(field, places, galaxy):
    truth = galaxy.potential.acceleration(places)
    return float((field.acceleration(places) - truth).norm() / truth.norm())


def noisy(scores, amount, seed):
    noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores + amount * scores.std(0) * noise


# Exact scores ---------------------------------------------------------------------------------------------


def test_least_squares_in_the_turning_frame_is_round_off(isothermal, galaxy, places):
    truth = galaxy.potential.acceleration(places[:50])
    model = CorotatingModel(ExactModel(isothermal), RotatingFrame(SPEED))
    a = least_squares(model, places[:50], num_velocities=100, generator=torch.Generator().manual_seed(1))
    assert float((a - truth).norm() / truth.norm()) < 1e-12


def test_the_equation_of_the_frame_holds_for_every_star(isothermal, galaxy, stars):
    """v·sₓ of the frame balances a·sᵥ star by star, and does not in a frame that stands still."""
    s = isothermal.score(stars).numpy()
    w, a = stars.numpy(), galaxy.potential.acceleration(stars[:, :3]).numpy()

    def unbalanced(speed):
        steady = RotatingFrame(speed).steady_scores(w, s)
        residual = (w[:, 3:] * steady[:, :3]).sum(1) + (a * steady[:, 3:]).sum(1)
        return np.abs(residual).max() / np.abs((w[:, 3:] * s[:, :3]).sum(1)).mean()

    assert unbalanced(SPEED) < 1e-10
    assert unbalanced(0.0) > 0.1


def test_pattern_speed_and_gravity_together(isothermal, galaxy, stars, places):
    fit = fit_rotating_frame(isothermal.score(stars), stars, SPLINE, ball=BALL)
    assert fit.known
    assert fit.frame.pattern_speed == pytest.approx(SPEED, abs=0.02)
    assert abs(fit.frame.pattern_speed - SPEED) < 4 * fit.error
    assert "34.0" in fit.sentence
    assert relative_error(fit.field, places, galaxy) < 4e-3  # what the splines cannot follow
    still = fit_rotating_frame(
        isothermal.score(stars), stars, SPLINE, ball=BALL, rotating=RotatingSettings(pattern_speed=0.0)
    )
    assert still.error == 0.0
    assert relative_error(still.field, places, galaxy) > 0.03


def test_a_moving_frame_gives_its_velocity(isothermal, stars):
    """The same stars seen from a frame that moves: positions stay, velocities shift."""
    moved = stars.clone()
    velocity = torch.tensor([12.0, -7.0, 3.0], dtype=torch.float64)
    moved[:, 3:] += velocity
    fit = fit_rotating_frame(
        isothermal.score(stars), moved, SPLINE, ball=BALL, rotating=RotatingSettings(translation=True)
    )
    # the Galaxy turns about an axis through where it then is, and u = u₀ + Ω × x
    assert fit.frame.pattern_speed == pytest.approx(SPEED, abs=0.05)
    np.testing.assert_allclose(fit.frame.velocity, velocity, atol=0.1)


def test_the_frame_serves_every_solver(isothermal, galaxy, stars, places):
    steady = RotatingFrame(SPEED).steady_scores(stars, isothermal.score(stars))
    field = fit_potential(steady, stars, SPLINE, seed=1, ball=BALL)
    assert relative_error(field, places, galaxy) < 4e-3


def test_an_axisymmetric_galaxy_does_not_tell(galaxy):
    round_one = RotatingIsothermal(galaxy.potential.subset(["disc", "halo"]), SPEED, 45.0, BALL)
    w = round_one.sample(8000, 4)
    exact = fit_rotating_frame(round_one.score(w), w, SPLINE, ball=BALL)
    assert not exact.known
    assert "cannot be known" in exact.sentence
    assert exact.asymmetry < 1e-6
    scores = [noisy(round_one.score(w), 0.3, k) for k in range(3)]
    assert not fit_rotating_frame(scores, w, SPLINE, ball=BALL).known


# Noise ----------------------------------------------------------------------------------------------------


def test_noise_biases_one_model_and_not_the_product_of_several(isothermal, stars):
    s = isothermal.score(stars)
    one = fit_rotating_frame(noisy(s, 0.2, 1), stars, SPLINE, ball=BALL)
    assert one.frame.pattern_speed < SPEED - 2  # drawn towards zero
    assert "leaves out the noise of the models" in one.sentence
    several = fit_rotating_frame([noisy(s, 0.2, k) for k in range(1, 5)], stars, SPLINE, ball=BALL)
    assert abs(several.frame.pattern_speed - SPEED) < 4 * several.error
    assert several.error < 3
    assert "leaves out" not in several.sentence


# Mistakes -------------------------------------------------------------------------------------------------


def test_mistakes_are_named(isothermal, stars):
    s = isothermal.score(stars)
    with pytest.raises(GalrayError, match="xyz"):
        fit_rotating_frame(s, stars, PotentialSettings(base="Rz"), ball=BALL)
    with pytest.raises(GalrayError, match="scores 1"):
        fit_rotating_frame([s, s[:10]], stars, SPLINE, ball=BALL)
    with pytest.raises(GalrayError, match="take more stars"):
        fit_rotating_frame(s[:1300], stars[:1300], SPLINE, ball=BALL)
    broken = s.clone()
    broken[: len(s) // 2] = torch.nan
    with pytest.raises(GalrayError, match="not finite"):
        fit_rotating_frame(broken, stars, SPLINE, ball=BALL)
    with pytest.raises(AttributeError, match="log_prob"):
        CorotatingModel(ExactModel(isothermal), RotatingFrame(1.0)).log_prob  # noqa: B018
