"""Other catalogues by source_id: columns, radial velocities and masks; bounded memory, mistakes named."""

import numpy as np
import polars as pl
import pytest

from galray.catalog import (
    CatalogSettings,
    JoinSettings,
    JoinTable,
    MaskSettings,
    RadialVelocitySettings,
    SurveySettings,
    ingest,
)
from galray.catalog import joins as joins_module
from galray.errors import GalrayError
from tests.catalog_stars import stars


@pytest.fixture
def catalogue(tmp_path):
    table = stars(500, rv_fraction=0.6).with_columns(
        pl.col("radial_velocity", "radial_velocity_error").fill_nan(None)
    )
    table.write_parquet(tmp_path / "stars.parquet")
    return table


def configured(tmp_path, **options):
    return CatalogSettings(files=(str(tmp_path / "stars.parquet"),), num_shards=2, **options)


def adds_up(store):
    account = store.row_account
    return account.pop("rows_in") == sum(account.values())


def test_joined_columns_serve_cuts_and_are_kept(catalogue, tmp_path):
    other = catalogue.select("source_id", fidelity_v2=pl.Series(np.linspace(0, 1, 500))).head(400)
    other.rename({"source_id": "dr3_id"}).write_csv(tmp_path / "fidelity.csv")
    settings = configured(
        tmp_path,
        joins={
            "fidelity": JoinSettings(
                file=str(tmp_path / "fidelity.csv"), columns={"fidelity_v2": "fidelity_v2"}, key="dr3_id"
            )
        },
        cuts={"fidelity": 0.5},
        keep_columns=("fidelity_v2",),
        require_rv=False,
    )
    store = ingest(settings, tmp_path / "s")
    good = other.filter(pl.col("fidelity_v2") > 0.5).join(catalogue, on="source_id")
    assert store.num_rows == good["radial_velocity"].is_not_null().sum()
    assert store.no_rv.num_rows == good["radial_velocity"].is_null().sum()
    # A star that the other catalogue lacks has no fidelity and does not pass.
    assert store.row_account["cut:fidelity"] == 500 - good.height
    assert adds_up(store)
    kept = store.table(["source_id", "fidelity_v2"]).join(other, on="source_id")
    assert kept["fidelity_v2"].to_list() == kept["fidelity_v2_right"].to_list()


