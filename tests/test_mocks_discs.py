"""The mock Milky Way: its mass, its orbits, and above all that its tracers are stationary in its gravity."""

from __future__ import annotations

import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from galray.frame import GalacticFrame, cylindrical
from galray.mocks import MilkyWay, MilkyWaySettings
from galray.mocks.discs import sample
from galray.mocks.orbits import MeridionalOrbits, energy, integrate, pericentre
from galray.potentials import from_dict
from galray.units import MSUN_PC3, G

POPULATIONS = ("thin_disc", "thick_disc", "stellar_halo")


@pytest.fixture(scope="module")
def galaxy():
    return MilkyWay()


@pytest.fixture(scope="module")
def thin(galaxy):
    return galaxy.mixed_orbits(galaxy.settings.thin_disc, 24_000, np.random.default_rng(1))[0]


@pytest.fixture(scope="module")
def thick(galaxy):
    return galaxy.mixed_orbits(galaxy.settings.thick_disc, 10_000, np.random.default_rng(2))[0]


@pytest.fixture(scope="module")
def table():
    return sample(MilkyWaySettings(num_stars=6000), 3)


def states(table):
    return torch.from_numpy(np.stack([table[c].to_numpy() for c in ("x", "y", "z", "vx", "vy", "vz")], -1))


# Mass -----------------------------------------------------------------------------------------------------


def test_mass_model_is_like_the_galaxy(galaxy):
    sun = galaxy.frame.sun_position
    assert 225 < galaxy.potential.circular_velocity(galaxy.frame.sun_radius) < 235
    assert galaxy.halo.mass_density(sun).item() / MSUN_PC3 == pytest.approx(0.010, rel=1e-9)
    assert 0.08 < galaxy.potential.mass_density(sun).item() / MSUN_PC3 < 0.10
    # K_z / 2πG at 1.1 kpc: about 70 Msun/pc² (Kuijken & Gilmore 1991; Bovy & Rix 2013)
    a = galaxy.potential.acceleration([sun[0], 0.0, 1.1])[2].item()
    assert 60 < -a / (2 * math.pi * G) / 1e6 < 75


def test_a_flattened_halo_has_its_density_at_the_sun():
    settings = MilkyWaySettings.model_validate({"potential": {"halo_flattening": 0.9}})
    halo = MilkyWay(settings).halo
    sun = torch.tensor(GalacticFrame().sun_position, dtype=torch.float64)
    assert halo.mass_density(sun).item() / MSUN_PC3 == pytest.approx(0.010, rel=1e-9)
    above, outside = ([-8.122, 0.0, 2.0], [-math.hypot(8.122, 2.0), 0.0, 0.0])
    assert halo.mass_density(above) < 0.98 * halo.mass_density(outside)


def test_truth_is_json_and_rebuilds_the_potential(galaxy):
    truth = json.loads(json.dumps(galaxy.truth()))
    x = [[-8.0, 0.5, 1.0], [-6.0, -1.0, -0.4]]
    parts = [from_dict(truth[name]) for name in ("baryons", "halo")]
    total = from_dict(truth["potential"])
    torch.testing.assert_close(
        sum(p.acceleration(x) for p in parts), total.acceleration(x), rtol=1e-12, atol=0
    )
    assert truth["sun"]["rho"] == pytest.approx(truth["sun"]["rho_baryons"] + truth["sun"]["rho_dm"])


# Orbits ---------------------------------------------------------------------------------------------------


def test_orbits_agree_with_galpy(galaxy):
    from galpy import potential as gp
    from galpy.orbit import Orbit

    p = galaxy.settings.potential
    halo = galaxy.potential.components["halo"]
    oracle = [
        gp.MiyamotoNagaiPotential(
            amp=G * p.stellar_disc_mass, a=p.stellar_disc_length_kpc, b=p.stellar_disc_height_kpc
        ),
        gp.MiyamotoNagaiPotential(amp=G * p.gas_disc_mass, a=p.gas_disc_length_kpc, b=p.gas_disc_height_kpc),
        gp.HernquistPotential(amp=2 * G * p.bulge_mass, a=p.bulge_radius_kpc),
        gp.NFWPotential(amp=G * halo.m_tot, a=p.halo_scale_radius_kpc),
    ]
    time = 0.5
    theirs = Orbit([7.5, 40.0, 200.0, 0.1, 35.0])
    theirs.integrate(np.linspace(0, time, 201), oracle, method="dop853")
    start = MeridionalOrbits(
        torch.tensor([[7.5, 0.1, 40.0, 35.0]], dtype=torch.float64),
        torch.tensor([1500.0], dtype=torch.float64),
    )
    ours = integrate(galaxy.potential, start, torch.tensor([time]), torch.tensor([5e-4])).state[0]
    expected = [theirs.R(time), theirs.z(time), theirs.vR(time), theirs.vz(time)]
    np.testing.assert_allclose(ours[:2], expected[:2], atol=1e-6)
    np.testing.assert_allclose(ours[2:], expected[2:], atol=1e-4)


