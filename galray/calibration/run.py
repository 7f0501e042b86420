"""`galray calibrate`: measure many mock galaxies of known truth, and judge the errors that were claimed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from galray.calibration.measurement import finished, measure_mock
from galray.calibration.mocks import cache_place, check, draw, mock_config, outside, procedure
from galray.calibration.statistics import Claims, Coverage, coverage, fit_inflation
from galray.catalog.mirror import Place
from galray.config import RunConfig, load_config, to_toml
from galray.console import Console
from galray.ensemble import student_factor
from galray.errors import GalrayError
from galray.provenance import provenance, write_atomic
from galray.results import HEADLINE

__all__ = ["FEWEST", "NAMED", "Calibration", "Judgement", "calibrate", "judge"]

NAMED = (HEADLINE, "a_R", "a_z")
"""What a calibration exists for: ρ_DM averaged over heights, and gravity at the tabulated places."""
FEWEST = 20
"""With fewer mocks than this no inflation factor is fitted."""


@dataclass(frozen=True)
class Judgement:
    """How well one quantity's errors hold.

    Attributes:
        method: The inversion, or ``combined``.
        name: Name of the quantity.
        label: How it is written.
        where: Its place.
        unit: Its unit.
        claims: What the mocks claimed.
        raw: The errors as they came.
        inflation: Factor on the errors of all quantities of this method and name, fitted on the mocks of even
            number; NaN where there are too few. Never below 1: mocks are simpler than the sky, and no error
            shall be smaller for it.
        fitted: The same before the limit.
        inflation_error: Its standard error.
        tested: The inflated errors, on the mocks of odd number; None where nothing was fitted.
    """

    method: str
    name: str
    label: str
    where: str
    unit: str
    claims: Claims
    raw: Coverage
    inflation: float
    fitted: float
    inflation_error: float
    tested: Coverage | None

    @property
    def named(self) -> bool:
        """Whether it is one of those that the calibration exists for."""
        return self.name in NAMED


@dataclass
class Calibration:
    """A finished calibration.

    Attributes:
        config: What was calibrated.
        place: Where its tables and its page lie.
        records: What `measure_mock` kept of each mock that was measured, by number.
        failed: Why the others were not, by number.
        judgements: One for every method, quantity and place.
        new: How many mocks were measured by this call.
    """

    config: RunConfig
    place: Place
    records: dict[int, dict[str, Any]]
    failed: dict[int, str] = field(default_factory=dict)
    judgements: list[Judgement] = field(default_factory=list)
    new: int = 0

    @property
    def folder(self) -> Path:
        """The folder; of a calibration at a URL, this node's copy."""
        return self.place.folder

    @property
    def table(self) -> Path:
        """The table that a run names to have its errors inflated."""
        return self.folder / "calibration.ecsv"

    @property
    def page(self) -> Path:
        """Everything to look at."""
        return self.folder / "report.html"

    @property
    def identity(self) -> dict[str, Any]:
        """What a run that uses the calibration has to know of it."""
        settings, stars = self.config.calibration, [r["stars"] for r in self.records.values()]
        return {
            "name": self.config.name,
            "mocks": len(self.records),
            "failed": len(self.failed),
            "stars": int(np.median(stars)),
            "prior": settings.prior.model_dump(mode="json"),
            "terms": sorted(self.terms - set(outside(self.config))),
            "outside": outside(self.config),
            "procedure": procedure(self.config),
            **provenance(self.config.hash, None, self.config.seed),
        }

    @property
    def terms(self) -> set[str]:
        """Terms of the mocks' error budgets, calibrated or not."""
        return {name for record in self.records.values() for q in record["quantities"] for name in q["terms"]}

    def truth(self, index: int) -> dict[str, float]:
        """The numbers that a mock was drawn with."""
        return draw(self.config.calibration.prior, mock_config(self.config, index).seed)

    def find(self, method: str, name: str, where: str | None = None) -> Judgement:
        """The judgement of one quantity, at one of its places or at its only one."""
        found = [
            j for j in self.judgements if (j.method, j.name) == (method, name) and where in (None, j.where)
        ]
        if len(found) != 1:
            raise KeyError(f"{method} {name} {where or ''}: {len(found)} of that name")
        return found[0]


