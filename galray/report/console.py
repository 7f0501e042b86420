"""The short table that a finished run prints in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galray.report.sections import Cell
from galray.report.text import (
    finite,
    measurement,
    method_label,
    method_order,
    number,
    quantity_plain,
    unit_text,
    where_html,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["table"]

_SHOWN = ("a_R", "a_z", "v_c", "K_z", "sigma", "rho", "rho_dm", "rho_dm_average")
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "none": ""}


def table(summary: dict[str, Any], places: int = 3) -> Table:
    """Accelerations at a few heights and the densities by every inversion, with truth and pull.

    Arguments:
        summary: Content of a run's ``results/summary.json``.
        places: At most so many places per acceleration, spread evenly over those in the summary;
            densities are shown at their first place, the Sun.

    Returns:
        A rich table; print it with ``rich.console.Console().print``.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    entries = [
        q
        for q in summary.get("quantities") or []
        if isinstance(q, dict) and q.get("name") in _SHOWN and q.get("method") != "truth"
    ]
    with_truth = any(finite(q.get("truth")) for q in entries)
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=_title(summary), title_justify="left")
    result.add_column("quantity", no_wrap=True)
    result.add_column("where", overflow="fold")
    result.add_column("inversion", no_wrap=True)
    result.add_column("value ± error", justify="right", no_wrap=True)
    if with_truth:
        result.add_column("truth", justify="right", no_wrap=True)
        result.add_column("pull", justify="right", no_wrap=True)
    for name in _SHOWN:
        named = [q for q in entries if q.get("name") == name]
        for where in _places(named, places if name[0] == "a" else 1):
            here = {str(q.get("method")): q for q in named if q.get("where") == where}
            ordered = method_order(here)
            errors = [q["error"] for q in here.values() if finite(q.get("error")) and q["error"] > 0]
            fine = min(errors) / 10 if errors else None  # one precision for the truth in all its rows
            for i, method in enumerate(ordered):
                entry, first = here[method], i == 0
                cell = Cell.of(entry)
                unit = unit_text(entry.get("unit"))
                head = quantity_plain(name) if first else (f"  {unit}" if i == 1 else "")
                if first and len(ordered) == 1:
                    head = f"{head} {unit}"
                value = f"{cell.value_text} ± {cell.error_text}" if cell.error_text else cell.value_text
                # Text, not str: square brackets from a file must not become markup.
                row = [
                    Text(head, style="bold" if first else "dim"),
                    Text(where_html(where) if first else ""),
                    Text(method_label(method), style="bold" if method == "combined" else ""),
                    Text(value, style="bold" if method == "combined" else ""),
                ]
                if with_truth:
                    truth = entry.get("truth")
                    precise = measurement(truth, fine)[0]
                    row += [Text(precise if finite(truth) else ""), Text(cell.pull_text, _STYLES[cell.level])]
                result.add_row(*row, end_section=i == len(ordered) - 1)
    return result


def _title(summary: dict[str, Any]) -> Any:
    from rich.text import Text

    top = summary.get("headline") or {}
    if not finite(top.get("value")):
        return None
    cell = Cell.of(top)
    gev = measurement(top.get("value_gev"), top.get("error_gev"))
    line = f"{top.get('label') or quantity_plain(str(top.get('name', 'rho_dm')))} = {cell.value_text}"
    line += f" ± {cell.error_text}" if cell.error_text else ""
    line += f" {unit_text(top.get('unit', 'Msun/pc3'))}"
    if finite(top.get("value_gev")):
        line += f" = {' ± '.join(t for t in gev if t)} GeV/cm³"
    if finite(top.get("truth")):
        line += f"  (truth {number(top['truth'])}, pull {cell.pull_text})"
    if (summary.get("run") or {}).get("blind"):
        line += "  (blind: a hidden offset is on every density)"
    return Text(line, style="bold")


def _places(entries: list[dict[str, Any]], limit: int) -> list[Any]:
    """At most so many of the places of one quantity, spread evenly; the northern side where there is one."""
    height = {}
    for entry in entries:
        x = entry.get("x")
        height[entry.get("where")] = x[2] if isinstance(x, list) and len(x) == 3 and finite(x[2]) else 0.0
    found = [where for where, z in height.items() if z > -0.05]
    if len(found) < limit:
        found = list(height)
    if len(found) <= limit or limit < 2:
        return found[: max(limit, 1)]
    return [found[round(i * (len(found) - 1) / (limit - 1))] for i in range(limit)]
