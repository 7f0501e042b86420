"""The stars of a member: moved by a zero point, selected by a condition, weighed by patches of sky."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from galray.catalog import BallSettings, CatalogSettings, ingest, write_gaia_source
from galray.catalog.astrometry import galactocentric, shift_states
from galray.ensemble import EnsembleSettings, FamilyDesign, design
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.member_stars import error_covariances, patch_bootstrap, rows_of, seen
from galray.phasespace import Ball
from galray.seeds import seed_for
from tests.catalog_stars import stars


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stars")
    write_gaia_source(stars(800, seed=4), folder / "bulk")
    return ingest(CatalogSettings(files=(str(folder / "bulk"),), num_shards=3), folder / "store")


def _spec(**counts):
    none = FamilyDesign(seeds=0)
    settings = EnsembleSettings(
        flow=none, moments=none, score=FamilyDesign(**counts), selections=("parallax > 12 * parallax_error",)
    )
    return design(settings, 1)[-1].to_dict()


def test_another_zero_point_is_what_the_transformation_gives():
    frame, rng = GalacticFrame(), np.random.default_rng(2)
    observed = np.stack(
        [
            rng.uniform(0, 360, 50),
            rng.uniform(-80, 80, 50),
            rng.uniform(0.3, 5, 50),
            *rng.normal(0, 8, (3, 50)),
        ],
        -1,
    )
    motion = (1.0, -2.0, 0.5)
    moved = shift_states(galactocentric(observed, frame), frame, 0.02, motion)
    direct = galactocentric(observed, frame, 0.02)
    direct[:, 3:] += motion
    np.testing.assert_allclose(moved, direct, rtol=1e-10, atol=1e-9)
    assert np.isnan(shift_states(galactocentric(observed, frame), frame, 9.0, motion)).all()


def test_members_see_the_stars_that_they_should(store):
    plain = seen(store, None)
    np.testing.assert_array_equal(plain.states, store.states(dtype=np.float64))
    spec = _spec(systematics=1)
    moved = seen(store, spec)
    errors = EnsembleSettings().systematics
    shift = errors.draw(seed_for(1, "systematic", 1))
    expected = store.shifted(plain.states, *shift)
    np.testing.assert_array_equal(moved.states, expected.states)
    assert len(moved.states) == moved.account["kept"] <= store.num_rows
    # Shard by shard or at once: the same stars.
    parts = np.concatenate([seen(store, spec, [i]).states for i in range(3)])
    np.testing.assert_array_equal(parts, moved.states)

    chosen = seen(store, _spec(selections=1))
    table = store.table(["parallax", "parallax_error"])
    wanted = (table["parallax"] > 12 * table["parallax_error"]).to_numpy()
    assert 0 < wanted.sum() < store.num_rows
    np.testing.assert_array_equal(chosen.states, plain.states[wanted])


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """Stars of even density out to 5 kpc with parallax errors of 6 % at 3 kpc, in a ball of 3 kpc."""
    folder = tmp_path_factory.mktemp("around")
    rng, table = np.random.default_rng(8), stars(12_000, seed=5, rv_fraction=1.0)
    near = 1 / (5 * rng.uniform(size=len(table)) ** (1 / 3))
    table = table.with_columns(
        pl.Series("parallax", near + rng.normal(0, 0.02, len(table))),
        pl.Series("parallax_error", np.full(len(table), 0.02)),
    )
    write_gaia_source(table, folder / "bulk")
    return {
        margin: ingest(
            CatalogSettings(
                files=(str(folder / "bulk"),),
                num_shards=3,
                ball=BallSettings(radius_kpc=3, margin_kpc=margin),
                cuts={"parallax_snr": 5.0},
                parallax_zero_point=0.0,
            ),
            folder / f"store-{margin}",
        )
        for margin in (0.0, 0.9)
    }


def test_redraws_and_moved_stars_come_in_from_the_margin_as_others_leave(around):
    bare, store = around.values()
    assert bare.margin is None
    np.testing.assert_array_equal(bare.states(), store.states())
    account = store.row_account
    assert account["kept_margin"] == store.margin.num_rows > 0
    assert account["rows_in"] == sum(n for fate, n in account.items() if fate != "rows_in")
    distance = np.linalg.norm(store.margin.states()[:, :3] - np.array(store.frame.sun_position), axis=1)
    assert 2.999 < distance.min() < 3.01
    assert 3.89 < distance.max() < 3.9001
    store.verify()
    spec = _spec(draws=1)
    lost, steady = (len(seen(one, spec).states) / one.num_rows - 1 for one in (bare, store))
    assert lost < -0.05, "stars leave, and none comes"
    assert abs(steady) < 0.03
    # Each state is that of the star that its index names, and shard by shard they are the same.
    found = seen(store, spec)
    sun = np.array(store.frame.sun_position)
    own = rows_of(store, spec, lambda one: one.states(dtype=np.float64))[found.index, :3] - sun
    drawn = found.states[:, :3] - sun
    cosine = (own * drawn).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(drawn, axis=1)
    assert cosine.min() > 1 - 1e-9
    assert (found.index >= store.num_rows).sum() > 0.03 * store.num_rows
    parts = np.concatenate([seen(store, spec, [i]).states for i in range(3)])
    np.testing.assert_array_equal(np.sort(parts[:, 0]), np.sort(found.states[:, 0]))
    # A zero point that brings all stars nearer: the ball fills up from outside.
    closer = store.shifted(rows_of(store, _spec(systematics=1), lambda one: one.states()), -0.02, (0, 0, 0))
    assert len(closer.states) > 1.1 * store.num_rows
    both = design(
        EnsembleSettings(
            flow=FamilyDesign(seeds=0),
            moments=FamilyDesign(seeds=0),
            score=FamilyDesign(draws=1, systematics=1, crossed=True),
        ),
        1,
    )[-1].to_dict()
    assert abs(len(seen(store, both).states) / store.num_rows - 1) < 0.08
    assert len(error_covariances(store, spec)) == store.num_rows + store.margin.num_rows


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("parallax >> 3", "selection 'parallax >> 3'"),
        ("colour < 1", "colour"),
        ("parallax", "not true or false"),
    ],
)
def test_a_condition_that_means_nothing_is_refused(store, condition, words):
    with pytest.raises(GalrayError, match=words):
        store.where(condition)


def test_draws_of_systematics_have_the_published_size():
    errors = EnsembleSettings().systematics
    draws = [errors.draw(seed_for(1, "systematic", i)) for i in range(1, 400)]
    assert np.std([zero for zero, _ in draws]) == pytest.approx(errors.zero_point_error_mas, rel=0.1)
    spread = np.std([motion for _, motion in draws], axis=0)
    np.testing.assert_allclose(spread, errors.solar_motion_error_km_s, rtol=0.1)


def test_a_bootstrap_over_patches_has_the_variance_of_independent_patches():
    """A mean over stars whose values share their patch's luck: the weights' spread tells its error."""
    rng = np.random.default_rng(3)
    ball = Ball((0.0, 0.0, 0.0), 4.0)
    x = rng.normal(size=(4000, 3))
    x *= (3.5 * rng.uniform(size=4000) ** (1 / 3) / np.linalg.norm(x, axis=1))[:, None]
    points = torch.from_numpy(x)
    weights = np.array([patch_bootstrap(ball, 48, seed).weight(points).numpy() for seed in range(300)])
    assert weights.min() >= 0
    assert weights.mean() == pytest.approx(1.0, abs=0.05)  # none is negative, so a little above one
    value = rng.normal(size=4000)  # independent from star to star: any fair bootstrap finds 1/√n
    means = (weights * value).sum(1) / weights.sum(1)
    assert means.std() == pytest.approx(1 / np.sqrt(4000), rel=0.25)
    # What a patch shares is seen by the patches alone: the error of a mean of 48, not of 4,000.
    lucky = np.sign(x[:, 2]) * np.sign(x[:, 0]) * np.sign(x[:, 1])
    assert ((weights * lucky).sum(1) / weights.sum(1)).std() > 4 / np.sqrt(4000)
    # Smooth: the weight's gradient exists everywhere, also at the centre.
    near = torch.tensor([[0.0, 0.0, 0.0], [1e-6, 0.0, 0.0]], dtype=torch.float64)
    value, gradient = patch_bootstrap(ball, 48, 1).weight_and_gradient(near)
    assert torch.isfinite(gradient).all()
    assert abs(float(value[1] - value[0])) < 1e-4


def test_weights_by_patch_leave_the_score_that_of_f():
    """The weighted loss is least at the score itself: among c·s the best c is one, whatever the patches."""
    from galray.phasespace.score_matching import _weighted
    from galray.phasespace.transforms import Ball as Region

    rng = np.random.default_rng(8)
    ball = Region((0.0, 0.0, 0.0), 3.0)
    x = torch.from_numpy(rng.normal(size=(400_000, 3)))
    inside = x.square().sum(-1) < 9.0
    x = x[inside]
    edge = (1.0 - x.square().sum(-1) / 9.0) ** 2
    slope = (-4.0 / 9.0 * (1.0 - x.square().sum(-1) / 9.0)).unsqueeze(-1) * x
    found = []
    for seed in range(4):
        patch, gradient = patch_bootstrap(ball, 24, seed).weight_and_gradient(x)
        h = edge * patch
        by_x = patch.unsqueeze(-1) * slope + edge.unsqueeze(-1) * gradient
        s, divergence = -x, torch.full((len(x),), -3.0, dtype=torch.float64)
        # L(c) = c² A + c B is least at c = −B / 2A.
        square = (h * 0.5 * s.square().sum(-1)).mean()
        linear = (_weighted(s, divergence, h, by_x) - h * 0.5 * s.square().sum(-1)).mean()
        found.append(float(-linear / (2 * square)))
    np.testing.assert_allclose(found, 1.0, atol=0.02)
