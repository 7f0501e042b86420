"""Baryons, averages, profile fits, surface densities and the verdict on equilibrium."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from galray.errors import GalrayError
from galray.frame import GalacticFrame, cylindrical
from galray.gravity import (
    BaryonSettings,
    HaloSettings,
    Kernel,
    Region,
    agreement,
    averaging_points,
    azimuthal_acceleration,
    boltzmann_residuals,
    build,
    circular_velocity,
    north_south,
    smooth,
    surface_density,
    verdict,
    vertical_force,
)
from galray.gravity.equilibrium import Agreement
from galray.mocks.spheres import PlummerSphere
from galray.potentials import NFW, Composite, MiyamotoNagai
from galray.units import MSUN_PC3, G

SUN = GalacticFrame().sun_position
GALAXY = Composite({"disc": MiyamotoNagai(6e10, 3.0, 0.3), "halo": NFW.from_density(8e6, 16.0)})


def column(z):
    z = torch.as_tensor(z, dtype=torch.float64)
    return torch.stack([torch.full_like(z, -8.122), torch.zeros_like(z), z], -1)


# -- baryons -----------------------------------------------------------------------------------------------


def test_mckee_sums():
    """The paper's sums: 0.084 Msun/pc³ in the plane, 47.1 ± 3.4 Msun/pc² in all, 13.7 of it gas."""
    baryons = build(BaryonSettings())
    assert float(baryons.mass_density(column([0.0]))[0]) / MSUN_PC3 == pytest.approx(0.084, abs=0.001)
    z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    total = float(torch.trapezoid(baryons.mass_density(column(z)), z)) / 1e6
    assert total == pytest.approx(47.1, abs=0.6)
    gas = sum(layer.column for layer in baryons.layers if layer.kind == "gas") / 1e6
    stars = sum(layer.column for layer in baryons.layers if layer.kind == "stars") / 1e6
    assert gas == pytest.approx(13.6, abs=0.2)
    assert stars == pytest.approx(33.4, abs=0.05)
    assert gas + stars == pytest.approx(total, rel=1e-3)


def test_mckee_uncertainty():
    """Draws scatter as the paper's errors do, about a mean that is the model."""
    baryons = build(BaryonSettings())
    x = column([0.0])
    draws = np.array([float(baryons.draw(i).mass_density(x)[0]) for i in range(400)]) / MSUN_PC3
    assert draws.mean() == pytest.approx(0.084, abs=0.002)
    assert 0.003 < draws.std() < 0.013  # the stars alone: ±0.004 from their sum
    assert float(baryons.draw(3).mass_density(x)[0]) == float(baryons.draw(3).mass_density(x)[0])
    kernel = Kernel()
    places = column([-1.0, 1.0])
    covariance = baryons.error(places, kernel, num_draws=16)
    assert covariance.shape == (2, 2)
    assert float(covariance[0, 1]) == pytest.approx(float(covariance[0, 0]), rel=1e-6)  # the same layers


def test_baryons_are_smoothed_with_the_kernel():
    baryons = build(BaryonSettings())
    x = column([0.0, 1.0])
    smoothed = baryons.smoothed_density(x, Kernel())
    torch.testing.assert_close(smoothed, smooth(baryons.mass_density, x, Kernel()))
    assert float(smoothed[0]) < 0.9 * float(baryons.mass_density(x)[0])


def test_other_baryons(tmp_path):
    disc = GALAXY.subset(["disc"])
    mock = build(BaryonSettings(model="potential"), disc.to_dict())
    x = column([0.0, 0.7])
    torch.testing.assert_close(mock.mass_density(x), disc.mass_density(x))
    assert float(build(BaryonSettings(model="none")).mass_density(x).abs().sum()) == 0
    table = tmp_path / "layers.toml"
    table.write_text(
        'name = "one"\nradius_kpc = 8.122\n[[layers]]\nname = "a"\ndensity_msun_pc3 = 0.1\n'
        'height_pc = 200\nshape = "exp"\nscale_length_kpc = 2.0\n'
    )
    own = build(BaryonSettings(model="table", file=str(table)))
    expected = 0.1 * MSUN_PC3 * torch.exp(-torch.tensor([0.0, 3.5], dtype=torch.float64))
    torch.testing.assert_close(own.mass_density(x), expected)
    further = torch.tensor([[-9.122, 0.0, 0.0]])
    assert float(own.mass_density(further)[0]) == pytest.approx(0.1 * MSUN_PC3 * math.exp(-0.5))


