"""The driver's side of tracking: say what happened and go on."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import galray
from galray.ensemble import MemberOutcome, MemberSpec
from galray.errors import GalrayWarning
from galray.tracking.journal import (
    FROM_ENVIRONMENT,
    Journal,
    State,
    flatten,
    numbers,
    read_checks,
    read_curve,
)
from galray.tracking.settings import TrackingSettings, without_password

__all__ = ["Tracker"]

logger = logging.getLogger(__name__)


class Tracker:
    """Records one run in MLflow: a parent run, a child for each member.

    Every call returns at once: it appends to a journal in the run directory, and a process of its own
    imports MLflow (which takes ten seconds), creates database and experiment, and writes. That process
    sees when this one dies, even by `kill -9`, and then ends the run as FAILED; a run that goes on later
    goes on in the same MLflow run. Nothing that MLflow does or fails to do raises here; at the end one
    warning tells of what could not be written, and the next start of the run writes it.

    Use as a context manager: the run ends FINISHED, or FAILED if the block raised.

    Arguments:
        settings: The tracking section of the configuration.
        folder: The run directory.
        name: Name of the run.
        params: Configuration, nested; becomes dotted parameters.
        tags: Tags, such as git revision, config hash, data manifest hash and seed.
    """

    def __init__(
        self,
        settings: TrackingSettings,
        folder: Path | str,
        name: str = "",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.settings = settings
        self.folder = Path(folder).absolute()
        self.uri = settings.resolve_uri(self.folder)
        self._journal = Journal(self.folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._open = False
        if not settings.enabled:
            return
        try:
            self._journal.folder.mkdir(parents=True, exist_ok=True)
            self._open = True
            self._say(
                "open",
                name=name or self.folder.name,
                # Whatever password the environment holds stays there: the journal is a file of the run.
                uri=FROM_ENVIRONMENT if without_password(self.uri) != self.uri else self.uri,
                experiment=settings.experiment,
                artifacts=settings.resolve_artifacts(self.folder),
                system=settings.system_seconds,
                params=flatten(params or {}),
                tags={str(key): str(value) for key, value in (tags or {}).items()},
            )
            self._process = self._start_writer()
        except OSError as error:
            self._open = False
            warnings.warn(f"this run is not tracked: {error}", GalrayWarning, stacklevel=2)
            return
        atexit.register(self.close, "FAILED")

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has created it."""
        return State.load(self._journal).parent or None

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters of the run; nested keys are joined by dots."""
        self._say("params", params=flatten(values))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._say("tags", tags={str(key): str(value) for key, value in values.items()})

    def metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Record numbers of the run; nested keys are joined by dots, what is no number is left out."""
        self._say("metrics", metrics=numbers(values), step=step)

    def artifact(self, path: Path | str, folder: str = "") -> None:
        """Store a file, or a folder with all in it, beside the run; it must stay where it is until then.

        Arguments:
            path: The file or folder.
            folder: Where to put it among the artefacts.
        """
        self._say("artifact", path=str(Path(path).absolute()), folder=folder)

    def follow(self, spec: MemberSpec, folder: Path | str) -> None:
        """Record a member's curve while it trains, epoch by epoch, from the file that it is written to.

        Arguments:
            spec: The member.
            folder: Its work folder, in which `curve.json` is or will be.
        """
        self._say(
            "follow",
            id=spec.id,
            name=spec.name,
            tags=spec.tags,
            curve=str(Path(folder).absolute() / "curve.json"),
        )

    def member(self, spec: MemberSpec, outcome: MemberOutcome) -> None:
        """Record a member that ended: tags, what is left of its curve, its numbers, checks and weights.

        The curve is `curve.json` in the member's folder, a list of dictionaries with an `epoch` each.
        A member that an earlier start has recorded is not recorded again.

        Arguments:
            spec: The member.
            outcome: How it ended.
        """
        files = [outcome.folder / name for name in ("spec.json", "result.json", "checks.json", "error.txt")]
        if self.settings.weights:
            files += [outcome.folder / name for name in ("model", "field")]
        self._say(
            "member",
            id=spec.id,
            name=spec.name,
            tags=spec.tags | ({"galray.error": outcome.error[:5000]} if outcome.error else {}),
            params=flatten(spec.to_dict()),
            curve=read_curve(outcome.folder / "curve.json"),
            metrics=numbers(outcome.result) | {"seconds": outcome.seconds} | read_checks(outcome.folder),
            artifacts=[str(path) for path in files if path.exists()],
            status="FINISHED" if outcome.finished else "FAILED",
            seconds=outcome.seconds,
        )

    def member_metrics(self, identity: str, values: Mapping[str, Any]) -> None:
        """Add numbers to a member that ended and was recorded, such as its ρ_DM once baryons are known.

        Arguments:
            identity: The member's id.
            values: Nested numbers; they stand beside the member's others, as ``final.NAME``.
        """
        self._say("member_metrics", id=identity, metrics=numbers(values))

    def child(
        self,
        *,
        identity: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        metrics: Mapping[str, Any],
        artifacts: Sequence[Path],
        seconds: float,
        failed: bool = False,
    ) -> None:
        """Record a run below this one that ended; what an earlier start has recorded stays as it is.

        Arguments:
            identity: Hash of its content.
            name: Name of the run.
            params: Nested; become dotted parameters.
            tags: Tags.
            metrics: Nested numbers.
            artifacts: Files and folders; they must stay where they are until MLflow has them.
            seconds: Wall time.
            failed: Whether it failed.
        """
        self._say(
            "member",
            id=identity,
            name=name,
            tags={str(key): str(value) for key, value in tags.items()},
            params=flatten(params),
            curve=[],
            metrics=numbers(metrics) | {"seconds": seconds},
            artifacts=[str(path.absolute()) for path in artifacts],
            status="FAILED" if failed else "FINISHED",
            seconds=seconds,
        )

    def close(self, status: str = "FINISHED") -> None:
        """End the run and wait, up to the settings' patience, until MLflow has all of it.

        Arguments:
            status: "FINISHED" or "FAILED". A second call does nothing.
        """
        if not self._open:
            return
        self._say("close", status=status)
        self._open = False
        atexit.unregister(self.close)
        process, self._process = self._process, None
        if process is None:
            return
        shown = without_password(self.uri)
        with contextlib.suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()
        try:
            process.wait(timeout=self.settings.patience)
        except subprocess.TimeoutExpired:
            logger.warning("MLflow at %s is slow; the rest is written in the background", shown)
            return
        state = State.load(self._journal)
        if process.returncode or state.error:
            reason = (
                without_password(state.error) or f"the writing process ended with code {process.returncode}"
            )
            warnings.warn(
                f"MLflow at {shown} did not take everything: {reason}; the rest is kept in "
                f"{self._journal.folder} and written when the run is started again",
                GalrayWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close("FINISHED" if kind is None else "FAILED")

    def _say(self, what: str, **content: Any) -> None:
        """Append an entry; a full disk costs the record, not the measurement."""
        if not self._open:
            return
        try:
            self._journal.append({"op": what, "time": int(time.time() * 1000)} | content)
        except (OSError, ValueError, TypeError) as error:
            logger.warning("tracking could not note %r: %s", what, error)

    def _start_writer(self) -> subprocess.Popen[bytes]:
        source = str(Path(galray.__file__).resolve().parents[1])
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH", "")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        env.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
        env.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        env.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        command = [sys.executable, "-m", "galray.tracking.writer", str(self.folder)]
        log: IO[bytes]
        with open(self._journal.log_path, "ab") as log:
            # A session of its own: an interrupt on the terminal is for the driver, which then says "close".
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True
            )
