"""A blind run shows its densities with a hidden offset, all by the same amount, until it is unblinded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from astropy.table import QTable

import galray
from galray.blinding import hidden_offset
from galray.cli import app
from galray.errors import GalrayError
from galray.pipeline import Pipeline
from galray.positions import Positions
from galray.units import GEV_PER_CM3, MSUN_PC3
from tests.chain_config import write_config

DENSE = ("rho", "rho_dm", "rho_dm_average", "rho_dm_sphere")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run, open and blind."""
    found = {}
    for name, blind in (("open", False), ("hidden", True)):
        folder = tmp_path_factory.mktemp(name)
        path = write_config(folder, name=name)
        found[name] = galray.run(path, quiet=True, cluster__enabled=False, blind=blind)
    return found["open"], found["hidden"]


@pytest.fixture(scope="module")
def offset(runs):
    return hidden_offset(runs[1].config, runs[1].folder)


def _numbers(value, path=()):
    """Every number of a nested structure by its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, (*path, str(key)))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _numbers(item, (*path, str(place)))
    elif isinstance(value, float):
        yield path, value


def measured_densities(run) -> list[float]:
    """What must not be seen: the densities that the run measured, its halo fits among them."""
    rows = [q["value"] for q in run.summary["quantities"] if q["name"] in DENSE]
    profiles = pl.read_parquet(run.folder / "results" / "profiles.parquet")
    dense = profiles.filter(pl.col("quantity").is_in(["rho", "rho_dm"]))["value"].to_list()
    top = run.headline
    halo = [
        p["value"] for fit in run.summary["halo"] for p in fit["parameters"] if p["parameter"] == "density"
    ]
    members = [member["rho_dm_average"] for member in run.summary["members"]]
    return [*rows, *dense, *members, top["value"], top["value_gev"], *halo]


def test_every_density_is_moved_by_the_same_amount_and_nothing_else(runs, offset):
    plain, blind = runs
    assert 0.003 <= abs(offset) <= 0.01
    assert hidden_offset(plain.config, plain.folder) == 0.0
    mine, theirs = ({(q["name"], q["where"], q["method"]): q for q in r.summary["quantities"]} for r in runs)
    assert mine.keys() == theirs.keys()
    for key, entry in mine.items():
        expected = entry["value"] + (offset if key[0] in DENSE else 0.0)
        assert theirs[key]["value"] == pytest.approx(expected, abs=1e-9), key
        assert theirs[key]["error"] == pytest.approx(entry["error"], rel=1e-6), key
        assert theirs[key]["truth"] == entry["truth"]
    assert blind.headline["value_gev"] == pytest.approx((plain.headline["value"] + offset) * GEV_PER_CM3)
    terms = [[t["error"] for t in run.headline["terms"]] for run in runs]
    np.testing.assert_allclose(terms[0], terms[1], rtol=1e-6)
    assert blind.summary["run"]["blind"]
    assert not plain.summary["run"]["blind"]
    maps = [pl.read_parquet(r.folder / "results" / "maps.parquet").filter(quantity="rho") for r in runs]
    np.testing.assert_allclose(maps[1]["value"] - maps[0]["value"], offset, atol=1e-9)


def test_samples_have_the_values_errors_and_correlations_of_the_run(runs):
    for run in runs:
        samples = pl.read_parquet(run.folder / "results" / "rho_dm_samples.parquet")
        rows = {
            f"{q['name']}@{q['where']}": q for q in run.summary["quantities"] if q["method"] == "combined"
        }
        assert samples.height == 1000
        named = [name for name in samples.columns if name in rows]
        assert len(named) > 3
        assert any("vertical" in name for name in samples.columns), "the profile is among them"
        for name in named:
            value, error = rows[name]["value"], rows[name]["error"]
            assert samples[name].std() == pytest.approx(error, rel=0.1)
            assert samples[name].mean() == pytest.approx(value, abs=4 * error / np.sqrt(1000))
        together = np.corrcoef(samples.to_numpy().T)[np.triu_indices(samples.width, 1)]
        assert np.median(np.abs(together)) > 0.1, "positions share stars and methods; 0.03 is chance"


def test_other_ways_to_a_density_are_blind_too(runs, offset):
    from galray.evaluation import RunSource, evaluate
    from galray.gravity import Kernel

    x = np.array([[-8.1, 0.2, 0.6]])
    tables = []
    for run in runs:
        positions = Positions(x, QTable(x, names=("x", "y", "z")), ("x", "y", "z"), "input")
        tables.append(evaluate(RunSource(run.folder), positions).table)
    for name in ("rho", "rho_dm"):
        assert tables[1][name].value[0] - tables[0][name].value[0] == pytest.approx(offset, abs=1e-9)
    assert tables[1]["a_z"] == tables[0]["a_z"]
    assert tables[1].meta["blind"]
    densities = [run.field.mass_density(x, Kernel())[0] for run in runs]
    assert densities[1] - densities[0] == pytest.approx(offset * MSUN_PC3, rel=1e-6)


def test_the_measured_densities_stand_nowhere_in_what_a_blind_run_shows(runs, offset, capsys):
    """Tables, report, figures, provenance, journal of MLflow: searched for numbers, not for words."""
    plain, blind = runs
    secrets = np.array([v for v in measured_densities(plain) if np.isfinite(v) and v != 0])
    allowed = {round(v, 12) for _, v in _numbers(plain.summary) if v is not None}
    texts = {}
    for path in blind.folder.rglob("*"):
        inside = path.relative_to(blind.folder).parts[0]
        if inside in ("mock", "shards", "members", "fields") or not path.is_file():
            continue  # stars, and the raw values of single members, which are no report
        if path.name == "rho_dm_samples.parquet":
            continue  # tens of thousands of draws hit anything; they are looked at by themselves
        if path.suffix == ".parquet":
            frame = pl.read_parquet(path)
            texts[path] = [v for name in frame.columns for v in frame[name].to_list() if isinstance(v, float)]
        elif path.suffix in (".json", ".jsonl", ".ecsv", ".toml", ".html", ".svg", ".txt"):
            words = re.findall(r"[-−]?\d+\.\d+(?:[eE][-+]?\d+)?", path.read_text(errors="replace"))
            texts[path] = [float(word.replace("−", "-")) for word in words]
    assert {path.suffix for path in texts} >= {".json", ".jsonl", ".ecsv", ".html", ".svg", ".parquet"}
    assert allowed
    hidden = {round(float(secret + offset), 12) for secret in secrets}
    for path, values in texts.items():
        shown = np.array([v for v in values if np.isfinite(v) and round(v, 12) not in hidden])
        # Six figures are no accident; the offset itself must not stand there either.
        for secret in (*secrets, offset, -offset):
            near = np.abs(shown - secret) < 2e-6 * abs(secret)
            assert not near.any(), f"{path}: {secret} shows"
    # What the terminal and the page round to: the headline's value at the digits of its error.
    from rich.console import Console

    from galray.report import table

    Console(width=200).print(table(blind.summary))
    printed = capsys.readouterr().out
    assert "blind" in printed
    assert "hidden offset" in (blind.folder / "report.html").read_text()
    from galray.report.sections import Cell

    told = Cell.of(plain.headline).value_text
    if told != Cell.of(blind.headline).value_text:
        assert f"= {told} " not in printed


def test_unblinding_shows_what_the_open_run_shows(runs):
    from typer.testing import CliRunner

    plain, blind = runs
    with pytest.raises(GalrayError, match="was never blind"):
        Pipeline(plain.here).unblind()
    trained = {p: p.stat().st_mtime_ns for p in (blind.folder / "members").rglob("*") if p.is_file()}
    told = CliRunner().invoke(app, ["unblind", str(blind.folder)])
    assert told.exit_code == 0, told.output
    assert "hidden offset" not in told.output
    again = galray.load_run(blind.folder)
    assert again.headline["value"] == pytest.approx(plain.headline["value"], abs=1e-12)
    assert "hidden offset" not in (blind.folder / "report.html").read_text()
    assert json.loads((blind.folder / "unblinded.json").read_text())["unblinded"]
    assert {p: p.stat().st_mtime_ns for p in trained} == trained, "nothing is trained again"
    with pytest.raises(GalrayError, match="unblinded already"):
        Pipeline(again.here).unblind()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{blind.folder.parent}/mlflow.db")
    (parent,) = [
        r
        for e in client.search_experiments()
        for r in client.search_runs([e.experiment_id])
        if "mlflow.parentRunId" not in r.data.tags
    ]
    history = client.get_metric_history(parent.info.run_id, "rho_dm_average.value")
    assert [m.value for m in history][-1] == pytest.approx(plain.headline["value"])
    assert all(m.value != pytest.approx(plain.headline["value"]) for m in history[:-1])
    assert parent.data.tags["galray.blind"] == "false"
    assert Path(parent.info.artifact_uri.removeprefix("file://")).is_dir()
