"""The budget's bands hold the truth as often as they say, and no term holds another's variance."""

from __future__ import annotations

import numpy as np
import pytest

from galray.ensemble import (
    BudgetSettings,
    EnsembleSettings,
    FamilyDesign,
    combine_family,
    combine_methods,
    design,
    jackknife_covariance,
    student_factor,
)
from galray.ensemble.variance import correlation, effective_number, moderate, welch_satterthwaite
from galray.errors import GalrayError

NONE = FamilyDesign(seeds=0)
Q, HALF = 12, 6
GROUPS = ["a_z"] * HALF + ["rho"] * HALF


def _specs(family="score", **counts):
    families = {"flow": NONE, "score": NONE, "moments": NONE} | {family: FamilyDesign(**counts)}
    return design(EnsembleSettings(**families), 0)


class Galaxy:
    """Simulated families whose truth is zero, with terms of known size and correlated quantities."""

    def __init__(self, rng, length=2.5):
        z = np.arange(HALF)
        block = np.exp(-0.5 * ((z[:, None] - z) / length) ** 2) + 1e-9 * np.eye(HALF)
        self.root = np.kron(np.eye(2), np.linalg.cholesky(block))
        self.size = np.tile(np.linspace(0.5, 1.5, HALF), 2) * np.repeat([1.0, 30.0], HALF)
        self.rng = rng

    def draw(self, sigma=1.0):
        return sigma * self.size * (self.root @ self.rng.normal(size=Q))

    def family(self, specs, offset, network, statistics, measurement, leak=0.0, bias=0.0):
        nets, values = {}, []
        for spec in specs:
            if spec.seed not in nets:
                nets[spec.seed] = self.draw(network)
            value = offset + bias * self.size + nets[spec.seed]
            if spec.bootstrap:
                value = value + self.draw(statistics)
            if spec.draw:
                value = value + self.draw(measurement) + bias * self.size
            if spec.bootstrap or spec.draw:
                value = value + self.draw(leak * network * np.sqrt(2))
            values.append(value)
        return np.array(values)


def _trial(
    galaxy, *, counts, network=1.0, statistics=1.0, measurement=0.5, method=0.0, rho=0.9, leak=0.0, **more
):
    """One measured galaxy: flow, score and moments from the same stars."""
    settings = more.get("settings", BudgetSettings())
    common, estimates = galaxy.draw(statistics), []
    for family in ("flow", "score", "moments"):
        own = np.sqrt(rho) * common + np.sqrt(1 - rho) * galaxy.draw(statistics) + galaxy.draw(method)
        if family == "moments":
            specs = _specs(family, seeds=1, draws=2)
            values = galaxy.family(specs, own, 0.0, 0.0, measurement)
            rows = np.array([galaxy.draw(statistics) for _ in range(29)])
            extra = {"jackknife": rows.T @ rows / 29, "jackknife_blocks": 30}
        else:
            specs, extra = _specs(family, **counts), {}
            values = galaxy.family(specs, own, network, statistics, measurement, leak)
        estimates.append(combine_family(specs, values, groups=GROUPS, settings=settings, **extra))
    return estimates, combine_methods(estimates, groups=GROUPS, settings=settings)


