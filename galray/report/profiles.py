"""Profiles of acceleration and density with bands per inversion, and maps of the fields."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from galray.report import style
from galray.report.text import (
    humanise,
    method_label,
    method_order,
    quantity_math,
    quantity_words,
    unit_key,
    unit_math,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PROFILE_WORDS", "field_map", "profile", "profile_keys"]

PROFILE_WORDS = {
    "vertical": "with height at the Sun's radius",
    "radial": "with radius in the plane",
    "vertical_dm": "with height near the Sun's radius",
    "radial_dm": "with radius, above the plane",
}
"""What each known profile runs along, for titles and captions."""

_LEAST_PER_KPC3 = 1e3
"""Densities whose largest value is below this cannot be in Msun/kpc³ (that would be 1e-6 Msun/pc³)."""
_ACCELERATIONS = ("a_R", "a_phi", "a_z", "a_x", "a_y")
_ORDER = (*_ACCELERATIONS, "K_z", "rho", "rho_dm", "rho_baryons")


def profile_keys(frame: Any) -> list[tuple[str, str]]:
    """The (profile, quantity) pairs to draw, in reading order; baryons are drawn into ρ where it is there."""
    pairs = set(frame.select("profile", "quantity").unique().iter_rows())
    known = list(PROFILE_WORDS)

    def rank(pair: tuple[str, str]) -> tuple[int, int, str, str]:
        name, quantity = pair
        first = known.index(name) if name in known else len(known)
        second = _ORDER.index(quantity) if quantity in _ORDER else len(_ORDER)
        return (first, second, str(name), str(quantity))

    kept = (p for p in pairs if p[1] != "rho_baryons" or (p[0], "rho") not in pairs)
    return sorted(kept, key=rank)


def _scale(quantity: str, frame: Any) -> tuple[float, str]:
    """Factor and mathtext unit for the rows of one quantity in ``profiles`` or ``maps``.

    A column ``unit`` decides where there is one. Without it densities are Msun/kpc³, unless they are so
    small that they can only be Msun/pc³: no star or gas lies nine orders of magnitude away.
    """
    if quantity in _ACCELERATIONS:
        return 1e-3, r"10^3\,\mathrm{km^2\,s^{-2}\,kpc^{-1}}"
    if quantity == "K_z":  # profiles hold |K_z| / 2πG, the surface density that would pull as much
        return 1.0, unit_math("Msun/pc2")
    if quantity == "residual":
        return 1.0, r"\mathrm{Gyr}^{-1}"
    if not quantity.startswith("rho"):
        return 1.0, ""
    if "unit" in frame.columns and frame.height:
        per_pc3 = unit_key(frame["unit"][0]) == "msun/pc3"
    else:
        values = np.abs(frame["value"].drop_nulls().to_numpy().astype(float))
        values = values[np.isfinite(values)]
        per_pc3 = bool(values.size) and float(values.max()) < _LEAST_PER_KPC3
    return (1.0 if per_pc3 else 1e-9), unit_math("Msun/pc3")


def _label(quantity: str, unit: str) -> str:
    symbol = r"|K_z|/2\pi G" if quantity == "K_z" else quantity_math(quantity)
    return rf"${symbol}$  [${unit}$]" if unit else rf"${symbol}$"


def _series(frame: Any, method: str, factor: float) -> tuple[np.ndarray, ...]:
    """Sorted (coordinate, value, error, truth) of one method; a missing truth is NaN."""
    part = frame.filter(frame["method"] == method).sort("coordinate")
    columns = []
    for name in ("coordinate", "value", "error", "truth"):
        if name in part.columns:
            values = part[name].cast(float, strict=False).fill_null(float("nan")).to_numpy()
        else:
            values = np.full(part.height, np.nan)
        columns.append(values * (1.0 if name == "coordinate" else factor))
    return tuple(columns)


def _limits(values: list[np.ndarray], errors: list[np.ndarray]) -> tuple[float, float] | None:
    """A y range set by the curves; wild bands at the edge of the valid region do not stretch it."""
    joined = np.concatenate(values) if values else np.array([])
    joined = joined[np.isfinite(joined)]
    if not joined.size:
        return None
    spread = np.concatenate(errors) if errors else np.array([0.0])
    spread = spread[np.isfinite(spread)]
    typical = float(np.median(spread)) if spread.size else 0.0
    low, high = np.percentile(joined, [1, 99])
    margin = 0.06 * (high - low) + 2.0 * typical or 0.1 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


def profile(frame: Any, name: str, quantity: str) -> Figure | None:
    """One quantity along one line: a curve and a ±1σ band per inversion, the truth dashed.

    With a truth a second panel shows value − truth, where errors of a per cent can be seen.

    Arguments:
        frame: ``profiles.parquet`` as a Polars frame.
        name: The profile.
        quantity: The quantity.
    """
    line = frame.filter((frame["profile"] == name) & (frame["quantity"] == quantity))
    factor, unit = _scale(quantity, line)
    series = {m: _series(line, m, factor) for m in method_order(line["method"].to_list())}
    explicit = series.pop("truth", None)
    series = {m: s for m, s in series.items() if np.isfinite(s[1]).any()}
    if not series:
        return None
    truth = _truth(series, explicit)
    rows = 2 if truth is not None else 1
    figure, panels = style.new_figure(
        5.2, 4.3 if rows == 2 else 3.3, rows, 1, sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": [2.3, 1][:rows]},
    )  # fmt: skip
    axes = panels[0, 0]
    for method, (x, value, error, _) in series.items():
        _curve(axes, method, x, value, error)
    if truth is not None:
        axes.plot(*truth, color=style.color("ink"), ls=style.dashes("truth"), lw=1.5, label="truth", zorder=5)
    if quantity == "rho":
        _baryons(axes, frame, name, factor)
    values = [s[1] for s in series.values()] + ([truth[1]] if truth is not None else [])
    limits = _limits(values, [s[2] for s in series.values()])
    joined = np.concatenate(values)
    joined = joined[np.isfinite(joined)]
    if quantity == "rho" and (joined > 0).all() and joined.max() > 8 * joined.min():
        axes.set_yscale("log")
        axes.set_ylim(joined.min() / 1.6, joined.max() * 1.5)
    elif limits:
        axes.set_ylim(*limits)
        if limits[0] < 0 < limits[1]:
            axes.axhline(0, color=style.color("faint"), lw=0.8, zorder=1)
    axes.set_ylabel(_label(quantity, unit))
    axes.grid()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=6, columnspacing=1.1, handlelength=2.0, fontsize=7.8
    )
    words = PROFILE_WORDS.get(name, f"along {humanise(name)}")
    title = f"{quantity_words(quantity).capitalize()} {words}"
    style.panel_title(axes, style.literal(textwrap.fill(title, 54)))
    if truth is not None:
        _differences(panels[1, 0], series, truth, rf"$\Delta {quantity_math(quantity)}$")
    panels[-1, 0].set_xlabel(r"$R$  [kpc]" if name.startswith("radial") else r"$z$  [kpc]")
    return figure


def _truth(series: dict[str, tuple], explicit: tuple | None) -> tuple[np.ndarray, np.ndarray] | None:
    """The true curve: a method called truth, or the truth column of the method with most of it."""
    if explicit is not None and np.isfinite(explicit[1]).any():
        return explicit[0], explicit[1]
    best = max(series.values(), key=lambda s: int(np.isfinite(s[3]).sum()))
    good = np.isfinite(best[3])
    return (best[0][good], best[3][good]) if good.any() else None


def _curve(axes: Any, method: str, x: np.ndarray, value: np.ndarray, error: np.ndarray) -> None:
    tint = style.color(method)
    front = 3.0 if method == "combined" else 2.0
    if np.isfinite(error).any():
        axes.fill_between(x, value - error, value + error, color=tint, alpha=0.17, lw=0, zorder=front - 1)
    points = {"marker": style.marker(method), "ms": 3.6} if len(x) <= 12 else {}
    axes.plot(
        x,
        value,
        color=tint,
        ls=style.dashes(method),
        lw=2.1 if method == "combined" else 1.6,
        label=style.literal(method_label(method)),
        zorder=front,
        **points,
    )


def _baryons(axes: Any, frame: Any, name: str, factor: float) -> None:
    part = frame.filter((frame["profile"] == name) & (frame["quantity"] == "rho_baryons"))
    if not part.height:
        return
    x, value, _, _ = _series(part, part["method"][0], factor)
    axes.plot(x, value, color=style.color("faint"), lw=1.3, ls=":", label="stars and gas", zorder=1)


def _differences(axes: Any, series: dict[str, tuple], truth: tuple, label: str) -> None:
    shown, errors = [], []
    for method, (x, value, error, own) in series.items():
        true = np.where(np.isfinite(own), own, np.interp(x, truth[0], truth[1], left=np.nan, right=np.nan))
        difference = value - true
        tint = style.color(method)
        if np.isfinite(error).any():
            axes.fill_between(x, difference - error, difference + error, color=tint, alpha=0.15, lw=0)
        axes.plot(x, difference, color=tint, ls=style.dashes(method), lw=1.4)
        shown.append(difference)
        errors.append(error)
    axes.axhline(0, color=style.color("ink"), ls=style.dashes("truth"), lw=1.2)
    limits = _limits(shown, errors)
    if limits:
        reach = max(abs(limits[0]), abs(limits[1]))
        axes.set_ylim(-reach, reach)
    axes.set_ylabel(label)
    axes.locator_params(axis="y", nbins=4)
    axes.grid()


def field_map(frame: Any, name: str, quantity: str) -> Figure | None:
    """One quantity on a plane for every inversion, all on one colour scale.

    Arguments:
        frame: ``maps.parquet`` as a Polars frame.
        name: The map, such as ``x-z``.
        quantity: The quantity.
    """
    from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm

    part = frame.filter((frame["map"] == name) & (frame["quantity"] == quantity))
    factor, unit = _scale(quantity, part)
    grids = {}
    for method in method_order(part["method"].to_list()):
        grid = _grid(part.filter(part["method"] == method), factor)
        if grid is not None:
            grids[method] = grid
    if not grids:
        return None
    values: np.ndarray = np.concatenate([g[2][np.isfinite(g[2])] for g in grids.values()])
    low, high = np.percentile(values, [2, 98])
    norm: Any
    # A few cells of the wrong sign at the edge do not make a quantity one of both signs.
    if min((values < 0).mean(), (values > 0).mean()) > 0.15:
        reach = max(-low, high)
        norm, colormap = TwoSlopeNorm(0.0, -reach, reach), "RdBu_r"
    elif low > 0 and high > 10 * low:
        norm, colormap = LogNorm(low, high), "cividis"
    else:
        norm, colormap = Normalize(low, high if high > low else low + 1), "cividis"
    columns = min(len(grids), 2)
    rows = -(-len(grids) // columns)
    u, v, _ = next(iter(grids.values()))
    panel = 4.7 / columns * (np.ptp(v) / np.ptp(u) if np.ptp(u) > 0 else 1.0)
    height = 0.95 + rows * (min(max(panel, 1.1), 3.4) + 0.35)
    figure, panels = style.new_figure(5.2, height, rows, columns, sharex=True, sharey=True, squeeze=False)
    mesh = None
    for axes, (method, (u, v, cells)) in zip(panels.flat, grids.items(), strict=False):
        mesh = axes.pcolormesh(u, v, cells, norm=norm, cmap=colormap, shading="nearest", rasterized=True)
        axes.set_aspect("equal")
        axes.set_title(style.literal(method_label(method)), color=style.color(method))
    for axes in list(panels.flat)[len(grids) :]:
        axes.set_visible(False)
    across, _, up = name.partition("-")
    for axes in panels[-1]:
        axes.set_xlabel(f"${across}$  [kpc]" if across.isalpha() else "[kpc]")
    for axes in panels[:, 0]:
        axes.set_ylabel(f"${up}$  [kpc]" if up.isalpha() else "[kpc]")
    below = {"location": "bottom", "aspect": 42, "pad": 0.02, "extend": "both"}
    style.colorbar(figure, mesh, _label(quantity, unit), ax=panels.ravel().tolist(), **below)
    return figure


def _grid(part: Any, factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Unordered (u, v, value) rows as a grid, NaN where there is none; None if it is only a line."""
    rows = part.select("u", "v", "value").drop_nulls().to_numpy().astype(float)
    if not np.isfinite(rows[:, 2:]).any():
        return None
    u, across = np.unique(rows[:, 0].round(9), return_inverse=True)
    v, up = np.unique(rows[:, 1].round(9), return_inverse=True)
    if len(u) < 2 or len(v) < 2:
        return None
    grid = np.full((len(v), len(u)), np.nan)
    grid[up, across] = rows[:, 2] * factor
    return u, v, grid