def test_integrator_is_of_order_four_and_reversible(galaxy):
    start = galaxy.starting_orbits(galaxy.settings.thin_disc, 64, np.random.default_rng(4))
    time = torch.full((64,), 0.2, dtype=torch.float64)

    def end(step):
        return integrate(galaxy.potential, start, time, torch.full_like(time, step))

    exact = end(1e-4).state
    errors = [(end(step).state[:, 0] - exact[:, 0]).abs().median().item() for step in (2e-3, 1e-3)]
    assert 3.5 < math.log2(errors[0] / errors[1]) < 5.0
    back = end(2e-3)
    back.state[:, 2:] *= -1
    again = integrate(galaxy.potential, back, time, torch.full_like(time, 2e-3)).state
    torch.testing.assert_close(again[:, :2], start.state[:, :2], rtol=0, atol=1e-9)


def test_orbits_keep_their_energy_and_stay_outside_their_pericentre(galaxy, thin, thick):
    for name, orbits, seed in (("thin_disc", thin, 1), ("thick_disc", thick, 2)):
        disc = getattr(galaxy.settings, name)
        start = galaxy.starting_orbits(disc, len(orbits), np.random.default_rng(seed))
        assert torch.equal(start.angular_momentum, orbits.angular_momentum)
        ratio = energy(galaxy.potential, orbits) / energy(galaxy.potential, start)
        assert (ratio - 1).abs().max() <= galaxy.settings.energy_tolerance
        assert (orbits.state[:, 0] > 0.999 * pericentre(galaxy.potential, start)).all()
        assert (pericentre(galaxy.potential, start) > 0.1 * start.state[:, 0]).all()


def test_other_processes_do_not_change_the_stars(galaxy):
    here = galaxy.mixed_orbits(galaxy.settings.thin_disc, 400, np.random.default_rng(5))[0]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = galaxy.mixed_orbits(galaxy.settings.thin_disc, 400, np.random.default_rng(5), executor=pool)[
            0
        ]
    assert torch.equal(here.state, there.state)


# Stationarity ----------------------------------------------------------------------------------------------

RADII = ((4.5, 6.5), (6.5, 8.0), (8.0, 9.5), (9.5, 12.0))
HEIGHTS = ((0.0, 0.25), (0.25, 0.6), (0.6, 3.0))


def drift(before, after):
    """z-scores of the change of counts and velocity moments in bins of R and |z|."""
    scores = []
    for low, high in RADII:
        for bottom, top in HEIGHTS:
            values = []
            for orbits in (before, after):
                radius, z, v_radius, v_z = orbits.state.unbind(-1)
                inside = (radius > low) & (radius < high) & (z.abs() > bottom) & (z.abs() < top)
                v_phi = orbits.azimuthal_velocity
                moments = torch.stack(
                    [
                        v_radius.square(),
                        v_z.square(),
                        v_phi,
                        v_phi.square(),
                        v_radius,
                        v_radius * v_z * z.sign(),
                    ]
                )[:, inside]
                values.append((inside.sum().item(), moments.mean(1), moments.var(1) / inside.sum()))
            (n0, mean0, var0), (n1, mean1, var1) = values
            scores.append((n1 - n0) / math.sqrt(n0 + n1))
            scores.extend(((mean1 - mean0) / torch.sqrt(var0 + var1)).tolist())
    return np.array(scores)


@pytest.mark.parametrize("name", ["thin_disc", "thick_disc"])
def test_moments_do_not_drift(galaxy, name, request):
    """Integrated on by 0.2 to 0.6 Gyr each, the ensemble keeps its counts and moments everywhere."""
    before = request.getfixturevalue(name.split("_")[0])
    disc = getattr(galaxy.settings, name)
    start = galaxy.starting_orbits(
        disc, len(before), np.random.default_rng({"thin_disc": 1, "thick_disc": 2}[name])
    )
    for gyr in (0.2, 0.6):
        time = torch.full((len(before),), gyr / 0.978, dtype=torch.float64)
        after = integrate(galaxy.potential, before, time, galaxy.longest_step(start))
        scores = drift(before, after)
        assert np.abs(scores).max() < 4
        assert scores.std() < 1.3


