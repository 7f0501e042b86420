"""The ``galray`` command: parse, call one function, print.

Heavy libraries are imported inside the commands, so that ``galray --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer

from galray import __version__
from galray.commands import calibrate, catalog, dwarf, gravity, jobs, runs
from galray.commands.options import (
    ConfigArgument,
    OverwriteOption,
    QuietOption,
    SetOption,
    make_pipeline,
    print_table,
)
from galray.errors import GalrayError, GalrayWarning

__all__ = ["app", "main"]

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended: 128 and the signal's number."""

app = typer.Typer(
    name="galray",
    help="Galactic dark matter from star catalogues, with neural networks, on a laptop or a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Run configurations.", no_args_is_help=True)
app.add_typer(catalog.app, name="catalog")
app.add_typer(dwarf.app, name="dwarf")
app.add_typer(gravity.app, name="gravity")
app.add_typer(runs.app, name="runs")
app.add_typer(jobs.app, name="jobs")
app.command()(jobs.submit)
app.command()(calibrate.calibrate)
app.add_typer(config_app, name="config")

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be read, trained and written.")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"galray {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback with an error (anywhere on the line).")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: ConfigArgument,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    sample: Annotated[
        str | None,
        typer.Option(metavar="PERCENT", help="Run on a part, such as 1%, and extrapolate the rest."),
    ] = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole chain: star files in, the dark matter density and its report out."""
    _run(config, set_, dry_run=dry_run, sample=sample, overwrite=overwrite, quiet=quiet)


@app.command()
def demo(set_: SetOption = None, dry_run: DryRunOption = False, overwrite: OverwriteOption = False) -> None:
    """Run the ready configuration ``demo``: a mock Milky Way in Gaia form, through the whole chain."""
    _run("demo", set_, dry_run=dry_run, overwrite=overwrite)


@app.command()
def mock(config: ConfigArgument, set_: SetOption = None, overwrite: OverwriteOption = False) -> None:
    """Generate a run's mock galaxy and write it in Gaia's bulk form."""
    pipeline = make_pipeline(config, set_, overwrite=overwrite)
    folder = pipeline.run_mock()
    files = sorted(folder.glob("*.csv.gz"))
    where = pipeline.directory.place.below(folder.name).location
    typer.echo(f"{len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB in {where}")


@app.command()
def train(
    family: Annotated[str, typer.Argument(help="flow or score")],
    config: ConfigArgument,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Train one model of a family (the base member of the ensemble) and measure its field."""
    pipeline = make_pipeline(config, set_, overwrite=overwrite)
    folder = pipeline.run_base_member(family)
    where = pipeline.directory.place.below("members").below(folder.name).location
    typer.echo(f"{family}: trained; model, field and curve in {where}")


