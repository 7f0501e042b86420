"""A store in numbers and figures, against plain calculations."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import polars as pl
import pytest

from galray.catalog import CatalogSettings, ingest, summarize
from galray.catalog.summary import PROBABILITIES
from galray.frame import cylindrical
from galray.report import catalog as figures
from tests.catalog_stars import stars


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    stars(5000).write_parquet(folder / "t.parquet")
    settings = CatalogSettings(
        files=(str(folder / "t.parquet"),), num_shards=3, require_rv=False, cuts={"ruwe": 1.4}
    )
    return ingest(settings, folder / "store")


@pytest.fixture(scope="module")
def summary(store):
    return summarize(store)


def test_numbers(store, summary):
    table = store.table()
    assert (summary.num_stars, summary.num_shards) == (store.num_rows, 3)
    assert summary.account == store.row_account
    assert summary.no_rv.num_stars == store.no_rv.num_rows
    w = store.states(dtype=np.float64)
    x, v = cylindrical(w)[..., :3], cylindrical(w)[..., 3:]
    truth = {
        "distance": np.linalg.norm(w[:, :3] - np.array(store.frame.sun_position), axis=1),
        "R": x[:, 0],
        "z": w[:, 2],
        "v_R": v[:, 0],
        "v_phi": v[:, 1],
        "v_z": w[:, 5],
        "phot_g_mean_mag": table["phot_g_mean_mag"].to_numpy(),
        "bp_rp": table["bp_rp"].to_numpy(),
    }
    truth["absolute_g_mag"] = truth["phot_g_mean_mag"] - 5 * np.log10(truth["distance"]) - 10
    assert set(summary.distributions) == set(truth)
    for name, values in truth.items():
        found = summary.distributions[name]
        exact = np.quantile(values, PROBABILITIES, method="inverted_cdf")
        assert found.quantiles == pytest.approx(exact, abs=1e-3 * np.ptp(exact).item()), name
        assert found.num_values == len(values)
        assert 0.98 * len(values) < found.counts.sum() <= len(values)
        assert len(found.edges) == len(found.counts) + 1
    assert summary.distributions["phot_g_mean_mag"].counts.sum() == store.num_rows, "no magnitude is left out"
    assert summary.sky_counts.sum() == store.num_rows
    assert len(summary.sky_counts) == 12 * 4**summary.sky_level
    assert 0.97 * store.num_rows < summary.diagram.sum() <= store.num_rows
    assert "v_R" not in summary.no_rv.distributions


def test_numbers_as_json(summary):
    read = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert read["num_stars"] == summary.num_stars
    assert read["distributions"]["v_phi"]["quantiles"]["0.5"] == summary.distributions["v_phi"].quantiles[2]
    assert sum(read["sky"]["counts"]) == summary.num_stars
    assert read["no_rv"]["kind"] == "no_rv"


def test_figures(summary, tmp_path):
    written = figures.write_figures(summary, tmp_path / "figures")
    names = {"sky", "magnitudes", "distances", "velocities", "colour_magnitude", "rows"}
    assert {path.stem for path in written} == names
    for path in written:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    before = {path: path.read_bytes() for path in written}
    figures.write_figures(summary, tmp_path / "figures")
    assert all(path.read_bytes() == content for path, content in before.items()), "the same figure every time"


def test_sky_map_puts_stars_where_they_are(tmp_path):
    """A cloud at l = 90°, b = 45° lies left of the centre and above it."""
    rng = np.random.default_rng(2)
    sun = np.array([-8.1219733661223, 0, 0.0208])
    toward = np.array([0.0, np.sqrt(0.5), np.sqrt(0.5)])
    w = np.concatenate([sun + 3 * toward + rng.normal(0, 0.01, (500, 3)), rng.normal(0, 30, (500, 3))], -1)
    pl.DataFrame(w, schema=["x", "y", "z", "vx", "vy", "vz"]).write_parquet(tmp_path / "t.parquet")
    settings = CatalogSettings(files=(str(tmp_path / "t.parquet"),), num_shards=2)
    found = summarize(ingest(settings, tmp_path / "store"))
    assert found.diagram is None
    assert "phot_g_mean_mag" not in found.distributions
    assert figures.magnitudes(found) is None
    assert figures.colour_magnitude(found) is None
    image = figures.sky_map(found).axes[0].images[0]
    rows, columns = np.nonzero(~image.get_array().mask)
    left, right, bottom, top = image.get_extent()
    height, width = image.get_array().shape
    x = left + (columns.mean() + 0.5) / width * (right - left)
    y = bottom + (rows.mean() + 0.5) / height * (top - bottom)
    theta = 0.59  # 2θ + sin 2θ = π sin 45°
    assert x == pytest.approx(-np.sqrt(2) * np.cos(theta), abs=0.15)
    assert y == pytest.approx(np.sqrt(2) * np.sin(theta), abs=0.15)


def test_on_ray_the_same(store, summary, ray_session):
    assert summarize(store).to_dict() == summary.to_dict()


def test_shards_without_spread(tmp_path):
    """One star, and one value for all: nothing is divided by a range of zero."""
    stars(1, rv_fraction=1.0).write_parquet(tmp_path / "t.parquet")
    settings = CatalogSettings(files=(str(tmp_path / "t.parquet"),), num_shards=3)
    found = summarize(ingest(settings, tmp_path / "store"))
    assert found.num_stars == 1
    assert found.distributions["v_phi"].counts.sum() == 1
    assert len(figures.write_figures(found, tmp_path / "figures")) == 6
