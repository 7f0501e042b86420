"""Smoothed Poisson against the smoothed truth, and where it refuses to answer."""

import math

import pytest
import torch

from galray.errors import GalrayError
from galray.gravity import Kernel, Region, smooth, smoothed_density
from galray.potentials import NFW, Isochrone, MiyamotoNagai
from galray.units import G

POSITIONS = torch.tensor(
    [[-8.12, 0, 0.02], [-8.12, 0, 1.0], [-8.1, 0.5, -0.5], [-6.5, 1.0, 0.3], [-8.0, 0.0, 2.0]],
    dtype=torch.float64,
)


class IsothermalSheet:
    """ρ = Σ/(4h) sech²(z/2h)."""

    def __init__(self, column: float, h: float) -> None:
        self.column, self.h = column, h

    def acceleration(self, x):
        a = torch.zeros_like(x)
        a[..., 2] = -2 * math.pi * G * self.column * torch.tanh(x[..., 2] / (2 * self.h))
        return a

    def mass_density(self, x):
        return self.column / (4 * self.h) / torch.cosh(x[..., 2] / (2 * self.h)) ** 2


FIELDS = {
    "isochrone": Isochrone(1e11, 3.0),
    "nfw": NFW(1e12, 16.0),
    "miyamoto-nagai": MiyamotoNagai(7e10, 3.0, 0.28),
    "thin disc": MiyamotoNagai(1e10, 3.0, 0.1),
    "sheet": IsothermalSheet(48e6, 0.1),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("widths", [(0.5, 0.5, 0.2), (0.2, 0.2, 0.2)])
def test_smoothed_poisson_matches_smoothed_truth(name, widths):
    field = FIELDS[name]
    fine = Kernel(widths, 2.0, radial_nodes=24, polar_nodes=64, azimuthal_nodes=24)
    truth = smooth(field.mass_density, POSITIONS, fine)
    found = smoothed_density(field, POSITIONS, Kernel(widths, 2.0))
    torch.testing.assert_close(found, truth, rtol=5e-4, atol=0)


def test_the_surface_term_carries_the_mass_that_truncation_leaves():
    """A kernel cut at half a width is nearly a top hat: almost all of its divergence is on the surface."""
    kernel = Kernel((0.3, 0.3, 0.3), 0.5)
    field = Isochrone(1e11, 3.0)
    torch.testing.assert_close(
        smoothed_density(field, POSITIONS, kernel),
        smooth(field.mass_density, POSITIONS, kernel),
        rtol=1e-4,
        atol=0,
    )


def test_kernel_moments():
    kernel = Kernel((0.5, 0.4, 0.2), 2.0)
    ones = smooth(lambda x: torch.ones(x.shape[:-1]), POSITIONS, kernel)
    torch.testing.assert_close(ones, torch.ones(5, dtype=torch.float64))
    # the covariance of a three-dimensional Gaussian cut at k: h² times P(5/2, k²/2) / P(3/2, k²/2)
    shrink = torch.special.gammainc(torch.tensor(2.5), torch.tensor(2.0)) / torch.special.gammainc(
        torch.tensor(1.5), torch.tensor(2.0)
    )
    for axis, h in enumerate(kernel.h):
        second = smooth(lambda x, axis=axis: x[..., axis] ** 2, torch.zeros(1, 3), kernel)
        assert float(second[0]) == pytest.approx(h**2 * float(shrink), rel=1e-3)


def test_gaussian_layer_closed_form():
    """Nearly untruncated: a layer exp[−(z/h)²] smoothed over ℓ falls to h/√(h² + 2ℓ²) in the plane."""
    h, width = 0.127, 0.2
    kernel = Kernel((0.2, 0.2, width), 5.0, radial_nodes=40, polar_nodes=80)
    value = smooth(lambda x: torch.exp(-((x[..., 2] / h) ** 2)), torch.zeros(1, 3), kernel)
    assert float(value[0]) == pytest.approx(h / math.sqrt(h**2 + 2 * width**2), rel=1e-3)


def test_the_valid_region_is_enforced():
    field = FIELDS["nfw"]

    class Known:
        region = Region((-8.1, 0.0, 0.0), 2.0)
        acceleration = staticmethod(field.acceleration)

    kernel = Kernel((0.5, 0.5, 0.2), 2.0)
    inside = torch.tensor([[-8.1, 0.99, 0.0], [-8.1, 0.0, 1.55]])
    assert bool((smoothed_density(Known(), inside, kernel) > 0).all())
    for outside in ([-8.1, 1.01, 0.0], [-8.1, 0.0, 1.65], [-5.0, 0.0, 0.0]):
        with pytest.raises(GalrayError, match="reach beyond the ball"):
            smoothed_density(Known(), torch.tensor([outside]), kernel)
    assert Region((0, 0, 0), 1.0).contains_kernel(torch.zeros(3), (1.0, 1.0, 0.4)).item()


@pytest.mark.parametrize(("h", "k"), [((0.5, 0.0, 0.2), 2.0), ((0.5, 0.5, 0.2), 0.0)])
def test_impossible_kernels(h, k):
    with pytest.raises(GalrayError, match="kernel"):
        Kernel(h, k)
