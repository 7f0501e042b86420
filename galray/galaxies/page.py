"""One self-contained page per galaxy, and one that puts several beside each other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galray.galaxies import figures
from galray.provenance import write_atomic
from galray.report import style
from galray.report.page import keep_figure, render
from galray.report.text import duration

if TYPE_CHECKING:
    from markupsafe import Markup

    from galray.dwarf.products import Quantity
    from galray.galaxies.results import GalaxyResult
    from galray.galaxies.run import Fleet

__all__ = ["build_comparison", "build_page"]

_UNITS = {
    "solMass / kpc3": "M☉/kpc³",
    "solMass": "M☉",
    "kpc": "kpc",
    "dex(GeV2 / cm5)": "dex (GeV² cm⁻⁵)",
    "dex(GeV / cm2)": "dex (GeV cm⁻²)",
    "": "",
}
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def build_page(result: GalaxyResult, folder: Path, about: dict[str, Any]) -> Path:
    """Draw a galaxy's figures into ``figures/`` and write its page ``report.html``.

    Arguments:
        result: The galaxy's products.
        folder: Its run directory.
        about: Provenance.

    Returns:
        The page's path.
    """
    with style.theme():
        drawn = {
            name: keep_figure(folder / "figures", name, title, draw(result))
            for name, (draw, title) in figures.FIGURES.items()
        }
    config = (folder / "config.toml").read_text("utf-8") if (folder / "config.toml").is_file() else ""
    context = {
        "result": result,
        "summary": result.summary,
        "figures": drawn,
        "rows": [_row(quantity) for quantity in result.quantities],
        "estimators": [
            row | {"text": text(row["mass"]), "own": spread(row["posterior"])} for row in result.estimators
        ],
        "published": _published(result),
        "fits": [_fit(member) for member in result.members],
        "about": about,
        "config": config,
        "took": duration(result.cpu_seconds),
        "has_truth": any(q.truth is not None for q in result.quantities),
    }
    target = folder / "report.html"
    write_atomic(target, render("galray.galaxies", "galaxy.html.j2", context))
    return target


def build_comparison(fleet: Fleet, about: dict[str, Any]) -> Path:
    """Write the page that compares the galaxies of a run, linked to theirs.

    Arguments:
        fleet: The galaxies.
        about: Provenance.

    Returns:
        The page's path.
    """
    results = fleet.results
    drawn: dict[str, Markup] = {}
    if results:
        with style.theme():
            for name, title, draw in (
                ("central-densities", "Central dark densities", figures.central_densities),
                ("halo-profiles", "Dark matter density of every galaxy", figures.halo_profiles),
            ):
                drawn[name] = keep_figure(fleet.folder / "figures", name, title, draw(results))
    rows = []
    for outcome in fleet.outcomes:
        result = outcome.result
        if result is None:
            rows.append({"name": outcome.name, "error": outcome.error})
            continue
        j = next((q for q in result.quantities if q.name == "log10_j_0.5deg"), None)
        rows.append(
            {
                "name": result.title,
                "link": f"{outcome.folder.name}/report.html" if outcome.folder else "",
                "stars": f"{result.observation.num_members:.0f}",
                "sigma": f"{result.dispersion[1]:.1f} ± {result.dispersion[2]:.1f}",
                "rho": spread(result.quantity("rho_dm_").quantiles),
                "mass": spread(result.quantity("mass_half").quantiles),
                "slope": spread(result.quantity("gamma_dm_").quantiles),
                "verdict": result.cusp["verdict"],
                "j": spread(j.quantiles) if j is not None else "–",
            }
        )
    context = {
        "fleet": fleet,
        "rows": rows,
        "figures": drawn,
        "published": [(result.title, _published(result)) for result in results if result.published],
        "sentences": [result.summary["sentence"] for result in results],
        "about": about,
        "took": duration(fleet.seconds),
        "failed": fleet.failed,
    }
    target = fleet.folder / "report.html"
    write_atomic(target, render("galray.galaxies", "comparison.html.j2", context))
    return target


def text(value: float | None) -> str:
    """A number with three figures; large and small ones with their power of ten."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.3g}".replace("-", "−")
    power = math.floor(math.log10(abs(value)))
    return f"{value / 10.0**power:.2f}".replace("-", "−") + f" × 10{str(power).translate(_RAISED)}"


