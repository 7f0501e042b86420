"""Dark haloes of dwarf galaxies: regenerated Gaia Challenge models, coverage, time, and five real galaxies.

Every fit is a part of its own, kept under ``runs/benchmarks/dwarf`` by the hash of its data and settings (not
of the code: ``--again`` measures all anew), so that a start that was interrupted goes on where it stopped and
rows that were measured stand in the results with their own date.

    python -m benchmarks.dwarf [--quick] [--only WORD ...] [--again] [--jobs 2]

``--only`` takes groups: given, marginalised, models, coverage, cusp, sixd, time, forms, real.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import Bench, Row
from galray.provenance import content_hash, write_atomic

PARTS = Path(__file__).parents[1] / "runs" / "benchmarks" / "dwarf"
MODELS = tuple(
    f"{s}{h}{o}" for s in ("Plum", "NonPlum") for h in ("Core", "Cusp") for o in ("Om", "Iso", "Tan")
)
GRAVSPHERE = "gravsphere: 339 CPU-s of preparation, days of chains"


def anisotropy(model: str) -> dict[str, Any]:
    """The true anisotropy of a model, as settings."""
    from galray.mocks.dwarfs import GAIA_CHALLENGE

    if model.endswith("Om"):
        return {"kind": "osipkov_merritt", "radius": GAIA_CHALLENGE[model].anisotropy_radius}
    if model.endswith("Tan"):
        return {"kind": "constant", "inner": -0.5}
    return {"kind": "isotropic"}


# Parts: one fit each, kept on disk ----------------------------------------------------------------------


def fit_part(task: dict[str, Any]) -> dict[str, Any]:
    """Fit one realisation of a model and compare it with the truth.

    Arguments:
        task: ``model``, ``stars``, ``realisation``, ``given`` (β or marginalised).

    Returns:
        Ratios to the truth and places of the truth in the posterior.
    """
    import torch

    from galray.dwarf import HaloFitSettings, Tracers, fit_halo
    from galray.mocks.dwarfs import gaia_challenge

    torch.set_num_threads(1)
    begin = time.process_time()
    mock = gaia_challenge(task["model"])
    w = mock.sample_noisy(task["stars"], 1000 + task["realisation"]).numpy()
    beta = anisotropy(task["model"]) if task["given"] else {}
    settings = HaloFitSettings.model_validate({"anisotropy": beta})
    halo = fit_halo(Tracers.project(w, name=task["model"]), settings, task["realisation"])
    half = mock.half_light_radius
    # in half-light radii the range of the first model's bar: 0.1 to 1 kpc of R_half = 0.245
    r = half * np.geomspace(0.1, 1.0, 31) / 0.245
    density = halo.density(r) / mock.density(r)
    central = np.array([0.15])
    slope = halo.slope(central)[:, 0]
    probes = half * np.array([0.5, 1.0, 2.0, 3.0])
    ranks = {
        "density": (halo.density(probes) < mock.density(probes)).mean(0).tolist(),
        "mass": (halo.mass(probes) < mock.mass(probes)).mean(0).tolist(),
    }
    levels = [0.025, 0.16, 0.5, 0.84, 0.975]
    return {
        "r": r.tolist(),
        "density": np.quantile(density, levels, axis=0).tolist(),
        "rho150": np.quantile(halo.density(central)[:, 0] / mock.density(central), levels).tolist(),
        "mass_half": np.quantile(halo.mass([half])[:, 0] / mock.mass(np.array([half])), levels).tolist(),
        "slope": [float(value) for value in np.quantile(slope, levels)],
        "core": float((slope < 0.5).mean()),
        "cusp": float((slope > 0.8).mean()),
        "ranks": ranks,
        "diagnostics": halo.diagnostics,
        "cpu_seconds": time.process_time() - begin,
    }


def part(task: dict[str, Any]) -> dict[str, Any]:
    """A part from the disk, or done now and kept there."""
    path = PARTS / f"{content_hash(task)}.json"
    if path.is_file():
        return json.loads(path.read_text())
    found = fit_part(task) | {"task": task}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, found)
    return found


def parts(tasks: Sequence[dict[str, Any]], jobs: int) -> list[dict[str, Any]]:
    """Several parts, so many at a time."""
    if jobs == 1:
        return [part(task) for task in tasks]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(part, tasks))


def tasks(model: str, stars: int, count: int, *, given: bool) -> list[dict[str, Any]]:
    """The parts of one row: realisations of a model."""
    return [{"model": model, "stars": stars, "realisation": i, "given": given} for i in range(count)]


def _cpu(found: Sequence[dict[str, Any]]) -> float:
    return sum(one["cpu_seconds"] for one in found)


def _median_error(found: Sequence[dict[str, Any]], low: float, high: float) -> float:
    """Largest |median over realisations of ρ/ρ_true − 1| between two radii in kpc."""
    r = np.array(found[0]["r"])
    ratio = np.median([one["density"][2] for one in found], axis=0)
    inside = (r >= low * 0.999) & (r <= high * 1.001)
    return float(np.abs(ratio[inside] - 1).max())


def _typical_error(found: Sequence[dict[str, Any]], low: float, high: float) -> float:
    """Largest over the radii of the median over realisations of |ρ/ρ_true − 1|: what one galaxy meets.

    `_median_error` is the bias alone: realisations that err up and down by the same make it vanish.
    """
    r = np.array(found[0]["r"])
    error = np.median([np.abs(np.array(one["density"][2]) - 1) for one in found], axis=0)
    inside = (r >= low * 0.999) & (r <= high * 1.001)
    return float(error[inside].max())


def _typical_off(found: Sequence[dict[str, Any]], name: str) -> float:
    """Median over realisations of |posterior's median over the truth − 1|."""
    return float(np.median([abs(one[name][2] - 1) for one in found]))


