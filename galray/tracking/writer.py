"""The process that writes a run's journal into MLflow: `python -m galray.tracking.writer RUN`.

While nobody answers it waits, and goes on with the same entry. It ends when the journal says "close", or when
its standard input closes, which happens however the driver dies; then everything still marked as running is
ended as FAILED.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from galray.tracking.journal import FROM_ENVIRONMENT, Journal, State, metric_name, read_curve
from galray.tracking.settings import without_password

__all__ = ["Recorder", "main"]

_BATCH = 1000
_PARAM_BATCH = 100
_WATCH_SECONDS = 2.0
"""How often the curves of members in training are looked at."""
_PAUSE_SECONDS = 1.0
_AWAY_SECONDS = 1800.0
"""How long a server that went away is waited for after the run's end; then the next start writes the rest."""


class Recorder:
    """Applies journal entries to MLflow; every entry may be applied twice without harm.

    Arguments:
        state: How far MLflow is; kept up to date.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._client: Any = None
        self._followed: dict[str, dict[str, Any]] = {}
        self._looked = 0.0
        self._system: Any = None
        self._machine: tuple[str, float] | None = None
        self._away: float | None = None

    @property
    def ready(self) -> bool:
        """Whether the run exists in MLflow."""
        return self._client is not None and bool(self.state.parent)

    @property
    def away(self) -> bool:
        """Whether nobody answered at the store when it was last asked."""
        return self._away is not None

    @property
    def given_up(self) -> bool:
        """Whether nobody has answered for so long that there is no use in waiting."""
        return self._away is not None and time.monotonic() - self._away > _AWAY_SECONDS

    def unanswered(self, error: Exception) -> bool:
        """Note an error where it says that nobody answered, and tell whether it does."""
        if not _nobody_answers(error):
            return False
        self._away = self._away or time.monotonic()
        self.state.error = _brief(error)
        return True

    def reachable(self) -> bool:
        """Whether the store may be written to; one that was away is asked first."""
        if self.away:
            try:
                self._client.get_run(self.state.parent)
            except Exception as error:
                return not self.unanswered(error)
            self.answered()
        return True

    def answered(self) -> None:
        """Note that the store took what it was given; one that is back is told of this machine again."""
        if self._away is None:
            return
        self._away = None
        if not self.state.refused:
            self.state.error = ""
        if self._machine is not None:
            self._watch_machine(*self._machine)

    def apply(self, entry: dict[str, Any]) -> None:
        """Apply one entry.

        Raises:
            Exception: Whatever MLflow raises.
        """
        getattr(self, f"_{entry['op']}")(entry)

    def watch(self) -> bool:
        """Take in the epochs that members have finished since the last look; tells whether there were any."""
        if not self.ready or time.monotonic() - self._looked < _WATCH_SECONDS:
            return False
        self._looked, found = time.monotonic(), False
        for identity, entry in self._followed.items():
            last = self.state.epochs.get(identity, -1)
            new = [row for row in read_curve(Path(entry["curve"])) if row.get("epoch", -1) > last]
            if not new or identity in self.state.ended:
                continue
            # A row knows the seconds since its training began, and the last of them was just now.
            begin = 1000.0 * (time.time() - new[-1].get("seconds", 0.0))
            run_id = self._child(identity, entry["name"], entry["tags"], int(begin))
            rows, step = self._curve(identity, new, begin)
            self._write(run_id, metrics=rows)
            self.state.epochs[identity], found = step, True
        return found

    def end(self, status: str, when: int | None = None) -> None:
        """End the run if it is still open, and members that did not say how they ended."""
        if self._client is None:
            return
        if self._system is not None:
            self._system.finish()
            self._system = None
        for identity, run_id in self.state.members.items():
            if identity not in self.state.ended:
                self._client.set_terminated(run_id, "FAILED", end_time=when)
                self.state.ended[identity] = "FAILED"
        if self.state.parent and self.state.parent_open:
            self._client.set_terminated(self.state.parent, status, end_time=when)
            self.state.parent_open = False

    def _open(self, entry: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        uri = entry["uri"]
        if uri == FROM_ENVIRONMENT:
            uri = os.environ["MLFLOW_TRACKING_URI"]
        with _first_touch(uri):
            self._client = MlflowClient(tracking_uri=uri)
            self.state.experiment = self._experiment(entry["experiment"], entry["artifacts"])
        tags = {"mlflow.user": _user(), "mlflow.source.name": "galray"} | entry["tags"]
        if self.state.parent and not self._alive(self.state.parent):
            # The store was changed or cleared: start over there, members and all.
            self.state.parent, self.state.members, self.state.ended, self.state.epochs = "", {}, {}, {}
        if self.state.parent:
            self._client.update_run(self.state.parent, status="RUNNING")
            tags["galray.resumed"] = "true"
            self._write(self.state.parent, tags=tags)
        else:
            run = self._client.create_run(
                self.state.experiment, start_time=entry["time"], tags=tags, run_name=entry["name"]
            )
            self.state.parent = run.info.run_id
        self.state.parent_open = True
        self._params(entry)
        if seconds := entry.get("system"):
            self._watch_machine(uri, seconds)

    def _watch_machine(self, uri: str, seconds: float) -> None:
        """Record what the driver's machine does, from a thread, until the run ends."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._machine = (uri, seconds)
        if self._system is not None:
            self._system.finish()
        self._system = SystemMetricsMonitor(
            self.state.parent, sampling_interval=seconds, resume_logging=True, tracking_uri=uri
        )
        self._system.start()

    def _params(self, entry: dict[str, Any]) -> None:
        self._write(self.state.parent, params=entry["params"])

    def _tags(self, entry: dict[str, Any]) -> None:
        self._write(self.state.parent, tags=entry["tags"])

    def _metrics(self, entry: dict[str, Any]) -> None:
        rows = [(key, value, entry["time"], entry["step"]) for key, value in entry["metrics"].items()]
        self._write(self.state.parent, metrics=rows)

    def _artifact(self, entry: dict[str, Any]) -> None:
        self._store(self.state.parent, entry["path"], entry["folder"])

    def _follow(self, entry: dict[str, Any]) -> None:
        if self.state.ended.get(entry["id"]) != "FINISHED":
            known = self.state.members.get(entry["id"])
            if self.state.ended.pop(entry["id"], None) and known and self._alive(known):
                self._client.update_run(known, status="RUNNING")  # it failed before, and goes on
            self._followed[entry["id"]] = entry

    def _child(self, identity: str, name: str, tags: dict[str, str], start: int) -> str:
        """MLflow's id of a member, which is created where there is none."""
        run_id = self.state.members.get(identity)
        if run_id is None or not self._alive(run_id):
            own = {"mlflow.parentRunId": self.state.parent, "galray.member": identity}
            # A server that goes away may have made the run and its answer be lost: there is one at most.
            which = " and ".join(f"tags.`{key}` = '{value}'" for key, value in own.items())
            made = self._client.search_runs([self.state.experiment], which, max_results=1)
            run = made[0] if made else None
            if run is None:
                run = self._client.create_run(
                    self.state.experiment, start_time=start, tags={**tags, **own, "mlflow.user": _user()},
                    run_name=name,
                )  # fmt: skip
            run_id = self.state.members[identity] = run.info.run_id
            self.state.epochs.pop(identity, None)
        return run_id

    def _curve(
        self, identity: str, curve: list[dict[str, float]], start: float
    ) -> tuple[list[tuple[str, float, int, int]], int]:
        """Rows of a curve beyond those taken in, as MLflow's metrics, and the last step.

        Arguments:
            identity: The member.
            curve: Its rows.
            start: When its training began, in milliseconds.
        """
        rows: list[tuple[str, float, int, int]] = []
        known = self.state.epochs.get(identity, -1)
        step = max(known, 0)
        for point in curve:
            step = int(point.get("epoch", step + 1))
            if step > known:
                clock = int(start + 1000.0 * point.get("seconds", 0.0))
                rows += [(metric_name(k), v, clock, step) for k, v in point.items() if k != "epoch"]
        return rows, max(step, known)

    def _member(self, entry: dict[str, Any]) -> None:
        identity = entry["id"]
        self._followed.pop(identity, None)
        if self.state.ended.get(identity) == "FINISHED":
            return
        end, start = entry["time"], entry["time"] - int(1000 * entry["seconds"])
        run_id = self._child(identity, entry["name"], entry["tags"], start)
        status = "FAILED"
        try:
            rows, step = self._curve(identity, entry["curve"], float(start))
            rows += [(f"final.{key}", value, end, step) for key, value in entry["metrics"].items()]
            self._write(run_id, metrics=rows, params=entry["params"], tags=entry["tags"])
            for path in entry["artifacts"]:
                self._store(run_id, path, Path(path).name if Path(path).is_dir() else "")
            status = entry["status"]
        finally:
            # Also a child whose data MLflow refused must not stay RUNNING.
            self._client.set_terminated(run_id, status, end_time=end)
        self.state.ended[identity] = status

    def _member_metrics(self, entry: dict[str, Any]) -> None:
        if run_id := self.state.members.get(entry["id"]):
            rows = [(f"final.{key}", value, entry["time"], 0) for key, value in entry["metrics"].items()]
            self._write(run_id, metrics=rows)

    def _close(self, entry: dict[str, Any]) -> None:
        self.end(entry["status"], entry["time"])

    def _experiment(self, name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except MlflowException:
                # Another run may have made it between the two calls.
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            self._client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _alive(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if _nobody_answers(error):
                raise
            return False

    def _write(
        self,
        run_id: str,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: dict[str, str] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        """Write in as few batches as MLflow allows; parameters that stand already are left as they are."""
        from mlflow.entities import Metric, Param, RunTag

        if params:
            known = self._client.get_run(run_id).data.params
            params = {key: value for key, value in params.items() if key not in known}
        all_params = [Param(key, value) for key, value in (params or {}).items()]
        all_tags = [RunTag(metric_name(key), value[:5000]) for key, value in (tags or {}).items()]
        all_metrics = [Metric(*row) for row in metrics]
        room = _BATCH - 2 * _PARAM_BATCH
        while all_params or all_tags or all_metrics:
            self._client.log_batch(
                run_id, all_metrics[:room], all_params[:_PARAM_BATCH], all_tags[:_PARAM_BATCH]
            )
            all_metrics, all_params = all_metrics[room:], all_params[_PARAM_BATCH:]
            all_tags = all_tags[_PARAM_BATCH:]

    def _store(self, run_id: str, path: str, folder: str) -> None:
        if Path(path).is_dir():
            self._client.log_artifacts(run_id, path, folder or Path(path).name)
        else:
            self._client.log_artifact(run_id, path, folder or None)


def main(folder: str) -> int:
    """Write the journal of a run until it closes or its driver is gone.

    Arguments:
        folder: The run directory.

    Returns:
        0 when all entries were taken in, 1 when some were refused, 3 when there is no store to write to.
    """
    os.nice(5)  # the members' training comes first
    journal = Journal(folder)
    with open(journal.lock_path, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the writer of a killed driver may still be at its end
        state = State.load(journal)
        state.error = ""
        recorder = Recorder(state)
        gone = False
        while True:
            # Look at the driver before the journal: what it said before its end is then read.
            gone = gone or _driver_gone()
            closed = recorder.reachable() and _drain(journal, recorder)
            if not closed and not recorder.away:
                _look(journal, recorder)
            if not recorder.ready and state.error:
                state.save(journal)
                return 3
            if closed or (gone and (recorder.given_up or not recorder.away)):
                break
            if recorder.away:
                time.sleep(_PAUSE_SECONDS)
        if not closed:
            try:
                recorder.end("FAILED")
            except Exception as error:
                state.error = _brief(error)
        state.save(journal)
        return 1 if state.error else 0


def _look(journal: Journal, recorder: Recorder) -> None:
    """Follow the curves; what MLflow refuses now comes with the member's end."""
    try:
        if not recorder.watch():
            return
    except Exception as error:
        _log_traceback()
        if not recorder.unanswered(error):
            recorder.state.error = f"follow: {_brief(error)}"
    recorder.state.save(journal)  # a writer that is killed leaves no member that the next one does not know


def _drain(journal: Journal, recorder: Recorder) -> bool:
    """Apply all new entries; tells whether the last of them closed the run."""
    state, closed = recorder.state, False
    for entry, offset in journal.read(state.offset):
        if entry is not None:
            closed = entry["op"] == "close"
            if entry["op"] == "open" or not recorder.ready:
                # Entries of an earlier start that had no store wait for the next "open".
                if not _reopen(journal, recorder, entry):
                    return False
            elif not _attempt(journal, recorder, entry):
                return False
        state.offset = offset
        state.save(journal)
    return closed


def _reopen(journal: Journal, recorder: Recorder, entry: dict[str, Any]) -> bool:
    """Open the store; then try again what it refused last time."""
    opening = entry if entry["op"] == "open" else _last_opening(journal)
    try:
        recorder.apply(opening)
    except Exception as error:
        _log_traceback()
        recorder.state.error = _brief(error)
        return False
    if journal.failed_path.exists():
        lines = journal.failed_path.read_text().splitlines()
        journal.failed_path.unlink()
        recorder.state.refused = 0
        for number, line in enumerate(lines):
            if not _attempt(journal, recorder, json.loads(line)):
                with open(journal.failed_path, "a") as file:
                    file.writelines(f"{rest}\n" for rest in lines[number:])
                recorder.state.refused = len(lines) - number
                return False
    return entry is opening or _attempt(journal, recorder, entry)


def _attempt(journal: Journal, recorder: Recorder, entry: dict[str, Any]) -> bool:
    """Apply an entry, a second time if need be; keep it for the next start if MLflow refuses it.

    Returns:
        Whether it is done with; where nobody answers it is not, and comes again.
    """
    for last in (False, True):
        try:
            recorder.apply(json.loads(json.dumps(entry)))
            recorder.answered()
            return True
        except Exception as error:
            if recorder.unanswered(error):
                return False
            if not last:
                time.sleep(1.0)
                continue
            _log_traceback()
            recorder.state.error = f"{entry['op']}: {_brief(error)}"
            recorder.state.refused += 1
            with open(journal.failed_path, "a") as file:
                file.write(json.dumps(entry) + "\n")
    return True


def _nobody_answers(error: Exception) -> bool:
    """Whether a store could not be reached at all, as against an answer that refuses."""
    kinds = (kind.__name__ for kind in type(error).__mro__)
    # MLflow's client wraps whatever the connection raised; 500 is the server's word on this very request.
    lost = re.search(r"API request to \S+ failed with (timeout )?exception", str(error))
    return any(re.search("Connect|Timeout", kind) for kind in kinds) or (
        lost is not None and "too many 500 error responses" not in str(error)
    )


def _last_opening(journal: Journal) -> dict[str, Any]:
    opening: dict[str, Any] = {}
    for entry, _ in journal.read(0):
        if entry is not None and entry["op"] == "open":
            opening = entry
    return opening


def _driver_gone(wait: float = 0.3) -> bool:
    """Wait a little for the driver; true when its end of the pipe is closed."""
    readable, _, _ = select.select([sys.stdin], [], [], wait)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


@contextlib.contextmanager
def _first_touch(uri: str) -> Iterator[None]:
    """Let one process at a time open an sqlite store: two that create it at once break each other."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or path.startswith(":"):
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "galray"  # a container without an entry for its user


def _log_traceback() -> None:
    """Tell the log of the exception in hand: MLflow's own words hold the store's address whole."""
    print(without_password(traceback.format_exc()), file=sys.stderr)


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    first = without_password(lines[0][:300]) if lines else ""
    return f"{type(error).__name__}: {first}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
