"""The whole chain on a tiny mock: star files in, numbers with errors and a report out, all of it recorded."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import galray
from galray import cli, measurement, store_moments
from galray.config import load_config
from galray.console import Console
from galray.errors import GalrayError
from galray.member_stars import sightline_states
from galray.store_gravity import measure_store
from galray.units import GEV_PER_CM3
from tests.chain_config import SMALL_MODELS, write_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> galray.Run:
    """A run from mock to report: two score networks and the moments, tracked in sqlite."""
    return galray.run(write_config(tmp_path_factory.mktemp("chain")), quiet=True, cluster__enabled=False)


@pytest.fixture
def copied(finished: galray.Run, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run that a test may spoil, without its record in MLflow; gives the folder above it."""
    ignore = shutil.ignore_patterns("tracking", "figures", ".lock")
    shutil.copytree(finished.folder, tmp_path / "tiny", ignore=ignore)
    return tmp_path


def mlflow_runs(folder: Path) -> tuple[list[Any], list[Any]]:
    """Parents and children in a folder's MLflow store."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    runs = [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return [run for run in runs if run not in children], children


def test_summary_is_complete(finished: galray.Run) -> None:
    summary = finished.summary
    assert set(summary) >= {
        "run",
        "headline",
        "quantities",
        "budget",
        "catalog",
        "equilibrium",
        "disturbances",
        "checks",
        "members",
        "weights",
        "warnings",
    }
    assert summary["run"]["name"] == "tiny"
    assert summary["run"]["config_hash"] == finished.config.hash
    assert set(summary["run"]["stage_seconds"]) == {"mock", "catalog", "members", "moments", "measure"}
    assert summary["run"]["seconds"] == pytest.approx(sum(summary["run"]["stage_seconds"].values()), abs=0.1)
    rows = Counter((row["name"], row["where"]) for row in summary["quantities"])
    for place in ("Sun", "z=+1 kpc", "z=-1 kpc"):
        for name in ("a_R", "a_z", "a_phi", "rho", "rho_dm"):
            assert rows[name, place] == 3, (name, place)
    assert {row["method"] for row in summary["quantities"]} == {"score", "moments", "combined"}
    assert sum(summary["weights"].values()) == pytest.approx(1)
    assert summary["equilibrium"]["level"] in ("ok", "warn", "fail")
    numbers = summary["equilibrium"]["numbers"]
    for method in ("score", "moments"):
        assert numbers[f"curl of a(x), relative, {method}"] < 1e-3, method
        assert numbers[f"flux of a(x) against its own density, relative, {method}"] < 0.1, method
    assert numbers["a(x) ahead of the Sun against behind, relative, moments"] < 1e-9  # axially symmetric
    assert numbers["a(x) ahead of the Sun against behind, relative, score"] < 1


def test_a_run_is_evaluated_as_its_own_tables_are(finished: galray.Run, tmp_path: Path) -> None:
    from galray.evaluation import RunSource, evaluate
    from galray.positions import read_positions

    sun = finished.config.catalog.frame.build().sun_position
    at = tmp_path / "at.csv"
    at.write_text("x,y,z\n" + ",".join(map(str, sun)) + f"\n{sun[0]},0,1.0\n{sun[0]},0,3.9\n")
    positions = read_positions(at)
    disturbances = finished.summary["disturbances"]
    assert set(disturbances["combined"]) == {"disequilibrium", "non_axisymmetric"}
    for method in ("score", "moments", "combined"):
        found = evaluate(RunSource(finished.folder, method), positions)
        assert (found.num_outside, found.num_without_density) == (0, 1)
        rows = {(r["name"], r["where"]): r for r in finished.summary["quantities"] if r["method"] == method}
        for i, place in enumerate(("Sun", "z=+1 kpc")):
            for name in ("a_R", "a_z", "rho", "rho_dm"):
                row = rows[name, place]
                value, error = found.table[name][i].value, found.table[f"{name}_error"][i].value
                if method == "combined":  # weights and pooled errors see other positions here
                    assert abs(value - row["value"]) < 0.5 * row["error"]
                    assert 0.3 < error / row["error"] < 3
                else:
                    assert value == pytest.approx(row["value"], rel=1e-6), (name, place)
                    assert error == pytest.approx(row["error"], rel=0.25), (name, place)
                assert error > max(sizes[name] for sizes in disturbances[method].values())
        assert found.table.meta["config_hash"] == finished.config.hash
        assert found.table.meta["method"] == method
    with pytest.raises(GalrayError, match="the run has score, moments"):
        RunSource(finished.folder, "flow")


def test_row_account_adds_up(finished: galray.Run) -> None:
    catalog = finished.summary["catalog"]
    assert catalog["rows_in"] == 20_000 == sum(catalog["fate"].values())
    assert catalog["kept"] == catalog["fate"]["kept"] == finished.catalog.num_rows > 10_000
    assert finished.catalog.hash == catalog["hash"] == finished.provenance["input_hash"]
    assert len(finished.catalog.states()) == catalog["kept"]


def test_pulls_are_what_they_say(finished: galray.Run) -> None:
    pulls = 0
    for row in [*finished.summary["quantities"], finished.headline]:
        assert math.isfinite(row["truth"])
        if row["pull"] is None:
            assert row["error"] in (None, 0.0)
            continue
        assert row["pull"] == pytest.approx((row["value"] - row["truth"]) / row["error"])
        pulls += 1
    assert pulls > 30


def test_truth_is_the_mocks(finished: galray.Run) -> None:
    """The headline's truth is the halo that the configuration asks for, a little off where it is averaged."""
    assert finished.config.mock is not None
    halo = finished.config.mock.galaxy.potential.halo_density_msun_pc3
    assert finished.headline["truth"] == pytest.approx(halo, rel=0.05)
    sun = next(r for r in finished.summary["quantities"] if r["name"] == "a_R" and r["where"] == "Sun")
    assert 210 < math.sqrt(-sun["truth"] * 8.122) < 250, "a circular speed"


