"""Moments with more unknowns, on stars whose f is Gaussian and whose potential the splines hold exactly.

f = exp(−E_J/σ²) in Φ = ½ Σ k_i x_i² turning with Ω about z: Gaussian in x and in v − Ω×x. A selection
ε = exp(b·x) only moves its middle.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from galray.errors import GalrayError
from galray.gravity import Moments, MomentsSettings, Region
from galray.gravity.moment_sums import add_up, fold
from galray.gravity.splines import SumBasis
from galray.gravity.velocity_functions import terms, up_to_order

BALL = Region((-2.0, 0.5, 0.2), 2.5)
ROUND = (1600.0, 1600.0, 2500.0)
BARRED = (1600.0, 2600.0, 2500.0)
SMALL = {
    "Rz": {"num_potential_splines": (5, 5), "num_test_splines": (6, 7)},
    "xyz": {"num_potential_splines": (5, 5, 5), "num_test_splines": (5, 5, 5)},
    "Rz+xyz": {
        "num_potential_splines": (5, 5),
        "num_test_splines": (6, 7),
        "num_departure_splines": (4, 4, 4),
        "num_departure_tests": (5, 5, 5),
    },
}


def gaussian(n, seed, *, k=ROUND, sigma=60.0, omega=0.0, tilt=(0.0, 0.0, 0.0)):
    """Stars of the Gaussian f as seen through ε = exp(tilt·x)."""
    rng = np.random.default_rng(seed)
    variance = sigma**2 / (np.array(k) - np.array([omega**2, omega**2, 0.0]))
    x = rng.normal(size=(n, 3)) * np.sqrt(variance) + variance * np.array(tilt)
    v = rng.normal(size=(n, 3)) * sigma + omega * np.stack([x[:, 1], -x[:, 0], 0 * x[:, 0]], 1)
    return np.concatenate([x, v], 1)


def coefficients(basis, function):
    """Coefficients of a function that the basis holds exactly (all of it in the first part of a sum)."""
    if isinstance(basis, SumBasis):
        first = coefficients(basis.parts[0], function)
        return np.concatenate([first, np.zeros(basis.size - len(first))])
    axes = [np.linspace(a.breaks[0], a.breaks[-1], 4 * a.size) for a in basis.axes]
    t = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    x = t if basis.kind == "xyz" else np.stack([t[:, 0], 0 * t[:, 0], t[:, 1]], 1)
    index, local = basis.values(x)
    design = np.zeros((len(x), basis.size))
    np.put_along_axis(design, index, local, 1)
    found = np.linalg.lstsq(design, function(x), rcond=None)[0]
    np.testing.assert_allclose(design @ found, function(x), atol=1e-6 * np.abs(function(x)).max())
    return found


def places(n=60, seed=1):
    x = np.random.default_rng(seed).normal(size=(20 * n, 3))
    return torch.from_numpy(x[(x**2).sum(1) < 2.0][:n] + np.array(BALL.center))


def truth(x, k):
    return -x * torch.tensor(k, dtype=torch.float64)


@pytest.mark.parametrize(
    ("basis", "k", "omega", "order"),
    [
        ("Rz", ROUND, 0.0, 3),
        ("xyz", BARRED, 0.0, 2),
        ("xyz", BARRED, -20.0, 1),
        ("Rz+xyz", ROUND, 0.0, 1),
    ],
)
def test_the_truth_solves_the_equations(basis, k, omega, order):
    """χ² of all moments at the true Φ, log ε and Ω is that of their noise: every term has its right sign."""
    tilt = (0.0, 0.0, 0.4) if basis != "xyz" else (0.3, -0.2, 0.4)
    family = "xyz" if basis == "xyz" else "Rz"
    settings = MomentsSettings(
        basis=basis,
        **SMALL[basis],
        concentration=(0.0,) * (3 if family == "xyz" else 2),
        velocity_functions=up_to_order(family, order) if basis != "Rz+xyz" else ("v_R", "v_z"),
        selection="shared",
        num_selection_splines=(4,) * (3 if family == "xyz" else 2),
        pattern_speed=omega,
        min_stars=200,
    )
    w = gaussian(30_000, 5, k=k, omega=omega, tilt=tilt)
    moments = Moments(settings, BALL)
    theta = coefficients(moments.basis, lambda x: 0.5 * (x**2 @ np.array(k)))
    log_selection = coefficients(moments.selection_basis, lambda x: x @ np.array(tilt))
    sums = moments.sums(w, pilot=np.concatenate([theta, log_selection]))
    usable = sums.counts >= settings.min_stars
    noise = np.sqrt(np.diag(sums.scatter))[usable]

    def spread(phi, log_efficiency, speed):
        residual = sums.vector - speed * sums.spin - sums.matrix @ np.concatenate([phi, log_efficiency])
        return float(np.sqrt(np.mean((residual[usable] / noise) ** 2)))

    value = spread(theta, log_selection, omega)
    assert 0.85 < value < 1.15
    assert spread(theta, 0 * log_selection, omega) > 1.4 * value
    assert spread(1.5 * theta, log_selection, omega) > 1.2 * value
    if omega:
        assert spread(theta, log_selection, -omega) > 1.2 * value
    # a selection that is known does the same without a column of its own
    known = Moments(settings.model_copy(update={"selection": "known"}), BALL)
    given = known.sums(w, pilot=theta, selection=lambda x: np.broadcast_to(tilt, x.shape))
    residual = given.vector - omega * given.spin - given.matrix @ theta
    np.testing.assert_allclose(
        residual,
        sums.vector - omega * sums.spin - sums.matrix @ np.concatenate([theta, log_selection]),
        atol=1e-5 * noise.max(),
    )
    np.testing.assert_allclose(given.scatter, sums.scatter, atol=1e-5 * np.abs(sums.scatter).max())


@pytest.mark.parametrize("family", ["Rz", "xyz"])
def test_derivatives_of_the_velocity_functions(family):
    w = gaussian(50, 2)
    names = up_to_order(family, 3) + (("v_phi",) if family == "Rz" else ())
    window = 60.0
    found = terms(family, names, w, window)
    plain = terms(family, names, w, 1e9)
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(one.value, other.value * np.exp(-((w[:, 5] / window) ** 2) / 2))
    step = 1e-6
    turned = w + step * np.stack([w[:, 1], -w[:, 0], 0 * w[:, 0], w[:, 4], -w[:, 3], 0 * w[:, 0]], 1)
    flown = w.copy()
    flown[:, :3] += step * w[:, 3:]
    acceleration = np.array([3.0, -5.0, 7.0])
    pushed = w.copy()
    pushed[:, 3:] += step * acceleration
    x, y = w[:, 0], w[:, 1]
    radius = np.hypot(x, y)
    along = [acceleration[i] + 0 * x for i in range(3)]
    if family == "Rz":
        along = [(x * along[0] + y * along[1]) / radius, along[2], y * along[0] - x * along[1]]
    for name, term in zip(names, found, strict=True):
        scale = np.abs(term.value).max() + 1.0
        for states, expected in (
            (flown, term.free),
            (turned, term.spin),
            (pushed, sum((pull * along[j] for j, pull in term.pulls.items()), 0 * x)),
        ):
            change = (terms(family, (name,), states, window)[0].value - term.value) / step
            want = 0 * x if expected is None else expected
            np.testing.assert_allclose(change, want, atol=3e-4 * max(scale, np.abs(want).max()), err_msg=name)


def test_hot_stars_among_cold_ones_cost_little():
    """The window in v_z keeps the hot stars' noise away, and nothing is biased by it."""
    w = np.concatenate([gaussian(12_000, 5, sigma=40.0), gaussian(12_000, 6, sigma=160.0)])
    w = w[np.random.default_rng(0).permutation(len(w))]
    x = places()
    wrong, expected = [], []
    for window in (1e6, 60.0):
        settings = MomentsSettings(
            **SMALL["Rz"], concentration=(0.0, 0.0), min_stars=50, penalty=1e-3, velocity_window=window
        )
        value, covariance = Moments(settings, BALL).fit(w)[0].predict(x)
        residual = (value - truth(x, ROUND))[:, 2]
        error = covariance.diagonal().reshape(-1, 3)[:, 2].sqrt()
        wrong.append(float(residual.square().mean().sqrt()))
        expected.append(float(error.square().mean().sqrt()))
        assert float((residual / error).square().mean().sqrt()) < 2.0
    assert wrong[1] < 0.7 * wrong[0]
    assert expected[1] < 0.7 * expected[0]


