"""`galray tune`: the hyperparameters with the least held-out loss, as a configuration that runs.

The measure is the objective's own held-out loss, never the Boltzmann residual: a model that predicts
nothing has none of that. Every trial sees the same training and held-out stars, so that their losses are
compared star by star.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from galray.catalog.mirror import Mirror, Place, place_of
from galray.config import RunConfig, load_config, to_toml, with_values
from galray.ensemble import Trial, concurrent_members, run_search
from galray.errors import GalrayError
from galray.pipeline import Pipeline
from galray.provenance import content_hash, write_atomic
from galray.seeds import seed_for

__all__ = ["TuneResult", "checked_space", "train_trial", "tune"]


_LOOK_SECONDS = 0.5
_LOOK_SECONDS_AT_URL = 5.0


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes:
        trials: The trials, the best first.
        config: The configuration with the winner's choices.
        path: Where that is written.
        gain: Held-out loss of the configuration's own values less the winner's, mean over stars; NaN where
            they were not among the trials that ended.
        gain_error: Its standard error over the same held-out stars.
    """

    trials: list[Trial]
    config: RunConfig
    path: Path
    gain: float
    gain_error: float


def checked_space(config: RunConfig) -> dict[str, Any]:
    """The configuration's own values of the searched keys, after every corner of the space proved valid.

    Raises:
        GalrayError: No key is to be varied, one is unknown, or a value of its range is not allowed.
    """
    settings = config.tune
    if not settings.space:
        raise GalrayError(
            "tune.space: no key to vary",
            f'for example [tune.space] "training.{settings.family}.learning_rate" = '
            "{ low = 1e-4, high = 1e-2, log = true }",
        )
    if settings.family not in config.methods:
        raise GalrayError(
            f"tune.family: {settings.family} is not among the run's methods {', '.join(config.methods)}",
            f"add it with --set 'methods=[\"{settings.family}\"]'",
        )
    own: dict[str, Any] = {}
    for key, one in settings.space.items():
        for corner in one.corners:
            with_values(config, {key: corner}, f"tune.space.{key}", "mend tune.space")
        value: Any = config.model_dump(mode="json")
        for part in key.split("."):
            value = value[part]
        own[key] = value
    return own


