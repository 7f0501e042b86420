"""Broken files of every kind: read or refused in a sentence, never a traceback, never a file elsewhere.

`make fuzz` does the same with ten thousand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks._fuzz_cases import KINDS, Fuzz
from galray.catalog import ShardStore
from galray.config import load_config
from galray.errors import GalrayError

CASES = {"configuration": 100, "manifest": 80, "table header": 100, "weights header": 100}


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    return Fuzz(tmp_path_factory.mktemp("fuzz"), seed=11)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_broken_is_refused_in_a_sentence(fuzz: Fuzz, kind: str, monkeypatch) -> None:
    monkeypatch.chdir(fuzz.folder / "inside")
    ends = [fuzz.case(kind) for _ in range(CASES[kind])]
    assert ends.count("refused") > CASES[kind] // 5
    assert fuzz.outside() == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("distance", "edsd", "no distance, which the distances need"),
        ("distance", "\x00", "distance: "),
        ("parallax_zero_point", [1], "parallax_zero_point"),
        ("parallax_zero_point", "lindegren2021", "no parallax_zero_point, which"),
        ("parallax_zero_point", None, "parallax_zero_point: absent"),
        ("frame.sun_galcen_distance_kpc", 1e308, "frame.sun_galcen_distance_kpc"),
    ],
)
def test_manifests_that_would_fail_later_are_refused_at_once(
    fuzz: Fuzz, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    shutil.copytree(fuzz.folder / "whole" / "store", tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    section, _, name = key.rpartition(".")
    (manifest[section] if section else manifest)[name] = value
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(GalrayError, match=words):
        ShardStore(tmp_path / "store")


def test_names_that_no_system_takes_are_refused() -> None:
    with pytest.raises(GalrayError, match="output: holds a null character"):
        load_config("quickstart", ['output="a\\u0000b"'])
    with pytest.raises(GalrayError, match="catalog: files: holds a null character"):
        load_config("quickstart", ['catalog.files=["a\\u0000b"]'])
