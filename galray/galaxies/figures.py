"""Figures of one galaxy, and of several side by side; in the house style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from galray.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from galray.galaxies.results import GalaxyResult

__all__ = ["FIGURES", "central_densities", "halo_profiles"]

_DENSITY = r"M_\odot\,\mathrm{kpc}^{-3}"
_R = r"$r$  [kpc]"
_RR = r"$R$  [kpc]"


def density(result: GalaxyResult) -> Figure:
    """ρ_DM(r) with its bands, published central densities, the truth of a mock."""
    figure, axes = style.new_figure(5.2, 3.7)
    _band(axes, result, "dark_density", label="this fit, 68 and 95 %")
    _truth(axes, result, "dark_density")
    shown = [value for value in result.published if value.quantity == "rho_150pc"]
    for place, (value, marker) in enumerate(zip(shown, "sD^vP", strict=False)):
        axes.errorbar(
            0.15 * 1.045 ** (place - 0.5 * (len(shown) - 1)),
            value.value * 1e7,
            yerr=[[value.minus * 1e7], [value.plus * 1e7]],
            fmt=marker,
            ms=4.2,
            lw=1.1,
            color=style.color("soft"),
            mfc=style.color("paper"),
            label=style.literal(value.label),
            zorder=4,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 0.05 * float(result.profiles["dark_density"][2].min())))
    _half(axes, result)
    _marks(axes)
    axes.set_xlabel(_R)
    axes.set_ylabel(rf"$\rho_\mathrm{{DM}}$  [${_DENSITY}$]")
    style.panel_title(axes, "Dark matter density")
    axes.legend(loc="lower left", fontsize=7.4)
    return figure


def mass(result: GalaxyResult) -> Figure:
    """M(<r) with its bands beside the estimators of Walker and Wolf."""
    figure, axes = style.new_figure(5.2, 3.7)
    _band(axes, result, "mass", label="this fit, 68 and 95 %")
    _truth(axes, result, "mass")
    for row, marker in zip(result.estimators, "sD", strict=False):
        sigma, error = result.dispersion[1:]
        width = 2 * row["mass"] * error / sigma
        axes.errorbar(
            row["radius_kpc"],
            row["mass"],
            yerr=width,
            fmt=marker,
            ms=5,
            lw=1.2,
            color=style.color("score"),
            mfc=style.color("paper"),
            zorder=4,
            label=style.literal(row["estimator"]),
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _half(axes, result)
    _marks(axes)
    axes.set_xlabel(_R)
    axes.set_ylabel(r"$M(<r)$  [$M_\odot$]")
    style.panel_title(axes, "Enclosed mass")
    axes.legend(loc="upper left")
    return figure


def slope(result: GalaxyResult) -> Figure:
    """γ_DM(r) with its bands, and what counts as a core and as a cusp at the central radius."""
    figure, axes = style.new_figure(5.2, 3.4)
    _band(axes, result, "dark_slope", label="this fit, 68 and 95 %")
    _truth(axes, result, "dark_slope")
    cusp = result.cusp
    low, high = cusp["core_below"], cusp["cusp_above"]
    at = cusp["radius_kpc"]
    axes.set_xscale("log")
    axes.set_ylim(-0.6, 4.2)
    axes.axhline(0.0, color=style.color("faint"), lw=0.8)
    axes.axhline(1.0, color=style.color("faint"), lw=0.8)
    right = result.r[-1] * 0.97
    for value, words in ((0.0, "core"), (1.0, "NFW cusp")):
        axes.text(
            right, value + 0.05, words, ha="right", va="bottom", fontsize=7.6, color=style.color("soft")
        )
    axes.plot(
        [at, at], [-0.6, low], color=style.color("moments"), lw=2.2, solid_capstyle="butt", label="core"
    )
    axes.plot([at, at], [high, 2.5], color=style.color("score"), lw=2.2, solid_capstyle="butt", label="cusp")
    _half(axes, result)
    _marks(axes)
    axes.set_xlabel(_R)
    axes.set_ylabel(r"$\gamma = -\mathrm{d}\ln\rho_\mathrm{DM}/\mathrm{d}\ln r$")
    style.panel_title(axes, f"Slope of the halo; judged at {1000 * at:g} pc")
    axes.legend(loc="upper left", ncols=2)
    return figure


def dispersion(result: GalaxyResult) -> Figure:
    """σ_los(R) of the stars in rings beside the model's bands."""
    figure, axes = style.new_figure(5.2, 3.4)
    _band(axes, result, "dispersion_los", label="this fit, 68 and 95 %")
    _truth(axes, result, "dispersion_los")
    data = result.rings
    axes.errorbar(
        data.radius,
        data.value,
        xerr=[data.radius - data.low, data.high - data.radius],
        yerr=data.error,
        fmt="o",
        ms=4,
        lw=1.1,
        color=style.color("ink"),
        label="stars in rings",
        zorder=4,
    )
    axes.set_xscale("log")
    top = max(float((data.value + data.error).max()), float(result.profiles["dispersion_los"][3].max()))
    axes.set_xlim(0.85 * result.r[0], 1.15 * max(result.r[-1], float(data.radius.max())))
    axes.set_ylim(0, 1.25 * top)
    _half(axes, result)
    _marks(axes)
    axes.set_xlabel(_RR)
    axes.set_ylabel(r"$\sigma_\mathrm{los}$  [$\mathrm{km\,s^{-1}}$]")
    style.panel_title(axes, "Velocity dispersion along the line of sight")
    axes.legend(loc="lower left")
    return figure


