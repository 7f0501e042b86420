"""Products of a dwarf galaxy: J- and D-factors against brute force, estimators, verdicts, pooling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.integrate import quad

from galray.dwarf.annihilation import CM_PER_KPC, INNERMOST, d_factor, j_factor, tidal_radius
from galray.dwarf.core_or_cusp import verdict
from galray.dwarf.dispersion import dispersion, rings, surface_density
from galray.dwarf.mass_estimators import walker_mass, wolf_mass
from galray.dwarf.observation import Galaxy, Observation
from galray.dwarf.pooled import PooledHalo
from galray.dwarf.product_settings import ProductSettings
from galray.dwarf.products import Products
from galray.errors import GalrayError
from galray.galaxies.page import spread
from galray.units import GEV_PER_CM3, MSUN_PC3, G

GEV = GEV_PER_CM3 / MSUN_PC3


class CoredHalo:
    """Samples of ρ = ρ0 (1 + r)^−3 whose density scatters by a known factor; Plummer stars of 0.3 kpc."""

    def __init__(self, samples: int = 400, scatter: float = 0.1, seed: int = 0, density: float = 4e8) -> None:
        self.factor = np.exp(scatter * np.random.default_rng(seed).standard_normal((samples, 1)))
        self.rho0 = density

    def density(self, r: Any) -> np.ndarray:
        return self.factor * self.rho0 * (1 + np.asarray(r)) ** -3

    def mass(self, r: Any) -> np.ndarray:
        r = np.asarray(r)
        shape = np.log1p(r) + 2 / (1 + r) - 0.5 / (1 + r) ** 2 - 1.5
        return self.factor * 4 * np.pi * self.rho0 * shape

    def slope(self, r: Any) -> np.ndarray:
        r = np.asarray(r)
        return 3 * r / (1 + r) + 0 * self.factor

    def number_density(self, r: Any) -> np.ndarray:
        return 3 / (4 * np.pi * 0.3**3) * (1 + (np.asarray(r) / 0.3) ** 2) ** -2.5 + 0 * self.factor

    def surface_density(self, radius: Any) -> np.ndarray:
        return 1 / (np.pi * 0.3**2) * (1 + (np.asarray(radius) / 0.3) ** 2) ** -2 + 0 * self.factor

    def dispersion_los(self, radius: Any) -> np.ndarray:
        return 10 + 0 * np.asarray(radius) + 0 * self.factor

    dispersion_r = dispersion_los

    def anisotropy(self, r: Any) -> np.ndarray:
        return 0 * np.asarray(r) + 0 * self.factor

    def half_light_radius(self) -> np.ndarray:
        return 0.3 + 0 * self.factor[:, 0]


def nfw(r: np.ndarray) -> np.ndarray:
    return 1e8 / (r * (1 + r) ** 2)


def brute_force(
    density: Callable[[Any], Any], power: int, distance: float, angle: float, truncation: float
) -> float:
    """∫dΩ ∫dl ρ^p along every line of sight."""

    def sight(psi: float) -> float:
        depth, miss = distance * math.cos(psi), distance * math.sin(psi)
        if miss >= truncation:
            return 0.0
        reach = math.sqrt(truncation**2 - miss**2)
        marks = sorted({depth + s * q for s in (-1, 1) for q in (0.0, 1e-3, 1e-2, 0.1, 1.0) if q < reach})

        def integrand(l: float) -> float:  # noqa: E741
            r = math.sqrt(distance**2 + l**2 - 2 * distance * l * math.cos(psi))
            return float(density(np.float64(max(r, INNERMOST)))) ** power

        return quad(integrand, depth - reach, depth + reach, points=marks, limit=300, epsrel=1e-7)[0]

    edges = np.log([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, math.radians(angle)])
    parts = [
        quad(lambda u: 2 * np.pi * np.sin(np.exp(u)) * np.exp(u) * sight(np.exp(u)), a, b, epsrel=1e-5)[0]
        for a, b in itertools.pairwise(edges)
    ]
    return sum(parts)


@pytest.mark.parametrize(("angle", "truncation"), [(0.1, 1.0), (0.5, 1.0), (1.0, 20.0)])
@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
def test_factors_agree_with_brute_force_along_every_line_of_sight(angle: float, truncation: float) -> None:
    core = lambda r: 4e8 * (1 + r) ** -3.0  # noqa: E731
    for density in (nfw, core):
        j = brute_force(density, 2, 80.0, angle, truncation) * GEV**2 * CM_PER_KPC
        d = brute_force(density, 1, 80.0, angle, truncation) * GEV * CM_PER_KPC
        assert float(j_factor(density, 80.0, angle, truncation)) == pytest.approx(j, rel=2e-4)
        assert float(d_factor(density, 80.0, angle, truncation)) == pytest.approx(d, rel=2e-4)


def test_a_distant_sphere_in_a_wide_cone_has_its_whole_emission_over_the_distance_squared() -> None:
    # Plummer-like: ∫ρ² 4π r² dr = 4π ρ0² a³ · 5π/256 for ρ = ρ0 (1 + r²/a²)^(−5/2); ∫ρ dV = its mass
    rho0, a, distance = 3e8, 0.2, 2000.0
    density = lambda r: rho0 * (1 + (r / a) ** 2) ** -2.5  # noqa: E731
    whole = 4 * np.pi * rho0**2 * a**3 * 5 * np.pi / 256 / distance**2
    assert float(j_factor(density, distance, 5.0, 100.0)) == pytest.approx(
        whole * GEV**2 * CM_PER_KPC, rel=5e-4
    )
    mass = 4 / 3 * np.pi * rho0 * a**3
    assert float(d_factor(density, distance, 5.0, 100.0)) == pytest.approx(
        mass / distance**2 * GEV * CM_PER_KPC, rel=5e-4
    )


def test_units_of_the_factors_by_astropy() -> None:
    from astropy import constants as c
    from astropy import units as u

    j = (1 * u.Msun**2 / u.kpc**6 * u.kpc * c.c**4).to(u.GeV**2 / u.cm**5).value
    d = (1 * u.Msun / u.kpc**3 * u.kpc * c.c**2).to(u.GeV / u.cm**2).value
    assert GEV**2 * CM_PER_KPC == pytest.approx(j, rel=1e-6)
    assert GEV * CM_PER_KPC == pytest.approx(d, rel=1e-6)


def test_factors_of_samples_have_a_value_each() -> None:
    scale = np.array([[1.0], [2.0], [3.0]])
    values = j_factor(lambda r: scale * nfw(r), np.full(3, 80.0), 0.5, np.array([0.5, 1.0, 2.0]))
    assert values.shape == (3,)
    for i, cut in enumerate((0.5, 1.0, 2.0)):
        one = j_factor(lambda r, i=i: scale[i, 0] * nfw(r), 80.0, 0.5, cut)
        assert values[i] == pytest.approx(float(one), rel=2e-4)
    with pytest.raises(ValueError, match="smaller than the distance"):
        j_factor(nfw, 80.0, 0.5, 90.0)
    with pytest.raises(ValueError, match="angle"):
        j_factor(nfw, 80.0, 0.0, 1.0)


def test_the_tidal_radius_of_a_point_mass_is_in_closed_form() -> None:
    found = tidal_radius(lambda r: 1e8 * np.ones((3, 1)) * np.ones_like(r), 80.0, 200.0)
    assert_allclose(found, 80.0 * (1e8 / (2 * 200.0**2 * 80.0 / G)) ** (1 / 3), rtol=1e-3)
    single = tidal_radius(lambda r: 1e8 * np.ones_like(r), 80.0, 200.0)
    assert float(single) == pytest.approx(found[0])


def test_estimators_have_their_published_coefficients() -> None:
    # Wolf: 930 Msun per km²/s² and pc; Walker: 580
    assert wolf_mass(1.0, 1e-3) == pytest.approx(930, rel=1e-3)
    assert walker_mass(1.0, 1e-3) == pytest.approx(580, rel=3e-3)


def products(*halos: CoredHalo, **options: Any) -> Products:
    base = list(halos) or [CoredHalo(seed=seed) for seed in range(3)]
    given = {"outermost": 1.5, "dispersion": 10.0, "distance": 80.0} | options
    return Products(base, given.pop("settings", ProductSettings()), **given)


def test_quantities_of_a_known_halo() -> None:
    made = products(bootstraps=[CoredHalo(seed=7)], variants={"other": CoredHalo(seed=8, density=4.4e8)})
    found = {q.name: q for q in made.quantities()}
    rho = found["rho_150pc"]
    truth = 4e8 * 1.15**-3
    assert rho.value == pytest.approx(truth, rel=0.02)
    assert rho.plus / rho.value == pytest.approx(0.1, rel=0.15)
    assert rho.terms["fit"] == pytest.approx(0.1 * truth, rel=0.15)
    assert rho.terms["seeds"] < 0.3 * rho.terms["fit"]
    assert rho.terms["variants"] == pytest.approx(0.1 * truth, rel=0.2)
    assert found["gamma_dm_150pc"].value == pytest.approx(3 * 0.15 / 1.15)
    assert found["mass_half"].value == pytest.approx(float(np.median(CoredHalo().mass([0.3]))), rel=0.03)
    assert found["half_light_radius"].value == pytest.approx(0.3)
    one = j_factor(lambda r: 4e8 * (1 + r) ** -3.0, 80.0, 0.5, 1.5)
    assert found["log10_j_0.5deg"].value == pytest.approx(math.log10(float(one)), abs=0.02)
    assert "outermost member, 1.5 kpc" in found["log10_j_0.5deg"].note
    assert set(found) >= {"log10_d_0.1deg", "log10_j_half_light", "mass_half_3d", "rho_dm_150pc"}
    for quantity in found.values():
        assert list(quantity.quantiles) == sorted(quantity.quantiles)


def test_without_a_distance_there_is_no_j() -> None:
    assert not [q for q in products(distance=np.nan).quantities() if q.name.startswith("log10")]


def test_truncation_is_stated_and_used() -> None:
    def log_j(settings: ProductSettings) -> Any:
        return next(q for q in products(settings=settings).quantities() if q.name == "log10_d_0.5deg")

    short, long = log_j(ProductSettings(truncation=0.3)), log_j(ProductSettings(truncation=3.0))
    tidal = log_j(ProductSettings(truncation="tidal"))
    assert short.value < long.value
    assert short.note == "halo cut at 0.3 kpc"
    assert tidal.note.startswith("halo cut at the tidal radius, about")


class FarHalo(CoredHalo):
    """The same halo, each sample at a distance of its own: r → s r, M → s M, ρ → ρ/s²."""

    def __init__(self, stretch: np.ndarray) -> None:
        super().__init__(samples=len(stretch), scatter=0.0)
        self.stretch = stretch

    def density(self, r: Any) -> np.ndarray:
        s = self.stretch[:, None]
        return self.rho0 * (1 + np.asarray(r) / s) ** -3 / s**2


@pytest.mark.parametrize(("factor", "power"), [("j", -3), ("d", -1)])
def test_factors_are_seen_from_each_samples_own_distance(factor: str, power: int) -> None:
    """At a given angle J = ∫ρ² dV/D² goes as s⁻³ and D = ∫ρ dV/D² as s⁻¹."""
    for stretch in (0.8, 1.25):
        near, far = products(FarHalo(np.ones(3))), products(FarHalo(np.full(3, stretch)))
        name = f"log10_{factor}_0.5deg"
        values = [next(q.value for q in made.quantities() if q.name == name) for made in (near, far)]
        assert values[1] - values[0] == pytest.approx(power * math.log10(stretch), abs=1e-3)


def test_the_pool_keeps_every_samples_distance() -> None:
    pool = PooledHalo([FarHalo(np.full(4, 1.1)), CoredHalo(samples=4)])
    assert_allclose(pool.stretch, [1.1] * 4 + [1.0] * 4)
    # stars weighed by their light: M ∝ s², and n(r) is the halo's own
    halo, r = FarHalo(np.full(4, 1.1)), np.array([0.2])
    made = products(halo, stellar_mass=1e6, settings=ProductSettings(stellar_mass_scatter=0))
    assert_allclose(halo.density(r) - made.dark_density(halo, r), 1.21e6 * halo.number_density(r), rtol=1e-6)


def test_the_stars_mass_is_taken_off() -> None:
    made = products(stellar_mass=2e7, settings=ProductSettings(stellar_mass_scatter=0.0))
    r = np.array([0.15])
    halo = CoredHalo(scatter=0.0, samples=5)
    stars = 2e7 * halo.number_density(r)[0, 0]
    truth = 4e8 * 1.15**-3
    assert_allclose(made.dark_density(halo, r), truth - stars)
    # γ_DM = (ρ γ − ρ★ γ★)/(ρ − ρ★)
    star_slope = 5 * (0.15 / 0.3) ** 2 / (1 + (0.15 / 0.3) ** 2)
    expected = (truth * 3 * 0.15 / 1.15 - stars * star_slope) / (truth - stars)
    assert_allclose(made.dark_slope(halo, r), expected, atol=3e-4)
    heavy = products(stellar_mass=1e10)
    assert (heavy.dark_density(halo, r) > 0).all()


def test_profiles_and_estimators() -> None:
    made = products()
    profiles = made.profiles()
    assert_allclose(profiles["slope"][2], 3 * made.r / (1 + made.r))
    for values in profiles.values():
        assert values.shape == (5, len(made.r))
        assert (np.diff(values, axis=0) >= -1e-12).all()
    walker, wolf = made.estimators()
    assert walker["mass"] == pytest.approx(2.5 * 100 * 0.3 / G)
    assert wolf["radius_kpc"] == pytest.approx(0.4)


def test_the_pool_gives_each_member_an_equal_share() -> None:
    pool = PooledHalo([CoredHalo(samples=100, scatter=0.0), CoredHalo(samples=400, scatter=0.0, density=8e8)])
    samples = pool.density(np.array([0.0]))[:, 0]
    assert len(samples) == 200
    assert (samples < 6e8).sum() == 100
    assert len(pool.half_light_radius()) == 200
    with pytest.raises(GalrayError, match="no finished fit"):
        PooledHalo([])


def test_verdicts() -> None:
    settings, rng = ProductSettings(), np.random.default_rng(1)
    assert verdict(0.2 + 0.1 * rng.standard_normal(2000), settings)["verdict"] == "core"
    assert verdict(1.2 + 0.1 * rng.standard_normal(2000), settings)["verdict"] == "cusp"
    assert verdict(0.65 + 0.4 * rng.standard_normal(2000), settings)["verdict"] == "undecided"
    assert verdict(0.45 + 0.15 * rng.standard_normal(2000), settings)["verdict"] == "no cusp"
    assert verdict(0.85 + 0.15 * rng.standard_normal(2000), settings)["verdict"] == "no core"
    # the same posterior as prior is no evidence at all
    flat = rng.uniform(-0.3, 2.0, 4000)
    assert verdict(flat, settings, flat)["log_bayes_factor"] == pytest.approx(0.0, abs=1e-9)
    told = verdict(0.2 + 0.1 * rng.standard_normal(2000), settings, flat)
    assert told["log_bayes_factor"] > 3


def observation(number: int = 4000, sigma: float = 9.0) -> Observation:
    rng = np.random.default_rng(3)
    radius = 0.3 * np.sqrt((u := rng.uniform(size=number)) / (1 - u))
    angle = rng.uniform(0, 2 * np.pi, number)
    error = rng.uniform(1.0, 5.0, number)
    return Observation(
        galaxy=Galaxy("mock"),
        x=radius * np.cos(angle),
        y=radius * np.sin(angle),
        velocity=55 + np.hypot(sigma, error) * rng.standard_normal(number),
        velocity_error=error,
        membership=rng.uniform(0.5, 1.0, number),
    )


def test_dispersions_are_freed_of_the_errors() -> None:
    stars = observation()
    mean, sigma, error = dispersion(stars.velocity, stars.velocity_error, stars.membership)
    assert mean == pytest.approx(55, abs=0.6)
    assert sigma == pytest.approx(9.0, abs=4 * error)
    assert 0.05 < error < 0.3
    data = rings(stars, 10)
    assert len(data.radius) == 10
    assert (np.diff(data.radius) > 0).all()
    assert (np.abs(data.value - 9.0) / data.error < 4).all()
    cold = dispersion(55 + 2 * np.random.default_rng(1).standard_normal(300), np.full(300, 2.0), np.ones(300))
    assert cold[1] < 1.5


def test_the_surface_density_holds_one_star_in_all() -> None:
    stars = observation()
    data = surface_density(stars)
    assert np.sum(data.value * np.pi * (data.high**2 - data.low**2)) == pytest.approx(1.0, rel=1e-6)
    inner = data.radius < 1.0
    truth = 1 / (np.pi * 0.3**2) * (1 + (data.radius / 0.3) ** 2) ** -2
    assert_allclose(data.value[inner], truth[inner], rtol=0.2)


@pytest.mark.parametrize(
    "values",
    [
        {"radii": (2.0, 1.0)},
        {"core_below": 1.0, "cusp_above": 0.5},
        {"angles": (0.0,)},
        {"truncation": -1.0},
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"products\."):
        ProductSettings.model_validate(values)


@pytest.mark.parametrize(
    ("quantiles", "words"),
    [
        ((0.19, 0.1976, 0.2, 0.2031, 0.21), "0.200 +0.003 −0.002"),
        ((17.0, 18.0, 18.12, 18.26, 18.5), "18.12 +0.14 −0.12"),
        ((1.0, 1.0, 1.0, 1.0, 1.0), "1.00 +0.00 −0.00"),
        ((1e8, 1.8e8, 2.08e8, 2.41e8, 3e8), "(2.08 +0.33 −0.28) × 10⁸"),
    ],
)
def test_a_known_error_is_never_printed_as_zero(quantiles: tuple[float, ...], words: str) -> None:
    assert spread(quantiles) == words
