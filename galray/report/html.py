"""One self-contained page per run: figures drawn, tables filled, nothing loaded from outside."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galray.report import diagnostics, sections, style
from galray.report.halo import halo_table
from galray.report.run import RunFolder
from galray.report.text import duration, finite, humanise, quantity_words, where_html

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

__all__ = ["build"]


class _Figures:
    """Draws figures, saves each under ``figures/`` and keeps its inline form for the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inline: dict[str, Markup] = {}

    def add(self, name: str, title: str, draw: Callable[[], Figure | None]) -> str | None:
        """Draw one figure under a name; None when there is nothing to draw."""
        from markupsafe import Markup

        figure = draw()
        if figure is None:
            return None
        name = re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-")
        svg = style.standalone_svg(figure)
        _write(self.folder / f"{name}.svg", svg)
        self.inline[name] = Markup(style.inline_svg(svg, name, title))
        return name


def build(run_dir: Path) -> Path:
    """Write the report of a finished run.

    Reads the run directory only; draws the figures into ``figures/*.svg`` and writes one page,
    ``report.html``, with figures and style inside. Parts that the run does not have are left out or said
    to be missing.

    Arguments:
        run_dir: The run directory, with ``results/summary.json`` at the least.

    Returns:
        The path of ``report.html``.

    Raises:
        GalrayError: The directory is not a finished run.
    """
    run = RunFolder.read(Path(run_dir))
    folder = run.path / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with style.theme():
        drawn = _Figures(folder)
        context = {
            "figures": drawn.inline,
            "result_figure": _result(run, drawn),
            "budget_figures": list(_budgets(run, drawn)),
            "variant_figure": _variants(run, drawn),
            "profile_figures": list(_profiles(run, drawn)),
            "map_figures": list(_maps(run, drawn)),
            "dust_figures": list(_dust(run, drawn)),
            "star_figures": list(_stars(run, drawn)),
            "training_figures": list(_training(run, drawn)),
            "row_figure": _rows(run, drawn),
        }
    context |= _tables(run)
    context |= _outline(context)
    target = run.path / "report.html"
    _write(target, _render(context))
    return target


def _result(run: RunFolder, drawn: _Figures) -> str | None:
    from galray.report import figures

    top = run.summary.get("headline")
    if not isinstance(top, dict):
        return None
    top = sections.in_msun_pc3({"unit": "Msun/pc3", **top}, "value", "error", "truth")
    if top is None:
        return None
    own = []
    for item in run.summary.get("comparisons") or []:
        converted = sections.in_msun_pc3(item, "value", "error") if isinstance(item, dict) else None
        if converted is None or not finite(converted.get("value")):
            continue
        if sections.same_kind(item.get("quantity") or top.get("name")) == sections.same_kind(top.get("name")):
            own.append(converted)
    listed = sections.published_beside(run)
    methods, role = sections.headline_methods(run), sections.headline_role(run)
    return drawn.add(
        "result",
        "The run's density beside published values",
        lambda: figures.comparison(top, methods if len(methods) > 1 else [], listed, own, role),
    )


def _variants(run: RunFolder, drawn: _Figures) -> str | None:
    from galray.report import figures

    rows, top = sections.variants(run), run.summary.get("headline")
    if not rows or not isinstance(top, dict):
        return None
    converted = sections.in_msun_pc3({"unit": "Msun/pc3", **top}, "value", "error")
    return drawn.add(
        "variants",
        "The density by other estimators and tracer groups",
        lambda: figures.variants(rows, converted or {}, sections.headline_role(run)),
    )