def train_trial(
    choices: dict[str, Any],
    folder: str,
    context: Mapping[str, Any],
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """One trial: a model of the family with these choices, trained on the stars that all trials share.

    Arguments:
        choices: Values by dotted key.
        folder: Where curve, checkpoint, weights and held-out losses go.
        context: ``config`` (JSON of the run configuration) and ``store`` (path).
        report: Takes each epoch's row.

    Returns:
        Best loss, its epoch, seconds.
    """
    import torch

    from galray import training
    from galray.catalog import ShardStore
    from galray.ensemble import split_indices
    from galray.phasespace import Ball, build_model, save_model

    base = RunConfig.model_validate(context["config"])
    config = with_values(base, choices, "tune", "mend tune.space")
    family = config.tune.family
    settings = getattr(config.training, family)
    store, target = ShardStore(context["store"], config.catalog.storage.signed), Path(folder)
    states = store.states(dtype=np.float32)
    if config.tune.stars is not None and config.tune.stars < len(states):
        rng = np.random.default_rng(seed_for(config.seed, "tune", "stars"))
        states = states[np.sort(rng.choice(len(states), config.tune.stars, replace=False))]
    # As in a member: the split is the run's own, so that the winner is judged by the stars it will be.
    rows = split_indices(len(states), settings.validation_fraction, seed_for(config.seed, "split"))
    train, held = (torch.from_numpy(states[np.sort(part)]) for part in rows)
    seed = seed_for(config.seed, "tune", "training")
    assert store.ball is not None
    ball = Ball(store.ball.center, store.ball.radius)
    model = build_model(family, getattr(config, family), ball, train, seed=seed)
    place = place_of(target, config.catalog.storage.signed)
    path = target / "curve.json"
    curve: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []

    def on_epoch(row: dict[str, Any]) -> None:
        del curve[row["epoch"] :]  # epochs after the last checkpoint are done again
        curve.append(row)
        write_atomic(path, curve)
        report(row)

    objective = training.objective(family, getattr(config, family))
    if settings.max_workers > 1:
        result = _followed(
            lambda: training.fit_distributed(
                family,
                model,
                train,
                held,
                settings,
                seed=seed,
                storage=place,
                name="checkpoint",
                curve="curve.json",
                labels=config.ensemble.labels,
            ),
            place,
            len(curve),
            report,
        )
    else:
        result = training.fit(
            model,
            objective,
            train,
            held,
            settings,
            seed=seed,
            checkpoint_dir=target / "checkpoint",
            on_epoch=on_epoch,
        )
    model.cpu()
    with torch.no_grad():
        losses = objective.validate(model, objective.prepare(model, held, validation=True))
    np.save(target / "held_out.npy", losses.float().numpy())
    save_model(model, target / "model")
    shutil.rmtree(target / "checkpoint", ignore_errors=True)  # of use until the weights are safe, and large
    place.remove("checkpoint/")
    return {key: getattr(result, key) for key in ("best", "best_epoch", "epochs", "seconds")}


def _followed(
    work: Callable[[], Any], place: Place, known: int, report: Callable[[dict[str, Any]], None]
) -> Any:
    """Train in a thread, and report the curve that the workers write, epoch by epoch.

    Reports come from the thread that Tune runs the trial in. Where one of them ends the trial, the training
    goes with the trial's process.

    Arguments:
        work: The training.
        place: Where it writes its curve.
        known: Epochs that are reported already.
        report: Takes each epoch's row.
    """
    done: list[Any] = []

    def run() -> None:
        try:
            done.append((work(), None))
        except Exception as error:
            done.append((None, error))

    threading.Thread(target=run, daemon=True).start()
    while True:
        ended = bool(done)
        rows = json.loads(place.read("curve.json") or b"[]")
        for row in rows[known:]:
            report(row)
        known = max(known, len(rows))
        if ended:
            result, error = done[0]
            if error is not None:
                raise error
            return result
        time.sleep(_LOOK_SECONDS_AT_URL if isinstance(place, Mirror) else _LOOK_SECONDS)


def tune(config: RunConfig | str | Path, *, console: Any = None, overwrite: bool = False) -> TuneResult:
    """Search for the hyperparameters with the least held-out loss; goes on where a killed search stopped.

    Arguments:
        config: A configuration with a ``[tune]`` section, its file or its name.
        console: Where progress is printed.
        overwrite: Discard a run directory of another configuration.

    Returns:
        The trials and the winner, which is also written to ``tune/best.toml`` in the run directory.

    Raises:
        GalrayError: The space is empty or not valid, Ray is off, or every trial failed.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config)
    own = checked_space(config)
    if not config.cluster.enabled:
        raise GalrayError("cluster.enabled = false, but the search runs on Ray", "set cluster.enabled = true")
    pipeline = Pipeline(config, console, overwrite=overwrite)
    place = config.place.below("tune").below(search_hash(config))
    with pipeline.session():
        if config.mock is not None:
            pipeline.run_mock()
        store = pipeline.run_catalog()
        store.require_stars()
        pipeline.connect()
        with pipeline.console.stage("tune", f"{config.tune.trials} trials of {config.tune.family}"):
            trials = _search(config, store.location, place, own)
        found = _conclude(config, place.folder, trials, own)
        _record(config, place.folder, found)
        config.place.below("tune").push("best.toml", f"{place.folder.name}/**/*")
    return found


def _search(config: RunConfig, store: str, place: Place, own: Mapping[str, Any]) -> list[Trial]:
    """Run the trials on the connected cluster."""
    ensemble, settings = config.ensemble, getattr(config.training, config.tune.family)
    slots = concurrent_members(ensemble, config.tune.trials, settings.max_workers)
    return run_search(
        "galray.tuning:train_trial",
        config.tune,
        place,
        {"config": config.model_dump(mode="json"), "store": store},
        seed=seed_for(config.seed, "tune", "draws") % 2**31,
        epochs=settings.epochs,
        start=own,
        needs=ensemble.needs,
        threads=ensemble.threads,
        concurrent=slots,
        max_crashes=ensemble.max_crashes,
        groups=settings.max_workers > 1,
    )


def _record(config: RunConfig, folder: Path, found: TuneResult) -> None:
    """The search as one MLflow run, a child for every trial; the winner is tagged and its weights kept."""
    from galray.tracking import Tracker

    run = config.run_dir.resolve()
    tracking = config.tracking.model_copy(
        update={
            "uri": config.tracking.resolve_uri(run),
            "artifacts": config.tracking.resolve_artifacts(run) or "",
        }
    )
    tags = {"galray.stage": "tune", "galray.config_hash": config.hash, "galray.winner": found.trials[0].id}
    with Tracker(
        tracking, folder, f"{config.name} tune", config.tune.model_dump(mode="json"), tags
    ) as tracker:
        for trial in found.trials:
            winner = trial is found.trials[0]
            names = ("choices.json", "curve.json", "error.txt", *(("model",) if winner else ()))
            tracker.child(
                identity=trial.id,
                name=f"trial {trial.id[:6]}",
                params=trial.choices,
                tags={
                    "galray.status": trial.status,
                    "galray.error": trial.error,
                    "galray.winner": str(winner),
                },
                metrics={"held_out_loss": trial.loss, "epochs": trial.epochs},
                artifacts=[trial.folder / name for name in names if (trial.folder / name).exists()],
                seconds=trial.seconds,
                failed=trial.status == "failed",
            )
        tracker.metrics({"held_out_loss": found.trials[0].loss, "gain": found.gain})
        for path in (found.path, folder / "trials.json"):
            tracker.artifact(path)


def search_hash(config: RunConfig) -> str:
    """Address of a search: what is searched, on what; its budget may be changed and the search go on."""
    space = config.tune.model_dump(mode="json", exclude={"trials", "hours"})
    return content_hash([config.hash, space])


def _conclude(config: RunConfig, folder: Path, trials: list[Trial], own: Mapping[str, Any]) -> TuneResult:
    """The winner as a configuration, the table of trials, and what was gained over the start."""
    best = trials[0]
    start = next((t for t in trials if t.choices == dict(own)), None)
    gain, error = math.nan, math.nan
    if start is not None:
        losses = [_losses(t.folder) for t in (start, best)]
        if losses[0] is not None and losses[1] is not None:
            difference = losses[0].astype(float) - losses[1]
            gain = float(difference.mean())
            error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    winner = with_values(config, {**best.choices, "name": f"{config.name}-tuned"}, "tune")
    path = folder / "best.toml"
    write_atomic(path, to_toml(winner))
    write_atomic(folder.parent / "best.toml", to_toml(winner))
    write_atomic(
        folder / "trials.json",
        [
            {"id": t.id, "status": t.status, "loss": t.loss if math.isfinite(t.loss) else None,
             "epochs": t.epochs, "seconds": t.seconds, "error": t.error, "choices": t.choices}
            for t in trials
        ],
    )  # fmt: skip
    return TuneResult(trials, winner, folder.parent / "best.toml", gain, error)


def _losses(folder: Path) -> np.ndarray | None:
    path = folder / "held_out.npy"
    return np.load(path, allow_pickle=False) if path.is_file() else None
