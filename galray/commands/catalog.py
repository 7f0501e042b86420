"""``galray catalog``: star files and shard stores."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from galray.commands.options import ConfigArgument, OverwriteOption, SetOption, make_pipeline

__all__ = ["app"]

app = typer.Typer(help="Star files and shard stores.", no_args_is_help=True)

StoreArgument = Annotated[str, typer.Argument(help="A shard store: the folder or URL with manifest.json.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


class Via(Enum):
    """Where the rows of a fetch are chosen: here, or by the archive."""

    FILES = "files"
    ARCHIVE = "archive"


EndpointOption = Annotated[
    str | None, typer.Option(metavar="URL", help="An S3-compatible service other than Amazon's.")
]
AnonymousOption = Annotated[
    bool, typer.Option("--anonymous", help="Read an object store without credentials.")
]


@app.command()
def ingest(
    config: ConfigArgument,
    set_: SetOption = None,
    allow_bad: Annotated[
        int | None, typer.Option(metavar="N", help="Quarantine up to N unreadable files (allow_bad).")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Ray workers started here; 0: this process alone.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn star files into shards of 6D stars, and account for every row."""
    overrides = list(set_ or [])
    if allow_bad is not None:
        overrides.append(f"catalog.allow_bad={allow_bad}")
    if workers is not None:
        overrides.append(f"cluster.num_cpus={workers}" if workers else "cluster.enabled=false")
    pipeline = make_pipeline(config, overrides, overwrite=overwrite)
    with pipeline.session():
        store = pipeline.run_catalog()
    _print_account(store)


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(help="A star file or a HATS catalogue's root, by path or URL, or a shard store."),
    ],
    release: Annotated[
        str | None, typer.Option(help="Gaia release whose column types apply; dr3 by default.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read metadata and the head only; the end is not checked.")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="Read as this configuration says (release, rename, states, …)."),
    ] = None,
    endpoint: EndpointOption = None,
    anonymous: AnonymousOption = False,
    json: JsonOption = False,
) -> None:
    """Say what a star file or a store holds; exit code 1 when something is wrong with it."""
    from galray.catalog import CatalogSettings, inspect

    settings = CatalogSettings()
    if config is not None:
        from galray.config import load_config

        settings = load_config(config).catalog
    storage = settings.storage
    if endpoint is not None or anonymous:
        given: dict[str, Any] = {"endpoint": endpoint or storage.endpoint}
        given["skip_signature"] = anonymous or storage.skip_signature
        storage = type(storage).model_validate({**storage.model_dump(), **given})
    found = inspect(
        path,
        release or settings.release,
        quick=quick,
        rename=settings.rename,
        storage=storage,
        states=settings.states,
    )
    if json:
        _print_json(found)
    else:
        from galray.commands.catalog_text import inspection

        _print(inspection(found))
    _stop_with(found["problems"])


@app.command()
def verify(
    store: StoreArgument,
    quick: Annotated[bool, typer.Option("--quick", help="Sizes, footers and counts; no checksums.")] = False,
    json: JsonOption = False,
) -> None:
    """Check a store's checksums, counts, schema and row account; exit code 1 names what is spoiled."""
    from galray.catalog import verify

    found = verify(store, checksums=not quick)
    if json:
        _print_json(found.to_dict())
    else:
        from galray.commands.catalog_text import verification

        _print(verification(found, quick))
    _stop_with(found.problems)


