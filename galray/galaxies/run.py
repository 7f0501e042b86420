"""Fit one galaxy or many: their members side by side, then each galaxy's products, figures and page."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galray.catalog.mirror import Mirror, Place, open_place
from galray.catalog.storage import StorageSettings
from galray.cluster import connect
from galray.console import Console
from galray.dwarf.observation import Observation, counted
from galray.ensemble import MemberOutcome, MemberSpec, run_members
from galray.errors import GalrayError
from galray.galaxies.config import DwarfConfig, load_dwarf_config, recognise
from galray.galaxies.members import design, observe
from galray.galaxies.results import GalaxyResult, measure, write_tables
from galray.provenance import content_hash, provenance, write_atomic
from galray.rundir import RunDirectory
from galray.tracking import Tracker

__all__ = ["Fleet", "GalaxyOutcome", "Job", "find_jobs", "fit_galaxies", "fit_galaxy"]

FUNCTION = "galray.galaxies.members:fit_member"


@dataclass(frozen=True)
class Job:
    """One galaxy to fit.

    Arguments:
        name: Its name, unique among those fitted together.
        config: Its configuration; None where it could not be read.
        error: Why it could not.
    """

    name: str
    config: DwarfConfig | None
    error: str = ""


@dataclass
class GalaxyOutcome:
    """What became of one galaxy.

    Arguments:
        name: Its name.
        folder: Its run directory; None where it never got one.
        result: Its products; None where it failed.
        error: Why it failed, empty otherwise.
        members: Its members.
    """

    name: str
    folder: Path | None = None
    result: GalaxyResult | None = None
    error: str = ""
    members: tuple[MemberOutcome, ...] = ()


@dataclass
class Fleet:
    """Galaxies that were fitted together.

    Arguments:
        folder: The run directory.
        outcomes: Each galaxy's, in the order of the jobs.
        page: The comparison's page, or a single galaxy's.
        seconds: Wall time.
    """

    folder: Path
    outcomes: list[GalaxyOutcome]
    page: Path
    seconds: float

    @property
    def results(self) -> list[GalaxyResult]:
        """The products of the galaxies that were measured."""
        return [outcome.result for outcome in self.outcomes if outcome.result is not None]

    @property
    def failed(self) -> list[GalaxyOutcome]:
        """The galaxies that were not."""
        return [outcome for outcome in self.outcomes if outcome.result is None]


def find_jobs(
    folder: Path | str,
    overrides: list[str] | None = None,
    only: Sequence[str] = (),
    storage: StorageSettings | None = None,
) -> tuple[list[Job], list[str]]:
    """Find the galaxies of a folder: configurations (``*.toml``) and files of stars with a known name.

    Arguments:
        folder: The folder, or its URL.
        overrides: ``a.b=value``, for every galaxy.
        only: Names to take; all where empty.
        storage: How an object store is reached.

    Returns:
        The jobs, by name, and the names of files that were not recognised.

    Raises:
        GalrayError: The folder is absent or holds no galaxy.
    """
    place = open_place(folder, storage)
    _bring(place)
    folder = place.folder
    if not folder.is_dir():
        raise GalrayError(
            f"{place.location}: no such folder", "name the folder that holds the galaxies' files"
        )
    jobs: list[Job] = []
    skipped: list[str] = []
    used: set[Path] = set()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        if path.suffix != ".toml" and recognise(path) is None:
            skipped.append(path.name)
            continue
        try:
            config = load_dwarf_config(path, overrides)
        except GalrayError as error:
            jobs.append(Job(path.name.split(".")[0], None, str(error)))
            continue
        used.update(Path(p).expanduser() for p in (config.data.spectroscopy, config.data.photometry) if p)
        jobs.append(Job(config.name, config))
    skipped = [name for name in skipped if folder / name not in used]
    if only:
        absent = set(only) - {job.name for job in jobs}
        if absent:
            raise GalrayError(
                f"{place.location}: no galaxy {', '.join(sorted(absent))}",
                f"it holds {', '.join(job.name for job in jobs) or 'none'}",
            )
        jobs = [job for job in jobs if job.name in only]
    if not jobs:
        raise GalrayError(
            f"{place.location}: holds no galaxy that is known by its file's name",
            "put a configuration (NAME.toml with data.spectroscopy and galaxy.key) there for each",
        )
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise GalrayError(
                f"{place.location}: two galaxies are called '{name}'", "change `name` in one of them"
            )
    return jobs, skipped


def _bring(place: Place) -> None:
    """The files of a URL's folder, as they are now, but not what lies in folders below it."""
    if isinstance(place, Mirror):
        for path in place.folder.glob("*"):
            if path.is_file():
                path.unlink()
        place.fetch(*(name for name in place.sizes() if "/" not in name))


