"""Members to values with an error budget, methods to one value, values to the tables of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from galray import gravity, steady_state, summary
from galray.blinding import blinded, hidden_offset, is_blind
from galray.calibration.inflation import inflate
from galray.catalog import ShardStore
from galray.config import RunConfig
from galray.dust_products import combine_dust
from galray.ensemble import Estimate, MemberSpec, MemberStore, combine_family, combine_methods
from galray.ensemble.fields import member_fields
from galray.errors import GalrayError
from galray.frame import cylindrical
from galray.local_halo import fit_haloes, write_halo
from galray.measurement import load_evaluation, places_of
from galray.model_checks import member_checks
from galray.results import HEADLINE, Places, PlacesSettings
from galray.rundir import RunDirectory, read_json
from galray.seeds import seed_sequence
from galray.smoothing import with_smoothing
from galray.units import MSUN_PC3

__all__ = ["account", "combine_run", "moments_summary", "sample_stars"]

MIN_TEST_STARS = 5_000  # fewer say nothing of equilibrium
NUM_BARYON_DRAWS = 32
NUM_REPORT_STARS = 50_000


@dataclass
class MethodResult:
    """What one inversion gives.

    Attributes:
        estimate: Value and error budget.
        evaluations: Of its full-sample members.
        headlines: ρ_DM of every member by itself, by the member's number.
    """

    estimate: Estimate
    evaluations: list[dict[str, np.ndarray]]
    headlines: dict[int, float]


def combine_run(
    config: RunConfig, folder: Path, store: ShardStore, specs: Sequence[MemberSpec]
) -> dict[str, Any]:
    """Combine the members of a run and write ``results/``.

    Arguments:
        config: The run's configuration.
        folder: The run directory.
        store: Its shards.
        specs: Its design.

    Returns:
        The content of ``summary.json``.

    Raises:
        GalrayError: No method has a finished base member.
    """
    places = places_of(config, store)
    kernel = gravity.Kernel.from_settings(config.gravity.kernel)
    truth = read_json(folder / "truth.json") if config.mock is not None else None
    baryons = gravity.build(config.gravity.baryons, truth["baryons"] if truth else None)
    x = torch.from_numpy(places.x)
    subtracted = np.asarray(baryons.smoothed_density(x, kernel))
    offset = hidden_offset(config, folder)
    methods = {
        name: replace(found, estimate=blinded(found.estimate, places, offset))
        for name, found in collect(config, folder, specs, places, subtracted).items()
    }

    groups = [q.name for q in places.quantities]
    estimates = {name: method.estimate for name, method in methods.items()}
    if config.ensemble.smoothing_widths:
        fields = {
            name: [field for spec, field in pairs if spec.whole]
            for name, pairs in member_fields(folder).items()
        }
        estimates = with_smoothing(config, places, baryons, estimates, fields)
    estimates["combined"] = combine_methods(
        list(estimates.values()), groups=groups, settings=config.ensemble.budget
    )
    # What is subtracted is the same for all methods, so its error is added once, after combining.
    draws = [
        np.asarray(baryons.draw([config.seed, i]).smoothed_density(x, kernel))
        for i in range(NUM_BARYON_DRAWS)
    ]
    shifts = np.array([places.values(np.zeros_like(places.x), 0 * d, d - subtracted) for d in draws])
    spread = np.cov(shifts, rowvar=False)
    if np.nanmax(np.abs(spread)) > 0:
        estimates = {name: e.with_term("baryons", spread, NUM_BARYON_DRAWS) for name, e in estimates.items()}
    true = summary.truth_values(truth, places, kernel) if truth else None
    stars = steady_state.stars_of(store)
    tests = gravity.stellar_tests(stars, mirror=truth is not None) if len(stars) >= MIN_TEST_STARS else None
    residuals = steady_state.residual_maps(folder, specs, stars)
    equilibrium = steady_state.verdict(
        places,
        estimates,
        RunDirectory(config).outcome("moments") or {},
        tests=tests,
        residuals=residuals,
        checks=steady_state.field_checks(folder, stars, kernel),
        truth=truth,
    )
    disturbances = {}
    if tests is not None:
        disturbances = steady_state.disturbance_sizes(estimates, places, tests, len(stars))
        for name, causes in disturbances.items():
            errors = {cause: np.array([sizes[g] for g in groups]) for cause, sizes in causes.items()}
            estimates[name] = steady_state.with_disturbances(estimates[name], groups, errors)
    calibrated: dict[str, Any] = {}
    if config.calibration.apply:
        estimates, calibrated = inflate(config, places, estimates, store.num_rows)

    results = folder / "results"
    results.mkdir(exist_ok=True)
    maps = {name: map_values(places, method.evaluations, offset) for name, method in methods.items()}
    dust, slices = combine_dust(config, folder, store, truth)
    cells = steady_state.residual_cells(residuals) + slices
    summary.write_tables(results, places, estimates, true, maps, cells)
    summary.write_samples(results, places, estimates["combined"], config.seed)
    halo = fit_haloes(config.gravity.halo, places, kernel, estimates, true)
    write_halo(results, halo)
    sample_stars(store, config.seed, results / "stars.parquet")

    headlines = {i: value + offset for found in methods.values() for i, value in found.headlines.items()}
    members = member_rows(folder, headlines)
    record = read_json(folder / "provenance.json")
    combined = estimates["combined"]
    blind = is_blind(config, folder)
    warnings = ["every density carries a hidden offset; `galray unblind` takes it off"] if blind else []
    for name, estimate in estimates.items():
        warnings += [f"{name}: {member} was left out: {why}" for member, why in estimate.excluded.items()]
    warnings += [
        f"member {m['index']:03d} ({m['family']}) failed" for m in members if m["status"] == "failed"
    ]
    weights = combined.weights
    content: dict[str, Any] = {
        "run": summary.run_header(config, record) | {"blind": blind},
        "headline": summary.headline(places, estimates, true, kernel),
        "quantities": summary.quantity_rows(places, estimates, true),
        "budget": summary.budget_rows(places, estimates),
        "catalog": account(store),
        "halo": halo,
        "equilibrium": equilibrium,
        "disturbances": disturbances,
        "checks": member_checks(config, folder, store, list(specs)),
        "members": members,
        **({} if dust is None else {"dust": dust}),
        "weights": {}
        if weights is None
        else dict(zip(combined.methods, weights[:, places.index(HEADLINE)].tolist(), strict=True)),
        "warnings": warnings,
        "calibration": calibrated,
        "notes": [calibrated["sentence"]] if calibrated else [],
    }
    summary.write_summary(results, content)
    return content


def collect(
    config: RunConfig, folder: Path, specs: Sequence[MemberSpec], places: Places, baryons: np.ndarray
) -> dict[str, MethodResult]:
    """The estimate of each method from its finished members."""
    groups = [q.name for q in places.quantities]
    budget = config.ensemble.budget
    members = MemberStore(folder / "members")
    found: dict[str, MethodResult] = {}

    def values_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
        return places.values(arrays["acceleration"], arrays["density"], baryons)

    for family in ("flow", "score"):
        mine = [s for s in specs if s.family == family and _is_finished(members, s)]
        if any(spec.whole for spec in mine):
            evaluations = [load_evaluation(members.path(s) / "evaluation.safetensors") for s in mine]
            values = np.array([values_of(e) for e in evaluations])
            outcomes = [members.read(spec) for spec in mine]
            stars = [o.result.get("stars", 1) for o in outcomes if o is not None]
            estimate = combine_family(mine, values, groups=groups, settings=budget, stars=stars)
            whole = [e for s, e in zip(mine, evaluations, strict=True) if s.whole]
            found[family] = MethodResult(estimate, whole, _headlines(mine, values, places))
    mine = [s for s in specs if s.family == "moments"]
    if mine:
        source = folder / "fields" / "moments"
        evaluations = [load_evaluation(source / f"{s.slug}.safetensors") for s in mine]
        paths = sorted(source.glob("jackknife-*.safetensors"))
        replicas = np.array([values_of(load_evaluation(path)) for path in paths])
        spread = replicas - replicas.mean(0)
        values = np.array([values_of(e) for e in evaluations])
        estimate = combine_family(
            mine,
            values,
            groups=groups,
            jackknife=(len(replicas) - 1) / len(replicas) * spread.T @ spread,
            jackknife_blocks=len(replicas),
            settings=budget,
            stars=[_moment_stars(source, spec) for spec in mine],
        ).with_term("penalty", load_file(source / "penalty.safetensors")["covariance"])
        found["moments"] = MethodResult(estimate, evaluations[:1], _headlines(mine, values, places))
    if not found:
        raise GalrayError(f"{folder}: no method has a result", "look at members/*/error.txt")
    return found


def _headlines(specs: Sequence[MemberSpec], values: np.ndarray, places: Places) -> dict[int, float]:
    """ρ_DM of each member by itself, by its number."""
    return dict(zip((s.index for s in specs), values[:, places.index(HEADLINE)].tolist(), strict=True))


def _moment_stars(source: Path, spec: MemberSpec) -> int:
    """Number of stars behind a solution of the moments."""
    field = gravity.load_field(source / ("field" if spec.varied == "base" else spec.slug))
    return int(field.statistics["num_stars"])


def _is_finished(members: MemberStore, spec: MemberSpec) -> bool:
    """A member that failed leaves an outcome too."""
    outcome = members.read(spec)
    return outcome is not None and outcome.finished


def map_values(
    places: Places, evaluations: list[dict[str, np.ndarray]], offset: float
) -> dict[str, np.ndarray]:
    """a_R, a_z in (km/s)²/kpc and ρ in Msun/pc³, blinded, at the map's positions, members averaged."""
    rows = list(places.map_rows)
    acceleration = np.mean([e["acceleration"][rows] for e in evaluations], axis=0)
    c = cylindrical(places.x[rows])
    outward = np.stack([-np.cos(c[:, 1]), np.sin(c[:, 1])], -1)
    return {
        "a_R": (acceleration[:, :2] * outward).sum(-1),
        "a_z": acceleration[:, 2],
        "rho": np.mean([e["density"][rows] for e in evaluations], axis=0) / MSUN_PC3 + offset,
    }