def test_bad_baryons(tmp_path):
    with pytest.raises(GalrayError, match="without a potential"):
        build(BaryonSettings(model="potential"))
    with pytest.raises(ValidationError, match="needs the path"):
        BaryonSettings(model="table")
    with pytest.raises(GalrayError, match="cannot be read"):
        build(BaryonSettings(model="table", file=str(tmp_path / "absent.toml")))
    broken = tmp_path / "broken.toml"
    for text, what in [
        ("name = ", "not a TOML file"),
        ('name = "a"\nradius_kpc = 8\n', "layers"),
        (
            'name="a"\nradius_kpc=8\n[[layers]]\nname="b"\nheight_pc=1\nshape="exp"\n',
            "density_msun_pc3 or number_density_cm3",
        ),
        (
            'name="a"\nradius_kpc=8\n[[layers]]\nname="b"\ndensity_msun_pc3=1\nheight_pc=1\nshape="box"\n',
            "shape",
        ),
    ]:
        broken.write_text(text)
        with pytest.raises(GalrayError, match=what):
            build(BaryonSettings(model="table", file=str(broken)))


# -- halo --------------------------------------------------------------------------------------------------


def test_averaging_region():
    settings = HaloSettings()
    kernel = Kernel()
    ball = Region(SUN, 4.0)
    points = averaging_points(settings, ball, kernel)
    c = cylindrical(points.x)
    assert float(points.weight.sum()) == pytest.approx(1.0)
    assert float((c[:, 0] - 8.122).abs().max()) <= 0.3
    assert 0.5 <= float(c[:, 2].abs().min()) < 0.65
    assert float(c[:, 2].abs().max()) <= 2.0
    assert bool(ball.contains_kernel(points.x, kernel.reach).all())
    # as much on each side of the plane and of the Sun
    assert float(points.weight @ c[:, 1]) == pytest.approx(0, abs=1e-12)
    assert float(points.weight @ c[:, 2]) == pytest.approx(0, abs=1e-12)
    small = averaging_points(settings, Region(SUN, 1.9), kernel)
    assert len(small.x) < len(points.x)
    with pytest.raises(GalrayError, match="larger ball"):
        averaging_points(settings, Region(SUN, 1.1), kernel)


def test_average_and_its_error():
    points = averaging_points(HaloSettings(), Region(SUN, 4.0), Kernel())
    n = len(points.x)
    mean, error = points.average(torch.full((n,), 3.0), torch.full((n, n), 0.25))
    assert mean == pytest.approx(3.0)
    assert error == pytest.approx(0.5)  # fully correlated errors do not average down
    assert math.isnan(points.average(torch.ones(n))[1])


def test_surface_density_force_and_circular_velocity():
    z = torch.linspace(-1.1, 1.1, 2201, dtype=torch.float64)
    expected = float(torch.trapezoid(GALAXY.mass_density(column(z)), z))
    assert surface_density(GALAXY, 1.1, radius=8.122) == pytest.approx(expected, rel=2e-3)
    assert surface_density(GALAXY, 1.1, radius=8.122, phi=0.2) == pytest.approx(expected, rel=2e-3)
    assert circular_velocity(GALAXY, 8.122) == pytest.approx(
        float(GALAXY.circular_velocity(torch.tensor(8.122, dtype=torch.float64))), rel=1e-9
    )
    k = vertical_force(GALAXY, torch.tensor([1.0]), radius=8.122)
    assert float(k[0]) == pytest.approx(float(GALAXY.acceleration(column([1.0]))[0, 2]))
    # the plane-parallel estimate |K_z|/2πG lies near Σ
    assert abs(float(k[0])) / (2 * math.pi * G) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("values", [{"min_height_kpc": 2.0, "max_height_kpc": 1.0}, {"max_height_kpc": 0}])
def test_halo_settings(values):
    with pytest.raises(ValidationError):
        HaloSettings(**values)


