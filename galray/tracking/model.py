"""A finished run as a registered MLflow model: what it consists of, how it is logged, what it answers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from galray import __version__
from galray.blinding import MARKER
from galray.errors import GalrayError
from galray.provenance import now

__all__ = ["MODEL_NAME", "bundle_run", "predict", "register_run"]

MODEL_NAME = "galray-gravity"
"""Name in the registry."""
ALIAS = "champion"

_NEEDED = ("config.toml", "provenance.json", "shards/manifest.json", "results/summary.json")
_FILES = (*_NEEDED, "truth.json", MARKER)
_MEMBER_FILES = ("spec.json", "result.json")


def bundle_run(folder: Path, target: Path) -> Path:
    """Copy what the evaluation of a run reads: fields and their records, no stars.

    Arguments:
        folder: A run directory with at least one finished field.
        target: Folder to make.

    Raises:
        GalrayError: A file of the run is absent, or a link leads out of it.
    """
    target.mkdir(parents=True)
    for name in _FILES:
        if (folder / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_inside(folder, folder / name), target / name)
        elif name in _NEEDED:
            raise GalrayError(f"{folder / name}: absent", "finish the run first: galray run")
    for member in sorted((folder / "members").glob("[0-9][0-9][0-9]*")):
        if not (member / "result.json").is_file() or not (member / "field").is_dir():
            continue
        place = target / "members" / member.name
        place.mkdir(parents=True)
        for name in _MEMBER_FILES:
            shutil.copy2(_inside(folder, member / name), place / name)
        shutil.copytree(_inside(folder, member / "field"), place / "field")
    if (folder / "fields").is_dir():
        shutil.copytree(_inside(folder, folder / "fields"), target / "fields")
    return target


def _inside(folder: Path, path: Path) -> Path:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise GalrayError(f"{path}: a link that leads out of the run directory", "copy the file itself there")
    return path


def predict(source: Any, x: np.ndarray) -> Any:
    """Gravity at positions as a pandas frame: one row per position, NaN outside the ball.

    Arguments:
        source: `galray.evaluation.RunSource`.
        x: Galactocentric positions, shape (n, 3), kpc.

    Raises:
        GalrayError: A position is not finite.
    """
    import pandas as pd
    from astropy.table import Table

    from galray.evaluation import evaluate
    from galray.positions import Positions

    x = np.asarray(x, dtype=np.float64).reshape(-1, 3)
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(-1))[0])
        raise GalrayError(f"row {row + 1}: the position is not finite", "give x, y, z in kpc")
    positions = Positions(x, Table(x, names=("x", "y", "z")), ("x", "y", "z"), "input")
    table = evaluate(source, positions, outside="nan").table
    columns = {
        name: np.asarray(getattr(table[name], "value", table[name])) for name in table.colnames
        if name not in ("x", "y", "z")
    }  # fmt: skip
    return pd.DataFrame(columns)


@contextmanager
def _tracking(uri: str) -> Iterator[None]:
    """MLflow's global store for a while: it is also an environment variable, which other code reads."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        nothing: Any = None  # unset, as it is where nobody set it
        mlflow.set_tracking_uri(nothing)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def register_run(
    folder: Path | str, uri: str = "", *, name: str = MODEL_NAME, alias: str = ALIAS
) -> tuple[str, str]:
    """Log a run's gravity as a model in its MLflow run and register it.

    Arguments:
        folder: A finished run directory.
        uri: Tracking store; the run's own where empty.
        name: In the registry.
        alias: That shall point at this version from now on; empty for none.

    Returns:
        Name and version.

    Raises:
        GalrayError: The run is not finished, or not in MLflow.
    """
    from galray.evaluation import RunSource
    from galray.rundir import load_run
    from galray.tracking.journal import Journal, State

    run = load_run(folder)
    store = uri or run.config.tracking.resolve_uri(run.folder)
    identity = State.load(Journal(run.folder)).parent
    if not identity:
        raise GalrayError(
            f"{run.folder}: was not recorded in MLflow", "run it with tracking.enabled = true: it goes on"
        )
    sun = np.array([run.catalog.frame.sun_position])
    answer = predict(RunSource(run.folder), sun)

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    import pandas as pd
    from mlflow.models import infer_signature

    example = pd.DataFrame(sun, columns=["x", "y", "z"])
    headline = run.headline
    with tempfile.TemporaryDirectory() as scratch:
        bundle = bundle_run(run.folder, Path(scratch) / "run")
        with _tracking(store), mlflow.start_run(run_id=identity):
            info = mlflow.pyfunc.log_model(
                name="gravity",
                python_model=str(Path(__file__).with_name("gravity_model.py")),
                artifacts={"run": str(bundle)},
                signature=infer_signature(example, answer),
                pip_requirements=[f"galray=={__version__}"],
                registered_model_name=name,
                metadata={
                    "galray_config_hash": run.config.hash,
                    "rho_dm": headline["value"],
                    "rho_dm_error": headline["error"],
                    "unit": headline["unit"],
                    "registered": now(),
                },
            )
    version = str(info.registered_model_version)
    if alias:
        mlflow.MlflowClient(tracking_uri=store).set_registered_model_alias(name, alias, version)
    return name, version
