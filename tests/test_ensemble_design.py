"""Every factor has its own members and its own term; crossed or one at a time, no term holds another's."""

from __future__ import annotations

import numpy as np
import pytest

from galray.ensemble import (
    BudgetSettings,
    EnsembleSettings,
    FamilyDesign,
    MemberSpec,
    combine_family,
    design,
)
from galray.errors import GalrayError

NONE = FamilyDesign(seeds=0)
RATE = "training.score.learning_rate"
Q = 6


def _settings(family: FamilyDesign, **more) -> EnsembleSettings:
    return EnsembleSettings.model_validate({"flow": NONE, "score": family, "moments": NONE, **more})


EVERYTHING = FamilyDesign(seeds=2, bootstraps=2, draws=1, systematics=2, hyperparameters=2, selections=1)
MORE = {"hyperparameters": {RATE: {"low": 1e-3, "high": 1e-2, "log": True}}, "selections": ["parallax > 0.2"]}


def test_each_factor_has_its_count_and_its_content():
    specs = design(_settings(EVERYTHING, **MORE), 3, "data")
    assert len(specs) == EVERYTHING.count == 10
    assert [s.varied for s in specs].count("systematic") == 2
    assert len({s.id for s in specs}) == 10
    by_slug = {s.slug: s for s in specs}
    assert "choices" not in by_slug["base-0"].variation
    rates = [by_slug[f"hyperparameter-{i}"].variation["choices"][RATE] for i in (1, 2)]
    assert rates[0] != rates[1]
    assert all(1e-3 <= rate <= 1e-2 for rate in rates)
    assert by_slug["selection-1"].variation == {"where": "parallax > 0.2"}
    assert by_slug["systematic-1"].streams["systematic"] != by_slug["systematic-2"].streams["systematic"]
    assert by_slug["systematic-1"].streams["training"] == by_slug["base-0"].streams["training"]
    assert all(MemberSpec.from_dict(s.to_dict()) == s for s in specs)


def test_what_a_variation_means_is_part_of_the_address():
    first = {s.slug: s.id for s in design(_settings(EVERYTHING, **MORE), 3, "data")}
    wider = {RATE: {"low": 1e-4, "high": 1e-1, "log": True}}
    other = _settings(EVERYTHING, hyperparameters=wider, selections=["parallax > 0.3"])
    second = {s.slug: s.id for s in design(other, 3, "data")}
    changed = {slug for slug in first if first[slug] != second[slug]}
    assert changed == {"hyperparameter-1", "hyperparameter-2", "selection-1"}
    sky = EVERYTHING.model_copy(update={"blocks": "sky"})
    third = {s.slug: s.id for s in design(_settings(sky, **MORE), 3, "data")}
    assert {slug for slug in first if first[slug] != third[slug]} == {"bootstrap-1", "bootstrap-2"}


def test_crossed_meets_every_choice_with_every_other():
    family = FamilyDesign(seeds=3, bootstraps=2, draws=1, crossed=True)
    specs = design(_settings(family), 0)
    assert len(specs) == family.count == 3 * 3 * 2
    assert len({tuple(s.labels.values()) for s in specs}) == 18
    assert specs[0].varied == "base"
    assert sum(s.whole for s in specs) == 3
    assert {s.varied for s in specs} >= {"seed+bootstrap+draw", "bootstrap+draw"}


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (FamilyDesign(hyperparameters=1), "no key of it may vary"),
        (FamilyDesign(selections=2), "selections = 2, but there are 0"),
        (FamilyDesign(seeds=0, systematics=1), "no base to compare with"),
    ],
)
def test_a_design_without_means_is_refused(family, words):
    with pytest.raises(GalrayError, match=words):
        design(_settings(family), 0)
    with pytest.raises(GalrayError, match="only score networks can weigh patches"):
        design(EnsembleSettings(flow=FamilyDesign(bootstraps=1, blocks="sky")), 0)
    with pytest.raises(ValueError, match="belongs to no family"):
        _settings(FamilyDesign(), hyperparameters={"catalog.num_shards": [1, 2]})


SIZES = {
    "seed": 2.0,
    "bootstrap": 3.0,
    "draw": 1.0,
    "systematic": 1.5,
    "hyperparameter": 1.2,
    "selection": 2.5,
}


def _simulate(specs, rng, *, own=0.0, stars=None):
    """Additive effects of known size, the same for the same choice, and noise of each member's own."""
    effects = {(name, 0): np.zeros(Q) for name in SIZES}
    effects[("seed", 0)] = SIZES["seed"] * rng.normal(size=Q)
    rows = []
    for spec in specs:
        row = 10.0 + own * rng.normal(size=Q)
        for name, label in spec.labels.items():
            if (name, label) not in effects:
                effects[(name, label)] = SIZES[name] * rng.normal(size=Q)
            row = row + effects[(name, label)]
        rows.append(row)
    return np.array(rows)


