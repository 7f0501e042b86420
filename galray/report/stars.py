"""Pictures of the stars that went in: the sky, the Galaxy from the side and from above, velocities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from galray.frame import GalacticFrame
from galray.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["phase_plane", "sky", "star_map", "velocities"]


def _columns(frame: Any, *names: str) -> list[np.ndarray] | None:
    """Rows of these columns that are finite in all of them; None when a column is absent or all is empty."""
    if frame is None or any(name not in frame.columns for name in names):
        return None
    rows = frame.select(names).drop_nulls().to_numpy().astype(float)
    rows = rows[np.isfinite(rows).all(axis=1)]
    return list(rows.T) if len(rows) else None


def _colorbar(figure: Figure, mesh: Any, axes: Any, label: str, **options: Any) -> None:
    """A colour bar as high as its axes, or placed by the options."""
    if not options:
        options = {"cax": axes.inset_axes((1.025, 0.0, 0.03, 1.0))}
    else:
        options = {"ax": axes, **options}
    style.colorbar(figure, mesh, label, **options)


def sky(frame: Any) -> Figure | None:
    """Counts per equal-area HEALPix pixel in Galactic coordinates, Mollweide, the centre in the middle."""
    import hpgeom
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    data = _columns(frame, "l", "b")
    if data is None:
        return None
    longitude, latitude = data
    # About ten stars per pixel or more, so that the picture is not shot noise.
    nside = 4
    while nside < 64 and len(longitude) / (12 * (2 * nside) ** 2) > 10:
        nside *= 2
    pixels = hpgeom.angle_to_pixel(nside, longitude % 360.0, latitude, nest=False, degrees=True)
    counts = np.bincount(pixels, minlength=hpgeom.nside_to_npixel(nside)).astype(float)
    counts[counts == 0] = np.nan
    angles = np.linspace(-180, 180, 481)
    heights = np.linspace(-90, 90, 241)
    middle_x, middle_y = 0.5 * (angles[1:] + angles[:-1]), 0.5 * (heights[1:] + heights[:-1])
    at, up = np.meshgrid(middle_x, middle_y)
    # Longitude grows to the left on the sky.
    image = counts[hpgeom.angle_to_pixel(nside, (-at) % 360.0, up, nest=False, degrees=True)]
    image /= hpgeom.nside_to_pixel_area(nside, degrees=True)
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot(projection="mollweide")
    top = float(np.nanmax(image))
    norm = LogNorm(float(np.nanmin(image)), top) if top > 3 * np.nanmin(image) else None
    mesh = axes.pcolormesh(
        np.radians(angles),
        np.radians(heights),
        image,
        norm=norm,
        cmap=style.count_colormap(),
        rasterized=True,
    )
    axes.set_xticks(np.radians([-120, -60, 0, 60, 120]), ["120°", "60°", "0°", "300°", "240°"])
    axes.set_yticks(np.radians([-60, -30, 0, 30, 60]), ["−60°", "−30°", "0°", "30°", "60°"])
    axes.set_axisbelow(False)  # the grid and the longitudes stand on the picture
    axes.tick_params(axis="x", labelcolor=style.color("ink"), labelsize=7.6)
    for label in axes.get_xticklabels():
        label.set_bbox({"facecolor": style.color("paper"), "alpha": 0.62, "lw": 0, "pad": 1.0})
    axes.grid(color=style.color("faint"), lw=0.4, alpha=0.5)
    axes.spines["geo"].set_edgecolor(style.color("faint"))
    _colorbar(
        figure,
        mesh,
        axes,
        "sampled stars per square degree",
        location="bottom",
        aspect=40,
        shrink=0.8,
        pad=0.03,
    )
    style.panel_title(axes, "Sky in Galactic coordinates")
    return figure


def star_map(frame: Any, across: str, up: str) -> Figure | None:
    """Sampled stars on a Galactocentric plane, counts per cell on a logarithmic scale.

    Arguments:
        frame: ``stars.parquet``.
        across: Column along the abscissa, in kpc.
        up: Column along the ordinate, in kpc.
    """
    from matplotlib.colors import LogNorm

    data = _columns(frame, across, up)
    if data is None:
        return None
    x, y = data
    # The sampled volume decides the frame, not its single farthest star.
    ranges = [_range(x), _range(y)]
    spans = [r[1] - r[0] for r in ranges]
    cell = max(spans) / 90
    bins = [max(round(s / cell), 8) for s in spans]
    counts, edges_x, edges_y = np.histogram2d(x, y, bins=bins, range=ranges)
    counts[counts == 0] = np.nan
    height = 1.25 + min(max(3.7 * spans[1] / spans[0], 1.3), 3.9)
    figure, axes = style.new_figure(5.2, height)
    top = float(np.nanmax(counts)) if np.isfinite(counts).any() else 1.0
    mesh = axes.pcolormesh(
        edges_x,
        edges_y,
        counts.T,
        norm=LogNorm(1, max(top, 2)),
        cmap=style.count_colormap(),
        rasterized=True,
    )
    axes.set_aspect("equal")
    sun = dict(zip("xyz", GalacticFrame().sun_position, strict=True))
    if across in sun and up in sun:
        axes.plot(
            sun[across],
            sun[up],
            "o",
            ms=6,
            mfc="none",
            mec=style.color("fail"),
            mew=1.5,
            label="Sun",
            zorder=4,
        )
        axes.plot(sun[across], sun[up], ".", ms=2.5, color=style.color("fail"), zorder=4)
    axes.set_xlabel(f"${across}$  [kpc]")
    axes.set_ylabel(f"${up}$  [kpc]")
    _colorbar(figure, mesh, axes, "sampled stars per cell")
    seen = "from the side" if up == "z" else "from above"
    style.panel_title(axes, f"The stars {seen}")
    return figure


def _range(values: np.ndarray, tail: float = 0.05) -> tuple[float, float]:
    """The central range of a sample with a small margin, so that single outliers do not shrink a plot."""
    low, high = np.percentile(values, [tail, 100 - tail])
    margin = 0.03 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def velocities(frame: Any) -> Figure | None:
    """Histograms of the cylindrical velocities with median and robust width."""
    names = {"vR": r"v_R", "vphi": r"v_\varphi", "vz": r"v_z"}
    data = {name: _columns(frame, name) for name in names}
    shown = {name: values[0] for name, values in data.items() if values is not None}
    if not shown:
        return None
    figure, panels = style.new_figure(5.2, 0.6 + 1.35 * len(shown), len(shown), 1, squeeze=False)
    for axes, (name, values) in zip(panels[:, 0], shown.items(), strict=True):
        low, high = _range(values, 0.3)
        bins = np.linspace(low, high, min(90, max(20, len(values) // 150)))
        axes.hist(values, bins=bins, color=style.color("flow"), alpha=0.28, lw=0)
        axes.hist(values, bins=bins, color=style.color("flow"), histtype="step", lw=1.3)
        middle = float(np.median(values))
        width = 0.7413 * float(np.subtract(*np.percentile(values, [75, 25])))
        axes.axvline(middle, color=style.color("ink"), lw=1.0, ls=style.dashes("truth"))
        left = middle > 0.5 * (low + high)  # the words stand on the side of the longer tail
        axes.text(
            0.01 if left else 0.99,
            0.93,
            f"median {middle:.1f} km/s\nrobust σ {width:.1f} km/s".replace("-", "−"),
            transform=axes.transAxes,
            ha="left" if left else "right",
            va="top",
            fontsize=8,
            color=style.color("soft"),
        )
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(rf"${names[name]}$  [$\mathrm{{km\,s^{{-1}}}}$]", labelpad=1)
    style.panel_title(panels[0, 0], "Velocities of the sampled stars")
    return figure


_AXES = {
    "vR": r"$v_R$  [$\mathrm{km\,s^{-1}}$]",
    "vphi": r"$v_\varphi$  [$\mathrm{km\,s^{-1}}$]",
    "vz": r"$v_z$  [$\mathrm{km\,s^{-1}}$]",
    "z": r"$z$  [kpc]",
}


def phase_plane(frame: Any, across: str, up: str, title: str) -> Figure | None:
    """The sampled stars on two phase-space coordinates.

    In (v_R, v_φ) moving groups show, in (z, v_z) the spiral of a disc that was disturbed.

    Arguments:
        frame: ``stars.parquet``.
        across: Column along the abscissa.
        up: Column along the ordinate.
        title: Panel title.
    """
    from matplotlib.colors import LogNorm

    data = _columns(frame, across, up)
    if data is None:
        return None
    ranges = [_range(values, 0.4) for values in data]
    counts, edges_x, edges_y = np.histogram2d(data[0], data[1], bins=72, range=ranges)
    counts[counts == 0] = np.nan
    top = float(np.nanmax(counts)) if np.isfinite(counts).any() else 1.0
    figure, axes = style.new_figure(5.2, 4.1)
    mesh = axes.pcolormesh(
        edges_x,
        edges_y,
        counts.T,
        norm=LogNorm(1, max(top, 2)),
        cmap=style.count_colormap(),
        rasterized=True,
    )
    axes.set_xlabel(_AXES[across])
    axes.set_ylabel(_AXES[up])
    _colorbar(figure, mesh, axes, "sampled stars per cell")
    style.panel_title(axes, title)
    return figure
