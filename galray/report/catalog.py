"""Figures of a store: the sky, magnitudes, distances, velocities, colours, and the fate of every row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from galray.report import style
from galray.report.figures import row_account
from galray.report.text import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from galray.catalog.summary import Distribution, StoreSummary

__all__ = ["colour_magnitude", "distances", "magnitudes", "sky_map", "velocities", "write_figures"]


def write_figures(summary: StoreSummary, folder: Path | str) -> list[Path]:
    """Draw all figures that the summary has numbers for, each as SVG and PNG.

    Arguments:
        summary: Of a store.
        folder: Where the files go; it is created.

    Returns:
        The SVG files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style.theme():
        figures = {
            "sky": sky_map(summary),
            "magnitudes": magnitudes(summary),
            "distances": distances(summary),
            "velocities": velocities(summary),
            "colour_magnitude": colour_magnitude(summary),
            "rows": row_account({"rows_in": summary.account.get("rows_in"), "fate": summary.account}),
        }
        for name, figure in figures.items():
            if figure is None:
                continue
            path = folder / f"{name}.svg"
            path.write_text(style.standalone_svg(figure), encoding="utf-8")
            figure.savefig(folder / f"{name}.png", dpi=150)
            written.append(path)
    return written


def sky_map(summary: StoreSummary) -> Figure | None:
    """Stars per square degree in Galactic coordinates: Mollweide, the centre in the middle, l to the left."""
    if summary.sky_counts.sum() == 0:
        return None
    import hpgeom
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Ellipse

    figure, axes = style.new_figure(6.6, 3.7)
    width, height = 1600, 800
    root2 = np.sqrt(2.0)
    x, y = np.meshgrid(
        (np.arange(width) + 0.5) / width * 4 * root2 - 2 * root2,
        (np.arange(height) + 0.5) / height * 2 * root2 - root2,
    )
    inside = (x / (2 * root2)) ** 2 + (y / root2) ** 2 < 1
    theta = np.arcsin(y[inside] / root2)
    latitude = np.degrees(np.arcsin(np.clip((2 * theta + np.sin(2 * theta)) / np.pi, -1, 1)))
    longitude = -np.degrees(np.pi * x[inside] / (2 * root2 * np.cos(theta)))
    pixels = hpgeom.angle_to_pixel(2**summary.sky_level, longitude % 360.0, latitude, nest=True)
    area = 41252.961 / (12 * 4**summary.sky_level)
    image = np.full(x.shape, np.nan)
    image[inside] = summary.sky_counts[pixels] / area
    image[image == 0] = np.nan
    shown = image[np.isfinite(image)]
    low, high = np.percentile(shown, [0.5, 99.8])
    scale: Any = LogNorm if high > 8 * low else Normalize
    extent = (-2 * root2, 2 * root2, -root2, root2)
    mesh = axes.imshow(
        image,
        extent=extent,
        origin="lower",
        cmap=style.count_colormap(),
        norm=scale(low, max(high, low * 1.001)),
        interpolation="nearest",
        rasterized=True,
    )
    outline = Ellipse((0, 0), 4 * root2, 2 * root2, fill=False, lw=0.9, color=style.color("faint"))
    axes.add_patch(outline)
    mesh.set_clip_path(outline)
    _graticule(axes)
    axes.set_xlim(-2.86, 2.86)
    axes.set_ylim(-1.46, 1.46)
    axes.set_aspect("equal")
    axes.set_axis_off()
    style.colorbar(
        figure, mesh, r"stars per deg$^2$", ax=axes, orientation="horizontal", shrink=0.6, aspect=34, pad=0.04
    )
    style.panel_title(axes, f"{count(summary.num_stars)} stars, Galactic coordinates")
    return figure