def fit_galaxy(
    config: DwarfConfig, console: Console | None = None, *, overwrite: bool = False
) -> tuple[GalaxyResult, Path]:
    """Fit one galaxy in its run directory, or what is missing of it.

    Arguments:
        config: Its configuration.
        console: Where progress is printed.
        overwrite: Discard a run directory of another configuration.

    Returns:
        Its products and its run directory.

    Raises:
        GalrayError: Bad data, or every fit failed.
    """
    observe(config)  # bad data must end the command before anything is started or written
    fleet = fit_galaxies([Job(config.name, config)], config, console, overwrite=overwrite, alone=True)
    outcome = fleet.outcomes[0]
    if outcome.result is None:
        raise GalrayError(
            f"{config.name}: {outcome.error}", f"read {config.place.location}/members/*/error.txt"
        )
    return outcome.result, fleet.folder


def fit_galaxies(
    jobs: Sequence[Job],
    base: DwarfConfig,
    console: Console | None = None,
    *,
    overwrite: bool = False,
    alone: bool = False,
) -> Fleet:
    """Fit galaxies together: one pool of members, as many at a time as the cluster holds.

    A galaxy with bad data is a reported failure, and the others go on. What is finished already is kept:
    the same call after a kill does the rest.

    Arguments:
        jobs: The galaxies.
        base: Its name, output, storage, tracking and cluster sections are those of the whole run.
        console: Where progress is printed.
        overwrite: Discard a run directory of another configuration.
        alone: The one galaxy's own run directory is the run's, without a folder below it.

    Raises:
        GalrayError: Every galaxy failed.
    """
    console = console or Console(quiet=True)
    begin = time.monotonic()
    directory = RunDirectory(base, overwrite=overwrite)
    directory.check()
    with directory.locked(), ExitStack() as stack:
        directory.claim()
        stack.callback(directory.save, *(f"{job.name}/" for job in jobs if not alone))
        for quiet in ("ray", "mlflow", "alembic"):
            logging.getLogger(quiet).setLevel(logging.ERROR)
        folder = directory.path
        outcomes = [GalaxyOutcome(job.name, error=job.error) for job in jobs]
        observations = _observe_all(jobs, outcomes, console)
        specs = _designs(jobs, observations)
        if not specs:
            raise GalrayError("; ".join(f"{o.name}: {o.error}" for o in outcomes), "mend the data")
        about = provenance(base.hash, content_hash([spec.context_hash for spec in specs]), base.seed)
        write_atomic(folder / "provenance.json", about)
        tags = {"galray.git": str(about["git"]), "galray.config": base.hash, "galray.kind": "dwarf"}
        params = base.model_dump(mode="json", exclude={"tracking", "cluster"})
        with Tracker(base.tracking, folder, base.name, params, tags) as tracker:
            done = _run(specs, jobs, observations, directory, base, console)
            for job, outcome in zip(jobs, outcomes, strict=True):
                if job.config is None or job.name not in observations:
                    _track_failure(tracker, outcome)
                    continue
                outcome.folder = folder if alone else folder / job.name
                _finish(job.config, outcome, observations[job.name], done, about, alone=alone)
                _track(tracker, job.config, outcome)
                said = outcome.result.summary["sentence"] if outcome.result else f"failed: {outcome.error}"
                console.say(said if outcome.result else f"{job.name}: {said}")
            fleet = Fleet(folder, outcomes, folder / "report.html", time.monotonic() - begin)
            if not alone:
                from galray.galaxies.page import build_comparison

                build_comparison(fleet, about)
            if fleet.results:
                tracker.artifact(fleet.page)
            _headline(tracker, fleet)
    return fleet


def _observe_all(
    jobs: Sequence[Job], outcomes: list[GalaxyOutcome], console: Console
) -> dict[str, Observation]:
    found = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        if job.config is None:
            console.warn(f"{job.name}: {job.error}")
            continue
        try:
            found[job.name] = observe(job.config)
        except GalrayError as error:
            outcome.error = str(error)
            console.warn(f"{job.name}: {error}")
            continue
        stars = found[job.name]
        console.say(
            f"  {job.name:<14} {len(stars)} stars, {stars.num_members:.1f} members ({counted(stars.account)})"
        )
    return found


def _designs(jobs: Sequence[Job], observations: dict[str, Observation]) -> list[MemberSpec]:
    specs: list[MemberSpec] = []
    for job in jobs:
        if job.config is not None and job.name in observations:
            specs += design(job.config, observations[job.name], first=len(specs))
    return specs


