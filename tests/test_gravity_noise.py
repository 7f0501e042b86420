"""Moments freed from the stars' errors: the algebra against finite differences, and noisy stars."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galray.errors import GalrayError
from galray.gravity import Moments, MomentsSettings, Region, StarErrors, noise_corrected
from galray.gravity.jets import Jet, StarJets
from galray.mocks.spheres import PlummerSphere
from galray.phasespace.noise import displace

SUN = (-8.122, 0.0, 0.0208)
OBSERVER = (*SUN, 12.9, 245.6, 7.78)
BALL = Region(SUN, 3.0)
FUNCTIONS = {
    "Rz": ("1", "v_R", "v_phi", "v_z", "v_z v_z", "v_R v_z", "v_R v_R"),
    "xyz": ("1", "v_x", "v_y", "v_z", "v_z v_z"),
}
SPLINES = {"Rz": ((5, 6), (6, 7)), "xyz": ((5, 5, 5), (5, 5, 6))}


def stars_with_errors(n: int = 150, part: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Stars near the Sun and factors of their errors: a part of the distance, and 2 km/s in velocity."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, 3)) * [0.9, 0.9, 0.4] + SUN
    w = np.concatenate([x, rng.normal(size=(n, 3)) * 40 + [0, 220, 0]], 1)
    offset, velocity = w[:, :3] - SUN, w[:, 3:] - OBSERVER[3:]
    sight = offset / np.linalg.norm(offset, axis=1, keepdims=True)
    across = velocity - (velocity * sight).sum(1, keepdims=True) * sight
    factor = np.zeros((n, 6, 6))
    factor[:, :3, 0], factor[:, 3:, 0] = part * offset, part * across
    factor[:, range(3, 6), range(3, 6)] += 2.0
    return w, factor


def by_differences(function, w, factor, observer, step=1e-3):
    """F − D[F] with D from second differences along the paths of errors; any F of states."""
    middle, states = function(w), torch.from_numpy(w)
    total = np.array(middle)
    for j in range(6):
        e = torch.from_numpy(step * factor[:, :, j])
        ends = sum(function(displace(states, s * e, observer)[0].numpy()) for s in (1.0, -1.0))
        total = total - 0.5 * (ends - 2 * middle) / step**2
    return total


@pytest.mark.parametrize("observer", [None, OBSERVER])
def test_jets_follow_itos_lemma(observer):
    def function(s):
        radius = np.hypot(s[:, 0], s[:, 1])
        turning = (s[:, 1] * s[:, 3] - s[:, 0] * s[:, 4]) / radius
        bump = np.exp(-0.5 * ((s[:, 2] - 0.1) / 0.3) ** 2)
        return (1.0 - bump) * turning**2 / 100.0 + np.sqrt(radius) - 2.0 / np.maximum(radius, 1.0)

    w, factor = stars_with_errors()
    errors = StarErrors(factor @ factor.transpose(0, 2, 1), observer)
    expected = by_differences(function, w, factor, observer)
    found = noise_corrected(function, w, errors)
    assert np.abs(expected - function(w)).max() > 1.0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_plain_arrays_have_no_noise():
    w, factor = stars_with_errors(5)
    stars, plain = StarJets(w, factor), np.arange(1.0, 6.0)
    x = stars[:, 0]
    for jet, value in (
        (plain * x, plain * w[:, 0]),
        (plain - x, plain - w[:, 0]),
        (plain / x, plain / w[:, 0]),
        (-x + 1, 1 - w[:, 0]),
        (np.clip(x, -8.0, -7.0), np.clip(w[:, 0], -8.0, -7.0)),
    ):
        assert isinstance(jet, Jet)
        np.testing.assert_allclose(jet.value, value)
    with pytest.raises(TypeError):
        np.arctan(x)  # an operation that is not known must not lose the noise silently


@pytest.mark.parametrize("basis", ["Rz", "xyz"])
@pytest.mark.parametrize("observer", [None, OBSERVER])
def test_freed_sums_are_sums_less_their_second_differences(basis, observer):
    potential, tests = SPLINES[basis]
    common = {
        "basis": basis,
        "num_potential_splines": potential,
        "num_test_splines": tests,
        "velocity_functions": FUNCTIONS[basis],
    }
    plain = Moments(MomentsSettings(**common), BALL)
    freed = Moments(MomentsSettings(**common, noise="deconvolve"), BALL)
    w, factor = stars_with_errors()
    # Third derivatives of cubic splines jump at breaks: keep stars whose steps stay within their cells.
    cells = lambda s: np.stack([b.locate(b.coordinates(s[:, :3])) for b in (plain.basis, plain.tests)])  # noqa: E731
    states = torch.from_numpy(w)
    steady = ((w[:, :3] - SUN) ** 2).sum(1) < 8.0
    for j in range(6):
        for s in (1e-3, -1e-3):
            moved = displace(states, s * torch.from_numpy(factor[:, :, j]), observer)[0].numpy()
            steady &= (cells(moved) == cells(w)).all(0)
    w, factor = w[steady], factor[steady]
    assert len(w) > 100
    pilot = np.random.default_rng(3).normal(size=plain.basis.size) * 100.0

    def sums(states):
        found = plain.sums(states, pilot=pilot)
        return np.concatenate([found.matrix.ravel(), found.vector])

    errors = StarErrors(factor @ factor.transpose(0, 2, 1), observer)
    found = freed.sums(w, pilot=pilot, errors=errors)
    flat = np.concatenate([found.matrix.ravel(), found.vector])
    expected, ignored = by_differences(sums, w, factor, observer), sums(w)
    size = np.abs(expected - ignored).max()
    assert size > 1e-3 * np.abs(ignored).max()
    np.testing.assert_allclose(flat, expected, atol=1e-4 * size, rtol=1e-4)
    # The scatter is that of the freed moments themselves: one star's is an outer product.
    one = freed.sums(w[:1], pilot=pilot, errors=errors[:1])
    residual = one.vector - one.matrix @ pilot
    np.testing.assert_allclose(one.scatter, np.outer(residual, residual), rtol=1e-6, atol=1e-6)


def test_gravity_of_noisy_stars():
    """A Plummer sphere whose velocities are measured to a third of their dispersion: gravity of the truth."""
    sphere = PlummerSphere(2e11, 8.0)
    ball = Region((-8.0, 0.0, 0.0), 6.0)
    w = sphere.sample(60_000, 3)
    w = w[ball.contains(w[:, :3])]
    factor = torch.diag(torch.tensor([0.2, 0.2, 0.2, 50.0, 50.0, 50.0], dtype=torch.float64))
    noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    measured = w + noise @ factor
    common = {"num_potential_splines": (5, 5), "num_test_splines": (6, 7), "penalty": 1.0}
    common |= {"concentration": (0.0, 0.0), "velocity_window": 1e3}
    plain, freed = (Moments(MomentsSettings(**common, noise=how), ball) for how in ("ignore", "deconvolve"))
    errors = StarErrors((factor @ factor.T).expand(len(w), 6, 6).numpy())
    fields = {
        "free": plain.fit(w, num_blocks=2)[0],
        "ignore": plain.fit(measured, num_blocks=2)[0],
        "deconvolve": freed.fit(measured, num_blocks=2, errors=errors)[0],
    }
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = 2.0 * x / x.norm(dim=1, keepdim=True) + torch.tensor(ball.center)
    truth = sphere.potential_field.acceleration(x)
    pull = {k: float((f.acceleration(x) * truth).sum() / truth.square().sum()) for k, f in fields.items()}
    assert abs(pull["free"] - 1) < 0.1
    assert pull["ignore"] - pull["free"] > 0.05
    assert abs(pull["deconvolve"] - pull["free"]) < 0.2 * (pull["ignore"] - pull["free"])


def test_errors_must_come_with_the_stars():
    w, factor = stars_with_errors()
    freed = Moments(MomentsSettings(noise="deconvolve"), BALL)
    with pytest.raises(GalrayError, match="needs the error covariances"):
        freed.sums(w)
    covariance = factor @ factor.transpose(0, 2, 1)
    with pytest.raises(GalrayError, match="needs the error covariances"):
        freed.sums(w, errors=StarErrors(covariance[:-1]))
    covariance[3, 2, 2] = -1.0
    with pytest.raises(GalrayError, match="positive semidefinite"):
        freed.sums(w, errors=StarErrors(covariance))
    plain = Moments(MomentsSettings(), BALL).sums(w)
    with pytest.raises(GalrayError, match="cannot be added"):
        plain + freed.sums(w, errors=StarErrors(factor @ factor.transpose(0, 2, 1)))
