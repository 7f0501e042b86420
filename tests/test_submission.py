"""`galray submit` and `galray jobs`: what is refused before anything travels."""

from __future__ import annotations

import socket

import pytest

from galray.cli import app
from galray.cluster.submission import JobServer
from galray.commands.jobs import environment
from galray.errors import GalrayError


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(GalrayError, match=rf"http://127.0.0.1:{port}: cannot reach"):
        JobServer(f"http://127.0.0.1:{port}")


def test_relative_paths_do_not_travel():
    with pytest.raises(GalrayError, match="output: 'runs' is relative"):
        invoke("submit", "quickstart", "--address", "http://127.0.0.1:1")


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
