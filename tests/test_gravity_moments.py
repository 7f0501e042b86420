"""Weak-form moments: the truth within the errors, additivity, linear responses, and bad input."""

import pickle

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from galray.errors import GalrayError
from galray.gravity import Kernel, Moments, MomentsSettings, Region, smooth, smoothed_density
from galray.gravity.roughness import third_differences
from galray.gravity.splines import TensorBasis, ball_axes
from galray.mocks.spheres import PlummerSphere

SUN = (-8.122, 0.0, 0.0208)
SPHERE = PlummerSphere(2e11, 8.0)
DISC = MomentsSettings(
    num_potential_splines=(7, 9),
    num_test_splines=(8, 14),
    concentration=(0.0, 1.0),
    velocity_window=1e3,  # the sphere has no cold stars
)


@pytest.fixture(scope="module")
def off_centre():
    """Stars of a large Plummer sphere in a ball away from its centre, all turning the same way.

    Reversing v_φ of every star with v_φ < 0 keeps f stationary: f(E) becomes f(E, sign L_z).
    """
    rng = np.random.default_rng(7)
    x = torch.from_numpy(rng.uniform(-3, 3, (600_000, 3)))
    x = x[x.norm(dim=1) < 3.0] + torch.tensor(SUN)
    density = SPHERE.number_density(x)
    x = x[torch.from_numpy(rng.random(len(x))) < density / density.max()]
    w = torch.cat([x, SPHERE.sample_velocity(x, 1, 8)[0]], 1).numpy()
    radius2 = w[:, 0] ** 2 + w[:, 1] ** 2
    turning = (w[:, 1] * w[:, 3] - w[:, 0] * w[:, 4]) / radius2  # v_φ / R
    change = np.where(turning < 0, -2 * turning, 0.0)
    w[:, 3] += change * w[:, 1]
    w[:, 4] -= change * w[:, 0]
    return w


@pytest.fixture(scope="module")
def solved(off_centre):
    moments = Moments(DISC, Region(SUN, 3.0))
    blocks = [moments.sums(off_centre[i::8]) for i in range(8)]
    return moments, blocks, moments.solve(blocks)


def places(n=200, radius=2.0, seed=4):
    x = np.random.default_rng(seed).normal(size=(20 * n, 3)) * radius / 2
    return torch.from_numpy(x[(x**2).sum(1) < radius**2][:n] + np.array(SUN))


def test_accelerations_and_their_errors(off_centre, solved):
    _, _, field = solved
    assert field.statistics["num_stars"] == len(off_centre) > 80_000
    x = places()
    truth = SPHERE.potential_field.acceleration(x)
    value, covariance = field.predict(x)
    torch.testing.assert_close(value, field.acceleration(x))
    assert float(((value - truth).square().sum() / truth.square().sum()).sqrt()) < 0.07
    pull = (value - truth) / covariance.diagonal().sqrt().reshape(-1, 3)
    # the second component is a_y, small and made of a_R alone in this basis
    assert 0.3 < float(pull.square().mean().sqrt()) < 2.0
    # a χ² of the moments as their number less the parameters demands
    expected = field.statistics["num_moments"] - field.effective_dof
    assert abs(field.statistics["chi2"] - expected) < 5 * np.sqrt(2 * expected)


def test_density_and_its_errors(solved):
    _, _, field = solved
    kernel = Kernel((0.5, 0.5, 0.3), 2.0)
    x = torch.tensor([[*SUN[:2], z] for z in (-1.5, -0.7, 0.0, 0.7, 1.5)], dtype=torch.float64)
    truth = smooth(SPHERE.potential_field.mass_density, x, kernel)
    value, covariance = field.predict(x, "smoothed_density", kernel)
    torch.testing.assert_close(value, smoothed_density(field, x, kernel))
    pull = (value - truth) / covariance.diagonal().sqrt()
    assert float(pull.abs().max()) < 3.5
    # the average is known well enough to mean something
    error = float(covariance.mean().sqrt() / truth.mean())
    assert error < 0.6
    assert abs(float((value.mean() - truth.mean()) / truth.mean())) < 3.5 * error


def test_linear_responses_are_the_field(solved):
    _, _, field = solved
    x = places(20)
    theta = torch.from_numpy(field.parameters)
    torch.testing.assert_close(field.linear_response(x, "potential") @ theta, field.potential(x))
    torch.testing.assert_close(field.linear_response(x) @ theta, field.acceleration(x))
    torch.testing.assert_close(field.linear_response(x, "mass_density") @ theta, field.mass_density(x))
    with pytest.raises(GalrayError, match="needs its kernel"):
        field.linear_response(x, "smoothed_density")
    with pytest.raises(GalrayError, match="beyond the ball"):
        field.linear_response(x + 10.0)