def _held_row(bench: Bench, head: str, found: Sequence[dict[str, Any]]) -> None:
    """Mean over realisations and radii: how often the 95 % band holds the truth.

    The radii of one realisation err together, so ten realisations leave an error that stands beside.
    """
    held = [_held([one]) for one in found]
    error = float(np.std(held) / math.sqrt(max(len(held) - 1, 1)))
    bench.row(
        f"{head}mean part of radii inside the 95 % band",
        float(np.mean(held)),
        peer=f"nominal 0.95, error {error:.3f}",
        cpu_seconds=_cpu(found),
    )


def _held(found: Sequence[dict[str, Any]]) -> float:
    """Median over realisations of the part of the radii at which the 95 % band holds the truth."""
    held = [
        np.mean([lo <= 1 <= hi for lo, hi in zip(f["density"][0], f["density"][4], strict=True)])
        for f in found
    ]
    return float(np.median(held))


def _off(found: Sequence[dict[str, Any]], name: str) -> float:
    """|median over realisations of the posterior's median over the truth − 1|."""
    return float(abs(np.median([one[name][2] for one in found]) - 1))


# Groups of rows -----------------------------------------------------------------------------------------


def given(bench: Bench, jobs: int) -> None:
    """PlumCoreOm with β given."""
    count = 2 if bench.quick else 10
    found = parts(tasks("PlumCoreOm", 10_000, count, given=True), jobs)
    head, cpu = f"PlumCoreOm 10,000 stars, beta given, median of {count}: ", {"cpu_seconds": _cpu(found)}
    bench.row(
        f"{head}|drho|/rho 0.15-0.7 kpc", _median_error(found, 0.15, 0.7), bar=0.2, peer=GRAVSPHERE, **cpu
    )
    bench.row(f"{head}|drho|/rho 0.1-1 kpc", _median_error(found, 0.1, 1.0), bar=0.35, **cpu)
    bench.row(f"{head}radii inside the 95 % band", _held(found), bar=0.9, at_least=True, **cpu)
    bench.row(f"{head}|dM|/M within R_half", _off(found, "mass_half"), bar=0.05, **cpu)
    bench.row(f"{head}|drho|/rho at 150 pc", _off(found, "rho150"), bar=0.15, **cpu)
    one = f"PlumCoreOm 10,000 stars, beta given, one of {count}: "
    bench.row(f"{one}typical |drho|/rho 0.15-0.7 kpc", _typical_error(found, 0.15, 0.7), bar=0.2, **cpu)
    bench.row(f"{one}typical |drho|/rho 0.1-1 kpc", _typical_error(found, 0.1, 1.0), bar=0.35, **cpu)
    bench.row(f"{one}typical |drho|/rho at 150 pc", _typical_off(found, "rho150"), bar=0.15, **cpu)
    bench.row(f"{one}typical |dM|/M within R_half", _typical_off(found, "mass_half"), bar=0.05, **cpu)
    _held_row(bench, one, found)
    found = parts(tasks("PlumCoreOm", 1000, count, given=True), jobs)
    head, cpu = f"PlumCoreOm 1,000 stars, beta given, median of {count}: ", {"cpu_seconds": _cpu(found)}
    bench.row(f"{head}radii inside the 95 % band", _held(found), bar=0.9, at_least=True, **cpu)
    bench.row(f"{head}|dM|/M within R_half", _off(found, "mass_half"), bar=0.1, **cpu)
    one = f"PlumCoreOm 1,000 stars, beta given, one of {count}: "
    bench.row(f"{one}typical |drho|/rho 0.15-0.7 kpc", _typical_error(found, 0.15, 0.7), **cpu)
    bench.row(f"{one}typical |dM|/M within R_half", _typical_off(found, "mass_half"), bar=0.1, **cpu)
    _held_row(bench, one, found)


