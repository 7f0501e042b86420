"""Places of measurement on a potential whose acceleration and density are known in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from galray.ensemble import Estimate, Term
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.gravity import HaloSettings, Kernel, smooth
from galray.local_halo import fit_haloes, halo_rows, write_halo
from galray.potentials import NFW, Composite, MiyamotoNagai
from galray.results import ACCELERATION_UNIT, DENSITY_UNIT, HEADLINE, Places, PlacesSettings
from galray.summary import wide_tables
from galray.tables import read_table
from galray.units import MSUN_PC3
from tests.flattened import FlattenedNFW

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
            continue  # averages and what is integrated have tests of their own
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
    assert both[0] == pytest.approx(values, rel=1e-12)


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


def test_column_force_and_circular_speed(measured: tuple[Places, np.ndarray]) -> None:
    spots, values = measured
    r0 = FRAME.sun_radius
    speed = values[spots.index("v_c")]
    assert speed == pytest.approx(float(GALAXY.circular_velocity(torch.tensor(r0, dtype=torch.float64))))
    z = torch.linspace(-1.1, 1.1, 2201, dtype=torch.float64)
    column = torch.stack([torch.full_like(z, -r0), torch.zeros_like(z), z], -1)
    surface = float(torch.trapezoid(GALAXY.mass_density(column), z)) / 1e6
    assert values[spots.index("sigma")] == pytest.approx(surface, rel=3e-3)
    force = values[spots.index("K_z@|z|=1.1 kpc")]
    a_z = float(GALAXY.acceleration(column[-1])[2])
    assert force == pytest.approx(abs(a_z) / (2 * np.pi * 4.300917270036279e-06) / 1e6)
    assert force == pytest.approx(surface, rel=0.3)
    units = {q.name: q.unit for q in spots.quantities}
    assert (units["v_c"], units["sigma"], units["K_z"]) == ("km / s", "solMass / pc2", "solMass / pc2")


def test_no_density_is_asked_for_where_forces_alone_are_needed(measured: tuple[Places, np.ndarray]) -> None:
    spots, _ = measured
    forces = {row for q in spots.quantities if q.forces is not None for row in q.rows}
    assert forces
    assert not forces & set(spots.density_rows.tolist())


def test_averages_over_spheres(measured: tuple[Places, np.ndarray]) -> None:
    spots, values = measured
    spheres = [(i, q) for i, q in enumerate(spots.quantities) if q.name == "rho_dm_sphere"]
    assert len(spheres) == 5
    for i, quantity in spheres:
        x = spots.x[list(quantity.rows)]
        radius = np.linalg.norm(x, axis=1)
        assert np.ptp(radius) < 1e-9
        assert np.abs(x[:, 2]).min() >= 0.5
        assert x[:, 1:].mean(0) == pytest.approx([0, 0], abs=1e-12)
        assert all(spots.holds(place, density=True) for place in x)
        # a sphere sees one density, the halo's
        expected = float(HALO.mass_density([radius[0], 0, 0])) / MSUN_PC3
        assert values[i] == pytest.approx(expected, rel=1e-6)
        assert quantity.where == f"r = {radius[0]:.2f} kpc, |z| > 0.5 kpc"
    assert not [q for q in places(3.0).quantities if q.name == "rho_dm_sphere" and "10.12" in q.where]


def test_halo_profiles_from_a_runs_densities(measured: tuple[Places, np.ndarray], tmp_path: Path) -> None:
    spots, _ = measured
    halo, kernel = FlattenedNFW(8e6, 16.0, 0.75), Kernel()
    x = torch.from_numpy(spots.x)
    density = np.full(len(x), np.nan)
    inside = spots.density_rows
    density[inside] = smooth(halo.mass_density, x[inside], kernel).numpy()
    truth = spots.values(np.zeros((len(x), 3)), density, 0 * density)
    sigma = np.where(np.isfinite(truth), 0.02 * np.abs(truth), 1.0)
    term = Term(np.diag(sigma**2), 8, np.full(len(truth), np.inf))
    noisy = truth + np.random.default_rng(0).normal(size=len(truth)) * sigma
    estimates = {"moments": Estimate("moments", noisy, {"statistics": term})}
    settings = HaloSettings()
    rows = halo_rows(spots, settings)
    assert len(rows) > 20
    assert all(0.5 <= abs(spots.quantities[i].position[2]) <= 2.0 for i in rows)
    fits = fit_haloes(settings, spots, kernel, estimates, truth)
    assert [fit["profile"] for fit in fits] == ["nfw", "gnfw", "einasto"]
    for fit in fits:
        found = {row["parameter"]: row for row in fit["parameters"]}
        q, local = found["flattening"], found["density"]
        assert abs(q["value"] - 0.75) < 3.5 * q["error"]
        assert q["truth"] == pytest.approx(0.75, abs=0.04)  # held back a little by its prior
        assert local["unit"] == "solMass / pc3"
        expected = float(halo.mass_density([FRAME.sun_radius, 0, 0])) / MSUN_PC3
        assert abs(local["value"] - expected) < 3.5 * local["error"]
        assert fit["chi2"] / fit["dof"] == pytest.approx(1.0, abs=0.6)
    write_halo(tmp_path, fits)
    for ending in ("ecsv", "parquet"):
        table = read_table(tmp_path / f"halo.{ending}")
        assert list(table["profile"]) == ["nfw", "gnfw", "einasto"]
        assert table["density"].unit == "solMass / pc3"
        assert table["scale_radius_prior"].unit == "kpc"
        assert np.isnan(table["slope"][0])
    # a method without errors, or with none of its densities, has no fit
    assert not fit_haloes(settings, spots, kernel, {"flow": Estimate("flow", truth, {})})


def test_wide_tables_carry_units(measured: tuple[Places, np.ndarray]) -> None:
    spots, values = measured
    term = Term(np.diag(np.full(len(values), 4.0)), 8, np.full(len(values), np.inf))
    tables = wide_tables(spots, {"moments": Estimate("moments", values, {"statistics": term})}, values)
    assert set(tables) == {"places", "vertical", "radial", "radial_dm"}
    vertical = tables["vertical"]
    assert vertical["a_z"].unit == "km2 / (s2 kpc)"
    assert vertical["rho_dm_error"].unit == "solMass / pc3"
    assert vertical["z"].unit == "kpc"
    mine = vertical[vertical["method"] == "moments"]
    assert mine["a_z_error"].value == pytest.approx(2.0)
    i = spots.index(f"vertical:a_z@{mine['z'][0].value:+.3f}")
    assert mine["a_z"][0].value == pytest.approx(values[i])
    at = tables["places"]
    sun = at[(at["where"] == "Sun") & (at["method"] == "truth")]
    assert sun["rho"].value == pytest.approx(values[spots.index("rho@Sun")])
    assert np.isnan(sun["v_c"].value).all(), "what was not measured there"
