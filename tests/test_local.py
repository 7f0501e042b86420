"""What a run on local stars writes: three inversions side by side in the summary and the profiles."""

from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from galray import local
from galray.config import load_config
from galray.frame import GalacticFrame
from galray.gravity.vertical import VerticalResult
from galray.gravity.vertical_comparison import METHODS, compare
from galray.gravity.vertical_moments import FOUR_PI_G


@pytest.fixture
def result():
    """Moments of a sheet, and a comparison in which the score's forces are 30 % too strong."""
    config = load_config("gaia_dr2_local")
    z = np.linspace(0.01, 0.3, 30)
    rng = np.random.default_rng(0)
    knots = np.linspace(-0.3, 0.3, 13)
    replicas = []
    for _ in range(10):
        force = -FOUR_PI_G * 0.1 * knots * (1 + 0.02 * rng.normal()) + rng.normal(size=13)
        replicas.append({m: force * (1.3 if m == "score" else 1.0) + rng.normal(size=13) for m in METHODS})
    return VerticalResult(
        z=z,
        a_z=-FOUR_PI_G * 0.1 * z,
        a_z_covariance=np.diag(np.full(30, 4.0)),
        rho=np.full(30, 1e8),
        rho_error=np.full(30, 1e7),
        rho0=0.1,
        rho0_error=0.01,
        rho0_statistical=0.005,
        terms=[{"term": "statistics", "error": 0.005, "count": 40, "what": "jackknife over cells"}],
        mean_density={0.1: (0.1, 0.005)},
        corrections={},
        kernel_z=np.array([0.05, 0.15]),
        kernel=np.array([6.0, 1.0]),
        chi2=30.0,
        dof=30,
        sun_height=(0.02, 0.001),
        mean_velocity=-7.5,
        estimators=[],
        groups=[],
        counts={"stars": 1000},
        notes=[],
        comparison=compare(replicas, config.vertical, 0.0),
    )


def test_three_inversions_reach_the_summary_and_the_profiles(result, tmp_path, monkeypatch):
    config = load_config("gaia_dr2_local")
    record = {"created": "", "galray": "", "git": "", "config_hash": "", "seed": 1}
    monkeypatch.setattr(local, "read_json", lambda path: record)
    monkeypatch.setattr(local, "run_header", lambda config, record: {})
    monkeypatch.setattr(local, "account", lambda store: {})
    store = SimpleNamespace(frame=GalacticFrame())
    summary = local.summarise(config, tmp_path, store, result)
    rows = {(q["name"], q["where"], q["method"]): q for q in summary["quantities"]}
    assert {m for name, _, m in rows if name == "rho"} == {"vertical", *METHODS}
    for height in (0.1, 0.2, 0.3):
        row = rows["K_z", f"z=±{height:g} kpc", "moments"]
        assert row["value"] == pytest.approx(200 * height, rel=0.1)  # 2 ρ z, in Msun/pc²
        assert row["error"] > 0
    numbers = summary["equilibrium"]["numbers"]
    assert numbers["K_z of moments and flow, p-value"] > 0.01
    assert numbers["K_z of moments and score, p-value"] < 1e-3
    assert summary["equilibrium"]["level"] == "warn"
    assert "do not agree" in summary["equilibrium"]["verdict"]

    local.write_profiles(result, tmp_path / "profiles.parquet")
    table = pl.read_parquet(tmp_path / "profiles.parquet")
    assert set(table["method"].unique()) == {"vertical", *METHODS}
    own = table.filter((pl.col("quantity") == "K_z") & (pl.col("method") == "vertical"))
    assert own["value"].to_numpy() == pytest.approx(200 * own["coordinate"].to_numpy(), rel=1e-6)
