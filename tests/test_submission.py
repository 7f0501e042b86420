"""`galray submit` and `galray jobs`: what is refused before anything travels."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from galray.cli import app
from galray.cluster.packing import pack_source
from galray.cluster.submission import JobServer
from galray.commands.jobs import environment
from galray.errors import GalrayError
from tests.mlflow_server import free_port


def invoke(*words: object) -> None:
    app(args=[str(word) for word in words], prog_name="galray", standalone_mode=False)


@pytest.mark.parametrize(
    "address", ["", "localhost:8265", "http://", "ftp://head:8265", "http://head:8265/x"]
)
def test_what_is_no_address_is_refused(address, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(GalrayError, match="address"):
        JobServer(address)


def test_nobody_at_the_address_is_said_at_once(monkeypatch):
    port = free_port()
    with pytest.raises(GalrayError, match=rf"http://127.0.0.1:{port}: cannot reach"):
        JobServer(f"http://127.0.0.1:{port}")


def test_relative_paths_do_not_travel():
    nobody = ("--address", "http://127.0.0.1:1")  # asked only when all else is well
    with pytest.raises(GalrayError, match="output: 'runs' is relative"):
        invoke("submit", "quickstart", *nobody)
    for key in ("cache", "apply"):
        here = ("--set", "output=s3://bucket/runs", "--set", f"calibration.{key}=here")
        with pytest.raises(GalrayError, match=f"calibration.{key}: 'here' is relative"):
            invoke("submit", "quickstart", *here, *nobody)
    with pytest.raises(GalrayError, match="--stage dwarf: no such stage"):
        invoke("submit", "quickstart", "--stage", "dwarf", *nobody)


def test_variables_are_pairs_and_no_secrets(monkeypatch):
    assert environment(["A=1", "B=x=y"]) == {"A": "1", "B": "x=y"}
    with pytest.raises(GalrayError, match="not of the form"):
        environment(["A"])
    server = object.__new__(JobServer)
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "API_TOKEN"):
        with pytest.raises(GalrayError, match=f"--env {name}: looks like a secret"):
            server.submit("", "run", "0" * 16, env={name: "x"})
    with pytest.raises(GalrayError, match="--stage fly: no such stage"):
        server.submit("", "run", "0" * 16, stage="fly")


def checkout(folder: Path, **files: str) -> Path:
    """A checkout with a package, an untracked table of stars, and more tracked files."""
    (folder / "galray").mkdir(parents=True)
    tracked = {"galray/__init__.py": "", "pyproject.toml": "x = 1"} | files
    for name, text in tracked.items():
        (folder / name).write_text(text)
    for words in (["init", "-q"], ["add", *tracked]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    (folder / "stars.csv").write_text("untracked")
    return folder / "galray"


def test_the_working_tree_is_what_git_tracks(tmp_path):
    source = checkout(tmp_path / "here")
    (source / "__init__.py").write_text("changed = True")
    assert pack_source(tmp_path / "sent", source) == 2
    assert (tmp_path / "sent" / "galray" / "__init__.py").read_text() == "changed = True"
    assert sorted(p.name for p in (tmp_path / "sent").iterdir()) == ["galray", "pyproject.toml"]
    # An installed package has no git: it goes alone.
    shutil.rmtree(tmp_path / "here" / ".git")
    assert pack_source(tmp_path / "alone", source) == 1
    assert [p.name for p in (tmp_path / "alone").iterdir()] == ["galray"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (".env", "A=1", r"\.env: looks like a secret"),
        ("notes.txt", "-----BEGIN RSA PRIVATE " + "KEY-----", "notes.txt: looks like a secret"),
        ("stars.bin", "x" * 200, "0 MiB of tracked files.* the largest is stars.bin"),
    ],
)
def test_what_must_not_travel_is_named(tmp_path, monkeypatch, name, text, words):
    monkeypatch.setattr("galray.cluster.packing.MOST_BYTES", 100)
    with pytest.raises(GalrayError, match=words):
        pack_source(tmp_path / "sent", checkout(tmp_path / "here", **{name: text}))
    assert not (tmp_path / "sent").exists()


def test_links_out_of_the_checkout_do_not_travel(tmp_path):
    source = checkout(tmp_path / "here")
    (tmp_path / "outside").write_text("private")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "outside")
    subprocess.run(["git", "add", "link"], cwd=tmp_path / "here", check=True)
    with pytest.raises(GalrayError, match="leads out of"):
        pack_source(tmp_path / "sent", source)