@app.command()
def summary(
    store: StoreArgument,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw figures there, SVG and PNG.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Compute on Ray: the cluster of RAY_ADDRESS, or one started here.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Print and plot a store: sky, magnitudes, distances, velocities, and the fate of every row."""
    from contextlib import nullcontext

    from galray.catalog import summarize

    connection: Any = nullcontext()
    if ray:
        from galray.cluster import ClusterSettings, connect

        connection = connect(ClusterSettings())
    with connection:
        found = summarize(store)
    if json:
        _print_json(found.to_dict())
    else:
        from galray.commands.catalog_text import store_summary

        _print(*store_summary(found))
    if figures is not None:
        from galray.report.catalog import write_figures

        written = write_figures(found, figures)
        typer.echo(f"{len(written)} figures in {figures}", err=json)


@app.command()
def fetch(
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the files; catalog.files may name it.")
    ] = None,
    release: Annotated[str, typer.Option(help="Gaia release.")] = "dr3",
    healpix: Annotated[
        str | None,
        typer.Option(metavar="LEVEL:PIX,…", help="Nested HEALPix pixels, such as 5:1234,2000-2003."),
    ] = None,
    cone: Annotated[
        str | None, typer.Option(metavar="RA,DEC,RADIUS", help="A cone on the sky in deg (ICRS).")
    ] = None,
    files: Annotated[int | None, typer.Option(metavar="N", help="The first N files or tiles.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="Only these columns; 6d: what an ingest of 6D stars reads."),
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="Only rows that meet this, such as 'ruwe < 1.4'.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="URL|DIR",
            help="A mirror of the bulk files, the root of a HATS catalogue, or of a TAP service.",
        ),
    ] = None,
    via: Annotated[
        Via, typer.Option(help="Read files, or have the Gaia archive choose the rows (TAP).")
    ] = Via.FILES,
    chunks: Annotated[
        int | None,
        typer.Option(metavar="N", help="Ranges of source_id to ask the archive for; one too large is cut."),
    ] = None,
    endpoint: EndpointOption = None,
    anonymous: AnonymousOption = False,
    workers: Annotated[int, typer.Option(metavar="N", help="Files or jobs at a time.")] = 4,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print how much it is only.")] = False,
    print_adql: Annotated[
        bool,
        typer.Option("--print-adql", help="Print the query for these rows to the Gaia archive."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Fetch Gaia's catalogue, or a part of it; run it again to go on after a break.

    Without --columns and --where these are ESA's bulk files, whole and checked against their MD5 (753 GB for
    all of DR3; --healpix and --cone choose the files that overlap). With them, or where --source is the root
    of a HATS catalogue, its tiles are read with those columns, rows and exactly that region alone, by default
    from the public copy in S3, and written as a smaller HATS catalogue. The chosen columns of a tile cross
    the network whole, however few rows are kept: --dry-run tells how much that is.

    With --via archive the Gaia archive chooses the rows and sends these alone, without login: gigabytes for
    the 33.8 million stars with radial velocity of --columns 6d --where "radial_velocity IS NOT NULL". Its TAP
    service (--source names another) runs the query by ranges of source_id, each answer becomes a Parquet
    file, and a range with more rows than an answer may have is cut in two. --print-adql prints the query.
    """
    from galray.catalog import Region, TileQuery, archive_query, fetch
    from galray.catalog.storage import StorageSettings
    from galray.errors import GalrayError

    if healpix is not None and cone is not None:
        raise GalrayError("two regions are given", "use --healpix or --cone")
    region = Region.from_healpix(healpix) if healpix is not None else None
    region = Region.from_cone(cone) if cone is not None else region
    names = tuple(name.strip() for name in columns.split(",") if name.strip()) if columns else ()
    if columns is not None and not names:
        raise GalrayError("--columns names none", "name them with commas between")
    if print_adql:
        if files is not None:
            raise GalrayError("--files has no counterpart in a query", "use --healpix or --cone")
        typer.echo(archive_query(TileQuery(names, where, region), release))
        return
    found = fetch(
        to,
        release,
        region=region,
        files=files,
        columns=names,
        where=where,
        source=source,
        via=via.value,
        chunks=chunks,
        storage=StorageSettings(endpoint=endpoint, skip_signature=anonymous),
        workers=workers,
        dry_run=dry_run,
        advance=None if json else _progress("files" if via is Via.FILES else "ranges"),
    )
    if json:
        _print_json(found)
    else:
        from galray.commands.catalog_text import fetched

        typer.echo(fetched(found, to))


def _progress(unit: str) -> Any:
    """Prints how far a fetch is: at most every ten seconds, and at its end."""
    import time

    begin = said = time.monotonic()

    def advance(done: int, number: int, received: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= 10:
            said = now
            rate = received / 1e6 / max(now - begin, 1e-9)
            typer.echo(f"  {done} of {number} {unit}, {received / 1e9:.2f} GB, {rate:.1f} MB/s", err=True)

    return advance


def _stop_with(problems: Any) -> None:
    if problems:
        raise typer.Exit(1)


def _print_json(content: Any) -> None:
    import json

    typer.echo(json.dumps(content, indent=1, default=str))


def _print(*parts: Any) -> None:
    import sys

    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(*parts, sep="\n", crop=False)


def _print_account(store: Any) -> None:
    account = store.row_account
    typer.echo(f"{store.num_rows} stars in {len(store.shards)} shards; the fate of every row:")
    for fate, count in account.items():
        typer.echo(f"  {fate:<36} {count:>12}")
    if not store.num_rows:
        typer.echo(
            f"no star has a radial velocity: the 6D view is empty, the others are in {store.no_rv.path}"
        )
    for entry in store.manifest["quarantined"]:
        typer.echo(f"  quarantined: {entry['path']}: {entry['reason']}")
