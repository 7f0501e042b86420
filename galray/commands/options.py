"""Arguments that several commands take, and how they turn into a pipeline."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

__all__ = ["ConfigArgument", "OverwriteOption", "QuietOption", "SetOption", "make_pipeline", "print_table"]

ConfigArgument = Annotated[str, typer.Argument(help="A TOML file, or the name of a ready configuration.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override one key; may be repeated.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Discard a run directory of another configuration.")
]

QuietOption = Annotated[bool, typer.Option("--quiet", help="Print results only.")]


def make_pipeline(config: str, set_: list[str] | None, *, overwrite: bool = False) -> Any:
    """The pipeline of a configuration with its overrides, printing to the terminal."""
    from galray.config import load_config
    from galray.console import Console
    from galray.pipeline import Pipeline

    return Pipeline(load_config(config, set_), Console(), overwrite=overwrite)


def print_table(summary: dict[str, Any]) -> None:
    """A run's quantities as a table on the terminal."""
    from rich.console import Console

    from galray.report import table

    Console(width=None if sys.stdout.isatty() else 120).print(table(summary))
