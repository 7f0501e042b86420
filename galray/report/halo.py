"""The fitted halo profiles as rows of ready strings."""

from __future__ import annotations

from typing import Any

from galray.report.run import RunFolder, entries
from galray.report.text import finite, measurement, method_label, number, unit_text

__all__ = ["halo_table"]

_PROFILES = {"nfw": "NFW", "gnfw": "generalised NFW", "einasto": "Einasto"}


def halo_table(run: RunFolder) -> dict[str, Any] | None:
    """A row per method and profile with a cell per parameter; None where a run has no fits."""
    fits = entries(run.summary.get("halo"))
    if not fits:
        return None
    heads: dict[str, str] = {}
    for fit in fits:
        for row in entries(fit.get("parameters")):
            unit = unit_text(row.get("unit"))
            heads.setdefault(str(row.get("parameter")), f"{row.get('symbol')}{f' [{unit}]' if unit else ''}")
    rows: list[dict[str, Any]] = []
    for fit in fits:
        cells = {str(row.get("parameter")): _cell(row) for row in entries(fit.get("parameters"))}
        rows.append(
            {
                "method": str(fit.get("method")),
                "label": method_label(str(fit.get("method"))),
                "profile": _PROFILES.get(str(fit.get("profile")), str(fit.get("profile"))),
                "chi2": number(fit.get("chi2")),
                "dof": number(fit.get("dof")),
                "positions": fit.get("positions"),
                "cells": [cells.get(name) for name in heads],
            }
        )
    mock = any(cell and cell["truth"] for row in rows for cell in row["cells"])
    return {"heads": list(heads.values()), "rows": rows, "has_truth": mock}


def _cell(row: dict[str, Any]) -> dict[str, str]:
    """Value ± error, the prior, and what the data added to it."""
    value, error = measurement(row.get("value"), row.get("error"))
    prior, width = measurement(row.get("prior"), row.get("prior_error"))
    learned = row.get("learned")
    free = not finite(row.get("prior"))
    truth = row.get("truth")
    return {
        "text": f"{value} ± {error}" if error else value,
        "prior": "no prior" if free else f"prior {prior} ± {width}",
        "learned": "" if free or not finite(learned) else f"{100 * max(learned, 0):.0f} % learned",
        "truth": measurement(truth, row.get("error"))[0] if finite(truth) else "",
    }
