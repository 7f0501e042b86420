"""Files to shards: every row accounted for, resumable, the same however many workers, bad input named."""

import fcntl
import gzip
import json
import math
import os
import shutil

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from galray.catalog import (
    BallSettings,
    CatalogSettings,
    ShardStore,
    StatesSettings,
    galactocentric,
    ingest,
    inspect,
    plan,
    summarize,
    verify,
    write_gaia_source,
)
from galray.catalog import merge as merge_module
from galray.catalog import workers as workers_module
from galray.catalog.columns import CORRELATIONS, OBSERVABLES
from galray.catalog.crew import Crew
from galray.cluster import ClusterSettings, connect
from galray.errors import GalrayError
from galray.frame import GalacticFrame
from galray.store_gravity import measure_store
from tests.catalog_stars import stars

CUTS = {"parallax_snr": 10, "good": "ruwe < 1.3", "bright": "phot_g_mean_mag < 14.5"}


def adds_up(store):
    account = store.row_account
    return account.pop("rows_in") == sum(account.values())


@pytest.fixture(scope="module")
def gaia_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gaia")
    write_gaia_source(stars(6000), folder, rows_per_file=1500)
    return folder


def configured(folder, **options):
    options = {"cuts": CUTS, "ball": BallSettings(radius_kpc=3), "num_shards": 5, **options}
    return CatalogSettings(files=(str(folder),), **options)


def test_every_row_has_the_fate_that_a_plain_calculation_gives_it(gaia_files, tmp_path):
    store = ingest(configured(gaia_files), tmp_path / "store", seed=3)
    t = stars(6000).with_columns(pl.col(pl.Float64).fill_nan(None))
    account = {"rows_in": 6000}

    def remove(t, fate, keep):
        account[fate] = t.filter(~keep).height
        return t.filter(keep)

    t = remove(t, "cut:no_radial_velocity", pl.col("radial_velocity").is_not_null())
    t = remove(t, "cut:parallax_snr", pl.col("parallax") / pl.col("parallax_error").cast(pl.Float32) > 10)
    t = remove(t, "cut:good", pl.col("ruwe").cast(pl.Float32) < 1.3)
    t = remove(t, "cut:bright", pl.col("phot_g_mean_mag").cast(pl.Float32) < 14.5)
    values = t.select(OBSERVABLES).with_columns(pl.col("radial_velocity").cast(pl.Float32)).to_numpy()
    w = galactocentric(values.astype(float), GalacticFrame())
    inside = np.linalg.norm(w[:, :3] - GalacticFrame().sun_position, axis=1) < 3
    account["cut:ball"] = int((~inside).sum())
    account["kept"] = int(inside.sum())
    assert store.row_account == account
    assert adds_up(store)
    assert store.num_rows == account["kept"] == len(store.states())
    order = np.argsort(t["source_id"].to_numpy()[inside])
    ours = store.table(["source_id", "x", "y", "z", "vx", "vy", "vz"]).sort("source_id")
    assert ours["source_id"].to_list() == t["source_id"].to_numpy()[inside][order].tolist()
    assert np.allclose(ours.drop("source_id").to_numpy(), w[inside][order], rtol=1e-6, atol=1e-5)