def test_unmixed_orbits_do_drift(galaxy):
    """The same test sees the drift of the starting conditions, which are no equilibrium."""
    start = galaxy.starting_orbits(galaxy.settings.thin_disc, 24_000, np.random.default_rng(1))
    time = torch.full((len(start),), 0.02, dtype=torch.float64)
    before = integrate(galaxy.potential, start, time, galaxy.longest_step(start))
    after = integrate(galaxy.potential, before, time, galaxy.longest_step(start))
    assert np.abs(drift(before, after)).max() > 10


def weak_form(galaxy, orbits, scale=1.0):
    """z-scores of E[d(h g)/dt] over bumps h(R, |z|) and powers g of the velocity, for gravity × scale."""
    radius, z, v_radius, v_z = orbits.state.unbind(-1)
    v_phi, up = orbits.azimuthal_velocity, torch.sign(z)
    g_radius, g_z = galaxy.potential.force_factors(radius.square(), z.square())
    a_radius = -scale * g_radius * radius + v_phi.square() / radius
    z, v_z, a_z = z.abs(), v_z * up, -scale * g_z * z.abs()
    tests = {  # g and its rate of change in free flight
        "1": (torch.ones_like(z), torch.zeros_like(z)),
        "vR": (v_radius, a_radius),
        "vphi": (v_phi, -v_radius * v_phi / radius),
        "vR2": (v_radius**2, 2 * v_radius * a_radius),
        "vz2": (v_z**2, 2 * v_z * a_z),
        "vphi2": (v_phi**2, -2 * v_radius * v_phi**2 / radius),
        "vz": (v_z, a_z),
        "vRvz": (v_radius * v_z, a_radius * v_z + v_radius * a_z),
    }
    scores = {name: [] for name in tests}
    for centre, width in ((5.5, 1.2), (7.0, 1.2), (8.1, 1.2), (9.5, 1.5), (11.0, 1.5)):
        for height, thickness in ((0.0, 0.3), (0.4, 0.4), (1.0, 0.7)):
            r, q = (radius - centre) / width, (z - height) / thickness
            inside = ((r.abs() < 1) & (q.abs() < 1)).to(torch.float64)
            bump_r, bump_z = (1 - r**2) ** 3, (1 - q**2) ** 3
            flow = -6 * r * (1 - r**2) ** 2 / width * bump_z * v_radius
            flow = flow - 6 * q * (1 - q**2) ** 2 / thickness * bump_r * v_z
            for name, (g, rate) in tests.items():
                if height == 0 and name in ("vz", "vRvz"):
                    continue  # |z| has a kink at the plane
                d = inside * (flow * g + bump_r * bump_z * rate)
                scores[name].append((d.sum() / d.square().sum().sqrt()).item())
    return {name: np.array(values) for name, values in scores.items()}


def test_the_weak_boltzmann_equation_holds_in_the_exact_gravity(galaxy, thin, thick):
    for orbits in (thin, thick):
        scores = weak_form(galaxy, orbits)
        everything = np.concatenate(list(scores.values()))
        assert len(everything) == 110
        assert np.abs(everything).max() < 4
        assert 0.75 < everything.std() < 1.25


def test_the_weak_boltzmann_equation_notices_wrong_gravity(galaxy, thin):
    scores = weak_form(galaxy, thin, scale=1.1)
    assert (scores["vR"] < -2).mean() > 0.5
    assert abs(scores["vR"].mean()) > 3


# The ball ---------------------------------------------------------------------------------------------------