def spread(quantiles: Any) -> str:
    """Median with its 68 % errors in one power of ten."""
    _, low, middle, high, _ = (float(value) for value in quantiles)
    power = math.floor(math.log10(abs(middle))) if middle else 0
    if -2 <= power < 4:
        digits = 2 if abs(middle) < 100 else 0
        smaller = min(high - middle, middle - low)
        if 0 < smaller < 0.5 * 10.0**-digits:  # an error that is known must not read 0.00
            digits = min(-math.floor(math.log10(smaller)), 6)
        return f"{middle:.{digits}f} +{high - middle:.{digits}f} −{middle - low:.{digits}f}".replace(
            " -", " −"
        )
    unit = 10.0**power
    values = (middle / unit, (high - middle) / unit, (middle - low) / unit)
    return "({:.2f} +{:.2f} −{:.2f}) × 10".format(*values) + str(power).translate(_RAISED)


def _row(quantity: Quantity) -> dict[str, Any]:
    within = quantity.truth is not None and quantity.quantiles[0] <= quantity.truth <= quantity.quantiles[4]
    return {
        "label": quantity.label,
        "unit": _UNITS.get(quantity.unit, quantity.unit),
        "value": spread(quantity.quantiles),
        "range": f"{text(quantity.quantiles[0])} to {text(quantity.quantiles[4])}",
        "terms": {name: text(quantity.terms.get(name)) for name in ("fit", "seeds", "bootstrap", "variants")},
        "truth": text(quantity.truth) if quantity.truth is not None else "",
        "within": within,
        "note": quantity.note,
    }


def _fit(member: dict[str, Any]) -> dict[str, Any]:
    rho, mass = member.get("rho150"), member.get("mass_half")
    rhat, ess = member.get("rhat_max"), member.get("ess_min")
    return {
        "what": member["what"],
        "status": member["status"],
        "rho": spread(rho) if rho else "–",
        "mass": spread(mass) if mass else "–",
        "rhat": f"{rhat:.3f}" if rhat is not None else "–",
        "ess": f"{ess:.0f}" if ess is not None else "–",
        "cpu": f"{member.get('cpu_seconds', 0.0):.0f}",
        "error": member["error"],
    }


def _published(result: GalaxyResult) -> list[dict[str, str]]:
    """Published values with this fit's own beside them, in the same unit."""
    own = {
        "rho_150pc": ("ρ(150 pc), 10⁷ M☉/kpc³", "rho_dm_150pc", 1e-7),
        "log10_j_0.5deg": ("log₁₀ J(0.5°), GeV² cm⁻⁵", "log10_j_0.5deg", 1.0),
        "log10_mass_wolf": ("log₁₀ M(<4 R_half/3), M☉", "mass_half_3d", 1.0),
    }
    rows = []
    for value in result.published:
        words, name, scale = own[value.quantity]
        mine = next((q for q in result.quantities if q.name == name), None)
        quantiles = None
        if mine is not None:
            quantiles = [q * scale for q in mine.quantiles]
        if value.quantity == "log10_mass_wolf":  # at the published radius, which need not be this fit's
            quantiles = [math.log10(q) for q in result.estimators[1]["posterior"]]
        rows.append(
            {
                "quantity": words,
                "label": value.label,
                "reference": value.reference,
                "value": f"{value.value:.2f} +{value.plus:.2f} −{value.minus:.2f}",
                "own": spread(quantiles) if quantiles is not None else "–",
            }
        )
    return rows