def test_manifest_and_store(gaia_files, tmp_path):
    seen = []
    store = ingest(configured(gaia_files), tmp_path / "store", progress=lambda *args: seen.append(args))
    manifest = store.manifest
    assert store.verify() == {"shards": 5, "rows": store.num_rows}
    assert [p.name for p in store.shards] == [f"shard-{i:05d}.parquet" for i in range(5)]
    # Dealt by hash: each shard's number is binomial.
    expected = store.num_rows / 5
    assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in store.shard_rows)
    assert len(manifest["inputs"]) == 4
    assert all(len(entry["xxh128"]) == 32 for entry in manifest["inputs"])
    assert manifest["frame"]["sun_galcen_distance_kpc"] == 8.122
    assert manifest["cuts"]["good"] == "ruwe < 1.3"
    assert store.frame == GalacticFrame()
    assert store.ball.radius == 3
    assert store.ball.center == pytest.approx(GalacticFrame().sun_position)
    x = store.table(["x"])["x"]
    assert manifest["columns"]["x"]["mean"] == pytest.approx(x.mean(), rel=1e-6)
    assert manifest["columns"]["x"]["max"] == pytest.approx(x.max())
    assert store.states(dtype=np.float64).shape == (store.num_rows, 6)
    assert np.array_equal(
        store.states([3]), store.states()[sum(store.shard_rows[:3]) :][: store.shard_rows[3]]
    )
    done, total, message = seen[-1]
    assert done == total
    assert [row[0] for row in seen] == sorted(row[0] for row in seen)
    assert "tile" in message
    assert any("shards" in text for _, _, text in seen)
    assert not [p for p in store.path.iterdir() if p.name.startswith(".")]
    summary = inspect(store.path)
    assert (summary["what"], summary["rows"], summary["problems"]) == ("store", store.num_rows, [])
    with pytest.raises(GalrayError, match="no column 'feh'"):
        store.table(["feh"])


