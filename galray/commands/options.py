"""Arguments that several commands take, and how they turn into a pipeline."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["ConfigArgument", "OverwriteOption", "QuietOption", "SetOption", "make_pipeline"]

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