def test_headline_in_both_units_with_its_terms(finished: galray.Run) -> None:
    top = finished.headline
    assert top["unit"] == "Msun/pc3"
    assert top["value_gev"] == pytest.approx(top["value"] * GEV_PER_CM3)
    assert top["error_gev"] == pytest.approx(top["error"] * GEV_PER_CM3)
    assert 37 < GEV_PER_CM3 < 39
    assert top["error"] > 0
    assert {term["term"] for term in top["terms"]} >= {"network", "statistics", "measurement", "method"}
    total = math.sqrt(sum(term["error"] ** 2 for term in top["terms"]))
    assert total == pytest.approx(top["error"], rel=1e-6), "the terms' squares add up to the total's"


def test_moments_find_the_circular_speed(finished: galray.Run) -> None:
    """16,000 stars and few splines already give a_R at the Sun to some percent."""
    row = next(
        r
        for r in finished.summary["quantities"]
        if (r["name"], r["where"], r["method"]) == ("a_R", "Sun", "moments")
    )
    assert row["value"] == pytest.approx(row["truth"], rel=0.15)


def test_files_of_the_run(finished: galray.Run) -> None:
    folder = finished.folder
    page = (folder / "report.html").read_text()
    assert "tiny" in page
    assert len(page) > 50_000, "figures inside"
    for name in ("profiles.parquet", "maps.parquet", "stars.parquet", "budget.ecsv", "quantities.ecsv"):
        assert (folder / "results" / name).stat().st_size > 0, name
    profiles = pl.read_parquet(folder / "results" / "profiles.parquet")
    assert (
        {"vertical", "radial", "vertical_dm", "radial_dm"}
        >= set(profiles["profile"])
        >= {"vertical", "radial"}
    )
    assert profiles["value"].is_finite().all()
    leftovers = [p.name for p in folder.rglob("*") if p.name.endswith((".tmp", ".part"))]
    assert leftovers == []
    assert len(list((folder / "mock").glob("GaiaSource_*.csv.gz"))) == 1