def test_jackknife_agrees_with_the_analytic_covariance(off_centre):
    moments = Moments(DISC, Region(SUN, 3.0))
    blocks = [moments.sums(off_centre[i::40]) for i in range(40)]
    field, replicas = moments.jackknife(blocks)
    assert replicas.shape == (40, moments.basis.size)
    analytic = moments.solve(blocks, penalty=field.penalty)
    x = places(40)
    ratio = (
        field.predict(x, errors="statistics")[1].diagonal()
        / analytic.predict(x, errors="statistics")[1].diagonal()
    )
    assert 0.7 < float(ratio.mean().sqrt()) < 1.4
    assert float(field.predict(x)[1].diagonal().min()) > 0


def test_sums_add_and_survive_pickling(off_centre):
    moments = Moments(DISC, Region(SUN, 3.0))
    w = off_centre[:4000]
    pilot = np.zeros(moments.basis.size)
    whole = moments.sums(w, pilot=pilot)
    parts = [pickle.loads(pickle.dumps(moments.sums(w[i::3], pilot=pilot))) for i in range(3)]
    total = sum(parts)
    for name in ("matrix", "vector", "scatter", "counts"):
        np.testing.assert_allclose(
            getattr(total, name), getattr(whole, name), atol=1e-9 * np.abs(getattr(whole, name)).max()
        )
    assert total.num_stars == whole.num_stars == 4000


def test_weights_are_copies(off_centre):
    moments = Moments(DISC, Region(SUN, 3.0))
    w = off_centre[:2000]
    count = np.random.default_rng(1).poisson(1.0, len(w))
    pilot = np.zeros(moments.basis.size)
    weighted = moments.sums(w, count, pilot=pilot)
    copied = moments.sums(np.repeat(w, count, axis=0), pilot=pilot)
    np.testing.assert_allclose(weighted.vector, copied.vector, atol=1e-8 * np.abs(copied.vector).max())
    np.testing.assert_allclose(weighted.matrix, copied.matrix, atol=1e-8 * np.abs(copied.matrix).max())


def test_known_selection_is_undone_by_weights(off_centre):
    """Stars are lost towards the north; 1/ε brings a(x) back, no weight does not."""
    rng = np.random.default_rng(3)
    efficiency = 0.25 + 0.75 / (1 + np.exp(off_centre[:, 2] / 0.4))
    seen = rng.random(len(off_centre)) < efficiency
    x = torch.tensor([[*SUN[:2], z] for z in (-1.0, 0.0, 1.0)], dtype=torch.float64)
    truth = SPHERE.potential_field.acceleration(x)
    moments = Moments(DISC, Region(SUN, 3.0))
    errors = []
    for weights in (1 / efficiency[seen], None):
        field, _ = moments.fit(off_centre[seen], weights, num_blocks=5)
        errors.append(float((field.acceleration(x) - truth).norm() / truth.norm()))
    assert errors[0] < 0.25
    assert errors[1] > 3 * errors[0]


@pytest.mark.parametrize("rule", ["cv", "cv_1se", "cp", "evidence", 3.0])
def test_every_way_to_choose_the_penalty(solved, rule):
    moments, blocks, _ = solved
    field = moments.solve(blocks, penalty=rule)
    x = places(50)
    truth = SPHERE.potential_field.acceleration(x)
    assert float(((field.acceleration(x) - truth).square().sum() / truth.square().sum()).sqrt()) < 0.08
    assert 3 < field.effective_dof < moments.basis.size
    stiff = moments.solve(blocks, penalty=1e6)
    assert stiff.effective_dof < field.effective_dof


def test_one_standard_error_takes_the_smoother_potential(solved):
    moments, blocks, field = solved
    smoother = moments.solve(blocks, penalty="cv_1se")
    ratio = np.array(smoother.penalty) / np.array(field.penalty)
    assert ratio[0] >= 1
    np.testing.assert_allclose(ratio, ratio[0])
    assert smoother.statistics["effective_dof"] <= field.statistics["effective_dof"]
    x = places()
    truth = SPHERE.potential_field.acceleration(x)
    assert float((smoother.acceleration(x) - truth).norm() / truth.norm()) < 0.07


def test_north_south_symmetry_is_imposed(off_centre):
    moments = Moments(DISC.model_copy(update={"north_south": True}), Region(SUN, 3.0))
    field = moments.solve([moments.sums(off_centre[:20_000])], penalty=1.0)
    x = places(10)
    mirror = x * torch.tensor([1.0, 1.0, -1.0])
    torch.testing.assert_close(field.acceleration(x)[:, 2], -field.acceleration(mirror)[:, 2])


