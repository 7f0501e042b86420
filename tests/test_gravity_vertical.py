"""The local vertical inversion: exact sheets with a known selection, a published mock, and real stars."""

from __future__ import annotations

import gzip
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from galray.errors import GalrayError
from galray.gravity.vertical import VerticalSettings, mckee_2015, measure
from galray.gravity.vertical_comparison import compare
from galray.gravity.vertical_distribution import fit_distribution
from galray.gravity.vertical_moments import (
    FOUR_PI_G,
    hat_basis,
    layer_basis,
    moment_sums,
    solve_moments,
    window_estimates,
)
from galray.gravity.vertical_selection import VerticalSample, load_effective_areas
from galray.gravity.vertical_settings import VerticalNetworkSettings
from galray.gravity.vertical_velocity import vertical_velocities
from galray.units import K_PROPER_MOTION, MSUN_PC3, G

RINGS = {"A": (0.05, 0.10), "B": (0.10, 0.15), "C": (0.15, 0.20), "D": (0.20, 0.25)}
SUN, W_MEAN, RANGE = 0.016, -7.6, 0.4


@dataclass(frozen=True)
class Sheet:
    """Φ = Σ_j 4πG ρ_j h_j² ln cosh(z/h_j) + 2πG ρ_DM z² and f = Σ_k c_k exp(−E/σ_k²), c in the plane."""

    layers: tuple[tuple[float, float], ...]  # (ρ_j in Msun/pc³, h_j in kpc)
    uniform: float
    dispersions: tuple[float, ...]
    shares: tuple[float, ...]

    def potential(self, z):
        phi = 0.5 * FOUR_PI_G * self.uniform * z**2
        for density, h in self.layers:
            phi = phi + FOUR_PI_G * density * h**2 * np.log(np.cosh(z / h))
        return phi

    def density(self, z):
        return self.uniform + sum(density / np.cosh(np.asarray(z) / h) ** 2 for density, h in self.layers)

    def mean_within(self, z):
        return self.uniform + sum(density * h * np.tanh(z / h) for density, h in self.layers) / z


# METHODS test 6 is Σ = 48 Msun/pc², h = 0.2 kpc, ρ_DM = 0.010: ρ = Σ/4h sech²(z/2h) + ρ_DM
SHEET_6 = Sheet(((48 / 800, 0.4),), 0.010, (10.0, 18.0, 40.0), (0.3, 0.55, 0.15))
THIN = Sheet(((0.06, 0.1),), 0.04, (9.0, 17.0, 30.0), (0.3, 0.5, 0.2))