def test_mlflow_has_one_parent_and_its_children(finished: galray.Run) -> None:
    parents, children = mlflow_runs(finished.folder.parent)
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert [run.info.status for run in children] == ["FINISHED"] * 2
    parent = parents[0]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.data.tags["galray.seed"] for run in children} == {"0", "1"}
    assert parent.data.tags["galray.config_hash"] == finished.config.hash
    assert parent.data.tags["galray.input_hash"] == finished.catalog.hash
    assert parent.data.metrics["rho_dm_average.value"] == pytest.approx(finished.headline["value"])
    assert parent.data.params["mock.galaxy.num_stars"] == "20000"
    of_score = {q["name"]: q["value"] for q in finished.summary["quantities"] if q["method"] == "score"}
    densities = [run.data.metrics["final.rho_dm_average"] for run in children]
    assert np.mean(densities) == pytest.approx(of_score["rho_dm_average"])


def test_field_is_the_mean_of_the_members(finished: galray.Run) -> None:
    run = galray.load_run(finished.folder)
    x = np.array([[-8.122, 0.0, 0.02], [-8.0, 0.5, 1.0], [-9.0, -1.0, -0.5]])
    score, moments = run.field.acceleration(x, "score"), run.field.acceleration(x, "moments")
    assert score.shape == (3, 3)
    members = run.field.members(x, "score")
    assert members.shape == (2, 3, 3)
    assert not np.allclose(members[0], members[1]), "two seeds, two networks"
    assert score == pytest.approx(members.mean(0))
    weights = run.summary["weights"]
    expected = weights["score"] * score + weights["moments"] * moments
    assert run.field.acceleration(x) == pytest.approx(expected)
    with pytest.raises(GalrayError, match="'flow': the run has none"):
        run.field.acceleration(x, "flow")


def test_field_gives_the_numbers_of_the_summary(finished: galray.Run) -> None:
    for row in finished.summary["quantities"]:
        if row["name"] != "a_z" or row["method"] == "combined":
            continue
        found = finished.field.acceleration([row["x"]], row["method"])[0, 2]
        assert row["value"] == pytest.approx(found, rel=1e-6), (row["where"], row["method"])


