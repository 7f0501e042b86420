"""``galray dwarf``: the commands' output, exit codes and messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from galray.cli import app
from galray.errors import GalrayError

runner = CliRunner()


def test_the_list_of_galaxies() -> None:
    whole = runner.invoke(app, ["dwarf", "list"])
    assert whole.exit_code == 0
    assert len(whole.stdout.splitlines()) >= 43
    one = runner.invoke(app, ["dwarf", "list", "UMi", "--references"])
    assert "ursa_minor_1" in one.stdout
    assert "structure: Munoz 2018 (2018ApJ...860...66M)" in one.stdout
    assert isinstance(runner.invoke(app, ["dwarf", "list", "Nowhere"]).exception, GalrayError)


def test_a_configuration_is_shown_with_every_key() -> None:
    shown = runner.invoke(app, ["dwarf", "show", "fornax", "--set", "seed=9"])
    assert shown.exit_code == 0
    for text in ("seed = 9", 'key = "fornax_1"', "[fit.anisotropy]", "[members]", "min_membership"):
        assert text in shown.stdout


@pytest.mark.parametrize("ending", ["dat", "ecsv", "csv", "parquet"])
def test_a_mock_is_written_and_read_again(tmp_path: Path, ending: str) -> None:
    from galray.dwarf.observation import Galaxy
    from galray.dwarf.reading import DataSettings, read_observation

    path = tmp_path / f"mock.{ending}"
    made = runner.invoke(
        app, ["dwarf", "mock", "PlumCuspIso", "--stars", "400", "--seed", "3", "--to", str(path)]
    )
    assert made.exit_code == 0, made.output
    assert "rho(150 pc)" in made.stdout
    stars = read_observation(DataSettings(spectroscopy=str(path), velocity_error=2.0), Galaxy("mock"))
    assert len(stars) == 400
    from galray.mocks.dwarfs import gaia_challenge

    w = gaia_challenge("PlumCuspIso").sample_noisy(400, 3).numpy()
    np.testing.assert_allclose(stars.x, w[:, 0], rtol=1e-6)
    np.testing.assert_allclose(stars.velocity, w[:, 5], rtol=1e-6)


def test_mistakes_of_the_mock(tmp_path: Path) -> None:
    wrong = runner.invoke(app, ["dwarf", "mock", "PlumCoreOm", "--to", str(tmp_path / "a.fits")])
    assert isinstance(wrong.exception, GalrayError)
    wrong = runner.invoke(app, ["dwarf", "mock", "Plum", "--to", str(tmp_path / "a.dat")])
    assert isinstance(wrong.exception, GalrayError)
    assert not list(tmp_path.iterdir())


def test_bad_data_end_in_two_lines_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "stars.csv"
    lines = ["x,y,velocity,velocity_error", *(f"{0.01 * i},{-0.01 * i},{i % 7 + 1},-2" for i in range(50))]
    path.write_text("\n".join(lines))
    command = [
        sys.executable,
        "-m",
        "galray.cli",
        "dwarf",
        "fit",
        str(path),
        "--output",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: {path}: row 1 column velocity_error: an error of -2 km/s" in done.stderr
    assert "remedy:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_galaxies(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    for folder, message in ((tmp_path, "holds no galaxy"), (tmp_path / "absent", "no such folder")):
        failed = runner.invoke(app, ["dwarf", "fit-all", str(folder), "--output", str(tmp_path / "runs")])
        assert isinstance(failed.exception, GalrayError)
        assert message in failed.exception.what
