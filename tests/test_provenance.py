"""Hashes, revisions, and files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import galray
from galray import provenance
from galray.provenance import (
    content_hash,
    file_checksum,
    file_hash,
    is_intact,
    library_versions,
    write_atomic,
)


def test_content_hash_is_the_same_everywhere() -> None:
    assert content_hash({"b": 1, "a": [1, 2.5, None]}) == content_hash({"a": [1, 2.5, None], "b": 1})
    expected = hashlib.sha256(b'{"a":[1,2.5,null],"b":1}').hexdigest()[:16]
    assert content_hash({"b": 1, "a": [1, 2.5, None]}) == expected
    code = "from galray.provenance import content_hash; print(content_hash({'b': 1, 'a': [1, 2.5, None]}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == expected


@pytest.mark.parametrize("other", [{"a": 2}, {"b": 1}, {"a": "1"}, {"a": 1.5}, [1], None])
def test_content_hash_sees_every_change(other: object) -> None:
    assert content_hash(other) != content_hash({"a": 1})


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"galaxy" * 100_000)
    assert file_hash(tmp_path / "x") == hashlib.sha256(b"galaxy" * 100_000).hexdigest()


def test_file_checksum_is_what_xxh128sum_prints(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert (
        file_checksum(tmp_path / "x") == "99aa06d3014798d86001c324468d497f"
    )  # of the reference implementation


def test_is_intact_by_either_sum(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"galaxy")
    sums = file_checksum(path), file_hash(path)
    assert all(is_intact(path, found) for found in sums)
    path.write_bytes(b"galaxz")
    assert not any(is_intact(path, found) for found in sums)


def test_record_names_everything() -> None:
    record = provenance.provenance("abc", "def", 7)
    assert record["galray"] == galray.__version__
    assert (record["config_hash"], record["input_hash"], record["seed"]) == ("abc", "def", 7)
    assert record["machine"]["cores"] >= 1
    assert record["created"].endswith("+00:00")
    assert record["libraries"]["numpy"] == np.__version__
    assert "absent" not in record["libraries"].values()
    json.dumps(record, allow_nan=False)


def test_absent_library_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "LIBRARIES", ("numpy", "no-such-library"))
    library_versions.cache_clear()
    try:
        found = library_versions()
    finally:
        library_versions.cache_clear()
    assert found["numpy"] == np.__version__
    assert found["no-such-library"] == "absent"


def test_revision_outside_git_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *words: str) -> str:
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance, "_git", fail)
    provenance.git_revision.cache_clear()
    try:
        assert provenance.git_revision() is None
    finally:
        provenance.git_revision.cache_clear()


def test_revision_marks_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "0123456789ab", "status": " M galray/x.py"}
    monkeypatch.setattr(provenance, "_git", lambda folder, word, *rest: answers[word])
    try:
        for status, expected in ((" M galray/x.py", "0123456789ab+"), ("", "0123456789ab")):
            answers["status"] = status
            provenance.git_revision.cache_clear()
            assert provenance.git_revision() == expected
    finally:
        provenance.git_revision.cache_clear()


def test_write_atomic_forms(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, expected in (
        ("text ρ", "text ρ".encode()),
        (b"\x00\x01", b"\x00\x01"),
        ([1, 2], b"[\n 1,\n 2\n]\n"),
    ):
        write_atomic(path, content)  # type: ignore[arg-type]
        assert path.read_bytes() == expected
    plain = {"a": np.float64(1.5), "b": np.arange(3), "c": torch.tensor(2), "d": Path("/x")}
    write_atomic(path, plain)
    assert json.loads(path.read_text()) == {"a": 1.5, "b": [0, 1, 2], "c": 2, "d": "/x"}
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [{"value": float("nan")}, {"value": object()}])
def test_failed_write_leaves_the_old_file(tmp_path: Path, content: dict[str, object]) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, {"value": 1})
    with pytest.raises((ValueError, TypeError)):
        write_atomic(path, content)
    assert json.loads(path.read_text()) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