def _variances(specs, rng, trials, own=0.0, **more):
    """Mean variance of every term over many simulated ensembles."""
    found: dict[str, list[float]] = {}
    for _ in range(trials):
        estimate = combine_family(specs, _simulate(specs, rng, own=own), **more)
        for name, term in estimate.terms.items():
            found.setdefault(name, []).append(float(term.variance.mean()))
    return {name: np.mean(values) for name, values in found.items()}


@pytest.mark.parametrize("crossed", [False, True])
def test_every_term_is_the_variance_put_in_and_none_twice(crossed):
    counts = (
        {"seeds": 3, "bootstraps": 2, "draws": 2, "systematics": 2, "crossed": True}
        if crossed
        else {
            "seeds": 3,
            "bootstraps": 3,
            "draws": 3,
            "systematics": 3,
            "hyperparameters": 3,
            "selections": 1,
        }
    )
    specs = design(_settings(FamilyDesign(**counts), **MORE), 1)
    # Without lending between quantities, which makes small variances larger on purpose.
    plain = BudgetSettings(measurement_within_statistics=False, correct_measurement_bias=True, prior_dof=0)
    found = _variances(specs, np.random.default_rng(4), 150, settings=plain)
    assert found["network"] == pytest.approx(SIZES["seed"] ** 2 / 3, rel=0.15)
    assert found["statistics"] == pytest.approx(SIZES["bootstrap"] ** 2, rel=0.15)
    spread = SIZES["draw"] ** 2 * (1 + 1 / counts["draws"])  # the subtracted shift has an error of its own
    assert found["measurement"] == pytest.approx(spread, rel=0.2)
    assert found["systematics"] == pytest.approx(SIZES["systematic"] ** 2, rel=0.15)
    if not crossed:
        assert found["selection"] == pytest.approx(SIZES["selection"] ** 2, rel=0.25)


def test_a_crossed_design_measures_the_training_noise_that_a_shared_seed_does_not_share():
    """Noise of every member's own enters both twins of a difference: repeats tell it and take it out."""
    rng = np.random.default_rng(5)
    crossed = design(_settings(FamilyDesign(seeds=4, bootstraps=4, crossed=True)), 1)
    single = design(_settings(FamilyDesign(seeds=4, bootstraps=4)), 1)
    truth = SIZES["bootstrap"] ** 2
    honest = _variances(crossed, rng, 150, own=3.0)["statistics"]
    assert honest == pytest.approx(truth, rel=0.2)
    # One at a time that noise cannot be told, and the term is too large: cautious, and said in the settings.
    assert _variances(single, rng, 150, own=3.0)["statistics"] > 2 * truth


def test_a_selection_of_fewer_stars_is_not_charged_for_their_number():
    family = FamilyDesign(seeds=2, bootstraps=40, selections=1)
    specs = design(_settings(family, selections=["x > 0"]), 1)
    rng = np.random.default_rng(6)
    rows = []
    for _ in range(60):
        values = np.array([3.0 * rng.normal(size=Q) * (s.varied == "bootstrap") for s in specs])
        # Half the stars: Var(half) − Var(all) = Var(all), and nothing else.
        values[[s.varied == "selection" for s in specs]] = 3.0 * rng.normal(size=Q)
        stars = [500 if s.varied == "selection" else 1000 for s in specs]
        told = combine_family(specs, values + 1e-3 * rng.normal(size=values.shape), stars=stars)
        naive = combine_family(specs, values + 1e-3 * rng.normal(size=values.shape))
        rows.append([told.terms["selection"].variance.mean(), naive.terms["selection"].variance.mean()])
    told_mean, naive_mean = np.mean(rows, axis=0)
    assert naive_mean == pytest.approx(9.0, rel=0.25)
    assert told_mean < 0.6 * naive_mean


def test_a_term_tells_how_well_it_is_known():
    specs = design(_settings(FamilyDesign(seeds=9, bootstraps=8)), 1)
    estimate = combine_family(specs, _simulate(specs, np.random.default_rng(7)))
    row = next(r for r in estimate.rows(list("abcdef"), [""] * Q) if r["term"] == "network")
    assert row["count"] == 9
    assert row["uncertainty"] == pytest.approx(row["value"] / np.sqrt(2 * row["dof"]))
    assert 0 < row["uncertainty"] < row["value"]


def test_members_that_all_but_coincide_make_no_outlier_of_a_redraw():
    """Draws of systematics and selections hardly move a result; beside them an honest redraw looks far."""
    family = FamilyDesign(seeds=1, draws=1, systematics=3, selections=1)
    specs = design(_settings(family, selections=["x > 0"]), 1)
    values = 1.0 + 1e-6 * np.arange(len(specs))[:, None] * np.ones(Q)
    values[[s.varied == "draw" for s in specs]] = 1.1
    assert combine_family(specs, values).excluded == {}
    many = design(_settings(FamilyDesign(seeds=7)), 1)
    bad = 1.0 + 1e-3 * np.random.default_rng(1).normal(size=(7, Q))
    bad[3] = 5.0
    found = combine_family(many, bad)
    assert list(found.excluded) == [many[3].name]
    assert "robust standard deviations" in found.excluded[many[3].name]
