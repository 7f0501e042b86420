"""Places of measurement on a potential whose acceleration and density are known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.gravity import Kernel
from galray.potentials import NFW, Composite, MiyamotoNagai
from galray.results import ACCELERATION_UNIT, DENSITY_UNIT, HEADLINE, Places, PlacesSettings
from galray.units import MSUN_PC3

FRAME = GalacticFrame()
DISC = MiyamotoNagai(5e10, 3.0, 0.3)
HALO = NFW(8e11, 16.0)
GALAXY = Composite({"disc": DISC, "halo": HALO})


def places(
    radius: float = 4.0, center: tuple[float, float, float] | None = None, **changes: object
) -> Places:
    settings = PlacesSettings.model_validate(changes)
    return Places(settings, FRAME, center or FRAME.sun_position, radius, Kernel().reach)


@pytest.fixture(scope="module")
def measured() -> tuple[Places, np.ndarray]:
    spots = places()
    x = torch.from_numpy(spots.x)
    values = spots.values(
        GALAXY.acceleration(x).numpy(), GALAXY.mass_density(x).numpy(), DISC.mass_density(x).numpy()
    )
    return spots, values


def test_values_are_those_of_the_potential(measured: tuple[Places, np.ndarray]) -> None:
    spots, values = measured
    seen = set()
    for quantity, value in zip(spots.quantities, values, strict=True):
        if quantity.position is None:
            continue
        x = torch.tensor([quantity.position], dtype=torch.float64)
        ax, ay, az = GALAXY.acceleration(x)[0].tolist()
        radius = float(np.hypot(quantity.position[0], quantity.position[1]))
        expected = {
            "a_R": (ax * quantity.position[0] + ay * quantity.position[1]) / radius,
            "a_phi": 0.0,
            "a_z": az,
            "rho": float(GALAXY.mass_density(x)[0]) / MSUN_PC3,
            "rho_dm": float(HALO.mass_density(x)[0]) / MSUN_PC3,
            "rho_baryons": float(DISC.mass_density(x)[0]) / MSUN_PC3,
        }[quantity.name]
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9), quantity.key
        assert quantity.unit == (ACCELERATION_UNIT if quantity.name.startswith("a_") else DENSITY_UNIT)
        seen.add(quantity.name)
    assert seen == {"a_R", "a_phi", "a_z", "rho", "rho_dm", "rho_baryons"}


def test_signs_and_sizes_at_the_sun(measured: tuple[Places, np.ndarray]) -> None:
    spots, values = measured
    a_r = values[spots.index("a_R@Sun")]
    assert -9000 < a_r < -4000, "the pull is inwards, near 220²/8 (km/s)²/kpc"
    assert values[spots.index("a_z@z=+1 kpc")] < 0 < values[spots.index("a_z@z=-1 kpc")]
    assert 0.001 < values[spots.index("rho_dm@Sun")] < 0.1


def test_a_phi_is_the_pull_along_rotation() -> None:
    spots = places()
    along = np.zeros((len(spots.x), 3))
    radius = np.hypot(spots.x[:, 0], spots.x[:, 1])
    # Rotation runs towards +y at the Sun, at x = −R0: its direction there is (y, −x) / R.
    along[:, 0], along[:, 1] = spots.x[:, 1] / radius, -spots.x[:, 0] / radius
    nothing = np.zeros(len(spots.x))
    values = spots.values(7.0 * along, nothing, nothing)
    for quantity, value in zip(spots.quantities, values, strict=True):
        expected = 7.0 if quantity.name == "a_phi" else 0.0
        assert value == pytest.approx(expected, abs=1e-12), quantity.key


def test_headline_is_the_mean_of_the_halo_over_its_region(measured: tuple[Places, np.ndarray]) -> None:
    spots, values = measured
    i = spots.index(HEADLINE)
    rows = list(spots.quantities[i].rows)
    x = spots.x[rows]
    assert values[i] == pytest.approx(
        float(HALO.mass_density(torch.from_numpy(x)).mean()) / MSUN_PC3, rel=1e-12
    )
    assert np.allclose(np.hypot(x[:, 0], x[:, 1]), FRAME.sun_radius)
    height = np.abs(x[:, 2])
    assert height.min() > 0.5
    assert height.max() < 2.0
    assert np.sum(x[:, 2] > 0) == np.sum(x[:, 2] < 0), "as much of the north as of the south"
    # The region is fine enough: a tenfold finer sampling of the same shell gives the same mean.
    z = np.linspace(0.5, 2.0, 2001)
    fine = np.stack([np.full_like(z, -FRAME.sun_radius), 0 * z, z], -1)
    assert values[i] * MSUN_PC3 == pytest.approx(
        float(HALO.mass_density(torch.from_numpy(fine)).mean()), rel=2e-3
    )


def test_members_stack_in_front(measured: tuple[Places, np.ndarray]) -> None:
    spots, values = measured
    x = torch.from_numpy(spots.x)
    a, rho = GALAXY.acceleration(x).numpy(), GALAXY.mass_density(x).numpy()
    both = spots.values(np.stack([a, 2 * a]), np.stack([rho, 2 * rho]), DISC.mass_density(x).numpy())
    assert both.shape == (2, spots.num_values)
    assert np.array_equal(both[0], values)


def test_densities_only_where_the_ball_holds_the_kernel() -> None:
    spots = places(radius=4.0)
    for quantity in spots.quantities:
        for row in quantity.rows:
            assert spots.holds(spots.x[row], density=quantity.unit == DENSITY_UNIT), quantity.key
    assert set(spots.density_rows) < set(range(len(spots.x)))
    edge = np.array(FRAME.sun_position) + [3.99, 0, 0]
    assert spots.holds(edge, density=False)
    assert not spots.holds(edge, density=True)


def test_keys_are_unique() -> None:
    keys = [q.key for q in places().quantities]
    assert len(set(keys)) == len(keys)
    with pytest.raises(KeyError, match="quantities of that name"):
        places().index("a_R")


def test_height_outside_the_ball_is_refused() -> None:
    with pytest.raises(GalrayError, match=r"places\.heights: z=.* lies outside the ball of 2 kpc"):
        places(radius=2.0, heights=[2.5])


def test_average_that_does_not_fit_is_refused() -> None:
    with pytest.raises(GalrayError, match=r"places\.average_heights: only \d+ of 60 positions"):
        places(radius=1.6, heights=[0.5])


def test_ball_elsewhere_is_refused() -> None:
    with pytest.raises(GalrayError, match="Sun lies outside the ball"):
        places(center=(8.0, 0.0, 0.0))