def light(result: GalaxyResult) -> Figure:
    """Σ(R) of the stars in rings beside the model's bands."""
    figure, axes = style.new_figure(5.2, 3.4)
    _band(axes, result, "surface_density", label="this fit, 68 and 95 %")
    _truth(axes, result, "surface_density")
    data = result.light
    seen = data.value > 0
    axes.errorbar(
        data.radius[seen],
        data.value[seen],
        yerr=data.error[seen],
        fmt="o",
        ms=4,
        lw=1.1,
        color=style.color("ink"),
        label="light in rings" if len(result.observation.light_x) else "stars in rings",
        zorder=4,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    bottom = 0.3 * float(data.value[seen].min())
    axes.set_ylim(bottom, 3 * float(max(data.value.max(), result.profiles["surface_density"][3].max())))
    _half(axes, result)
    _marks(axes)
    axes.set_xlabel(_RR)
    axes.set_ylabel(r"$\Sigma_\star$  [stars$\,\mathrm{kpc}^{-2}$, one in all]")
    style.panel_title(axes, "Surface density of the stars")
    axes.legend(loc="lower left")
    return figure


def anisotropy(result: GalaxyResult) -> Figure:
    """β(r) with its bands."""
    figure, axes = style.new_figure(5.2, 3.4)
    # β runs to −∞ for circular orbits: β/(2 − β) shows both ends alike
    quantiles = result.profiles["anisotropy"]
    low95, low, middle, high, high95 = quantiles / (2 - quantiles)
    tint = style.color("flow")
    axes.fill_between(result.r, low95, high95, color=tint, alpha=0.16, lw=0)
    axes.fill_between(result.r, low, high, color=tint, alpha=0.3, lw=0)
    axes.plot(result.r, middle, color=tint, label="this fit, 68 and 95 %")
    if "anisotropy" in result.truth:
        truth = result.truth["anisotropy"]
        line = {"ls": style.dashes("truth"), "lw": 1.4}
        axes.plot(result.r, truth / (2 - truth), color=style.color("ink"), label="truth", **line)
    axes.set_xscale("log")
    axes.set_ylim(-1.05, 1.05)
    axes.axhline(0, color=style.color("faint"), lw=0.8)
    ticks = np.array([-8.0, -2.0, -0.5, 0.0, 0.5, 0.8, 1.0])
    axes.set_yticks(ticks / (2 - ticks), [f"{tick:g}".replace("-", "−") for tick in ticks])
    _half(axes, result)
    _marks(axes)
    axes.set_xlabel(_R)
    axes.set_ylabel(r"$\beta$  (scale linear in $\beta/(2-\beta)$)")
    style.panel_title(axes, "Anisotropy: radial above, tangential below")
    axes.legend(loc="lower left")
    return figure


FIGURES = {
    "density": (density, "Dark matter density of the galaxy"),
    "mass": (mass, "Enclosed mass"),
    "slope": (slope, "Logarithmic slope of the halo"),
    "dispersion": (dispersion, "Velocity dispersion along the line of sight"),
    "light": (light, "Surface density of the stars"),
    "anisotropy": (anisotropy, "Velocity anisotropy"),
}
"""Every figure of a galaxy's page: how it is drawn, and its title for screen readers."""


def central_densities(results: Sequence[GalaxyResult]) -> Figure:
    """Central dark densities of several galaxies beside published ones."""
    figure, axes = style.new_figure(6.0, 0.9 + 0.62 * len(results))
    ticks = []
    seen: dict[str, Any] = {}
    for row, result in enumerate(results):
        y = -float(row)
        own = result.quantity("rho_dm_")
        low95, low, middle, high, high95 = own.quantiles
        tint = style.color("flow")
        axes.plot([low95, high95], [y, y], color=tint, lw=1.2, alpha=0.6)
        seen["this fit, 68 and 95 %"] = axes.errorbar(
            middle, y, xerr=[[middle - low], [high - middle]], fmt="o", ms=6.5, lw=2.6, color=tint, zorder=4
        )
        shown = [value for value in result.published if value.quantity == "rho_150pc"]
        for place, (value, marker) in enumerate(zip(shown, "sD^vP", strict=False)):
            seen[value.label] = axes.errorbar(
                value.value * 1e7,
                y - 0.16 * (place + 1),
                xerr=[[value.minus * 1e7], [value.plus * 1e7]],
                fmt=marker,
                ms=4,
                lw=1.1,
                color=style.color("soft"),
                mfc=style.color("paper"),
            )
        if own.truth is not None:
            seen["truth"] = axes.plot(own.truth, y, "|", ms=16, mew=1.6, color=style.color("ink"), zorder=5)[
                0
            ]
        ticks.append((y - 0.3, style.literal(result.title)))
    axes.set_xscale("log")
    # a band down to nothing (stars that outweigh all mass) must not squeeze the rest
    marks = [result.quantity("rho_dm_").value for result in results]
    marks += [v.value * 1e7 for result in results for v in result.published if v.quantity == "rho_150pc"]
    axes.set_xlim(left=max(axes.get_xlim()[0], 0.1 * min(marks)))
    axes.set_yticks([tick for tick, _ in ticks], [words for _, words in ticks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-len(results) + 0.1, 0.45)
    axes.grid(axis="x")
    axes.set_xlabel(rf"$\rho_\mathrm{{DM}}$(150 pc)  [${_DENSITY}$]")
    figure.legend(
        seen.values(),
        [style.literal(label) for label in seen],
        loc="outside lower center",
        ncols=2,
        fontsize=7.6,
    )
    return figure


def halo_profiles(results: Sequence[GalaxyResult]) -> Figure:
    """ρ_DM(r) of several galaxies in one frame."""
    figure, axes = style.new_figure(6.0, 3.9)
    roles = ("flow", "score", "moments", "vertical", "combined", "other", "other2")
    for place, result in enumerate(results):
        tint = style.color(roles[place % len(roles)])
        _, low, middle, high, _ = result.profiles["dark_density"]
        axes.fill_between(result.r, low, high, color=tint, alpha=0.16, lw=0)
        axes.plot(result.r, middle, color=tint, label=style.literal(result.title))
    axes.set_xscale("log")
    axes.set_yscale("log")
    middles = [result.profiles["dark_density"][2].min() for result in results]
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 0.2 * float(min(middles))))
    _marks(axes)
    axes.set_xlabel(_R)
    axes.set_ylabel(rf"$\rho_\mathrm{{DM}}$  [${_DENSITY}$]")
    axes.legend(loc="lower left")
    return figure


