"""The prior of a round mass: what it measures, that it helps where mass is round and yields elsewhere."""

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.gravity import PotentialSettings, choose_roundness, fit_potential
from galray.gravity.roundness import ROUNDNESSES, departure, shells
from galray.mocks import PlummerSphere, RotatingIsothermal
from galray.phasespace import Ball
from galray.potentials import MiyamotoNagai

MASSES = PotentialSettings(basis="masses", num_masses=200, mass_sets=1, tide_order=2)
SPHERE = PlummerSphere(1e9, 1.0)
FLAT = MiyamotoNagai(1e9, 0.5, 0.8)
SMALL = Ball((0.0, 0.0, 0.0), 3.0)


def halves(model, ball, amplitude):
    """Two halves of a model's stars, each with the exact score and the gradient of broad waves of its own."""
    parts = []
    for seed in (1, 2):
        w = model.sample(15_000, seed)
        w = w[w[:, :3].norm(dim=1) < ball.radius]
        scores = model.score(w)
        rng = np.random.default_rng(seed)
        k, phase = torch.from_numpy(rng.normal(size=(6, 3))), torch.from_numpy(rng.uniform(0, 6.3, 6))
        scores[:, :3] += amplitude * torch.sin(w[:, :3] @ k.T + phase) @ k
        parts.append((scores, w))
    return parts


def errors(mass, parts, ball, *roundness):
    """Relative errors of the density from all stars with each roundness, L2 over the inner part."""
    x = torch.from_numpy(0.8 * np.random.default_rng(3).normal(size=(6000, 3)))
    x = x[(x.norm(dim=1) > 0.3) & (x.norm(dim=1) < 1.5)]
    truth = mass.mass_density(x)
    scores, w = (torch.cat(both) for both in zip(*parts, strict=True))
    found = []
    for one in roundness:
        field = fit_potential(scores, w, MASSES.model_copy(update={"roundness": one}), seed=0, ball=ball)
        found.append(float((field.mass_density(x) - truth).norm() / truth.norm()))
    return found


def test_departure_is_the_mean_square_of_density_over_its_mean_on_spheres():
    rng = np.random.default_rng(0)
    points = shells(rng.normal(size=(2000, 3)) + [1.0, 0.0, 0.0])
    centres, widths = rng.normal(size=(5, 3)), rng.uniform(0.5, 1.5, 5)
    masses = rng.uniform(1, 2, 5)
    square = ((points[:, :, None] - centres) ** 2).sum(-1)
    density = (masses * np.exp(-square / (2 * widths**2)) / widths**3).sum(-1)
    mean = density.mean(1, keepdims=True)
    wanted = np.mean(((density - mean) / mean) ** 2)
    assert masses @ departure(points, centres, widths, masses) @ masses == pytest.approx(wanted, rel=1e-10)
    middle = points.mean((0, 1))[None]
    np.testing.assert_allclose(middle, [[1.0, 0.0, 0.0]], atol=0.1)
    alone = np.ones(1)
    assert alone @ departure(points, middle, alone, alone) @ alone < 0.01


def test_on_a_sphere_the_prior_takes_most_of_the_error_and_halves_ask_for_it():
    ball = Ball((0.0, 0.0, 0.0), 5.0)
    parts = halves(SPHERE, ball, 0.3)
    roundness = choose_roundness(*parts, MASSES, seed=0, ball=ball)
    assert roundness in ROUNDNESSES
    assert roundness > 0
    free, chosen, strong = errors(SPHERE.potential_field, parts, ball, 0.0, roundness, 10.0)
    assert chosen < free
    assert strong < 0.6 * free


def test_a_flattened_mass_refuses_the_prior():
    parts = halves(RotatingIsothermal(FLAT, 0.0, 24.0, SMALL), SMALL, 0.0)
    roundness = choose_roundness(*parts, MASSES, seed=0, ball=SMALL)
    assert roundness < 0.1
    free, chosen, strong = errors(FLAT, parts, SMALL, 0.0, roundness, ROUNDNESSES[-1])
    assert chosen < 1.02 * free
    assert strong > 1.1 * free


def test_only_masses_are_round():
    with pytest.raises(ValueError, match="roundness: only masses"):
        PotentialSettings(basis="spline", roundness=1.0)
    part = (np.zeros((4, 6)), np.zeros((4, 6)))
    with pytest.raises(GalrayError, match="a round mass for basis = 'network'"):
        choose_roundness(part, part, PotentialSettings(), seed=0, ball=SMALL)
    few = (np.ones((4, 6)), np.ones((4, 6)))
    with pytest.raises(GalrayError, match="4 stars for 200 masses"):
        choose_roundness(few, few, MASSES, seed=0, ball=SMALL)
    with pytest.raises(GalrayError, match="none of 4 stars lies within the ball"):
        choose_roundness(few, (few[0], 100 * few[1]), MASSES, seed=0, ball=SMALL)
