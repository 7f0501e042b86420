"""``galray dwarf``: dark haloes of dwarf galaxies from the positions and velocities of their stars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from galray.commands.options import OverwriteOption, QuietOption, SetOption
from galray.errors import GalrayError

__all__ = ["app"]

app = typer.Typer(help="Dark haloes of dwarf galaxies.", no_args_is_help=True)

MembersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Fits per galaxy: seeds alone below 5, else bootstraps and variants too."),
]
OutputOption = Annotated[str | None, typer.Option(help="Folder or URL that holds run directories.")]


@app.command()
def fit(
    source: Annotated[
        str, typer.Argument(help="A configuration, the name of a ready one, or a file of stars.")
    ],
    set_: SetOption = None,
    members: MembersOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit one galaxy: ρ(r), M(<r), slope, J- and D-factors, core or cusp, and a page."""
    from galray.console import Console
    from galray.galaxies.config import load_dwarf_config
    from galray.galaxies.run import fit_galaxy

    config = load_dwarf_config(source, _overrides(set_, members, output))
    result, _ = fit_galaxy(config, Console(quiet=quiet), overwrite=overwrite)
    _print_result(result)
    typer.echo(f"report: {config.place.location}/report.html")


@app.command("fit-all")
def fit_all(
    folder: Annotated[
        str, typer.Argument(help="Folder or URL of star files with known names, or of TOML files.")
    ],
    set_: SetOption = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this galaxy; may be repeated.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run.")] = "dwarfs",
    members: MembersOption = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit every galaxy of a folder, their members side by side; the same command goes on after a kill."""
    from galray.config import validate_settings
    from galray.console import Console
    from galray.galaxies.config import REMEDY, DwarfConfig
    from galray.galaxies.run import find_jobs, fit_galaxies

    overrides = _overrides(set_, members, output)
    console = Console(quiet=quiet)
    base = validate_settings(DwarfConfig, {"name": name}, overrides, "--set", REMEDY)
    jobs, skipped = find_jobs(folder, overrides, only or (), base.storage)
    if skipped:
        console.say(f"not known by name, left out: {', '.join(skipped)}")
    fleet = fit_galaxies(jobs, base, console, overwrite=overwrite)
    for result in fleet.results:
        _print_result(result)
    for outcome in fleet.failed:
        typer.echo(f"{outcome.name}: failed: {outcome.error}", err=True)
    typer.echo(f"{len(fleet.results)} of {len(fleet.outcomes)} galaxies in {fleet.seconds:.0f} s")
    typer.echo(f"report: {base.place.location}/report.html")
    if fleet.failed:
        raise typer.Exit(1)


@app.command()
def mock(
    model: Annotated[str, typer.Argument(help="A model of the Gaia Challenge, such as PlumCoreOm.")],
    to: Annotated[Path, typer.Option(help="The file: .dat (x y z vx vy vz), .ecsv, .csv or .parquet.")],
    stars: Annotated[int, typer.Option(min=1, help="Number of stars.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of every random number.")] = 0,
    velocity_error: Annotated[
        float, typer.Option(min=0, help="Gaussian error added to all velocities, km/s.")
    ] = 2.0,
) -> None:
    """Draw a mock galaxy of known truth: double power law stars in a double power law halo."""
    from galray.galaxies.mocks import write_mock

    truth = write_mock(model, stars, seed, velocity_error, to)
    typer.echo(f"{stars} stars of {model} in {to}")
    for key, value in truth.items():
        typer.echo(f"  {key:<22} {value}")


@app.command("list")
def list_(
    names: Annotated[list[str] | None, typer.Argument(help="Galaxies; all where none is named.")] = None,
    references: Annotated[bool, typer.Option("--references", help="Say where each value is from.")] = False,
) -> None:
    """List the known dwarf galaxies: place, distance, size, velocity, dispersion, proper motion."""
    from galray.dwarf.known import find_dwarf, known_dwarfs

    chosen = [find_dwarf(name) for name in names] if names else list(known_dwarfs().values())
    head = ("key", "ra", "dec", "D", "R_half", "ell", "v_sys", "σ", "pmra", "pmdec")
    units = ("", "deg", "deg", "kpc", "kpc", "", "km/s", "km/s", "mas/yr", "mas/yr")
    for line in (head, units):
        typer.echo(f"{line[0]:<18}" + "".join(f"{word:>10}" for word in line[1:]))
    for d in chosen:
        numbers = (d.ra, d.dec, d.distance, d.r_half_kpc, d.ellipticity)
        numbers += (d.velocity, d.dispersion, d.pmra, d.pmdec)  # type: ignore[assignment]
        digits = (4, 4, 1, 3, 2, 1, 2, 3, 3)
        cells = [f"{v:>10.{n}f}" if v == v else f"{'–':>10}" for v, n in zip(numbers, digits, strict=True)]
        typer.echo(f"{d.key:<18}" + "".join(cells))
        if references:
            for what, reference in d.references.items():
                typer.echo(f"{'':<18}  {what}: {reference}")
    typer.echo("Local Volume Database (Pace 2025, CC0); R_half is circularised")


@app.command()
def show(
    source: Annotated[
        str, typer.Argument(help="A configuration, the name of a ready one, or a file of stars.")
    ],
    set_: SetOption = None,
) -> None:
    """Print a galaxy's configuration with every key written out."""
    from galray.config import to_toml
    from galray.galaxies.config import load_dwarf_config

    typer.echo(to_toml(load_dwarf_config(source, set_)))


def _overrides(set_: list[str] | None, members: int | None, output: str | None) -> list[str]:
    found = []
    if members is not None:
        found += member_counts(members)
    if output is not None:
        found.append(f"output={output}")
    return [*found, *(set_ or [])]


def member_counts(members: int) -> list[str]:
    """Deal a number of members to seeds, bootstraps and variants, as overrides.

    Arguments:
        members: 1 to 4 are seeds alone; from 5 on half are seeds, two are variants, the rest bootstraps.
    """
    if members < 5:
        seeds, bootstraps, variants = members, 0, False
    else:
        seeds = members // 2
        bootstraps, variants = members - seeds - 2, True
    word = "true" if variants else "false"
    return [
        f"members.seeds={seeds}",
        f"members.bootstraps={bootstraps}",
        f"members.velocities={word}",
        f"members.smoothness={word}",
    ]


def _print_result(result: object) -> None:
    from galray.galaxies.page import spread, text
    from galray.galaxies.results import GalaxyResult

    if not isinstance(result, GalaxyResult):
        raise GalrayError("no result to print")
    typer.echo(result.summary["sentence"])
    for q in result.quantities:
        truth = f"   truth {text(q.truth)}" if q.truth is not None else ""
        typer.echo(f"  {q.label:<38} {spread(q.quantiles):<30} {q.unit}{truth}")
    for row in result.estimators:
        where = f"{row['estimator']}, M(<{row['radius_kpc']:.3g} kpc)"
        typer.echo(f"  {where:<38} {text(row['mass']):<30} solMass   this fit {spread(row['posterior'])}")
    for note in result.notes:
        typer.echo(f"  note: {note}")
