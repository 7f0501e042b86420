"""What a run says of itself before it starts, and what a part says of the whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from galray.cli import app
from galray.config import load_config
from galray.errors import GalrayError
from galray.planning import extrapolate, parse_fraction, plan, preflight, sample_config, wanted_members
from tests.catalog_stars import stars
from tests.chain_config import write_config


@pytest.mark.parametrize(
    ("text", "fraction"),
    [("1%", 0.01), ("0.01", 0.01), ("100%", 1.0), ("1", 1.0), (" 2.5 % ", 0.025), ("1e-3", 0.001)],
)
def test_fractions(text: str, fraction: float) -> None:
    assert parse_fraction(text) == pytest.approx(fraction)


@pytest.mark.parametrize("text", ["0", "0%", "101%", "2", "-1%", "one", "", "%", "1..2", "1%%", "nan", "inf"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(GalrayError, match="not a part of the whole") as caught:
        parse_fraction(text)
    assert "1%" in caught.value.remedy


def test_sample_of_a_mock_generates_a_part(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, num_stars=20_000))
    part = sample_config(config, "5%")
    assert part.mock is not None
    assert part.mock.galaxy.num_stars == 1000
    assert part.catalog == config.catalog
    assert part.name == "tiny-sample-5pct"
    assert part.hash != config.hash
    assert load_config(write_config(tmp_path), [f"name={part.name}"]).name == part.name, "the name is legal"


def test_sample_of_files_keeps_a_part(tmp_path: Path) -> None:
    stars(50).write_parquet(tmp_path / "stars.parquet")
    path = tmp_path / "files.toml"
    path.write_text(
        f'name = "files"\nmethods = ["moments"]\n[catalog]\nfiles = ["{tmp_path}/stars.parquet"]\n'
        "sample = 0.5\nball = { radius_kpc = 4 }\n"
    )
    part = sample_config(load_config(path), "10%")
    assert part.catalog.sample == pytest.approx(0.05)


def test_plan_of_a_mock(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["mock.rows_per_file=7000"])
    lines = plan(config)
    assert lines["files"].startswith("3 or more, generated: 20,000 mock stars")
    assert lines["members"] == "score 2, moments 2"
    assert lines["shards"] == "5"
    assert str(config.run_dir) in lines["run"]
    assert "1 training worker(s)" in lines["devices"]
    assert lines["tracking"] == "sqlite beside the run directory"
    assert not config.run_dir.exists()


def test_plan_of_files_counts_them_and_their_bytes(tmp_path: Path) -> None:
    for i in range(3):
        stars(40, seed=i).write_parquet(tmp_path / f"{i}.parquet")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
    config = load_config(
        "gaia_dr2_local",
        [f"catalog.files={tmp_path}/*.parquet", 'catalog.keep_columns=["ruwe"]', "tracking.enabled=false"],
    )
    lines = plan(config)
    assert lines["files"] == "3"
    assert lines["bytes"] == f"{size:,}"
    assert lines["members"] == "none"
    assert lines["tracking"] == "off"


def test_only_the_methods_of_the_run_have_members(tmp_path: Path) -> None:
    designed = wanted_members(load_config(write_config(tmp_path)))
    assert (designed.flow.count, designed.score.count, designed.moments.count) == (0, 2, 2)


def files_config(folder: Path, table: pl.DataFrame, *overrides: str) -> Any:
    table.write_parquet(folder / "stars.parquet")
    path = folder / "files.toml"
    path.write_text(
        f'name = "files"\nmethods = ["moments"]\n[catalog]\nfiles = ["{folder}/stars.parquet"]\n'
        "ball = { radius_kpc = 4 }\n"
    )
    return load_config(path, list(overrides))


def states(n: int = 20) -> pl.DataFrame:
    return pl.DataFrame(np.ones((n, 6)), schema=["x", "y", "z", "vx", "vy", "vz"])


def test_preflight_accepts_what_can_run(tmp_path: Path) -> None:
    preflight(files_config(tmp_path, stars(20)))
    preflight(files_config(tmp_path, states(), "ensemble.moments.draws=0"))
    preflight(load_config("demo"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("catalog.files=/nowhere/*.csv.gz", "'/nowhere/*.csv.gz' matches no file"),
        (
            "catalog.keep_columns=colour",
            "stars.parquet: catalog.keep_columns: the file has no column 'colour'",
        ),
        ("catalog.cuts.blue=colour < 1", "colour"),
        ("catalog.weight_column=mass", "catalog.weight_column: the file has no column 'mass'"),
        ("catalog.num_shards=2", "catalog.num_shards = 2: a jackknife leaves out one shard at a time"),
        ("catalog.ball.radius_kpc=1.2", "places.heights: z=+1.5 kpc lies outside the ball of 1.2 kpc"),
        ("gravity.baryons.model=potential", "baryons.model = 'potential' without a potential"),
        ("ensemble.moments={seeds = 0}", "methods: moments has no members"),
        ("ensemble.moments={seeds = 2}", "ensemble.moments.seeds = 2"),
        ('methods=["flow"]', "flow"),
    ],
)
def test_preflight_sees_the_mistake(tmp_path: Path, override: str, words: str) -> None:
    overrides = [override] + (["ensemble.flow={seeds = 0}"] if "flow" in words else [])
    config = files_config(tmp_path, stars(20), *overrides)
    with pytest.raises(GalrayError) as caught:
        preflight(config)
    assert words in caught.value.what
    assert caught.value.remedy


def test_preflight_looks_into_every_one_of_a_few_files(tmp_path: Path) -> None:
    config = files_config(tmp_path, stars(20), f"catalog.files={tmp_path}/*.parquet")
    stars(20).drop("pmra").write_parquet(tmp_path / "zz_broken.parquet")
    with pytest.raises(GalrayError, match=r"zz_broken\.parquet.*pmra"):
        preflight(config)


@pytest.mark.parametrize("name", ["aa_first", "zz_last"])
def test_preflight_forgives_as_many_files_as_may_be_bad(tmp_path: Path, name: str) -> None:
    config = files_config(tmp_path, stars(20), f"catalog.files={tmp_path}/*.parquet", "catalog.allow_bad=1")
    (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    preflight(config)
    assert plan(config)["files"] == "2"
    stars(20).drop("pmra").write_parquet(tmp_path / f"{name}_too.parquet")
    with pytest.raises(GalrayError, match=name):
        preflight(config)


def test_preflight_refuses_when_no_file_is_good(tmp_path: Path) -> None:
    config = files_config(tmp_path, stars(20).drop("pmra"), "catalog.allow_bad=9")
    with pytest.raises(GalrayError, match="pmra"):
        preflight(config)


def test_tables_of_a_simulation_have_no_errors_to_draw(tmp_path: Path) -> None:
    with pytest.raises(GalrayError, match=r"ensemble\.moments\.draws = 2: 6D tables have no errors"):
        preflight(files_config(tmp_path, states()))


def test_a_file_that_is_not_gaias(tmp_path: Path) -> None:
    with pytest.raises(GalrayError, match="neither a Gaia source table"):
        preflight(files_config(tmp_path, pl.DataFrame({"alpha": [1.0], "beta": [2.0]})))


def finished_part(tmp_path: Path, config: Any) -> Any:
    """A run on a part: one member of 3 s, of which its epochs took 1 s."""
    member = tmp_path / "run" / "members" / "000"
    member.mkdir(parents=True)
    (member / "result.json").write_text('{"seconds": 3.0}')
    (member / "curve.json").write_text('[{"seconds": 0.5}, {"seconds": 1.0}]')
    return SimpleNamespace(
        folder=tmp_path / "run",
        stage_seconds={"mock": 1.0, "catalog": 2.0, "members": 3.0, "moments": 4.0, "measure": 60.0},
        provenance={"machine": {"cores": 4}},
        config=config,
    )


def test_extrapolation_scales_what_passes_over_the_stars(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["cost.dollars_per_core_hour=9"])
    measured, whole = extrapolate(finished_part(tmp_path, config), "1%")
    assert measured == "measured on 1%: mock 1 s, catalog 2 s, members 3 s, moments 4 s, measure 60 s"
    # 100 times mock, catalog, moments and the epochs (8 s), once the rest (62 s): 862 s on four cores.
    assert "14.4 min on 4 cores, 0.96 core-hours, about 8.62 dollars at 9 per core-hour" in whole


def test_extrapolation_knows_that_files_are_read_whole(tmp_path: Path) -> None:
    stars(20).write_parquet(tmp_path / "a.parquet")
    config = files_config(tmp_path, stars(20))
    _, whole = extrapolate(finished_part(tmp_path, config), "1%")
    # 100 times moments and epochs (5 s), once the rest (65 s).
    assert "9.4 min on 4 cores" in whole


def test_cut_on_a_column_that_the_mock_will_not_have_is_refused(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ['catalog.cuts.mine="no_such_column < 3"'])
    with pytest.raises(GalrayError, match="no_such_column"):
        preflight(config)


def test_dry_run_of_a_part_is_of_the_part(tmp_path: Path) -> None:
    path = str(write_config(tmp_path, num_stars=20_000))
    shown = CliRunner().invoke(app, ["run", path, "--sample", "10%", "--dry-run"])
    assert "2,000 mock stars" in shown.output
    refused = CliRunner().invoke(app, ["run", path, "--sample", "200%", "--dry-run"])
    assert isinstance(refused.exception, GalrayError)
