"""Potentials against galpy, autograd and their own serialised form."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.potentials import NFW, Composite, Hernquist, Isochrone, MiyamotoNagai, Plummer, from_dict
from galray.units import G

M = 3.7e10
CASES = {
    "plummer": Plummer(M, 1.3),
    "isochrone": Isochrone(M, 2.1),
    "hernquist": Hernquist(M, 0.7),
    "nfw": NFW(8e11, 16.0),
    "miyamoto_nagai": MiyamotoNagai(6e10, 3.0, 0.28),
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


@pytest.mark.parametrize("name", [k for k in CASES if k != "composite"])
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