SCENES = {
    "few members": {"counts": {"seeds": 2, "bootstraps": 1, "draws": 1}},
    "two of each": {"counts": {"seeds": 2, "bootstraps": 2, "draws": 2}},
    "statistics dominate": {"counts": {"seeds": 2, "bootstraps": 1, "draws": 1}, "network": 0.3},
    "methods differ": {"counts": {"seeds": 2, "bootstraps": 1, "draws": 1}, "method": 1.5},
    "seeds share half": {
        "counts": {"seeds": 2, "bootstraps": 1, "draws": 1},
        "leak": 0.5,
        "settings": BudgetSettings(seed_correlation=0.75),
    },
}


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_bands_hold_the_truth_as_often_as_they_say(scene):
    galaxy = Galaxy(np.random.default_rng(77))
    average = np.kron(np.eye(2), np.full((1, HALF), 1.0 / HALF))
    pulls, averaged = [], []
    for _ in range(400):
        _, combined = _trial(galaxy, **SCENES[scene])
        pulls.append(combined.value / combined.error)
        mean = combined.transform(average)
        averaged.append(mean.value / mean.error)
    for sample in (np.array(pulls), np.array(averaged)):
        assert 0.60 <= np.mean(np.abs(sample) < 1) <= 0.78
        assert np.mean(np.abs(sample) < 1.645) >= 0.82
        assert 0.8 <= sample.std() <= 1.25


def test_a_family_alone_covers_too():
    galaxy = Galaxy(np.random.default_rng(2))
    specs = _specs(seeds=3, bootstraps=2, draws=2)
    pulls = []
    for _ in range(300):
        values = galaxy.family(specs, galaxy.draw(1.0), 0.7, 1.0, 0.5)
        estimate = combine_family(specs, values, groups=GROUPS)
        pulls.append(estimate.value / estimate.error)
    assert 0.60 <= np.mean(np.abs(np.array(pulls)) < 1) <= 0.78


def test_terms_are_the_ones_put_in_and_none_twice():
    galaxy = Galaxy(np.random.default_rng(3))
    specs = _specs(seeds=60, bootstraps=60, draws=60)
    values = galaxy.family(specs, galaxy.size, 2.0, 3.0, 1.0, bias=0.4)
    separate = BudgetSettings(measurement_within_statistics=False, correct_measurement_bias=True)
    estimate = combine_family(specs, values, groups=GROUPS, settings=separate)
    for name, expected in (("network", 2.0 / np.sqrt(60)), ("statistics", 3.0), ("measurement", 1.0)):
        ratio = np.sqrt(estimate.terms[name].variance) / (expected * galaxy.size)
        assert np.mean(ratio) == pytest.approx(1.0, abs=0.12), name
        assert estimate.terms[name].count == 60
    assert np.mean(estimate.bias / galaxy.size) == pytest.approx(0.4, abs=0.25)
    within = combine_family(specs, values, groups=GROUPS)
    ratio = np.sqrt(within.terms["statistics"].variance) / (np.sqrt(8.0) * galaxy.size)
    assert np.mean(ratio) == pytest.approx(1.0, abs=0.12)
    assert np.allclose(within.value - within.bias, estimate.value)
    # What is not corrected is owned up to: the shift stays in the measurement term.
    assert np.all(within.terms["measurement"].variance >= within.bias**2 * 0.9)
    parts = sum(estimate.term_error(name) ** 2 for name in estimate.terms)
    assert np.allclose(np.sqrt(parts), estimate.error)


def test_missing_twin_and_own_seed_do_not_bring_the_network_in_again():
    galaxy = Galaxy(np.random.default_rng(4))
    specs = _specs(seeds=40, bootstraps=60)
    values = galaxy.family(specs, 0.0, 3.0, 1.0, 0.0)
    values[0] = np.nan  # the base that all bootstraps are compared with
    estimate = combine_family(specs, values, groups=GROUPS)
    assert list(estimate.excluded) == [specs[0].name]
    # All bootstraps share the lost base's one network: its variance is taken out on average over bases.
    many = []
    for _ in range(40):
        values = galaxy.family(specs, 0.0, 3.0, 1.0, 0.0)
        values[0] = np.nan
        many.append(combine_family(specs, values, groups=GROUPS).terms["statistics"].variance)
    assert np.mean(np.mean(many, axis=0) / galaxy.size**2) < 0.7 * (1.0 + 9.0)