def _budgets(run: RunFolder, drawn: _Figures) -> Iterator[str]:
    from galray.report import figures

    top = run.summary.get("headline")
    if isinstance(top, dict) and isinstance(top.get("terms"), list):
        terms = [t for t in top["terms"] if isinstance(t, dict) and t.get("term") != "total"]
        name = drawn.add(
            "budget",
            "Error budget of the headline value",
            lambda: figures.budget(
                terms,
                top.get("error"),
                str(top.get("unit", "Msun/pc3")),
                "The headline value",
                sections.headline_role(run),
            ),
        )
        if name:
            yield name
    top_name = str(top.get("name")) if isinstance(top, dict) else "rho_dm"
    for row in sections.budget_rows(run):
        # Single inversions of the headline's quantity; the rest stands in the table.
        elsewhere = row["place"] and isinstance(top, dict) and row["place"] != str(top.get("where"))
        if row["name"] != top_name or elsewhere or row["method"] == "combined":
            continue
        terms = [
            {"term": t, "error": e["value"], "uncertainty": e["uncertainty"], "count": e["count"]}
            for t, e in row["terms"].items()
        ]
        total = row["terms"].get("total", {}).get("value")
        name = drawn.add(
            f"budget-{row['method']}",
            f"Error budget of the inversion {row['label']}",
            lambda row=row, terms=terms, total=total: figures.budget(  # type: ignore[misc]
                [t for t in terms if t["term"] != "total"],
                total,
                row["raw_unit"],
                style.literal(f"By {row['label']} alone"),
                row["method"],
            ),
        )
        if name:
            yield name


def _profiles(run: RunFolder, drawn: _Figures) -> Iterator[str]:
    from galray.report import profiles

    if run.profiles is None:
        return
    for line, quantity in profiles.profile_keys(run.profiles):
        words = profiles.PROFILE_WORDS.get(line, humanise(line))
        name = drawn.add(
            f"profile-{line}-{quantity}",
            f"{quantity_words(quantity)} {words}",
            lambda line=line, quantity=quantity: profiles.profile(  # type: ignore[misc]
                run.profiles, line, quantity
            ),
        )
        if name:
            yield name


def _maps(run: RunFolder, drawn: _Figures) -> Iterator[dict[str, str]]:
    from galray.report import profiles

    if run.maps is None:
        return
    for plane, quantity in sorted(set(run.maps.select("map", "quantity").iter_rows())):
        title = f"{quantity_words(quantity)} on the plane {plane}"
        name = drawn.add(
            f"map-{plane}-{quantity}",
            title,
            lambda plane=plane, quantity=quantity: profiles.field_map(  # type: ignore[misc]
                run.maps, plane, quantity
            ),
        )
        if name:
            yield {"name": name, "title": title.capitalize()}


def _dust(run: RunFolder, drawn: _Figures) -> Iterator[str]:
    from galray.report import dust

    found = run.summary.get("dust")
    if not isinstance(found, dict):
        return
    title = f"Stars on the sky at {found.get('sky_distance_kpc')} kpc, as seen and before the dust"
    name = drawn.add("dust-sky", title, lambda: dust.sky(run.dust_sky))
    if name:
        yield name
    name = drawn.add("dust-epsilon", "Selection efficiency with distance", lambda: dust.fall(run.dust))
    if name:
        yield name


def _stars(run: RunFolder, drawn: _Figures) -> Iterator[str]:
    if run.stars is None:
        return
    from galray.report import stars

    pictures: list[tuple[str, str, Callable[[], Figure | None]]] = [
        ("sky", "Stars on the sky", lambda: stars.sky(run.stars)),
        ("stars-x-z", "Stars from the side", lambda: stars.star_map(run.stars, "x", "z")),
        ("stars-x-y", "Stars from above", lambda: stars.star_map(run.stars, "x", "y")),
        ("velocities", "Velocity distributions", lambda: stars.velocities(run.stars)),
        (
            "plane-vR-vphi",
            "Radial and azimuthal velocity",
            lambda: stars.phase_plane(run.stars, "vR", "vphi", "Velocities in the plane of rotation"),
        ),
        (
            "plane-z-vz",
            "Height and vertical velocity",
            lambda: stars.phase_plane(run.stars, "z", "vz", "Height and vertical velocity"),
        ),
    ]
    for name, title, draw in pictures:
        made = drawn.add(name, title, draw)
        if made:
            yield made


def _training(run: RunFolder, drawn: _Figures) -> Iterator[str]:
    from galray.report import figures

    for family in dict.fromkeys(curve.family for curve in run.curves):
        name = drawn.add(
            f"training-{family}",
            f"Training of the family {family}",
            lambda family=family: figures.training(run.curves, family),  # type: ignore[misc]
        )
        if name:
            yield name


