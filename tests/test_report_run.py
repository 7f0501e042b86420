"""A synthetic run directory in the pipeline's formats, and the reader of such directories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from galray.errors import GalrayError
from galray.report.run import RunFolder
from galray.units import GEV_PER_CM3

METHODS = ("flow", "score", "moments", "combined")
RELATIVE = {"flow": 0.05, "score": 0.03, "moments": 0.015, "combined": 0.013}


def _true(quantity: str, z: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Something like the Milky Way: accelerations in (km/s)²/kpc, densities in Msun/kpc³."""
    if quantity == "a_R":
        return -(229.0**2) / radius * np.exp(-((z / 6.0) ** 2))
    if quantity == "a_z":
        return -2050.0 * np.tanh(z / 0.32) * np.exp(-(radius - 8.12) / 4.0) - 260.0 * z
    if quantity == "rho_baryons":
        return 7.1e7 * np.exp(-np.abs(z) / 0.28) * np.exp(-(radius - 8.12) / 2.6)
    if quantity.startswith("rho_dm"):
        return 1.02e7 * (8.12 / np.hypot(radius, z)) ** 1.8
    return _true("rho_baryons", z, radius) + _true("rho_dm", z, radius)


def write_run(
    folder: Path,
    *,
    mock: bool = True,
    families: tuple[str, ...] = ("flow", "score"),
    stars: int = 30_000,
    maps: bool = True,
    seed: int = 5,
) -> Path:
    """Write a run directory as the pipeline does; every number comes from the seed."""
    rng = np.random.default_rng(seed)
    methods = [m for m in METHODS if m in families or m in ("moments", "combined")]
    (folder / "results").mkdir(parents=True)
    quantities, budget = [], []

    def measure(name: str, label: str, where: str, x: list[float], scale: float, unit: str, floor: float):
        z, radius = np.array(x[2]), np.array(np.hypot(x[0], x[1]))
        true = float(_true(name, z, radius)) / scale
        for method in methods:
            relative = RELATIVE[method] * {"rho": 4.0, "rho_dm": 18.0, "rho_dm_average": 9.0}.get(name, 1.0)
            error = float(np.hypot(relative * abs(true), floor))
            value = true + error * float(rng.normal())
            truth = true if mock else None
            quantities.append(
                {
                    "name": name, "label": label, "where": where, "x": x, "method": method, "value": value,
                    "error": error, "truth": truth, "pull": (value - true) / error if mock else None,
                    "unit": unit,
                }
            )  # fmt: skip
            parts = {"network": 0.5, "statistics": 0.6, "measurement": 0.35, "baryons": 0.3}
            if method == "combined":
                parts["method"] = 0.42
            weight = float(np.sqrt(sum(p**2 for p in parts.values())))
            counts = {"network": 3, "statistics": 40, "measurement": 2, "baryons": 1, "method": 3}
            for term, part in parts.items():
                budget.append(
                    {
                        "quantity": f"{name}@{where}", "method": method, "term": term,
                        "value": error * part / weight, "count": counts[term],
                        "bias": 0.1 * error if term == "measurement" else None,
                        "unit": unit,
                    }
                )  # fmt: skip
            budget.append(
                {
                    "quantity": f"{name}@{where}", "method": method, "term": "total", "value": error,
                    "count": 1, "bias": None, "unit": unit,
                }
            )  # fmt: skip

    x0 = -8.122
    for height in (0.0, 1.0, -1.0):
        place = "Sun" if height == 0 else f"z={height:+.1f} kpc"
        x = [x0, 0.0, height]
        measure("a_R", f"a_R at {place}", place, x, 1.0, "km2 / (s2 kpc)", 5.0)
    for height in (0.5, 1.0, -1.0):
        x = [x0, 0.0, height]
        measure("a_z", f"a_z at z={height}", f"z={height:+.1f} kpc", x, 1.0, "km2 / (s2 kpc)", 25.0)
    measure("rho", "ρ at the Sun", "Sun", [x0, 0.0, 0.02], 1e9, "Msun/pc3", 1e-3)
    measure("rho_dm", "ρ_DM at the Sun", "Sun", [x0, 0.0, 0.02], 1e9, "Msun/pc3", 2e-3)
    region = "0.5 < |z| < 2 kpc at the Solar radius"
    measure("rho_dm_average", "ρ_DM", region, [x0, 0.0, 1.1], 1e9, "solMass / pc3", 0.0)
    top = next(q for q in quantities if q["where"] == region and q["method"] == "combined")
    terms = [
        {"term": b["term"], "error": b["value"], "count": b["count"]}
        for b in budget[-6:]
        if b["method"] == "combined" and b["term"] != "total"
    ]
    headline = {
        "name": "rho_dm_average", "label": "dark matter density near the Solar radius", "value": top["value"],
        "error": top["error"], "unit": "Msun/pc3", "value_gev": top["value"] * GEV_PER_CM3,
        "error_gev": top["error"] * GEV_PER_CM3, "truth": top["truth"], "pull": top["pull"],
        "where": region, "kernel_kpc": [0.5, 0.5, 0.2], "terms": terms,
    }  # fmt: skip
    members = []
    for index in range(4 * len(families)):
        family = families[index % len(families)]
        lost = index == 6
        members.append(
            {
                "index": index, "family": family, "seed": 1000 + index, "bootstrap": index % 3 or None,
                "draw": None if index < 5 else index - 4, "status": "failed" if lost else "finished",
                "best": None if lost else -8.1 + 0.01 * index, "seconds": 41.0 + index,
            }
        )  # fmt: skip
        if not lost:
            _write_member(folder / "members" / f"{index:03d}", members[-1], rng)
    summary = {
        "run": {
            "name": "demo", "created": "2026-07-02T10:11:12+00:00", "seconds": 611.3, "seed": 20260702,
            "galray": "0.1.0", "git": "d60a110c0ffee1234567", "config_hash": "9f2c66ab01d4e5f6",
        },
        "headline": headline, "quantities": quantities, "budget": budget, "catalog": _catalog(),
        "halo": [
            {
                "method": "combined", "profile": "nfw", "chi2": 20.1, "dof": 25.3, "positions": 27,
                "parameters": [
                    {
                        "parameter": "density", "symbol": "ρ(R₀)", "value": 0.0102, "error": 0.0021,
                        "unit": "solMass / pc3", "prior": None, "prior_error": None, "learned": 1.0,
                        "truth": 0.0105,
                    },
                ],
            },
        ],
        "equilibrium": {
            "verdict": "The stars are consistent with a steady state: mean residual 1.4 ± 1.1 % of a_R,"
            " north and south agree (χ² = 11.2 for 12).",
            "level": "ok",
            "numbers": {
                "a_phi_over_a_R": {"value": 0.014, "error": 0.011},
                "north_south_chi2": 11.2, "north_south_dof": 12, "method_chi2": {"a_R": 3.1, "a_z": 4.4},
            },
        },
        "checks": {
            family: {
                "E[s_vx]": {"value": 0.004, "error": 0.003, "expected": 0.0, "ok": True},
                "E[v_x s_vz]": {"value": 0.011, "error": 0.008, "expected": 0.0, "ok": True},
                "held-out NLL": {"value": -8.1034, "error": 0.01, "expected": None, "ok": None},
                "curl of the score": {
                    "value": 0.12, "error": 0.02, "expected": 0.0, "allowed": 0.0754, "ok": False
                },
            }
            for family in families
        },
        "members": members, "weights": {"moments": 0.7, "score": 0.2, "flow": 0.1},
        "warnings": ["1 of 8 members failed: 006 (flow), out of memory"],
    }  # fmt: skip
    _write_json(folder / "results" / "summary.json", summary)
    if not mock:
        summary["comparisons"] = [
            {
                "label": "Rotation curve <b>",
                "value": 0.011,
                "error": 0.001,
                "unit": "Msun/pc3",
                "source": "here",
            },
            {
                "label": "a_R from v_c",
                "value": -6500,
                "error": 60,
                "unit": "km2/s2/kpc",
                "source": "arXiv:1810.09466",
            },
        ]
        summary["notes"] = ["The selection limits |z| to 0.3 kpc & more."]
        _write_json(folder / "results" / "summary.json", summary)
    if mock:
        _write_json(folder / "truth.json", {"potential": {}, "baryons": {}, "halo": {}})
    provenance = {
        "galray": "0.1.0", "git": {"revision": "d60a110c0ffee1234567", "dirty": False},
        "config_hash": "9f2c66ab01d4e5f6", "manifest_hash": "aa" * 32, "seed": 20260702,
        "python": "3.11.9", "libraries": {"torch": "2.13.0", "ray": "2.60.0", "polars": "2.1.0"},
    }  # fmt: skip
    _write_json(folder / "provenance.json", provenance)
    (folder / "config.toml").write_text('name = "demo"\nseed = 20260702\n\n[catalog]\nformat = "gaia"\n')
    _profiles(methods, mock, rng).write_parquet(folder / "results" / "profiles.parquet")
    if maps:
        _maps(methods, rng).write_parquet(folder / "results" / "maps.parquet")
    if stars:
        _stars(stars, rng).write_parquet(folder / "results" / "stars.parquet")
    return folder


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_member(folder: Path, member: dict, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    _write_json(
        folder / "spec.json", {k: member[k] for k in ("index", "family", "seed", "bootstrap", "draw")}
    )
    start = 3.0 if member["family"] == "flow" else 40.0
    curve = []
    for epoch in range(30):
        level = -8.1 + start * np.exp(-epoch / 2.5) + 0.12 * np.exp(-epoch / 12)
        curve.append(
            {
                "epoch": epoch,
                "train": level - 0.012 * epoch**0.5 + 0.004 * rng.normal(),
                "validation": level + 0.03 + 0.0012 * max(epoch - 20, 0) + 0.006 * rng.normal(),
                "seconds": 1.3,
                "stars_per_second": 2.2e5,
            }
        )
    _write_json(folder / "curve.json", curve)


def _catalog() -> dict:
    fate = {
        "kept": 312_480, "cut:radial_velocity": 61_022, "cut:parallax_snr": 18_211, "cut:ball": 7_904,
        "cut:ruwe": 2_310, "rejected:non_finite": 12, "rejected:short_row": 0, "kept_no_rv": 8_000,
    }  # fmt: skip
    return {"rows_in": sum(fate.values()), "kept": fate["kept"], "fate": fate}


def _profiles(methods: list[str], mock: bool, rng: np.random.Generator) -> pl.DataFrame:
    rows = []

    def line(profile: str, coordinate: np.ndarray, z: np.ndarray, radius: np.ndarray, names: tuple[str, ...]):
        for name in names:
            true = _true(name, z, radius)
            density = name.startswith("rho")
            for method in methods if name != "rho_baryons" else ["combined"]:
                error = RELATIVE[method] * np.abs(true) * (4.0 if density else 1.0)
                error += (6e5 if density else 12.0) * (1 + (coordinate - coordinate.mean()) ** 2)
                wiggle = np.convolve(rng.normal(size=len(true) + 8), np.ones(9) / 3, mode="valid")
                value = true + 0.7 * error * wiggle if name != "rho_baryons" else true
                for c, v, e, t in zip(coordinate, value, error, true, strict=True):
                    rows.append((profile, c, name, method, v, e, t if mock else None))

    z = np.linspace(-2.5, 2.5, 51)
    line("vertical", z, z, np.full_like(z, 8.122), ("a_R", "a_z", "rho", "rho_dm", "rho_baryons"))
    radius = np.linspace(5.8, 10.4, 47)
    line("radial", radius, np.zeros_like(radius), radius, ("a_R", "rho", "rho_baryons"))
    height = np.linspace(0.5, 2.0, 9)
    line("radial_dm", radius, np.full_like(radius, 1.0), radius, ("rho_dm",))
    line("vertical_dm", height, height, np.full_like(height, 8.122), ("rho_dm",))
    names = ["profile", "coordinate", "quantity", "method", "value", "error", "truth"]
    schema = dict.fromkeys(names, pl.Float64) | {
        "profile": pl.String,
        "quantity": pl.String,
        "method": pl.String,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def _maps(methods: list[str], rng: np.random.Generator) -> pl.DataFrame:
    x, z = np.meshgrid(np.linspace(-11, -5.2, 36), np.linspace(-2.6, 2.6, 31))
    inside = np.hypot(x + 8.122, z) < 3.0
    rows = []
    for name in ("rho", "a_z", "a_R"):
        true = _true(name, z, -x)
        for method in methods:
            value = true * (1 + RELATIVE[method] * rng.normal(size=true.shape))
            error = RELATIVE[method] * np.abs(true)
            rows += [
                ("x-z", name, method, *r)
                for r in zip(x[inside], z[inside], value[inside], error[inside], strict=True)
            ]
    return pl.DataFrame(rows, schema=["map", "quantity", "method", "u", "v", "value", "error"], orient="row")


def _stars(count: int, rng: np.random.Generator) -> pl.DataFrame:
    keep = np.empty((0, 3))
    while len(keep) < count:
        offset = np.column_stack(
            [rng.uniform(-3, 3, 200_000), rng.uniform(-3, 3, 200_000), rng.laplace(0, 0.45, 200_000)]
        )
        offset = offset[np.linalg.norm(offset, axis=1) < 3.0]
        weight = np.exp(-offset[:, 0] / 2.8) * np.exp(-np.linalg.norm(offset, axis=1) / 1.5)
        keep = np.vstack([keep, offset[rng.random(len(offset)) < weight / 3.0]])
    d = keep[:count]
    x, y, z = d[:, 0] - 8.122, d[:, 1], d[:, 2] + 0.0208
    radius = np.hypot(x, y)
    return pl.DataFrame(
        {
            "l": np.degrees(np.arctan2(d[:, 1], d[:, 0])) % 360,
            "b": np.degrees(np.arcsin(d[:, 2] / np.linalg.norm(d, axis=1))),
            "x": x, "y": y, "z": z, "R": radius,
            "vR": rng.normal(0, 36, count),
            "vphi": 232 - np.abs(rng.normal(0, 26, count)) + rng.normal(0, 14, count),
            "vz": rng.normal(0, 19, count) * (1 + 0.4 * np.abs(z)),
            "G": rng.uniform(8, 15, count),
        }
    )  # fmt: skip


def test_reads_a_whole_run(tmp_path):
    run = RunFolder.read(write_run(tmp_path / "run", stars=500))
    assert run.is_mock
    assert run.problems == []
    assert {c.family for c in run.curves} == {"flow", "score"}
    assert len(run.curves) == 7  # one of the eight failed
    assert run.profiles["profile"].n_unique() == 4


def test_summary_is_required(tmp_path):
    with pytest.raises(GalrayError, match="not a run directory"):
        RunFolder.read(tmp_path / "absent")
    with pytest.raises(GalrayError, match=r"no results/summary\.json"):
        RunFolder.read(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "summary.json").write_text("{broken")
    with pytest.raises(GalrayError, match="cannot be read"):
        RunFolder.read(tmp_path)
    (tmp_path / "results" / "summary.json").write_text("[1]")
    with pytest.raises(GalrayError, match="not an object"):
        RunFolder.read(tmp_path)


def test_broken_parts_become_problems(tmp_path):
    folder = write_run(tmp_path / "run", stars=500)
    (folder / "results" / "maps.parquet").write_text("not parquet")
    pl.DataFrame({"profile": ["vertical"]}).write_parquet(folder / "results" / "profiles.parquet")
    (folder / "provenance.json").write_text("[]")
    (folder / "members" / "000" / "curve.json").write_text('[{"epoch": null}]')
    run = RunFolder.read(folder)
    assert run.maps is None
    assert run.profiles is None
    assert len(run.curves) == 6
    told = " ".join(run.problems)
    for name in ("maps.parquet", "profiles.parquet lacks", "provenance.json", "members/000/curve.json"):
        assert name in told


def test_empty_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "summary.json").write_text("{}")
    with pytest.raises(GalrayError, match="holds nothing"):
        RunFolder.read(tmp_path)