def test_covariances_are_positive_definite_and_missing_terms_named():
    galaxy = Galaxy(np.random.default_rng(5))
    for counts in ({"seeds": 1}, {"seeds": 2}, {"seeds": 1, "bootstraps": 1}, {"seeds": 2, "draws": 3}):
        specs = _specs(**counts)
        estimate = combine_family(specs, galaxy.family(specs, 0.0, 1.0, 1.0, 1.0), groups=GROUPS)
        assert ("network" in estimate.missing) == (counts["seeds"] == 1)
        assert ("statistics" in estimate.missing) == ("bootstraps" not in counts)
        assert ("measurement" in estimate.missing) == ("draws" not in counts)
        if estimate.terms:
            scaled = estimate.covariance / np.outer(estimate.error, estimate.error)
            assert np.linalg.eigvalsh(scaled).min() > 0


def test_combination_keeps_correlated_terms_and_bounds_the_weights():
    galaxy = Galaxy(np.random.default_rng(6))
    estimates, combined = _trial(galaxy, counts={"seeds": 3, "bootstraps": 3, "draws": 2})
    assert np.allclose(combined.weights.sum(axis=0), 1)
    assert combined.weights.max() <= 0.7 + 1e-12
    assert combined.weights.min() >= 0
    assert set(combined.terms) == {"network", "statistics", "measurement", "method"}
    for name in ("statistics", "measurement"):
        smallest = np.min([e.terms[name].variance for e in estimates], axis=0)
        assert np.all(combined.terms[name].variance >= smallest * (1 - 1e-9))
    # One method with an accidentally tiny variance does not take everything.
    tiny = estimates[0]
    terms = {name: type(t)(t.covariance * 1e-8, t.count, t.dof) for name, t in tiny.terms.items()}
    tiny = type(tiny)(method="flow", value=tiny.value, terms=terms)
    assert combine_methods([tiny, *estimates[1:]], groups=GROUPS).weights[0].max() <= 0.7 + 1e-12


def test_methods_that_disagree_make_a_large_method_term():
    specs = _specs(seeds=2, bootstraps=1, draws=1)
    galaxy = Galaxy(np.random.default_rng(7))
    near = [combine_family(specs, galaxy.family(specs, 0.0, 0.1, 0.1, 0.1)) for _ in range(3)]
    far = [
        combine_family(specs, galaxy.family(specs, shift * galaxy.size, 0.1, 0.1, 0.1))
        for shift in (-5, 0, 5)
    ]
    agree, differ = combine_methods(near), combine_methods(far)
    assert np.all(differ.term_error("method") > galaxy.size)
    assert np.all(agree.error < 0.6 * galaxy.size)
    rows = differ.rows([f"q{i}" for i in range(Q)], ["x"] * Q)
    total = [row["value"] for row in rows if row["term"] == "total"]
    assert np.allclose(total, differ.error)


def test_what_a_penalty_hides_is_a_method_s_own():
    specs = _specs(seeds=2, bootstraps=1, draws=1)
    galaxy = Galaxy(np.random.default_rng(11))
    pair = [combine_family(specs, galaxy.family(specs, 0.0, 0.1, 0.1, 0.1)) for _ in range(2)]
    hidden = np.full(Q, 0.04)
    combined = combine_methods([pair[0], pair[1].with_term("penalty", hidden)])
    assert combined.weights is not None
    assert np.allclose(combined.terms["penalty"].variance, combined.weights[1] ** 2 * hidden)
    plain = combine_methods(pair)
    assert plain.weights is not None
    assert combined.weights[1].mean() < 0.9 * plain.weights[1].mean()


def test_one_method_stands_for_itself_and_says_so():
    specs = _specs(seeds=2, bootstraps=1, draws=1)
    only = combine_family(specs, Galaxy(np.random.default_rng(8)).family(specs, 0.0, 1.0, 1.0, 1.0))
    combined = combine_methods([only])
    assert np.array_equal(combined.value, only.value)
    assert "method" in combined.missing
    with_baryons = combined.with_term("baryons", np.full(Q, 4.0))
    assert np.all(with_baryons.terms["baryons"].variance == 4.0)
    assert np.all(with_baryons.error > 2.0)


