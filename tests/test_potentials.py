"""Potentials against galpy, autograd and their own serialised form."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.potentials import (
    NFW,
    Composite,
    DoublePowerLaw,
    FlattenedNFW,
    Hernquist,
    Isochrone,
    MiyamotoNagai,
    Plummer,
    from_dict,
)
from galray.units import G

M = 3.7e10
CASES = {
    "plummer": Plummer(M, 1.3),
    "isochrone": Isochrone(M, 2.1),
    "hernquist": Hernquist(M, 0.7),
    "nfw": NFW(8e11, 16.0),
    "miyamoto_nagai": MiyamotoNagai(6e10, 3.0, 0.28),
    "double_power_law": DoublePowerLaw(4e8, 1.7, 1.3, 3.4, 0.6),
    "flattened_nfw": FlattenedNFW(8e11, 16.0, 0.87),
    "composite": Composite({"disc": MiyamotoNagai(6e10, 3.0, 0.28), "halo": NFW(8e11, 16.0)}),
}


def galpy_oracle(name):
    from galpy import potential as gp

    table = {
        "plummer": lambda: gp.PlummerPotential(amp=G * M, b=1.3),
        "isochrone": lambda: gp.IsochronePotential(amp=G * M, b=2.1),
        "hernquist": lambda: gp.HernquistPotential(amp=2 * G * M, a=0.7),
        "nfw": lambda: gp.NFWPotential(amp=G * 8e11, a=16.0),
        "miyamoto_nagai": lambda: gp.MiyamotoNagaiPotential(amp=G * 6e10, a=3.0, b=0.28),
    }
    return table[name]()


@pytest.fixture
def positions():
    return torch.as_tensor(np.random.default_rng(1).normal(size=(200, 3)) * [6.0, 6.0, 2.0])


@pytest.mark.parametrize(
    "name", [k for k in CASES if k not in ("composite", "double_power_law", "flattened_nfw")]
)
def test_agrees_with_galpy(name, positions):
    ours, theirs = CASES[name], galpy_oracle(name)
    x = positions.numpy()
    radius, z = np.hypot(x[:, 0], x[:, 1]), x[:, 2]
    np.testing.assert_allclose(ours.potential(positions), theirs(radius, z, use_physical=False), rtol=1e-12)
    a = ours.acceleration(positions).numpy()
    a_radial = (a[:, 0] * x[:, 0] + a[:, 1] * x[:, 1]) / radius
    np.testing.assert_allclose(a_radial, theirs.Rforce(radius, z, use_physical=False), rtol=1e-11)
    np.testing.assert_allclose(a[:, 2], theirs.zforce(radius, z, use_physical=False), rtol=1e-11)
    density = theirs.dens(radius, z, use_physical=False) / G
    np.testing.assert_allclose(ours.mass_density(positions), density, rtol=1e-10)
    np.testing.assert_allclose(ours.circular_velocity(8.0), theirs.vcirc(8.0, use_physical=False), rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_acceleration_and_density_are_derivatives_of_the_potential(name, positions):
    field, x = CASES[name], positions.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(field.potential(x).sum(), x)
    torch.testing.assert_close(-gradient, field.acceleration(positions), rtol=1e-11, atol=1e-9)
    laplacian = 0.0
    a = field.acceleration(x)
    for i in range(3):
        (g,) = torch.autograd.grad(a[:, i].sum(), x, retain_graph=True)
        laplacian = laplacian - g[:, i]
    density = laplacian / (4 * math.pi * G)
    torch.testing.assert_close(density, field.mass_density(positions), rtol=1e-7, atol=1e-3)


def test_nfw_pulls_with_its_enclosed_mass():
    halo = NFW.from_density(1e7, 10.0)
    assert halo.rho_s == pytest.approx(1e7, rel=1e-14)
    r = torch.tensor([1e-3, 0.05, 1.0, 30.0], dtype=torch.float64)
    # enclosed mass by quadrature of the density, independent of the closed form
    u = torch.linspace(0, 1, 400001, dtype=torch.float64)
    for radius in r:
        shell = u * radius
        x = torch.stack([shell, 0 * shell, 0 * shell], -1)
        integrand = 4 * math.pi * shell**2 * halo.mass_density(x)
        mass = torch.trapezoid(integrand, shell)
        a = halo.acceleration([[radius.item(), 0.0, 0.0]])[0, 0]
        assert -a.item() == pytest.approx((G * mass / radius**2).item(), rel=1e-8)


def test_centres_are_finite():
    for field in CASES.values():
        origin = torch.zeros(1, 3, dtype=torch.float64)
        assert torch.isfinite(field.potential(origin)).all()
        assert torch.isfinite(field.acceleration(origin)).all()


@pytest.mark.parametrize("name", CASES)
def test_survives_json(name, positions):
    field = CASES[name]
    again = from_dict(json.loads(json.dumps(field.to_dict())))
    assert again == field
    assert hash(again) == hash(field)
    assert torch.equal(again.acceleration(positions), field.acceleration(positions))


def test_a_flattened_halo_without_flattening_is_a_sphere(positions):
    sphere, halo = NFW(8e11, 16.0), FlattenedNFW(8e11, 16.0, 1.0)
    torch.testing.assert_close(halo.potential(positions), sphere.potential(positions), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        halo.mass_density(positions), sphere.mass_density(positions), rtol=1e-12, atol=0
    )


def test_flattened_equipotentials_and_density():
    halo = FlattenedNFW(8e11, 16.0, 0.9)
    assert halo.potential([[0.0, 0.0, 0.9 * 7.0]]).item() == pytest.approx(
        halo.potential([[7.0, 0.0, 0.0]]).item()
    )
    for q in (0.8, 1.25):  # the densities stay positive where a Galaxy's stars go
        r = torch.linspace(0.5, 40.0, 80, dtype=torch.float64)
        x = torch.stack([r, 0 * r, 0 * r], -1)
        halo = FlattenedNFW(8e11, 15.0, q)
        for along in (x, x.flip(-1)):
            assert (halo.mass_density(along) > 0).all()
    with pytest.raises(GalrayError, match="negative densities"):
        FlattenedNFW(8e11, 15.0, 0.7)


def test_composite_subset():
    galaxy = CASES["composite"]
    x = [[-8.0, 1.0, 0.3]]
    assert torch.equal(galaxy.subset(["halo"]).mass_density(x), NFW(8e11, 16.0).mass_density(x))
    with pytest.raises(GalrayError, match="no component 'bar'"):
        galaxy.subset(["bar"])


def test_batches_dtypes_and_bad_input():
    x = np.random.default_rng(2).normal(size=(4, 5, 3)).astype(np.float32)
    field = CASES["composite"]
    assert field.acceleration(x).shape == (4, 5, 3)
    assert field.potential(x).dtype == torch.float64
    # plain numbers are never rounded to single precision
    assert field.potential([[-8.1, 0.1, 0.3]]) == field.potential(np.array([[-8.1, 0.1, 0.3]]))
    assert field.circular_velocity(8.1) == field.circular_velocity(np.float64(8.1))
    with pytest.raises(ValueError, match="shape"):
        field.potential(np.zeros((3, 2)))
    with pytest.raises(GalrayError, match="b = -1"):
        Plummer(1e10, -1)
    with pytest.raises(GalrayError, match="unknown potential type"):
        from_dict({"type": "Bar"})
    with pytest.raises(GalrayError, match="takes exactly"):
        from_dict({"type": "Plummer", "m_tot": 1.0})


@pytest.mark.parametrize(
    ("power_law", "known"),
    [
        (DoublePowerLaw(6.4e7, 1.0, 1, 3, 1), NFW.from_density(6.4e7, 1.0)),
        (DoublePowerLaw(M / (2 * math.pi * 0.7**3), 0.7, 1, 4, 1), Hernquist(M, 0.7)),
        (DoublePowerLaw(3 * M / (4 * math.pi * 1.3**3), 1.3, 2, 5, 0), Plummer(M, 1.3)),
    ],
    ids=["nfw", "hernquist", "plummer"],
)
def test_double_power_laws_that_have_a_name(power_law, known, positions):
    x = torch.cat([1e-3 * positions, positions, 1e3 * positions])
    torch.testing.assert_close(power_law.potential(x), known.potential(x), rtol=1e-11, atol=0)
    torch.testing.assert_close(power_law.acceleration(x), known.acceleration(x), rtol=1e-11, atol=0)
    torch.testing.assert_close(power_law.mass_density(x), known.mass_density(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "shape", [(1, 3, 0), (2, 5, 0.1), (2, 5, 1), (0.4, 3.2, 1.9), (3, 2.5, 2.3), (1, 4, 0)]
)
def test_double_power_law_mass_against_hypergeometric_functions(shape):
    from scipy.special import hyp2f1

    alpha, beta, gamma = shape
    field = DoublePowerLaw(3e7, 0.25, alpha, beta, gamma)
    r = np.geomspace(1e-6, 10.0, 300)
    s, a = r / 0.25, (3 - gamma) / alpha
    chi = s**alpha / (1 + s**alpha)
    # Pfaff's form, whose argument stays in [0, 1)
    function = (1 + s**alpha) ** -a * hyp2f1(a, 1 + (3 - beta) / alpha, 1 + a, chi)
    mass = 4 * math.pi * 3e7 * 0.25**3 * s ** (3 - gamma) / (3 - gamma) * function
    ours = field.enclosed_mass(r)
    np.testing.assert_allclose(ours, mass, rtol=1e-9)
    if beta > 3:
        far = 0.25 * math.exp(30.0)
        np.testing.assert_allclose(
            field.enclosed_mass(far), field.total_mass, rtol=1e-11 + 10 * math.exp(30 * (3 - beta))
        )
    else:
        assert field.total_mass == math.inf
    slope = torch.tensor(r).log().requires_grad_()
    (numeric,) = torch.autograd.grad(field.density(slope.exp()).log().sum(), slope)
    torch.testing.assert_close(numeric, field.density_slope(r), rtol=1e-10, atol=1e-10)


def test_double_power_law_core_of_the_dwarf_mocks():
    # ρ = 4e8 (1+r)⁻³: M = 4π·4e8 [ln(1+r) + 2/(1+r) − 1/(2(1+r)²) − 3/2]
    field = DoublePowerLaw(rho_0=4e8, r_s=1.0, alpha=1, beta=3, gamma=0)
    r = np.array([0.1, 0.25, 0.5, 1.0])
    mass = 4 * math.pi * 4e8 * (np.log1p(r) + 2 / (1 + r) - 0.5 / (1 + r) ** 2 - 1.5)
    np.testing.assert_allclose(field.enclosed_mass(r), mass, rtol=1e-12)
    np.testing.assert_allclose(field.density(r), 4e8 / (1 + r) ** 3, rtol=1e-14)
    assert field.total_mass == math.inf


@pytest.mark.parametrize(
    "wrong", [{"beta": 2.0}, {"gamma": 3.0}, {"gamma": -0.1}, {"alpha": 0.0}, {"rho_0": -1}]
)
def test_double_power_law_refuses_what_has_no_gravity(wrong):
    with pytest.raises(GalrayError, match=next(iter(wrong))):
        DoublePowerLaw(**({"rho_0": 1e8, "r_s": 1.0, "alpha": 1, "beta": 3, "gamma": 1} | wrong))
