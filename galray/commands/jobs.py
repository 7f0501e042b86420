"""`galray submit` and `galray jobs`: runs on a distant Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from galray.commands.options import ConfigArgument, SetOption
from galray.errors import GalrayError

if TYPE_CHECKING:
    from galray.cluster.submission import JobServer
    from galray.config import RunConfig

__all__ = ["app", "environment", "submit"]

app = typer.Typer(help="Jobs on a distant Ray cluster.", no_args_is_help=True)

AddressOption = Annotated[
    str,
    typer.Option(
        "--address", help="The dashboard's, such as http://localhost:8265; else RAY_API_SERVER_ADDRESS."
    ),
]
JobArgument = Annotated[str, typer.Argument(help="A job's id, as `galray jobs list` prints it.")]
FollowOption = Annotated[bool, typer.Option("--follow", help="Pass the log on until the job ends.")]


def submit(
    config: ConfigArgument,
    address: AddressOption = "",
    set_: SetOption = None,
    stage: Annotated[str, typer.Option(help="run, mock, tune, ensemble, calibrate or gravity")] = "run",
    follow: FollowOption = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="A=B", help="A variable of the job; may be repeated.")
    ] = None,
    working_tree: Annotated[
        bool,
        typer.Option(
            "--working-tree", help="Send this galray's tracked files along, in place of the image's."
        ),
    ] = False,
) -> None:
    """Submit a configuration to a Ray cluster; a second submission goes on where the first stopped."""
    from galray.cluster.submission import JobServer, check_stage
    from galray.config import load_config, to_toml

    check_stage(stage)
    loaded = load_config(config, set_)
    _require_shared(loaded)
    # On the cluster the run joins the cluster that the job is in, whatever this machine would have joined.
    cluster = loaded.cluster.model_copy(update={"address": "", "enabled": True})
    loaded = loaded.model_copy(update={"cluster": cluster})
    server = JobServer(address)
    identity = server.submit(
        to_toml(loaded),
        loaded.name,
        loaded.hash,
        stage=stage,
        env=environment(env or []),
        working_tree=working_tree,
    )
    typer.echo(identity)
    if follow:
        _follow(server, identity)


def _require_shared(config: RunConfig) -> None:
    """Refuse paths that mean another place on each machine."""
    given = {
        "output": [config.output],
        "catalog.files": config.catalog.files,
        "calibration.cache": [config.calibration.cache],
        "calibration.apply": [config.calibration.apply],
    }
    for key, paths in given.items():
        for path in filter(None, map(str, paths)):
            if "://" not in path and not Path(path).expanduser().is_absolute():
                raise GalrayError(
                    f"{key}: '{path}' is relative: on the cluster that is the job's own temporary folder",
                    f"name a place that all nodes reach, with --set {key}=/shared/…",
                )


@app.command("list")
def list_(address: AddressOption = "") -> None:
    """List the jobs, the latest first."""
    from galray.cluster.submission import JobServer

    for job in JobServer(address).jobs():
        code = "" if job.exit_code is None else f"exit {job.exit_code}"
        typer.echo(f"{job.id:<48} {job.status:<10} {code}".rstrip())


@app.command()
def status(job: JobArgument, address: AddressOption = "") -> None:
    """Print a job's state; the exit code is 0 unless it failed or was stopped."""
    from galray.cluster.submission import JobServer

    found = JobServer(address).job(job)
    typer.echo(f"{found.status}: {found.message}".rstrip(": "))
    if found.exit_code:
        raise typer.Exit(found.exit_code)


@app.command()
def logs(job: JobArgument, address: AddressOption = "", follow: FollowOption = False) -> None:
    """Print what a job has printed."""
    from galray.cluster.submission import JobServer

    server = JobServer(address)
    if follow:
        _follow(server, job)
    else:
        _write(server.logs(job))


@app.command()
def stop(job: JobArgument, address: AddressOption = "") -> None:
    """Stop a job; submitting the same configuration again goes on where it stopped."""
    from galray.cluster.submission import JobServer

    stopped = JobServer(address).stop(job)
    typer.echo("stopping" if stopped else "had ended before")


def _follow(server: JobServer, identity: str) -> None:
    job = server.follow(identity, _write)
    typer.echo(f"{job.id}: {job.status}", err=True)
    if job.exit_code:
        raise typer.Exit(job.exit_code)


def environment(pairs: list[str]) -> dict[str, str]:
    """``A=B`` pairs as a dictionary.

    Raises:
        GalrayError: One is not of that form.
    """
    found = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise GalrayError(
                f"--env {pair}: not of the form NAME=VALUE", "for example --env OMP_NUM_THREADS=4"
            )
        found[key] = value
    return found


def _write(text: str) -> None:
    """Print a piece of a log as it comes."""
    typer.echo(text, nl=False)
