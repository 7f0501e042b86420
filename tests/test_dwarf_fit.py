"""Whole fits of mock galaxies: products, run directory, going on, failures, MLflow runs, a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galray.catalog.lease import LEASE
from galray.catalog.mirror import SCRATCH, Mirror
from galray.config import overrides_of, validate_settings
from galray.errors import GalrayError
from galray.galaxies.config import DwarfConfig, load_dwarf_config
from galray.galaxies.members import load_posterior
from galray.galaxies.run import Job, find_jobs, fit_galaxies, fit_galaxy
from tests.waiting import wait_for

SMALL = [
    "fit.sampler.chains=6",
    "fit.sampler.warmup=40",
    "fit.sampler.draws=50",
    "fit.sampler.samples=200",
    "products.num_radii=9",
    "members.longer=0",
]
"""A sampler too short to converge, long enough to exercise the chain."""
INSIDE = ["members.concurrent=0", "tracking.enabled=false"]


def small(tmp_path: Path, *more: str) -> DwarfConfig:
    options = [f"output={tmp_path}", "mock.num_stars=150", *SMALL, *INSIDE, *more]
    return load_dwarf_config("plumcoreom", options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One mock galaxy with a member of each kind."""
    folder = tmp_path_factory.mktemp("dwarf")
    config = small(folder, "members.seeds=2", "members.bootstraps=1", "members.smoothness=false")
    return fit_galaxy(config)


def test_the_products_of_a_mock(fitted: tuple[Any, Path]) -> None:
    result, _ = fitted
    assert [member["what"] for member in result.members] == ["seed 0", "seed 1", "bootstrap 1", "velocities"]
    assert all(member["status"] == "finished" for member in result.members)
    rho = result.quantity("rho_dm_150pc")
    assert rho.truth == pytest.approx(2.63e8, rel=0.01)
    assert 0.2 * rho.truth < rho.value < 5 * rho.truth
    mass = result.quantity("mass_half")
    assert mass.truth == pytest.approx(mass.value, rel=0.6)
    assert set(rho.terms) == {"fit", "seeds", "bootstrap", "variants"}
    assert not [q for q in result.quantities if q.name.startswith("log10_j")]  # a mock has no distance
    assert "from 150 member velocities" in result.summary["sentence"]
    assert "anisotropy marginalised" in result.summary["sentence"]


def test_the_run_directory(fitted: tuple[Any, Path]) -> None:
    from astropy.table import QTable, Table

    _, folder = fitted
    for name in ("config.toml", "provenance.json", "report.html", "members/000/posterior.safetensors"):
        assert (folder / name).is_file()
    profiles = QTable.read(folder / "results/profiles.ecsv")
    assert profiles["density_median"].unit == "solMass / kpc3"
    assert (profiles["mass_low95"] <= profiles["mass_high95"]).all()
    np.testing.assert_allclose(
        profiles["density_truth"].value, 4e8 * (1 + profiles["r"].value) ** -3, rtol=1e-6
    )
    numbers = Table.read(folder / "results/quantities.ecsv")
    assert list(numbers["name"])[:2] == ["rho_150pc", "rho_dm_150pc"]
    import pyarrow.parquet as pq

    schema = pq.read_schema(folder / "results/profiles.parquet")
    assert schema.field("mass_median").metadata[b"unit"] == b"solMass"
    summary = json.loads((folder / "results/summary.json").read_text())
    assert summary["stars"] == 150
    assert summary["provenance"]["config_hash"]
    posterior = load_posterior(folder / "members/000")
    assert len(posterior) == 200
    stamp = (folder / "config_hash").read_text().strip()
    assert load_dwarf_config(folder / "config.toml").hash == stamp


def test_the_page_is_whole_and_self_contained(fitted: tuple[Any, Path]) -> None:
    result, folder = fitted
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 6
    assert result.summary["sentence"].split(":")[0] in page
    for forbidden in ("http://", "src=", "<script", "{{", ">nan", "nan<"):
        assert forbidden not in page.replace("http://www.w3.org", "")
    assert sorted(p.stem for p in (folder / "figures").glob("*.svg")) == sorted(
        ["density", "mass", "slope", "dispersion", "light", "anisotropy"]
    )


def test_a_second_call_does_nothing_again_and_another_configuration_is_refused(
    fitted: tuple[Any, Path],
) -> None:
    result, folder = fitted
    config = small(folder.parent, "members.seeds=2", "members.bootstraps=1", "members.smoothness=false")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("members/*/posterior.safetensors")}
    again, _ = fit_galaxy(config)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.quantity("rho_dm_").quantiles == result.quantity("rho_dm_").quantiles
    with pytest.raises(GalrayError, match="belongs to another configuration"):
        fit_galaxy(small(folder.parent, "seed=5"))