def marginalised(bench: Bench, jobs: int) -> None:
    """PlumCoreOm with β marginalised: wider bands that still hold."""
    count = 1 if bench.quick else 10
    for stars in (1000, 10_000):
        free = parts(tasks("PlumCoreOm", stars, count, given=False), jobs)
        bound = parts(tasks("PlumCoreOm", stars, count, given=True), jobs)
        head = f"PlumCoreOm {stars:,} stars, beta marginalised, median of {count}: "
        cpu = {"cpu_seconds": _cpu(free)}
        widths = [
            np.median(np.log(np.array(f["density"][4]) / np.array(f["density"][0]))) for f in (*free, *bound)
        ]
        ratio = np.median(widths[: len(free)]) / np.median(widths[len(free) :])
        bench.row(f"{head}radii inside the 95 % band", _held(free), bar=0.9, at_least=True, **cpu)
        one = f"PlumCoreOm {stars:,} stars, beta marginalised, one of {count}: "
        _held_row(bench, one, free)
        bench.row(f"{one}typical |drho|/rho 0.15-0.7 kpc", _typical_error(free, 0.15, 0.7), **cpu)
        bench.row(f"{head}width of the band over that with beta given", ratio, bar=1.0, at_least=True, **cpu)
        bench.row(f"{head}|dM|/M within R_half", _off(free, "mass_half"), **cpu)


def models(bench: Bench, jobs: int) -> None:
    """Twelve models with β given."""
    for stars in (1000,) if bench.quick else (1000, 10_000):
        found = parts([tasks(model, stars, 1, given=True)[0] for model in MODELS], jobs)
        for model, one in zip(MODELS, found, strict=True):
            head, cpu = f"{model} {stars:,} stars: ", {"cpu_seconds": one["cpu_seconds"]}
            half = _range(model)
            bench.row(f"{head}|drho|/rho 0.6-2.9 R_half", _median_error([one], 0.6 * half, 2.9 * half), **cpu)
            bench.row(f"{head}radii inside the 95 % band", _held([one]), **cpu)
            bench.row(f"{head}|dM|/M within R_half", _off([one], "mass_half"), **cpu)
        cpu = {"cpu_seconds": _cpu(found)}
        head = f"12 models, {stars:,} stars: "
        held = np.mean([_held([one]) for one in found])
        bench.row(f"{head}mean part of radii inside the 95 % band", held, bar=0.9, at_least=True, **cpu)
        middle = np.median([_off([one], "mass_half") for one in found])
        bar = 0.1 if stars == 1000 else 0.05
        bench.row(f"{head}median |dM|/M within R_half", middle, bar=bar, **cpu)


def _range(model: str) -> float:
    from galray.mocks.dwarfs import gaia_challenge

    return gaia_challenge(model).half_light_radius


def coverage(bench: Bench, jobs: int) -> None:
    """Small mocks of all models with the default prior of β: how often the bands hold the truth."""
    count, stars = (1, 300) if bench.quick else (9, 300)
    todo = [task for model in MODELS for task in tasks(model, stars, count, given=False)]
    found = parts(todo, jobs)
    for name in ("density", "mass"):
        ranks = np.array([one["ranks"][name] for one in found])
        for level in (0.68, 0.95):
            inside = np.abs(ranks - 0.5) < 0.5 * level
            rate = float(inside.mean())
            error = float(inside.mean(1).std(ddof=1) / math.sqrt(len(found)))
            head = f"{len(found)} mocks of {stars} stars, 12 models, {name} at 0.5-3 R_half: "
            bench.row(
                f"{head}truth inside the {100 * level:.0f} % band",
                rate,
                peer=f"nominal {level:g}, error {error:.3f}",
                bar=level - 0.07 if level == 0.68 else level - 0.05,
                at_least=True,
                cpu_seconds=_cpu(found),
            )


