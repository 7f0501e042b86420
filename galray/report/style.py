"""The look of every figure: one palette, two themes, and SVG that can stand inside a page.

A figure is drawn once, in the light theme. Inside the page each palette colour becomes a CSS variable,
so that the same drawing follows the reader's light or dark theme; the file in ``figures/`` keeps the
light colours on white. The hues are the Okabe-Ito set (safe for colour-blind readers), darkened where a
thin line on white would be faint; methods differ in line style and marker too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DARK",
    "LIGHT",
    "color",
    "colorbar",
    "count_colormap",
    "css_variables",
    "dashes",
    "inline_svg",
    "literal",
    "marker",
    "new_figure",
    "panel_title",
    "standalone_svg",
    "theme",
]

LIGHT = {
    "flow": "#0072b2",
    "score": "#d55e01",
    "moments": "#00875f",
    "vertical": "#a87400",
    "combined": "#8e3b8c",
    "other": "#5b5fc7",
    "other2": "#8a5a3c",
    "ink": "#1b1f28",
    "soft": "#555e6e",
    "faint": "#8b94a5",
    "grid": "#e4e7ee",
    "paper": "#fffffe",
    "ok": "#1a7f4b",
    "warn": "#9a6400",
    "fail": "#c0352b",
}
"""Colours on white; each hex value stands for one role only, so that it can be replaced in the SVG."""

DARK = {
    "flow": "#5cb8f0",
    "score": "#ff9550",
    "moments": "#35cfa0",
    "vertical": "#f0c04a",
    "combined": "#dd94da",
    "other": "#a6a9ff",
    "other2": "#d3a384",
    "ink": "#eef1f6",
    "soft": "#b3bccb",
    "faint": "#818b9c",
    "grid": "#2d3543",
    "paper": "#1a202b",
    "ok": "#5cd39b",
    "warn": "#f0b548",
    "fail": "#ff8a7d",
}
"""The same roles on a dark page."""

_MARKERS = {"flow": "o", "score": "s", "moments": "^", "vertical": "D", "combined": "o"}
_DASHES: dict[str, Any] = {
    "flow": "-",
    "score": (0, (5, 1.6)),
    "moments": (0, (5, 1.4, 1.2, 1.4)),
    "vertical": "-",
    "combined": "-",
    "truth": (0, (2.2, 1.6)),
}

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same figure everywhere
    "mathtext.fontset": "dejavusans",
    "font.size": 8.6,
    "axes.titlesize": 9.4,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.2,
    "ytick.labelsize": 8.2,
    "legend.fontsize": 8.2,
    "axes.titlelocation": "left",
    "axes.titlepad": 7.0,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": LIGHT["faint"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,  # parsing every tick label as mathtext takes half the time
    "axes.formatter.limits": (-4, 5),
    "axes.unicode_minus": True,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["faint"],
    "ytick.color": LIGHT["faint"],
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.facecolor": LIGHT["paper"],
    "savefig.facecolor": LIGHT["paper"],
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "svg.fonttype": "path",  # text keeps its place whatever fonts the reader has
    "svg.hashsalt": "galray",
    "savefig.dpi": 150,
    "figure.dpi": 150,
}


@contextmanager
def theme() -> Iterator[None]:
    """Matplotlib with the report's settings, restored on leaving."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def color(role: str) -> str:
    """The light colour of a method or role; methods that are not known get one of two spare hues."""
    if role == "truth":
        return LIGHT["ink"]
    if role in LIGHT:
        return LIGHT[role]
    return LIGHT["other" if sum(map(ord, role)) % 2 == 0 else "other2"]


def marker(method: str) -> str:
    """The marker of a method."""
    return _MARKERS.get(method, "v")


def dashes(method: str) -> Any:
    """The line style of a method."""
    return _DASHES.get(method, (0, (3, 1.2, 1, 1.2, 1, 1.2)))


def literal(text: Any) -> str:
    """Text from a file for a label: a dollar sign must not start mathtext."""
    return str(text).replace("\\", "\\\\").replace("$", r"\$") if "$" in str(text) else str(text)


def count_colormap() -> Any:
    """Viridis without its darkest end, which would vanish on a dark page; empty cells stay clear."""
    import matplotlib
    import numpy as np
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.14, 1.0, 220))).with_extremes(
        bad=(0.0, 0.0, 0.0, 0.0)
    )


def new_figure(
    width: float = 5.2, height: float = 3.5, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure (inches) with constrained layout and its axes; pyplot and its global state stay out.

    Arguments:
        width: Width in inches.
        height: Height in inches.
        rows: Rows of axes.
        columns: Columns of axes.
        options: Passed to ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)  # type: ignore[union-attr, call-arg]
    return figure, figure.subplots(rows, columns, **options)


def colorbar(figure: Figure, mesh: Any, label: str, **options: Any) -> None:
    """A colour bar without outline, drawn as one image: its many cells would swell the SVG.

    Arguments:
        figure: The figure.
        mesh: What the colours belong to.
        label: Text beside the bar.
        options: Passed to ``Figure.colorbar``.
    """
    bar: Any = figure.colorbar(mesh, **options)
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.set_label(label)


def panel_title(axes: Axes, text: str) -> None:
    """A panel's title, left and bold."""
    axes.set_title(text, loc="left", fontweight="bold")


def _save(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    # Comments repeat every label, metadata holds links: neither is needed.
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    return re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)


def standalone_svg(figure: Figure) -> str:
    """The figure as an SVG file in the light theme."""
    return _save(figure)


def inline_svg(svg: str, name: str, title: str) -> str:
    """A standalone SVG turned into an element of a page.

    Identifiers get the figure's name as prefix (several figures share one page), palette colours become
    CSS variables, and width and height give way to the page's layout.

    Arguments:
        svg: Output of `standalone_svg`.
        name: Unique name of the figure, letters, digits and hyphens.
        title: Plain text for screen readers; escaped here.
    """
    from markupsafe import escape

    body = svg[svg.index("<svg") :]
    match = re.search(r'viewBox="([^"]+)"', body)
    view = match[1] if match else "0 0 400 300"
    body = body[body.index(">") + 1 :]
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    for role, value in LIGHT.items():
        body = body.replace(value, f"var(--{role})")
    head = f'<svg viewBox="{view}" role="img" aria-label="{escape(title)}" class="figure-{name}">'
    return head + body.strip()


def css_variables(palette: dict[str, str]) -> str:
    """A palette as CSS custom properties."""
    return " ".join(f"--{role}: {value};" for role, value in palette.items())
