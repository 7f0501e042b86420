"""Measured potentials in galpy, gala and agama: values, frames, orbits, and the border of what is known."""

import types

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from galray.ensemble import FieldEnsemble
from galray.errors import GalrayError
from galray.frame import cartesian
from galray.gravity import (
    MeanField,
    PotentialSettings,
    fit_spline_to_accelerations,
    to_agama,
    to_gala,
    to_galpy,
)
from galray.gravity.region import Region
from galray.potentials import NFW, Composite, MiyamotoNagai

R0 = 8.122
GALAXY = Composite({"disc": MiyamotoNagai(6e10, 3.0, 0.3), "halo": NFW.from_density(8e6, 16.0)})
SETTINGS = PotentialSettings(base="Rz", base_splines=(10, 15))
REGION = Region((-R0, 0.0, 0.0), 3.0)
START = np.array([-8.0, 0.1, 0.05, 15.0, 225.0, 20.0])
DURATION = 0.01  # kpc / (km/s): 9.8 Myr; the integrator may look one of its steps farther, still in the ball


class Bar:
    """A field that is not axisymmetric: a quadrupole on top of the galaxy, known inside a ball."""

    region = REGION

    def potential(self, x):
        return GALAXY.potential(x) + 40.0 * torch.as_tensor(x)[..., 0] * torch.as_tensor(x)[..., 1]

    def acceleration(self, x):
        x = torch.as_tensor(x)
        extra = torch.stack([x[..., 1], x[..., 0], torch.zeros_like(x[..., 0])], -1)
        return GALAXY.acceleration(x) - 40.0 * extra

    def mass_density(self, x):
        return GALAXY.mass_density(x)


@pytest.fixture(scope="module")
def spline():
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, size=(4000, 3))
    x = x[np.linalg.norm(x, axis=1) < 3] + np.array(REGION.center)
    return fit_spline_to_accelerations(x, GALAXY.acceleration(torch.from_numpy(x)), SETTINGS, REGION)


def own_orbit(field, start=START, duration=DURATION):
    def rate(_, w):
        return np.concatenate([w[3:], np.asarray(field.acceleration(torch.from_numpy(w[None, :3])))[0]])

    return solve_ivp(rate, (0, duration), start, method="DOP853", rtol=1e-10, atol=1e-10).y[:, -1]


def galpy_orbit(potential, start=START, duration=DURATION):
    from galpy.orbit import Orbit
    from galpy.util import conversion

    x, y, z, vx, vy, vz = start
    radius, phi = np.hypot(x, y), np.arctan2(y, -x)
    v_r, v_t = (x * vx + y * vy) / radius, (y * vx - x * vy) / radius
    ro, vo = potential._ro, potential._vo
    orbit = Orbit([radius / ro, v_r / vo, v_t / vo, z / ro, vz / vo, phi], ro=ro, vo=vo)
    time = duration / (conversion.time_in_Gyr(vo, ro) / 0.9777922216807891)
    orbit.integrate(np.linspace(0, time, 41), potential, method="dop853")
    orbit.turn_physical_off()
    c = [orbit.R(time) * ro, orbit.phi(time), orbit.z(time) * ro]
    return np.append(cartesian(np.array(c)), orbit.vz(time) * vo)


@pytest.mark.parametrize("field", ["spline", "bar"])
def test_galpy_orbits_are_our_own(field, spline):
    pytest.importorskip("galpy")
    field = spline if field == "spline" else Bar()
    potential = field.to_galpy() if field is spline else to_galpy(field)
    assert potential.isNonAxi == (field is not spline)
    ours = own_orbit(field)
    assert np.linalg.norm(ours[:3] - START[:3]) > 1.8
    assert galpy_orbit(potential) == pytest.approx(ours[[0, 1, 2, 5]], abs=2e-4)