def test_a_spoiled_store_is_found_out(gaia_files, tmp_path):
    store = ingest(configured(gaia_files), tmp_path / "store")
    content = bytearray(store.shards[2].read_bytes())
    content[len(content) // 2] ^= 1
    store.shards[2].write_bytes(bytes(content))
    with pytest.raises(GalrayError, match=r"shard-00002.*checksum"):
        store.verify()
    store.shards[2].unlink()
    with pytest.raises(GalrayError, match=r"shard-00002.*gone"):
        store.verify()
    whole = ingest(configured(gaia_files), tmp_path / "store")
    assert whole.verify()["rows"] == whole.num_rows
    assert whole.hash == store.hash


def test_same_inputs_and_settings_return_the_store_unchanged(gaia_files, tmp_path):
    folder = tmp_path / "files"
    shutil.copytree(gaia_files, folder)
    store = ingest(configured(folder), tmp_path / "store")
    before = {p: p.stat().st_mtime_ns for p in [*store.shards, store.path / "manifest.json"]}
    assert ingest(configured(folder), tmp_path / "store").hash == store.hash
    for path in folder.iterdir():
        os.utime(path)  # touched, but the same bytes
    ingest(configured(folder), tmp_path / "store")
    assert before == {p: p.stat().st_mtime_ns for p in before}
    other = ingest(configured(folder, cuts={}), tmp_path / "store")
    assert other.num_rows > store.num_rows
    min(folder.iterdir()).unlink()
    fewer = ingest(configured(folder, cuts={}), tmp_path / "store")
    assert fewer.row_account["rows_in"] < 6000
    assert other.hash != fewer.hash


def test_an_interrupted_ingest_goes_on_with_what_is_missing(gaia_files, tmp_path, monkeypatch):
    reference = ingest(configured(gaia_files), tmp_path / "reference")
    original = workers_module.Worker.read
    read = []

    def dies_at_the_third(self, unit):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(unit)
        return original(self, unit)

    monkeypatch.setattr(workers_module.Worker, "read", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        ingest(configured(gaia_files), tmp_path / "store")
    with pytest.raises(GalrayError, match="not a finished shard store"):
        ShardStore(tmp_path / "store")
    reused = []

    def counting(self, unit):
        answer = original(self, unit)
        reused.append(answer["reused"])
        return answer

    monkeypatch.setattr(workers_module.Worker, "read", counting)
    store = ingest(configured(gaia_files), tmp_path / "store")
    assert reused == [True, True, False, False]
    assert store.hash == reference.hash
    assert store.row_account == reference.row_account
    assert not list(store.path.glob(".ingest-*"))


def test_ray_workers_make_the_same_store(gaia_files, tmp_path, ray_session):
    here = ingest(configured(gaia_files), tmp_path / "here", seed=5)
    there = ingest(configured(gaia_files), tmp_path / "there", seed=5, num_workers=2)
    assert there.hash == here.hash
    assert there.row_account == here.row_account
    assert [e["xxh128"] for e in there.manifest["shards"]] == [e["xxh128"] for e in here.manifest["shards"]]
    assert there.manifest["tiles"] == here.manifest["tiles"]
    bad = tmp_path / "bad.csv.gz"
    bad.write_bytes(min(gaia_files.iterdir()).read_bytes()[:5000])
    with pytest.raises(GalrayError, match=r"bad\.csv\.gz"):
        ingest(CatalogSettings(files=(str(gaia_files), str(bad))), tmp_path / "x", num_workers=2)


@pytest.mark.parametrize(("growing", "workers"), [(False, 1), (True, 4)])
def test_workers_ask_a_growing_cluster_for_nodes(
    gaia_files, tmp_path, ray_session, monkeypatch, growing, workers
):
    """Twice as many as there is room for, and no more than there are files."""
    started, start = [], Crew._start
    monkeypatch.setattr(Crew, "_start", lambda crew: started.append(start(crew)))
    with connect(ClusterSettings(autoscaling=growing)):
        assert ingest(configured(gaia_files), tmp_path / "store", num_workers=1).num_rows
    assert len(started) == workers


def test_batches_and_flushes_do_not_change_the_store(gaia_files, tmp_path, monkeypatch):
    reference = ingest(configured(gaia_files), tmp_path / "reference")
    monkeypatch.setattr("galray.catalog.pieces.FLUSH_ROWS", 100)
    monkeypatch.setattr("galray.catalog.readers.BATCH_ROWS", 70)
    assert ingest(configured(gaia_files), tmp_path / "store").hash == reference.hash
    # Shards larger than what is merged at a time are merged range by range of source_id.
    monkeypatch.setattr("galray.catalog.merge.MERGE_BYTES", 10_000)
    parts = []
    original = merge_module.read_batches

    def counting(folder, index, columns=None):
        parts.append(columns)
        return original(folder, index, columns)

    monkeypatch.setattr(merge_module, "read_batches", counting)
    ranges = ingest(configured(gaia_files), tmp_path / "ranges")
    assert len(parts) > 3 * 5
    assert ranges.hash == reference.hash
    assert ranges.row_account == reference.row_account


values = st.one_of(st.none(), st.floats(width=32), st.floats(-3, 3, width=32))


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=st.lists(
        st.tuples(st.one_of(st.none(), st.integers(0, 40)), *[values] * 8), min_size=1, max_size=30
    ),
    files=st.integers(1, 3),
    require_rv=st.booleans(),
)
def test_rows_add_up_for_arbitrary_files(tmp_path_factory, rows, files, require_rv):
    folder = tmp_path_factory.mktemp("rows")
    names = ["source_id", *OBSERVABLES, "parallax_error", "ruwe"]
    schema = {n: pl.Int64 if n == "source_id" else pl.Float64 for n in names}
    good = pl.DataFrame([(99, 10.0, 20.0, 2.0, 1.0, 1.0, 5.0, 0.1, 1.0)], schema=schema, orient="row")
    table = pl.concat([pl.DataFrame(rows, schema=schema, orient="row"), good])
    for number in range(files):
        table[number::files].write_parquet(folder / f"{number}.parquet")
    store = ingest(
        CatalogSettings(
            files=(f"{folder}/*.parquet",),
            num_shards=2,
            cuts={"good": "ruwe < 1.4", "parallax_snr": 3},
            ball=BallSettings(radius_kpc=5),
            require_rv=require_rv,
        ),
        folder / "store",
    )
    assert store.row_account["rows_in"] == table.height
    assert all(n >= 0 for n in store.row_account.values())
    assert adds_up(store)
    assert np.isfinite(store.states()).all()
    assert store.table(["source_id"])["source_id"].is_unique().all()
    assert 99 in store.table(["source_id"])["source_id"]
    if store.no_rv is not None:
        assert adds_up(store.no_rv)
        assert store.no_rv.num_rows == store.row_account["kept_no_rv"]
    store.verify()


def test_columns_that_no_file_has_are_no_columns_of_the_store(gaia_files, tmp_path):
    whole = stars(1000, rv_fraction=1)
    bare = whole.drop("phot_g_mean_mag", "bp_rp", *CORRELATIONS, "ra_error")
    for name, parts in {"bare": [bare, bare], "mixed": [bare, whole]}.items():
        (tmp_path / name).mkdir()
        for number, part in enumerate(parts):
            half = part[number * 500 : number * 500 + 500]
            half.write_parquet(tmp_path / name / f"{number}.parquet")
    options = {"cuts": {}, "ball": None}
    store = ingest(configured(tmp_path / "bare", **options), tmp_path / "a")
    lacking = {"phot_g_mean_mag", "bp_rp", "ra_error", *CORRELATIONS}
    assert not lacking & {*store.columns}
    tiles = [store.path / "sky" / entry["file"] for entry in store.manifest["tiles"]["files"]]
    assert all(not lacking & {*pl.read_parquet_schema(path)} for path in [*store.shards, *tiles])
    verify(store.path)
    # What is measured is there all the same, empty; to draw from, there are no correlations.
    assert store.measured()["ra_error"].null_count() == len(store.measured()) == store.num_rows
    assert len(store.draw(1).states) == store.num_rows
    mixed = ingest(configured(tmp_path / "mixed", **options), tmp_path / "b")
    assert lacking <= {*mixed.columns}
    assert mixed.table(["bp_rp"])["bp_rp"].null_count() == 500
    same = [name for name in store.columns if name != "source_id"]
    assert mixed.table(same).equals(store.table(same))


def test_duplicates_across_files_keep_the_first(tmp_path):
    table = stars(200, rv_fraction=1)
    table.write_parquet(tmp_path / "a.parquet")
    table.head(50).with_columns(radial_velocity=pl.lit(1234.0)).write_parquet(tmp_path / "b.parquet")
    store = ingest(CatalogSettings(files=(f"{tmp_path}/*.parquet",), num_shards=3), tmp_path / "store")
    assert store.row_account == {"rows_in": 250, "kept": 200, "cut:duplicate_source_id": 50}
    assert not (store.table(["radial_velocity"])["radial_velocity"] == 1234).any()
    twice = CatalogSettings(files=(f"{tmp_path}/a.parquet",) * 2, num_shards=3)
    assert ingest(twice, tmp_path / "twice").row_account == {"rows_in": 200, "kept": 200}


def test_stars_without_radial_velocity_get_a_store_of_their_own(gaia_files, tmp_path):
    options = {"cuts": {**CUTS, "rv_error": "radial_velocity_error < 2"}, "require_rv": False}
    store = ingest(configured(gaia_files, **options), tmp_path / "store")
    table = stars(6000)
    assert store.row_account["kept"] + store.row_account["kept_no_rv"] > 2000
    assert adds_up(store)
    assert adds_up(store.no_rv)
    without = set(table.filter(pl.col("radial_velocity").is_nan())["source_id"])
    ids = set(store.no_rv.table(["source_id"])["source_id"])
    assert ids < without
    assert not set(store.table(["source_id"])["source_id"]) & without
    assert (store.table(["radial_velocity_error"])["radial_velocity_error"] < 2).all()
    assert "vx" not in store.no_rv.columns
    offset = store.no_rv.table(["x", "y", "z"]).to_numpy() - store.ball.center
    assert np.linalg.norm(offset, axis=1).max() < 3.001
    with pytest.raises(GalrayError, match="no radial velocity"):
        store.no_rv.states()


def test_stars_that_all_lack_a_radial_velocity(tmp_path):
    stars(400, rv_fraction=0).write_parquet(tmp_path / "a.parquet")
    stars(300, seed=1, rv_fraction=0).write_parquet(tmp_path / "b.parquet")
    options = {"files": (f"{tmp_path}/*.parquet",), "num_shards": 3, "views": ("shards", "tiles")}
    with pytest.raises(GalrayError, match=r"no star is left of 700 rows: cut:no_radial_velocity 700"):
        ingest(CatalogSettings(**options), tmp_path / "none")
    catalog = CatalogSettings(**options, require_rv=False)
    store = ingest(catalog, tmp_path / "store")
    assert store.row_account == {"rows_in": 700, "kept": 0, "kept_no_rv": 700}
    assert adds_up(store)
    assert adds_up(store.no_rv)
    assert (store.num_rows, len(store.shards), store.no_rv.num_rows) == (0, 3, 700)
    assert {"source_id", "x", "vx", "radial_velocity"} <= set(store.columns)
    assert store.states().shape == (0, 6)
    assert store.draw(1).account["rows"] == 0
    assert not verify(store.path).problems
    assert not verify(store.no_rv.path).problems
    assert (store.no_rv.path / "sky" / "hats.properties").is_file()
    assert summarize(store).num_stars == 0
    assert inspect(str(store.path))["rows"] == 0
    with pytest.raises(GalrayError, match="no star in it has a radial velocity"):
        store.require_stars()
    with pytest.raises(GalrayError, match="no star in it has a radial velocity"):
        measure_store(store.path)
    store.no_rv.require_stars()
    made = store.manifest["created"]
    assert ingest(catalog, tmp_path / "store").manifest["created"] == made
    # A file with velocities beside them fills the view.
    stars(200, seed=2, rv_fraction=1).write_parquet(tmp_path / "c.parquet")
    both = ingest(catalog, tmp_path / "store")
    assert (both.num_rows, both.no_rv.num_rows) == (200, 700)
    alone = ingest(CatalogSettings(**{**options, "files": (f"{tmp_path}/c.parquet",)}), tmp_path / "alone")
    assert both.table().equals(alone.table())
    both.require_stars()


def test_the_real_sample(test_data, tmp_path):
    path = test_data / "gaia_dr2/mosaik_40cells_z0.4kpc.parquet"
    options = {"release": "dr2", "num_shards": 4, "keep_columns": ("cell", "dust_correction")}
    store = ingest(CatalogSettings(files=(str(path),), require_rv=False, **options), tmp_path / "store")
    assert store.row_account == {"rows_in": 268_545, "kept": 237_536, "kept_no_rv": 31_009}
    assert store.table(["cell"])["cell"].n_unique() == 40
    assert store.no_rv.table(["cell"])["cell"].n_unique() == 40
    assert store.table(["source_id"])["source_id"].is_unique().all()
    median = np.median(store.states()[:, 3:], axis=0) - store.frame.sun_velocity_km_s
    assert median == pytest.approx([-10.2, -18.8, -7.5], abs=0.05)
    draw = store.draw(1, [0])
    assert draw.account["kept"] == store.shard_rows[0]


def test_draws_are_reproducible_and_have_the_stars_covariance(gaia_files, tmp_path):
    store = ingest(configured(gaia_files), tmp_path / "store")
    first, again, other = store.draw(7), store.draw(7), store.draw(8)
    assert np.array_equal(first.states, again.states)
    assert not np.array_equal(first.states[:100], other.states[:100])
    assert np.array_equal(store.draw_states(7), first.states)
    one = store.draw(7, [1])
    start = sum(store.shard_rows[:1])
    assert np.array_equal(
        one.states, first.states[(first.index >= start) & (first.index < start + store.shard_rows[1])]
    )
    account = dict(first.account)
    assert account.pop("rows") == sum(account.values()) == store.num_rows
    assert len(first.states) == len(first.index) == account["kept"]
    from galray.catalog import galactocentric_covariance
    from galray.catalog.columns import CORRELATIONS, ERRORS

    table = store.table([*OBSERVABLES, *ERRORS, *CORRELATIONS]).cast(pl.Float64).to_numpy()
    sharp = table[first.index, 8] / table[first.index, 2] < 0.01
    covariance = galactocentric_covariance(table[:, :6], table[:, 6:12], table[:, 12:], store.frame)[
        first.index
    ]
    # From the observables anew: float32 states are coarser than Gaia's positions on the sky.
    difference = first.states - galactocentric(table[first.index, :6], store.frame)
    chi = np.einsum("ni,nij,nj->n", difference, np.linalg.inv(covariance), difference)[sharp]
    assert np.mean(chi) == pytest.approx(6, abs=5 * math.sqrt(12 / sharp.sum()) + 0.1)


def test_no_star_is_on_the_balls_border_in_float32(tmp_path):
    rng = np.random.default_rng(0)
    direction = rng.normal(size=(20_000, 3))
    radius = 2 * (1 - 10 ** rng.uniform(-9, -3, (20_000, 1)))
    x = np.array([-8.122, 0, 0]) + radius * direction / np.linalg.norm(direction, axis=1)[:, None]
    frame = pl.DataFrame(
        np.concatenate([x, np.ones_like(x)], axis=1), schema=["x", "y", "z", "vx", "vy", "vz"]
    )
    frame.write_parquet(tmp_path / "t.parquet")
    ball = BallSettings(radius_kpc=2, center_kpc=(-8.122, 0, 0))
    store = ingest(CatalogSettings(files=(str(tmp_path / "t.parquet"),), ball=ball), tmp_path / "store")
    assert 8_000 < store.num_rows < 10_000  # those within 4e-6 kpc of the border are cut
    offset = (store.states()[:, :3] - np.array(store.ball.center, dtype=np.float32)) / np.float32(2)
    assert np.linalg.norm(offset, axis=1).max() < 1


def test_impossible_draws_are_kept_out_and_counted(tmp_path):
    table = stars(2000, rv_fraction=1).with_columns(parallax=pl.lit(0.1), parallax_error=pl.lit(0.1))
    table.write_parquet(tmp_path / "t.parquet")
    store = ingest(CatalogSettings(files=(str(tmp_path / "t.parquet"),), num_shards=2), tmp_path / "store")
    draw = store.draw(0)
    # One sigma below the mean: 15.87 % of a Gaussian.
    assert draw.account["parallax_not_positive"] == pytest.approx(0.1587 * 2000, abs=5 * math.sqrt(267))
    assert draw.account["kept"] + draw.account["parallax_not_positive"] == 2000
    assert np.isfinite(draw.states).all()


def test_states_tables_with_units_handedness_and_origin(tmp_path):
    rng = np.random.default_rng(2)
    w = np.concatenate([rng.uniform(-2, 2, (500, 3)), rng.normal(0, 50, (500, 3))], axis=1)
    frame = pl.DataFrame(w * [-1e3, 1e3, 1e3, -1e3, 1e3, 1e3], schema=["X", "Y", "Z", "U", "V", "W"])
    frame.with_columns(mass=pl.lit(2.5)).write_csv(tmp_path / "t.csv")
    settings = CatalogSettings(
        files=(str(tmp_path / "t.csv"),),
        format="states",
        states=StatesSettings(
            columns=("X", "Y", "Z", "U", "V", "W"),
            length_unit="pc",
            speed_unit="m / s",
            handedness="left",
            origin_kpc=(-8.0, 0.0, 0.0),
            origin_velocity_km_s=(0.0, 220.0, 0.0),
        ),
        cuts={"slow": "vy < 300"},
        weight_column="mass",
        num_shards=3,
    )
    store = ingest(settings, tmp_path / "store")
    expected = w + [-8, 0, 0, 0, 220, 0]
    expected = expected[expected[:, 4] < 300]
    ours = store.states(dtype=np.float64)
    assert np.allclose(ours[np.argsort(ours[:, 0])], expected[np.argsort(expected[:, 0])], rtol=1e-13)
    assert store.row_account["cut:slow"] == 500 - len(expected)
    assert np.all(store.weights() == 2.5)
    assert store.table(["source_id"])["source_id"].is_unique().all()
    with pytest.raises(GalrayError, match="no observables to redraw"):
        store.draw_states(0)
    shutil.copy(tmp_path / "t.csv", tmp_path / "u.csv")  # ids come from the content: the same stars
    renamed = ingest(settings.model_copy(update={"files": (str(tmp_path / "u.csv"),)}), tmp_path / "again")
    assert renamed.hash == store.hash


def test_sample_is_a_reproducible_part(gaia_files, tmp_path):
    settings = CatalogSettings(files=(str(gaia_files),), num_shards=2, sample=0.25)
    store = ingest(settings, tmp_path / "a")
    assert store.row_account["cut:not_sampled"] == pytest.approx(4500, abs=170)
    assert adds_up(store)
    whole = ingest(settings.model_copy(update={"sample": 1.0}), tmp_path / "b")
    assert set(store.table(["source_id"])["source_id"]) < set(whole.table(["source_id"])["source_id"])


def test_parallax_zero_point(tmp_path):
    stars(50, rv_fraction=1).write_parquet(tmp_path / "t.parquet")
    settings = CatalogSettings(files=(str(tmp_path / "t.parquet"),), num_shards=1, parallax_zero_point=-0.04)
    store = ingest(settings, tmp_path / "store")
    x = store.states(dtype=np.float64)[:, :3] - GalacticFrame().sun_position
    distance = 1 / (store.table(["parallax"])["parallax"].to_numpy() + 0.04)
    assert np.allclose(np.linalg.norm(x, axis=1), distance, rtol=1e-5)


def test_bad_files_end_the_ingest_or_are_quarantined(gaia_files, tmp_path):
    bad = tmp_path / "GaiaSource_bad.csv.gz"
    bad.write_bytes(min(gaia_files.iterdir()).read_bytes()[:20_000])
    lacking = tmp_path / "GaiaSource_lacking.parquet"
    stars(10).drop("pmdec").write_parquet(lacking)
    files = (str(gaia_files), str(bad), str(lacking))
    with pytest.raises(GalrayError, match=r"GaiaSource_bad\.csv\.gz: the file is truncated") as caught:
        ingest(CatalogSettings(files=files), tmp_path / "store")
    assert "allow_bad" in caught.value.remedy
    with pytest.raises(
        GalrayError,
        match=r"2 of 6 files are bad, 1 may be[^$]*bad\.csv\.gz: the file is truncated"
        r"[^$]*lacking\.parquet: neither a Gaia source table \(no pmdec\)",
    ):
        ingest(CatalogSettings(files=files, allow_bad=1), tmp_path / "store")
    store = ingest(CatalogSettings(files=files, allow_bad=2), tmp_path / "store")
    reference = ingest(CatalogSettings(files=(str(gaia_files),)), tmp_path / "reference")
    assert store.hash == reference.hash
    reasons = {os.path.basename(q["path"]): q["reason"] for q in store.manifest["quarantined"]}
    assert "truncated" in reasons["GaiaSource_bad.csv.gz"]
    assert "pmdec" in reasons["GaiaSource_lacking.parquet"]
    assert inspect(store.path)["quarantined"] == 2
    with pytest.raises(GalrayError, match="GaiaSource_bad"):  # a store with losses is not good enough now
        ingest(CatalogSettings(files=files), tmp_path / "store")


def test_short_rows_are_rejected_not_filled(tmp_path):
    (path,) = write_gaia_source(stars(300), tmp_path / "whole")
    lines = gzip.decompress(path.read_bytes()).split(b"\n")
    lines[-5] = lines[-5][:600]
    (tmp_path / "short.csv.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    store = ingest(CatalogSettings(files=(str(tmp_path / "short.csv.gz"),)), tmp_path / "store")
    assert store.row_account["rejected:short_row"] == 1
    assert adds_up(store)


def test_one_ingest_at_a_time(gaia_files, tmp_path):
    target = tmp_path / "store"
    target.mkdir()
    with (target / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("pid 4242 on elsewhere")
        other.flush()
        with pytest.raises(GalrayError, match=r"another ingest.*pid 4242 on elsewhere"):
            ingest(configured(gaia_files), target)
    assert ingest(configured(gaia_files), target).num_rows > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": ()}, "catalog.files is empty"),
        ({"files": ("/nowhere/*.csv.gz",)}, r"'/nowhere/\*\.csv\.gz' matches no file"),
        ({"cuts": {"x": "nope > 3"}}, r"\.csv\.gz: catalog\.cuts\.x reads column 'nope'"),
        ({"cuts": {"x": "ruwe + 1"}}, r"catalog\.cuts\.x: 'ruwe \+ 1' gives .*, not true or false"),
        ({"cuts": {"x": "phot_variable_flag > 3"}}, r"catalog\.cuts\.x"),
        ({"keep_columns": ("nope",)}, r"keep_columns: the file has no column 'nope'"),
        ({"weight_column": "nope"}, r"weight_column: the file has no column 'nope'"),
        ({"cuts": {"x": "ruwe > 100"}}, r"no star is left of 6,000 rows: cut:x"),
        ({"format": "states"}, r"not a 6D table: column\(s\) x, y, z"),
    ],
)
def test_mistakes_are_named_and_leave_no_store(gaia_files, tmp_path, options, message):
    with pytest.raises(GalrayError, match=message) as caught:
        ingest(CatalogSettings(**{"files": (str(gaia_files),), **options}), tmp_path / "store")
    assert caught.value.remedy or "gives" in caught.value.what or "cuts.x" in caught.value.what
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert not list((tmp_path / "store").glob("shard-*")) if (tmp_path / "store").exists() else True


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ({"x": "ruwe >"}, r"catalog\.cuts\.x: cannot read 'ruwe >'"),
        ({"x": "1 < 2"}, "reads no column"),
        ({"x": "parallax > AVG(parallax)"}, "aggregates over rows"),
        ({"mine": 3.0}, "only ruwe, parallax_snr, .* take a number"),
    ],
)
def test_cuts_that_are_none(cuts, message):
    with pytest.raises(GalrayError, match=message):
        CatalogSettings(files=("x",), cuts=cuts)


