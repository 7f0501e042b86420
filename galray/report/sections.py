"""What the page's tables say: the summary turned into rows of ready strings, values kept beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from galray.report.figures import fate_steps
from galray.report.published import HOW_KNOWN, PublishedValue, published
from galray.report.run import RunFolder
from galray.report.text import (
    METHODS,
    count,
    duration,
    finite,
    humanise,
    measurement,
    method_label,
    method_order,
    number,
    pull_level,
    quantity_html,
    quantity_words,
    signed,
    unit_key,
    unit_text,
    where_html,
)
from galray.units import GEV_PER_CM3, density_to_msun_pc3

__all__ = [
    "Cell",
    "budget_rows",
    "catalog_rows",
    "checks",
    "equilibrium",
    "headline",
    "headline_methods",
    "headline_role",
    "in_msun_pc3",
    "members",
    "method_table",
    "methods_used",
    "provenance",
    "published_rows",
    "same_kind",
]


@dataclass(frozen=True)
class Cell:
    """One measured number: as it is in the file and as it is shown.

    Arguments:
        value, error: Numbers of the file, or None.
        value_text, error_text: The rounded strings.
        pull: (value − truth) / error, or None.
        pull_text: The pull with its sign.
        level: ``ok``, ``warn``, ``fail`` or ``none``: how large the pull is.
        offset: (value − truth) / |truth| in words, or empty.
    """

    value: Any
    error: Any
    value_text: str
    error_text: str
    pull: Any
    pull_text: str
    level: str
    offset: str

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Cell:
        """From an entry with ``value``, ``error``, ``truth`` and ``pull``."""
        value, error, truth = entry.get("value"), entry.get("error"), entry.get("truth")
        pull = entry.get("pull")
        if not finite(pull) and finite(value) and finite(truth) and finite(error) and error > 0:
            pull = (value - truth) / error
        offset = ""
        if finite(value) and finite(truth) and truth != 0:
            offset = f"{signed(100 * (value - truth) / abs(truth))} % of the truth"
        return cls(
            value if finite(value) else None,
            error if finite(error) else None,
            *measurement(value, error),
            pull if finite(pull) else None,
            signed(pull),
            pull_level(pull),
            offset,
        )


def _entries(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON list; anything else is left out."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def in_msun_pc3(entry: dict[str, Any], *keys: str) -> dict[str, Any] | None:
    """A copy of a density entry with these keys converted to Msun/pc³; None for any other unit."""
    unit = unit_key(entry.get("unit"))
    if unit == "msun/pc3":
        return dict(entry)
    if unit == "msun/kpc3":
        return {**entry, **{k: density_to_msun_pc3(entry[k]) for k in keys if finite(entry.get(k))}}
    if unit == "gev/cm3":
        return {**entry, **{k: entry[k] / GEV_PER_CM3 for k in keys if finite(entry.get(k))}}
    return None


def same_kind(name: Any) -> str:
    """``rho_dm`` or ``rho``: which published values a headline of that name stands beside."""
    return "rho_dm" if str(name).startswith("rho_dm") else "rho"


def headline(run: RunFolder) -> dict[str, Any] | None:
    """The number of the run with both units, its place, kernel, truth and terms; None without one."""
    found = run.summary.get("headline")
    if not isinstance(found, dict) or not finite(found.get("value")):
        return None
    value, error = found["value"], found.get("error")
    gev = found.get("value_gev", value * GEV_PER_CM3)
    error_gev = found.get("error_gev", error * GEV_PER_CM3 if finite(error) else None)
    kernel = found.get("kernel_kpc")
    kernel_text = ""
    if isinstance(kernel, list) and kernel and all(finite(h) for h in kernel):
        kernel_text = " × ".join(number(h) for h in kernel)
    elif finite(kernel):
        kernel_text = number(kernel)
    terms = [
        {
            "term": humanise(t.get("term", "")),
            "error": t.get("error"),
            "text": measurement(t.get("error"), t.get("error"))[1] or number(t.get("error")),
            "count": int(t["count"]) if finite(t.get("count")) else None,
        }
        for t in _entries(found.get("terms"))
    ]
    return {
        "name": str(found.get("name", "rho_dm")),
        "symbol": quantity_html(same_kind(found.get("name", "rho_dm"))),
        "label": str(found.get("label") or quantity_words(same_kind(found.get("name", "rho_dm")))),
        "cell": Cell.of(found),
        "unit": unit_text(found.get("unit", "Msun/pc3")),
        "gev": gev,
        "error_gev": error_gev,
        "gev_text": measurement(gev, error_gev),
        "truth": found.get("truth") if finite(found.get("truth")) else None,
        "truth_text": measurement(found.get("truth"), _tenth(found))[0],
        "percent": f"{100 * error / abs(value):.0f} %" if finite(error) and value else "",
        "where": where_html(found.get("where")),
        "kernel": kernel_text,
        "terms": terms,
    }


def _tenth(entry: dict[str, Any]) -> Any:
    """A precision for showing a truth: a tenth of the error, so that it is never rounded visibly."""
    error = entry.get("error")
    return error / 10 if finite(error) and error > 0 else None


def headline_methods(run: RunFolder) -> list[dict[str, Any]]:
    """The headline's quantity at its place by each single inversion, in Msun/pc³."""
    top = run.summary.get("headline") or {}
    same = [q for q in _entries(run.summary.get("quantities")) if q.get("name") == top.get("name")]
    here = [q for q in same if q.get("where") == top.get("where")]
    places = {q.get("where") for q in same}
    chosen = here or (same if len(places) == 1 else [])
    by_method = {
        str(q.get("method")): in_msun_pc3(q, "value", "error") for q in chosen if finite(q.get("value"))
    }
    ordered = [by_method[m] for m in method_order(by_method) if m != "combined"]
    return [q for q in ordered if q is not None]