def test_a_member_that_went_wrong_is_left_out_by_the_stated_rule():
    specs = _specs(seeds=4, bootstraps=3)
    galaxy = Galaxy(np.random.default_rng(9))
    values = galaxy.family(specs, 0.0, 1.0, 1.0, 0.0)
    clean = combine_family(specs, values)
    assert not clean.excluded
    values[2] += 300 * galaxy.size
    robust = combine_family(specs, values)
    assert list(robust.excluded) == [specs[2].name]
    assert "robust standard deviations" in robust.excluded[specs[2].name]
    assert np.all(np.abs(robust.value) < 10 * galaxy.size)


def test_nothing_to_combine_is_a_clear_error():
    specs = _specs(seeds=1, bootstraps=1)
    with pytest.raises(GalrayError, match="no member of score"):
        combine_family(specs[1:], np.zeros((1, 3)))
    with pytest.raises(GalrayError, match="quantity 1 is not finite"):
        combine_family(specs, np.array([[0.0, np.nan], [1.0, np.nan]]))
    with pytest.raises(GalrayError, match="no method"):
        combine_methods([])


def test_jackknife_of_a_mean_is_its_variance():
    rng = np.random.default_rng(10)
    sizes = rng.integers(30, 90, size=20)
    x = rng.normal(size=(sizes.sum(), 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    blocks = np.split(x, np.cumsum(sizes)[:-1])
    left_out = np.array([np.delete(x, range(s, s + n), axis=0).mean(axis=0) for s, n in _starts(sizes)])
    covariance, bias = jackknife_covariance(left_out, x.mean(axis=0), sizes)
    assert np.allclose(bias, 0, atol=1e-12)
    assert covariance == pytest.approx(np.cov(x.T) / len(x), rel=0.8, abs=2e-4)
    # Equal blocks of one star each: exactly the textbook variance of a mean.
    star = x[:60, :1]
    each = np.array([np.delete(star, i, axis=0).mean(axis=0) for i in range(60)])
    assert jackknife_covariance(each)[0][0, 0] == pytest.approx(star.var(ddof=1) / 60, rel=1e-9)
    # The variance with divisor n has the bias -s²/n, and the jackknife finds it exactly.
    spread = np.array([np.delete(star, i, axis=0).var() for i in range(60)])[:, None]
    bias = jackknife_covariance(spread, np.array([star.var()]))[1]
    assert bias[0] == pytest.approx(-star.var(ddof=1) / 60, rel=1e-9)
    assert len(blocks) == 20


def _starts(sizes):
    return zip(np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes, strict=True)


def test_small_number_helpers():
    assert student_factor(np.array([1.0, 2.0, np.inf])) == pytest.approx([1.837, 1.321, 1.0], abs=2e-3)
    assert welch_satterthwaite([np.ones(1), np.ones(1)], [np.full(1, 3.0), np.full(1, 3.0)]) == pytest.approx(
        6
    )
    groups = np.zeros(4, dtype=np.int64)
    rng = np.random.default_rng(11)
    same = np.repeat(rng.normal(size=(50, 1)), 4, axis=1)
    assert effective_number(same, groups) == pytest.approx(np.ones(4))
    assert effective_number(rng.normal(size=(2000, 4)), groups) == pytest.approx(np.full(4, 4.0), rel=0.02)
    variance, dof = moderate(np.array([0.0, 2.0]), 2.0, np.ones(2), groups[:2], np.full(2, 2.0), 4.0)
    assert variance == pytest.approx([0.5, 1.5])
    assert dof == pytest.approx([4, 4])
    matrix = correlation(rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(3, 4)), groups)
    assert np.linalg.eigvalsh(matrix).min() > 0
    assert np.allclose(np.diag(matrix), 1)