def account(store: ShardStore) -> dict[str, Any]:
    """The fate of every row of the input."""
    fate = dict(store.row_account)
    rows_in = fate.pop("rows_in")
    return {"rows_in": rows_in, "kept": fate["kept"], "fate": fate, "hash": store.hash}


def member_rows(folder: Path, headlines: Mapping[int, float]) -> list[dict[str, Any]]:
    """What became of every member of the networks, with what each says of ρ_DM by itself."""
    rows = []
    for member in sorted((folder / "members").glob("[0-9][0-9][0-9]*")):
        if not (member / "spec.json").is_file():
            continue
        spec = read_json(member / "spec.json")
        outcome = read_json(member / "result.json") if (member / "result.json").is_file() else {}
        rows.append(
            {key: spec[key] for key in ("id", "index", "family", "seed", "bootstrap", "draw", "varied")}
            | {
                "status": outcome.get("status", "failed"),
                "best": outcome.get("result", {}).get("best"),
                "seconds": outcome.get("seconds"),
                HEADLINE: headlines.get(spec["index"]),
            }
        )
    return rows


def sample_stars(store: ShardStore, seed: int, path: Path) -> None:
    """Write a random part of the stars for the report's maps: Galactic l, b (deg), kpc and km/s, G (mag)."""
    import polars as pl

    w = store.states(dtype=np.float64)
    rows = np.random.default_rng(seed_sequence(seed, "report")).permutation(len(w))[:NUM_REPORT_STARS]
    rows = np.sort(rows)
    w = w[rows]
    c = cylindrical(w)
    offset = w[:, :3] - np.array(store.frame.sun_position)
    columns = {
        "l": np.degrees(np.arctan2(offset[:, 1], offset[:, 0])) % 360,
        "b": np.degrees(np.arctan2(offset[:, 2], np.hypot(offset[:, 0], offset[:, 1]))),
        **dict(zip(("x", "y", "z"), w[:, :3].T, strict=True)),
        "R": c[:, 0],
        **dict(zip(("vR", "vphi", "vz"), c[:, 3:].T, strict=True)),
    }
    frame = pl.DataFrame(columns)
    if "phot_g_mean_mag" in store.columns:
        magnitudes = store.table(["phot_g_mean_mag"])["phot_g_mean_mag"]
        frame = frame.with_columns(magnitudes.gather(rows).alias("G"))
    frame.cast(pl.Float32).write_parquet(path)


