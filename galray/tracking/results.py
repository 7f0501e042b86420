"""A finished run's numbers, figures, report and configuration, recorded in its MLflow run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galray.tracking.tracker import Tracker

__all__ = ["record_results"]


def record_results(
    tracker: Tracker, folder: Path, summary: Mapping[str, Any], seconds: Mapping[str, float]
) -> None:
    """Record what a run found.

    Arguments:
        tracker: Of the run.
        folder: The run directory.
        summary: What its ``summary.json`` holds.
        seconds: What each stage took.
    """
    top = summary["headline"]
    numbers = {
        top["name"]: {key: top[key] for key in ("value", "error", "truth", "pull") if top[key] is not None}
    }
    # `budget.TERM` is the term's error in the headline's unit.
    numbers["budget"] = {t["term"]: t["error"] for t in top.get("terms") or [] if t["error"] is not None}
    for row in summary["quantities"]:
        name = f"{row['method']}.{row['name']}.{row['where']}"
        numbers[name] = {key: row[key] for key in ("value", "error") if row[key] is not None}
    tracker.metrics({_metric_name(name): values for name, values in numbers.items()})
    tracker.metrics({"seconds": seconds})
    tracker.tags(
        {
            "galray.input_hash": summary["catalog"]["hash"],
            "galray.blind": str(summary["run"].get("blind", False)).lower(),
        }
    )
    for member in summary["members"]:
        if (value := member.get(top["name"])) is not None:
            tracker.member_metrics(member["id"], {top["name"]: value})
    for name in ("config.toml", "provenance.json", "results", "figures", "report.html"):
        if (folder / name).exists():
            tracker.artifact(folder / name)


def _metric_name(text: str) -> str:
    """A name that MLflow takes: letters, digits, and a few signs."""
    words = text.replace("<", "lt").replace("|", "").replace("+", "p").replace("=", "")
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in words)
