"""``galray calibrate``: the whole measurement on mock galaxies of known truth."""

from __future__ import annotations

from typing import Annotated

import typer

from galray.commands.options import ConfigArgument, QuietOption, SetOption

__all__ = ["calibrate"]


def calibrate(
    config: ConfigArgument,
    set_: SetOption = None,
    known: Annotated[
        bool, typer.Option("--known", help="Measure none: judge the mocks that are measured already.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Repeat the measurement on mock galaxies of known truth: do its error bars hold what they claim?"""
    from galray.calibration.page import sentence
    from galray.calibration.run import calibrate as run
    from galray.config import load_config
    from galray.console import Console

    found = run(load_config(config, set_), console=Console(quiet=quiet), known=known)
    for j in found.judgements:
        if j.named:
            tested = "" if j.tested is None else f"; errors × {j.inflation:.2f} ± {j.inflation_error:.2f}"
            typer.echo(f"{j.method:<9} {j.name} {j.where}: {sentence(j)}{tested}")
    before = len(found.records) - found.new
    failed = f", {len(found.failed)} failed" if found.failed else ""
    typer.echo(f"{len(found.records)} mocks, {before} of them known before{failed}")
    typer.echo(f"apply it to a run: --set calibration.apply={found.place.location}/{found.table.name}")
    typer.echo(f"report: {found.place.location}/{found.page.name}")
