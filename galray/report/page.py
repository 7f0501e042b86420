"""One self-contained page beside a folder of figures, in the look of every report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from galray.provenance import write_atomic
from galray.report import style

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

__all__ = ["keep_figure", "render"]


def keep_figure(folder: Path, name: str, title: str, figure: Figure) -> Markup:
    """Keep a figure as a file, and give its form inside a page.

    Arguments:
        folder: Where ``NAME.svg`` goes; made where absent.
        name: Unique name on the page.
        title: Plain text for screen readers.
        figure: The figure.
    """
    from markupsafe import Markup

    folder.mkdir(parents=True, exist_ok=True)
    svg = style.standalone_svg(figure)
    write_atomic(folder / f"{name}.svg", svg)
    return Markup(style.inline_svg(svg, name, title))


def render(package: str, template: str, context: dict[str, Any]) -> str:
    """A page of a package's own template, which may extend ``base.html.j2``.

    Arguments:
        package: The package whose ``templates`` hold it.
        template: Its name there.
        context: What it shows.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = ChoiceLoader([PackageLoader(package, "templates"), PackageLoader("galray.report", "templates")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sheet = loader.get_source(environment, "report.css")[0]
    sheet = sheet.replace("/*LIGHT*/", style.css_variables(style.LIGHT))
    sheet = sheet.replace("/*DARK*/", style.css_variables(style.DARK))
    return environment.get_template(template).render(css=Markup(sheet), **context)
