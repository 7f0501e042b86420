"""`galray gravity STORE`: the moments of shard stores from the command line, in this process and on Ray."""

import sys

import numpy as np
import polars as pl
import pytest

from galray import cli
from galray.catalog import BallSettings, CatalogSettings, ShardStore, ingest
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.gravity import Kernel, MomentsSettings, load_field
from galray.mocks.observe import observables, source_ids
from galray.results import Places, PlacesSettings
from galray.store_gravity import measure_store
from galray.store_moments import measure_moments, moment_blocks, penalty_covariance
from galray.units import MSUN_PC3

SMALL = [
    "gravity.moments.num_potential_splines=[5, 7]",
    "gravity.moments.num_test_splines=[6, 9]",
]


def disc(n, seed, sigma=20.0):
    """Stars about the Sun, isothermal in height."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1.0, 1.0, (n, 3)) * 2.9 + np.array([-8.122, 0.0, 0.0])
    x[:, 2] = sigma / 50.0 * rng.normal(size=n)
    v = rng.normal(size=(n, 3)) * np.array([2 * sigma, 1.4 * sigma, sigma]) + np.array([0.0, 220.0, 0.0])
    return np.concatenate([x, v], 1)


def make_store(folder, n, seed, shards=4, sigma=20.0, radius=3.0):
    seen = observables(disc(n, seed, sigma), GalacticFrame())
    table = pl.DataFrame({name: np.asarray(values) for name, values in seen.items()})
    table = table.with_columns(
        source_id=pl.Series(source_ids(np.asarray(seen["ra"]), np.asarray(seen["dec"]))),
        parallax_error=pl.lit(1e-4),
        radial_velocity_error=pl.lit(0.1),
    )
    folder.mkdir()
    table.write_parquet(folder / "stars.parquet")
    settings = CatalogSettings(
        files=(str(folder / "stars.parquet"),), num_shards=shards, ball=BallSettings(radius_kpc=radius)
    )
    return ingest(settings, folder / "shards")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return make_store(folder / "thin", 24_000, 1), make_store(folder / "thick", 12_000, 2, sigma=40.0)


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["galray", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    seen = capsys.readouterr()
    return stopped.value.code, seen.out, seen.err


def sets(*texts):
    return [word for text in (*SMALL, *texts) for word in ("--set", text)]


def test_two_populations_from_the_command_line(stores, monkeypatch, capsys, tmp_path):
    thin, thick = (store.path for store in stores)
    words = ("gravity", thin, "--method", "moments", "--also", thick, "--field", tmp_path / "field", *sets())
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 0, err
    assert "a_z" in out
    inside = sum(store.num_rows for store in stores)
    assert f"{inside:,} stars, chi2 = " in out
    field = load_field(tmp_path / "field")
    assert field.statistics["num_stars"] == inside
    assert float(field.covariance.diagonal().max()) > 0


def test_ray_and_one_process_give_the_same_sums(stores, ray_session):
    settings = MomentsSettings(num_potential_splines=(5, 7), num_test_splines=(6, 9), num_blocks=3)
    assert ray_session.is_initialized()
    spread = moment_blocks(stores[0], settings)
    assert len(spread) == 3
    from galray.store_moments import shard_sums

    tasks = [(stores[0], i, None, settings.model_dump(mode="json"), stores[0].ball, None) for i in range(4)]
    alone = [shard_sums(task)[0] for task in tasks]
    np.testing.assert_array_equal(spread[0].matrix, alone[0].matrix + alone[3].matrix)
    np.testing.assert_array_equal(spread[0].scatter, sum(one.scatter for one in alone))
    field, replicas, _ = measure_moments(stores[0], settings)
    assert replicas.shape == (3, field.basis.size)


def test_jackknife_over_the_sky(stores):
    settings = MomentsSettings(
        num_potential_splines=(5, 7), num_test_splines=(6, 9), jackknife="sky", num_patches=8
    )
    field, replicas, _ = measure_moments(stores[0], settings)
    assert replicas.shape == (8, field.basis.size)
    assert field.statistics["num_stars"] == stores[0].num_rows


def test_what_the_penalty_may_hide(stores):
    settings = MomentsSettings(num_potential_splines=(5, 7), num_test_splines=(6, 9), penalty=0.5)
    field, _, _ = measure_moments(stores[0], settings)
    kernel = Kernel()
    where = PlacesSettings(heights=(0.5,), average_heights=(0.2, 0.8), average_arc=0.5)
    places = Places(where, stores[0].frame, stores[0].ball.center, stores[0].ball.radius, kernel.reach)
    hidden = penalty_covariance(field, places, kernel)
    assert hidden.shape == (places.num_values,) * 2
    rows = [i for i, q in enumerate(places.quantities) if q.name == "a_z" and q.profile is None]
    x = np.array([places.quantities[i].position for i in rows])
    wide, narrow = (
        field.predict(x, errors=which)[1].numpy()[2::3, 2::3] for which in ("total", "statistics")
    )
    np.testing.assert_allclose(hidden[np.ix_(rows, rows)], wide - narrow, rtol=1e-6, atol=1e-6)
    dense = [i for i, q in enumerate(places.quantities) if q.name == "rho" and q.profile is None]
    x = np.array([places.quantities[i].position for i in dense])
    both = (
        field.predict(x, "smoothed_density", kernel, errors=which)[1] for which in ("total", "statistics")
    )
    wide, narrow = (covariance.numpy() / MSUN_PC3**2 for covariance in both)
    np.testing.assert_allclose(hidden[np.ix_(dense, dense)], wide - narrow, rtol=1e-6, atol=1e-12)
    # hardly penalised, hardly anything is hidden
    free, _, _ = measure_moments(stores[0], settings, penalty=(1e-6, 1e-6))
    assert free.penalty == (1e-6, 1e-6)
    assert np.trace(penalty_covariance(free, places, kernel)[np.ix_(rows, rows)]) < 0.1 * np.trace(
        hidden[np.ix_(rows, rows)]
    )


def test_mistakes_are_told_in_one_line(stores, monkeypatch, capsys, tmp_path):
    thin, thick = (store.path for store in stores)
    small = make_store(tmp_path / "small", 40, 3, shards=3)
    code, _, err = command(monkeypatch, capsys, "gravity", small.path)
    assert code == 2
    assert "37 stars of" in err
    assert "usable moments" in err
    assert "num_potential_splines" in err
    for words, text in (
        (("--set", "gravity.moments.basis=[1]"), "basis"),
        (("--set", "gravity.moments.spline=3"), "spline"),
        (("--set", "gravity.moments.pattern_speed=fit"), "looks the same in every rotating frame"),
        (("--set", "flow.hidden=[3]"), "flow"),
        (("--also", thin), "the same store twice"),
    ):
        code, _, err = command(monkeypatch, capsys, "gravity", thin, *words)
        assert code == 2, words
        assert text in err, (words, err)
        assert len(err.strip().splitlines()) <= 3
    other = make_store(tmp_path / "other", 3000, 3, radius=2.8)
    with pytest.raises(GalrayError, match="another frame or ball"):
        measure_store(thin, others=[other.path])
    code, _, err = command(monkeypatch, capsys, "gravity", "demo", "--also", thick)
    assert code == 2
    assert "goes with a shard store" in err
    assert ShardStore(thin).num_rows == stores[0].num_rows
