"""Flow and score of f(z, v_z) on isothermal populations in a known sheet: a(z) and the density come back."""

import numpy as np
import pytest
import torch
from scipy.stats import norm, qmc

from galray.errors import GalrayError
from galray.gravity.vertical_moments import FOUR_PI_G, layer_basis
from galray.gravity.vertical_networks import (
    VerticalStars,
    density_from_force,
    fit_vertical_flow,
    fit_vertical_score,
)
from galray.gravity.vertical_settings import VerticalNetworkSettings

LIMIT = 0.36
LAYERS = ((0.06, 0.1), (0.03, 100.0))  # Msun/pc³ and kpc of sech² layers
KNOTS = np.linspace(-0.3, 0.3, 13)
QUICK = VerticalNetworkSettings(epochs=5, batch_size=256)


def truth(z):
    """a(z) of the sheet."""
    return -FOUR_PI_G * sum(rho * h * np.tanh(z / h) for rho, h in LAYERS)


def draw(power, seed, selection=None):
    """2^power stars of two isothermal populations; `selection(z)` thins them, its inverse weighs them.

    They are spread evenly (Sobol), so that the networks' own error stands out from that of sampling.
    """
    count = 2**power
    first, second, third = qmc.Sobol(3, seed=seed).random_base2(power).T
    grid = np.linspace(-LIMIT, LIMIT, 4001)
    potential = -np.concatenate([[0], np.cumsum(0.5 * (truth(grid)[1:] + truth(grid)[:-1]) * np.diff(grid))])
    potential -= potential.min()
    density = sum(part * np.exp(-potential / sigma**2) for part, sigma in ((0.7, 14.0), (0.3, 28.0)))
    density = density if selection is None else density * selection(grid)
    cumulative = np.concatenate([[0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    z = np.interp(first * cumulative[-1], cumulative, grid)
    height = np.interp(z, grid, potential)
    cold = 0.7 * np.exp(-height / 14.0**2)
    warm = 0.3 * np.exp(-height / 28.0**2)
    sigma = np.where(second < cold / (cold + warm), 14.0, 28.0)
    weight = np.ones(count) if selection is None else 1 / selection(z)
    v = sigma * norm.ppf(third.clip(1e-9, 1 - 1e-9))
    return VerticalStars(z, v, weight / weight.mean(), np.zeros(count, int), LIMIT)


def check(a):
    """Good at every height, and better once layers are fitted to all of them."""
    assert np.sqrt(np.mean((a - truth(KNOTS)) ** 2)) < 0.12 * np.abs(truth(0.3))
    basis = layer_basis(np.linspace(0, LIMIT, 73), [h for _, h in LAYERS])
    _, force = density_from_force(KNOTS, a, np.ones(13), basis)
    assert force(np.array([0.15, 0.25])) == pytest.approx(truth(np.array([0.15, 0.25])), rel=0.12)


@pytest.fixture(scope="module")
def stars():
    return draw(15, 1)


def test_flow_gives_the_acceleration_back(stars):
    torch.set_num_threads(1)
    model = fit_vertical_flow(stars, QUICK, seed=3)
    check(model.acceleration(KNOTS))
    # it is a density: it sums to one over heights and velocities
    z, v = torch.meshgrid(
        torch.linspace(-LIMIT, LIMIT, 161, dtype=torch.float64),
        torch.linspace(-160, 160, 321, dtype=torch.float64),
        indexing="ij",
    )
    with torch.no_grad():
        f = model.log_prob(z.reshape(-1), v.reshape(-1)).exp().reshape(z.shape)
    assert float(torch.trapezoid(torch.trapezoid(f, dx=1.0), dx=2 * LIMIT / 160)) == pytest.approx(
        1, abs=0.01
    )


def test_score_gives_the_acceleration_back(stars):
    model = fit_vertical_score(stars, QUICK, seed=3)
    check(model.acceleration(KNOTS, stars))


def test_a_known_selection_is_undone_and_an_ignored_one_is_felt():
    def selection(z):
        return np.exp(-3 * np.abs(z))

    seen = draw(14, 2, selection)
    blind = VerticalStars(seen.z, seen.v, np.ones(len(seen)), seen.cell, LIMIT)
    middle = KNOTS[np.abs(KNOTS) > 0.1]
    errors = []
    for stars in (seen, blind):
        a = fit_vertical_flow(stars, QUICK, seed=1).acceleration(middle)
        errors.append(np.mean(a / truth(middle)) - 1)
    assert abs(errors[0]) < 0.15
    assert errors[1] > 0.5  # the thinned stars look more concentrated, as by a stronger pull


def test_layers_from_accelerations():
    basis = layer_basis(np.linspace(0, LIMIT, 73), [h for _, h in LAYERS])
    theta, force = density_from_force(KNOTS, truth(KNOTS), np.ones(13), basis)
    assert theta == pytest.approx([0.06, 0.03], rel=1e-3)
    assert force(np.array([0.2])) == pytest.approx(truth(np.array([0.2])), rel=1e-3)


def test_bootstraps_over_cells_repeat_whole_cells():
    cells = np.repeat([0, 1, 2], 4)
    stars = VerticalStars(np.arange(12.0), np.arange(12.0), np.ones(12), cells, LIMIT)
    again = stars.resampled(np.array([0, 0, 2]))
    assert sorted(again.z) == sorted([*range(4), *range(4), *range(8, 12)])


def test_divergence_is_said(stars):
    broken = VerticalStars(stars.z, np.where(stars.v > 60, np.nan, stars.v), stars.weight, stars.cell, LIMIT)
    with pytest.raises(GalrayError, match="diverged"):
        fit_vertical_flow(broken, QUICK)
