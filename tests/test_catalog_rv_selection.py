"""The fraction with radial velocity: recovered where it is known, additive, stored and checked."""

import json

import numpy as np
import polars as pl
import pytest

from galray.catalog import CatalogSettings, RVSelection, RVSelectionSettings, ShardStore, ingest
from galray.catalog.rvs_selection import RVTally
from galray.errors import GalrayError
from tests.catalog_stars import stars


def known_fraction(g, bp_rp, ra, dec):
    """Falls with magnitude, sooner for blue stars, and is patchy on the sky."""
    patch = 0.6 * np.sin(np.radians(ra)) * np.cos(np.radians(dec)) + 0.3 * np.sin(np.radians(3 * ra))
    return 0.95 / (1 + np.exp(1.5 * (g - 13.0 - 0.4 * (bp_rp - 1) - patch)))


def mock(n, seed=0):
    rng = np.random.default_rng(seed)
    g = 16 - rng.exponential(1.5, n).clip(0, 10)
    bp_rp = rng.normal(1.1, 0.4, n)
    ra, dec = rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))
    truth = known_fraction(g, bp_rp, ra, dec)
    table = pl.DataFrame(
        {
            "source_id": np.arange(1, n + 1),
            "ra": ra,
            "dec": dec,
            "phot_g_mean_mag": g,
            "bp_rp": bp_rp,
            "has_rv": rng.random(n) < truth,
            "truth": truth,
        }
    )
    return table


SETTINGS = RVSelectionSettings(
    healpix_level=2,
    magnitude_edges=tuple(8 + 0.5 * i for i in range(17)),
    colour_edges=(0.8, 1.1, 1.4),
)


@pytest.fixture(scope="module")
def counted():
    table = mock(400_000)
    tally = RVTally(SETTINGS)
    for part in table.iter_slices(70_000):
        tally.add(part)
    return table, RVSelection(SETTINGS, tally.counts())


def test_known_fraction_is_recovered_within_its_errors(counted):
    table, selection = counted
    value, error = selection.fraction(table)
    cells = SETTINGS.cells(*(table[n].to_numpy() for n in ("phot_g_mean_mag", "bp_rp", "ra", "dec")))
    frame = table.with_columns(cell=pl.Series(cells), f=pl.Series(value), e=pl.Series(error))
    # What a cell's estimate is of: the mean truth of the stars in it.
    by_cell = frame.group_by("cell").agg(pl.len(), pl.col("truth", "f", "e").mean())
    pull = ((by_cell["f"] - by_cell["truth"]) / by_cell["e"]).to_numpy()
    for few, many in ((1, 5), (5, 15), (15, 50), (50, 10**6)):
        chosen = (by_cell["len"] >= few).to_numpy() & (by_cell["len"] < many).to_numpy()
        assert chosen.sum() > 100, (few, many)
        # Where there are next to no stars the errors are on the safe side.
        assert (0.3 if many == 5 else 0.6) < np.mean(pull[chosen] ** 2) < 1.4, (few, many)
        assert abs(np.mean(pull[chosen])) < 0.15
    # Closer to the truth than the counts alone and than the all-sky fraction at that magnitude and colour.
    raw = frame.group_by("cell").agg(raw=pl.col("has_rv").mean())
    sky = selection.with_rv.sum(0) / np.maximum(selection.stars.sum(0), 1)
    flat = np.broadcast_to(sky, SETTINGS.shape).reshape(-1)
    both = by_cell.join(raw, on="cell").with_columns(flat=pl.Series(flat[by_cell["cell"].to_numpy()]))
    ours, theirs, coarse = (
        both.select(((pl.col(c) - pl.col("truth")) ** 2 * pl.col("len")).sum() / pl.col("len").sum()).item()
        for c in ("f", "raw", "flat")
    )
    assert ours < 0.6 * theirs
    assert ours < 0.6 * coarse


def test_a_second_draw_of_the_sky_is_predicted(counted):
    """Numbers with velocity in a catalogue that was not counted: chi-square by magnitude and by sky."""
    _, selection = counted
    fresh = mock(200_000, seed=5)
    value, _ = selection.fraction(
        tuple(fresh[n].to_numpy() for n in ("phot_g_mean_mag", "bp_rp", "ra", "dec"))
    )
    frame = fresh.with_columns(f=pl.Series(value), g=(pl.col("phot_g_mean_mag") * 2).floor())
    sky = RVSelectionSettings(healpix_level=0).pixels(fresh["ra"].to_numpy(), fresh["dec"].to_numpy())
    frame = frame.with_columns(sky=pl.Series(sky))
    for key in ("g", "sky"):
        groups = frame.group_by(key).agg(
            n=pl.len(),
            k=pl.col("has_rv").sum(),
            e=pl.col("f").sum(),
            v=(pl.col("f") * (1 - pl.col("f"))).sum(),
        )
        groups = groups.filter(pl.col("v") > 20)
        # The estimate's own counting noise is that of twice as many stars.
        chi = ((groups["k"] - groups["e"]) ** 2 / (1.5 * groups["v"])).to_numpy()
        assert np.mean(chi) < 1 + 4 * np.sqrt(2 / len(chi))


def test_empty_cells_repeat_their_surroundings(counted):
    _, selection = counted
    # No star is as bright as this, none as faint as that.
    bright, error = selection.fraction((5.1, 1.0, 10.0, 10.0))
    assert 0.5 < bright[0] < 1
    assert error[0] > 0.01
    nowhere, wide = selection.fraction((25.0, np.nan, 10.0, 10.0))
    assert nowhere[0] == pytest.approx(0.5, abs=0.01)
    assert wide[0] > 0.2