def sheet_sample(sheet: Sheet, count: int, seed: int, *, biased_rv: bool = True) -> VerticalSample:
    """Stars of the sheet in rings of cells with a rough selection, Gaia-like errors, and missing velocities.

    With `biased_rv` cold stars at low latitude and faint stars lack a radial velocity more often.
    """
    rng = np.random.default_rng(seed)
    grid = np.linspace(-0.5, 0.5, 2001)
    parts, areas = [], {}
    for ring, (inner, outer) in RINGS.items():
        for number in range(1, 5):
            name = f"{ring}{number}"
            # a dip near the plane (as masked clusters make), a slope, and an edge that errors wash out
            depth, where = rng.uniform(0.1, 0.5), rng.uniform(-0.1, 0.1)
            area = 1 - depth * np.exp(-(((grid - where) / 0.04) ** 2)) - rng.uniform(0.1, 0.3) * np.abs(grid)
            area = area / (1 + np.exp((np.abs(grid) - 0.4) / 0.01))
            areas[name] = (grid, area)
            n = count // 16
            terms = np.array(sheet.shares) * np.exp(
                -sheet.potential(grid + SUN)[:, None] / np.array(sheet.dispersions) ** 2
            )
            joint = (area[:, None] * terms).ravel()
            pick = rng.choice(joint.size, n, p=joint / joint.sum())
            k, z = pick % len(sheet.shares), grid[pick // len(sheet.shares)]
            z = z + rng.uniform(-0.5, 0.5, n) * (grid[1] - grid[0])
            radius = np.sqrt(rng.uniform(inner**2, outer**2, n))
            lon = np.radians(rng.uniform(90 * (number - 1), 90 * number, n))
            sigma = np.array(sheet.dispersions)[k]
            w = rng.normal(0, sigma) + W_MEAN
            u, v = rng.normal(-10, 1.8 * sigma), rng.normal(-15 - 0.02 * sigma**2, 1.2 * sigma)
            lat, distance = np.arctan2(z, radius), np.hypot(z, radius)
            magnitude = rng.uniform(3.5, 5.0, n) + 5 * np.log10(100 * distance)
            share = np.where(np.abs(lat) < 0.4, 0.95 - 0.5 * np.exp(-((lat / 0.15) ** 2)), 0.93)
            if biased_rv:
                share = share - 0.25 * (np.abs(lat) < 0.3) * (k == 0) - 0.2 * np.clip(magnitude - 12, 0, 2)
            else:
                share = np.ones(n)
            cl, sl, cb, sb = np.cos(lon), np.sin(lon), np.cos(lat), np.sin(lat)
            errors = {"plx": 0.04, "pm": 0.06, "rv": rng.uniform(0.3, 2.5, n)}
            parallax = 1 / distance + rng.normal(0, errors["plx"], n)
            v_l, v_b = -u * sl + v * cl, -sb * (u * cl + v * sl) + cb * w
            v_r = cb * (u * cl + v * sl) + sb * w + rng.normal(0, errors["rv"])
            parts.append(
                {
                    "longitude": lon,
                    "latitude": lat,
                    "parallax": parallax,
                    "pm_l": v_l / distance / K_PROPER_MOTION + rng.normal(0, errors["pm"], n),
                    "pm_b": v_b / distance / K_PROPER_MOTION + rng.normal(0, errors["pm"], n),
                    "radial_velocity": np.where(rng.random(n) < share, v_r, np.nan),
                    "parallax_error": np.full(n, errors["plx"]),
                    "pm_b_error": np.full(n, errors["pm"]),
                    "radial_velocity_error": errors["rv"],
                    "magnitude": magnitude,
                    "cell": np.full(n, name),
                }
            )
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return VerticalSample.from_observables(**columns, areas=areas)


def fit_moments(sample, *, window=40.0, basis=None, use_area=True, reweight=True, low=0.35, sun=SUN):
    edges = np.linspace(0, 0.36, 73)
    sums = moment_sums(
        sample,
        vertical_velocities(sample, low, reweight=reweight),
        sun_height=sun,
        height_limit=0.36,
        num_tests=13,
        window=window,
        pilot=np.full(72, 0.08),
        edges=edges,
        area_floor=0.1,
        use_area=use_area,
    )
    return solve_moments(sums, layer_basis(edges, (0.1, 100.0)) if basis is None else basis(edges))


def test_bases_agree_with_their_formulas():
    edges = np.linspace(0, 0.36, 73)
    z = np.array([-0.2, 0.05, 0.31])
    layers = layer_basis(edges, (0.1, 100.0))
    expected = np.stack([0.1 * np.tanh(z / 0.1), z], 1)
    assert np.allclose(layers.column(z)[[0, 1]], expected[[0, 1]], atol=2e-5)
    assert np.allclose(layers.density(z)[:, 0], 1 / np.cosh(z / 0.1) ** 2, atol=2e-3)
    hats = hat_basis(edges, (0, 0.15, 0.36))
    assert np.allclose(hats.density(z).sum(1), 1)
    assert pytest.approx(4 * np.pi * G * MSUN_PC3) == FOUR_PI_G


def test_moments_recover_a_sheet_from_exact_data():
    """Complete data without noise: a_z and ρ(0) of METHODS test 6 within their errors, χ² as it should be."""
    sample = sheet_sample(SHEET_6, 160_000, 11, biased_rv=False)
    fit = fit_moments(sample, basis=lambda edges: layer_basis(edges, (0.4, 100.0)))
    value, error = fit.central
    assert error < 0.012
    assert abs(value - SHEET_6.density(0.0)) < 3.5 * error
    mean, mean_error = fit.mean_within(0.2)
    assert abs(mean - SHEET_6.mean_within(0.2)) < 3.5 * mean_error
    assert fit.chi2 < fit.dof + 4 * np.sqrt(2 * fit.dof)
    kernel = fit.basis.centre @ fit.kernel
    assert kernel.sum() == pytest.approx(1.0, abs=1e-6)  # a uniform density comes back whole


def test_pulls_over_seeds_with_missing_velocities():
    """Mean pull near 0 and spread near 1, for ρ(0) and the mean within 100 pc, over independent mocks."""
    pulls = []
    for seed in range(10):
        fit = fit_moments(sheet_sample(THIN, 60_000, 100 + seed))
        star_error = np.sqrt(fit.basis.centre @ fit.covariance @ fit.basis.centre)
        pulls.append((fit.central[0] - THIN.density(0.0)) / star_error)
        assert fit.chi2 < fit.dof + 5 * np.sqrt(2 * fit.dof)
    assert abs(np.mean(pulls)) < 3.0 / np.sqrt(len(pulls)) + 0.3
    assert 0.4 < np.std(pulls, ddof=1) < 1.8


def test_ignored_selection_fails_visibly():
    """Without the area, or with the velocities of whoever has one, the answer is wrong and χ² says so."""
    sample = sheet_sample(THIN, 160_000, 5)
    right = fit_moments(sample)
    assert abs(right.central[0] - THIN.density(0.0)) < 3.5 * right.central[1]
    for wrong in (fit_moments(sample, use_area=False), fit_moments(sample, reweight=False)):
        assert wrong.chi2 > right.chi2 + 50
        assert abs(wrong.central[0] - THIN.density(0.0)) > 3.5 * np.sqrt(
            wrong.basis.centre @ wrong.covariance @ wrong.basis.centre
        )


def test_velocity_noise_is_deconvolved():
    """Noisy velocities give the windowed moments of the noise-free ones; ignoring the noise does not."""
    rng = np.random.default_rng(3)
    true, tau, s = rng.normal(0, 17, 200_000), 12.0, 40.0
    y = true + rng.normal(0, tau, len(true))
    window = np.exp(-(true**2) / (2 * s**2))
    truth = np.array([((1 - true**2 / s**2) * window).mean(), (true**2 * window).mean()])
    estimate = np.mean(window_estimates(y, np.full(len(y), tau**2), s), axis=1)
    ignored = np.mean(window_estimates(y, np.zeros(len(y)), s), axis=1)
    assert estimate == pytest.approx(truth, rel=0.015)
    assert (np.abs(ignored / truth - 1) > 0.05).all()
    wide = window_estimates(y, np.full(len(y), tau**2), 1e5)[1]
    assert wide == pytest.approx(y**2 - tau**2, rel=1e-3, abs=0.5)


def test_distribution_function_recovers_the_thin_sheet():
    sample = sheet_sample(THIN, 48_000, 21)
    basis = layer_basis(np.linspace(0, 0.4, 81), (0.1, 100.0))
    fit = fit_distribution(sample, vertical_velocities(sample, 0.35), basis, components=4, iterations=150)
    value, error = fit.mean_within(0.1)
    assert 0.001 < error < 0.02
    assert abs(value - THIN.mean_within(0.1)) < 3.5 * error
    assert abs(fit.sun_height[0] - SUN) < 0.006
    assert abs(fit.mean_velocity - W_MEAN) < 0.5


def test_measure_reports_everything():
    sample = sheet_sample(THIN, 60_000, 31)
    settings = VerticalSettings(
        other_layers_kpc=((0.07, 100.0),),
        check_windows=(25.0,),
        distribution_components=3,
        bootstraps=4,
        networks=VerticalNetworkSettings(hidden=(16,), epochs=2, batch_size=1024),
    )
    asked = []

    def mapper(function, numbers):
        asked.extend(numbers)
        return map(pickle.loads(pickle.dumps(function)), numbers)

    result = measure(sample, settings, seed=1, reference=THIN.density, mapper=mapper)
    assert abs(result.rho0 - THIN.density(0.0)) < 3.5 * result.rho0_error
    assert result.rho0_error >= result.rho0_statistical > 0
    assert result.rho0_error == pytest.approx(np.sqrt(sum(term["error"] ** 2 for term in result.terms)))
    assert {"statistics", "density model", "velocity selection", "tracer groups"} <= {
        t["term"] for t in result.terms
    }
    assert result.expected(lambda z: np.full_like(z, 0.05)) == pytest.approx(0.05, rel=1e-4)
    assert abs(result.expected(THIN.density) - THIN.density(0.0)) < 0.01
    assert result.a_z_covariance.shape == (len(result.z),) * 2
    truth = -FOUR_PI_G * THIN.mean_within(result.z[-1]) * result.z[-1]
    assert abs(result.a_z[-1] - truth) < 4 * np.sqrt(result.a_z_covariance[-1, -1])
    assert abs(result.sun_height[0] - SUN) < 0.008
    assert [group["name"] for group in result.groups] == ["A", "B", "C", "D"]
    assert all(isinstance(note, str) and note.endswith(".") for note in result.notes)
    assert asked == [0, 1, 2, 3, 4]
    found = result.comparison
    column = 2000 * found.heights * np.array([THIN.mean_within(z) for z in found.heights])
    for method in ("moments", "flow", "score"):
        value, error = found.surface[method]
        assert (error > 0).all()
        assert np.abs(value / column - 1).max() < 0.5, method
        assert abs(found.rho0[method][0] - THIN.density(0.0)) < 0.5 * THIN.density(0.0)
    assert found.replicas == 4
    assert set(found.north_south) == {"flow", "score"}
    assert all(0 <= pair["p_value"] <= 1 for pair in found.agreement.values())


def test_comparison_knows_agreement_from_bias():
    """Forces of one sheet with errors that three methods share in part; one method's are 20 % too strong."""
    rng = np.random.default_rng(0)
    settings = VerticalSettings(layer_heights_kpc=(0.1, 100.0))
    z = np.linspace(-0.3, 0.3, 13)
    force = -FOUR_PI_G * (0.08 * 0.1 * np.tanh(z / 0.1) + 0.02 * z)
    scatter = 0.01 * np.abs(force).max()
    replicas = []
    for _ in range(13):
        common = scatter * rng.normal() * z / 0.3
        values = {m: force + common + scatter * rng.normal(size=13) for m in ("moments", "flow", "score")}
        replicas.append({**values, "score": 1.2 * values["score"]})
    found = compare(replicas, settings, 0.0)
    assert found.rho0["moments"][0] == pytest.approx(0.1, rel=0.1)
    assert found.agreement["moments and flow"]["p_value"] > 0.01
    assert found.agreement["moments and score"]["p_value"] < 1e-3
    assert found.agreement["moments and score"]["relative"] == pytest.approx(0.2, abs=0.05)
    assert "do not agree" in found.sentence()


@pytest.mark.parametrize("number", [1, 3])
def test_too_few_bootstraps_are_refused(number):
    with pytest.raises(ValueError, match="fewer than 4 bootstraps"):
        VerticalSettings(bootstraps=number)


def test_reference_profile_matches_its_quoted_sums():
    assert mckee_2015(np.array([0.0]))[0] == pytest.approx(0.097, abs=0.001)


def test_bad_input(tmp_path: Path):
    import polars as pl

    with pytest.raises(GalrayError, match="no column"):
        VerticalSample.from_table(pl.DataFrame({"ra": [1.0]}), tmp_path)
    with pytest.raises(GalrayError, match="holds no effective areas"):
        load_effective_areas(tmp_path, np.array(["A1"]), np.array([10.0]), np.array([0.07]))
    sample = sheet_sample(THIN, 1600, 1)
    with pytest.raises(GalrayError, match="too few"):
        fit_distribution(
            sample.select(np.arange(len(sample)) < 500),
            vertical_velocities(sample, 0.35),
            layer_basis(np.linspace(0, 0.4, 9), (0.1,)),
        )
    parallax = sample.parallax.copy()
    parallax[0] = -1.0
    with pytest.raises(GalrayError, match="not positive"):
        VerticalSample.from_observables(
            longitude=sample.longitude,
            latitude=sample.latitude,
            parallax=parallax,
            pm_l=sample.v_l,
            pm_b=sample.v_b,
            radial_velocity=sample.v_r,
            parallax_error=np.ones(len(sample)),
            pm_b_error=np.ones(len(sample)),
            radial_velocity_error=np.ones(len(sample)),
            magnitude=sample.magnitude,
            cell=np.full(len(sample), "A1"),
            areas={"A1": (sample.area_height, sample.area[0])},
        )


def test_published_mock_of_widmark_2019(test_data: Path):
    """A mock by others: ρ = 0.05 sech²(z/30) + 0.05 sech²(z/60) + 0.03 sech²(z/120 pc) + 0.03, W☉ = 7.2."""
    folder = test_data / "mocks" / "widmark2019_disc"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    rows, cells, areas = [], [], {}
    for window in ("3.7-4.2", "4.6-5.0"):
        with gzip.open(folder / f"mock_dataset_absGlims-{window}_rlims-0.1-0.2_dust.npy.gz") as file:
            rows.append(np.load(file))
        cells += [window] * len(rows[-1])
        with np.load(folder / f"effective_area_absGlims-{window}_dust.npz") as data:
            areas[window] = (data["zlist"], data["effectivearea"])
    table = np.concatenate(rows)
    sample = VerticalSample.from_observables(
        longitude=np.radians(table[:, 0]),
        latitude=np.radians(table[:, 1]),
        parallax=table[:, 2],
        pm_l=table[:, 3],
        pm_b=table[:, 4],
        radial_velocity=table[:, 5],
        parallax_error=table[:, 8],
        pm_b_error=table[:, 7],
        radial_velocity_error=table[:, 12],
        magnitude=table[:, 13],
        cell=cells,
        group=cells,
        areas=areas,
    )
    truth = Sheet(((0.05, 0.03), (0.05, 0.06), (0.03, 0.12)), 0.03, (9.0, 20.0, 50.0), (0.45, 0.5, 0.05))
    velocity = vertical_velocities(sample, 0.35)
    assert velocity.mean_motion[2] == pytest.approx(-7.2, abs=0.5)
    edges = np.linspace(0, 0.18, 61)
    sums = moment_sums(
        sample,
        velocity,
        sun_height=0.0,
        height_limit=0.18,
        num_tests=11,
        window=40.0,
        pilot=np.full(60, 0.12),
        edges=edges,
        area_floor=0.02,
    )
    fit = solve_moments(sums, layer_basis(edges, (0.06, 100.0)))
    value, error = fit.mean_within(0.1)
    assert error < 0.03
    assert abs(value - truth.mean_within(0.1)) < 3.5 * error
    distribution = fit_distribution(
        sample, velocity, layer_basis(np.linspace(0, 0.22, 74), (0.06, 100.0)), components=3, range_kpc=0.19
    )
    value, error = distribution.mean_within(0.1)
    assert error < 0.01
    assert abs(value - truth.mean_within(0.1)) < 3.5 * error
    assert np.allclose(distribution.dispersions[:2], (9.0, 20.0), atol=1.5)


def test_real_stars(test_data: Path):
    """Gaia DR2 with its selection: a good χ² and a density near the published ones; without, neither."""
    import polars as pl

    folder = test_data / "gaia_dr2"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    table = pl.read_parquet(folder / "mosaik_40cells_z0.4kpc.parquet")
    sample = VerticalSample.from_table(table, folder / "eff_area")
    assert len(sample) == 268_545
    assert int(sample.has_rv.sum()) == 237_536
    assert len(sample.cell_names) == 40
    assert np.abs(np.degrees(sample.latitude) - table["b"].to_numpy()).max() < 1e-9
    assert np.nanmedian(sample.vertical_velocity) == pytest.approx(-7.5, abs=0.3)
    right = fit_moments(sample)
    ignored = fit_moments(sample, use_area=False)
    assert right.chi2 < 2 * right.dof < ignored.chi2
    value, error = right.mean_within(0.1)
    assert 0.003 < error < 0.01
    assert 0.06 < value < 0.13
