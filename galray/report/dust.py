"""Figures of a run behind dust: the sky before and after, and ε with distance."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from galray.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["fall", "sky"]

_LAYERS = ((0.0, 0.25), (0.25, 0.75), (0.75, 2.0))  # |z| in kpc
_FEWEST = 20  # stars in a cell


def sky(frame: Any) -> Figure | None:
    """Stars per square degree in a shell, as seen and corrected, on one colour scale.

    Arguments:
        frame: ``dust_sky.parquet`` as a Polars frame.
    """
    if frame is None:
        return None
    longitude, latitude = (np.unique(frame[name].to_numpy()) for name in ("l", "b"))
    grids = {
        name: frame[name].to_numpy().reshape(len(longitude), len(latitude)) for name in ("before", "after")
    }
    top = float(np.percentile(grids["after"], 99))
    figure, panels = style.new_figure(5.6, 3.9, 2, 1, sharex=True)
    mesh = None
    for axes, (name, title) in zip(
        panels, (("before", "as seen"), ("after", "before the dust")), strict=True
    ):
        mesh = axes.pcolormesh(
            longitude, latitude, grids[name].T, vmin=0.0, vmax=top, cmap="cividis", rasterized=True
        )
        axes.set_title(title)
        axes.set_ylabel("$b$  [deg]")
    panels[0].invert_xaxis()  # shared; l grows to the left, as seen from inside
    panels[-1].set_xlabel("$l$  [deg]")
    style.colorbar(figure, mesh, r"stars  [deg$^{-2}$]", ax=panels.tolist(), aspect=42, extend="max")
    return figure


def fall(frame: Any) -> Figure | None:
    """The mean ε against distance from the Sun, in layers of height, with the truth of a mock.

    Arguments:
        frame: ``dust.parquet`` as a Polars frame.
    """
    if frame is None:
        return None
    x = frame.select("x", "y", "z").to_numpy()
    counts, value = frame["counts"].to_numpy(), frame["efficiency"].to_numpy()
    truth = frame["truth"].to_numpy() if "truth" in frame.columns else None
    middle = (x.max(0) + x.min(0)) / 2  # the cells surround the Sun
    distance = np.linalg.norm(x - middle, axis=1)
    edges = np.linspace(0.0, distance.max(), 13)
    figure, axes = style.new_figure(5.2, 3.2)
    for number, (low, high) in enumerate(_LAYERS):
        tint = style.color(("combined", "flow", "moments")[number])
        layer = (np.abs(x[:, 2]) >= low) & (np.abs(x[:, 2]) < high) & (counts >= _FEWEST)
        rows = []
        for inner, outer in itertools.pairwise(edges):
            part = layer & (distance >= inner) & (distance < outer)
            if part.sum() >= 3:
                rows.append(
                    ((inner + outer) / 2, value[part].mean(), truth[part].mean() if truth is not None else 0)
                )
        if not rows:
            continue
        at, found, known = np.array(rows).T
        axes.plot(at, found, color=tint, marker="o", ms=4, label=f"{low:g}–{high:g} kpc")
        if truth is not None:
            axes.plot(at, known, color=tint, ls=style.dashes("truth"))
    axes.set_xlabel("distance from the Sun  [kpc]")
    axes.set_ylabel("$\\epsilon$")
    axes.set_ylim(0.0, 1.1)
    axes.legend(title="$|z|$")
    return figure