def test_chains_that_have_not_converged_are_made_longer(tmp_path: Path, monkeypatch: Any) -> None:
    import galray.dwarf as dwarf
    from galray.galaxies.members import design, fit_member, observe

    lengths = []
    true_fit = dwarf.fit_halo

    def fit(tracers: Any, settings: Any, seed: int) -> Any:
        lengths.append(settings.sampler.draws)
        posterior = true_fit(tracers, settings, seed)
        posterior.diagnostics["converged"] = len(lengths) == 2
        return posterior

    monkeypatch.setattr(dwarf, "fit_halo", fit)
    config = small(tmp_path, "members.longer=3", "members.seeds=1")
    spec = design(config, observe(config))[0]
    context = {
        "configs": {config.name: config.model_dump(mode="json")},
        "observations": {config.name: observe(config)},
    }
    result = fit_member(spec.to_dict(), str(tmp_path), context)
    assert lengths == [50, 150]
    assert result["diagnostics"]["converged"]


def jobs(folder: Path, output: Path, *more: str) -> tuple[list[Job], DwarfConfig]:
    options = [f"output={output}", "members.seeds=1", "members.bootstraps=0", "members.velocities=false"]
    options += ["members.smoothness=false", *SMALL, *more]
    found, _ = find_jobs(folder, options)
    return found, validate_settings(DwarfConfig, {"name": "all"}, options)


