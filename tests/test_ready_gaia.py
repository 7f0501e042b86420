"""The ready configurations for Gaia's whole catalogue: valid, planned, selecting what they say."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from galray.catalog import ingest, write_gaia_source
from galray.cli import app
from galray.config import load_config, ready_configs
from tests.catalog_stars import stars

NAMES = ("gaia_dr3_4kpc", "gaia_dr3_red_clump", "gaia_dr4")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stars with all columns of DR3, among them giants and dwarfs at every distance."""
    folder = tmp_path_factory.mktemp("dr3")
    table = stars(4000, rv_fraction=1).with_columns(
        (pl.int_range(pl.len()) % 7 * 0.4 + 0.2).cast(pl.Float32).alias("bp_rp"),
        (8 + pl.int_range(pl.len()) % 9).cast(pl.Float32).alias("phot_g_mean_mag"),
        (7.5 + pl.int_range(pl.len()) % 9).cast(pl.Float32).alias("grvs_mag"),
        pl.lit(100.0).alias("parallax_over_error"),
        pl.lit(31).alias("astrometric_params_solved"),
        pl.lit(1.5).alias("nu_eff_used_in_astrometry"),
        pl.lit(10.0).alias("ecl_lat"),
    )
    write_gaia_source(table, folder)
    return str(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_ready_configuration_plans_its_run(name: str, files: str, tmp_path: Path) -> None:
    assert name in ready_configs()
    text = ready_configs()[name].read_text()
    assert "galray's own choice" in text
    local = ["--set", f"catalog.files={files}", "--set", f"output={tmp_path}", "--dry-run"]
    found = CliRunner().invoke(app, ["run", name, *local])
    assert found.exit_code == 0, found.output
    assert "moments 6" in found.output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_ready_selection_keeps_what_it_says(name: str, files: str, tmp_path: Path) -> None:
    config = load_config(name, [f"catalog.files={files}", "catalog.num_shards=2", 'catalog.views=["shards"]'])
    cut = config.catalog
    store = ingest(cut, tmp_path / "store")
    account = store.row_account
    assert account["rows_in"] == sum(count for fate, count in account.items() if fate != "rows_in")
    assert 0 < store.num_rows < 4000
    assert {"cut:ruwe", "cut:tracer", "cut:ball"} <= account.keys()
    kept = store.table(["bp_rp", "parallax", "grvs_mag"])
    assert cut.completeness is not None
    assert cut.ball is not None
    limit = cut.completeness.limit - 5 * pl.Series([cut.ball.radius_kpc * 100]).log10()[0]
    brightest = kept["grvs_mag"] + 5 * (kept["parallax"] / 100).log10()
    assert brightest.max() < limit + 0.1  # the zero point of the parallax moves it a little
    assert kept["bp_rp"].min() >= 0.5
