"""``galray catalog``: star files and shard stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from galray.commands.options import ConfigArgument, OverwriteOption, SetOption, make_pipeline

__all__ = ["app"]

app = typer.Typer(help="Star files and shard stores.", no_args_is_help=True)


@app.command()
def ingest(config: ConfigArgument, set_: SetOption = None, overwrite: OverwriteOption = False) -> None:
    """Turn star files into shards of 6D stars, and account for every row."""
    pipeline = make_pipeline(config, set_, overwrite=overwrite)
    with pipeline.session():
        store = pipeline.run_catalog()
    _print_account(store)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A star file or a shard store.")]) -> None:
    """Say what a star file or a shard store holds."""
    import json

    from galray.catalog import inspect

    typer.echo(json.dumps(inspect(path), indent=1, default=str))


def _print_account(store: Any) -> None:
    account = store.row_account
    typer.echo(f"{store.num_rows} stars in {len(store.shards)} shards; the fate of every row:")
    for fate, count in account.items():
        typer.echo(f"  {fate:<36} {count:>12}")
