"""``galray gravity``: measure a field, and evaluate it where the user asks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from galray.commands.options import OverwriteOption, SetOption, make_pipeline, print_table
from galray.errors import GalrayError

__all__ = ["app"]


class MeasureByDefault(TyperGroup):
    """``galray gravity SOURCE`` measures: the word that is no command is the source of `measure`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `measure` in front of arguments that do not begin with a command."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["measure", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="gravity",
    cls=MeasureByDefault,
    help="Measure a(x) and ρ(x) (`galray gravity SOURCE`), and evaluate them at your positions.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def measure(
    source: Annotated[str, typer.Argument(help="A configuration, or a shard store (moments only).")],
    method: Annotated[str, typer.Option(help="flow, score or moments")] = "moments",
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", metavar="STORE", help="Another tracer population in the same potential."),
    ] = None,
    field: Annotated[
        Path | None,
        typer.Option("--field", metavar="FOLDER", help="Write the field of a store, for `evaluate`."),
    ] = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure a(x) and ρ(x) by one inversion; moments need no training."""
    from galray.catalog.mirror import open_place
    from galray.config import load_config
    from galray.store_gravity import measure_store

    if open_place(source).read("manifest.json") is not None:
        if method != "moments":
            raise GalrayError(
                f"--method {method}: a shard store alone holds no model",
                "use --method moments, or a configuration",
            )
        found = measure_store(source, others=also or (), overrides=set_, field=field)
        print_table(found)
        for line in found["notes"]:
            typer.echo(line)
        if field is not None:
            typer.echo(f"field written: {field}")
        return
    for name, value in (("--also", also), ("--field", field)):
        if value:
            raise GalrayError(f"{name}: goes with a shard store", "name a folder with a manifest.json")
    if method not in ("flow", "score", "moments"):
        raise GalrayError(f"--method {method}: no such inversion", "use flow, score or moments")
    whole = load_config(source, set_)
    # A run of one inversion alone is another run than that of all: it shall not take its place.
    alone = [] if whole.methods == (method,) else [f"methods={method}", f"name={whole.name}-{method}"]
    pipeline = make_pipeline(source, [*(set_ or []), *alone], overwrite=overwrite)
    print_table(pipeline.run(until="measure").summary)


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="A run directory or its URL, or a folder with a field.")],
    at: Annotated[
        Path,
        typer.Option(
            "--at",
            help="Positions: an ECSV, CSV, FITS or Parquet table with x, y, z (Galactocentric) or ra, dec, "
            "distance (ICRS).",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write .ecsv or .parquet; ECSV on the terminal otherwise.")
    ] = None,
    unit: Annotated[str, typer.Option(help="kpc or pc, of lengths that carry no unit.")] = "kpc",
    method: Annotated[str, typer.Option(help="One inversion of a run, or all combined.")] = "combined",
    outside: Annotated[
        str, typer.Option(help="Positions outside the ball of the stars: 'error' or 'nan'.")
    ] = "error",
) -> None:
    """Acceleration, potential and density, with errors, at the positions of a table."""
    from galray.evaluation import evaluate as evaluate_at
    from galray.evaluation import open_source
    from galray.positions import read_positions
    from galray.tables import FORMATS, write_table

    if outside not in ("error", "nan"):
        raise GalrayError(f"--outside {outside}", "give error or nan")
    if out is not None and out.suffix not in FORMATS:
        raise GalrayError(
            f"--out {out}: ends in '{out.suffix}'", f"give a name that ends in {' or '.join(FORMATS)}"
        )
    opened = open_source(source, method)
    found = evaluate_at(opened, read_positions(at, opened.frame, unit=unit), outside=outside)
    if out is None:
        found.table.write(sys.stdout, format="ascii.ecsv")
    else:
        write_table(found.table, out)
        typer.echo(f"{len(found.table)} positions in {out}")
    for count, text in (
        (found.num_outside, "outside the ball of the stars: all values are NaN"),
        (found.num_without_density, "nearer to the border than the density kernel reaches: ρ is NaN"),
    ):
        if count:
            typer.echo(f"{count} of {len(found.table)} positions {text}", err=True)
