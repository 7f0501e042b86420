"""A hyperparameter search through Ray Tune: it draws, stops early, restores; choices address a trial.

Tune decides what is tried and what is stopped. What a trial found lies in a folder of its own, named by the
hash of its choices, with the checkpoints of its training: after any death `Tuner.restore` brings back the
decisions, and a trial goes on at its last epoch, whatever Tune remembers of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galray.ensemble.execute import limit_threads, resolve
from galray.ensemble.search_space import SearchRange, TuneSettings
from galray.errors import GalrayError
from galray.provenance import content_hash, write_atomic

__all__ = ["Trial", "read_trials", "run_search"]

TrialFunction = Callable[
    [dict[str, Any], str, Mapping[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]
]
"""`function(choices, folder, context, report) -> outcome`; `report` takes each epoch's row of the curve."""

_METRIC = "held_out_loss"
_EXPERIMENT = "tune"
_TRIED = "search.json"


@dataclass(frozen=True)
class Trial:
    """One trial, as its folder tells.

    Attributes:
        id: Hash of its choices.
        choices: Values by dotted key.
        status: ``finished``, ``stopped`` (early, or not ended yet) or ``failed``.
        loss: Least held-out loss so far; NaN for a failed trial.
        epochs: Epochs done.
        seconds: Time of its training.
        error: Why it failed.
        folder: Where it lies.
    """

    id: str
    choices: dict[str, Any]
    status: str
    loss: float
    epochs: int
    seconds: float
    error: str = ""
    folder: Path = field(default=Path(), compare=False)


def read_trials(folder: Path) -> list[Trial]:
    """The trials of a search, the best first, failed ones last."""
    trials = []
    for path in sorted(folder.glob("*/choices.json")):
        place = path.parent
        curve = _read(place / "curve.json") or []
        outcome = _read(place / "outcome.json")
        error = (outcome or {}).get("error", "")
        status = "failed" if error else "finished" if outcome else "stopped"
        losses = [row["validation"] for row in curve if isinstance(row.get("validation"), int | float)]
        loss = math.nan if error or not losses else min(losses)
        seconds = curve[-1]["seconds"] if curve else 0.0
        trials.append(
            Trial(place.name, _read(path) or {}, status, loss, len(curve), float(seconds), error, place)
        )
    return sorted(trials, key=lambda t: (math.isnan(t.loss), t.loss, t.id))


