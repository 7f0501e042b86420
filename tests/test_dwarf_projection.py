"""Quadrature matrices against closed forms."""

import numpy as np
import pytest

from galray.dwarf.projection import (
    cumulative_matrix,
    cylinder_weights,
    interpolation_matrix,
    log_grid,
    projection_matrices,
)

A = 0.25
GRID = log_grid(A)
PLUMMER = 3 / (4 * np.pi * A**3) * (1 + (GRID / A) ** 2) ** -2.5


def test_plummer_projects_to_its_surface_density():
    radius = np.geomspace(0.003, 4.0, 40)
    surface = projection_matrices(GRID, radius, powers=1)[0] @ PLUMMER
    exact = (1 + (radius / A) ** 2) ** -2 / (np.pi * A**2)
    assert np.abs(surface / exact - 1).max() < 1e-4


@pytest.mark.parametrize("power", [0, 1, 2])
def test_power_laws_project_to_beta_functions(power):
    # 2∫ (R/r)^{2p} r^{-k} r dr/√(r²−R²) = R^{1−k} B(½, (k + 2p − 1)/2)
    from scipy.special import beta

    radius = np.geomspace(0.02, 1.0, 9)
    for k in (2.0, 3.5, 5.0):
        got = projection_matrices(GRID, radius)[power] @ GRID**-k
        exact = radius ** (1 - k) * beta(0.5, (k + 2 * power - 1) / 2)
        # what lies beyond the grid is missing: a share (R/r_max)^{k−1}
        assert np.abs(got / exact - 1).max() < 2e-4 + (1.0 / GRID[-1]) ** (k - 1 + 2 * power)


def test_cylinders_hold_the_plummer_fraction():
    for radius in (0.01, 0.25, 3.0):
        inside = cylinder_weights(GRID, radius) @ PLUMMER
        assert inside == pytest.approx(radius**2 / (radius**2 + A**2), rel=1e-4)


def test_cumulative_and_interpolation_are_cubic():
    u = np.log(GRID / A)
    # the integral of u³ − 2u in ln r, exactly
    total = cumulative_matrix(GRID) @ (u**3 - 2 * u)
    exact = u**4 / 4 - u**2
    assert np.abs(total - (exact - exact[0])).max() < 1e-9 * np.abs(exact).max()
    points = np.array([0.01, 0.123, 2.0])
    value = interpolation_matrix(GRID, points) @ (u**3 - 2 * u)
    x = np.log(points / A)
    assert value == pytest.approx(x**3 - 2 * x, abs=1e-9)