def test_tallies_add_up_however_they_are_cut(tmp_path):
    table = mock(30_000)
    whole = RVTally(SETTINGS)
    whole.add(table)
    paths = []
    for i, part in enumerate(table.sort("ra").iter_slices(7000)):
        piece = RVTally(SETTINGS)
        piece.add(part)
        piece.write(tmp_path / f"{i}.parquet")
        paths.append(tmp_path / f"{i}.parquet")
    assert RVTally.merge(SETTINGS, paths).counts().equals(whole.counts())
    assert whole.counts()["stars"].sum() == 30_000


def test_cells_by_source_id_are_those_by_place():
    table = stars(5000).rename({"has_rvs": "has_rv"})
    by_id, by_place = RVTally(SETTINGS), RVTally(SETTINGS)
    by_id.add(table)
    by_place.add(table.with_columns(source_id=pl.int_range(pl.len())))
    assert by_id.counts().equals(by_place.counts())


def test_missing_magnitudes_have_cells_of_their_own():
    table = mock(1000).with_columns(bp_rp=pl.lit(None, dtype=pl.Float64))
    tally = RVTally(SETTINGS)
    tally.add(table)
    tally.add(table.drop("phot_g_mean_mag", "bp_rp"))
    selection = RVSelection(SETTINGS, tally.counts())
    assert selection.stars[..., -1].sum() == 2000
    assert selection.stars[:, -1, -1].sum() == 1000


@pytest.fixture
def catalogue(tmp_path):
    table = stars(3000, rv_fraction=0.4)
    table = table.with_columns(
        ruwe=pl.when(pl.int_range(pl.len()) % 5 == 0).then(2.0).otherwise(1.0),
        parallax=pl.when(pl.int_range(pl.len()) % 7 == 0).then(-1.0).otherwise("parallax"),
    )
    (tmp_path / "in").mkdir()
    for i, part in enumerate(table.iter_slices(1000)):
        part.write_parquet(tmp_path / "in" / f"{i}.parquet")
    return table


@pytest.mark.parametrize("require_rv", [True, False])
def test_counted_after_the_quality_cuts_and_before_the_others(catalogue, tmp_path, require_rv):
    settings = CatalogSettings(
        files=(str(tmp_path / "in"),),
        num_shards=2,
        require_rv=require_rv,
        cuts={
            "ruwe": 1.4,
            "rv_error": 1.0,
            "near": "distance < 2",
            "above": "z > 0",
            "bright_rvs": "grvs_mag < 10",
        },
        rv_selection=RVSelectionSettings(healpix_level=3),
    )
    store = ingest(settings, tmp_path / "s")
    selection = store.rv_selection
    good = catalogue.filter(pl.col("ruwe") < 1.4)
    assert selection.stars.sum() == good.height
    assert selection.with_rv.sum() == good["radial_velocity"].is_not_nan().sum()
    assert selection.about["cuts"] == {"ruwe": "ruwe < 1.4"}
    value, error = selection.fraction(store.table())
    assert np.all((value > 0.2) & (value < 0.6) & (error > 0))
    assert store.verify()["rows"] == store.num_rows
    account = store.row_account
    assert account.pop("rows_in") == sum(account.values())


def test_stored_with_checksums_and_the_same_for_any_cutting_of_files(catalogue, tmp_path):
    def run(name, **options):
        settings = CatalogSettings(files=(str(tmp_path / name),), num_shards=2, **options)
        return ingest(settings, tmp_path / f"store-{name}")

    (tmp_path / "one").mkdir()
    catalogue.write_parquet(tmp_path / "one" / "all.parquet")
    first, second = run("in"), run("one")
    assert first.manifest["selection"] == second.manifest["selection"]
    assert {*first.manifest["selection"]} == {"rv_fraction.json", "rv_fraction.parquet"}
    path = first.path / "selection" / "rv_fraction.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(GalrayError, match=r"rv_fraction\.parquet.*checksum"):
        first.verify()
    path.unlink()
    with pytest.raises(GalrayError, match="selection cannot be read"):
        _ = ShardStore(first.path).rv_selection
    assert run("in").verify()["shards"] == 2
    about = json.loads((second.path / "selection" / "rv_fraction.json").read_text())
    assert RVSelectionSettings.model_validate(about["cells"]) == RVSelectionSettings()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="edges must rise"):
        RVSelectionSettings(colour_edges=(1.0, 0.5))
    with pytest.raises(ValueError, match="too many"):
        RVSelectionSettings(
            healpix_level=5, magnitude_edges=tuple(range(100)), colour_edges=tuple(range(100))
        )
    selection = RVSelection(SETTINGS, RVTally(SETTINGS).counts())
    with pytest.raises(GalrayError, match="no column 'bp_rp'"):
        selection.fraction(pl.DataFrame({"phot_g_mean_mag": [1.0], "ra": [1.0], "dec": [1.0]}))


def test_comparison_tells_the_true_selection_from_a_wrong_one(counted):
    table, selection = counted
    columns = [table[name].to_numpy() for name in ("phot_g_mean_mag", "bp_rp", "ra", "dec")]
    right = selection.compare(table, known_fraction(*columns))
    assert right["cells"] > 200
    assert abs(right["mean_difference"]) < 4 * right["mean_difference_error"]
    assert right["reduced_chi2"] < 1.5
    wrong = selection.compare(table, known_fraction(columns[0] + 0.6, *columns[1:]))
    assert wrong["mean_difference"] < -0.02
    assert wrong["reduced_chi2"] > 3
    with pytest.raises(GalrayError, match="one fraction for each star"):
        selection.compare(table, [0.5])
    with pytest.raises(GalrayError, match="outside 0 … 1"):
        selection.compare(table, np.full(table.height, 1.5))
