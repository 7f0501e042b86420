"""What the page's tables say: the summary turned into rows of ready strings, values kept beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from galray.report.published import HOW_KNOWN, PublishedValue, published
from galray.report.run import RunFolder, entries
from galray.report.text import (
    METHODS,
    count,
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
    "headline",
    "headline_methods",
    "headline_role",
    "in_msun_pc3",
    "method_table",
    "methods_used",
    "published_beside",
    "published_rows",
    "same_kind",
    "variants",
    "weights",
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
        for t in entries(found.get("terms"))
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
        "terms": _largest(terms),
    }


def _largest(terms: list[dict[str, Any]], limit: int = 6) -> list[dict[str, Any]]:
    """The largest terms in their order; many small ones become one line, added in quadrature."""
    if len(terms) <= limit:
        return terms
    ranked = sorted(terms, key=lambda t: t["error"] if finite(t["error"]) else 0.0, reverse=True)
    kept = [t for t in terms if any(t is big for big in ranked[: limit - 1])]
    rest = [t["error"] for t in ranked[limit - 1 :] if finite(t["error"])]
    error = sum(e**2 for e in rest) ** 0.5
    words = f"{len(ranked) - len(kept)} smaller terms"
    return [*kept, {"term": words, "error": error, "text": measurement(error, error)[1], "count": None}]


def _tenth(entry: dict[str, Any]) -> Any:
    """A precision for showing a truth: a tenth of the error, so that it is never rounded visibly."""
    error = entry.get("error")
    return error / 10 if finite(error) and error > 0 else None


def headline_methods(run: RunFolder) -> list[dict[str, Any]]:
    """The headline's quantity at its place by each single inversion, in Msun/pc³."""
    top = run.summary.get("headline") or {}
    same = [q for q in entries(run.summary.get("quantities")) if q.get("name") == top.get("name")]
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
    for item in entries(run.summary.get("comparisons")):
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
    return rows + [_published_row(entry, own) for entry in published_beside(run)]


def published_beside(run: RunFolder) -> list[PublishedValue]:
    """Published values of the headline's kind, without those that the summary itself compares with."""
    top = run.summary.get("headline")
    if not isinstance(top, dict):
        return []
    sources = " ".join(str(item.get("source")) for item in entries(run.summary.get("comparisons")))
    kind = published(same_kind(top.get("name")))
    return [entry for entry in kind if entry.reference.lower() not in sources.lower()]


def variants(run: RunFolder) -> list[dict[str, Any]]:
    """The density by other estimators and by single tracer groups, as rows of a table and a figure.

    From the lists ``estimators`` and ``groups`` of a vertical inversion's summary; an estimator that only
    shows what an omission would do is marked as ``check``.
    """
    rows = []
    for kind in ("estimators", "groups"):
        for entry in entries(run.summary.get(kind)):
            if not finite(entry.get("rho0")):
                continue
            chi2, dof = entry.get("chi2"), entry.get("dof")
            rows.append(
                {
                    "kind": "group" if kind == "groups" else "check" if entry.get("check") else "estimator",
                    "name": str(entry.get("name", "")),
                    "cell": Cell.of({"value": entry["rho0"], "error": entry.get("error")}),
                    "mean": Cell.of(
                        {"value": entry.get("mean_100pc"), "error": entry.get("mean_100pc_error")}
                    ),
                    "chi2": f"{number(chi2, 3)} / {count(dof)}" if finite(chi2) and finite(dof) else "",
                    "stars": count(entry["stars"]) if finite(entry.get("stars")) else "",
                }
            )
    return rows


def weights(run: RunFolder) -> str:
    """The weights of the inversions in the combined headline as a sentence; empty without them."""
    found = run.summary.get("weights")
    shares = found.items() if isinstance(found, dict) else ()
    listed = [f"{method_label(str(m))} {100 * w:.0f} %" for m, w in shares if finite(w)]
    return ", ".join(listed)


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
    match = re.search(r"arXiv:\s*(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", str(source or ""), flags=re.I)
    return f"https://arxiv.org/abs/{match[1]}" if match else ""


def _tension(own: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if own is None or other is None or not finite(own.get("value")) or not finite(other.get("value")):
        return ""
    variance = sum(e["error"] ** 2 for e in (own, other) if finite(e.get("error")))
    return f"{signed((own['value'] - other['value']) / variance**0.5)} σ" if variance > 0 else ""


def methods_used(run: RunFolder) -> list[tuple[str, str, str]]:
    """(key, label, description) of every inversion in the run, for the legend."""
    listed = [q.get("method") for q in entries(run.summary.get("quantities"))]
    if run.profiles is not None:
        listed += run.profiles["method"].unique().to_list()
    return [
        (m, method_label(m), METHODS[m][1] if m in METHODS else "")
        for m in method_order(listed)
        if m != "truth"
    ]


def method_table(run: RunFolder) -> dict[str, Any] | None:
    """All quantities: a row per quantity and place, a column per inversion, the truth beside them."""
    listed = [q for q in entries(run.summary.get("quantities")) if q.get("method") != "truth"]
    if not listed:
        return None
    methods = method_order(q.get("method") for q in listed)
    keys = list(dict.fromkeys((str(q.get("name")), str(q.get("where") or "")) for q in listed))
    order = ("a_R", "a_phi", "a_z", "v_c", "K_z", "sigma", "rho", "rho_dm", "rho_dm_average", "rho_dm_sphere")
    rank = {name: i for i, name in enumerate(order)}
    keys.sort(key=lambda k: rank.get(k[0], len(rank)))  # stable: places keep the file's order
    rows, last = [], None
    for name, where in keys:
        cells = {
            str(q.get("method")): q
            for q in listed
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
    for entry in entries(run.summary.get("budget")):
        name, _, where = str(entry.get("quantity")).partition("@")
        where = str(entry.get("where") or where)
        key = (name, where, str(entry.get("method")), str(entry.get("unit") or ""))
        groups.setdefault(key, []).append(entry)
    rows = []
    for (name, where, method, unit), group in groups.items():
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
                        "uncertainty": e.get("uncertainty"),
                        "bias": e.get("bias"),
                        "bias_text": signed_like(e.get("bias"), e.get("value")),
                    }
                    for e in group
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