def test_large_files_are_read_by_range_with_the_same_answer(catalogue, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    ids = np.unique(np.concatenate([catalogue["source_id"].to_numpy(), rng.integers(1, 12 * 2**59, 20_000)]))
    other = pl.DataFrame({"source_id": ids, "age": rng.random(len(ids))})
    path = tmp_path / "ages.parquet"
    other.write_parquet(path, row_group_size=500)
    held = JoinTable("catalog.joins.ages", str(path), {"age": "age"})
    assert held.held is not None
    monkeypatch.setattr(joins_module, "HELD_ROWS", 1000)
    table = JoinTable("catalog.joins.ages", str(path), {"age": "age"})
    assert table.held is None
    wanted = catalogue["source_id"].sort().head(40)
    read = []
    original = joins_module.pq.ParquetFile.read_row_group

    def counted(self, number, **options):
        read.append(number)
        return original(self, number, **options)

    monkeypatch.setattr(joins_module.pq.ParquetFile, "read_row_group", counted)
    found = table.look_up(wanted).sort("source_id")
    assert found.equals(held.look_up(wanted).sort("source_id"))
    assert found.height == 40
    assert len(read) < 10 < table_groups(path)
    joined = table.join(catalogue)
    assert joined["source_id"].to_list() == catalogue["source_id"].to_list()
    assert joined["age"].null_count() == 0


def table_groups(path):
    return joins_module.pq.read_metadata(path).num_row_groups


def test_mistakes_in_joins_are_named(catalogue, tmp_path, monkeypatch):
    path = tmp_path / "other.parquet"
    other = catalogue.select("source_id", age=pl.lit(1.0))
    pl.concat([other, other.head(1)]).write_parquet(path)
    twin = catalogue["source_id"][0]

    def run(**options):
        join = {"file": str(path), "columns": ("age",), **options}
        return ingest(configured(tmp_path, joins={"ages": JoinSettings(**join)}), tmp_path / "s")

    with pytest.raises(
        GalrayError, match=rf"joins\.ages.*other\.parquet has source_id {twin} more than once"
    ):
        run()
    other.write_parquet(path)
    with pytest.raises(GalrayError, match=r"joins\.ages: .*other\.parquet has no column 'mass'"):
        run(columns=("mass",))
    with pytest.raises(GalrayError, match=r"no column 'id'"):
        run(key="id")
    with pytest.raises(GalrayError, match=r"joins\.ages: no such file"):
        run(file=str(tmp_path / "absent.parquet"))
    catalogue.drop("source_id").write_parquet(tmp_path / "stars.parquet")
    with pytest.raises(GalrayError, match="joins by source_id, which this file does not have"):
        run()
    monkeypatch.setattr(joins_module, "HELD_ROWS", 100)
    other.sample(fraction=1.0, shuffle=True, seed=2).write_parquet(path, row_group_size=100)
    with pytest.raises(GalrayError, match="not sorted by source_id"):
        JoinTable("catalog.joins.ages", str(path), {"age": "age"})
    pl.concat([other, other.head(1)]).sort("source_id").write_parquet(path, row_group_size=1000)
    table = JoinTable("catalog.joins.ages", str(path), {"age": "age"})
    with pytest.raises(GalrayError, match=f"{twin} more than once"):
        table.check_unique()
    other.write_csv(tmp_path / "other.csv")
    with pytest.raises(GalrayError, match="too many for a CSV file"):
        JoinTable("catalog.joins.ages", str(tmp_path / "other.csv"), {"age": "age"})
    with pytest.raises(ValueError, match="'age'"):
        configured(
            tmp_path,
            joins={name: JoinSettings(file="x", columns=("age",)) for name in ("one", "two")},
        )


def test_a_changed_join_file_is_another_catalogue(catalogue, tmp_path):
    path = tmp_path / "other.parquet"
    catalogue.select("source_id", age=pl.lit(1.0)).write_parquet(path)
    settings = configured(
        tmp_path, joins={"ages": JoinSettings(file=str(path), columns=("age",))}, keep_columns=("age",)
    )
    first = ingest(settings, tmp_path / "s")
    assert ingest(settings, tmp_path / "s").manifest["created"] == first.manifest["created"]
    catalogue.select("source_id", age=pl.lit(2.0)).write_parquet(path)
    second = ingest(settings, tmp_path / "s")
    assert second.manifest["settings_hash"] != first.manifest["settings_hash"]
    assert second.table(["age"])["age"].unique().to_list() == [2.0]


@pytest.fixture
def surveys(catalogue, tmp_path):
    """Two surveys that share stars with Gaia, with each other, and have some alone."""
    a = catalogue[:200].select("source_id", vhelio=pl.lit(10.0), verr=pl.lit(0.1))
    b = catalogue[100:300].select("source_id", rv=pl.lit(30.0), e_rv=pl.lit(2.0))
    b = b.with_columns(e_rv=pl.when(pl.int_range(pl.len()) < 5).then(float("nan")).otherwise("e_rv"))
    a.write_parquet(tmp_path / "a.parquet")
    b.write_csv(tmp_path / "b.csv")
    return {
        "a": SurveySettings(
            file=str(tmp_path / "a.parquet"), velocity="vhelio", error="verr", zero_point=0.5, error_floor=0.3
        ),
        "b": SurveySettings(file=str(tmp_path / "b.csv"), velocity="rv", error="e_rv", zero_point=-1.0),
    }


def expected(catalogue):
    """Velocity and error of each source after zero points and floors, NaN where it has none."""
    n = np.arange(500)
    gaia = catalogue.select("radial_velocity", "radial_velocity_error").to_numpy().T.astype(float)
    a = np.where(n < 200, [[9.5], [np.hypot(0.1, 0.3)]], np.nan)
    b = np.where((n >= 105) & (n < 300), [[31.0], [2.0]], np.nan)
    return {"gaia": gaia, "a": a, "b": b}


def test_velocities_in_order_of_precedence(catalogue, surveys, tmp_path):
    velocities = RadialVelocitySettings(
        surveys={"a": surveys["a"], "gaia": SurveySettings(), "b": surveys["b"]}
    )
    store = ingest(configured(tmp_path, radial_velocities=velocities), tmp_path / "s")
    each = expected(catalogue)
    value, error, source = np.full(500, np.nan), np.full(500, np.nan), np.full(500, "", dtype=object)
    for name in ("a", "gaia", "b"):
        free = np.isnan(value) & np.isfinite(each[name][0])
        value[free], error[free], source[free] = each[name][0][free], each[name][1][free], name
    truth = catalogue.select("source_id").with_columns(
        v=pl.Series(value), e=pl.Series(error), s=pl.Series(source)
    )
    assert store.num_rows == np.isfinite(value).sum()
    assert store.row_account["cut:no_radial_velocity"] == np.isnan(value).sum()
    kept = store.table(["source_id", "radial_velocity", "radial_velocity_error", "rv_source"])
    kept = kept.join(truth, on="source_id")
    assert kept["rv_source"].to_list() == kept["s"].to_list()
    assert {*kept["s"]} == {"a", "gaia", "b"}
    assert np.allclose(kept["radial_velocity"], kept["v"], rtol=1e-6)
    assert np.allclose(kept["radial_velocity_error"], kept["e"], rtol=1e-6)


def test_weighted_mean_of_velocities(catalogue, surveys, tmp_path):
    velocities = RadialVelocitySettings(surveys=surveys, combine="weighted_mean")
    store = ingest(configured(tmp_path, radial_velocities=velocities), tmp_path / "s")
    each = expected(catalogue)
    weight = np.nan_to_num(np.array([1 / each[n][1] ** 2 for n in ("gaia", "a", "b")]))
    value = np.nansum(np.array([each[n][0] for n in ("gaia", "a", "b")]) * weight, 0)
    total = weight.sum(0)
    truth = catalogue.select("source_id").with_columns(
        v=pl.Series(value / np.where(total > 0, total, 1)),
        e=pl.Series(1 / np.sqrt(np.where(total > 0, total, 1))),
    )
    kept = store.table(["source_id", "radial_velocity", "radial_velocity_error", "rv_source"])
    assert kept.height == (total > 0).sum()
    kept = kept.join(truth, on="source_id")
    assert np.allclose(kept["radial_velocity"], kept["v"], rtol=1e-6)
    assert np.allclose(kept["radial_velocity_error"], kept["e"], rtol=1e-6)
    assert {"gaia", "a", "b", "gaia+a", "a+b", "gaia+a+b", "gaia+b"} == {*kept["rv_source"]}
    # The selection function counts what counts as a velocity here.
    assert store.rv_selection.with_rv.sum() == kept.height


def test_survey_mistakes_are_named():
    with pytest.raises(ValueError, match="needs a file"):
        RadialVelocitySettings(surveys={"apogee": SurveySettings()})
    with pytest.raises(ValueError, match="catalogue itself"):
        RadialVelocitySettings(surveys={"gaia": SurveySettings(file="x.csv")})


def test_masks_by_region_and_by_list(catalogue, tmp_path):
    from astropy import units as u
    from astropy.coordinates import SkyCoord

    (tmp_path / "clusters.csv").write_text(
        "# open clusters\nname,ra,dec,radius,distance_min,distance_max,pmra_min,pmra_max\n"
        "one,100.0,20.0,40.0,,,,\ntwo,300.0,-89.0,60.0,0.3,1.0,-5,\n"
    )
    binaries = catalogue[::7]["source_id"]
    pl.DataFrame({"id": pl.concat([binaries, binaries.head(3)])}).write_parquet(tmp_path / "nss.parquet")
    settings = configured(
        tmp_path,
        require_rv=False,
        masks={
            "clusters": MaskSettings(file=str(tmp_path / "clusters.csv")),
            "binaries": MaskSettings(file=str(tmp_path / "nss.parquet"), kind="source_ids", key="id"),
            "clouds": MaskSettings(file="magellanic_clouds"),
        },
    )
    store = ingest(settings, tmp_path / "s")
    place = SkyCoord(catalogue["ra"].to_numpy() * u.deg, catalogue["dec"].to_numpy() * u.deg)

    def within(ra, dec, radius):
        return place.separation(SkyCoord(ra * u.deg, dec * u.deg)).deg <= radius

    distance = 1 / catalogue["parallax"].to_numpy()
    clusters = within(100, 20, 40)
    clusters |= (
        within(300, -89, 60) & (distance >= 0.3) & (distance <= 1) & (catalogue["pmra"].to_numpy() >= -5)
    )
    listed = catalogue["source_id"].is_in(binaries.implode()).to_numpy() & ~clusters
    clouds = (within(80.8938, -69.7561, 8) | within(13.1867, -72.8286, 4)) & ~clusters & ~listed
    account = store.row_account
    assert account["cut:mask_clusters"] == clusters.sum() > 20
    assert account["cut:mask_binaries"] == listed.sum() > 20
    assert account.get("cut:mask_clouds", 0) == clouds.sum()
    assert adds_up(store)
    assert {*store.manifest["auxiliary"]} == {
        f"catalog.masks.{n}" for n in ("clusters", "binaries", "clouds")
    }


def test_many_cones_give_what_few_give(catalogue, tmp_path):
    rng = np.random.default_rng(1)
    cones = pl.DataFrame(
        {"ra": rng.uniform(0, 360, 60), "dec": rng.uniform(-90, 90, 60), "radius": [3.0] * 60}
    )
    counts = []
    for name, parts in (("all", [cones]), ("halves", [cones[:30], cones[30:]])):
        masks = {}
        for i, part in enumerate(parts):
            part.write_csv(tmp_path / f"{name}{i}.csv")
            masks[f"m{i}"] = MaskSettings(file=str(tmp_path / f"{name}{i}.csv"))
        account = ingest(configured(tmp_path, masks=masks, require_rv=False), tmp_path / name).row_account
        counts.append(sum(n for fate, n in account.items() if fate.startswith("cut:mask")))
    assert counts[0] == counts[1] > 10


def test_mask_mistakes_are_named(catalogue, tmp_path):
    path = tmp_path / "m.csv"
    settings = configured(tmp_path, masks={"m": MaskSettings(file=str(path))})
    with pytest.raises(GalrayError, match=r"masks\.m: no such file"):
        ingest(settings, tmp_path / "s")
    path.write_text("ra,dec\n1,2\n")
    with pytest.raises(GalrayError, match=r"masks\.m.*radius"):
        ingest(settings, tmp_path / "s")
    path.write_text("ra,dec,radius\n1,2,3\n1,200,3\n")
    with pytest.raises(GalrayError, match="row 2"):
        ingest(settings, tmp_path / "s")
