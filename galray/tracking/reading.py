"""Reads runs back from MLflow: which there are, their members, what failed and why, how two differ."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galray.catalog.storage import is_url
from galray.errors import GalrayError

__all__ = ["RunRecord", "compare_runs", "find_run", "list_runs", "members_of", "store_uri"]

PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class RunRecord:
    """One run as MLflow holds it.

    Attributes:
        id: MLflow's id.
        name: Its name.
        status: FINISHED, FAILED, RUNNING, …
        started: Seconds since 1970; NaN where unknown.
        seconds: How long it took; NaN while it runs.
        params: Parameters by dotted key.
        metrics: Last value of every metric.
        tags: Tags.
        members: Number of its members by status, for a parent.
    """

    id: str
    name: str
    status: str
    started: float
    seconds: float
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    members: Mapping[str, int] = field(default_factory=dict)

    @property
    def error(self) -> str:
        """Why it failed; empty where it did not."""
        return self.tags.get("galray.error", "")

    @property
    def loss(self) -> float:
        """The held-out loss of a member or of a trial; NaN where there is none."""
        names = ("final.best", "final.held_out_loss")
        return next((self.metrics[name] for name in names if name in self.metrics), math.nan)


def store_uri(uri: str = "", folder: Path | str = "runs") -> str:
    """The tracking store to read.

    Arguments:
        uri: Given by the user; else MLFLOW_TRACKING_URI, else the sqlite file of a folder of runs.
        folder: Folder of run directories.

    Raises:
        GalrayError: None is given and the folder holds no store.
    """
    found = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    path = Path(folder) / "mlflow.db"
    if not found:
        if is_url(folder):
            raise GalrayError(
                f"{folder}: MLflow keeps its runs in no object store",
                "name the server of tracking.uri with --uri or MLFLOW_TRACKING_URI",
            )
        if not path.is_file():
            raise GalrayError(
                f"{path}: no MLflow store here", "name one with --uri, or the folder of runs with --output"
            )
        return f"sqlite:///{path.absolute()}"
    scheme, separator, rest = found.partition(":///")
    if scheme == "sqlite" and separator and not Path(rest.split("?")[0]).is_file():
        # Opening it would create an empty store there.
        raise GalrayError(f"{found}: no such file", "correct --uri or MLFLOW_TRACKING_URI")
    return found


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    # Twice is enough to see that nobody is there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    return MlflowClient(tracking_uri=uri)


def _search(uri: str, condition: str, experiment: str | None = None) -> list[Any]:
    """All runs that satisfy a condition, page by page."""
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    try:
        experiments = [
            e.experiment_id for e in client.search_experiments() if experiment is None or e.name == experiment
        ]
        if experiment is not None and not experiments:
            known = ", ".join(sorted(e.name for e in client.search_experiments()))
            raise GalrayError(f"{uri}: no experiment '{experiment}'", f"it has {known}")
        found: list[Any] = []
        token = None
        while experiments:
            page = client.search_runs(experiments, condition, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                break
        return found
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise GalrayError(f"{uri}: cannot be read: {reason}", "check the address and the server") from None


def _record(run: Any, members: Mapping[str, int] | None = None) -> RunRecord:
    begin, end = run.info.start_time, run.info.end_time
    return RunRecord(
        id=run.info.run_id,
        name=run.info.run_name or "",
        status=run.info.status,
        started=begin / 1e3 if begin else math.nan,
        seconds=(end - begin) / 1e3 if begin and end else math.nan,
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
        members=dict(members or {}),
    )


def list_runs(uri: str, experiment: str | None = None) -> list[RunRecord]:
    """The runs of a store that are no member of another, the latest first, with counts of their members.

    Arguments:
        uri: Tracking store.
        experiment: Of this experiment alone.

    Raises:
        GalrayError: The store cannot be read, or has no such experiment.
    """
    runs = _search(uri, "", experiment)
    counts: dict[str, dict[str, int]] = {}
    for run in runs:
        if parent := run.data.tags.get(PARENT):
            statuses = counts.setdefault(parent, {})
            statuses[run.info.status] = statuses.get(run.info.status, 0) + 1
    tops = [_record(run, counts.get(run.info.run_id)) for run in runs if PARENT not in run.data.tags]
    return sorted(tops, key=lambda record: -record.started)


def find_run(records: Sequence[RunRecord], name: str) -> RunRecord:
    """A run by its name (the latest of several) or by the first letters of its id.

    Raises:
        GalrayError: There is none, or the letters fit several.
    """
    named = [record for record in records if record.name == name]
    if named:
        return named[0]
    fitting = [record for record in records if len(name) >= 4 and record.id.startswith(name)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise GalrayError(f"run {name}: {len(fitting)} ids begin so", "give more letters")
    names = ", ".join(dict.fromkeys(record.name for record in records)) or "none"
    raise GalrayError(f"run {name}: not in the store", f"there are {names}")


def members_of(uri: str, parent: RunRecord) -> list[RunRecord]:
    """A run's members: the best held-out loss first within each family, failed ones last."""
    runs = _search(uri, f"tags.`{PARENT}` = '{parent.id}'")
    records = [_record(run) for run in runs]

    def order(record: RunRecord) -> tuple[Any, ...]:
        family = record.tags.get("galray.family", "")
        return family, record.status != "FINISHED", math.isnan(record.loss), record.loss, record.name

    return sorted(records, key=order)


def compare_runs(records: Sequence[RunRecord]) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
    """Where runs differ.

    Returns:
        Parameters that are not the same in all (empty where a run lacks one), and every metric that at
        least two share, one entry per run (NaN where it has none).
    """
    keys = sorted({key for record in records for key in record.params})
    values = {key: [record.params.get(key, "") for record in records] for key in keys}
    params = {key: row for key, row in values.items() if len(set(row)) > 1}
    names = sorted({name for record in records for name in record.metrics})
    metrics = {name: [record.metrics.get(name, math.nan) for record in records] for name in names}
    shared = {name: row for name, row in metrics.items() if sum(not math.isnan(v) for v in row) > 1}
    return params, shared
