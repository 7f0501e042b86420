"""What a run has to say to MLflow, line by line in a file, and how far MLflow has taken it in.

The driver only ever appends to `tracking/journal.jsonl`, which cannot block and hardly fail; a process
of its own reads it and talks to MLflow. So a slow or broken server costs the measurement nothing, and
what could not be written yet is still there at the next start.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FROM_ENVIRONMENT", "Journal", "State", "flatten", "metric_name", "numbers"]

FROM_ENVIRONMENT = "$MLFLOW_TRACKING_URI"
"""Stands in the journal for a store whose address holds a password."""

_FORBIDDEN = re.compile(r"[^\w\-./: ]", re.ASCII)


class Journal:
    """The files of one run's tracking.

    Arguments:
        folder: The run directory.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute() / "tracking"

    @property
    def path(self) -> Path:
        """The journal: one JSON object a line."""
        return self.folder / "journal.jsonl"

    @property
    def failed_path(self) -> Path:
        """Entries that MLflow refused, tried again at the next start."""
        return self.folder / "failed.jsonl"

    @property
    def log_path(self) -> Path:
        """What the writing process printed."""
        return self.folder / "log.txt"

    @property
    def lock_path(self) -> Path:
        """Held by the one process that writes."""
        return self.folder / ".lock"

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one entry and hand it to the operating system, so that it outlives this process."""
        line = json.dumps(entry, default=str) + "\n"
        with open(self.path, "a", encoding="utf-8") as file:
            if file.tell() and not _ends_with_newline(self.path):
                file.write("\n")  # a process died in the middle of its last line
            file.write(line)

    def read(self, offset: int) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """Yield the complete entries from an offset on, each with the offset after it; None if broken."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return
        with file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = None
                yield (entry if isinstance(entry, dict) else None), offset


@dataclass
class State:
    """How far MLflow is: kept in `tracking/state.json`.

    Arguments:
        offset: Bytes of the journal that are taken in.
        experiment: MLflow's experiment id.
        parent: MLflow's id of the run.
        parent_open: Whether the run is still marked as running.
        members: MLflow's run ids by member id.
        ended: Status of the members that ended, by member id.
        epochs: Last epoch of each member's curve that was taken in, by member id.
        refused: Entries that MLflow refused so far.
        error: The last error, empty when all is well.
    """

    offset: int = 0
    experiment: str = ""
    parent: str = ""
    parent_open: bool = False
    members: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    error: str = ""

    @classmethod
    def load(cls, journal: Journal) -> State:
        """Read the state; a fresh one when there is none."""
        try:
            return cls(**json.loads((journal.folder / "state.json").read_text()))
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, journal: Journal) -> None:
        """Write the state in one step."""
        part = journal.folder / ".state.json.part"
        part.write_text(json.dumps(asdict(self)))
        os.replace(part, journal.folder / "state.json")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn a nested configuration into MLflow parameters: dotted keys, text of at most 6000 characters."""
    result: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            result |= flatten(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            result[metric_name(name)] = text[:6000]
    return result


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Pick the numbers of a nested dictionary, with dotted keys; lists, text and null are left out."""
    result: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            result |= numbers(value, f"{name}.")
        elif isinstance(value, bool | int | float) or hasattr(value, "__float__"):
            number = float(value)
            if not math.isinf(number):
                result[metric_name(name)] = number
    return result


def read_curve(path: Path) -> list[dict[str, float]]:
    """Read a training curve; an empty one when the member has none (or a broken one)."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [numbers(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def read_checks(folder: Path) -> dict[str, float]:
    """Read what the checks of a member's model found, Stein's identities among them; empty without them."""
    try:
        checks = json.loads((folder / "checks.json").read_text())
        return numbers({name: check["value"] for name, check in checks.items()}, "checks.")
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def metric_name(name: str) -> str:
    """Make a name that MLflow takes: letters, digits and _ - . / : space, at most 250 of them."""
    return _FORBIDDEN.sub("_", name)[:250]


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