def calibrate(
    config: RunConfig | str | Path, *, console: Console | None = None, known: bool = False
) -> Calibration:
    """Measure the mocks that were not measured before, then judge all; goes on where a killed call stopped.

    Arguments:
        config: A configuration, its file or its name.
        console: Where progress is printed.
        known: Measure none, and judge those that were measured before: a look at a calibration that goes on.

    Returns:
        The calibration, whose tables and page are written to ``NAME-calibration`` beside the run's directory,
        at a URL too.

    Raises:
        GalrayError: It cannot be calibrated, or too few mocks were measured.
    """
    from galray.calibration.page import build_page
    from galray.calibration.tables import write_tables
    from galray.planning import preflight

    console = console or Console(quiet=True)
    if not isinstance(config, RunConfig):
        config = load_config(config)
    check(config)
    runs = [mock_config(config, index) for index in range(config.calibration.mocks)]
    preflight(runs[0])
    place = config.model_copy(update={"name": f"{config.name}-calibration"}).place
    place.clear()
    folder = place.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.toml", to_toml(config))
    # A store that refuses is heard of before anything is measured.
    place.push()
    cache_place(config).sizes("measurements/")
    found = {index: finished(run) for index, run in enumerate(runs)}
    missing = [] if known else [index for index, record in found.items() if record is None]
    failed = {}
    if missing:
        text = f"{len(missing)} of {len(runs)} mock galaxies"
        with _cluster(config, console), console.stage("calibrate", text) as advance:
            for index, record in _measure(runs, missing, advance):
                found[index] = record
                if "error" in record:
                    failed[index] = record["error"]
                    write_atomic(folder / f"failed-{index:04d}.txt", record["traceback"])
    records = {index: record for index, record in found.items() if record and "error" not in record}
    place.push()
    for index, why in failed.items():
        console.warn(f"mock {index} failed: {why}")
    if len(records) < 4:
        why = "".join(f": {text}" for text in list(failed.values())[:1])
        raise GalrayError(
            f"{len(records)} of {len(runs)} mocks were measured{why}",
            f"see {place.location}/failed-*.txt" if failed else "measure more of them: leave out --known",
        )
    judgements = judge(records, outside(config))
    result = Calibration(config, place, records, failed, judgements, len(missing) - len(failed))
    with console.stage("report", "tables, figures and one page"):
        write_tables(result)
        build_page(result)
        place.settle()
    return result


@contextmanager
def _cluster(config: RunConfig, console: Console) -> Iterator[None]:
    from galray.cluster import connect, is_connected

    if not config.cluster.enabled or is_connected():
        yield
        return
    with console.stage("cluster", "starting Ray" if not config.cluster.address else "joining Ray"):
        connection = connect(config.cluster)
    with connection:
        yield


def _measure(runs: list[RunConfig], missing: list[int], advance: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    from galray.cluster import stream_shards

    def progress(done: int, total: int) -> None:
        advance(done / total, f"{done} of {total} mocks")

    tasks = [runs[index].model_dump(mode="json") for index in missing]
    yield from zip(missing, stream_shards(measure_mock, tasks, progress=progress), strict=True)


def judge(records: dict[int, dict[str, Any]], outside: Sequence[str] = ()) -> list[Judgement]:
    """Judge every quantity that mocks were measured for.

    Arguments:
        records: Of `measure_mock`, by number of the mock: even ones fit the inflation, odd ones test it.
        outside: Terms that the mocks do not exercise: they are left out of the errors that are judged.
    """
    rows: dict[tuple[str, str, str], list[tuple[int, dict[str, Any]]]] = {}
    for index, record in sorted(records.items()):
        for row in record["quantities"]:
            if row["error"]:
                rows.setdefault((row["method"], row["name"], row["where"]), []).append((index, row))
    if len({method for method, _, _ in rows}) == 2:  # one inversion, and the same again as "combined"
        rows = {key: found for key, found in rows.items() if key[0] != "combined"}
    claims = {key: _claims(found, outside) for key, found in rows.items()}
    # What is exact by construction, as a_φ of an axially symmetric potential, claims nothing.
    claims = {key: c for key, c in claims.items() if len(c) >= 4 and not np.all(c.value == c.truth)}
    pooled: dict[tuple[str, str], list[Claims]] = {}
    for (method, name, _), c in claims.items():
        pooled.setdefault((method, name), []).append(c)
    factors = {key: _inflation(parts) for key, parts in pooled.items()}
    judgements = []
    for (method, name, where), c in claims.items():
        fitted, error = factors[method, name]
        factor, held_out = max(fitted, 1.0) if np.isfinite(fitted) else np.nan, c[c.mock % 2 == 1]
        tested = coverage(held_out.inflated(factor)) if np.isfinite(factor) and len(held_out) > 1 else None
        first = rows[method, name, where][0][1]
        judgements.append(
            Judgement(
                method,
                name,
                first["label"],
                where,
                first["unit"],
                c,
                coverage(c),
                factor,
                fitted,
                error,
                tested,
            )
        )
    return judgements


def _claims(found: list[tuple[int, dict[str, Any]]], outside: Sequence[str]) -> Claims:
    value, truth = (np.array([row[key] for _, row in found]) for key in ("value", "truth"))
    error, dof = np.array([_error(row, outside) for _, row in found]).T
    return Claims(value, error, truth, dof, np.array([index for index, _ in found]))


def _error(row: dict[str, Any], outside: Sequence[str]) -> tuple[float, float]:
    """Error and degrees of freedom of a measurement without some of its terms."""
    dof = row["dof"] or np.inf
    factor = float(student_factor(dof))  # the one that all terms share
    variance = (row["error"] / factor) ** 2
    spread = variance**2 / dof  # as Welch and Satterthwaite add it up
    for name in set(outside) & set(row["terms"]):
        term = (row["terms"][name] / factor) ** 2
        variance -= term
        spread -= term**2 / (row.get("dofs", {}).get(name) or np.inf)
    left = variance**2 / spread if spread > 0 else np.inf
    return math.sqrt(max(variance, 0.0)) * float(student_factor(left)), left


def _inflation(parts: list[Claims]) -> tuple[float, float]:
    """The factor of all places of one quantity, from the mocks of even number."""
    if len(np.unique(parts[0].mock)) < FEWEST:
        return float("nan"), float("nan")
    joined = Claims(
        *(np.concatenate([getattr(c, k) for c in parts]) for k in ("value", "error", "truth", "dof", "mock"))
    )
    return fit_inflation(joined[joined.mock % 2 == 0])