def _run(
    specs: list[MemberSpec],
    jobs: Sequence[Job],
    observations: dict[str, Observation],
    directory: RunDirectory,
    base: DwarfConfig,
    console: Console,
) -> list[MemberOutcome]:
    """Run the members; a run in which every one failed is told of galaxy by galaxy."""
    configs = {job.name: job.config.model_dump(mode="json") for job in jobs if job.config is not None}
    context = {"configs": configs, "observations": observations}
    place = directory.place.below("members")
    ended = 0
    finished: dict[str, MemberOutcome] = {}

    with _connected(base), console.stage("members", f"{len(specs)} fits") as advance:

        def on_done(spec: MemberSpec, outcome: MemberOutcome) -> None:
            nonlocal ended
            ended += 1
            finished[spec.id] = outcome
            advance(ended / len(specs), f"{spec.name}: {outcome.status}")

        try:
            run_members(specs, FUNCTION, place, context, base.members.ensemble(), on_done)
        except GalrayError:
            if len(finished) < len(specs):  # not the members' own failures
                raise
    return [finished[spec.id] for spec in specs]


@contextmanager
def _connected(base: DwarfConfig) -> Iterator[None]:
    """A Ray cluster, unless the members run in this process."""
    if base.members.concurrent == 0:
        yield
        return
    with connect(base.cluster):
        yield


def _finish(
    config: DwarfConfig,
    outcome: GalaxyOutcome,
    observation: Observation,
    done: list[MemberOutcome],
    about: dict[str, Any],
    *,
    alone: bool,
) -> None:
    """Make and write what is made of one galaxy."""
    from galray.config import to_toml
    from galray.galaxies.page import build_page

    assert outcome.folder is not None
    outcome.members = tuple(o for o in done if o.spec.family.partition("/")[0] == config.name)
    if not any(o.finished and "/" not in o.spec.family and not o.spec.bootstrap for o in outcome.members):
        errors = sorted({o.error for o in outcome.members if o.error})
        outcome.error = f"no fit finished: {'; '.join(errors)}"
        return
    outcome.folder.mkdir(exist_ok=True)
    own = about | {"config_hash": config.hash, "input_hash": outcome.members[0].spec.context_hash}
    if not alone:
        write_atomic(outcome.folder / "config.toml", to_toml(config))
        write_atomic(outcome.folder / "provenance.json", own)
    outcome.result = measure(config, observation, list(outcome.members))
    write_tables(outcome.result, outcome.folder / "results", own)
    build_page(outcome.result, outcome.folder, own)


def _track(tracker: Tracker, config: DwarfConfig, outcome: GalaxyOutcome) -> None:
    """One MLflow run for the galaxy, below the run's own."""
    result = outcome.result
    if result is None or outcome.folder is None:
        _track_failure(tracker, outcome)
        return
    metrics: dict[str, Any] = {}
    for quantity in result.quantities:
        names = ("low95", "low68", "median", "high68", "high95")
        metrics |= {
            f"{quantity.name}.{name}": value for name, value in zip(names, quantity.quantiles, strict=True)
        }
    metrics |= {"stars": len(result.observation), "members": result.observation.num_members}
    metrics |= {"core": result.cusp["core"], "cusp": result.cusp["cusp"], "cpu_seconds": result.cpu_seconds}
    folder = outcome.folder
    artifacts = [folder / "report.html", folder / "config.toml", folder / "results", folder / "figures"]
    tracker.child(
        identity=content_hash([o.spec.id for o in outcome.members]),
        name=config.name,
        params=config.model_dump(mode="json", exclude={"tracking", "cluster"}),
        tags={
            "galray.kind": "galaxy",
            "galray.galaxy": result.title,
            "galray.verdict": result.cusp["verdict"],
        },
        metrics=metrics,
        artifacts=[path for path in artifacts if path.exists()],
        seconds=sum(o.seconds for o in outcome.members),
    )


def _track_failure(tracker: Tracker, outcome: GalaxyOutcome) -> None:
    tracker.child(
        identity=content_hash([outcome.name, outcome.error]),
        name=outcome.name,
        params={},
        tags={"galray.kind": "galaxy", "galray.error": outcome.error[:5000]},
        metrics={},
        artifacts=[],
        seconds=0.0,
        failed=True,
    )


def _headline(tracker: Tracker, fleet: Fleet) -> None:
    """Central density and mass of each galaxy on the parent run too."""
    metrics: dict[str, Any] = {"galaxies": len(fleet.results), "failed": len(fleet.failed)}
    for result in fleet.results:
        metrics[f"{result.name}.rho_dm"] = result.quantity("rho_dm_").value
        metrics[f"{result.name}.mass_half"] = result.quantity("mass_half").value
    tracker.metrics(metrics)