def _band(axes: Axes, result: GalaxyResult, name: str, label: str) -> None:
    low95, low, middle, high, high95 = result.profiles[name]
    tint = style.color("flow")
    axes.fill_between(result.r, low95, high95, color=tint, alpha=0.16, lw=0)
    axes.fill_between(result.r, low, high, color=tint, alpha=0.3, lw=0)
    axes.plot(result.r, middle, color=tint, label=label)


def _truth(axes: Axes, result: GalaxyResult, name: str) -> None:
    if name in result.truth:
        line: dict[str, Any] = {"ls": style.dashes("truth"), "lw": 1.4}
        axes.plot(result.r, result.truth[name], color=style.color("ink"), label="truth", zorder=5, **line)


def _half(axes: Axes, result: GalaxyResult) -> None:
    """Mark the half-light radius and the outermost star: outside is the prior's."""
    half = result.quantity("half_light_radius").value
    for radius, words in ((half, r"$R_\mathrm{half}$"), (result.observation.outermost, "last star")):
        if result.r[0] < radius < result.r[-1]:
            axes.axvline(radius, color=style.color("faint"), lw=0.8, ls=(0, (1, 2)))
            axes.annotate(
                words,
                (radius, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-2, -3),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="top",
                fontsize=7.2,
                color=style.color("soft"),
            )


def _marks(axes: Axes) -> None:
    """Plain numbers along a logarithmic axis of radii."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    marks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0]
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="both")