# -- equilibrium -------------------------------------------------------------------------------------------


def test_residuals_vanish_on_the_truth_and_not_off_it():
    sphere = PlummerSphere(1e9, 1.0)
    w = sphere.sample(4000, 1)
    s = sphere.score(w)
    good = boltzmann_residuals(w, s, sphere.potential_field, bins=4)
    assert good["relative_rms"] < 1e-6
    heavier = PlummerSphere(1.3e9, 1.0).potential_field
    bad = boltzmann_residuals(w, s, heavier, bins=4)
    assert 0.1 < bad["relative_rms"] < 0.5
    assert bad["median_rate"] > 1e3 * good["median_rate"]
    assert int(bad["map"]["count"].sum()) == 4000
    # 1 km/s/kpc = 1.0227 / Gyr
    rate = np.median(np.abs((w[:, 3:] * s[:, :3] + heavier.acceleration(w[:, :3]) * s[:, 3:]).sum(1).numpy()))
    assert bad["median_rate"] == pytest.approx(1.0227 * rate, rel=1e-3)
    with pytest.raises(GalrayError):
        boltzmann_residuals(w, s[:10], heavier)


def test_azimuthal_acceleration():
    rng = np.random.default_rng(2)
    x = torch.from_numpy(np.array(SUN) + rng.normal(size=(30, 3)) * 0.5)
    a = GALAXY.acceleration(x)
    covariance = np.eye(90) * 20.0**2
    none = azimuthal_acceleration(x, a, covariance)
    assert none["ratio"] == pytest.approx(0, abs=1e-12)
    assert none["p_value"] == pytest.approx(1.0)
    noisy = azimuthal_acceleration(x, a + torch.from_numpy(rng.normal(size=(30, 3)) * 20.0), covariance)
    assert noisy["p_value"] > 1e-3
    assert noisy["dof"] == 30
    # a push along +φ, which is +y at the Sun
    pushed = azimuthal_acceleration(x, a + torch.tensor([0.0, 200.0, 0.0]), covariance)
    assert pushed["ratio"] > 0.02
    assert pushed["p_value"] < 1e-6


def test_north_south():
    x = column([0.5, 1.0, 1.5])
    assert north_south(x, GALAXY)["relative"] < 1e-9

    class Tilted:
        def acceleration(self, x):
            return GALAXY.acceleration(x) + torch.tensor([0.0, 0.0, 150.0])

    out = north_south(x, Tilted(), np.eye(3) * 50.0**2)
    assert out["relative"] > 0.02
    assert out["p_value"] < 1e-6


def test_agreement_is_calibrated():
    rng = np.random.default_rng(5)
    root = rng.normal(size=(6, 6))
    c = root @ root.T + np.eye(6)
    p = []
    for _ in range(300):
        first = rng.multivariate_normal(np.zeros(6), c)
        second = rng.normal(size=6)
        p.append(agreement(first, second, c, np.ones(6)).p_value)
    assert 0.4 < np.mean(p) < 0.6
    assert np.mean(np.array(p) < 0.05) < 0.12
    # numbers that are one number, measured once
    singular = agreement(np.ones(4), np.zeros(4), np.ones((4, 4)), np.zeros((4, 4)))
    assert singular.dof == 1
    assert singular.chi2 == pytest.approx(1.0)


def test_verdicts():
    fine = verdict(
        overidentification=Agreement(100.0, 101, 0.5),
        azimuthal={"ratio": 0.013, "p_value": 0.3},
        asymmetry={"relative": 0.02, "p_value": 0.4},
        agreements={"flow and moments": Agreement(3.0, 3, 0.4)},
    )
    assert fine.level == "ok"
    assert "Consistent with equilibrium" in fine.sentence
    assert "+1.3 %" in fine.sentence
    doubtful = verdict(overidentification=Agreement(150.0, 101, 1.5e-3))
    assert doubtful.level == "warn"
    broken = verdict(overidentification=Agreement(300.0, 101, 1e-20))
    assert broken.level == "fail"
    assert broken.to_dict()["level"] == "fail"
    assert "moments" in broken.to_dict()["verdict"]
    assert verdict().level == "warn"
