"""Members as Ray Tune trials: one trial each, many trials after another in the same worker process.

Starting a worker and importing torch costs several seconds, so the trials' actors are reused. A trial
is not checkpointed and an experiment is never restored by Tune: members are idempotent and addressed by
their content, so after any death a new experiment over the missing ones is all it takes, and it may
even follow a changed design. What Tune writes under `ensemble/tune` is scratch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ray import tune

from galray.catalog.mirror import Place
from galray.cluster import TaskNeeds
from galray.ensemble.execute import MemberFunction, execute, limit_threads
from galray.ensemble.members import MemberSpec
from galray.ensemble.settings import EnsembleSettings
from galray.ensemble.store import MemberOutcome, MemberStore

__all__ = ["no_cpu", "placed", "run_trials", "silence"]

_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt shall reach the caller, who closes the tracker's runs
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # the experiment's state is never restored
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_POLL_SECONDS = 1.0
_POLL_SECONDS_AT_URL = 10.0


class MemberTrial(tune.Trainable):
    """A trial that runs one member in one step, then takes the next member in the same process."""

    def setup(self, config: dict[str, Any], shared: Mapping[str, Any] | None = None) -> None:
        """Keep what all members share."""
        assert shared is not None
        self._shared = shared

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Accept another member."""
        return True

    def step(self) -> dict[str, Any]:
        """Run the member; its outcome is on disk when this returns."""
        shared = self._shared
        spec = MemberSpec.from_dict(shared["specs"][self.config["member"]])
        with limit_threads(shared["threads"]):
            outcome = execute(shared["function"], spec, shared["place"], shared["context"])
        return {"done": True, "status": outcome.status, "seconds": outcome.seconds}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: a member keeps its own checkpoints in its work folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing."""


def _tell_nobody(spec: MemberSpec, message: str) -> None:
    """Stand in for the driver's listener in a pickled copy."""


class _Watch(tune.Callback):
    """Tells the driver of every member that ended and of the progress of those that run."""

    def __init__(
        self,
        specs: Sequence[MemberSpec],
        store: MemberStore,
        ended: Callable[[MemberSpec, str], None],
        on_progress: Callable[[MemberSpec, float, str], None] | None,
    ) -> None:
        self._specs = specs
        self._store = store
        self._ended = ended
        self._on_progress = on_progress
        self._seen: set[int] = set()
        self._next_poll = 0.0
        self._poll_seconds = _POLL_SECONDS if type(store.place) is Place else _POLL_SECONDS_AT_URL

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled without the listeners, which hold open files and threads of the driver.

        Tune writes the experiment to disk so that it can be restored; galray never restores it, since
        members are found again by their results, so the copy need not be able to tell anyone.
        """
        return (_Watch, (self._specs, self._store, _tell_nobody, None))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look for members that ended and for progress, at most once a second."""
        if time.monotonic() < self._next_poll:
            return
        self._next_poll = time.monotonic() + self._poll_seconds
        for trial in trials:
            place = trial.config["member"]
            if trial.status in ("TERMINATED", "ERROR") and place not in self._seen:
                self._end(trial)
            elif trial.status == "RUNNING" and self._on_progress is not None:
                spec = self._specs[place]
                progress = self._store.look(spec)
                if progress is not None:
                    self._on_progress(spec, *progress)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass a member that returned on at once."""
        self._end(trial)

    def _end(self, trial: Any) -> None:
        place = trial.config["member"]
        if place in self._seen:
            return
        self._seen.add(place)
        message = ""
        if trial.status == "ERROR":
            message = str(trial.get_error() or "the worker process died")
        self._ended(self._specs[place], message)


def run_trials(
    specs: Sequence[MemberSpec],
    function: str | MemberFunction,
    store: MemberStore,
    context: Mapping[str, Any],
    settings: EnsembleSettings,
    concurrent: int,
    on_outcome: Callable[[MemberOutcome], None],
    on_progress: Callable[[MemberSpec, float, str], None] | None = None,
    groups: bool = False,
) -> None:
    """Run members through Ray Tune on the connected cluster.

    Arguments:
        specs: Members to run, the longest first for the best packing.
        function: Their function.
        store: Their folder.
        context: What they share; put into the object store once, arrays arrive read-only.
        settings: Resources of a member and how often a dead process is replaced.
        concurrent: Members at the same time.
        on_outcome: Called in this process for every member that ended.
        on_progress: Called in this process with (member, fraction, note) about once a second.
        groups: The members start Ray Train workers of their own, which hold the CPUs and GPUs.
    """
    scratch = store.folder.parent / "ensemble" / "tune"
    shutil.rmtree(scratch, ignore_errors=True)
    reported: set[str] = set()

    def ended(spec: MemberSpec, message: str) -> None:
        if spec.id in reported:
            return
        reported.add(spec.id)
        outcome = store.read(spec)
        if outcome is None:
            # The function never came back: killed, out of memory, or a node that was lost.
            reason = message or (
                f"the member ended on its worker but {store.path(spec)} is not here: is the run directory "
                "on storage that all nodes share?"
            )
            store.take_over(spec)
            outcome = store.finish(spec, seconds=0.0, traceback=f"WorkerDied: {reason}")
        on_outcome(outcome)

    shared = {
        "specs": [spec.to_dict() for spec in specs],
        "function": function,
        "place": store.place,
        "context": dict(context),
        "threads": settings.threads,
    }
    held = no_cpu() if groups else placed(settings.needs)
    trainable = tune.with_resources(tune.with_parameters(MemberTrial, shared=shared), held)
    with silence():
        tuner = tune.Tuner(
            trainable,
            param_space={"member": tune.grid_search(list(range(len(specs))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=True),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch.parent),
                failure_config=tune.FailureConfig(max_failures=settings.max_crashes),
                callbacks=[_Watch(specs, store, ended, on_progress)],
                verbose=0,
            ),
        )
        results = tuner.fit()
    # Belt and braces: nobody may be missing from the account, whatever the callbacks saw.
    for place in range(len(results)):
        result = results[place]
        if result.config is not None:
            ended(specs[result.config["member"]], str(result.error or ""))
    for spec in specs:
        ended(spec, "the trial never started")
    shutil.rmtree(scratch, ignore_errors=True)


def placed(needs: TaskNeeds) -> tune.PlacementGroupFactory:
    """What a trial holds that does its work itself, and the labels of the node that it goes to."""
    labels = [dict(needs.labels)] if needs.labels else None
    return tune.PlacementGroupFactory([needs.bundle()], bundle_label_selector=labels)


def no_cpu() -> tune.PlacementGroupFactory:
    """What a trial holds whose work is done by Ray Train workers of its own.

    A trial that held even part of a CPU would keep the last worker of its own group from it, for ever; Tune
    asks for something, and a byte of memory stands in nobody's way.
    """
    return tune.PlacementGroupFactory([{"memory": 1}])


@contextlib.contextmanager
def silence(**more: str) -> Iterator[None]:
    """Keep Tune's tables and warnings off the terminal, and put everything back afterwards.

    Arguments:
        more: Further environment variables of Tune, for the same time.
    """
    quiet = _QUIET | more
    before = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
