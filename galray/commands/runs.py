"""`galray runs`: what MLflow holds of runs and their members, as tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from galray.tracking.reading import RunRecord

__all__ = ["app"]

app = typer.Typer(help="Runs and members that MLflow holds.", no_args_is_help=True)

UriOption = Annotated[
    str, typer.Option("--uri", help="Tracking store; else MLFLOW_TRACKING_URI, else mlflow.db of --output.")
]
OutputOption = Annotated[str, typer.Option("--output", help="Folder of run directories.")]
ExperimentOption = Annotated[str | None, typer.Option("--experiment", help="Of this experiment alone.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@app.command("list")
def list_(
    uri: UriOption = "", output: OutputOption = "runs", experiment: ExperimentOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """List the runs, the latest first."""
    from galray.tracking.reading import list_runs, store_uri

    records = list_runs(store_uri(uri, output), experiment)
    if as_json:
        _dump([_plain(record) for record in records])
        return
    rows = [
        [
            record.name,
            record.id[:8],
            record.status,
            _when(record.started),
            _took(record.seconds),
            _count(record),
        ]
        for record in records
    ]
    _table(["run", "id", "status", "started", "took", "members"], rows)


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="Name of a run, or the first letters of its id.")],
    uri: UriOption = "", output: OutputOption = "runs", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show the members of a run: best and worst, what failed and why."""
    from galray.tracking.reading import find_run, list_runs, members_of, store_uri

    store = store_uri(uri, output)
    parent = find_run(list_runs(store), run)
    members = members_of(store, parent)
    if as_json:
        _dump({"run": _plain(parent), "members": [_plain(member) for member in members]})
        return
    typer.echo(
        f"{parent.name} ({parent.id}): {parent.status}, {_when(parent.started)}, {_took(parent.seconds)}"
    )
    for name, value in parent.metrics.items():
        if not name.startswith("system/"):
            typer.echo(f"  {name} = {value:.6g}")
    families: dict[str, list[float]] = {}
    for member in members:
        if member.status == "FINISHED" and math.isfinite(member.loss):
            families.setdefault(member.tags.get("galray.family", ""), []).append(member.loss)
    rows = []
    for member in members:
        losses = families.get(member.tags.get("galray.family", ""), [])
        mark = ""
        if len(losses) > 1 and member.status == "FINISHED":
            mark = "best" if member.loss == min(losses) else "worst" if member.loss == max(losses) else ""
        loss = f"{member.loss:.5f}" if math.isfinite(member.loss) else ""
        error = member.error.strip().splitlines()[-1] if member.error.strip() else ""
        density = member.metrics.get("final.rho_dm_average", math.nan)
        dark = f"{density:.5f}" if math.isfinite(density) else ""
        rows.append([member.name, member.status, loss, mark, dark, _took(member.seconds), error])
    _table(["member", "status", "held-out loss", "", "ρ_DM, Msun/pc³", "took", "error"], rows)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Two or more runs, by name or first letters of the id.")],
    uri: UriOption = "", output: OutputOption = "runs", as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Compare runs: the parameters in which they differ, and their metrics side by side."""
    from galray.errors import GalrayError
    from galray.tracking.reading import compare_runs, find_run, list_runs, store_uri

    if len(runs) < 2:
        raise GalrayError("runs compare: one run alone", "name two or more")
    records = list_runs(store_uri(uri, output))
    chosen = [find_run(records, name) for name in runs]
    params, metrics = compare_runs(chosen)
    if as_json:
        _dump({"runs": [record.id for record in chosen], "params": params, "metrics": metrics})
        return
    head = [f"{record.name} {record.id[:6]}" for record in chosen]
    _table(["parameter", *head], [[key, *map(_shorten, row)] for key, row in params.items()])
    figures = [
        [name, *(f"{v:.6g}" if math.isfinite(v) else "" for v in row)] for name, row in metrics.items()
    ]
    _table(["metric", *head], figures)


@app.command()
def register(
    run_dir: Annotated[str, typer.Argument(help="A finished run directory.")],
    uri: Annotated[str, typer.Option("--uri", help="Tracking store; the run's own where not given.")] = "",
    name: Annotated[str, typer.Option("--name", help="Name in the registry.")] = "galray-gravity",
    alias: Annotated[str, typer.Option("--alias", help="Alias of this version; '' for none.")] = "champion",
) -> None:
    """Register a run's gravity as an MLflow model: positions in, acceleration and density with errors out."""
    from galray.tracking.model import register_run

    name, version = register_run(run_dir, uri, name=name, alias=alias)
    typer.echo(f"models:/{name}/{version}" + (f"  (models:/{name}@{alias})" if alias else ""))


def _plain(record: RunRecord) -> dict[str, Any]:
    found = {key: getattr(record, key) for key in ("id", "name", "status", "started", "seconds")}
    return found | {key: dict(getattr(record, key)) for key in ("params", "metrics", "tags", "members")}


def _dump(content: Any) -> None:
    import json

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list) else value

    typer.echo(json.dumps(finite(content), indent=1))


def _table(head: list[str], rows: list[list[str]]) -> None:
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _when(seconds: float) -> str:
    from datetime import UTC, datetime

    return "" if math.isnan(seconds) else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def _took(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _count(record: RunRecord) -> str:
    return ", ".join(f"{count} {status.lower()}" for status, count in sorted(record.members.items()))


def _shorten(text: str, most: int = 48) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