def _graticule(axes: Any) -> None:
    """Meridians and parallels every 60 and 30 degrees, some with their degrees."""
    root2 = np.sqrt(2.0)

    def project(longitude: np.ndarray, latitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        phi = np.radians(latitude)
        theta = phi.copy()
        for _ in range(60):  # Newton's iteration for 2θ + sin 2θ = π sin φ, damped at the poles
            slope = np.maximum(2 + 2 * np.cos(2 * theta), 1e-9)
            theta = theta - np.clip((2 * theta + np.sin(2 * theta) - np.pi * np.sin(phi)) / slope, -0.3, 0.3)
        theta = np.clip(theta, -np.pi / 2, np.pi / 2)
        return -2 * root2 / np.pi * np.radians(longitude) * np.cos(theta), root2 * np.sin(theta)

    lines: dict[str, Any] = {"color": style.color("faint"), "lw": 0.5, "alpha": 0.55}
    for longitude in range(-120, 121, 60):
        axes.plot(*project(np.full(90, float(longitude)), np.linspace(-89.5, 89.5, 90)), **lines)
    for latitude in range(-60, 61, 30):
        axes.plot(*project(np.linspace(-180, 180, 90), np.full(90, float(latitude))), **lines)
        side = project(np.array([-180.0]), np.array([float(latitude)]))
        if latitude:
            axes.annotate(
                rf"${latitude:+d}\degree$",
                (float(side[0][0]), float(side[1][0])),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=7.2,
                va="center",
                color=style.color("soft"),
            )
    for longitude in (120, 60, 0, -60, -120):
        px, py = project(np.array([float(longitude)]), np.array([0.0]))
        axes.annotate(
            rf"${longitude % 360}\degree$",
            (float(px[0]), float(py[0])),
            xytext=(2, -2),
            textcoords="offset points",
            fontsize=7.2,
            va="top",
            color=style.color("paper"),
            bbox={"boxstyle": "round,pad=0.15", "fc": style.color("ink"), "ec": "none", "alpha": 0.45},
        )


def magnitudes(summary: StoreSummary) -> Figure | None:
    """The histogram of G; the stars without radial velocity beside those with it."""
    parts = [("with 6D", "flow", summary.distributions.get("phot_g_mean_mag"))]
    if summary.no_rv is not None:
        parts.append(("without radial velocity", "score", summary.no_rv.distributions.get("phot_g_mean_mag")))
    drawn = [(label, role, d) for label, role, d in parts if d is not None and d.counts.sum()]
    if not drawn:
        return None
    figure, axes = style.new_figure(5.2, 3.1)
    for label, role, distribution in drawn:
        _steps(axes, distribution, role, label if len(drawn) > 1 else None)
    tops = [int(d.counts.max()) for _, _, d in drawn]
    if max(tops) > 200:
        axes.set_yscale("log")
        axes.set_ylim(0.7, max(tops) * 2)
    axes.set_xlabel(r"$G$  [mag]")
    axes.set_ylabel(f"stars per {np.diff(drawn[0][2].edges)[0]:.2g} mag")
    axes.grid(axis="y")
    if len(drawn) > 1:
        axes.legend(loc="upper left")
    style.panel_title(axes, "Magnitudes")
    return figure


def distances(summary: StoreSummary) -> Figure | None:
    """Distance from the Sun, Galactocentric radius and height."""
    labels = {"distance": "distance from the Sun", "R": r"$R$", "z": r"$z$"}
    return _panels(summary, labels, "kpc", "moments", "Distances")


def velocities(summary: StoreSummary) -> Figure | None:
    """The three cylindrical velocities."""
    labels = {"v_R": r"$v_R$", "v_phi": r"$v_\phi$", "v_z": r"$v_z$"}
    return _panels(summary, labels, "km/s", "flow", "Velocities")


def _panels(summary: StoreSummary, labels: dict[str, str], unit: str, role: str, title: str) -> Figure | None:
    chosen = [(label, summary.distributions[n]) for n, label in labels.items() if n in summary.distributions]
    if not chosen:
        return None
    figure, panels = style.new_figure(2.55 * len(chosen), 2.6, columns=len(chosen), squeeze=False)
    for panel, (label, distribution) in zip(panels[0], chosen, strict=True):
        _steps(panel, distribution, role)
        middle = distribution.quantiles[2]
        panel.axvline(middle, color=style.color("ink"), lw=1.0, ls=style.dashes("truth"))
        panel.set_xlabel(f"{label}  [{unit}]")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y")
        panel.locator_params(axis="x", nbins=5)
        panel.locator_params(axis="y", nbins=5)
        # The dashed line is the median; its number stands on the side where the histogram is lower.
        left = middle - distribution.edges[0] > distribution.edges[-1] - middle
        panel.text(
            0.03 if left else 0.97,
            0.95,
            f"median\n{middle:.3g}".replace("-", "\N{MINUS SIGN}"),
            transform=panel.transAxes,
            ha="left" if left else "right",
            va="top",
            fontsize=7.8,
            color=style.color("soft"),
        )
    panels[0][0].set_ylabel("stars per bin")
    style.panel_title(panels[0][0], title)
    return figure


def colour_magnitude(summary: StoreSummary) -> Figure | None:
    """Absolute magnitude against colour, by number of stars."""
    if summary.diagram is None or summary.diagram_edges is None or summary.diagram.sum() == 0:
        return None
    from matplotlib.colors import LogNorm

    colour, absolute = summary.diagram_edges
    figure, axes = style.new_figure(4.4, 4.6)
    shown = np.ma.masked_equal(summary.diagram.T, 0)
    mesh = axes.pcolormesh(
        colour,
        absolute,
        shown,
        cmap=style.count_colormap(),
        norm=LogNorm(1, max(2, int(summary.diagram.max()))),
        rasterized=True,
    )
    axes.invert_yaxis()
    axes.set_xlabel(r"$G_\mathrm{BP} - G_\mathrm{RP}$  [mag]")
    axes.set_ylabel(r"$M_G$  [mag], no extinction subtracted")
    style.colorbar(figure, mesh, "stars per cell", ax=axes, aspect=32, pad=0.02)
    style.panel_title(axes, "Colour and absolute magnitude")
    return figure


def _steps(axes: Any, distribution: Distribution, role: str, label: str | None = None) -> None:
    tint = style.color(role)
    axes.stairs(distribution.counts, distribution.edges, color=tint, lw=1.4, label=label)
    axes.stairs(distribution.counts, distribution.edges, color=tint, fill=True, alpha=0.18)
