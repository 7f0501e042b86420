"""The whole chain, stage by stage: mock → catalogue → members → moments → measure → report.

Each stage records the hash of its inputs and is skipped when they have not changed; `Pipeline.run` on a
killed run goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from galray import __version__
from galray.config import RunConfig, load_config, overrides_of
from galray.console import Advance, Console
from galray.errors import GalrayError
from galray.provenance import content_hash, file_hash, provenance, write_atomic
from galray.rundir import Run, RunDirectory, read_json, whole_folder

if TYPE_CHECKING:
    from galray.catalog import ShardStore
    from galray.ensemble import EnsembleSettings, MemberOutcome, MemberSpec
    from galray.tracking import Tracker

__all__ = ["Pipeline", "run"]

SUMMARY = {"headline", "quantities", "catalog", "run"}
"""What a summary holds at least, whichever inversion it is of."""

Until = Literal["mock", "catalog", "members", "measure", "report"]


def run(
    config: str | Path | RunConfig, *, quiet: bool = False, overwrite: bool = False, **overrides: Any
) -> Run:
    """Run the whole chain, or what is missing of it.

    Arguments:
        config: A TOML file, the name of a ready configuration, or a configuration.
        quiet: Print nothing.
        overwrite: Discard a run directory of another configuration.
        overrides: Keys to change, sections joined by two underscores: ``ensemble__concurrent=2``.
    """
    if not isinstance(config, RunConfig):
        texts = overrides_of({key.replace("__", "."): value for key, value in overrides.items()})
        config = load_config(config, texts)
    elif overrides:
        raise TypeError("overrides go with a file or a name; change a RunConfig by its own model_copy")
    return Pipeline(config, Console(quiet=quiet), overwrite=overwrite).run()


class Pipeline:
    """Runs a configuration in its run directory.

    Arguments:
        config: What to run.
        console: Where progress is printed.
        overwrite: Discard a run directory of another configuration.
    """

    def __init__(self, config: RunConfig, console: Console | None = None, *, overwrite: bool = False) -> None:
        self.config = config
        self.console = console or Console(quiet=True)
        self.directory = RunDirectory(config, overwrite=overwrite)
        self.folder = self.directory.path
        self.tracker: Tracker | None = None
        self._stack: ExitStack | None = None

    def run(self, until: Until = "report") -> Run:
        """Do every stage up to `until` that is not done yet, as one tracked run."""
        with self.session(), self._tracked():
            if self.config.mock is not None:
                self.run_mock()
            if until == "mock":
                return self._run()
            store = self.run_catalog()
            if until == "catalog":
                return self._run()
            store.require_stars()
            if "vertical" in self.config.methods:
                self.run_vertical(store)
            else:
                self.run_members(store)
                if until == "members":
                    return self._run()
                self.run_moments(store)
                self.run_measure(store)
            if until == "report":
                self.run_report()
            self._record_results()
        return self._run()

    def run_base_member(self, family: str) -> Path:
        """Train the base member of one family and measure its field; the member's folder."""
        if family not in ("flow", "score"):
            raise GalrayError(f"'{family}': no family of networks", "train flow or score")
        if not self._has(family):
            raise GalrayError(
                f"methods: {family} is not among the run's ({', '.join(self.config.methods)})",
                f"add it with --set 'methods=[\"{family}\"]'",
            )
        with self.session(), self._tracked():
            if self.config.mock is not None:
                self.run_mock()
            store = self.run_catalog()
            store.require_stars()
            outcomes = self.run_members(store, only=family)
        return outcomes[0].folder

    @contextmanager
    def session(self) -> Iterator[None]:
        """Claim and lock the run directory; nested calls share it."""
        if self._stack is not None:
            yield
            return
        # The configuration and its inputs are looked at before anything is started or written.
        self._preflight()
        with self._locked() as stack:
            self.directory.claim()
            stack.callback(self.directory.save)
            for quiet in ("ray", "mlflow", "alembic"):
                logging.getLogger(quiet).setLevel(logging.ERROR)
            yield

    @contextmanager
    def _locked(self) -> Iterator[ExitStack]:
        """Keep others out of the run directory; what is entered on the stack ends with the lock."""
        with self.directory.locked(), ExitStack() as stack:
            self._stack = stack
            try:
                yield stack
            finally:
                self._stack = None

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        """One MLflow run round the stages, which ends FINISHED or FAILED."""
        from galray.provenance import git_revision
        from galray.tracking import Tracker

        tags = {
            "galray.version": __version__,
            "galray.git": git_revision() or "",
            "galray.config_hash": self.config.hash,
            "galray.seed": str(self.config.seed),
        }
        parameters = self.config.model_dump(mode="json")
        with Tracker(self.config.tracking, self.folder, self.config.name, parameters, tags) as tracker:
            self.tracker = tracker
            try:
                yield
            finally:
                self.tracker = None

    def _run(self) -> Run:
        return Run(self.directory.place.location, self.directory.place.storage)

    def _record_results(self) -> None:
        """The run's numbers, figures, report and configuration into MLflow."""
        if self.tracker is None:
            return
        from galray.tracking.results import record_results

        record_results(self.tracker, self.folder, self._run().summary, self.directory.stage_seconds())

    def _preflight(self) -> None:
        from galray.planning import preflight

        preflight(self.config)
        self.directory.check()

    def connect(self) -> bool:
        """Connect to Ray when a stage first needs it; whether there is a cluster."""
        from galray.cluster import connect, is_connected

        if not self.config.cluster.enabled:
            return False
        if not is_connected() and self._stack is not None:
            with self.console.stage(
                "cluster", "starting Ray" if not self.config.cluster.address else "joining Ray"
            ):
                self._stack.enter_context(connect(self.config.cluster))
        return is_connected()

    # Stages ------------------------------------------------------------------------------------------------

    def run_mock(self) -> Path:
        """Generate the mock galaxy, observe it, write it in Gaia's bulk form with its truth beside."""
        mock = self.config.mock
        if mock is None:
            raise GalrayError(f"{self.config.name}: has no [mock] section", "add one, or use `galray run`")
        folder = self.folder / "mock"
        with self.session():
            inputs = [mock.model_dump(mode="json"), self.config.seed, self.config.catalog.frame.model_dump()]
            if not ((self.folder / "truth.json").is_file() and self.directory.place.sizes("mock")):
                self.directory.forget("mock")
            if not self.directory.is_done("mock", inputs):
                self.connect()
            self._stage("mock", f"{mock.galaxy.num_stars:,} stars in Gaia form", inputs, self._make_mock)
        return folder

    def _make_mock(self, advance: Advance) -> dict[str, int]:
        from galray.mock_files import write_mock

        with whole_folder(self.folder / "mock") as temporary:
            outcome, truth = write_mock(self.config, temporary, advance)
        self.directory.place.below("mock").settle()
        write_atomic(self.folder / "truth.json", truth)
        return outcome

    def run_catalog(self) -> ShardStore:
        """Turn the star files into shards of 6D stars, every row accounted for."""
        from galray.catalog import ShardStore, ingest

        settings = self.config.catalog
        if self.config.mock is not None:
            mock = self.directory.place.below("mock").location
            settings = settings.model_copy(update={"files": (mock,)})
        target = self.directory.place.below("shards").location
        with self.session():
            # `ingest` is idempotent by the checksums of its inputs, which is finer than a stage's record.
            connected = self.connect()
            from galray.cluster import may_grow, resources

            workers = max(int(resources().num_cpus), int(may_grow())) if connected else 0
            done: dict[str, Any] = {}

            def work(advance: Advance) -> dict[str, Any]:
                def progress(finished: int, total: int, text: str) -> None:
                    advance(finished / max(total, 1), text)

                store = ingest(
                    settings, target, num_workers=workers, seed=self.config.seed, progress=progress
                )
                done["store"] = store
                return {"stars": store.num_rows, "hash": store.hash}

            self._stage("catalog", "star files to shards", None, work)
            store = done.get("store") or ShardStore(target, settings.storage.signed)
            self._provenance(store)
        return store

    def _provenance(self, store: ShardStore) -> None:
        """Written when the inputs are known; a resumed run keeps the record of its first pass."""
        path = self.folder / "provenance.json"
        known = _dictionary(path)
        if (known.get("input_hash"), known.get("config_hash")) == (store.hash, self.config.hash):
            return
        write_atomic(path, provenance(self.config.hash, store.hash, self.config.seed))

    def _design(self, store: ShardStore) -> list[MemberSpec]:
        """The members of the run; each family's hash holds all that its members depend on."""
        from galray.ensemble import design
        from galray.planning import wanted_members

        config = self.config
        common = [
            store.hash,
            *([] if store.margin is None else [store.margin.hash]),
            config.places.model_dump(mode="json"),
            config.gravity.kernel.model_dump(mode="json"),
        ]
        hashes = {
            name: content_hash(
                [
                    *common,
                    getattr(config, name).model_dump(mode="json"),
                    getattr(config.training, name).model_dump(mode="json"),
                    config.gravity.potential.model_dump(mode="json"),
                    *([config.gravity.dust.model_dump(mode="json")] if config.gravity.dust else []),
                ]
            )
            for name in ("flow", "score")
        }
        if config.flow.missing_rv == "marginalise" and store.no_rv is not None:
            hashes["flow"] = content_hash([hashes["flow"], store.no_rv.hash])
        hashes["moments"] = content_hash([*common, config.gravity.moments.model_dump(mode="json")])
        return design(wanted_members(config), config.seed, hashes)

    def run_members(self, store: ShardStore, only: str | None = None) -> list[MemberOutcome]:
        """Train the members of the networks that are missing, side by side.

        Arguments:
            store: The run's shards.
            only: Train just the base member of this family.
        """
        from galray.ensemble import MemberStore, run_members
        from galray.measurement import require_stars

        specs = [spec for spec in self._design(store) if spec.family != "moments"]
        if only is not None:
            specs = [spec for spec in specs if spec.family == only and spec.varied == "base"]
            if not specs:
                raise GalrayError(
                    f"{only}: the run has no member of this family", f"set ensemble.{only}.seeds = 1"
                )
        if not specs:
            return []
        for condition in {spec.variation["where"] for spec in specs if "where" in spec.variation}:
            store.where(condition, [0])  # a condition that cannot be read ends the run now
        for family in dict.fromkeys(spec.family for spec in specs):
            if warning := require_stars(self.config, store, family):
                self.console.warn(warning)
        with self.session():
            self.connect()
            context = {"config": self.config.model_dump(mode="json"), "store": store.location}
            place = self.directory.place.below("members")
            fractions = dict.fromkeys((spec.id for spec in specs), 0.0)
            outcomes: list[MemberOutcome] = []

            def work(advance: Advance) -> dict[str, int]:
                def on_progress(spec: MemberSpec, fraction: float, note: str) -> None:
                    fractions[spec.id] = fraction
                    ended = sum(f >= 1 for f in fractions.values())
                    advance(sum(fractions.values()) / len(specs), f"{ended} of {len(specs)} members; {note}")

                def on_done(spec: MemberSpec, outcome: MemberOutcome) -> None:
                    on_progress(spec, 1.0, f"{spec.name} {outcome.status}")
                    if self.tracker is not None:
                        self.tracker.member(spec, outcome)

                if self.tracker is not None:
                    members = MemberStore(place)
                    for spec in specs:
                        self.tracker.follow(spec, members.work_path(spec))
                outcomes[:] = run_members(
                    specs,
                    "galray.measurement:run_member",
                    place,
                    context,
                    self._member_resources(),
                    on_done=on_done,
                    on_progress=on_progress,
                    workers={f: getattr(self.config.training, f).max_workers for f in ("flow", "score")},
                )
                finished = sum(outcome.finished for outcome in outcomes)
                return {"finished": finished, "failed": len(outcomes) - finished}

            # Members are idempotent each by its own address: the record only keeps the time.
            self._stage("members", f"{len(specs)} members", None, work)
        for outcome in outcomes:
            if not outcome.finished:
                self.console.warn(f"member {outcome.spec.name} failed: {outcome.error}")
        return outcomes

    def _member_resources(self) -> EnsembleSettings:
        """One after another in this process where Ray is off."""
        if not self.config.cluster.enabled:
            return self.config.ensemble.model_copy(update={"concurrent": 0})
        return self.config.ensemble

    def run_moments(self, store: ShardStore) -> None:
        """The weak-form inversion: the catalogue as measured with its jackknife, then each redraw."""
        if "moments" not in self.config.methods:
            return
        specs = [spec for spec in self._design(store) if spec.family == "moments"]
        with self.session():
            self.connect()
            inputs = [[spec.id for spec in specs], store.hash]
            if not (self.folder / "fields" / "moments" / "penalty.safetensors").is_file():
                self.directory.forget("moments")
            text = f"{len(specs)} passes over the shards"
            self._stage("moments", text, inputs, lambda advance: self._make_moments(store, specs, advance))

    def _make_moments(self, store: ShardStore, specs: list[MemberSpec], advance: Advance) -> dict[str, float]:
        from galray.store_moments import measure_moment_members

        with whole_folder(self.folder / "fields" / "moments") as target:
            return measure_moment_members(self.config, store, specs, target, advance)

    def unblind(self) -> Run:
        """Take the hidden offset off a finished run: tables, figures, report and MLflow's numbers anew."""
        from galray.blinding import open_envelope
        from galray.catalog import ShardStore

        with self._locked() as stack, self._tracked():
            stack.callback(self.directory.save)
            open_envelope(self.folder)
            self.run_measure(ShardStore.at(self.directory.place.below("shards")))
            self.run_report()
            self._record_results()
        return Run(self.folder)

    def run_measure(self, store: ShardStore) -> None:
        """Members to values with an error budget, methods to one value, values to tables."""
        from galray.blinding import is_blind
        from galray.calibration.inflation import calibration_table

        with self.session():
            inputs = [
                sorted(path.read_text() for path in (self.folder / "members").glob("[0-9]*/result.json")),
                read_json(self.folder / "stages" / "moments.json")["inputs"]
                if self._has("moments")
                else None,
                store.hash,
                self.config.hash,
                *([file_hash(calibration_table(self.config))] if self.config.calibration.apply else []),
            ]
            if self.config.blind:
                inputs.append(is_blind(self.config, self.folder))
            self._look_at_summary()
            text = "error budget and tables"
            if self._stage("measure", text, inputs, lambda advance: self._make_measure(store)):
                self._stamp_time()

    def _has(self, method: str) -> bool:
        return method in self.config.methods

    def _make_measure(self, store: ShardStore) -> dict[str, Any]:
        from galray.combination import combine_run

        content = combine_run(self.config, self.folder, store, self._design(store))
        return {key: content["headline"][key] for key in ("value", "error", "pull")}

    def run_vertical(self, store: ShardStore) -> None:
        """The vertical inversion of local stars with a known selection."""
        from galray.local import measure_local

        def work(advance: Advance) -> dict[str, Any]:
            def progress(done: int, total: int) -> None:
                advance(done / total, f"{done} of {total} replicas of three inversions")

            return measure_local(self.config, self.folder, store, progress)

        with self.session():
            inputs = [store.hash, self.config.hash]
            self._look_at_summary()
            if self._stage("measure", "vertical inversion", inputs, work):
                self._stamp_time()

    def _look_at_summary(self) -> None:
        """Have the summary made again where it is absent or broken."""
        if not _dictionary(self.folder / "results" / "summary.json").keys() >= SUMMARY:
            self.directory.forget("measure")

    def run_report(self) -> Path:
        """Figures and the page."""
        from galray.provenance import git_revision
        from galray.report import build

        path = self.folder / "report.html"
        with self.session():
            inputs = [file_hash(self.folder / "results" / "summary.json"), __version__, git_revision()]
            if not path.is_file():
                self.directory.forget("report")
            self._stage("report", "figures and one page", inputs, lambda advance: str(build(self.folder)))
        return path

    def _stamp_time(self) -> None:
        """What each stage took, into the summary, now that the last of them is recorded."""
        path = self.folder / "results" / "summary.json"
        summary = read_json(path)
        stages = self.directory.stage_seconds()
        summary["run"] |= {"seconds": round(sum(stages.values()), 1), "stage_seconds": stages}
        write_atomic(path, summary)

    def _stage(self, name: str, text: str, inputs: Any, work: Callable[[Advance], Any]) -> bool:
        """A recorded stage with its progress; `inputs` None always works and only keeps the time."""
        if inputs is not None and self.directory.is_done(name, inputs):
            self.console.say(f"  {name:<10} unchanged, skipped")
            return False
        with self.console.stage(name, text) as advance:
            return self.directory.stage(name, inputs, lambda: work(advance))


def _dictionary(path: Path) -> dict[str, Any]:
    """A JSON file's dictionary; empty where the file is absent or broken and will be written again."""
    try:
        content = read_json(path)
    except GalrayError:
        return {}
    return content if isinstance(content, dict) else {}