def write_jobs(folder: Path, *, broken: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    for name, model in (("one", "PlumCoreOm"), ("two", "PlumCuspIso")):
        (folder / f"{name}.toml").write_text(f'name = "{name}"\n[mock]\nmodel = "{model}"\nnum_stars = 120\n')
    if broken:
        (folder / "three.toml").write_text('name = "three"\n[data]\nspectroscopy = "nowhere.csv"\n')
        (folder / "four.toml").write_text('name = "four"\nsed = 3\n')


def test_bad_galaxies_are_reported_and_the_others_go_on(tmp_path: Path) -> None:
    write_jobs(tmp_path / "in")
    found, base = jobs(tmp_path / "in", tmp_path / "out", *INSIDE)
    fleet = fit_galaxies(found, base)
    assert sorted(result.name for result in fleet.results) == ["one", "two"]
    errors = {outcome.name: outcome.error for outcome in fleet.failed}
    assert "no such file" in errors["three"]
    assert "sed: unknown key, did you mean 'seed'" in errors["four"]
    page = fleet.page.read_text()
    assert page.count("failed:") == 2
    for name in ("one", "two"):
        assert f'href="{name}/report.html"' in page
        assert (fleet.folder / name / "report.html").is_file()
        assert (fleet.folder / name / "results/profiles.ecsv").is_file()
    # the same galaxies alone, in one process, give the same numbers as together
    alone, _ = fit_galaxy(next(job.config for job in found if job.name == "one"))  # type: ignore[arg-type]
    together = next(result for result in fleet.results if result.name == "one")
    assert alone.quantity("rho_dm_").quantiles == together.quantity("rho_dm_").quantiles


def test_names_must_differ_and_exist(tmp_path: Path) -> None:
    write_jobs(tmp_path, broken=False)
    with pytest.raises(GalrayError, match="no galaxy six"):
        find_jobs(tmp_path, only=["six"])
    assert [job.name for job in find_jobs(tmp_path, only=["two"])[0]] == ["two"]
    shutil.copy(tmp_path / "one.toml", tmp_path / "again.toml")
    with pytest.raises(GalrayError, match="two galaxies are called 'one'"):
        find_jobs(tmp_path)


def test_galaxies_at_a_url_go_on_on_another_node(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stars, members and pages lie in the object store; a member that is finished is not fitted again."""
    from galray.galaxies import members
    from galray.galaxies.mocks import write_mock

    url, storage = bucket
    reached = overrides_of({"storage": storage.model_dump(exclude_defaults=True)})
    inputs = Mirror(f"{url}/galaxies", storage)
    write_mock("PlumCuspIso", 120, 0, 2.0, tmp_path / "stars.dat")
    inputs.write("stars.dat", (tmp_path / "stars.dat").read_bytes())
    inputs.write("old/notes.toml", b"of another run")
    inputs.write("one.toml", b'name = "one"\n[mock]\nmodel = "PlumCoreOm"\nnum_stars = 120\n')
    data = f'[data]\nspectroscopy = "{url}/galaxies/stars.dat"\nvelocity_error = 2.0\n'
    inputs.write("two.toml", f'name = "two"\n{data}'.encode())
    options = [f"output={url}/fits", "members.seeds=1", "members.bootstraps=1", "members.velocities=false"]
    options += ["members.smoothness=false", *SMALL, *INSIDE, *reached]
    base = validate_settings(DwarfConfig, {"name": "all"}, options)

    def fit() -> Any:
        found, _ = find_jobs(f"{url}/galaxies", options, storage=storage)
        return fit_galaxies(found, base)

    whole, fitted = members.fit_member, []

    def until_killed(spec: Any, folder: str, context: Any) -> Any:
        if len(fitted) == kill_after:
            raise KeyboardInterrupt
        fitted.append((spec["family"], spec["bootstrap"]))
        return whole(spec, folder, context)

    monkeypatch.setattr(members, "fit_member", until_killed)
    kill_after = 2
    with pytest.raises(KeyboardInterrupt):
        fit()
    kill_after = -1
    monkeypatch.setenv(SCRATCH, str(tmp_path / "node2"))
    fleet = fit()
    assert fitted == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    one, two = fleet.results
    assert [member["status"] for member in one.members] == ["finished"] * 2
    assert list(two.observation.sources) == [f"{url}/galaxies/stars.dat"]

    names = base.place.sizes()
    pages = {"report.html", "one/report.html", "two/results/summary.json", "two/config.toml"}
    assert names.keys() > pages | {"members/003/posterior.safetensors", "config_hash"}
    assert not [name for name in names if ".tmp" in name or name == LEASE]
    local = [*options, f"output={tmp_path}/local"]
    alone, _ = fit_galaxy(find_jobs(f"{url}/galaxies", local, ["two"], storage)[0][0].config)  # type: ignore[arg-type]
    assert alone.quantity("rho_dm_").quantiles == two.quantity("rho_dm_").quantiles


def test_mistakes_in_files_at_a_url_are_told_by_the_url(tmp_path: Path, s3_storage: Any) -> None:
    place = Mirror("s3://galray/bad", s3_storage)
    place.write("stars.csv", b"x,y,velocity,velocity_error\n" + b"0.1,0.1,3,-2\n" * 50)
    reached = overrides_of({"storage": s3_storage.model_dump(exclude_defaults=True)})
    for name, message in (
        ("bad/stars.csv", r"^s3://galray/bad/stars\.csv: row 1 column velocity_error: an error of -2 km/s"),
        ("bad/no.csv", r"^s3://galray/bad/no\.csv: no such object"),
        ("bad/", r"^s3://galray/bad/: not the URL of a file"),
    ):
        options = [*SMALL, *INSIDE, *reached, "output=s3://galray/refused"]
        config = validate_settings(DwarfConfig, {"data": {"spectroscopy": f"s3://galray/{name}"}}, options)
        with pytest.raises(GalrayError, match=message):
            fit_galaxy(config)
    assert not Mirror("s3://galray/refused", s3_storage).sizes()
    with pytest.raises(GalrayError, match="s3://galray/nowhere: no such folder"):
        find_jobs("s3://galray/nowhere", storage=s3_storage)


def test_members_run_as_trials_and_mlflow_holds_a_run_per_galaxy(tmp_path: Path, ray_session: Any) -> None:
    from mlflow import MlflowClient

    write_jobs(tmp_path / "in", broken=False)
    (tmp_path / "in/three.toml").write_text('name = "three"\n[data]\nspectroscopy = "nowhere.csv"\n')
    found, base = jobs(tmp_path / "in", tmp_path / "out")
    fleet = fit_galaxies(found, base)
    assert len(fleet.results) == 2
    client = MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("galray")
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if run.info.run_name == "all")
    children = {
        run.info.run_name: run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert set(children) == {"one", "two", "three"}
    assert children["three"].info.status == "FAILED"
    assert "no such file" in children["three"].data.tags["galray.error"]
    one = next(result for result in fleet.results if result.name == "one")
    assert children["one"].data.metrics["final.rho_dm_150pc.median"] == pytest.approx(
        one.quantity("rho_dm_").value
    )
    assert children["one"].data.params["mock.model"] == "PlumCoreOm"
    stored = {item.path for item in client.list_artifacts(children["one"].info.run_id)}
    assert {"report.html", "config.toml", "results"} <= stored
    assert parent.data.metrics["galaxies"] == 2


@pytest.mark.cluster
@pytest.mark.parametrize("at", ["folder", "s3"])
def test_a_killed_fit_all_goes_on(tmp_path: Path, s3_storage: Any, at: str) -> None:
    write_jobs(tmp_path / "in", broken=False)
    output = str(tmp_path / "out") if at == "folder" else "s3://galray/killed-fits"
    options = [f"output={output}", "tracking.enabled=false", "cluster.num_cpus=1", *SMALL]
    options += ["members.seeds=3", "members.bootstraps=0", "members.velocities=false"]
    options += overrides_of({"storage": s3_storage.model_dump(exclude_defaults=True)})
    command = [sys.executable, "-m", "galray.cli", "dwarf", "fit-all", str(tmp_path / "in")]
    command += [word for option in options for word in ("--set", option)]
    place = validate_settings(DwarfConfig, {"name": "dwarfs"}, options).place

    def records() -> dict[str, bytes | None]:
        """Each finished member, which tells how long it took."""
        names = [name for name in place.sizes("members/") if name.endswith("/result.json")]
        return {name: place.read(name) for name in names if ".tmp" not in name}

    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(records, "the first member", process, every=0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = records()
    assert 0 < len(kept) < 8
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 galaxies" in done.stdout
    assert records().items() >= kept.items()
    names = place.sizes()
    assert sum(name.endswith("/posterior.safetensors") for name in names) == 8
    assert names.keys() > {"report.html", "one/report.html", "two/report.html"}