def _rows(run: RunFolder, drawn: _Figures) -> str | None:
    from galray.report import figures

    catalog = run.summary.get("catalog")
    if not isinstance(catalog, dict):
        return None
    return drawn.add("rows", "Where the catalogue's rows went", lambda: figures.row_account(catalog))


def _tables(run: RunFolder) -> dict[str, Any]:
    """Everything of the page that is not a figure."""
    found = run.summary.get("run")
    keys = ("name", "created", "seconds", "seed", "galray", "git", "config_hash", "description")
    about: dict[str, Any] = dict.fromkeys(keys)
    about |= found if isinstance(found, dict) else {}
    checks = diagnostics.checks(run)
    return {
        "run": about,
        "took": duration(about["seconds"]) if finite(about["seconds"]) else "",
        "folder": run.path.resolve().name,
        "mock": run.is_mock,
        "headline": sections.headline(run),
        "published": sections.published_rows(run),
        "methods": sections.methods_used(run),
        "table": sections.method_table(run),
        "halo": halo_table(run),
        "dust": _dictionary(run.summary.get("dust")),
        "budget": sections.budget_rows(run),
        "budget_terms": list(
            dict.fromkeys(
                term for row in sections.budget_rows(run) for term in row["terms"] if term != "total"
            )
        ),
        "variants": sections.variants(run),
        "weights": sections.weights(run),
        "checks": checks,
        "equilibrium": diagnostics.equilibrium(run),
        "catalog": diagnostics.catalog_rows(run),
        "members": diagnostics.members(run),
        "provenance": diagnostics.provenance(run),
        "config": run.config,
        "notes": _texts(run.summary.get("notes")),
        "warnings": _texts(run.summary.get("warnings")) + diagnostics.check_warnings(checks) + run.problems,
        "stars_sampled": run.stars.height if run.stars is not None else 0,
        "humanise": humanise,
        "place": where_html,
    }


# (section, its name in the navigation, what fills it, what is said when nothing does)
_SECTIONS = [
    ("result", "Result", (), ""),
    ("budget", "Errors", ("budget_figures", "budget"), "No error budget."),
    ("inversions", "Inversions", ("table",), "No measured quantities."),
    ("halo", "Halo", ("halo",), "No halo profiles: too few dark matter densities clear of the disc."),
    (
        "profiles",
        "Profiles",
        ("profile_figures",),
        "No profiles: no rows in results/profiles.parquet.",
    ),
    ("maps", "Maps", ("map_figures",), "No maps of the fields: no rows in results/maps.parquet."),
    ("dust", "Dust", ("dust",), ""),
    (
        "stars",
        "Stars",
        ("star_figures",),
        "No pictures of the stars: no rows in results/stars.parquet.",
    ),
    ("training", "Training", ("training_figures",), "No training curves: no network was trained."),
    ("equilibrium", "Equilibrium", ("equilibrium",), "No equilibrium diagnostics."),
    ("checks", "Checks", ("checks",), "No checks of a model of the stars."),
    ("catalogue", "Catalogue", ("catalog",), "No row account of the catalogue."),
    ("members", "Members", ("members",), "No ensemble members."),
    ("provenance", "Provenance", (), ""),
]


def _outline(context: dict[str, Any]) -> dict[str, Any]:
    """Which sections the page has, and sentences about those it has not."""
    present, absent = [], []
    for key, name, contents, sentence in _SECTIONS:
        if not contents or any(context[content] for content in contents):
            present.append((key, name))
        elif sentence:
            absent.append(sentence)
    return {"outline": present, "absent": absent}


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value if item] if isinstance(value, list) else []


def _render(context: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("galray.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sheet = environment.loader.get_source(environment, "report.css")[0]  # type: ignore[union-attr]
    sheet = sheet.replace("/*LIGHT*/", style.css_variables(style.LIGHT))
    sheet = sheet.replace("/*DARK*/", style.css_variables(style.DARK))
    return environment.get_template("report.html.j2").render(css=Markup(sheet), **context)


def _write(target: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = target.with_name(f".{target.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