def _read(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def run_search(
    function: str | TrialFunction,
    settings: TuneSettings,
    folder: Path,
    context: Mapping[str, Any],
    *,
    seed: int,
    epochs: int,
    start: Mapping[str, Any],
    cpus: float = 1.0,
    gpus: float = 0.0,
    threads: int = 1,
    concurrent: int = 1,
    max_crashes: int = 2,
    groups: bool = False,
) -> list[Trial]:
    """Run a search, or go on with one that was killed.

    Arguments:
        function: What a trial does; see `TrialFunction`.
        settings: Space, budget, search and early stopping.
        folder: Where the trials and Tune's own state lie; storage that all nodes share.
        context: What all trials share.
        seed: Of the draws.
        epochs: Most epochs of a trial, for the rungs of early stopping.
        start: The configuration's own values of the searched keys: tried first.
        cpus: CPUs of a trial.
        gpus: GPUs of a trial; may be a fraction.
        threads: Threads of a trial.
        concurrent: Trials at the same time.
        max_crashes: How often a trial whose process died is started again.
        groups: Trials start Ray Train workers of their own, which hold the CPUs and GPUs.

    Returns:
        All trials, the best first.

    Raises:
        GalrayError: Every trial failed.
    """
    from ray import tune

    from galray.ensemble.trials import no_cpu, silence

    folder.mkdir(parents=True, exist_ok=True)
    trials_folder, experiment = folder / "trials", folder / _EXPERIMENT
    shared = {
        "function": function,
        "folder": str(trials_folder),
        "context": dict(context),
        "threads": threads,
    }
    held: Any = no_cpu() if groups else {"cpu": cpus, "gpu": gpus}
    trainable = tune.with_resources(tune.with_parameters(_trial, shared=shared), held)
    with silence(TUNE_GLOBAL_CHECKPOINT_S="5"):
        tuner = _restored(experiment, trainable)
        while True:
            tried = _tried(folder)
            if tuner is None and tried < settings.trials:
                shutil.rmtree(experiment, ignore_errors=True)
                tuner = tune.Tuner(
                    trainable,
                    param_space=_space(settings.space) if settings.search == "random" else None,
                    tune_config=tune.TuneConfig(
                        metric=_METRIC,
                        mode="min",
                        num_samples=settings.trials - tried,
                        search_alg=_searcher(
                            settings, seed + tried, start, read_trials(trials_folder), concurrent
                        ),
                        scheduler=_scheduler(settings, epochs),
                        max_concurrent_trials=None if settings.search == "random" else concurrent,
                        time_budget_s=None if settings.hours is None else 3600 * settings.hours,
                        reuse_actors=not groups,  # a group that is stopped early ends with its process
                    ),
                    run_config=tune.RunConfig(
                        name=_EXPERIMENT,
                        storage_path=str(folder.absolute()),
                        failure_config=tune.FailureConfig(max_failures=max_crashes),
                        verbose=0,
                    ),
                )
            if tuner is None:
                break
            results = tuner.fit()
            _account_for_the_dead(results, trials_folder)
            # From here on this part of the search is done: it is not restored, only added to.
            write_atomic(folder / _TRIED, {"tried": tried + len(results)})
            shutil.rmtree(experiment, ignore_errors=True)
            tuner = None
            if settings.hours is not None:
                break  # the time is up, or all trials are done
    trials = read_trials(trials_folder)
    if not any(math.isfinite(trial.loss) for trial in trials):
        reason = trials[0].error if trials else "no trial was started"
        raise GalrayError(f"all {len(trials)} trials failed; the first: {reason}", "widen or mend tune.space")
    return trials


def _tried(folder: Path) -> int:
    """How many draws earlier starts brought to an end; several may have drawn the same choices."""
    return int((_read(folder / _TRIED) or {}).get("tried", 0))


def _trial(config: dict[str, Any], shared: Mapping[str, Any]) -> None:
    """What Tune runs: one training, resumed where an earlier start of the same choices left it."""
    from ray import tune

    choices = _decoded(config)
    place = Path(shared["folder"]) / content_hash(choices)
    place.mkdir(parents=True, exist_ok=True)
    write_atomic(place / "choices.json", choices)
    best = math.inf

    def report(row: dict[str, Any]) -> None:
        nonlocal best
        best = min(best, row["validation"])
        tune.report({_METRIC: best, "epoch": row["epoch"] + 1})

    with _alone(place):
        done = _read(place / "outcome.json")
        rows = _read(place / "curve.json") or []
        for row in rows:
            report(row)  # what an earlier start found: the scheduler of this one may not have seen it
        if done is not None and not done.get("error"):
            return
        try:
            with limit_threads(shared["threads"]):
                function: Any = resolve(shared["function"])
                outcome = function(choices, str(place), shared["context"], report)
        except Exception as error:
            # A loss that blew up is a finding about these choices: it is counted, and the search goes on.
            write_atomic(place / "error.txt", traceback.format_exc())
            write_atomic(place / "outcome.json", {"error": str(error).splitlines()[0]})
            tune.report({_METRIC: math.inf, "epoch": max(len(rows), 1)})
            return
        write_atomic(place / "outcome.json", outcome or {})


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Wait for another trial that drew the same choices; what it finds is then found at once."""
    with (place / ".lock").open("w") as stream:
        with contextlib.suppress(OSError):  # a file system without locks: both train, the last one writes
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _restored(experiment: Path, trainable: Any) -> Any:
    """The tuner of a search that was killed; None where there is nothing to go on with."""
    from ray import tune

    if not (experiment.is_dir() and tune.Tuner.can_restore(str(experiment))):
        return None
    try:
        return tune.Tuner.restore(
            str(experiment), trainable=trainable, resume_unfinished=True, resume_errored=True
        )
    except Exception:
        # A state that was cut off while it was written: the trials' own folders hold all they found.
        return None


def _space(space: Mapping[str, SearchRange]) -> dict[str, Any]:
    """The search space in Tune's terms."""
    from ray import tune

    found: dict[str, Any] = {}
    for key, one in space.items():
        if one.values:
            found[key] = tune.choice([_encode(value) for value in one.values])
            continue
        low, high = one.low, one.high
        assert low is not None
        assert high is not None
        if one.integer:
            draw = tune.lograndint if one.log else tune.randint
            found[key] = draw(int(low), int(high) + 1)
        else:
            found[key] = tune.loguniform(low, high) if one.log else tune.uniform(low, high)
    return found


def _encode(value: Any) -> Any:
    """A choice as Optuna takes it: numbers, words and truth as they are, lists as JSON."""
    return json.dumps(value) if isinstance(value, list | tuple) else value


def _decode(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


def _within(one: SearchRange, value: Any) -> bool:
    """Whether a value lies in a range."""
    if one.values:
        return _encode(value) in [_encode(choice) for choice in one.values]
    low, high = one.low, one.high
    assert low is not None
    assert high is not None
    return isinstance(value, int | float) and low <= value <= high


def _searcher(
    settings: TuneSettings, seed: int, start: Mapping[str, Any], known: list[Trial], concurrent: int
) -> Any:
    """Optuna, told of the trials that are known, or draws at random; the start first where it is inside."""
    inside = all(_within(one, start.get(key)) for key, one in settings.space.items())
    first = [{key: _encode(start[key]) for key in settings.space}] if inside and not known else []
    if settings.search == "random":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(
            points_to_evaluate=first or None, max_concurrent=concurrent, random_state=seed
        )
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    told = [trial for trial in known if math.isfinite(trial.loss)]
    points = [{key: _encode(value) for key, value in trial.choices.items()} for trial in told]
    return OptunaSearch(
        space=OptunaSearch.convert_search_space(_space(settings.space)),
        metric=_METRIC,
        mode="min",
        points_to_evaluate=points + first or None,
        evaluated_rewards=[trial.loss for trial in told] if told else None,
        seed=seed,
    )


def _scheduler(settings: TuneSettings, epochs: int) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if not settings.asha or epochs <= settings.grace_epochs:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        max_t=epochs + 1,  # who came to the end shall return by himself, with his outcome written
        grace_period=settings.grace_epochs,
        reduction_factor=settings.reduction,
    )


def _account_for_the_dead(results: Any, folder: Path) -> None:
    """A trial whose process died every time left no outcome: say so in its folder."""
    for place in range(len(results)):
        result = results[place]
        if result.error is None or result.config is None:
            continue
        target = folder / content_hash(_decoded(result.config))
        if not (target / "outcome.json").is_file():
            target.mkdir(parents=True, exist_ok=True)
            write_atomic(target / "choices.json", _decoded(result.config))
            reason = (str(result.error).splitlines() or ["the process died"])[0]
            write_atomic(target / "outcome.json", {"error": f"the trial's process died: {reason}"})


def _decoded(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _decode(value) for key, value in config.items()}
