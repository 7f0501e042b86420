"""Broken files of every kind: read or refused in a sentence, never a traceback, never a file elsewhere.

`make fuzz` does the same with ten thousand.
"""

from __future__ import annotations

import pytest

from benchmarks._fuzz_cases import KINDS, Fuzz

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