def moments_summary(
    stores: Mapping[str, ShardStore],
    settings: gravity.GravitySettings | None = None,
    where: PlacesSettings | None = None,
    *,
    progress: Any = None,
    field_folder: Path | None = None,
) -> dict[str, Any]:
    """The weak-form moments on one store or several alone, no baryons subtracted.

    Arguments:
        stores: Tracer populations by name, that share one potential; the first one's ball is measured.
        settings: Moments and kernel.
        where: Where the field is reported.
        progress: Called with (done, all) after every shard.
        field_folder: Where to write the field, for `galray gravity evaluate`.

    Returns:
        ``quantities``, and ``notes``: sentences about the fit.
    """
    from galray.ensemble import EnsembleSettings, FamilyDesign, design
    from galray.measurement import evaluate
    from galray.store_moments import moment_blocks, penalty_covariance

    settings = settings or gravity.GravitySettings()
    kernel = gravity.Kernel.from_settings(settings.kernel)
    first = next(iter(stores.values()))
    assert first.ball is not None
    places = Places(
        where or PlacesSettings(), first.frame, first.ball.center, first.ball.radius, kernel.reach
    )
    moments = gravity.Moments(settings.moments, first.ball)
    sums = {
        name: moment_blocks(store, settings.moments, progress=progress, ball=first.ball)
        for name, store in stores.items()
    }
    result = moments.result(sums)
    field, replicas = moments.jackknife(sums, result)
    if field_folder is not None:
        gravity.save_field(field, field_folder)
    nothing = np.zeros(len(places.x))

    def values_of(one: Any) -> np.ndarray:
        arrays = evaluate(one, places, kernel)
        return places.values(arrays["acceleration"], arrays["density"], nothing)

    spread = np.array([values_of(field.with_parameters(replica)) for replica in replicas])
    spread -= spread.mean(0)
    none = FamilyDesign(seeds=0)
    specs = design(EnsembleSettings(flow=none, score=none, moments=FamilyDesign(seeds=1)), 0)
    estimate = combine_family(
        specs,
        values_of(field)[None],
        groups=[q.name for q in places.quantities],
        jackknife=(len(replicas) - 1) / len(replicas) * spread.T @ spread,
        jackknife_blocks=len(replicas),
    ).with_term("penalty", penalty_covariance(field, places, kernel))
    rows = summary.quantity_rows(places, {"moments": estimate}, None)
    return {
        "quantities": [row for row in rows if not row["name"].startswith("rho_dm")],
        "notes": result.notes(),
    }