def test_two_populations_share_one_potential():
    moments = Moments(MomentsSettings(**SMALL["Rz"], concentration=(0.0, 0.0), min_stars=50), BALL)
    blocks = {
        name: [moments.sums(gaussian(3000, 10 + i + seed, sigma=sigma)) for i in range(6)]
        for name, sigma, seed in (("cool", 40.0, 0), ("warm", 70.0, 100))
    }
    x = places()
    fields = {name: moments.solve({name: parts}, penalty=1e-4) for name, parts in blocks.items()}
    both = moments.solve(blocks, penalty=1e-4)
    errors = {name: float(field.predict(x)[1].diagonal().mean()) for name, field in fields.items()}
    together = float(both.predict(x)[1].diagonal().mean())
    assert together < 0.95 * min(errors.values())
    assert both.statistics["num_stars"] == sum(f.statistics["num_stars"] for f in fields.values())
    value, covariance = both.predict(x)
    pull = (value - truth(x, ROUND))[:, [0, 2]] / covariance.diagonal().sqrt().reshape(-1, 3)[:, [0, 2]]
    assert float(pull.square().mean().sqrt()) < 2.0
    field, replicas = moments.jackknife(blocks)
    assert replicas.shape == (6, moments.basis.size)
    assert float(field.predict(x)[1].diagonal().min()) > 0
    with pytest.raises(GalrayError, match="stars of few give"):
        moments.solve({**blocks, "few": [moments.sums(gaussian(9, i)) for i in range(3)]})