def test_turning_into_the_ball_keeps_the_axisymmetric_density(galaxy, thin):
    w, kept = galaxy.turned_into_ball(thin, np.random.default_rng(6))
    sun = torch.tensor(galaxy.frame.sun_position, dtype=torch.float64)
    assert (w[:, :3] - sun).norm(dim=1).max() <= galaxy.settings.ball_radius_kpc
    c = cylindrical(w)
    torch.testing.assert_close(c[:, 0], thin.state[kept, 0], rtol=1e-12, atol=0)
    torch.testing.assert_close(c[:, 4], thin.azimuthal_velocity[kept], rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(c[:, 3], thin.state[kept, 2], rtol=0, atol=1e-9)
    # in the wedge that is wholly inside the ball the counts follow the ring's own
    phi, low, high = 0.2, 6.0, 10.0
    ring = (thin.state[:, 0] > low) & (thin.state[:, 0] < high) & (thin.state[:, 1].abs() < 1)
    wedge = (c[:, 0] > low) & (c[:, 0] < high) & (c[:, 2].abs() < 1) & (c[:, 1].abs() < phi)
    chance = phi / math.asin(galaxy.settings.ball_radius_kpc / galaxy.frame.sun_radius)
    expected = ring.sum().item() * chance
    assert abs(wedge.sum().item() - expected) < 4 * math.sqrt(expected * (1 - chance))
    assert stats.ks_2samp(c[wedge, 0], thin.state[ring, 0]).pvalue > 1e-4
    assert stats.kstest(c[wedge, 1], "uniform", args=(-phi, 2 * phi)).pvalue > 1e-4


def test_stellar_halo_is_isotropic_and_isothermal(galaxy):
    w = galaxy.sample_halo(40_000, np.random.default_rng(7))
    c = cylindrical(w)
    sigma = galaxy.settings.stellar_halo.sigma_km_s
    np.testing.assert_allclose(c[:, 3:].std(0), 0.985 * sigma, rtol=0.02)  # truncated at the escape speed
    assert (c[:, 3:].mean(0).abs() < 4 * sigma / math.sqrt(len(c))).all()
    total = galaxy.potential.potential(w[:, :3]) + 0.5 * w[:, 3:].square().sum(1)
    assert total.max() < 0
    # counts against ∫ exp(−Φ/σ²) over the ball, by Monte Carlo of its own
    rng = np.random.default_rng(8)
    x = rng.uniform(-1, 1, (200_000, 3)) * galaxy.settings.ball_radius_kpc
    x = x[np.linalg.norm(x, axis=1) < galaxy.settings.ball_radius_kpc] + np.array(galaxy.frame.sun_position)
    weight = np.exp(-galaxy.potential.potential(x).numpy() / sigma**2)
    weight /= weight.sum()
    for axis in range(3):
        q = np.quantile(x[:, axis], np.linspace(0, 1, 9))
        expected = np.histogram(x[:, axis], q, weights=weight)[0]
        np.testing.assert_allclose(np.histogram(w[:, axis], q)[0] / len(w), expected, rtol=0.08)


def test_sample_is_a_table_of_stars_in_the_ball(table):
    assert table.num_rows == 6000
    assert len(set(table["orbit_id"].to_pylist())) == 6000
    w, s = states(table), MilkyWaySettings()
    assert w.dtype == torch.float64
    distance = (w[:, :3] - torch.tensor(MilkyWay(s).frame.sun_position, dtype=torch.float64)).norm(dim=1)
    assert distance.max() <= s.ball_radius_kpc
    names, counts = np.unique(table["population"].to_pylist(), return_counts=True)
    shares = dict(zip(names, counts / 6000, strict=True))
    for name in POPULATIONS:
        assert shares[name] == pytest.approx(getattr(s, name).fraction, abs=1e-3)
    # every giant is brighter than G = 14.6 at the far side of the ball
    apparent = table["abs_g_mag"].to_numpy() + 5 * np.log10(distance.numpy() * 100)
    assert apparent.max() < 14.6
    about = json.loads(table.schema.metadata[b"galray"])
    assert about["seed"] == 3
    assert about["orbits"]["thin_disc"]["max_error"] <= s.energy_tolerance


def test_populations_move_as_they_should(table):
    c = cylindrical(states(table)).numpy()
    population = np.array(table["population"].to_pylist())
    near = (np.abs(c[:, 0] - 8.1) < 1.2) & (np.abs(c[:, 2]) < 1)
    expected = {"thin_disc": (35, 20, 215), "thick_disc": (62, 38, 192), "stellar_halo": (128, 128, 0)}
    for name, (sigma_r, sigma_z, v_phi) in expected.items():
        v = c[(population == name) & near, 3:]
        assert v[:, 0].std() == pytest.approx(sigma_r, rel=0.2)
        assert v[:, 2].std() == pytest.approx(sigma_z, rel=0.2)
        assert v[:, 1].mean() == pytest.approx(v_phi, abs=12 if name != "stellar_halo" else 40)


def test_seed_size_of_the_ball_and_order(table):
    small = MilkyWaySettings(num_stars=200, ball_radius_kpc=1.5)
    again, calls = sample(small, 3), []
    assert again.equals(MilkyWay(small).sample(3, progress=lambda n, of: calls.append((n, of))))
    assert not again.equals(sample(small, 4))
    assert calls[-1] == (200, 200)
    assert [n for n, _ in calls] == sorted(n for n, _ in calls)
    # rows are exchangeable: any part of the table is a fair sample
    is_thin = np.array(table["population"].to_pylist()) == "thin_disc"
    assert is_thin[:3000].mean() == pytest.approx(is_thin[3000:].mean(), abs=0.06)


def test_settings_are_checked():
    with pytest.raises(ValidationError, match="add up to"):
        MilkyWaySettings.model_validate({"stellar_halo": {"fraction": 0.5}})
    with pytest.raises(ValidationError):
        MilkyWaySettings(ball_radius_kpc=9)
    with pytest.raises(ValidationError):
        MilkyWaySettings.model_validate({"bar": 1})
