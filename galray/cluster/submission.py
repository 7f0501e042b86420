"""Runs on a distant cluster through Ray Jobs: submit a configuration, follow it, stop it, ask how it is.

Only the configuration travels (and with it galray's working tree when asked): data, run directories and
checkpoints are named by the configuration and lie where all nodes reach them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galray.cluster.packing import pack_source
from galray.errors import GalrayError

__all__ = ["STAGES", "Job", "JobServer", "check_stage"]

STAGES = ("run", "mock", "tune", "ensemble", "calibrate", "gravity")
"""The commands that can be submitted."""

_SECRET = re.compile(r"secret|token|password|credential|private|key", re.IGNORECASE)
_AGENT_SECONDS = 90.0
_EXIT = {"SUCCEEDED": 0, "STOPPED": 130}


@dataclass(frozen=True)
class Job:
    """A submitted job.

    Attributes:
        id: Its submission id.
        status: PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED.
        message: What Ray says about it.
        started: Seconds since 1970; 0 where it has not started.
        ended: Seconds since 1970; 0 where it has not ended.
        exit_code: 0 for success, 130 for a stopped job, the driver's own otherwise; None while it runs.
    """

    id: str
    status: str
    message: str
    started: float
    ended: float
    exit_code: int | None

    @property
    def over(self) -> bool:
        """Whether it has ended, however."""
        return self.status in ("SUCCEEDED", "STOPPED", "FAILED")


def check_stage(stage: str) -> None:
    """Refuse what is none of `STAGES`.

    Raises:
        GalrayError: It is none.
    """
    if stage not in STAGES:
        raise GalrayError(f"--stage {stage}: no such stage", f"use one of {', '.join(STAGES)}")


class JobServer:
    """The job server of a Ray cluster.

    Arguments:
        address: Of the dashboard, such as http://localhost:8265; RAY_API_SERVER_ADDRESS where empty.

    Raises:
        GalrayError: There is no address, nobody answers there, or the token is missing or wrong.
    """

    def __init__(self, address: str = "") -> None:
        address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "")
        if not re.match(r"https?://[^/\s]+$", address.rstrip("/")):
            what = f"--address '{address}': not an address" if address else "no address of a job server"
            raise GalrayError(what, "give the dashboard's, such as --address http://localhost:8265")
        self.address = address.rstrip("/")
        # Whoever holds a token means to use it; without one the cluster has to be open to all.
        held = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
        if held or (Path.home() / ".ray" / "auth_token").is_file():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Under `uv run` Ray would upload the working directory and rebuild the environment on every worker.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        with self._explained("reach"):
            from ray.job_submission import JobSubmissionClient

            self.client = JobSubmissionClient(self.address)
            logging.getLogger("ray").setLevel(logging.WARNING)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn what Ray's client raises into an error that names the address."""
        try:
            yield
        except GalrayError:
            raise
        except Exception as error:
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if re.search(r"unauthori[sz]ed|authentication|status code 40[13]", str(error), re.IGNORECASE):
                raise GalrayError(
                    f"{self.address}: the job server wants another token: {text}",
                    "set RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token",
                ) from None
            raise GalrayError(
                f"{self.address}: cannot {what}: {text}",
                "check that the cluster runs, and the tunnel or port-forward to its dashboard",
            ) from None

    def submit(
        self,
        toml: str,
        name: str,
        config_hash: str,
        *,
        stage: str = "run",
        env: Mapping[str, str] | None = None,
        working_tree: bool = False,
    ) -> str:
        """Submit a configuration.

        A job of the same run that is still pending or running is not joined by a second one. One that
        has ended is followed by a new attempt, which goes on in the run's directory.

        Arguments:
            toml: The configuration, every key written out.
            name: Of the run.
            config_hash: Of the configuration, for the job's id.
            stage: One of `STAGES`.
            env: Environment variables of the job; never secrets, which Ray shows to all who may look.
            working_tree: Send this checkout of galray along, in place of the one in the image.

        Returns:
            The job's id.

        Raises:
            GalrayError: The same run is being worked on, a variable looks like a secret, or the server
                refuses.
        """
        check_stage(stage)
        for key in env or {}:
            if _SECRET.search(key):
                raise GalrayError(
                    f"--env {key}: looks like a secret, and Ray shows a job's environment to everyone",
                    "give the nodes a role, or put it into a secret of the cluster",
                )
        root = f"galray-{name}-{config_hash[:8]}-{stage}"
        attempts = [job for job in self.jobs() if re.fullmatch(re.escape(root) + r"(-\d+)?", job.id)]
        busy = [job for job in attempts if not job.over]
        if busy:
            raise GalrayError(
                f"{name}: job {busy[0].id} is {busy[0].status.lower()} in the same run directory",
                f"follow it with `galray jobs logs {busy[0].id} --follow`, or stop it",
            )
        identity = root if not attempts else f"{root}-{len(attempts) + 1}"
        variables = {"PYTHONUNBUFFERED": "1", **(env or {})}
        with tempfile.TemporaryDirectory(prefix="galray-submit-") as folder:
            (Path(folder) / "run.toml").write_text(toml, encoding="utf-8")
            if working_tree:
                import galray

                pack_source(Path(folder), Path(galray.__file__).parent)
            with self._explained("submit"):
                return self._send(
                    # `-m` puts the working directory, and with it any source sent along, first.
                    entrypoint=f"python -m galray.cli {stage} run.toml",
                    submission_id=identity,
                    runtime_env={"working_dir": folder, "env_vars": variables},
                    metadata={"galray_run": name, "galray_config_hash": config_hash},
                )

    def _send(self, **job: Any) -> str:
        """Submit; a cluster that has just started is given time to start its agents."""
        until = time.monotonic() + _AGENT_SECONDS
        while True:
            try:
                return str(self.client.submit_job(**job))
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(2.0)

    def jobs(self) -> list[Job]:
        """All of galray's jobs that the server knows, the latest first."""
        with self._explained("list jobs"):
            found = self.client.list_jobs()
        jobs = [_job(details) for details in found if (details.submission_id or "").startswith("galray-")]
        return sorted(jobs, key=lambda job: -job.started)

    def job(self, identity: str) -> Job:
        """One job.

        Raises:
            GalrayError: The server does not know it.
        """
        self._require(identity)
        with self._explained("ask for the job"):
            return _job(self.client.get_job_info(identity))

    def _require(self, identity: str) -> None:
        known = [job.id for job in self.jobs()]
        if identity not in known:
            raise GalrayError(f"{self.address}: no job '{identity}'", f"it has {', '.join(known) or 'none'}")

    def logs(self, identity: str) -> str:
        """What a job has printed so far."""
        self._require(identity)
        with self._explained("read the log"):
            return str(self.client.get_job_logs(identity))

    def stop(self, identity: str) -> bool:
        """Ask a job to end; false where it had ended before."""
        self._require(identity)
        with self._explained("stop the job"):
            return bool(self.client.stop_job(identity))

    def follow(self, identity: str, say: Callable[[str], None], poll: float = 2.0) -> Job:
        """Pass a job's output on until it ends.

        A connection that breaks is made again: the job does not depend on who listens.

        Arguments:
            identity: The job.
            say: Takes every piece of new output.
            poll: Seconds between two looks where the log cannot be followed.

        Returns:
            The job as it ended.
        """
        self._require(identity)
        said = 0

        def pass_on(text: str) -> None:
            nonlocal said
            said += len(text)
            say(text)

        async def tail() -> None:
            seen = 0
            async for piece in self.client.tail_job_logs(identity):
                begin = max(said - seen, 0)  # after a broken connection the log comes from its beginning
                seen += len(piece)
                if piece[begin:]:
                    pass_on(piece[begin:])

        while True:
            with suppress(Exception):
                asyncio.run(tail())
            job = self.job(identity)
            if job.over:
                rest = self.logs(identity)[said:]
                if rest:
                    pass_on(rest)
                return job
            time.sleep(poll)


def _job(details: Any) -> Job:
    status = str(details.status)
    code: int | None = None
    if status in ("SUCCEEDED", "STOPPED", "FAILED"):
        code = _EXIT.get(status)
        if code is None:
            code = (
                details.driver_exit_code if details.driver_exit_code and details.driver_exit_code > 0 else 1
            )
    return Job(
        id=details.submission_id or "",
        status=status,
        message=(details.message or "").strip(),
        started=(details.start_time or 0) / 1e3,
        ended=(details.end_time or 0) / 1e3,
        exit_code=code,
    )
