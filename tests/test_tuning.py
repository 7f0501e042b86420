"""The hyperparameter search: what may be searched, early stops, failures, restores; and a real one."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest

from galray.catalog.mirror import Place
from galray.config import RunConfig, load_config
from galray.ensemble import SearchRange, TuneSettings, read_trials, run_search
from galray.errors import GalrayError
from galray.tuning import checked_space, tune
from tests.chain_config import write_config
from tests.waiting import wait_for

RATE = "training.score.learning_rate"


def parabola(choices, folder, context, report):
    """A training whose loss falls towards the distance of its choice from 0.3; some choices go wrong."""
    calls = Path(context["calls"])
    with open(calls / Path(folder).name, "a") as handle:
        handle.write("x")
    x = choices[RATE]
    if context.get("die_once") and len((calls / Path(folder).name).read_text()) == 1:
        os._exit(9)
    if x > context.get("diverges_above", 2.0):
        raise GalrayError("training diverged in epoch 0", "lower the learning rate")
    if context.get("last") == x:
        others = Path(folder).parent
        wait_for(lambda: list(others.glob("*/outcome.json")), "the end of another trial")
    curve = []
    for epoch in range(context["epochs"]):
        row = {"epoch": epoch, "validation": (x - 0.3) ** 2 + 0.5**epoch, "seconds": 0.1 * (epoch + 1)}
        curve.append(row)
        Path(folder, "curve.json").write_text(json.dumps(curve))
        report(row)
    return {"best": curve[-1]["validation"]}


def reluctant(choices, folder, context, report):
    """The same on a machine so busy that a training that is stopped early takes long to be gone."""
    try:
        return parabola(choices, folder, context, report)
    except SystemExit:
        time.sleep(2.5)
        raise


def settings(**given) -> TuneSettings:
    space = given.pop("space", {RATE: {"low": 0.0, "high": 1.0}})
    return TuneSettings.model_validate({"family": "score", "space": space, "trials": 8, **given})


def search(found: TuneSettings, folder: Path, epochs: int = 9, function=parabola, **context):
    calls = folder / "calls"
    calls.mkdir(exist_ok=True)
    return run_search(
        function,
        found,
        Place(folder / "search"),
        {"calls": str(calls), "epochs": epochs, **context},
        seed=5,
        epochs=epochs,
        start={RATE: 0.95},
        concurrent=2,
    )


@pytest.mark.parametrize("kind", ["optuna", "random"])
def test_search_finds_the_minimum_and_stops_the_rest_early(ray_session, tmp_path, kind):
    found = settings(search=kind, grace_epochs=2, reduction=2.0, trials=12)
    trials = search(found, tmp_path, last=0.95)
    assert len(trials) == 12
    (start,) = (trial for trial in trials if trial.choices[RATE] == 0.95)
    assert (start.status, start.epochs) == ("stopped", 2)  # far worse than one that was there before it
    assert abs(trials[0].choices[RATE] - 0.3) < 0.15
    assert trials[0].status == "finished"
    assert trials[0].epochs == 9
    assert [t.loss for t in trials] == sorted(t.loss for t in trials)


def test_a_trial_waits_for_one_that_was_stopped_before_it(ray_session, tmp_path):
    found = settings(search="random", grace_epochs=1, reduction=2.0)
    trials = search(found, tmp_path, function=reluctant, last=0.95)
    assert [trial.error for trial in trials] == [""] * 8
    assert {trial.status for trial in trials} == {"finished", "stopped"}


def test_failed_trials_are_counted_and_the_search_goes_on(ray_session, tmp_path):
    trials = search(settings(search="random", asha=False), tmp_path, epochs=2, diverges_above=0.5)
    failed = [trial for trial in trials if trial.status == "failed"]
    assert {trial.status for trial in trials} == {"finished", "failed"}
    assert all(trial.choices[RATE] > 0.5 and math.isnan(trial.loss) for trial in failed)
    assert all("diverged" in trial.error for trial in failed)
    assert all((trial.folder / "error.txt").read_text().startswith("Traceback") for trial in failed)
    with pytest.raises(GalrayError, match="all 1 trials failed; the first: training diverged"):
        search(settings(trials=1), _folder(tmp_path, "second"), diverges_above=-1.0)


def test_a_search_called_again_runs_nothing_again_and_more_trials_are_added(ray_session, tmp_path):
    first = search(settings(trials=3, asha=False), tmp_path, epochs=2)
    calls = {path.name: path.read_text() for path in (tmp_path / "calls").iterdir()}
    again = search(settings(trials=3, asha=False), tmp_path, epochs=2)
    assert again == first
    more = search(settings(trials=5, asha=False), tmp_path, epochs=2)
    assert len(more) == 5
    assert {t.id for t in first} < {t.id for t in more}
    assert all((tmp_path / "calls" / name).read_text() == text for name, text in calls.items())


def test_a_trial_whose_process_died_is_started_again(ray_session, tmp_path):
    trials = search(settings(trials=2, asha=False), tmp_path, epochs=2, die_once=True)
    assert [trial.status for trial in trials] == ["finished", "finished"]
    assert [path.read_text() for path in (tmp_path / "calls").iterdir()] == ["xx", "xx"]


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": 1.0, "high": 0.5}, "low 1 is not below high 0.5"),
        ({"low": 0.0, "high": 1.0, "log": True}, "log needs a positive low"),
        ({"low": 0.5, "high": 2, "integer": True}, "whole numbers"),
        ({"low": 0.5}, "both low and high"),
        ({"values": [1], "low": 0, "high": 1}, "a list of values, or both"),
        ([], "a list of values, or both"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SearchRange.model_validate(given)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("training.flow.learning_rate", "does not belong to score"),
        ("score.coordinates", "losses do not compare"),
        ("training.score.validation_fraction", "losses do not compare"),
        ("catalog.num_shards", "does not belong to score"),
        ("score.noise.treatment", "losses do not compare"),
        ("score.velocity_weight", "losses do not compare"),
    ],
)
def test_keys_that_cannot_be_searched_are_refused(key, message):
    with pytest.raises(ValueError, match=message):
        settings(space={key: [1, 2]})


def _config(**space) -> RunConfig:
    config = load_config("quickstart")
    return config.model_copy(update={"tune": settings(space=space)})


def test_every_corner_of_the_space_is_validated_before_anything_runs():
    own = checked_space(_config(**{"score.hidden": [[32], [64, 64]], RATE: {"low": 1e-4, "high": 1e-2}}))
    assert own == {"score.hidden": [128, 128], RATE: 3e-3}
    with pytest.raises(GalrayError, match=r"tune.space.score.hiden: .*unknown key, did you mean 'hidden'"):
        checked_space(_config(**{"score.hiden": [[32]]}))
    with pytest.raises(GalrayError, match=r"activation.*got 'relu'"):
        checked_space(_config(**{"score.activation": ["silu", "relu"]}))
    with pytest.raises(GalrayError, match="no key to vary"):
        checked_space(_config())


def test_what_is_searched_changes_no_run():
    config = load_config("quickstart")
    assert _config(**{RATE: [1e-3]}).hash == config.hash


def test_tune_from_a_bad_start_on_the_mock_galaxy(ray_session, tmp_path):
    config = load_config(
        write_config(tmp_path),
        [
            "methods=['score', 'moments']",
            f"{RATE}=1e-6",
            f"tune.space={{ '{RATE}' = {{ low = 1e-6, high = 3e-2, log = true }} }}",
            "tune.trials=6",
            "tune.asha=false",
            "tune.stars=4000",
        ],
    )
    found = tune(config)
    assert len(found.trials) == 6
    assert found.gain > 3 * found.gain_error > 0
    winner = load_config(found.path)
    assert winner.name == f"{config.name}-tuned"
    assert winner.training.score.learning_rate == found.trials[0].choices[RATE] > 1e-5
    assert read_trials(next((config.run_dir / "tune").glob("*/trials"))) == found.trials
    again = tune(config)
    assert again.trials == found.trials
