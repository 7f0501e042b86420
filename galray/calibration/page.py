"""The page of a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from galray.provenance import write_atomic

if TYPE_CHECKING:
    from galray.calibration.run import Calibration, Judgement

__all__ = ["build_page", "sentence"]


def sentence(j: Judgement) -> str:
    """What was found of one quantity, in words."""
    from galray.calibration.statistics import LEVELS

    parts = [
        f"{100 * level:.0f} % bands hold the truth in {100 * part:.0f} ± {100 * error:.0f} %"
        for level, part, error in zip(LEVELS, j.raw.fractions, j.raw.errors, strict=True)
        if level in (0.68, 0.90)
    ]
    return (
        f"{', '.join(parts)} of {j.raw.number} mocks; pull width {j.raw.width:.2f} ± {j.raw.width_error:.2f}"
    )


def build_page(calibration: Calibration) -> Path:
    """Draw the figures and write ``report.html``.

    Returns:
        The page's path.
    """
    from galray.calibration import figures
    from galray.calibration.statistics import LEVELS
    from galray.config import to_toml
    from galray.report import style
    from galray.report.page import keep_figure, render
    from galray.report.text import duration, method_label

    methods = list(dict.fromkeys(j.method for j in calibration.judgements))
    with style.theme():
        drawn = {
            (name, method): keep_figure(
                calibration.folder / "figures", f"{name}-{method}", title, draw(calibration, method)
            )
            for method in methods
            for name, (draw, title) in figures.FIGURES.items()
        }
    seconds = [sum(record["cpu_seconds"]) for record in calibration.records.values()]
    context: dict[str, Any] = {
        "calibration": calibration,
        "about": calibration.identity,
        "methods": [(method, method_label(method)) for method in methods],
        "figures": drawn,
        "rows": {m: [_row(j) for j in calibration.judgements if j.method == m] for m in methods},
        "words": {m: sentence(calibration.find(m, "rho_dm_average")) for m in methods},
        "levels": [f"{100 * level:.0f} %" for level in LEVELS],
        "took": duration(sum(seconds)),
        "prior": list(calibration.config.calibration.prior),
        "config": to_toml(calibration.config),
    }
    write_atomic(calibration.page, render("galray.calibration", "calibration.html.j2", context))
    return calibration.page


def _row(j: Judgement) -> dict[str, Any]:
    """One quantity's cells as text."""
    from galray.report.text import measurement, quantity_html, unit_text, where_html

    bias, bias_error = measurement(j.raw.bias, j.raw.bias_error)
    tested = j.tested
    return {
        "quantity": quantity_html(j.name),
        "where": where_html(j.where),
        "named": j.named,
        "held": [f"{100 * part:.0f}" for part in j.raw.fractions],
        "far": [abs(f - n) > 2 * e for f, n, e in _levels(j)],
        "bias": f"{bias} ± {bias_error} {unit_text(j.unit)}",
        "mean": f"{j.raw.mean_pull:+.2f}".replace("-", "−"),
        "width": f"{j.raw.width:.2f} ± {j.raw.width_error:.2f}",
        "inflation": "–" if tested is None else f"{j.inflation:.2f} ± {j.inflation_error:.2f}",
        "tested": "–"
        if tested is None
        else f"{100 * tested.fractions[1]:.0f}, {100 * tested.fractions[2]:.0f} %",
        "tested_width": "–" if tested is None else f"{tested.width:.2f}",
    }


def _levels(j: Judgement) -> list[tuple[float, float, float]]:
    from galray.calibration.statistics import LEVELS

    return list(zip(j.raw.fractions, LEVELS, j.raw.errors, strict=True))
