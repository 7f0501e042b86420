"""Run directories: whose they are, who works in them, and what a killed or mistaken run leaves."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from galray.catalog.lease import LEASE
from galray.catalog.storage import StorageSettings
from galray.config import RunConfig, load_config
from galray.errors import GalrayError
from galray.galaxies.config import DwarfConfig
from galray.measurement import load_evaluation
from galray.provenance import write_atomic
from galray.rundir import RunDirectory, read_json, whole_folder
from tests.chain_config import write_config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(write_config(tmp_path))


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_claim_writes_the_configuration_and_its_hash(config: RunConfig) -> None:
    directory = RunDirectory(config)
    directory.claim()
    assert load_config(directory.path / "config.toml") == config
    assert (directory.path / "config_hash").read_text() == config.hash + "\n"
    directory.claim()  # the same configuration goes on


def test_claim_takes_what_cannot_change_a_number(config: RunConfig) -> None:
    RunDirectory(config).claim()
    other = config.model_copy(update={"description": "the same run, said otherwise"})
    RunDirectory(other).claim()
    assert load_config(config.run_dir / "config.toml").description == other.description


def test_a_finished_ensemble_takes_more_members(config: RunConfig) -> None:
    RunDirectory(config).claim()
    (config.run_dir / "members").mkdir()
    (config.run_dir / "members" / "old").write_text("hours of training")
    more = load_config(config.run_dir / "config.toml", ["ensemble.score.seeds=5", "ensemble.score.draws=2"])
    directory = RunDirectory(more)
    assert directory.check() is False, "nothing is to be discarded"
    directory.claim()
    assert (config.run_dir / "members" / "old").is_file()
    assert (config.run_dir / "config_hash").read_text() == more.hash + "\n" != config.hash + "\n"
    other = load_config(config.run_dir / "config.toml", ["ensemble.score.seeds=6", "training.score.epochs=9"])
    with pytest.raises(GalrayError, match="belongs to another configuration"):
        RunDirectory(other).check()


def test_directory_of_another_configuration_is_refused_untouched(config: RunConfig) -> None:
    RunDirectory(config).claim()
    (config.run_dir / "precious").write_text("hours of work")
    before = files_in(config.run_dir)
    other = RunDirectory(config.model_copy(update={"seed": 99}))
    for attempt in (other.check, other.claim):
        with pytest.raises(GalrayError, match="belongs to another configuration") as caught:
            attempt()
        assert "--overwrite" in caught.value.remedy
    assert files_in(config.run_dir) == before
    assert load_config(config.run_dir / "config.toml").seed == config.seed


def test_overwrite_discards_the_other_run(config: RunConfig) -> None:
    RunDirectory(config).claim()
    (config.run_dir / "members").mkdir()
    (config.run_dir / "members" / "old").write_text("old")
    other = config.model_copy(update={"seed": 99})
    directory = RunDirectory(other, overwrite=True)
    assert directory.check()
    assert (config.run_dir / "members").is_dir(), "looking discards nothing"
    directory.claim()
    assert files_in(config.run_dir) == {"config.toml", "config_hash"}
    assert load_config(config.run_dir / "config.toml").seed == 99


def test_overwrite_never_discards_the_same_configuration(config: RunConfig) -> None:
    RunDirectory(config).claim()
    (config.run_dir / "result").write_text("mine")
    RunDirectory(config, overwrite=True).claim()
    assert (config.run_dir / "result").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_that_is_no_run_is_refused_untouched(config: RunConfig, overwrite: bool) -> None:
    config.run_dir.mkdir()
    (config.run_dir / "thesis.tex").write_text("years of work")
    with pytest.raises(GalrayError, match="neither empty nor a run directory"):
        RunDirectory(config, overwrite=overwrite).claim()
    assert files_in(config.run_dir) == {"thesis.tex"}


def test_file_in_its_place_is_refused(config: RunConfig) -> None:
    config.run_dir.write_text("a file")
    with pytest.raises(GalrayError, match="is a file"):
        RunDirectory(config).claim()
    assert config.run_dir.read_text() == "a file"


def test_output_below_a_file_cannot_be_written(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    directory = RunDirectory(config.model_copy(update={"output": str(tmp_path / "occupied")}))
    with (
        pytest.raises(GalrayError, match=r"occupied/tiny: cannot be written: Not a directory"),
        directory.locked(),
    ):
        pytest.fail("the lock was given")
    with pytest.raises(GalrayError, match="cannot be written"):
        directory.claim()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    directory = RunDirectory(config.model_copy(update={"output": str(tmp_path / "closed")}))
    with pytest.raises(GalrayError, match="cannot be written: Permission denied"):
        directory.claim()


def _try_lock(path: str, answer: multiprocessing.Queue) -> None:
    directory = RunDirectory(load_config(path))
    try:
        with directory.locked():
            answer.put("locked")
    except GalrayError as error:
        answer.put(str(error))


def test_second_process_is_kept_out(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    directory = RunDirectory(load_config(path))
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()

    def ask() -> str:
        process = context.Process(target=_try_lock, args=(str(path), answer))
        process.start()
        text = answer.get()
        process.join()
        return text

    with directory.locked():
        refused = ask()
    assert f"another run works here (process {os.getpid()})" in refused
    assert "remedy:" in refused
    assert ask() == "locked", "the lock is given back"


def test_stage_runs_once_for_the_same_inputs(config: RunConfig) -> None:
    directory = RunDirectory(config)
    directory.claim()
    calls: list[str] = []

    def work() -> dict[str, int]:
        calls.append("worked")
        return {"count": len(calls)}

    assert not directory.is_done("fit", {"a": 1})
    assert directory.stage("fit", {"a": 1, "b": [2]}, work)
    assert not directory.stage("fit", {"b": [2], "a": 1}, work), "the order of keys is no change"
    assert directory.outcome("fit") == {"count": 1}
    assert directory.stage("fit", {"a": 1, "b": [3]}, work)
    assert directory.outcome("fit") == {"count": 2}
    assert directory.stage("fit", None, work), "None always works"
    assert len(calls) == 3
    assert directory.outcome("absent") is None
    directory.forget("fit")
    assert directory.stage("fit", {"a": 1, "b": [3]}, work)


def test_failed_stage_is_not_done_even_if_it_was_before(config: RunConfig) -> None:
    directory = RunDirectory(config)
    directory.claim()
    directory.stage("fit", 1, lambda: None)

    def fail() -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        directory.stage("fit", 2, fail)
    assert not directory.is_done("fit", 1), "what the first made may be half overwritten"
    assert not directory.is_done("fit", 2)


def test_stage_seconds_in_the_order_of_their_end(config: RunConfig) -> None:
    directory = RunDirectory(config)
    directory.claim()
    assert directory.stage_seconds() == {}
    for i, name in enumerate(("zeta", "alpha")):
        directory.stage(name, 1, lambda: None)
        record = directory.path / "stages" / f"{name}.json"
        write_atomic(record, read_json(record) | {"finished": f"2026-01-01T00:00:0{i}", "seconds": 1.5 + i})
    assert directory.stage_seconds() == {"zeta": 1.5, "alpha": 2.5}
    assert list(directory.stage_seconds()) == ["zeta", "alpha"]


def test_repeat_that_finds_all_done_keeps_the_time(config: RunConfig) -> None:
    directory = RunDirectory(config)
    directory.claim()
    directory.stage("catalog", None, lambda: None)
    record = directory.path / "stages" / "catalog.json"
    write_atomic(record, read_json(record) | {"seconds": 100.0})
    directory.stage("catalog", None, lambda: None)
    assert directory.stage_seconds()["catalog"] == 100.0


def work_until(directory: RunDirectory, error: BaseException, *, stage: str = "", member: str = "") -> None:
    """Claim the directory, begin to work, perhaps finish a stage or a member, and fail."""
    with directory.locked():
        directory.claim()
        (directory.path / "shards").mkdir(exist_ok=True)
        if stage:
            directory.stage(stage, 1, lambda: None)
        if member:
            (directory.path / member).mkdir(parents=True)
            directory.place.write(f"{member}/result.json", b"{}")
        raise error


def fill_until(final: Path, error: BaseException) -> None:
    """Begin to fill a folder, and fail."""
    with whole_folder(final) as folder:
        (folder / "half").write_text("half")
        raise error


def test_mistake_in_a_new_directory_leaves_none(config: RunConfig) -> None:
    directory = RunDirectory(config)
    with pytest.raises(GalrayError, match="no such column"):
        work_until(directory, GalrayError("no such column", "name another"))
    assert not directory.path.exists()


@pytest.mark.parametrize("at", ["folder", "s3"])
def test_mistake_never_discards_a_finished_member(
    tmp_path: Path, s3_storage: StorageSettings, at: str
) -> None:
    """Also where there are no stages, as in fits of dwarf galaxies, and at a URL."""
    output = "s3://galray/mistakes" if at == "s3" else str(tmp_path / "runs")
    directory = RunDirectory(DwarfConfig(name="mistaken", output=output, storage=s3_storage))
    mistake = GalrayError("no such column", "name another")
    for member, left in (("", False), ("members/000", True), ("", True)):
        with pytest.raises(GalrayError, match="no such column"):
            work_until(directory, mistake, member=member)
        assert ("members/000/result.json" in directory.place.sizes()) is left
        assert bool(directory.place.sizes()) is left
    other = RunDirectory(directory.config.model_copy(update={"seed": 9}), overwrite=True)
    with other.locked():
        other.claim()
        other.save()
    assert set(other.place.sizes()) - {".lock", LEASE} == {"config.toml", "config_hash"}, "asked to, it does"


def test_mistake_after_a_finished_stage_keeps_it(config: RunConfig) -> None:
    directory = RunDirectory(config)
    with pytest.raises(GalrayError, match="too few stars"):
        work_until(directory, GalrayError("too few stars", "take more"), stage="mock")
    assert directory.is_done("mock", 1)


def test_mistake_in_an_older_directory_leaves_it(config: RunConfig) -> None:
    RunDirectory(config).claim()
    directory = RunDirectory(config)
    with pytest.raises(GalrayError, match="a mistake"):
        work_until(directory, GalrayError("a mistake"))
    assert (directory.path / "config.toml").is_file()


def test_programming_error_leaves_everything_to_look_at(config: RunConfig) -> None:
    directory = RunDirectory(config)
    with pytest.raises(ZeroDivisionError):
        work_until(directory, ZeroDivisionError())
    assert (directory.path / "config.toml").is_file()


def test_whole_folder_is_whole_or_absent(tmp_path: Path) -> None:
    final = tmp_path / "fields" / "moments"
    with pytest.raises(KeyboardInterrupt):
        fill_until(final, KeyboardInterrupt())
    assert not list((tmp_path / "fields").iterdir())
    for content in ("first", "second"):
        with whole_folder(final) as folder:
            (folder / content).write_text(content)
            assert folder != final
        assert files_in(final) == {content}
    with pytest.raises(RuntimeError):
        fill_until(final, RuntimeError())
    assert files_in(final) == {"second"}, "a failed attempt leaves the old one"
    # What a killed process left is swept away.
    final.with_name("moments.tmp").mkdir()
    (final.with_name("moments.tmp") / "litter").write_text("")
    with whole_folder(final) as folder:
        assert not list(folder.iterdir())


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(GalrayError, match="absent"):
        read_json(tmp_path / "no.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(GalrayError, match="not JSON"):
        read_json(tmp_path / "half.json")


@pytest.mark.parametrize("text", ["{}", "[]", '{"in', "\x00", '{"inputs": 1, "seconds": "x"}'])
def test_stage_with_a_broken_record_is_done_again(config: RunConfig, text: str) -> None:
    directory = RunDirectory(config)
    directory.claim()
    assert directory.stage("mock", [1], lambda: "first")
    (directory.path / "stages" / "mock.json").write_text(text)
    assert directory.stage_seconds() == {}
    assert directory.outcome("mock") is None
    assert directory.stage("mock", [1], lambda: "second")
    assert directory.outcome("mock") == "second"
    assert not directory.stage("mock", [1], lambda: "third")


def test_broken_stamp_is_that_of_another_configuration(config: RunConfig) -> None:
    RunDirectory(config).claim()
    (config.run_dir / "config_hash").write_bytes(b"\x93\xff\x00")
    with pytest.raises(GalrayError, match="belongs to another configuration"):
        RunDirectory(config).check()


def test_home_of_nobody_is_named(config: RunConfig) -> None:
    with pytest.raises(GalrayError, match="no such home folder"):
        RunDirectory(config.model_copy(update={"output": "~no_such_user_of_this_machine/runs"}))


@pytest.mark.parametrize("content", [None, b"", b"not a tensor file"])
def test_broken_evaluation_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "evaluation.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GalrayError, match=r"evaluation\.safetensors: cannot be read") as caught:
        load_evaluation(path)
    assert "run again" in caught.value.remedy