@pytest.mark.parametrize(
    "options",
    [
        {"states": {"length_unit": "km / s"}},
        {"release": "dr99"},
        {"keep_columns": ("x",)},
        {"filse": ("x",)},
        {"ball": {"radius_kpc": -1}},
    ],
)
def test_settings_that_are_wrong(options):
    with pytest.raises(ValueError, match="validation error"):
        CatalogSettings(**options)


def test_targets_that_cannot_be(gaia_files, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(GalrayError, match=r"holds files that are not a shard store's, such as 'thesis.tex'"):
        ingest(configured(gaia_files), tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(GalrayError, match="cannot write"):
        ingest(configured(gaia_files), tmp_path / "file" / "store")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "manifest.json").write_text("{")
    with pytest.raises(GalrayError, match=r"manifest\.json: cannot be read"):
        ShardStore(tmp_path / "s")


def test_a_disk_that_is_full_is_not_the_files_fault(gaia_files, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers_module.PieceWriter, "_flush", full)
    with pytest.raises(GalrayError, match="cannot write shards: No space left") as caught:
        ingest(configured(gaia_files, allow_bad=100), tmp_path / "store")
    assert "store" in caught.value.what


def test_mixed_kinds_are_refused(gaia_files, tmp_path):
    frame = pl.DataFrame({n: [1.0] for n in ("x", "y", "z", "vx", "vy", "vz")})
    frame.write_parquet(tmp_path / "t.parquet")
    with pytest.raises(GalrayError, match="mixes Gaia tables and 6D tables"):
        ingest(CatalogSettings(files=(str(gaia_files), str(tmp_path / "t.parquet"))), tmp_path / "store")


def test_draws_need_errors(test_data, tmp_path):
    path = test_data / "formats/gaia-galactic-orbits_gaia_data.fits"
    store = ingest(CatalogSettings(files=(str(path),), release="dr2", num_shards=2), tmp_path / "store")
    assert store.num_rows == 4096
    with pytest.raises(GalrayError, match="'parallax_error' is missing for"):
        store.draw_states(1)


def test_plan_writes_nothing(gaia_files):
    found = plan(configured(gaia_files))
    assert (found["num_files"], found["kind"], found["format"], found["num_shards"]) == (4, "gaia", "csv", 5)
    assert found["bytes"] == sum(p.stat().st_size for p in gaia_files.iterdir())
    json.dumps(found)
