"""What ``galray catalog`` prints, as rich tables; text from files stands in them as it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from galray.catalog import StoreSummary, Verification

__all__ = ["fetched", "inspection", "store_summary", "verification"]

_UNITS = ("B", "kB", "MB", "GB", "TB")
_KINDS = {
    "gaia": "Gaia source table",
    "states": "6D table",
    "6d": "stars with 6D states",
    "no_rv": "stars without radial velocity",
    None: "unknown",
}
_FATES = {
    "rows_in": "rows read",
    "kept": "kept",
    "kept_no_rv": "kept without radial velocity",
    "kept_margin": "kept in the margin of the ball",
}


def fetched(found: Mapping[str, Any], folder: object) -> str:
    """The result of `galray.catalog.fetch`."""
    size = "size unknown" if found["bytes"] is None else _size(found["bytes"])
    if found["what"] == "archive" and "exact" in found:
        return (
            f"{found['rows']:,} rows, about {size} as text to transfer, less where the archive compresses it"
        )
    kind = "tile" if found["what"] == "tiles" else "file"
    text = f"{found['files']:,} {kind}{'s' * (found['files'] != 1)}, {size}"
    if "exact" in found:
        about = "" if found["exact"] else " (estimated from some of them)"
        of = f" to transfer for the columns of {found['rows_in']:,} rows" if kind == "tile" else ""
        return text + of + about
    if kind == "tile":
        text += f", {found['rows']:,} of {found['rows_in']:,} rows"
    if found["what"] == "archive":
        text += f", {found['rows']:,} rows"
        unit = f" of {found['chunks']:,} ranges"
    else:
        unit = ""
    return f"{text} in {folder}; {found['fetched']:,}{unit} fetched now ({_size(found['received'])} received)"


def inspection(found: Mapping[str, Any]) -> Group:
    """The result of `galray.catalog.inspect`."""
    table = _pairs(f"{found['path']}")
    form = found.get("format") or "galray store"
    table.add_row("form", Text(f"{form}, {_KINDS.get(found['kind'], found['kind'])}"))
    table.add_row("size", _size(found["bytes"]))
    rows = found["rows"]
    estimate = found.get("estimated_rows")
    table.add_row(
        "rows", f"{rows:,}" if rows is not None else f"about {estimate:,}" if estimate else "not read"
    )
    if found["what"] == "hats":
        table.add_row("tiles", f"{found['tiles']:,} of level {_span(found['levels'])}")
    if found["what"] == "store":
        table.add_row("shards", f"{found['shards']:,}")
        table.add_row("made", Text(str(found["created"])))
        table.add_row("quarantined", f"{found['quarantined']:,} file(s)")
        for name, sql in found["cuts"].items():
            table.add_row("cut", Text(f"{name}: {sql}"))
        if found["ball"]:
            table.add_row(
                "ball", Text(f"{found['ball']['radius_kpc']:g} kpc about {found['ball']['center_kpc']}")
            )
    columns = list(found["columns"])
    table.add_row("columns", Text(f"{len(columns)}: {', '.join(columns[:8])}{', …' * (len(columns) > 8)}"))
    if found.get("missing"):
        table.add_row("missing", Text(", ".join(found["missing"])))
    for name, count in sorted(found.get("absent_values", {}).items(), key=lambda item: -item[1])[:8]:
        share = f" ({100 * count / rows:.3g} %)" if rows else ""
        table.add_row("no value", Text(f"{name}: {count:,}{share}"))
    parts: list[Any] = [table]
    if found["what"] == "store":
        parts.append(_fate_table(found["account"]))
    return Group(*parts, *_findings(found["problems"], found["notes"]))


def verification(found: Verification, quick: bool = False) -> Group:
    """The result of `galray.catalog.verify`."""
    looked = f"{found.shards:,} shards" + (f", {found.tiles:,} tiles" if found.tiles else "")
    how = "sizes, footers and counts" if quick else "checksums, counts and stars"
    verdict = "FAIL" if found.problems else "ok"
    line = Text(
        f"{verdict}  {found.path}: {looked}, {found.rows:,} stars, {_size(found.bytes)}; {how} checked"
    )
    line.stylize("bold red" if found.problems else "green", 0, len(verdict))
    return Group(line, *_findings(found.problems, found.notes))


def store_summary(found: StoreSummary) -> list[Any]:
    """The numbers of a store, and of the stars without radial velocity beside it."""
    head = (
        f"{found.path}: {found.num_stars:,} {_KINDS.get(found.kind, found.kind)}, {found.num_shards} shards, "
    )
    head += f"{_size(found.bytes)}, from {found.num_inputs:,} file(s)"
    parts: list[Any] = [Text(head, style="bold"), _distribution_table(found)]
    if found.no_rv is not None:
        line = f"{found.no_rv.num_stars:,} {_KINDS['no_rv']} in {found.no_rv.path}"
        parts += [Text(line, style="bold"), _distribution_table(found.no_rv)]
    parts.append(_fate_table(found.account))
    parts += _findings((), [f"quarantined: {q['path']}: {q['reason']}" for q in found.quarantined])
    return parts


def _distribution_table(found: StoreSummary) -> Table:
    from galray.catalog.summary import PROBABILITIES

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("quantity", no_wrap=True)
    table.add_column("stars", justify="right", no_wrap=True)
    for q in PROBABILITIES:
        table.add_column("median" if q == 0.5 else f"{100 * q:g} %", justify="right", no_wrap=True)
    for name, distribution in found.distributions.items():
        values = [f"{value:.4g}" for value in distribution.quantiles]
        unit = f" [{distribution.unit}]" if distribution.unit else ""
        table.add_row(Text(name + unit), f"{distribution.num_values:,}", *values)
    return table


def _fate_table(account: Mapping[str, int]) -> Table:
    """Where every row went; shares of all rows."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("the fate of every row")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    total = max(int(account.get("rows_in", 0)), 1)
    last = [key for key in ("kept_margin", "kept_no_rv", "kept") if key in account]
    first = [key for key in account if key not in ("rows_in", *last)]
    for key in ("rows_in", *first, *last):
        rows = int(account.get(key, 0))
        words = _FATES.get(key, key.replace(":", ": ").replace("_", " "))
        style = "bold" if key in ("rows_in", *last) else ""
        table.add_row(Text(words, style=style), f"{rows:,}", f"{100 * rows / total:.3g} %")
    return table


def _findings(problems: Iterable[str], notes: Iterable[str]) -> list[Text]:
    lines = [_line(("problem: ", "bold red"), problem) for problem in problems]
    return lines + [_line(("note: ", "yellow"), note) for note in notes]


def _line(*parts: str | tuple[str, str]) -> Text:
    """One line however long: paths in it can be searched for and copied."""
    return Text.assemble(*parts, no_wrap=True, overflow="ignore")


def _pairs(title: str) -> Table:
    table = Table(
        box=None, show_header=False, pad_edge=False, title=Text(title, style="bold"), title_justify="left"
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _span(levels: list[int]) -> str:
    return f"{levels[0]}" if len(levels) == 1 else f"{levels[0]} to {levels[-1]}" if levels else "-"


def _size(number: float) -> str:
    for unit in _UNITS[:-1]:
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.4g} {_UNITS[-1]}"