def selection_settings(**changes):
    return MomentsSettings(
        **SMALL["Rz"],
        concentration=(0.0, 0.0),
        num_selection_splines=(4, 5),
        min_stars=50,
        penalty="evidence",
        **changes,
    )


def test_selection_and_potential_together():
    """Two populations of different dispersion seen through one ε: both a and ε come out."""
    moments = Moments(selection_settings(selection="shared", velocity_functions=("v_R", "v_z")), BALL)
    tilt = (0.0, 0.0, 0.5)
    blocks = {
        name: [moments.sums(gaussian(60_000, seed, sigma=sigma, tilt=tilt))]
        for name, sigma, seed in (("cool", 35.0, 1), ("warm", 70.0, 2))
    }
    result = moments.result(blocks)
    assert set(result.selections) == {"shared"}
    x = places()
    value, covariance = result.potential.predict(x)
    pull = ((value - truth(x, ROUND)) / covariance.diagonal().sqrt().reshape(-1, 3))[:, [0, 2]]
    assert float(pull.square().mean().sqrt()) < 2.5
    error = (value - truth(x, ROUND)).square().sum().sqrt() / truth(x, ROUND).square().sum().sqrt()
    assert float(error) < 0.1
    log_selection, errors = result.selections["shared"].predict(x)
    expected = 0.5 * (x[:, 2] - BALL.center[2])
    assert float((log_selection - expected).square().mean().sqrt()) < 0.15
    assert float(((log_selection - expected) / errors.diagonal().sqrt()).square().mean().sqrt()) < 2.5
    gradient = result.selections["shared"].gradient(x)
    assert abs(gradient[:, 2].mean() - 0.5) < 0.15
    # to know nothing of ε biases a by σ²∇log ε
    naive = Moments(selection_settings(), BALL)
    wrong = naive.solve({"warm": [naive.sums(gaussian(60_000, 2, sigma=70.0, tilt=tilt))]})
    shift = (wrong.acceleration(x) - truth(x, ROUND))[:, 2].mean()
    assert 0.7 < float(shift / (70.0**2 * 0.5)) < 1.3
    # the same sums corrected by the selection just found
    again = naive.sums(
        gaussian(60_000, 2, sigma=70.0, tilt=tilt), selection=result.selections["shared"].gradient
    )
    mended = (naive.solve([again]).acceleration(x) - truth(x, ROUND))[:, 2].mean()
    assert abs(float(mended)) < 0.35 * abs(float(shift))