def test_galpy_values_are_those_of_the_field():
    pytest.importorskip("galpy")
    potential = to_galpy(Bar(), length_kpc=8.0, speed_km_s=220.0)
    c = np.array([7.5, 0.2, 0.4])
    x = torch.from_numpy(cartesian(c))
    a = Bar().acceleration(x).numpy()
    place = {"R": c[0] / 8, "z": c[2] / 8, "phi": c[1], "use_physical": False}
    assert potential(**place) * 220**2 == pytest.approx(float(Bar().potential(x)))
    outward = np.array([-np.cos(c[1]), np.sin(c[1]), 0])
    along = np.array([np.sin(c[1]), np.cos(c[1]), 0])
    force = 220**2 / 8
    assert potential.Rforce(**place) * force == pytest.approx(a @ outward)
    assert potential.zforce(**place) * force == pytest.approx(a[2])
    assert potential.phitorque(**place) * 220**2 == pytest.approx(a @ along * c[0])
    # physical units through galpy's own constants
    rho = potential.dens(c[0] / 8, c[2] / 8, phi=c[1], use_physical=True, quantity=False)
    assert rho == pytest.approx(float(GALAXY.mass_density(x)) / 1e9, rel=1e-3)
    # second derivatives obey Poisson's equation: their trace is the density's
    galaxy = to_galpy(GALAXY, length_kpc=8.0, speed_km_s=220.0)
    del place["phi"]
    trace = galaxy.R2deriv(**place) + galaxy.z2deriv(**place) - galaxy.Rforce(**place) / place["R"]
    assert trace == pytest.approx(4 * np.pi * galaxy.dens(**place), rel=1e-3)
    many = potential.Rforce(np.full(3, 0.94), np.zeros(3), phi=np.array([0.0, 0.1, 0.2]), use_physical=False)
    assert many.shape == (3,)


def test_gala_orbits_and_values(spline):
    gp = pytest.importorskip("gala.potential")
    gd, gi = pytest.importorskip("gala.dynamics"), pytest.importorskip("gala.integrate")
    from astropy import units as u

    for field in (spline, Bar()):
        potential = to_gala(field)
        w = gd.PhaseSpacePosition(pos=START[:3] * u.kpc, vel=START[3:] * u.km / u.s)
        duration = (DURATION * u.kpc / (u.km / u.s)).to(u.Myr)
        orbit = gp.Hamiltonian(potential).integrate_orbit(
            w, dt=duration / 40, n_steps=40, Integrator=gi.DOPRI853Integrator, cython_if_possible=False
        )
        ours = own_orbit(field)
        assert orbit.pos.xyz[:, -1].to_value(u.kpc) == pytest.approx(ours[:3], abs=1e-5)
        assert orbit.vel.d_xyz[:, -1].to_value(u.km / u.s) == pytest.approx(ours[3:], abs=1e-3)
    q = np.array([[-8.0, 0.3, 0.4], [-7.0, -0.5, 0.0]])
    x = torch.from_numpy(q)
    potential = to_gala(Bar())
    assert potential.energy(q.T * u.kpc).to_value(u.km**2 / u.s**2) == pytest.approx(
        Bar().potential(x).numpy()
    )
    a = potential.acceleration(q.T * u.kpc).to_value(u.km**2 / u.s**2 / u.kpc)
    assert a.T == pytest.approx(Bar().acceleration(x).numpy())
    rho = potential.density(q.T * u.kpc).to_value(u.Msun / u.kpc**3)
    assert rho == pytest.approx(GALAXY.mass_density(x).numpy())


class StandInAgama(types.ModuleType):
    """agama's documented face: units, and a Potential that takes Φ of (n, 3) positions in those units."""

    def __init__(self, units):
        super().__init__("agama")
        self.units = units

    def getUnits(self):
        return self.units

    def setUnits(self, **units):
        self.units = units

    def Potential(self, **arguments):
        return types.SimpleNamespace(**arguments)