def headline_role(run: RunFolder) -> str:
    """The inversion whose colour the headline takes: the only one there is, or all combined."""
    methods = headline_methods(run)
    return str(methods[0]["method"]) if len(methods) == 1 else "combined"


def published_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Published values and the summary's own comparisons as table rows.

    For real stars each row tells the difference from this run in standard errors; a mock is another
    galaxy, and no difference is given.
    """
    top = run.summary.get("headline") or {}
    own = None if run.is_mock else in_msun_pc3({"unit": "Msun/pc3", **top}, "value", "error")
    rows = []
    for item in _entries(run.summary.get("comparisons")):
        same = same_kind(item.get("quantity") or top.get("name")) == same_kind(top.get("name"))
        converted = in_msun_pc3(item, "value", "error") if same else None
        rows.append(
            {
                "label": str(item.get("label", "")),
                "cell": Cell.of({"value": item.get("value"), "error": item.get("error")}),
                "unit": unit_text(item.get("unit")),
                "reference": str(item.get("source", "")),
                "url": _arxiv(item.get("source")),
                "where": where_html(item.get("where")),
                "how": str(item.get("how", "")),
                "note": str(item.get("note", "")),
                "tension": _tension(own, converted),
            }
        )
    if top:
        rows += [_published_row(entry, own) for entry in published(same_kind(top.get("name")))]
    return rows


def _published_row(entry: PublishedValue, own: dict[str, Any] | None) -> dict[str, Any]:
    half = 0.5 * (entry.high - entry.low)
    other = {"value": entry.value, "error": half} if entry.value is not None else None
    if entry.value is None:
        low, high = number(entry.low, 2), number(entry.high, 2)
        text = f"{low} to {high}"
        gev = f"{number(entry.low * GEV_PER_CM3, 2)} to {number(entry.high * GEV_PER_CM3, 2)}"
    else:
        text = " ± ".join(measurement(entry.value, half))
        gev = " ± ".join(measurement(entry.value * GEV_PER_CM3, half * GEV_PER_CM3))
    return {
        "label": entry.label,
        "text": text,
        "gev": gev,
        "quoted": entry.quoted,
        "reference": entry.reference,
        "url": entry.url,
        "where": entry.where,
        "how": HOW_KNOWN[entry.how],
        "note": entry.note,
        "tension": _tension(own, other),
    }


def _arxiv(source: Any) -> str:
    """A link for a source that is an arXiv number, and for nothing else."""
    import re

    match = re.search(r"arXiv:\s*(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", str(source or ""), flags=re.I)
    return f"https://arxiv.org/abs/{match[1]}" if match else ""


def _tension(own: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if own is None or other is None or not finite(own.get("value")) or not finite(other.get("value")):
        return ""
    variance = sum(e["error"] ** 2 for e in (own, other) if finite(e.get("error")))
    return f"{signed((own['value'] - other['value']) / variance**0.5)} σ" if variance > 0 else ""


def methods_used(run: RunFolder) -> list[tuple[str, str, str]]:
    """(key, label, description) of every inversion in the run, for the legend."""
    listed = [q.get("method") for q in _entries(run.summary.get("quantities"))]
    if run.profiles is not None:
        listed += run.profiles["method"].unique().to_list()
    return [
        (m, method_label(m), METHODS[m][1] if m in METHODS else "")
        for m in method_order(listed)
        if m != "truth"
    ]


def method_table(run: RunFolder) -> dict[str, Any] | None:
    """All quantities: a row per quantity and place, a column per inversion, the truth beside them."""
    entries = [q for q in _entries(run.summary.get("quantities")) if q.get("method") != "truth"]
    if not entries:
        return None
    methods = method_order(q.get("method") for q in entries)
    keys = list(dict.fromkeys((str(q.get("name")), str(q.get("where") or "")) for q in entries))
    order = ("a_R", "a_phi", "a_z", "K_z", "rho", "rho_dm", "rho_dm_average")
    rank = {name: i for i, name in enumerate(order)}
    keys.sort(key=lambda k: rank.get(k[0], len(rank)))  # stable: places keep the file's order
    rows, last = [], None
    for name, where in keys:
        cells = {
            str(q.get("method")): q
            for q in entries
            if (str(q.get("name")), str(q.get("where") or "")) == (name, where)
        }
        first = next(iter(cells.values()))
        truth = next((q["truth"] for q in cells.values() if finite(q.get("truth"))), None)
        errors = [q["error"] for q in cells.values() if finite(q.get("error")) and q["error"] > 0]
        rows.append(
            {
                "symbol": quantity_html(name) if name != last else "",
                "words": quantity_words(name) if name != last else "",
                "name": name,
                "where": where_html(where),
                "unit": unit_text(first.get("unit")),
                "truth": truth,
                "truth_text": measurement(truth, min(errors) / 10 if errors else None)[0],
                "cells": [Cell.of(cells[m]) if m in cells else None for m in methods],
            }
        )
        last = name
    return {
        "methods": [(m, method_label(m)) for m in methods],
        "rows": rows,
        "has_truth": any(row["truth"] is not None for row in rows),
    }


def budget_rows(run: RunFolder) -> list[dict[str, Any]]:
    """The budget as a list of quantities and methods with their terms, the total last."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for entry in _entries(run.summary.get("budget")):
        name, _, where = str(entry.get("quantity")).partition("@")
        where = str(entry.get("where") or where)
        key = (name, where, str(entry.get("method")), str(entry.get("unit") or ""))
        groups.setdefault(key, []).append(entry)
    rows = []
    for (name, where, method, unit), entries in groups.items():
        rows.append(
            {
                "name": name,
                "symbol": quantity_html(name),
                "place": where,
                "where": where_html(where),
                "method": method,
                "label": method_label(method),
                "unit": unit_text(unit),
                "raw_unit": unit,
                "terms": {
                    str(e.get("term")): {
                        "value": e.get("value"),
                        "text": measurement(e.get("value"), e.get("value"))[1] or number(e.get("value")),
                        "count": int(e["count"]) if finite(e.get("count")) else None,
                        "bias": e.get("bias"),
                        "bias_text": signed_like(e.get("bias"), e.get("value")),
                    }
                    for e in entries
                },
            }
        )
    return rows


