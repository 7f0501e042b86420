"""How far the result can be trusted, as rows: checks, equilibrium, row account, members, provenance."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from galray.report.figures import fate_steps
from galray.report.run import RunFolder, entries
from galray.report.text import (
    count,
    duration,
    finite,
    humanise,
    measurement,
    method_label,
    number,
    unit_text,
)

__all__ = ["catalog_rows", "check_warnings", "check_words", "checks", "equilibrium", "members", "provenance"]

# Patterns of the names that `galray.phasespace.run_checks` gives, and what the checks say in words.
_CHECK_WORDS = [
    (r"E\[s_v(\w)\]", r"the score along v_\1 averages to zero (Stein)"),
    (r"E\[v_(\w) s_v\1\]", r"v_\1 times its own score averages to −1 (Stein)"),
    (r"E\[v_(\w) s_v(\w)\]", r"v_\1 and the score along v_\2 are uncorrelated (Stein)"),
    (r"E\[h s_(\w) \+ dh/d\1\]", r"the score along \1 averages to zero, edge weighted (Stein)"),
    (r"held-out (.+)", r"\1 on held-out stars"),
    (
        r"local E\[s_x\] − ∇ log n",
        r"the score along x is ∇ log n around each of many places (Stein, kernels)",
    ),
    (r"local E\[s_v\]", r"the score along v averages to zero around each of many places (Stein, kernels)"),
    (r"local E\[v s_v\] \+ 1", r"v times its own score averages to −1 around each of many places (Stein)"),
    (r"curl of the score", r"how far the score is from a gradient (0: it is one)"),
    (r"noise in the score", r"the part of the score that is noise learnt by heart (Stein, its own score)"),
    (r"difference of the scores", r"median relative difference of the two scores on stars neither has seen"),
    (
        r"two-sample classifier \(AUC\)",
        r"a classifier between the model's samples and stars (0.5: cannot tell)",
    ),
]


def check_words(name: str) -> str:
    """What a check of that name tests, in words; an unknown name with its underscores as spaces."""
    for pattern, words in _CHECK_WORDS:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, words, name)
    return humanise(name)


def checks(run: RunFolder) -> list[dict[str, Any]]:
    """Checks that need no truth, by model family, each with a verdict in words and a sentence on all."""
    found = run.summary.get("checks")
    sections = []
    for family, named in found.items() if isinstance(found, dict) else ():
        rows = []
        for name, entry in named.items() if isinstance(named, dict) else ():
            item = entry if isinstance(entry, dict) else {"value": entry}
            good, bad = item.get("ok") is True, item.get("ok") is False
            verdict = "as expected" if good else "differs from what it should be" if bad else "no verdict"
            value, error = item.get("value"), item.get("error")
            expected = (
                number(item["expected"]) if finite(item.get("expected")) else str(item.get("expected") or "")
            )
            if expected and finite(item.get("allowed")):
                expected += f" ± {number(item['allowed'], 2)}"
            rows.append(
                {
                    "name": str(name),
                    "words": str(item.get("words") or check_words(str(name))),
                    "value": value if finite(value) else None,
                    "text": " ± ".join(t for t in measurement(value, error) if t)
                    if not isinstance(value, list)
                    else ", ".join(number(v) for v in value),
                    "expected": expected,
                    "level": "ok" if good else "fail" if bad else "none",
                    "verdict": verdict,
                }
            )
        if rows:
            judged = [row for row in rows if row["level"] != "none"]
            passed = sum(row["level"] == "ok" for row in judged)
            sections.append(
                {
                    "family": str(family),
                    "label": method_label(str(family)),
                    "rows": rows,
                    "sentence": f"{passed} of {len(judged)} as expected." if judged else "",
                    "level": "ok" if passed == len(judged) else "fail",
                    "failed": [
                        f"{row['words']}: {row['text'] or 'not a number'} instead of {row['expected']}"
                        for row in judged
                        if row["level"] == "fail"
                    ],
                }
            )
    return sections


def check_warnings(sections: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for the top of the page on every model that fails, from what `checks` gives."""
    found = []
    for section in sections:
        failed = len(section["failed"])
        if failed and " and " in section["family"]:
            found.append(
                f"{section['label']}: {section['failed'][0]}. At least one of the two models is wrong."
            )
        elif failed:
            judged = sum(row["level"] != "none" for row in section["rows"])
            found.append(
                f"{section['label']}: the model of the stars fails {failed} of {judged} checks that need no "
                f"truth ({section['failed'][0]}{'; …' if failed > 1 else ''}). Do not trust the gravity from "
                "it before that is understood."
            )
    return found


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
    return str(value) if isinstance(value, int) else number(value, 4)


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
    listed = entries(run.summary.get("members"))
    if not listed:
        return None
    done = ("ok", "done", "finished", "terminated", "completed", "success", "skipped", "reused")
    rows = []
    for entry in listed:
        status = str(entry.get("status", ""))
        rows.append(
            {
                "index": _leaf(entry.get("index")),
                "family": str(entry.get("family", "")),
                "label": method_label(str(entry.get("family", ""))),
                "varied": humanise(entry.get("varied") or "").replace("+", ", "),
                "seed": _leaf(entry.get("seed")),
                # 0 is the sample itself: neither resampled nor redrawn.
                "bootstrap": _leaf(entry.get("bootstrap") or None),
                "draw": _leaf(entry.get("draw") or None),
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
