"""Figures of numbers: the result beside published values, its error budget, training, row account."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from galray.report import style
from galray.report.published import PublishedValue
from galray.report.run import Curve
from galray.report.text import (
    count,
    finite,
    humanise,
    measurement,
    method_label,
    quantity_math,
    unit_math,
    unit_text,
)
from galray.units import GEV_PER_CM3

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["budget", "comparison", "fate_steps", "row_account", "training", "variants"]


def comparison(
    headline: dict[str, Any],
    methods: Sequence[dict[str, Any]],
    published: Sequence[PublishedValue],
    comparisons: Sequence[dict[str, Any]] = (),
    role: str = "combined",
) -> Figure | None:
    """The headline density with its inversions above published values, in Msun/pc³ and GeV/cm³.

    Arguments:
        headline: The summary's headline, value and error in Msun/pc³.
        methods: The same quantity by each inversion (entries of ``quantities``).
        published: Published values to show below.
        comparisons: The summary's own comparison values in the headline's unit.
        role: The inversion whose colour the headline takes.
    """
    if not finite(headline.get("value")):
        return None
    own = [(method_label(q["method"]), q["value"], q.get("error"), q["method"]) for q in methods]
    rows = len(own) + 1 + len(published) + len(comparisons)
    figure, axes = style.new_figure(5.6, 1.25 + 0.235 * rows)
    value, error = headline["value"], headline.get("error") or 0.0
    axes.axvspan(value - error, value + error, color=style.color(role), alpha=0.13, lw=0)
    labels: list[tuple[float, str, bool]] = []
    drawn = [value - error, value + error]

    def bar(y: float, at: float, width: float | None, method: str, **options: Any) -> None:
        tint = style.color(method)
        axes.errorbar(
            at, y, xerr=width if finite(width) else None, color=tint, lw=1.6, capsize=0, zorder=3, **options
        )
        drawn.extend((at - (width or 0.0), at + (width or 0.0)))

    y = 0.0
    bar(y, value, error, role, fmt="o", ms=7.5)
    labels.append((y, "this run", True))
    for label, at, width, method in own:
        y -= 1
        bar(y, at, width, method, fmt=style.marker(method), ms=4.6)
        labels.append((y, f"   {label}", False))
    y -= 0.55
    axes.axhline(y, color=style.color("grid"), lw=0.8)
    y += 0.1
    for item in comparisons:
        y -= 1
        bar(y, item["value"], item.get("error"), "ink", fmt="D", ms=4.2)
        labels.append((y, str(item.get("label", "")), False))
    for entry in published:
        y -= 1
        labels.append((y, entry.label, False))
        if entry.value is None:
            span = [entry.low, entry.high]
            axes.plot(span, [y, y], color=style.color("faint"), lw=6, alpha=0.45, solid_capstyle="butt")
            drawn.extend(span)
            continue
        face = style.color("paper") if entry.how == "second-hand" else style.color("soft")
        axes.errorbar(
            entry.value,
            y,
            xerr=[[entry.value - entry.low], [entry.high - entry.value]],
            fmt="o",
            ms=4.6,
            lw=1.3,
            color=style.color("soft"),
            mfc=face,
            zorder=3,
        )
        drawn.extend((entry.low, entry.high))
    if finite(headline.get("truth")):
        axes.axvline(headline["truth"], color=style.color("ink"), ls=style.dashes("truth"), lw=1.3, zorder=2)
        axes.annotate(
            "truth of the mock",
            (headline["truth"], 0.62),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            va="bottom",
        )
        drawn.append(headline["truth"])
    low, high = min(drawn), max(drawn)
    margin = 0.04 * (high - low or 1.0)
    axes.set_xlim(min(low - margin, 0.0) if low > 0 else low - margin, high + margin)
    axes.set_ylim(y - 0.7, 1.5 if finite(headline.get("truth")) else 0.8)
    axes.set_yticks([position for position, _, _ in labels], [style.literal(t) for _, t, _ in labels])
    for tick, (_, _, bold) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_color(style.color("ink" if bold else "soft"))
        tick.set_fontweight("bold" if bold else "normal")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.locator_params(axis="x", nbins=6)
    symbol = quantity_math("rho_dm" if str(headline.get("name")).startswith("rho_dm") else "rho")
    axes.set_xlabel(rf"${symbol}$  [${unit_math('Msun/pc3')}$]")
    top = axes.secondary_xaxis("top", functions=(lambda d: d * GEV_PER_CM3, lambda d: d / GEV_PER_CM3))
    top.set_xlabel(rf"[${unit_math('GeV/cm3')}$]")
    top.spines["top"].set_visible(True)
    return figure


def variants(rows: Sequence[dict[str, Any]], headline: dict[str, Any], role: str) -> Figure | None:
    """The density by other estimators and by single tracer groups around the headline's value and error.

    Arguments:
        rows: Rows of `galray.report.sections.variants`.
        headline: The summary's headline in Msun/pc³.
        role: The inversion whose colour the headline takes.
    """
    if not rows or not finite(headline.get("value")):
        return None
    figure, axes = style.new_figure(5.6, 0.85 + 0.235 * len(rows))
    value, error = headline["value"], headline.get("error") or 0.0
    axes.axvspan(value - error, value + error, color=style.color(role), alpha=0.15, lw=0)
    axes.axvline(value, color=style.color(role), lw=1.2)
    shapes = {"estimator": ("o", "ink"), "check": ("x", "fail"), "group": ("D", "soft")}
    names, y, last = [], 0.0, rows[0]["kind"]
    places = []
    for row in rows:
        y -= 1.0 if row["kind"] == last else 1.5
        last = row["kind"]
        shape, tint = shapes[last]
        cell = row["cell"]
        axes.errorbar(
            cell.value, y, xerr=cell.error, fmt=shape, ms=4.6, lw=1.3, color=style.color(tint), zorder=3
        )
        names.append(style.literal(_short(row["name"], 44)))
        places.append(y)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(y - 0.7, -0.3)
    axes.grid(axis="x")
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(rf"$\rho$  [${unit_math('Msun/pc3')}$]")
    return figure


def budget(
    terms: Sequence[dict[str, Any]], total: float | None, unit: str, title: str, method: str = "combined"
) -> Figure | None:
    """Error terms as a waterfall: each begins where those before it end, added in squares, up to the total.

    A light bar from zero is the term by itself, with the uncertainty of that error as a whisker; the dark
    step is what it adds.

    Arguments:
        terms: Entries with ``term``, ``error``, ``uncertainty`` (may be absent) and ``count``.
        total: The total standard error in the same unit, or None.
        unit: Unit of the errors.
        title: Panel title.
        method: The inversion whose colour the bars take.
    """
    rows = [t for t in terms if finite(t.get("error"))]
    if not rows:
        return None
    errors = np.array([float(t["error"]) for t in rows])
    ends = np.sqrt(np.cumsum(errors**2))
    squares = float((errors**2).sum())
    figure, axes = style.new_figure(5.6, 1.0 + 0.36 * (len(rows) + 1))
    tint, soft = style.color(method), style.color("soft")
    widest = max(float(ends[-1]), total or 0.0) or 1.0
    for i, (term, error, end) in enumerate(zip(rows, errors, ends, strict=True)):
        begin = float(ends[i - 1]) if i else 0.0
        axes.barh(-i, error, height=0.62, color=tint, alpha=0.25)
        axes.barh(-i, end - begin, left=begin, height=0.62, color=tint, alpha=0.75)
        axes.plot([end, end], [-i - 0.31, -i - 0.69], color=soft, lw=0.8)
        own = term.get("uncertainty")
        # Of a term that is known to be zero, or taken from elsewhere, there is no uncertainty to show.
        known = finite(own) and own > 0
        if known:
            axes.errorbar(error, -i, xerr=min(own, error), color=style.color("ink"), lw=0.9, capsize=2)
        share = f"{100 * error**2 / squares:.0f} %" if squares > 0 else ""
        number = term.get("count")
        # A term of one piece (a table of baryons, one choice of method) has no count to speak of.
        counted = rf"  $n={int(number)}$" if finite(number) and number > 1 else ""
        value = " ± ".join(text for text in measurement(error, own if known else error) if text)
        value = value if known else measurement(error, error)[1] or "0"
        reach = max(end, error + (min(own, error) if known else 0.0))
        axes.text(
            reach + 0.015 * widest,
            -i,
            f"{value}   ({share}){counted}" if share else "0",
            va="center",
            fontsize=8,
            color=soft,
        )
    names = [style.literal(humanise(t.get("term", ""))) for t in rows]
    if finite(total):
        axes.barh(-len(rows), total, height=0.62, color=tint)
        axes.text(
            total + 0.015 * widest,
            -len(rows),
            measurement(total, total)[1],
            va="center",
            fontsize=8,
            fontweight="bold",
            color=style.color("ink"),
        )
        axes.axhline(-len(rows) + 0.5, color=style.color("grid"), lw=0.8)
        names.append("total")
    axes.set_yticks([-i for i in range(len(names))], names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, widest * 1.75)
    axes.set_ylim(-len(names) + 0.45, 0.55)
    axes.grid(axis="x")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(rf"standard error  [${unit_math(unit)}$]" if unit_text(unit) else "standard error")
    style.panel_title(axes, title)
    return figure


def training(curves: Sequence[Curve], family: str) -> Figure | None:
    """Training and held-out objective of every member of a family against the epoch."""
    chosen = [c for c in curves if c.family == family]
    held = np.concatenate([np.asarray(c.validation) for c in chosen]) if chosen else np.array([])
    every = np.concatenate([held, *[np.asarray(c.train) for c in chosen]]) if chosen else held
    every = every[np.isfinite(every)]
    if not every.size:
        return None
    figure, axes = style.new_figure(5.2, 3.3)
    tint = style.color(family)
    strength = max(0.35, min(1.0, 3.0 / len(chosen)))
    for i, curve in enumerate(chosen):
        first = i == 0
        axes.plot(
            curve.epochs,
            curve.train,
            color=tint,
            lw=1.0,
            ls=(0, (3, 2)),
            alpha=0.7 * strength,
            label="training" if first else None,
        )
        validation = np.asarray(curve.validation)
        axes.plot(
            curve.epochs,
            validation,
            color=tint,
            lw=1.6,
            alpha=strength,
            label="held out" if first else None,
        )
        if np.isfinite(validation).any():
            best = int(np.nanargmin(validation))
            axes.plot(
                curve.epochs[best],
                validation[best],
                "o",
                ms=4.4,
                color=tint,
                mec=style.color("paper"),
                label="best epoch" if first else None,
                zorder=4,
            )
    # The first epochs tower over the rest: show the range in which the curves are told apart.
    low, high = float(every.min()), float(np.percentile(every, 82))
    final = [
        v[np.isfinite(v)][-1] for v in (np.asarray(c.validation) for c in chosen) if np.isfinite(v).any()
    ]
    high = max([high, *final])
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.10 * (high - low))
    axes.set_xlabel("epoch")
    axes.set_ylabel("objective (lower is better)")
    axes.grid(axis="y")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    members = f"{len(chosen)} member" + ("s" if len(chosen) > 1 else "")
    style.panel_title(axes, style.literal(f"{method_label(family)}: {members}"))
    return figure


def fate_steps(catalog: dict[str, Any]) -> list[tuple[str, str, int]]:
    """The row account in order: (kind, words, rows), kind one of in, cut, rejected, other, apart, kept.

    ``fate`` may name the kept rows or not; they come last and once.
    """
    fate = catalog.get("fate") or {}
    steps: list[tuple[str, str, int]] = []
    if finite(catalog.get("rows_in")):
        steps.append(("in", "rows read", int(catalog["rows_in"])))
    for key, rows in fate.items():
        if key in ("kept", "rows_in") or not finite(rows):
            continue
        kind, _, rest = str(key).partition(":")
        if kind.startswith("kept_"):
            apart = {"kept_no_rv": "kept without radial velocity", "kept_margin": "kept for redraws"}
            words = apart.get(kind, humanise(kind))
            steps.append(("apart", words, int(rows)))
            continue
        if kind == "cut":
            steps.append(("cut", f"cut: {humanise(rest)}", int(rows)))
        elif kind == "rejected":
            steps.append(("rejected", f"rejected: {humanise(rest)}", int(rows)))
        else:
            steps.append(("other", humanise(key), int(rows)))
    kept = catalog.get("kept", fate.get("kept"))
    if finite(kept):
        steps.append(("kept", "kept", int(kept)))
    return steps


def row_account(catalog: dict[str, Any]) -> Figure | None:
    """Where every input row went: from all rows read, step by step, to the kept ones."""
    steps = fate_steps(catalog)
    total = next((rows for kind, _, rows in steps if kind == "in"), 0)
    steps = [step for step in steps if step[2] > 0]  # the table has the empty ones
    if total <= 0 or len(steps) < 2:
        return None
    figure, axes = style.new_figure(5.6, 0.75 + 0.31 * len(steps))
    left = total
    tints = {
        "in": "faint",
        "cut": "warn",
        "rejected": "fail",
        "other": "soft",
        "apart": "flow",
        "kept": "moments",
    }
    for i, (kind, _, rows) in enumerate(steps):
        start = 0 if kind in ("in", "kept") else left - rows
        axes.barh(-i, rows, left=start, height=0.64, color=style.color(tints.get(kind, "moments")), alpha=0.9)
        if kind not in ("in", "kept"):
            axes.plot([left, left], [-i + 0.32, -i + 0.68], color=style.color("faint"), lw=0.8)
            left -= rows
        percent = 100 * rows / total
        share = f"{percent:.1f} %" if percent >= 0.1 or rows == 0 else "< 0.1 %"
        axes.text(
            1.02 * total,
            -i,
            f"{count(rows)}  ({share})",
            va="center",
            fontsize=8,
            color=style.color("ink" if kind in ("in", "kept") else "soft"),
            fontweight="bold" if kind == "kept" else "normal",
        )
    axes.set_yticks([-i for i in range(len(steps))], [style.literal(_short(words)) for _, words, _ in steps])
    axes.tick_params(axis="both", length=0, labelbottom=False)
    axes.set_xlim(0, 1.52 * total)
    axes.set_ylim(-len(steps) + 0.4, 0.55)
    for side in ("bottom", "left"):
        axes.spines[side].set_visible(False)
    return figure


def _short(words: str, length: int = 34) -> str:
    return words if len(words) <= length else words[: length - 1] + "…"
