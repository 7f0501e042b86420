"""The plan of a thousand members says what the measured ones have cost, times a thousand."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

import galray
from galray.cli import app
from galray.config import load_config
from galray.ensemble_plan import ensemble_plan, measured_costs
from galray.errors import GalrayError
from tests.chain_config import write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = write_config(tmp_path_factory.mktemp("plan"))
    return galray.run(path, quiet=True, cluster__enabled=False, tracking__enabled=False)


THOUSAND = [
    "ensemble.score={ seeds = 400, bootstraps = 300, draws = 300 }",
    "ensemble.gpus_per_member=0.25",
    "name='large'",
]


def _number(text: str) -> float:
    return float(re.search(r"[\d.,]+(?:e[+-]?\d+)?", text)[0].replace(",", ""))


def test_costs_are_those_of_the_members(run):
    cost = measured_costs(run)["score"]
    folders = sorted((run.folder / "members").glob("00?"))
    seconds = [json.loads((f / "result.json").read_text())["seconds"] for f in folders]
    assert cost.members == len(folders) == 2
    assert cost.seconds(cost.stars, 2) == pytest.approx(sum(seconds) / 2)
    assert cost.seconds(2 * cost.stars, 4) > cost.seconds(cost.stars, 2)
    curve = json.loads((folders[0] / "curve.json").read_text())
    assert cost.epoch_points == len(curve[0]) - 1
    assert cost.weights_bytes < cost.bytes


def test_a_thousand_members(run):
    config = load_config(run.folder / "config.toml", THOUSAND)
    cost = measured_costs(run)["score"]
    lines = ensemble_plan(config, run.folder)
    hours = 1000 * cost.seconds(run.catalog.num_rows, 2) / 3600
    assert lines["score"].startswith("1,000 members (base 1, seed 399, bootstrap 300, draw 300)")
    assert _number(lines["CPU-hours"]) == pytest.approx(hours, rel=1e-3)
    assert _number(lines["GPU-hours"]) == pytest.approx(hours / 4, rel=1e-3)
    assert _number(lines["storage"]) == pytest.approx(1000 * cost.bytes / 1e9, rel=1e-2)
    off = ensemble_plan(config, run.folder)["MLflow"]
    assert off == "off", "as in the run that was measured"
    logged = load_config(run.folder / "config.toml", [*THOUSAND, "tracking.enabled=true"])
    points = 1000 * cost.points(2)
    assert ensemble_plan(logged, run.folder)["MLflow"] == f"1,001 runs, {points:,.0f} points"
    larger = load_config(run.folder / "config.toml", [*THOUSAND, "mock.galaxy.num_stars=40000"])
    assert _number(ensemble_plan(larger, run.folder)["CPU-hours"]) > hours


def test_the_command_writes_nothing_and_wants_something_measured(run):
    words = ["ensemble", str(run.folder / "config.toml"), "--dry-run"]
    options = [word for text in THOUSAND for word in ("--set", text)]
    told = CliRunner().invoke(app, [*words, *options, "--rates", str(run.folder)])
    assert told.exit_code == 0, told.output
    assert "1,000 members" in told.output
    assert not (run.folder.parent / "large").exists()
    with pytest.raises(GalrayError, match="no run to measure by"):
        ensemble_plan(load_config(run.folder / "config.toml", THOUSAND))
    flow = load_config(run.folder / "config.toml", [*THOUSAND, "methods=['flow']"])
    with pytest.raises(GalrayError, match="no finished member of flow"):
        ensemble_plan(flow, run.folder)
