"""Is this machine fit to run galray? Each check says what was found and, for a fault, the remedy."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from galray.provenance import git_revision, library_versions

__all__ = ["Check", "examine"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine(folder: Path | None = None) -> Iterator[Check]:
    """Run every check, one after the other.

    Arguments:
        folder: Where runs would be written; the current folder by default.
    """
    folder = folder or Path.cwd()
    yield Check(
        "python",
        sys.version_info >= (3, 11),
        f"{sys.version.split()[0]}, galray revision {git_revision() or 'not a checkout'}",
        "install Python 3.11 or newer",
    )
    for name, check in (
        ("libraries", _libraries),
        ("cores", _cores),
        ("memory", _memory),
        ("disk", lambda: _disk(folder)),
        ("write access", lambda: _writable(folder)),
        ("accelerator", _accelerator),
        ("ray", _ray),
        ("mlflow", _mlflow),
    ):
        yield _guarded(name, check)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that crashes is a fault, not a traceback: whatever is broken, the others still run."""
    try:
        return check()
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        library = {"ray": "ray", "mlflow": "mlflow", "accelerator": "torch"}.get(name)
        remedy = (
            f"reinstall the library, or report this: pip install --force-reinstall {library}"
            if library
            else "look at what it names; if that is as it should be, report this"
        )
        return Check(name, False, f"{type(error).__name__}: {text[0]}", remedy)


def _libraries() -> Check:
    versions = library_versions()
    absent = [name for name, version in versions.items() if version == "absent"]
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Check("libraries", not absent, found, f"pip install {' '.join(absent)}")


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("cores", cores >= 1, f"{cores}")


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return Check("memory", True, "not known on this system")
    return Check(
        "memory", total > 3.5, f"{total:.1f} GiB", "4 GiB or more is needed: Ray alone takes about 1 GiB"
    )


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / 1e9
    return Check(
        "disk", free > 2, f"{free:.0f} GB free in {folder}", "free some space, or set output to another disk"
    )


def _writable(folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(
            "write access",
            False,
            f"{folder}: {error.strerror}",
            "run in a folder that you may write, or set output",
        )
    return Check("write access", True, f"{folder}")


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        kind = "ROCm" if torch.version.hip else "CUDA"
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Check("accelerator", True, f"{kind}: {names}")
    return Check("accelerator", True, "none: models train on the CPU")


def _ray() -> Check:
    """Start a one-core cluster and run one task on it: the parts that fail are only seen then."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import logging

    import ray

    shm = Path("/dev/shm")
    note = f", {shutil.disk_usage(shm).free / 1e9:.1f} GB of shared memory" if shm.is_dir() else ""
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=80 * 1024**2,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        answer = ray.get(ray.remote(_process_id).remote(), timeout=60)
    finally:
        ray.shutdown()
    return Check(
        "ray",
        answer != os.getpid(),
        f"{ray.__version__}: a task ran in a process of its own{note}",
        "Ray runs tasks in this process (local mode): unset RAY_LOCAL_MODE",
    )


def _process_id() -> int:
    return os.getpid()


def _mlflow() -> Check:
    """Create a store and close a run in it."""
    import logging

    import mlflow
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # after the import, which sets it to INFO

    with tempfile.TemporaryDirectory() as folder:
        client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
        experiment = client.create_experiment("doctor", artifact_location=Path(folder).as_uri())
        run = client.create_run(experiment)
        client.set_terminated(run.info.run_id)
        status = client.get_run(run.info.run_id).info.status
    return Check(
        "mlflow",
        status == "FINISHED",
        f"{mlflow.__version__}: a sqlite store was made and a run ended as {status}",
        "pip install --force-reinstall mlflow",
    )
