"""A whole run behind dust: mock dust in, ε in space, gravity and a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import galray
from galray.config import load_config
from galray.dust_products import compare_with_map, dust_maps
from galray.errors import GalrayError
from galray.gravity import DustField, LogSelection, Region, StarCounts, efficiency_map, load_field
from galray.mocks import DustMap
from tests.chain_config import write_config

DUSTY = """
[mock.dust]
cell_kpc = 0.3
limit_mag = 14.0

[gravity.dust]
basis = "spline"
selection_basis = "Rz"
num_potential_splines = [5, 7]
num_selection_splines = [5, 7]
max_stars = 5000
max_bound_fraction = 1.0
max_degeneracy = 5.0
"""
MOMENTS = {
    "gravity__moments__selection": "shared",
    "gravity__moments__selection_cells_kpc": 0.5,
    "gravity__moments__num_selection_splines": [5, 7],
    "gravity__moments__velocity_functions": ["v_R", "v_z", "v_R v_R v_R", "v_z v_z v_z"],
    "ensemble__score": {"seeds": 1, "bootstraps": 0, "draws": 0},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> galray.Run:
    path = write_config(tmp_path_factory.mktemp("dusty"), extra=DUSTY)
    return galray.run(path, quiet=True, cluster__enabled=False, **MOMENTS)


def test_the_run_tells_what_the_dust_took(finished: galray.Run) -> None:
    dust = finished.summary["dust"]
    assert "A prior on ε three times as wide" in dust["sentence"]
    assert dust["maps"] == ["moments", "member 000"]
    assert dust["stars_before_dust"] > dust["stars_seen"]
    measured = {(row["name"], row["method"]) for row in finished.summary["quantities"]}
    assert {("rho", "combined"), ("rho_dm", "combined"), ("rho_dm", "score")} <= measured
    table = pl.read_parquet(finished.folder / "results" / "dust.parquet")
    assert set(table.columns) >= {"x", "y", "z", "counts", "efficiency", "log_efficiency_error", "truth"}
    assert table["efficiency"].max() <= 1.0
    assert (table["log_efficiency_error"] > 0).all()
    sky = pl.read_parquet(finished.folder / "results" / "dust_sky.parquet")
    assert (sky["after"].to_numpy() >= sky["before"].to_numpy() - 1e-9).all()
    page = (finished.folder / "report.html").read_text()
    assert "without a dust map" in page
    assert (finished.folder / "figures" / "dust-sky.svg").is_file()
    assert (finished.folder / "figures" / "map-x-y-efficiency.svg").is_file()


def test_fields_of_the_run_are_corrected_ones(finished: galray.Run) -> None:
    field = load_field(finished.folder / "members" / "000" / "field")
    assert isinstance(field, DustField)
    assert isinstance(field.selection.base, LogSelection)
    x = np.array([[-8.0, 0.5, 0.3], [-7.0, 0.0, -0.5]])
    assert (np.asarray(field.log_efficiency(x)) <= 0).all()
    assert np.isfinite(np.asarray(finished.acceleration(x) if hasattr(finished, "acceleration") else 0)).all()
    assert set(dust_maps(finished.folder)) == {"moments", "member 000"}


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    path = write_config(tmp_path, extra=DUSTY)
    with pytest.raises(GalrayError, match="selection = 'shared'"):
        load_config(path)
    with pytest.raises(GalrayError, match="a score network lacks"):
        load_config(path, ["gravity.dust.variant=conditional", "gravity.moments.selection=shared"])
    with pytest.raises(GalrayError, match="selection_cells_kpc"):
        load_config(path, ["gravity.moments.selection_cells_kpc=0.25"])


def test_comparison_with_a_dust_map() -> None:
    """A query of positions on the sky, as the package dustmaps has them, on stars behind known dust."""
    from galray.mocks import DustSettings

    settings = DustSettings(limit_mag=None, cell_kpc=0.2, extinction_mag_kpc=1.5)
    dust = DustMap(settings, (-8.0, 0.0, 0.0), 2.0, 3)
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (400_000, 3)) + [-8.0, 0.0, 0.0]
    x = x[np.linalg.norm(x - dust.observer, axis=1) < 2]
    seen = x[rng.random(len(x)) < dust.efficiency(x)]
    stars = StarCounts.of(seen, Region((-8.0, 0.0, 0.0), 2.0), 0.4)
    found = efficiency_map(stars, lambda p: dust.log_efficiency(p), symmetric=False, width=5.0)

    def query(place: Any) -> np.ndarray:
        xyz = place.cartesian.xyz.to_value("kpc").T
        return dust.extinction(xyz + dust.observer) / 2.7

    told = compare_with_map(found, query)
    assert told["correlation"] > 0.8
    assert told["cells"] > 100
    with pytest.raises(GalrayError, match=r"galray\[dustmaps\]|cannot be read"):
        compare_with_map(found, "no_such_map")
    with pytest.raises(GalrayError, match="knows 0 of"):
        compare_with_map(found, lambda place: np.full(len(place), np.nan))