def cusp(bench: Bench, jobs: int) -> None:
    """Core told from cusp at 10,000 stars, by the slope at 150 pc of the fits of `models`."""
    if bench.quick:
        return
    found = parts([tasks(model, 10_000, 1, given=True)[0] for model in MODELS], jobs)
    cpu = {"cpu_seconds": _cpu(found)}
    wrong, told = 0, 0
    for model, one in zip(MODELS, found, strict=True):
        right, other = ("core", "cusp") if "Core" in model else ("cusp", "core")
        told += one[other] < 0.05 and one[right] > one[other]
        wrong += one[right] < 0.05 and one[other] > one[right]
    bench.row(
        "core or cusp at 150 pc, 12 models, 10,000 stars: the opposite excluded, rightly",
        told,
        bar=8,
        at_least=True,
        **cpu,
    )
    bench.row(
        "core or cusp at 150 pc, 12 models, 10,000 stars: the opposite excluded, wrongly", wrong, bar=0, **cpu
    )
    cores = [one["slope"][2] for model, one in zip(MODELS, found, strict=True) if "Core" in model]
    cusps = [one["slope"][2] for model, one in zip(MODELS, found, strict=True) if "Cusp" in model]
    apart = float(np.mean([core < other for core in cores for other in cusps]))
    bench.row("pairs of core and cusp whose slopes are in order", apart, bar=0.95, at_least=True, **cpu)
    if "PlumCoreOm" in MODELS:
        bench.row("PlumCoreOm 10,000 stars: P(slope < 0.5)", found[0]["core"], peer="truth 0.39", **cpu)


def timing(bench: Bench, jobs: int) -> None:
    """One galaxy of 1,000 stars with eight members, through the command's own path."""
    import tempfile

    from galray.galaxies.config import load_dwarf_config
    from galray.galaxies.run import fit_galaxy

    with tempfile.TemporaryDirectory() as folder:
        options = [f"output={folder}", "tracking.enabled=false", "members.concurrent=0"]
        config = load_dwarf_config("plumcoreom", options)
        if bench.quick:
            config = load_dwarf_config("plumcoreom", [*options, "members.seeds=1", "members.bootstraps=0"])
        begin = time.perf_counter()
        with bench.cpu():
            result, _ = fit_galaxy(config)
        wall = time.perf_counter() - begin
    number = len(result.members)
    head = f"one galaxy of 1,000 stars, {number} members, products and page: "
    bench.row(f"{head}CPU time", bench._cpu / 60, "min", bar=10.0, peer=GRAVSPHERE)
    bench.row(f"{head}wall time on one core", wall / 60, "min")
    rho = result.quantity("rho_dm_150pc")
    assert rho.truth is not None
    inside = float(rho.quantiles[0] <= rho.truth <= rho.quantiles[4])
    bench.row(f"{head}rho(150 pc) inside its 95 % band", inside, bar=1.0, at_least=True)