def signed_like(value: Any, scale: Any) -> str:
    """A signed number with the decimals that belong to an error of that size; empty without one."""
    if not finite(value):
        return ""
    text = measurement(value, scale)[0]
    return text if text.startswith("−") else f"+{text}"


_CHECK_WORDS: list[tuple[str, str]] = [
    ("stein_v", "Stein: the velocity score averages to zero"),
    ("stein_x", "Stein: the position score averages to zero"),
]


def check_words(name: str) -> str:
    """What a check of that name tests, in words."""
    return dict(_CHECK_WORDS).get(name, humanise(name))


def checks(run: RunFolder) -> list[dict[str, Any]]:
    """Checks that need no truth, by model family, each with a verdict in words."""
    found = run.summary.get("checks")
    sections = []
    for family, entries in found.items() if isinstance(found, dict) else ():
        rows = []
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            item = entry if isinstance(entry, dict) else {"value": entry}
            good, bad = item.get("ok") is True, item.get("ok") is False
            verdict = "as expected" if good else "differs from what it should be" if bad else "no verdict"
            value, error = item.get("value"), item.get("error")
            rows.append(
                {
                    "name": str(name),
                    "words": str(item.get("words") or check_words(str(name))),
                    "value": value if finite(value) else None,
                    "text": " ± ".join(t for t in measurement(value, error) if t)
                    if not isinstance(value, list)
                    else ", ".join(number(v) for v in value),
                    "expected": number(item["expected"])
                    if finite(item.get("expected"))
                    else str(item.get("expected") or ""),
                    "level": "ok" if good else "fail" if bad else "none",
                    "verdict": verdict,
                }
            )
        if rows:
            sections.append({"family": str(family), "label": method_label(str(family)), "rows": rows})
    return sections