def test_second_run_skips_everything(
    finished: galray.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*rest: Any) -> None:
        raise AssertionError("a finished member is trained again")

    monkeypatch.setattr(measurement, "run_member", never)
    overrides = ["tracking.enabled=false", "cluster.enabled=false"]
    config = load_config(finished.folder / "config.toml", overrides)
    outcomes = ("summary.json", "report.html", "field.safetensors", "result.json", "manifest.json")
    before = {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*") if p.name in outcomes}
    assert len(before) > 6
    galray.Pipeline(config, Console()).run()
    assert {p: p.stat().st_mtime_ns for p in before} == before
    said = capsys.readouterr().err
    for stage in ("mock", "moments", "measure", "report"):
        assert f"  {stage:<10} unchanged, skipped\n" in said


def test_failed_member_is_left_out_and_told(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "tiny" / "members" / "001")

    def fail(spec: dict[str, Any], folder: str, context: Any) -> dict[str, Any]:
        raise RuntimeError("loss is not finite")

    monkeypatch.setattr(measurement, "run_member", fail)
    config = load_config(
        copied / "tiny" / "config.toml",
        [f"output={copied}", "tracking.enabled=false", "cluster.enabled=false"],
    )
    run = galray.Pipeline(config, Console()).run(until="measure")
    summary = run.summary
    assert [m["status"] for m in summary["members"]] == ["finished", "failed"]
    assert "member 001 (score) failed" in summary["warnings"]
    assert "loss is not finite" in capsys.readouterr().err
    assert "network" not in {t["term"] for t in summary["budget"] if t["method"] == "score"}
    x = [[-8.0, 0.0, 0.5]]
    assert len(run.field.members(x, "score")) == 1
    # The next start tries again, with the same members in the end.
    monkeypatch.undo()
    again = galray.Pipeline(config).run(until="measure").summary
    assert [m["status"] for m in again["members"]] == ["finished", "finished"]
    assert again["warnings"] == []


def test_all_members_failed_is_an_error(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copied / "tiny" / "members")

    def fail(spec: dict[str, Any], folder: str, context: Any) -> dict[str, Any]:
        raise RuntimeError("loss is not finite")

    monkeypatch.setattr(measurement, "run_member", fail)
    config = load_config(
        copied / "tiny" / "config.toml",
        [f"output={copied}", "tracking.enabled=false", "cluster.enabled=false"],
    )
    with pytest.raises(GalrayError, match=r"all 2 members failed; .*loss is not finite") as caught:
        galray.Pipeline(config).run()
    assert "error.txt" in caught.value.remedy


def test_tables_of_a_simulation_through_ray(finished: galray.Run, tmp_path: Path, ray_session: Any) -> None:
    """The same stars as a 6D table in other units give the same field, here on a Ray cluster."""
    table = finished.catalog.table(["source_id", "x", "y", "z", "vx", "vy", "vz"])
    table.with_columns(pl.col("x", "y", "z").cast(pl.Float64) * 1e3).write_parquet(
        tmp_path / "states.parquet"
    )
    path = tmp_path / "states.toml"
    path.write_text(
        f"""
name = "states"
seed = 3
output = "{tmp_path}"
methods = ["moments"]
[catalog]
files = ["{tmp_path}/states.parquet"]
num_shards = 5
states = {{ length_unit = "pc" }}
[ensemble]
moments = {{ seeds = 1, draws = 0 }}
[gravity.baryons]
model = "none"
[tracking]
enabled = false
{SMALL_MODELS}
"""
    )
    config = load_config(path)
    summary = galray.Pipeline(config).run(until="measure").summary
    assert summary["catalog"]["kept"] == finished.catalog.num_rows
    assert {row["method"] for row in summary["quantities"]} == {"moments", "combined"}
    assert summary["headline"]["truth"] is None
    assert summary["headline"]["pull"] is None
    expected = {
        (r["name"], r["where"]): r for r in finished.summary["quantities"] if r["method"] == "moments"
    }
    for row in summary["quantities"]:
        if row["method"] != "moments" or row["name"] not in ("a_R", "a_z", "rho"):
            continue
        same = expected[row["name"], row["where"]]
        assert abs(row["value"] - same["value"]) < 0.02 * same["error"] + 1e-4 * abs(same["value"]), row
    dark = {r["where"]: r["value"] for r in summary["quantities"] if r["name"] == "rho_dm"}
    total = {r["where"]: r["value"] for r in summary["quantities"] if r["name"] == "rho"}
    assert dark == pytest.approx(total), "nothing is subtracted"


def test_gravity_of_a_store_alone(
    finished: galray.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = finished.folder / "shards"
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["galray", "gravity", str(store)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for text in ("a_R", "a_z", "Sun", "moments"):
        assert text in printed
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*")} == before, "nothing is written"


def test_store_without_a_ball_is_refused(finished: galray.Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / "shards", tmp_path / "shards")
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest | {"ball": None}))
    with pytest.raises(GalrayError, match="was not cut at a ball"):
        measure_store(tmp_path / "shards")


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(GalrayError, match="not a run directory"):
        galray.load_run(tmp_path)


def test_overrides_of_the_python_call(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with pytest.raises(GalrayError, match="seeed: unknown key, did you mean 'seed'"):
        galray.run(path, seeed=1)
    with pytest.raises(TypeError, match="overrides go with a file or a name"):
        galray.run(load_config(path), seed=1)
    with pytest.raises(GalrayError, match=r"places\.heights: z=\+3 kpc lies outside the ball of 2 kpc"):
        galray.run(path, catalog={"ball": {"radius_kpc": 2.0}}, places__heights=[3.0])
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.toml"], "nothing is written"


def test_no_gravity_is_told_where_there_were_no_stars(finished: galray.Run) -> None:
    with pytest.raises(GalrayError, match="beyond the ball"):
        finished.field.acceleration([[99.0, 0.0, 0.0]])


def test_members_are_freed_from_the_stars_errors(finished: galray.Run, tmp_path: Path) -> None:
    store = galray.catalog.ShardStore(finished.folder / "shards")
    covariance = galray.catalog.state_covariances(store)
    assert covariance.shape == (store.num_rows, 6, 6)
    # Two redraws of a star differ by twice its errors: the covariances are those of the draws.
    first, second = store.draw(1), store.draw(2)
    _, a, b = np.intersect1d(first.index, second.index, return_indices=True)
    pairs = first.states[a] - second.states[b]
    expected = 2 * np.einsum("nii->ni", covariance)[first.index[a]]
    ratio = np.median(pairs**2 / expected, axis=0) / 0.4549  # the median of χ² with one degree of freedom
    np.testing.assert_allclose(ratio, 1.0, atol=0.12)

    settings = json.loads(load_config(finished.folder / "config.toml").model_dump_json())
    settings["score"]["noise"] = {"treatment": "deconvolve", "draws": 4}
    spec = json.loads(next(finished.folder.glob("members/000*/spec.json")).read_text())
    spec |= {"draw": 1, "streams": spec["streams"] | {"draw": 5}}
    context = {"config": settings, "store": str(store.path)}
    result = measurement.run_member(spec, str(tmp_path), context)
    assert result["epochs"] == 2
    described = json.loads((tmp_path / "model" / "model.json").read_text())
    assert described["settings"]["noise"]["observer"][:3] == list(store.frame.sun_position)
    assert any(name.endswith("of noisy stars") for name in json.loads((tmp_path / "checks.json").read_text()))

    moments = load_config(finished.folder / "config.toml").gravity.moments
    field, _, _ = store_moments.measure_moments(store, moments)
    freed, _, _ = store_moments.measure_moments(store, moments.model_copy(update={"noise": "deconvolve"}))
    change = np.abs(freed.parameters - field.parameters).max() / np.abs(field.parameters).max()
    assert 1e-6 < change < 1.0


def test_stars_without_radial_velocity_train_the_flow(finished: galray.Run, tmp_path: Path) -> None:
    (tmp_path / "blind").mkdir()
    for file in sorted(finished.folder.glob("mock/*.csv.gz")):
        stars = pl.read_csv(file, comment_prefix="#", null_values="null", infer_schema_length=None)
        seen = pl.int_range(pl.len()) % 2 == 0
        columns = [
            pl.when(seen).then(pl.col(c)).alias(c) for c in ("radial_velocity", "radial_velocity_error")
        ]
        stars.with_columns(columns).write_parquet(tmp_path / "blind" / f"{file.name}.parquet")
    config = load_config(finished.folder / "config.toml")
    options = {"files": (str(tmp_path / "blind" / "*.parquet"),), "require_rv": False}
    store = galray.catalog.ingest(config.catalog.model_copy(update=options), tmp_path / "shards")
    assert store.no_rv is not None
    assert store.no_rv.num_rows > 0.8 * store.num_rows
    # What is known of their states is what the whole catalogue says of the same stars.
    w = sightline_states(store)
    names = ["source_id", "x", "y", "z", "vx", "vy", "vz"]
    whole = store.no_rv.table(["source_id"]).join(finished.catalog.table(names), on="source_id", how="left")
    truth = whole.select(names[1:]).cast(pl.Float64).to_numpy()
    known = np.isfinite(truth).all(1)  # the mock has stars without radial velocity of its own
    assert known.sum() > 1000
    truth, w = truth[known], w[known]
    sight = truth[:, :3] - np.array(store.frame.sun_position)
    sight /= np.linalg.norm(sight, axis=1, keepdims=True)
    across = lambda v: v - (v * sight).sum(1, keepdims=True) * sight  # noqa: E731
    np.testing.assert_allclose(w[:, :3], truth[:, :3], atol=1e-4)
    np.testing.assert_allclose(across(w[:, 3:]), across(truth[:, 3:]), atol=0.05)

    settings = json.loads(config.model_dump_json())
    part = {"kind": "gaussians", "hidden": [8], "bins": 3}
    settings["flow"] |= {"missing_rv": "marginalise", "position": part, "velocity": part}
    settings["training"]["flow"]["epochs"] = 2
    settings["catalog"]["require_rv"] = False
    settings["ensemble"]["flow"]["draws"] = 0
    spec = json.loads(next(finished.folder.glob("members/000*/spec.json")).read_text())
    result = measurement.run_member(
        spec | {"family": "flow"}, str(tmp_path / "m"), {"config": settings, "store": str(store.path)}
    )
    assert result["epochs"] == 2
    checks = json.loads((tmp_path / "m" / "checks.json").read_text())
    assert any("with and without radial velocities" in name for name in checks)
    with pytest.raises(GalrayError, match="require_rv = false and ingest"):
        sightline_states(finished.catalog)
    settings["catalog"]["require_rv"] = True
    settings["methods"] = ["flow"]
    with pytest.raises(ValueError, match=r"needs catalog\.require_rv = false"):
        type(config).model_validate(settings)