def real(bench: Bench, jobs: int) -> None:
    """Five real galaxies in one fit-all."""
    default = Path(__file__).parents[1].resolve().parent / "shared" / "data"
    data = Path(os.environ.get("GALRAY_TEST_DATA", default)) / "dwarfs"
    if not data.is_dir():
        print(f"{data} is absent: the real galaxies are left out; set GALRAY_TEST_DATA", flush=True)
        return
    from galray.console import Console
    from galray.galaxies.config import DwarfConfig
    from galray.galaxies.run import find_jobs, fit_galaxies

    options = [f"output={PARTS.parent}", "members.concurrent=2", "cluster.num_cpus=2"]
    count = 1 if bench.quick else bench.options.members
    if count < 8:  # seeds alone: the statistical part of the error
        options += [f"members.seeds={count}", "members.bootstraps=0"]
        options += ["members.velocities=false", "members.smoothness=false"]
    from galray.config import validate_settings

    name = "dwarf-real-quick" if bench.quick else "dwarf-real"
    base = validate_settings(DwarfConfig, {"name": name}, options)
    found, _ = find_jobs(data, options)
    fleet = fit_galaxies(found, base, Console(interval=30.0), overwrite=True)
    cpu = {"cpu_seconds": sum(result.cpu_seconds for result in fleet.results)}
    # members of an earlier start are not fitted again: what they took then, two at a time
    wall = sum(o.seconds for outcome in fleet.outcomes for o in outcome.members) / 2
    bench.row(
        f"five real galaxies, {count} members each, fit-all on 2 cores",
        max(fleet.seconds, wall) / 60,
        "min",
        bar=60.0,
        **cpu,
    )
    bench.row("real galaxies measured", len(fleet.results), bar=5, at_least=True, **cpu)
    for result in fleet.results:
        own = {"cpu_seconds": result.cpu_seconds}
        shown = [v for v in result.published if v.quantity == "rho_150pc"]
        peer = "; ".join(f"{v.label} {v.value:g} +{v.plus:g} -{v.minus:g}" for v in shown)
        rho = result.quantity("rho_dm_150pc")
        spread = f" +{rho.plus / 1e7:.1f} -{rho.minus / 1e7:.1f}"
        bench.row(
            f"{result.title}: rho_DM(150 pc){spread}", rho.value / 1e7, "1e7 Msun/kpc3", peer=peer, **own
        )
        low, high = rho.quantiles[0] / 1e7, rho.quantiles[4] / 1e7
        inside = [v.value - 2 * v.minus <= high and v.value + 2 * v.plus >= low for v in shown]
        head = f"{result.title}: published rho(150 pc) that overlap within 95 %"
        bench.row(head, sum(inside), f"of {len(inside)}", bar=1, at_least=True, **own)
        mass = result.quantity("mass_half")
        walker, wolf = result.estimators
        peer = f"Walker {walker['mass']:.3g} (this fit there {walker['posterior'][2]:.3g}), "
        peer += f"Wolf {wolf['mass']:.3g} (this fit there {wolf['posterior'][2]:.3g})"
        half = result.quantity("half_light_radius").value
        bench.row(f"{result.title}: M(<R_half = {half:.3f} kpc)", mass.value, "Msun", peer=peer, **own)


def forms(bench: Bench, jobs: int) -> None:
    """The flow's fast form beside its ODE form, one training step each."""
    from benchmarks._dwarf_flows import measure_forms

    measure_forms(bench)


def sixd(bench: Bench, jobs: int) -> None:
    """Score and moments of 6D stars."""
    from benchmarks._dwarf_flows import measure_sixd

    measure_sixd(bench)


class Resumable(Bench):
    """A bench whose rows of earlier starts stand until they are measured again."""

    merge = True
    """Whether rows of other starts stand in the results; false measures all anew."""

    def write(self) -> None:
        """Write the rows measured so far, and those of starts at the same time."""
        if self.merge:
            self.keep()
        super().write()

    def keep(self) -> None:
        """Take over the rows that the results' file holds and this start has not measured."""
        if not self.path.is_file():
            return
        own = {row.name for row in self.rows}
        for row in json.loads(self.path.read_text())["rows"]:
            if row["name"] not in own:
                values = {key: row[key] for key in Row.__dataclass_fields__}
                self.rows.append(
                    Row(**(values | {"value": math.nan if row["value"] is None else row["value"]}))
                )


GROUPS: dict[str, Callable[[Bench, int], None]] = {
    "given": given,
    "marginalised": marginalised,
    "models": models,
    "coverage": coverage,
    "cusp": cusp,
    "time": timing,
    "forms": forms,
    "sixd": sixd,
    "real": real,
}


def measure(bench: Bench, only: Sequence[str] = (), jobs: int = 1) -> None:
    """Measure all groups, or some."""
    for name, group in GROUPS.items():
        if not only or name in only:
            group(bench, jobs)


def main() -> None:
    """Entry point: rows of groups that are not measured now stay in the results as they are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dwarf")
    parser.add_argument("--quick", action="store_true", help="a smaller run")
    parser.add_argument("--only", nargs="*", default=[], choices=sorted(GROUPS), help="groups of rows")
    parser.add_argument("--again", action="store_true", help="measure what was measured already")
    parser.add_argument("--jobs", type=int, default=1, help="fits at a time")
    parser.add_argument("--members", type=int, default=8, help="fits of a real galaxy; below 8, seeds alone")
    options = parser.parse_args()
    bench = Resumable("dwarf", quick=options.quick)
    bench.options = options
    bench.merge = not options.again
    if options.again and PARTS.is_dir():
        for path in PARTS.glob("*.json"):
            path.unlink()
        shutil.rmtree(PARTS.parent / "dwarf-real", ignore_errors=True)
    measure(bench, options.only, options.jobs)
    failed = [row.name for row in bench.rows if row.holds is False]
    print(f"{len(bench.rows)} rows, {len(failed)} bars do not hold; written to {bench.path}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
