"""The design holds what was asked for, ids follow contents, streams are independent or shared rightly."""

from __future__ import annotations

import json

import numpy as np
import pytest

from galray.ensemble import (
    EnsembleSettings,
    FamilyDesign,
    MemberSpec,
    bootstrap_counts,
    bootstrap_indices,
    design,
    split_indices,
)
from galray.errors import GalrayError


def _settings(**families):
    none = FamilyDesign(seeds=0)
    return EnsembleSettings(**{"flow": none, "score": none, "moments": none} | families)


def test_one_factor_at_a_time():
    specs = design(_settings(score=FamilyDesign(seeds=3, bootstraps=2, draws=1)), root_seed=1)
    assert [spec.index for spec in specs] == list(range(6))
    assert [(s.seed, s.bootstrap, s.draw) for s in specs] == [
        (0, 0, 0),
        (1, 0, 0),
        (2, 0, 0),
        (0, 1, 0),
        (0, 2, 0),
        (0, 0, 1),
    ]
    base, seed, _, bootstrap, _, draw = specs
    assert bootstrap.streams["training"] == draw.streams["training"] == base.streams["training"]
    assert seed.streams["training"] != base.streams["training"]
    assert len({spec.streams["split"] for spec in specs}) == 1
    assert base.varied == "base"
    assert draw.varied == "draw"


def test_methods_share_the_resampled_stars_but_not_the_training():
    specs = design(
        _settings(flow=FamilyDesign(bootstraps=1, draws=1), score=FamilyDesign(bootstraps=1, draws=1)), 7
    )
    flow, score = specs[:3], specs[3:]
    for a, b in zip(flow, score, strict=True):
        assert a.streams["bootstrap"] == b.streams["bootstrap"]
        assert a.streams["draw"] == b.streams["draw"]
        assert a.streams["training"] != b.streams["training"]


def test_id_follows_contents_and_not_the_place():
    settings = _settings(score=FamilyDesign(seeds=2))
    first = design(settings, 1, "abc")
    more = design(
        _settings(flow=FamilyDesign(seeds=1), score=FamilyDesign(seeds=3)), 1, {"flow": "x", "score": "abc"}
    )
    assert {s.id for s in first} < {s.id for s in more}
    assert first[0].index != next(s for s in more if s.id == first[0].id).index
    assert {s.id for s in first}.isdisjoint(s.id for s in design(settings, 2, "abc"))
    assert {s.id for s in first}.isdisjoint(s.id for s in design(settings, 1, "changed data"))


def test_spec_survives_json():
    spec = design(EnsembleSettings(), 3, "h")[-1]
    again = MemberSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.id == spec.id


@pytest.mark.parametrize(
    ("families", "words"),
    [
        ({"moments": FamilyDesign(seeds=2)}, "moments have no training seed"),
        ({"flow": FamilyDesign(seeds=0, draws=1)}, "ensemble.flow"),
        ({}, "no members"),
    ],
)
def test_impossible_designs(families, words):
    with pytest.raises(GalrayError, match=words):
        design(_settings(**families), 0)


def test_split_and_bootstrap_move_groups_whole():
    orbits = np.repeat(np.arange(200), 3)[np.random.default_rng(0).permutation(600)]
    train, held = split_indices(600, 0.25, seed=4, groups=orbits)
    assert len(train) + len(held) == 600
    assert not set(orbits[train]) & set(orbits[held])
    assert len(set(orbits[held])) == 50
    counts = bootstrap_counts(600, seed=5, groups=orbits)
    assert all(len(set(counts[orbits == orbit])) == 1 for orbit in range(200))
    assert counts.sum() == 600
    indices = bootstrap_indices(600, seed=5, groups=orbits)
    assert np.array_equal(np.bincount(indices, minlength=600), counts)
    assert not np.array_equal(counts, bootstrap_counts(600, seed=6, groups=orbits))


def test_bootstrap_variance_of_a_mean_is_that_of_the_sample():
    x = np.random.default_rng(1).normal(size=400)
    means = [np.average(x, weights=bootstrap_counts(400, seed)) for seed in range(600)]
    assert np.std(means) == pytest.approx(x.std() / 20, rel=0.1)


def test_split_refuses_an_empty_part():
    with pytest.raises(GalrayError, match="validation_fraction"):
        split_indices(5, 0.01, seed=0)
