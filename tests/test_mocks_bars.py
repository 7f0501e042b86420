"""The barred mock: its gravity, its orbits, and that its tracers are steady in the frame that turns."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.integrate import solve_ivp

from galray.errors import GalrayError
from galray.frame import cylindrical
from galray.mocks import BarredGalaxy, BarredGalaxySettings, RotatingIsothermal
from galray.mocks.rotating_orbits import integrate_rotating, jacobi_energy
from galray.phasespace import Ball, ExactModel
from galray.potentials import Composite, LongMuraliBar, MiyamotoNagai, from_dict
from galray.units import G

BALL = Ball((-8.122, 0.0, 0.02), 3.0)


@pytest.fixture(scope="module")
def galaxy():
    return BarredGalaxy(BarredGalaxySettings(num_stars=400))


def turned(x, angle):
    """Positions or velocities turned along Galactic rotation."""
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.stack([x[..., 0] * cos + x[..., 1] * sin, x[..., 1] * cos - x[..., 0] * sin, x[..., 2]], -1)


# Gravity --------------------------------------------------------------------------------------------------


def test_bar_is_the_gradient_and_laplacian_of_its_potential():
    bar = LongMuraliBar(2e10, 4.5, 0.8, 0.4, 27.0)
    x = (
        torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 5
    ).requires_grad_()
    (slope,) = torch.autograd.grad(bar.potential(x).sum(), x, create_graph=True)
    torch.testing.assert_close(-slope, bar.acceleration(x), rtol=1e-11, atol=1e-9)
    laplacian = sum(torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(3))
    torch.testing.assert_close(laplacian / (4 * math.pi * G), bar.mass_density(x), rtol=1e-9, atol=0)


def test_bar_far_away_is_a_point_and_its_near_end_leads_the_sun():
    bar = LongMuraliBar(2e10, 4.5, 0.8, 0.4, 27.0)
    far = torch.tensor([[0.0, 3e4, 0.0], [0.0, 0.0, 3e4]])
    torch.testing.assert_close(bar.potential(far), -G * 2e10 / far.double().norm(dim=1), rtol=1e-4, atol=0)
    # at the Sun the near end lies ahead, and pulls along the rotation (+y)
    a = bar.acceleration([-8.122, 0.0, 0.0])
    assert a[0] > 0
    assert a[1] > 0
    short = LongMuraliBar(2e10, 1e-4, 0.8, 0.4)
    x = torch.tensor([[3.0, 2.0, 0.5], [-1.0, 0.3, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(
        short.acceleration(x), MiyamotoNagai(2e10, 0.8, 0.4).acceleration(x), rtol=1e-6, atol=0
    )


def test_bars_in_composites_and_as_json(galaxy):
    again = from_dict(json.loads(json.dumps(galaxy.truth()["potential"])))
    x = torch.tensor([[-8.0, 0.5, 1.0], [-6.0, -1.0, -0.4]], dtype=torch.float64)
    assert not again.axisymmetric
    assert again.subset(["disc", "halo"]).axisymmetric
    torch.testing.assert_close(again.acceleration(x), galaxy.potential.acceleration(x), rtol=1e-14, atol=0)
    with pytest.raises(GalrayError, match="azimuth"):
        again.force_factors(x[:, 0], x[:, 1])
    with pytest.raises(GalrayError, match="angle_deg"):
        LongMuraliBar(2e10, 4.5, 0.8, 0.4, math.nan)


def test_the_bar_is_strong_at_the_sun(galaxy):
    a = galaxy.potential.acceleration([-8.122, 0.0, 0.0])
    assert 0.05 < float(a[1] / a[0]) < 0.2
    assert 220 < galaxy.truth()["sun"]["circular_velocity_km_s"] < 250


# Orbits ---------------------------------------------------------------------------------------------------


def test_orbit_in_the_turning_frame_is_the_inertial_one(galaxy):
    start = torch.tensor([[-6.0, 2.0, 0.1, 60.0, 200.0, 40.0]], dtype=torch.float64)
    time, speed = 0.12, galaxy.pattern_speed

    def rate(t, w):
        state = torch.from_numpy(w)
        seen = turned(state[:3], -speed * t)  # into the axes of the bar, and back
        return np.concatenate([w[3:], turned(galaxy.potential.acceleration(seen), speed * t).numpy()])

    end = torch.from_numpy(
        solve_ivp(rate, (0, time), start[0].numpy(), method="DOP853", rtol=1e-8, atol=1e-7).y[:, -1]
    )
    expected = torch.cat([turned(end[:3], -speed * time), turned(end[3:], -speed * time)])
    found = integrate_rotating(galaxy.potential, start, torch.tensor([time]), torch.tensor([5e-4]), speed)[0]
    torch.testing.assert_close(found[:3], expected[:3], rtol=0, atol=2e-5)
    torch.testing.assert_close(found[3:], expected[3:], rtol=0, atol=2e-3)


def test_jacobi_energy_is_kept_and_energy_is_not(galaxy):
    start, _ = galaxy.starting_states(galaxy.settings.discs[0], 64, np.random.default_rng(2))
    end = integrate_rotating(
        galaxy.potential, start, torch.full((64,), 0.3), torch.full((64,), 2e-3), galaxy.pattern_speed
    )

    def changes(speed):
        before, after = (jacobi_energy(galaxy.potential, w, speed) for w in (start, end))
        return float((after - before).abs().median()) / 235**2

    assert changes(galaxy.pattern_speed) < 1e-6
    assert changes(0.0) > 1e-3


def test_mixed_orbits_are_steady_as_the_bar_turns(galaxy):
    """Moments in the bar's axes do not drift; those of the starting disc do."""
    disc, n = galaxy.settings.discs[0], 5000
    mixed, account = galaxy.mixed_orbits(disc, n, np.random.default_rng(3))
    assert account["max_error"] <= galaxy.settings.energy_tolerance
    start, _ = galaxy.starting_states(disc, n, np.random.default_rng(3))

    def moments(w):
        c = cylindrical(w)
        twice = 2 * (c[:, 1] - math.radians(galaxy.settings.bar.angle_deg))
        return torch.stack(
            [
                c[:, 0],
                c[:, 0] * torch.cos(twice),
                c[:, 0] * torch.sin(twice),
                c[:, 3] ** 2 / 1e3,
                c[:, 3] * torch.sin(twice) / 30,
                c[:, 2].abs(),
                c[:, 5] ** 2 / 1e3,
            ],
            1,
        )

    def drift(w):
        time = torch.full((n,), 0.03, dtype=torch.float64)
        later = integrate_rotating(
            galaxy.potential, w, time, torch.full_like(time, 5e-3), galaxy.pattern_speed
        )
        change = moments(later) - moments(w)
        return (change.mean(0) / (change.std(0) / math.sqrt(n))).abs()

    assert float(drift(mixed).max()) < 3.5
    assert float(drift(start).max()) > 20