@pytest.mark.parametrize(
    ("basis", "bar"),
    [("Rz", 0.08), ("xyz", 0.14)],
)
def test_a_sphere_around_its_own_centre(basis, bar):
    """The ball holds the axis R = 0; no basis knows the sphere."""
    sphere = PlummerSphere(1e9, 1.0)
    w = sphere.sample(60_000, 2)
    size = (9, 12) if basis == "Rz" else (9, 9, 9)
    tests = (10, 15) if basis == "Rz" else (8, 8, 8)
    settings = MomentsSettings(
        basis=basis,
        num_potential_splines=size,
        num_test_splines=tests,
        concentration=(2.0,) * len(size),
        penalty="evidence",
        min_stars=100,
    )
    moments = Moments(settings, Region((0.0, 0.0, 0.0), 4.0))
    sums = moments.sums(w)
    assert sums.num_stars + sums.num_outside == 60_000
    field = moments.solve([sums])
    x = sphere.sample(4000, 9)[:, :3]
    x = x[(x.norm(dim=1) > 0.5) & (x.norm(dim=1) < 3.0)]
    truth = sphere.potential_field.acceleration(x)
    error = (field.acceleration(x) - truth).norm(dim=1) / truth.norm(dim=1)
    assert float(error.square().mean().sqrt()) < bar


@pytest.mark.parametrize("kind", ["Rz", "xyz"])
def test_spline_derivatives(kind):
    sizes = (6, 9) if kind == "Rz" else (5, 6, 7)
    basis = TensorBasis(kind, ball_axes(kind, SUN, 3.0, sizes, (1.5,) * len(sizes)))
    x = places(30).numpy()
    theta = np.random.default_rng(0).normal(size=basis.size)

    def value(points):
        index, local = basis.values(points)
        return (local * theta[index]).sum(1)

    index, local = basis.values(x)
    np.testing.assert_allclose(local.sum(1), 1.0)
    index, gradient = basis.gradient(x)
    step = 1e-5 * np.eye(3)
    for j in range(3):
        numeric = (value(x + step[j]) - value(x - step[j])) / 2e-5
        np.testing.assert_allclose((gradient[:, j] * theta[index]).sum(1), numeric, atol=1e-8)
    index, laplacian = basis.laplacian(x)
    step = 1e-3 * np.eye(3)
    numeric = sum((value(x + step[j]) + value(x - step[j]) - 2 * value(x)) / 1e-6 for j in range(3))
    np.testing.assert_allclose((laplacian * theta[index]).sum(1), numeric, atol=1e-2)
    # quadratics of each coordinate are free of penalty
    for matrix in third_differences(basis):
        assert np.linalg.eigvalsh(matrix).min() > -1e-9 * np.abs(matrix).max()
        np.testing.assert_allclose(matrix @ np.ones(basis.size), 0, atol=1e-8 * np.abs(matrix).max())


def test_bad_input(off_centre):
    moments = Moments(DISC, Region(SUN, 3.0))
    w = off_centre[:3000]
    with pytest.raises(GalrayError, match="none of 3000 stars"):
        moments.sums(w + 100.0)
    broken = w.copy()
    broken[5, 4] = np.nan
    with pytest.raises(GalrayError, match="star 5 has"):
        moments.sums(broken)
    with pytest.raises(GalrayError, match="one weight per star"):
        moments.sums(w, np.ones(7))
    with pytest.raises(GalrayError, match=r"shape \(n, 6\)"):
        moments.sums(w[:, :5])
    sums = moments.sums(w)
    with pytest.raises(GalrayError, match="3 blocks"):
        moments.solve([sums], penalty="cv")
    with pytest.raises(GalrayError, match="at least 3 blocks"):
        moments.jackknife([sums])
    with pytest.raises(GalrayError, match="at least one block"):
        moments.solve([])
    other = Moments(DISC, Region(SUN, 2.5)).sums(w)
    with pytest.raises(GalrayError, match="cannot be added"):
        sums + other
    with pytest.raises(GalrayError, match="another ball"):
        moments.solve([other])
    with pytest.raises(GalrayError, match="more stars"):
        moments.solve([moments.sums(w[:40])], penalty=1.0)


@pytest.mark.parametrize(
    "values",
    [
        {"num_potential_splines": (8, 8, 8)},
        {"basis": "xyz", "num_test_splines": (8, 3, 8)},
        {"velocity_functions": ("v_x",)},
        {"basis": "xyz", "velocity_functions": ("v_R",)},
        {"concentration": (1.0,)},
        {"penalty": -1.0},
        {"penalty": "guess"},
        {"splines": 4},
    ],
)
def test_settings_that_make_no_sense(values):
    with pytest.raises(ValidationError):
        MomentsSettings(**values)
