"""The doctor: every check finds its fault, names a remedy, and no fault hides another check."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from galray import doctor
from galray.doctor import Check, examine

NAMES = [
    "python",
    "libraries",
    "cores",
    "memory",
    "disk",
    "write access",
    "accelerator",
    "ray",
    "mlflow",
]


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two checks that start processes and databases."""
    for name in ("_ray", "_mlflow"):
        monkeypatch.setattr(doctor, name, lambda name=name: Check(name[1:], True, "not looked at"))


def faults(folder: Path) -> dict[str, Check]:
    checks = list(examine(folder))
    assert [check.name for check in checks] == NAMES, "every check runs, whatever the others find"
    return {check.name: check for check in checks if not check.ok}


@pytest.mark.usefixtures("light")
def test_sound_machine(tmp_path: Path) -> None:
    assert faults(tmp_path) == {}


@pytest.mark.usefixtures("light")
def test_old_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    monkeypatch.setattr(sys, "version", "3.10.1 (main)")
    found = faults(tmp_path)
    assert list(found) == ["python"]
    assert "3.10.1" in found["python"].found
    assert "3.11" in found["python"].remedy


@pytest.mark.usefixtures("light")
def test_absent_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "library_versions", lambda: {"torch": "2.9", "zuko": "absent", "ray": "absent"}
    )
    found = faults(tmp_path)
    assert list(found) == ["libraries"]
    assert found["libraries"].remedy == "pip install zuko ray"


@pytest.mark.usefixtures("light")
def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**18}[name]
    )
    found = faults(tmp_path)
    assert list(found) == ["memory"]
    assert found["memory"].found == "1.0 GiB"
    assert "4 GiB" in found["memory"].remedy


@pytest.mark.usefixtures("light")
def test_unknown_memory_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(doctor.os, "sysconf", unknown)
    assert faults(tmp_path) == {}


@pytest.mark.usefixtures("light")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8))
    found = faults(tmp_path)
    assert list(found) == ["disk"]
    assert str(tmp_path) in found["disk"].found
    assert "output" in found["disk"].remedy


@pytest.mark.usefixtures("light")
def test_folder_that_is_not_there(tmp_path: Path) -> None:
    found = faults(tmp_path / "absent")
    assert set(found) == {"disk", "write access"}
    for check in found.values():
        assert "absent" in check.found
        assert "pip" not in check.remedy, "no library is at fault"


@pytest.mark.usefixtures("light")
def test_no_write_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(dir: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", closed)
    found = faults(tmp_path)
    assert list(found) == ["write access"]
    assert found["write access"].found == f"{tmp_path}: Permission denied"
    assert "output" in found["write access"].remedy


@pytest.mark.usefixtures("light")
def test_accelerator_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    for hip, kind in ((None, "CUDA"), ("6.2", "ROCm")):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert doctor._accelerator().found == f"{kind}: GPU 0, GPU 1"


@pytest.mark.parametrize(
    ("name", "library"), [("_ray", "ray"), ("_mlflow", "mlflow"), ("_accelerator", "torch")]
)
@pytest.mark.usefixtures("light")
def test_broken_library_is_a_fault_not_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    def broken() -> Check:
        raise ImportError("libsomething.so: undefined symbol\nmore lines")

    monkeypatch.setattr(doctor, name, broken)
    found = faults(tmp_path)
    (check,) = found.values()
    assert check.found == "ImportError: libsomething.so: undefined symbol"
    assert f"--force-reinstall {library}" in check.remedy


def test_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**options: Any) -> None:
        raise ConnectionError("no port is free")

    monkeypatch.setattr(ray, "init", refuse)
    check = doctor._guarded("ray", doctor._ray)
    assert not check.ok
    assert check.found == "ConnectionError: no port is free"


def test_ray_is_shut_down_when_its_task_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    events: list[str] = []

    def fail(*rest: Any, **options: Any) -> None:
        raise TimeoutError("the task never ran")

    monkeypatch.setattr(ray, "init", lambda **options: events.append("init"))
    monkeypatch.setattr(ray, "remote", lambda function: SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr(ray, "get", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: events.append("shutdown"))
    check = doctor._guarded("ray", doctor._ray)
    assert events == ["init", "shutdown"]
    assert not check.ok
    assert "the task never ran" in check.found


def test_mlflow_makes_a_store_and_closes_a_run() -> None:
    check = doctor._mlflow()
    assert check.ok
    assert "a run ended as FINISHED" in check.found


def test_mlflow_that_leaves_a_run_open_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    forget: Callable[..., None] = lambda self, *rest, **options: None  # noqa: E731
    monkeypatch.setattr(MlflowClient, "set_terminated", forget)
    check = doctor._mlflow()
    assert not check.ok
    assert "a run ended as RUNNING" in check.found
    assert check.remedy