def test_what_agama_is_given(monkeypatch, spline):
    """The function and symmetry that agama gets, whatever its units; agama itself is tested below."""
    x = np.array([[-8.0, 0.3, 0.4], [-7.0, -0.5, 0.0], [0.0, 0.0, 0.0]])
    fresh = StandInAgama({})
    monkeypatch.setitem(__import__("sys").modules, "agama", fresh)
    exported = to_agama(Bar())
    assert fresh.units == {"length": 1, "mass": 1, "velocity": 1}
    assert exported.symmetry == "none"
    values = exported.potential(x)
    assert values[:2] == pytest.approx(Bar().potential(torch.from_numpy(x[:2])).numpy())
    assert np.isnan(values[2])
    monkeypatch.setitem(__import__("sys").modules, "agama", StandInAgama({"length": 2.0, "velocity": 100.0}))
    scaled = spline.to_agama()
    assert scaled.symmetry == "axisymmetric"
    expected = spline.potential(torch.from_numpy(x[:2])).numpy() / 1e4
    assert scaled.potential(x[:2] / 2.0) == pytest.approx(expected)


def test_agama_orbits(spline):
    agama = pytest.importorskip("agama")
    agama.setUnits(length=1, mass=1, velocity=1)
    for field in (spline, Bar()):
        _, states = agama.orbit(potential=to_agama(field), ic=START, time=DURATION, trajsize=2)
        assert states[-1][:3] == pytest.approx(own_orbit(field)[:3], abs=1e-3)


def test_beyond_the_ball(spline):
    pytest.importorskip("galpy")
    inside, outside = (R0 / 8.122, 0.0), ((R0 + 3.1) / 8.122, 0.0)
    strict = spline.to_galpy()
    assert np.isfinite(strict(*inside, use_physical=False))
    with pytest.raises(GalrayError, match=r"\(-11\.222, 0\.000, 0\.000\) kpc lies beyond the ball of 3 kpc"):
        strict(*outside, use_physical=False)
    lenient = spline.to_galpy(outside="nan")
    assert np.isnan(lenient(*outside, use_physical=False))
    assert np.isnan(lenient.Rforce(*outside, use_physical=False))
    assert lenient.num_outside == 2
    with pytest.raises(GalrayError, match="'error' or 'nan'"):
        spline.to_galpy(outside="extrapolate")
    with pytest.raises(GalrayError, match="beyond the ball"):
        galpy_orbit(strict, duration=0.1)


def test_fields_without_a_potential_say_so():
    class Bare:
        def acceleration(self, x):
            return GALAXY.acceleration(x)

    for export in (to_galpy, to_gala, to_agama):
        with pytest.raises(GalrayError, match="accelerations but no potential"):
            export(Bare())
        with pytest.raises(GalrayError, match="accelerations but no potential"):
            export(MeanField([GALAXY, Bare()]))


def test_packages_that_are_absent_are_named(monkeypatch, spline):
    for name in ("galpy", "gala", "agama"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(GalrayError, match=rf"pip install galray\[{name}\]"):
            getattr(spline, f"to_{name}")()


def test_the_ensembles_mean(spline):
    pytest.importorskip("galpy")
    heavier = spline.with_parameters(1.1 * spline.parameters)
    ensemble = FieldEnsemble(
        {"moments": [("base", spline)], "score": [("base", heavier), ("seed", heavier), ("draw", spline)]},
        {"moments": 0.75, "score": 0.25},
    )
    x = torch.tensor([[-8.0, 0.2, 0.3]], dtype=torch.float64)
    mean = ensemble.mean_field()
    assert mean.acceleration(x).numpy() == pytest.approx(ensemble.acceleration(x))
    assert mean.acceleration(x).numpy() == pytest.approx(1.025 * spline.acceleration(x).numpy())
    exported = ensemble.to_galpy()
    assert not exported.isNonAxi
    force = exported.zforce(1.0, 0.04, use_physical=False)
    assert force == pytest.approx(1.025 * spline.to_galpy().zforce(1.0, 0.04, use_physical=False))
    assert ensemble.mean_field("score").acceleration(x).numpy() == pytest.approx(
        1.1 * spline.acceleration(x).numpy()
    )