def equilibrium(run: RunFolder) -> dict[str, Any] | None:
    """The verdict sentence, its level and the numbers behind it."""
    found = run.summary.get("equilibrium")
    if not isinstance(found, dict) or not (found.get("verdict") or found.get("numbers")):
        return None
    level = found.get("level") if found.get("level") in ("ok", "warn", "fail") else "none"
    return {
        "verdict": str(found.get("verdict") or ""),
        "level": level,
        "numbers": list(_flatten(found.get("numbers") or {})),
    }


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested objects as (dotted key, text) pairs; a value with an error becomes one line."""
    if isinstance(value, dict):
        if finite(value.get("value")) and set(value) <= {"value", "error", "unit", "expected"}:
            text = " ± ".join(t for t in measurement(value["value"], value.get("error")) if t)
            unit = unit_text(value.get("unit"))
            yield prefix, f"{text} {unit}".strip()
            return
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and all(not isinstance(v, dict | list) for v in value):
        yield prefix, ", ".join(_leaf(v) for v in value)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _flatten(item, f"{prefix}.{i}" if prefix else str(i))
    else:
        yield prefix, _leaf(value)


def _leaf(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    # A large integer is a count or a seed: every digit matters.
    return str(value) if isinstance(value, int) else number(value, 5)


def catalog_rows(run: RunFolder) -> dict[str, Any] | None:
    """The row account with shares, and whether it adds up."""
    found = run.summary.get("catalog")
    if not isinstance(found, dict):
        return None
    steps = fate_steps(found)
    if not steps:
        return None
    total = next((rows for kind, _, rows in steps if kind == "in"), None)
    gone = sum(rows for kind, _, rows in steps if kind != "in")
    return {
        "rows": [
            {
                "kind": kind,
                "words": words,
                "rows": rows,
                "text": count(rows),
                "share": f"{100 * rows / total:.2f} %" if total else "",
            }
            for kind, words, rows in steps
        ],
        "adds_up": total is None or gone == total,
        "difference": count(total - gone) if total is not None else "",
        "kept": next((count(rows) for kind, _, rows in steps if kind == "kept"), ""),
    }


def members(run: RunFolder) -> dict[str, Any] | None:
    """The members with a sentence on how many of each family finished."""
    entries = _entries(run.summary.get("members"))
    if not entries:
        return None
    done = ("ok", "done", "finished", "terminated", "completed", "success", "skipped", "reused")
    rows = []
    for entry in entries:
        status = str(entry.get("status", ""))
        rows.append(
            {
                "index": _leaf(entry.get("index")),
                "family": str(entry.get("family", "")),
                "label": method_label(str(entry.get("family", ""))),
                "seed": _leaf(entry.get("seed")),
                "bootstrap": _leaf(entry.get("bootstrap")),
                "draw": _leaf(entry.get("draw")),
                "status": status,
                "level": "ok" if status.lower() in done else "fail",
                "best": number(entry.get("best"), 6),
                "time": duration(entry.get("seconds")),
            }
        )
    sentences = []
    for family in dict.fromkeys(row["family"] for row in rows):
        own: Sequence[dict[str, Any]] = [row for row in rows if row["family"] == family]
        good = sum(row["level"] == "ok" for row in own)
        sentences.append(f"{method_label(family)}: {good} of {len(own)} finished")
    return {"rows": rows, "sentence": "; ".join(sentences) + "."}


def provenance(run: RunFolder) -> list[tuple[str, str]]:
    """Versions, revisions, hashes and seeds as (key, text)."""
    return list(_flatten(run.provenance))