def test_degeneracy_of_an_isothermal_population_is_told():
    """One dispersion: Φ + σ² log ε is all that first moments see, and the result says so."""
    moments = Moments(selection_settings(selection="shared", velocity_functions=("v_R", "v_z")), BALL)
    result = moments.result([moments.sums(gaussian(60_000, 3, sigma=60.0))])
    assert result.degeneracies
    worst = result.degeneracies[0]
    assert worst.correlation > 0.99
    assert worst.acceleration_error > 0.1
    assert 50 < worst.dispersion < 70
    assert any("correlated" in line for line in result.notes())
    cool = moments.sums(gaussian(60_000, 4, sigma=30.0))
    warm = moments.sums(gaussian(60_000, 3, sigma=60.0))
    apart = moments.result({"cool": [cool], "warm": [warm]})
    rest = max((d.acceleration_error for d in apart.degeneracies), default=0.0)
    assert rest < 0.5 * worst.acceleration_error
    # with a selection of its own for each population, they are as degenerate as before
    each = Moments(selection_settings(selection="each", velocity_functions=("v_R", "v_z")), BALL)
    alone = each.result({"cool": [each.sums(gaussian(30_000, 4, sigma=30.0))]})
    assert set(alone.selections) == {"cool"}
    assert alone.degeneracies[0].correlation > 0.95


def turning(basis="xyz", **changes):
    return MomentsSettings(
        basis=basis,
        **SMALL[basis],
        concentration=(0.0,) * (3 if basis == "xyz" else 2),
        pattern_speed="fit",
        penalty=1e-3,
        min_stars=100,
        **changes,
    )


def test_pattern_speed_of_a_bar():
    moments = Moments(turning(), BALL)
    w = gaussian(60_000, 8, k=BARRED, omega=-25.0)
    result = moments.result([moments.sums(w[i::10]) for i in range(10)])
    speed = result.pattern_speed
    assert speed.known
    assert speed.significance > 4
    assert abs(speed.value + 25.0) < 3 * speed.error < 18.0
    assert "pattern speed" in str(speed)
    x = places()
    error = (result.potential.acceleration(x) - truth(x, BARRED)).norm() / truth(x, BARRED).norm()
    assert float(error) < 0.3


def test_no_pattern_speed_without_a_bar():
    """A round galaxy that turns: no seed claims to know its Ω, and a(x) is right all the same."""
    x = places()
    for seed in range(4):
        moments = Moments(turning(), BALL)
        w = gaussian(15_000, 20 + seed, k=ROUND, omega=-25.0)
        result = moments.result([moments.sums(w[i::8]) for i in range(8)])
        assert not result.pattern_speed.known
        assert "cannot be known" in str(result.pattern_speed)
        assert np.isnan(result.pattern_speed.value)
        error = (result.potential.acceleration(x) - truth(x, ROUND)).norm() / truth(x, ROUND).norm()
        assert float(error) < 0.5
    with pytest.raises(GalrayError, match="3 blocks"):
        moments.result([moments.sums(w)])


@pytest.mark.parametrize("jackknife", ["shards", "sky"])
def test_coverage_of_both_covariances(jackknife):
    """Pulls of a(x) over independent mocks have the scatter 1, by the formula and by the jackknife."""
    settings = MomentsSettings(
        **SMALL["Rz"],
        concentration=(0.0, 0.0),
        min_stars=50,
        penalty=1e-2,
        jackknife=jackknife,
        num_patches=16,
    )
    x = places(25)
    pulls: dict[str, list] = {"formula": [], "jackknife": []}
    for seed in range(16):
        moments = Moments(settings, BALL)
        w = gaussian(6000, 300 + seed)
        if jackknife == "sky":
            blocks = fold([b for i in range(2) for b in moments.patch_sums(w[i::2])], 16)
        else:
            blocks = [moments.sums(w[i::20]) for i in range(20)]
        result = moments.result(blocks)
        field, _ = moments.jackknife(blocks, result)
        for name, one in (("formula", result.potential), ("jackknife", field)):
            value, covariance = one.predict(x, errors="statistics")
            error = covariance.diagonal().sqrt().reshape(-1, 3)
            pulls[name].append(((value - truth(x, ROUND)) / error)[:, [0, 2]])
    for name, values in pulls.items():
        spread = float(torch.stack(values).square().mean().sqrt())
        assert 0.7 < spread < 1.4, name