def test_sample_lies_in_the_ball_and_is_reproducible(galaxy):
    table = galaxy.sample(5)
    w = np.stack([table[c].to_numpy() for c in ("x", "y", "z", "vx", "vy", "vz")], -1)
    assert len(w) == 400
    assert (np.linalg.norm(w[:, :3] - np.array(galaxy.frame.sun_position), axis=1) < 4.0).all()
    assert cylindrical(w)[:, 4].mean() > 150  # along rotation
    few = BarredGalaxy(BarredGalaxySettings(num_stars=20))
    assert few.sample(5).equals(few.sample(5))
    assert set(table["population"].to_pylist()) == {"disc_0", "disc_1"}
    assert json.loads(table.schema.metadata[b"galray"])["mock"] == "barred_galaxy"


def test_bad_settings_are_refused():
    disc = BarredGalaxySettings().discs[0]
    with pytest.raises(ValidationError, match="add up"):
        BarredGalaxySettings(discs=(disc,))
    with pytest.raises(ValidationError, match="guiding_radii_kpc"):
        BarredGalaxySettings(guiding_radii_kpc=(9.0, 3.0))


# The exact solution ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def isothermal(galaxy):
    return RotatingIsothermal(galaxy.potential, galaxy.pattern_speed, 45.0, BALL)


def test_isothermal_score_is_the_gradient_of_its_density(isothermal):
    w = isothermal.sample(200, 1).requires_grad_()
    (slope,) = torch.autograd.grad(isothermal.log_prob(w).sum(), w)
    torch.testing.assert_close(isothermal.score(w.detach()), slope, rtol=1e-9, atol=1e-9)


def test_isothermal_solves_the_boltzmann_equation_of_its_frame_alone(isothermal):
    w = isothermal.sample(500, 2)
    s = isothermal.score(w)
    x, v = w[:, :3], w[:, 3:]
    a = isothermal.potential_field.acceleration(x)

    def residual(omega):
        def cross(u):
            return omega * torch.stack([u[:, 1], -u[:, 0], 0 * u[:, 0]], -1)

        return ((v - cross(x)) * s[:, :3]).sum(1) + ((a - cross(v)) * s[:, 3:]).sum(1)

    scale = (v * s[:, :3]).sum(1).square().mean().sqrt()
    assert float(residual(isothermal.pattern_speed).abs().max() / scale) < 1e-12
    torque = x[:, 1] * a[:, 0] - x[:, 0] * a[:, 1]
    expected = torque / isothermal.sigma**2  # of one km/s/kpc too much
    torch.testing.assert_close(
        residual(isothermal.pattern_speed + 1).abs(), expected.abs(), rtol=1e-7, atol=1e-9
    )
    assert float(residual(0.0).square().mean().sqrt() / scale) > 0.05


def test_isothermal_stars_follow_their_density(isothermal):
    w = isothermal.sample(4000, 3)
    assert bool(BALL.contains(w[:, :3]).all())
    # the virial identity in the ball: E[∇·g + g·∂ₓ ln f] = 0 for g = (1 − r²)² e_k
    u = (w[:, :3] - torch.tensor(BALL.center, dtype=torch.float64)) / BALL.radius
    s = isothermal.score(w)[:, :3]
    inside = 1 - u.square().sum(1)
    for k in range(3):
        term = inside.square() * s[:, k] - 4 * inside * u[:, k] / BALL.radius
        assert abs(float(term.mean() / term.std())) * math.sqrt(len(w)) < 4
    model = ExactModel(isothermal)
    drawn = model.sample_velocity(w[:5, :3], 2000, 1)
    torch.testing.assert_close(drawn.mean(0), isothermal.mean_velocity(w[:5, :3]), rtol=0, atol=5.0)
    volume = 4 / 3 * math.pi * BALL.radius**3
    # E[1/p] over stars is the volume where p is the density of positions
    at_rest = torch.cat([w[:, :3], isothermal.mean_velocity(w[:, :3])], 1)
    density = (isothermal.log_prob(at_rest) + 1.5 * math.log(2 * math.pi * isothermal.sigma**2)).exp()
    inverse = 1 / density
    assert float(inverse.mean()) == pytest.approx(
        volume, rel=0.02 + 4 * float(inverse.std() / inverse.mean()) / math.sqrt(len(w))
    )
    with pytest.raises(GalrayError, match="dispersion"):
        RotatingIsothermal(Composite({"one": MiyamotoNagai(1e10, 3, 0.3)}), 30.0, 0.0, BALL)
