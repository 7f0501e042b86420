"""The command line: quick to answer, one or two lines for a mistake, exit codes that scripts can trust."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import galray
from galray import cli
from galray.config import load_config, ready_configs
from galray.errors import GalrayError
from tests.catalog_stars import stars
from tests.chain_config import SMALL_MODELS, write_config

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Runs ``galray`` in this process; gives its exit code."""
    monkeypatch.delenv("GALRAY_DEBUG", raising=False)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back what `main` sets

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["galray", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return call


def files_below(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def assert_two_lines(text: str, *words: str) -> None:
    """The last two lines are an error with its remedy, and nothing looks like a traceback."""
    assert "Traceback" not in text
    assert 'File "' not in text
    *_, what, remedy = text.strip().splitlines()
    assert what.startswith("error: "), text
    assert remedy.startswith("  remedy: "), text
    assert len(remedy) > len("  remedy: ")
    for word in words:
        assert word in what + remedy, text


# Help, versions, configurations ----------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['galray', '--help']\n"
        "from galray.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'polars', 'astropy', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in (
        "run",
        "demo",
        "mock",
        "train",
        "gravity",
        "ensemble",
        "report",
        "doctor",
        "catalog",
        "config",
    ):
        assert f"\n  {name} " in done.stdout, name


def test_import_galray_is_light_and_gives_its_api() -> None:
    code = (
        "import sys, galray\n"
        "heavy = {'torch', 'ray', 'mlflow', 'polars', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert galray.GalrayError is __import__('galray.errors').errors.GalrayError\n"
        "assert 'torch' not in sys.modules\n"
        "found = {name: getattr(galray, name) for name in galray.__all__}\n"
        "assert callable(galray.run) and callable(galray.load_run) and callable(galray.load_config)\n"
        "assert galray.Catalog.__name__ == 'ShardStore'\n"
        "assert set(galray.__all__) <= set(dir(galray))\n"
        "assert 'ray' not in sys.modules and 'mlflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_attribute_of_the_package() -> None:
    with pytest.raises(AttributeError, match="module 'galray' has no attribute 'rum'"):
        _ = galray.rum  # type: ignore[attr-defined]


def test_version(command, capsys: Captured) -> None:
    assert command("--version") == 0
    assert capsys.readouterr().out == f"galray {galray.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["run"], ["catalog", "ingest"], ["catalog", "inspect"], ["config", "show"], ["gravity"]]
)
def test_every_command_has_help(command, capsys: Captured, arguments: list[str]) -> None:
    assert command(*arguments, "--help") == 0
    assert "Usage: galray" in capsys.readouterr().out


def test_config_list_and_check(command, capsys: Captured, tmp_path: Path) -> None:
    assert command("config", "list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(ready_configs())
    path = write_config(tmp_path)
    assert command("config", "check", path) == 0
    assert f"{path}: valid; run directory {tmp_path}/tiny" in capsys.readouterr().out
    assert command("config", "check", path, "--set", "sed=1") == 2
    assert_two_lines(capsys.readouterr().err, "sed: unknown key, did you mean 'seed'?")


def test_config_show_can_be_run_again(command, capsys: Captured, tmp_path: Path) -> None:
    assert command("config", "show", "demo", "--set", "ensemble.flow.seeds=3") == 0
    text = capsys.readouterr().out
    (tmp_path / "shown.toml").write_text(text)
    assert load_config(tmp_path / "shown.toml") == load_config("demo", ["ensemble.flow.seeds=3"])
    assert tomllib.loads(text)["ensemble"]["flow"]["seeds"] == 3


# Mistakes of the command line itself -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["run"], "Missing argument"),
        (["run", "demo", "--sett", "a=1"], "--sett"),
        (["catalog", "bogus"], "No such command 'bogus'"),
        (["run", "demo", "--set"], "--set"),
    ],
)
def test_usage_errors(command, capsys: Captured, arguments: list[str], words: str) -> None:
    assert command(*arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nope"], "no configuration 'nope'"),
        (["run", "demmo"], "did you mean 'demo'?"),
        (["run", "demo", "--set", "seed"], "--set seed: not of the form a.b=value"),
        (["run", "demo", "--set", "sed=1"], "sed: unknown key, did you mean 'seed'?"),
        (["run", "demo", "--set", "seed=one"], "seed: input should be a valid integer"),
        (
            ["run", "demo", "--set", "catalog.ball.radius_kpc=4 kpc"],
            "radius_kpc: input should be a valid number",
        ),
        (["run", "demo", "--set", "catalog.states.length_unit=furlong2"], "cannot be converted to kpc"),
        (["run", "demo", "--sample", "ten"], "--sample ten: not a part of the whole"),
        (["run", "demo", "--sample", "0%"], "--sample 0%: not a part of the whole"),
        (["run", "demo", "--sample", "200%"], "--sample 200%: not a part of the whole"),
        (["run", "demo", "--set", "catalog.num_shards=2"], "catalog.num_shards = 2"),
        (["demo", "--set", "places.heights=[9]"], "places.heights: z=+9 kpc lies outside the ball"),
        (["mock", "gaia_dr2_local", "--set", "catalog.files=*.md"], "gaia_dr2_local: has no [mock] section"),
        (["run", "gaia_dr2_local"], "'mosaik_40cells_z0.4kpc.parquet' matches no file"),
        (["train", "moments", "demo"], "'moments': no family of networks"),
        (["train", "flow", "quickstart"], "methods: flow is not among the run's"),
        (["gravity", "demo", "--method", "magic"], "--method magic: no such inversion"),
        (["gravity", "gaia_dr2_local"], "catalog.ball: needed by flow, score and moments"),
        (["report", "."], ": not a run directory"),
        (["report", "/nowhere"], "/nowhere: not a run directory"),
        (["catalog", "inspect", "/nowhere.csv"], "/nowhere.csv: no such file"),
        (["catalog", "ingest", "nope.toml"], "no configuration 'nope.toml'"),
        (["ensemble", "nope.toml"], "no configuration 'nope.toml'"),
        (["config", "check", "nope.toml"], "no configuration 'nope.toml'"),
    ],
)
def test_mistakes_end_in_two_lines_and_code_2(
    command,
    capsys: Captured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 2
    assert_two_lines(captured.err, words)
    assert files_below(tmp_path) == {}, "nothing is written"


# Bad input of a run ----------------------------------------------------------------------------------


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """A run of the moments on 400 made-up stars; gives its configuration."""
    (tmp_path / "data").mkdir()
    stars(400).write_parquet(tmp_path / "data" / "stars.parquet")
    path = tmp_path / "files.toml"
    path.write_text(
        f"""
name = "files"
output = "{tmp_path}/runs"
methods = ["moments"]
[catalog]
files = ["{tmp_path}/data/stars.parquet"]
num_shards = 5
[ensemble]
moments = {{ seeds = 1, draws = 0 }}
[cluster]
enabled = false
[tracking]
enabled = false
{SMALL_MODELS}
"""
    )
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("catalog.cuts.none=parallax > 1e6", ["no star is left of 400 rows", "cut:none"]),
        ("catalog.ball.center_kpc=[40, 0, 0]", ["lies outside the ball"]),
        ("catalog.cuts.blue=bp_g < 1", ["catalog.cuts.blue", "bp_g", "stars.parquet"]),
        ("catalog.cuts.bad=parallax >", ["catalog.cuts.bad"]),
        ("catalog.keep_columns=colour", ["no column 'colour'", "stars.parquet"]),
        ("catalog.files=/nowhere/*.parquet", ["'/nowhere/*.parquet' matches no file"]),
        ("catalog.rename={parallax = 'plx'}", ["parallax", "stars.parquet"]),
        ("output=FILE", ["cannot be written", "Not a directory"]),
        ("catalog.num_shards=2", ["catalog.num_shards = 2"]),
        # 400 made-up stars are fewer than 8 × 15 splines can take.
        (
            "gravity.moments={num_potential_splines = [12, 40], num_test_splines = [14, 42]}",
            ["stars give", "for 480 splines"],
        ),
    ],
)
def test_bad_input_of_a_run(
    command, capsys: Captured, catalogue: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    before = files_below(tmp_path)
    arguments = ["--set", override.replace("FILE", str(catalogue))]
    assert command("run", catalogue, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_two_lines(captured.err, *words)
    left = {name for name in files_below(tmp_path) if name not in before}
    half = {name for name in left if name.endswith((".tmp", ".part")) or ".ingest-" in name}
    assert half == set(), "nothing half-written"
    if "splines" not in override:
        assert left <= {"runs"}, "no run directory stands in the way of the mended configuration"


def test_fewer_stars_than_a_network_can_take(command, capsys: Captured, tmp_path: Path) -> None:
    path = write_config(tmp_path, num_stars=60)
    quiet = ["--set", "cluster.enabled=false", "--set", "tracking.enabled=false"]
    assert command("run", path, *quiet, "--set", "gravity.potential.base_splines=[9, 9]") == 2
    assert_two_lines(capsys.readouterr().err, "score:", "stars for 81 splines of the potential")
    assert command("run", path, *quiet, "--set", "name=wide", "--set", "score.hidden=[512, 512]") == 2
    assert_two_lines(capsys.readouterr().err, "score:", "training stars for", "[score]")
    for name in ("tiny", "wide"):
        assert not (tmp_path / name / "members").exists(), "nothing was trained"
        assert not (tmp_path / name / "results").exists()


def test_file_that_is_not_gaias(command, capsys: Captured, catalogue: Path, tmp_path: Path) -> None:
    notes = tmp_path / "data" / "notes.csv"
    notes.write_text("name,colour\nVega,white\n")
    assert command("run", catalogue, "--set", f"catalog.files={notes}") == 2
    assert_two_lines(capsys.readouterr().err, "notes.csv: neither a Gaia source table")
    picture = tmp_path / "data" / "picture.csv"
    picture.write_bytes(bytes(range(256)) * 100)
    assert command("run", catalogue, "--set", f"catalog.files={picture}") == 2
    assert_two_lines(capsys.readouterr().err, "picture.csv: not a table of a known form")
    (tmp_path / "data" / "cut.parquet").write_bytes((tmp_path / "data" / "stars.parquet").read_bytes()[:5000])
    assert command("run", catalogue, "--set", f"catalog.files={tmp_path}/data/cut.parquet") == 2
    assert_two_lines(capsys.readouterr().err, "cut.parquet: the Parquet file is truncated or corrupt")
    assert not (tmp_path / "runs").exists()


def test_second_file_that_is_broken_inside(
    command, capsys: Captured, catalogue: Path, tmp_path: Path
) -> None:
    """A file whose head is sound and whose body is not: seen only when it is read."""
    data = tmp_path / "data"
    whole = stars(400, seed=1).write_csv().encode()
    (data / "broken.csv").write_bytes(whole[: len(whole) // 2] + b"\n1,2,three,\x00\n")
    assert command("run", catalogue, "--set", f"catalog.files={data}") == 2
    assert_two_lines(capsys.readouterr().err, "broken.csv")
    assert not (tmp_path / "runs" / "files").exists()


def test_mended_configuration_may_use_the_same_name(command, capsys: Captured, catalogue: Path) -> None:
    assert command("catalog", "ingest", catalogue, "--set", "catalog.cuts.none=parallax > 1e6") == 2
    assert_two_lines(capsys.readouterr().err, "no star is left")
    assert command("catalog", "ingest", catalogue, "--set", "catalog.cuts.near=parallax > 0.3") == 0
    captured = capsys.readouterr()
    account = {
        line.split()[0]: int(line.split()[-1]) for line in captured.out.splitlines()[1:] if line.strip()
    }
    assert account.pop("rows_in") == 400 == sum(account.values())
    assert account["kept"] > 0


def test_run_directory_of_another_configuration(
    command, capsys: Captured, catalogue: Path, tmp_path: Path
) -> None:
    assert command("catalog", "ingest", catalogue) == 0
    before = files_below(tmp_path / "runs")
    capsys.readouterr()
    assert command("run", catalogue, "--set", "seed=8") == 2
    assert_two_lines(capsys.readouterr().err, "runs/files: belongs to another configuration", "--overwrite")
    assert files_below(tmp_path / "runs") == before
    assert command("catalog", "ingest", catalogue, "--set", "seed=8", "--overwrite") == 0
    assert load_config(tmp_path / "runs" / "files" / "config.toml").seed == 8


def test_inspect_and_ingest(command, capsys: Captured, catalogue: Path, tmp_path: Path) -> None:
    assert command("catalog", "inspect", tmp_path / "data" / "stars.parquet", "--json") == 0
    assert '"rows": 400' in capsys.readouterr().out
    assert command("catalog", "ingest", catalogue) == 0
    capsys.readouterr()
    assert command("catalog", "inspect", tmp_path / "runs" / "files" / "shards", "--json") == 0
    assert '"what": "store"' in capsys.readouterr().out
    store = galray.Catalog(tmp_path / "runs" / "files" / "shards")
    assert np.isfinite(store.states()).all()


def test_model_method_needs_more_than_a_store(
    command, capsys: Captured, catalogue: Path, tmp_path: Path
) -> None:
    assert command("catalog", "ingest", catalogue) == 0
    capsys.readouterr()
    store = tmp_path / "runs" / "files" / "shards"
    assert command("gravity", store, "--method", "flow") == 2
    assert_two_lines(capsys.readouterr().err, "a shard store alone holds no model")


def test_mock_writes_gaia_files(command, capsys: Captured, tmp_path: Path) -> None:
    path = write_config(tmp_path, num_stars=300)
    assert command("mock", path) == 0
    assert capsys.readouterr().out.startswith("1 files, ")
    assert command("catalog", "inspect", min((tmp_path / "tiny" / "mock").iterdir()), "--json") == 0
    assert '"rows": 300' in capsys.readouterr().out


def test_report_of_an_unfinished_run(command, capsys: Captured, catalogue: Path, tmp_path: Path) -> None:
    assert command("catalog", "ingest", catalogue) == 0
    capsys.readouterr()
    assert command("report", tmp_path / "runs" / "files") == 2
    assert_two_lines(capsys.readouterr().err, "summary.json")


# Dry runs, debugging ---------------------------------------------------------------------------------


def test_dry_run_says_all_and_writes_nothing(
    command, capsys: Captured, catalogue: Path, tmp_path: Path
) -> None:
    before = files_below(tmp_path)
    size = (tmp_path / "data" / "stars.parquet").stat().st_size
    assert command("run", catalogue, "--dry-run") == 0
    captured = capsys.readouterr()
    said = dict(line.split(maxsplit=1) for line in captured.out.splitlines())
    assert said["files"] == "1"
    assert said["bytes"] == f"{size:,}"
    assert said["shards"] == "5"
    assert said["members"] == "moments 1"
    assert said["devices"].startswith("this machine: 0 GPU(s)")
    assert files_below(tmp_path) == before
    assert command("run", catalogue, "--dry-run", "--set", "catalog.files=/nowhere.csv") == 2
    assert_two_lines(capsys.readouterr().err, "matches no file")
    assert command("demo", "--dry-run") == 0


@pytest.mark.parametrize("place", ["first", "last"])
def test_debug_shows_the_traceback(place: str, tmp_path: Path) -> None:
    words = ["config", "check", "nope"]
    words = ["--debug", *words] if place == "first" else [*words, "--debug"]
    done = subprocess.run([sys.executable, "-m", "galray.cli", *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "GalrayError: no configuration 'nope'" in done.stderr


def test_debug_by_the_environment(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GALRAY_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["galray", "config", "check", "nope"])
    with pytest.raises(GalrayError):
        cli.main()


def test_interrupt_says_how_to_go_on(command, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*rest: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("galray.config.load_config", interrupt)
    assert command("config", "check", "demo") == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"


def test_full_disk_is_a_users_matter(command, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "/data/shard-00001.parquet")

    monkeypatch.setattr("galray.config.load_config", full)
    assert command("config", "check", "demo") == 2
    assert_two_lines(capsys.readouterr().err, "/data/shard-00001.parquet: No space left on device")


def test_bugs_keep_their_traceback(command, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*rest: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("galray.config.load_config", bug)
    monkeypatch.setattr(sys, "argv", ["galray", "config", "check", "demo"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_doctor_counts_faults(command, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    from galray.doctor import Check

    checks = [Check("cores", True, "2"), Check("ray", False, "did not start", "reinstall it")]
    monkeypatch.setattr("galray.doctor.examine", lambda: iter(checks))
    assert command("doctor") == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["ok", "cores", "2"]
    assert printed[1].startswith("FAIL ray")
    assert printed[2] == "     remedy: reinstall it"


def test_output_to_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    """``galray config show | head -1``."""
    done = subprocess.run(
        f"{sys.executable} -m galray.cli config show demo | head -1",
        shell=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert done.stdout == 'name = "demo"\n'
    assert "Traceback" not in done.stderr


def test_sample_runs_a_part_and_tells_the_whole(
    command, capsys: Captured, catalogue: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    # Stars of an isothermal cloud about the Sun: no galaxy, but a field can be solved for.
    w = np.concatenate([rng.uniform(-3, 3, (8000, 3)) - [8.12, 0, 0], rng.normal(0, 50, (8000, 3))], -1)
    pl.DataFrame(w, schema=["x", "y", "z", "vx", "vy", "vz"]).write_parquet(
        tmp_path / "data" / "cloud.parquet"
    )
    arguments = ["--set", f"catalog.files={tmp_path}/data/cloud.parquet", "--quiet"]
    assert command("run", catalogue, *arguments, "--sample", "50%") == 0
    captured = capsys.readouterr()
    assert "measured on 50%: catalog " in captured.out
    assert "extrapolated to all: " in captured.out
    assert captured.err == "", "--quiet prints results only"
    part = galray.load_run(tmp_path / "runs" / "files-sample-50pct")
    assert 0.4 < part.catalog.row_account["rows_in"] * 0.5 / 4000 < 1.1
    fate = part.catalog.row_account
    assert 3700 < fate["cut:not_sampled"] < 4300
    assert not (tmp_path / "runs" / "files").exists()
