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
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galray.catalog.mirror import Mirror, Place
from galray.cluster import TaskNeeds
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
_SEND_SECONDS = 20.0
"""How often a trial at a URL sends its checkpoint; its curve goes after every epoch."""


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
    place: Place,
    context: Mapping[str, Any],
    *,
    seed: int,
    epochs: int,
    start: Mapping[str, Any],
    needs: TaskNeeds | None = None,
    threads: int = 1,
    concurrent: int = 1,
    max_crashes: int = 2,
    groups: bool = False,
) -> list[Trial]:
    """Run a search, or go on with one that was killed.

    Arguments:
        function: What a trial does; see `TrialFunction`.
        settings: Space, budget, search and early stopping.
        place: Where the trials and Tune's own state lie: a folder that all nodes share, or the place of a
            URL, of which each node then has a copy of its own trials.
        context: What all trials share.
        seed: Of the draws.
        epochs: Most epochs of a trial, for the rungs of early stopping.
        start: The configuration's own values of the searched keys: tried first.
        needs: What a trial needs of its node; one CPU where not given.
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

    from galray.ensemble.trials import no_cpu, placed, silence

    folder = place.folder
    folder.mkdir(parents=True, exist_ok=True)
    _bring(place)
    trials_folder = folder / "trials"
    shared = {
        "function": function,
        "place": place.below("trials"),
        "context": dict(context),
        "threads": threads,
    }
    held = no_cpu() if groups else placed(needs or TaskNeeds())
    trainable = tune.with_resources(tune.with_parameters(_trial, shared=shared), held)
    with silence(TUNE_GLOBAL_CHECKPOINT_S="5"):
        tuner = _restored(place, trainable)
        while True:
            tried = _tried(folder)
            if tuner is None and tried < settings.trials:
                _forget_experiment(place)
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
                        **place.ray_storage(),
                        failure_config=tune.FailureConfig(max_failures=max_crashes),
                        verbose=0,
                    ),
                )
            if tuner is None:
                break
            results = tuner.fit()
            _bring(place)
            _account_for_the_dead(results, trials_folder)
            # From here on this part of the search is done: it is not restored, only added to.
            write_atomic(folder / _TRIED, {"tried": tried + len(results)})
            place.push("trials/**/*", _TRIED)
            _forget_experiment(place)
            tuner = None
            if settings.hours is not None:
                break  # the time is up, or all trials are done
    trials = read_trials(trials_folder)
    if not any(math.isfinite(trial.loss) for trial in trials):
        reason = trials[0].error if trials else "no trial was started"
        raise GalrayError(f"all {len(trials)} trials failed; the first: {reason}", "widen or mend tune.space")
    return trials


def _bring(place: Place) -> None:
    """Have on this node what the trials on all nodes have found."""
    if isinstance(place, Mirror):
        shutil.rmtree(place.folder / "trials", ignore_errors=True)
        place.pull(prefix="trials/")
        place.pull(_TRIED)


def _forget_experiment(place: Place) -> None:
    """Delete Tune's own state."""
    shutil.rmtree(place.folder / _EXPERIMENT, ignore_errors=True)
    place.remove(f"{_EXPERIMENT}/")


def _tried(folder: Path) -> int:
    """How many draws earlier starts brought to an end; several may have drawn the same choices."""
    return int((_read(folder / _TRIED) or {}).get("tried", 0))


def _trial(config: dict[str, Any], shared: Mapping[str, Any]) -> None:
    """What Tune runs: one training, resumed where an earlier start of the same choices left it."""
    from ray import tune

    # Where this trial is stopped early, the next one in this process begins when its thread has ended. Tune
    # gives that two seconds, on a busy machine too few, and then drops the next trial.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "3600"
    choices = _decoded(config)
    place: Place = shared["place"].below(content_hash(choices))
    folder = place.folder
    best, sent = math.inf, time.monotonic()

    def report(row: dict[str, Any], found_now: bool = True) -> None:
        nonlocal best, sent
        best = min(best, row["validation"])
        if found_now:
            # Before Tune hears of it, which may be the end of this trial.
            whole = time.monotonic() - sent > _SEND_SECONDS
            sent = time.monotonic() if whole else sent
            with contextlib.suppress(GalrayError):  # the next one may arrive
                place.push(*(() if whole else ("*.json",)))
        tune.report({_METRIC: best, "epoch": row["epoch"] + 1})

    with _alone(folder):
        place.clear()
        folder.mkdir(exist_ok=True)
        place.pull()
        write_atomic(folder / "choices.json", choices)
        done = _read(folder / "outcome.json")
        rows = _read(folder / "curve.json") or []
        for row in rows:
            report(row, False)  # what an earlier start found: the scheduler of this one may not have seen it
        if done is not None and not done.get("error"):
            return
        try:
            with limit_threads(shared["threads"]):
                function: Any = resolve(shared["function"])
                outcome = function(choices, str(folder), shared["context"], report)
        except Exception as error:
            # A loss that blew up is a finding about these choices: it is counted, and the search goes on.
            write_atomic(folder / "error.txt", traceback.format_exc())
            write_atomic(folder / "outcome.json", {"error": str(error).splitlines()[0]})
            place.push()
            tune.report({_METRIC: math.inf, "epoch": max(len(rows), 1)})
            return
        write_atomic(folder / "outcome.json", outcome or {})
        place.push(last=["outcome.json"])


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for another trial that drew the same choices; what it finds is then found at once.

    Where there are no locks, as between two nodes without a shared disk, both train and the last one writes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _restored(place: Place, trainable: Any) -> Any:
    """The tuner of a search that was killed; None where there is nothing to go on with."""
    from ray import tune

    storage = place.ray_storage()
    path, system = f"{storage['storage_path']}/{_EXPERIMENT}", storage.get("storage_filesystem")
    if not (place.sizes(f"{_EXPERIMENT}/") and tune.Tuner.can_restore(path, storage_filesystem=system)):
        return None
    try:
        return tune.Tuner.restore(
            path,
            trainable=trainable,
            resume_unfinished=True,
            resume_errored=True,
            storage_filesystem=system,
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