@app.command()
def ensemble(
    config: ConfigArgument,
    set_: SetOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it will take, by the cost of members that are finished."),
    ] = False,
    rates: Annotated[
        str | None, typer.Option("--rates", help="With --dry-run: a run whose members were measured.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Train the members that are missing, and combine them into an error budget."""
    if dry_run:
        from galray.config import load_config
        from galray.ensemble_plan import ensemble_plan

        for key, value in ensemble_plan(load_config(config, set_), rates).items():
            typer.echo(f"{key:<12} {value}")
        return
    pipeline = make_pipeline(config, set_, overwrite=overwrite)
    print_table(pipeline.run(until="measure").summary)


@app.command()
def tune(config: ConfigArgument, set_: SetOption = None, overwrite: OverwriteOption = False) -> None:
    """Search for the hyperparameters with the least held-out loss, by the [tune] section."""
    from galray.config import load_config
    from galray.console import Console
    from galray.tuning import tune as search

    found = search(load_config(config, set_), console=Console(), overwrite=overwrite)
    for trial in found.trials:
        choices = ", ".join(f"{key.split('.')[-1]} = {_short(value)}" for key, value in trial.choices.items())
        figure = f"{trial.loss:.5f}" if trial.status != "failed" else "-"
        line = f"{trial.status:<9} {figure:>10} {trial.epochs:>4} epochs {trial.seconds:7.1f} s  {choices}"
        typer.echo(f"{line}  {trial.error}".rstrip())
    if found.gain == found.gain:
        typer.echo(f"held-out loss below the configuration's own: {found.gain:.5f} ± {found.gain_error:.5f}")
    typer.echo(f"best: {found.path}  (galray run {found.path})")


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@app.command()
def report(run_dir: Annotated[str, typer.Argument(help="A run directory, or its URL.")]) -> None:
    """Build a run's report again from its results."""
    from galray.catalog.mirror import open_place
    from galray.report import build
    from galray.rundir import load_run

    run = load_run(run_dir)
    build(run.folder)
    open_place(run_dir).push("report.html", "figures/**/*")
    typer.echo(f"{run.location}/report.html")


@app.command()
def unblind(run_dir: Annotated[str, typer.Argument(help="A finished run of blind = true.")]) -> None:
    """Take the hidden offset off a run: its tables, figures, report and MLflow's numbers are made anew."""
    from galray.catalog.storage import is_url
    from galray.console import Console
    from galray.pipeline import Pipeline
    from galray.rundir import load_run

    run = load_run(run_dir)
    config = run.config if is_url(run_dir) else run.here
    print_table(Pipeline(config, Console()).unblind().summary)


@app.command()
def doctor() -> None:
    """Check versions, cores, GPUs, Ray, MLflow and write access; name a remedy for each fault."""
    from galray.doctor import examine

    faults = 0
    for check in examine():
        mark = "ok  " if check.ok else "FAIL"
        typer.echo(
            f"{mark} {check.name:<14} {check.found}"
            + (f"\n     remedy: {check.remedy}" if not check.ok else "")
        )
        faults += not check.ok
    if faults:
        raise typer.Exit(1)


@config_app.command("list")
def config_list() -> None:
    """List the ready configurations."""
    from galray.config import load_config, ready_configs

    for name in ready_configs():
        typer.echo(f"{name:<20} {load_config(name).description}")


@config_app.command("show")
def config_show(
    config: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a ready configuration.")
    ] = "demo",
    set_: SetOption = None,
) -> None:
    """Print a configuration with every key written out."""
    from galray.config import load_config, to_toml

    typer.echo(to_toml(load_config(config, set_)))


@config_app.command("check")
def config_check(config: ConfigArgument, set_: SetOption = None) -> None:
    """Validate a configuration without running it."""
    from galray.config import load_config

    loaded = load_config(config, set_)
    typer.echo(f"{config}: valid; run directory {loaded.place.location}, hash {loaded.hash}")


def _run(
    config: str,
    set_: list[str] | None,
    *,
    dry_run: bool = False,
    sample: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    from galray.config import load_config
    from galray.console import Console
    from galray.pipeline import Pipeline
    from galray.planning import extrapolate, plan, sample_config

    loaded = load_config(config, set_)
    if sample is not None:
        loaded = sample_config(loaded, sample)
    if dry_run:
        for key, value in plan(loaded).items():
            typer.echo(f"{key:<12} {value}")
        return
    result = Pipeline(loaded, Console(quiet=quiet), overwrite=overwrite).run()
    print_table(result.summary)
    if sample is not None:
        for line in extrapolate(result, sample):
            typer.echo(line)
    typer.echo(f"report: {result.location}/report.html")


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Galray's own warnings are for the user: without the line of code that they come from."""
    name = "" if issubclass(category, GalrayWarning) else f"{category.__name__}: "
    return f"warning: {name}{message}\n"


def main() -> None:
    """Entry point: errors of the user end in one or two lines and exit code 2."""
    # typer brings a click of its own in some versions: take the base of its errors from whichever it uses.
    usage_error: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

    warnings.formatwarning = _format_warning
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1 or os.environ.get("GALRAY_DEBUG") == "1"
    try:
        code = app(args=arguments, prog_name="galray", standalone_mode=False)
    except GalrayError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except usage_error as error:
        error.show()
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except OSError as error:
        if debug:
            raise
        place = f"{error.filename}: " if error.filename else ""
        typer.echo(
            f"error: {place}{error.strerror or error}\n  remedy: check the path, its rights and free space",
            err=True,
        )
        sys.exit(2)
    if code == INTERRUPTED:  # typer turns the interrupt into this code
        typer.echo("interrupted; run the same command again to go on", err=True)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
