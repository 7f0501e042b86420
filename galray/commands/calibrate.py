"""``galray calibrate``: the whole measurement on mock galaxies of known truth."""

from __future__ import annotations

import typer

from galray.commands.options import ConfigArgument, QuietOption, SetOption

__all__ = ["calibrate"]


def calibrate(config: ConfigArgument, set_: SetOption = None, quiet: QuietOption = False) -> None:
    """Repeat the measurement on mock galaxies of known truth: do its error bars hold what they claim?"""
    from galray.calibration.page import sentence
    from galray.calibration.run import calibrate as run
    from galray.config import load_config
    from galray.console import Console

    found = run(load_config(config, set_), console=Console(quiet=quiet))
    for j in found.judgements:
        if j.named:
            tested = "" if j.tested is None else f"; errors × {j.inflation:.2f} ± {j.inflation_error:.2f}"
            typer.echo(f"{j.method:<9} {j.name} {j.where}: {sentence(j)}{tested}")
    known = len(found.records) - found.new
    failed = f", {len(found.failed)} failed" if found.failed else ""
    typer.echo(f"{len(found.records)} mocks, {known} of them known before{failed}")
    typer.echo(f"apply it to a run: --set calibration.apply={found.table}")
    typer.echo(f"report: {found.page}")