def test_patches_of_sky_add_up_to_the_ball():
    settings = MomentsSettings(**SMALL["Rz"], concentration=(0.0, 0.0), min_stars=30, num_patches=9)
    moments = Moments(settings, BALL)
    w = gaussian(4000, 1)
    whole, parts = moments.sums(w), moments.patch_sums(w)
    assert len(parts) == 9
    total = add_up(parts)
    for name in ("matrix", "vector", "spin"):
        expected = getattr(whole, name)
        np.testing.assert_allclose(getattr(total, name), expected, atol=1e-9 * np.abs(expected).max() + 1e-12)
    assert total.num_stars == whole.num_stars
    assert total.num_outside == whole.num_outside
    # each patch obeys the equation on its own: no flux through its edge
    theta = coefficients(moments.basis, lambda x: 0.5 * (x**2 @ np.array(ROUND)))
    big = moments.patch_sums(gaussian(60_000, 4))
    power = np.sqrt(np.diag(big[0].scatter))
    usable = add_up(big).counts > 300
    residual = np.array([(p.vector - p.matrix @ theta)[usable] / power[usable] for p in big])
    assert stats.norm.sf(np.abs(residual).max()) * residual.size > 1e-4


def test_positive_mass_everywhere():
    few = gaussian(1500, 3)
    settings = MomentsSettings(**SMALL["Rz"], concentration=(0.0, 0.0), min_stars=10, penalty=1e-6)
    x = places(400)
    free = Moments(settings, BALL)
    plain = free.solve([free.sums(few)])
    assert float(plain.mass_density(x).min()) < 0
    bound = Moments(settings.model_copy(update={"positive_mass": True}), BALL)
    blocks = [bound.sums(few[i::5]) for i in range(5)]
    field, replicas = bound.jackknife(blocks)
    assert float(field.mass_density(x).min()) > -0.05 * float(plain.mass_density(x).abs().max())
    assert field.statistics["bound_nodes"] > 0
    assert all(
        float(field.with_parameters(r).mass_density(x).min())
        > -0.05 * float(plain.mass_density(x).abs().max())
        for r in replicas
    )
    before = (plain.acceleration(x) - truth(x, ROUND)).norm()
    assert float((field.acceleration(x) - truth(x, ROUND)).norm()) < float(before)


def test_shrinking_towards_axial_symmetry():
    """Rz+xyz is as good as Rz on round stars, and finds what Rz cannot on stars that are not."""
    x = places()

    def error(basis, k, penalty):
        settings = MomentsSettings(
            basis=basis, **SMALL[basis], concentration=(0.0,) * (3 if basis == "xyz" else 2), penalty=penalty
        )
        moments = Moments(settings, BALL)
        field = moments.solve([moments.sums(gaussian(8000, 10 + i, k=k)) for i in range(5)])
        return float((field.acceleration(x) - truth(x, k)).norm() / truth(x, k).norm()), field

    shrunk, field = error("Rz+xyz", ROUND, "cv")
    symmetric, _ = error("Rz", ROUND, "cv")
    assert shrunk < 2 * symmetric
    assert len(field.penalty) == 4
    found, _ = error("Rz+xyz", BARRED, "cv")
    blind, _ = error("Rz", BARRED, "cv")
    assert found < 0.7 * blind


def test_memory_and_folding():
    """However many shards there are, at most so many blocks are kept, and one scatter."""
    moments = Moments(MomentsSettings(**SMALL["Rz"], concentration=(0.0, 0.0)), BALL)
    parts = [moments.sums(gaussian(500, i)) for i in range(7)]
    blocks = fold(iter(parts), 3)
    assert len(blocks) == 3
    assert [b.scatter is None for b in blocks] == [False, True, True]
    whole, folded = add_up(parts), add_up(blocks)
    np.testing.assert_allclose(folded.scatter, whole.scatter)
    np.testing.assert_allclose(folded.matrix, whole.matrix)
    assert folded.num_stars == whole.num_stars
    with pytest.raises(GalrayError, match="holds the scatter"):
        moments.solve([moments.sums(gaussian(500, i), scatter=False) for i in range(3)])
