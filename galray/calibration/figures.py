"""Figures of a calibration: where the truth falls in what was claimed, and how often the bands held it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from galray.report import style
from galray.results import HEADLINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from galray.calibration.run import Calibration, Judgement

__all__ = ["FIGURES", "held", "recovered", "transforms"]

_NAMES = {HEADLINE: r"$\rho_\mathrm{DM}$, averaged", "a_R": r"$a_R$, all places", "a_z": r"$a_z$, all places"}
_BINS = 10


def _pooled(judgements: list[Judgement], name: str, method: str) -> np.ndarray:
    """PIT values of one quantity, its places side by side: (places, mocks)."""
    return np.array([j.claims.pit for j in judgements if (j.name, j.method) == (name, method)])


def transforms(calibration: Calibration, method: str) -> Figure:
    """PIT histograms of the named quantities: flat where the errors are right."""
    figure, row = style.new_figure(8.6, 2.9, columns=len(_NAMES), sharey=True)
    for axes, (name, label) in zip(row, _NAMES.items(), strict=True):
        pit = _pooled(calibration.judgements, name, method)
        counts = np.histogram(pit, _BINS, (0, 1))[0] / max(len(pit), 1)
        expected = pit.shape[-1] / _BINS
        spread = np.sqrt(expected * (1 - 1 / _BINS))
        axes.axhspan(expected - spread, expected + spread, color=style.color("grid"), zorder=0)
        axes.axhline(expected, color=style.color("ink"), ls=style.dashes("truth"), lw=1)
        axes.stairs(counts, np.linspace(0, 1, _BINS + 1), fill=True, alpha=0.35, color=style.color(method))
        axes.stairs(counts, np.linspace(0, 1, _BINS + 1), color=style.color(method), lw=1.4)
        axes.set_xlabel("claimed probability below the truth")
        axes.set_xlim(0, 1)
        style.panel_title(axes, label)
    row[0].set_ylabel("mocks per bin")
    return figure


def held(calibration: Calibration, method: str) -> Figure:
    """How often bands of every level held the truth."""
    figure, row = style.new_figure(8.6, 3.2, columns=len(_NAMES), sharey=True)
    level = np.linspace(0, 1, 201)
    for axes, (name, label) in zip(row, _NAMES.items(), strict=True):
        found = [j for j in calibration.judgements if (j.name, j.method) == (name, method)]
        number = found[0].raw.number
        spread = np.sqrt(level * (1 - level) / number)
        axes.fill_between(level, level - spread, level + spread, color=style.color("grid"), lw=0, zorder=0)
        axes.plot(level, level, color=style.color("ink"), ls=style.dashes("truth"), lw=1)
        for place, j in enumerate(found):
            inside = 2 * np.abs(j.claims.pit - 0.5)
            part = np.searchsorted(np.sort(inside), level, side="right") / number
            text = "as claimed" if place == 0 else None
            axes.plot(
                level,
                part,
                color=style.color(method),
                lw=1.3,
                alpha=1 if len(found) == 1 else 0.45,
                label=text,
            )
        if found[0].tested is not None and found[0].inflation > 1:
            claims = found[0].claims
            odd = claims[claims.mock % 2 == 1].inflated(found[0].inflation)
            part = np.searchsorted(np.sort(2 * np.abs(odd.pit - 0.5)), level, side="right") / len(odd)
            text = f"errors × {found[0].inflation:.2f}, held-out half"
            axes.plot(level, part, color=style.color("soft"), lw=1.1, ls=(0, (4, 1.5)), label=text)
        axes.set_xlabel("claimed")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.legend(loc="upper left", fontsize=7)
        style.panel_title(axes, label)
    row[0].set_ylabel("part of the mocks held")
    return figure


def recovered(calibration: Calibration, method: str) -> Figure:
    """ρ_DM of every mock beside its truth."""
    figure, axes = style.new_figure(5.2, 4.0)
    c = calibration.find(method, HEADLINE).claims
    scale = 1e3
    axes.errorbar(
        scale * c.truth,
        scale * c.value,
        yerr=scale * c.error,
        fmt=style.marker(method),
        ms=3,
        lw=0.7,
        alpha=0.75,
        color=style.color(method),
    )
    ends = scale * np.array([c.truth.min(), c.truth.max()])
    axes.plot(ends, ends, color=style.color("ink"), ls=style.dashes("truth"), lw=1.2, zorder=5, label="truth")
    low, high = np.quantile(scale * c.value, [0.02, 0.98])
    room = 0.35 * (high - low)
    axes.set_ylim(
        min(low, ends[0]) - room, max(high, ends[1]) + room
    )  # a few wild bars shall not rule the axis
    axes.set_xlabel(r"true $\rho_\mathrm{DM}$  [$10^{-3}\,M_\odot\,\mathrm{pc}^{-3}$]")
    axes.set_ylabel(r"measured $\rho_\mathrm{DM}$")
    axes.legend(loc="upper left")
    style.panel_title(axes, r"$\rho_\mathrm{DM}$, averaged")
    return figure


FIGURES = {
    "pit": (transforms, "Where the truth falls in the claimed distributions"),
    "held": (held, "How often bands held the truth"),
    "recovered": (recovered, "Measured and true dark matter density of every mock"),
}
"""What a page draws for each method, and what it is called."""
