"""Files of a dwarf galaxy's stars: real ones, their forms, and every mistake that is caught."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from galray.dwarf import HaloFitSettings
from galray.dwarf.known import find_dwarf, known_dwarfs, published_haloes
from galray.dwarf.light import king_radii, plummer_radii, sersic_radii
from galray.dwarf.observation import Galaxy, Observation, sky_offsets
from galray.dwarf.reading import DataSettings, read_observation
from galray.errors import GalrayError
from galray.galaxies.config import GalaxySettings, load_dwarf_config
from galray.galaxies.members import observe
from galray.units import K_PROPER_MOTION

CARINA = GalaxySettings(key="carina").resolve("carina")


def stars(number: int = 80, seed: int = 1) -> dict[str, np.ndarray]:
    """Stars about Carina's centre, on the sky."""
    rng = np.random.default_rng(seed)
    dec = CARINA.dec + 0.1 * rng.standard_normal(number)
    ra = CARINA.ra + 0.1 * rng.standard_normal(number) / np.cos(np.radians(CARINA.dec))
    return {
        "ra": ra,
        "dec": dec,
        "velocity": 223 + 7 * rng.standard_normal(number),
        "velocity_error": np.full(number, 2.0),
        "membership": np.full(number, 0.98),
    }


def write_csv(path: Path, columns: dict[str, np.ndarray]) -> Path:
    rows = [
        ",".join(columns),
        *(",".join(f"{v:.10g}" for v in row) for row in zip(*columns.values(), strict=True)),
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


def read(path: Path, galaxy: Galaxy = CARINA, **settings: object) -> Observation:
    return read_observation(DataSettings.model_validate({"spectroscopy": str(path), **settings}), galaxy)


# Real files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "members", "mean", "spread"),
    [
        ("car", 1982, 765.6, 223.3, 7.4),
        ("for", 2633, 2573.0, 55.1, 12.4),
        ("sex", 947, 417.0, 224.5, 7.4),
        ("umi", 973, 431.0, -247.0, 8.8),
        ("dra", 1565, 504.0, -292.8, 9.1),
    ],
)
def test_real_galaxies_hold_the_members_that_are_known(
    test_data: Path, name: str, rows: int, members: float, mean: float, spread: float
) -> None:
    path = test_data / "dwarfs" / f"{name}_justin1_spec.dat.gz"
    observation = read(path, GalaxySettings(key=name).resolve(name), light="stars")
    assert observation.account["rows"] == rows
    assert sum(n for fate, n in observation.account.items() if fate != "rows") == rows
    assert observation.num_members == pytest.approx(members, abs=3)
    sure = observation.membership > 0.9
    assert observation.velocity[sure].mean() == pytest.approx(mean, abs=0.6)
    assert observation.velocity[sure].std() == pytest.approx(spread, abs=0.2)
    assert observation.account["no velocity (placeholder 0)"] == (1 if name == "dra" else 0)
    # the file's own tangent plane in arcmin has the same scale: radii agree but for a shift of the centre
    raw = np.loadtxt(path)
    raw = raw[(raw[:, 6] != 0) & (raw[:, 15] >= 0.05)]
    arcmin = np.degrees(np.hypot(observation.x, observation.y) / observation.galaxy.distance) * 60
    assert np.median(arcmin) == pytest.approx(np.median(raw[:, 4]), rel=0.1)


def test_photometry_in_radians_gives_the_light(test_data: Path) -> None:
    folder = test_data / "dwarfs"
    observation = read(folder / "car_justin1_spec.dat.gz", photometry=str(folder / "car_justin1_phot.dat.gz"))
    assert observation.light_account == {"rows": 6996, "kept": 6996}
    assert observation.light_weight.sum() == pytest.approx(2390.3, abs=0.1)
    # the light's half-number radius is near the published one; the velocities' is not bound to be
    order = np.argsort(observation.light_radius)
    inside = np.cumsum(observation.light_weight[order])
    half = observation.light_radius[order][np.searchsorted(inside, 0.5 * inside[-1])]
    assert half == pytest.approx(observation.galaxy.r_half, rel=0.25)
    assert len(observation.sources) == 2


def test_a_repeated_star_of_ursa_minor_is_combined(test_data: Path) -> None:
    path = test_data / "dwarfs" / "umi_justin1_spec.dat.gz"
    observation = read(path, GalaxySettings(key="umi").resolve("umi"))
    assert observation.account["repeats of a star, combined"] == 2
    assert "combined by inverse variance" in observation.notes[0]


def test_a_file_of_six_coordinates_is_seen_along_z(test_data: Path) -> None:
    path = test_data / "gaia_challenge/PlumCoreOm/gs010_bs050_rcrs025_rarc100_core_0400mpc3_df_100_0_err.dat"
    raw = np.loadtxt(path)
    observation = read(path, Galaxy("mock"), velocity_error=2.0)
    assert_allclose(observation.x, raw[:, 0])
    assert_allclose(observation.velocity, raw[:, 5])
    assert_allclose(observation.velocity_error, 2.0)
    assert len(observation.light_x) == 0
    side = read(path, Galaxy("mock"), velocity_error=2.0, line_of_sight="x", proper_motions=True)
    assert_allclose(side.x, raw[:, 1])
    assert_allclose(side.velocity, raw[:, 3])
    assert_allclose(side.pm_y, raw[:, 5])
    tracers = side.tracers()
    assert tracers.vx is not None
    assert_allclose(tracers.vx, raw[:, 4])


# Tables -----------------------------------------------------------------------------------------------


def test_columns_and_units_of_a_table(tmp_path: Path) -> None:
    columns = stars()
    reference = read(write_csv(tmp_path / "a.csv", columns))
    assert len(reference) == 80
    assert reference.membership[0] == pytest.approx(0.98)
    xi, eta = sky_offsets(columns["ra"], columns["dec"], CARINA.ra, CARINA.dec)
    assert_allclose(reference.x, CARINA.distance * xi, atol=1e-6)
    assert_allclose(reference.y, CARINA.distance * eta, atol=1e-6)
    other = {
        "alpha": np.radians(columns["ra"]),
        "delta": np.radians(columns["dec"]),
        "w": 1000 * columns["velocity"],
        "ew": 1000 * columns["velocity_error"],
    }
    found = read(
        write_csv(tmp_path / "b.csv", other),
        columns={"ra": "alpha", "dec": "delta", "velocity": "w", "velocity_error": "ew"},
        units={"ra": "rad", "dec": "rad", "velocity": "m/s", "velocity_error": "m/s"},
    )
    assert_allclose(found.x, reference.x, atol=1e-6)
    assert_allclose(found.velocity, reference.velocity, rtol=1e-6)
    assert_allclose(found.velocity_error, 2.0)


def test_ecsv_states_its_units_and_parquet_is_read(tmp_path: Path) -> None:
    from astropy.table import QTable

    columns = stars()
    table = QTable(columns)
    table["ra"].unit = table["dec"].unit = "deg"
    table["velocity"] = 1000 * columns["velocity"]
    table["velocity"].unit = "m/s"
    table.write(tmp_path / "a.ecsv", format="ascii.ecsv")
    import polars as pl

    pl.DataFrame(columns).write_parquet(tmp_path / "a.parquet")
    ecsv, parquet = read(tmp_path / "a.ecsv"), read(tmp_path / "a.parquet")
    assert_allclose(ecsv.velocity, parquet.velocity)
    assert_allclose(ecsv.x, parquet.x)


def test_proper_motions_are_turned_into_velocities(tmp_path: Path) -> None:
    columns = stars()
    columns |= {"pmra": np.full(80, CARINA.pmra + 0.01), "pmdec": np.full(80, CARINA.pmdec)}
    columns |= {"pmra_error": np.full(80, 0.02), "pmdec_error": np.full(80, 0.02)}
    path = write_csv(tmp_path / "a.csv", columns)
    assert len(read(path).pm_x) == 0
    found = read(path, proper_motions=True)
    assert_allclose(found.pm_x, 0.01 * K_PROPER_MOTION * CARINA.distance, rtol=1e-6)
    assert_allclose(found.pm_y, 0.0, atol=1e-6)
    assert_allclose(found.pm_x_error, 0.02 * K_PROPER_MOTION * CARINA.distance, rtol=1e-6)
    fewer = found.select(np.arange(40))
    assert len(fewer.pm_x) == len(fewer) == 40


def test_rows_without_a_velocity_and_non_members_are_counted(tmp_path: Path) -> None:
    columns = stars(100)
    columns["velocity"][:5] = 0.0
    columns["velocity"][5:7] = np.nan
    columns["membership"][7:17] = 0.001
    observation = read(write_csv(tmp_path / "a.csv", columns))
    assert observation.account == {
        "rows": 100,
        "no velocity (NaN)": 2,
        "no velocity (placeholder 0)": 5,
        "membership below 0.05": 10,
        "repeats of a star, combined": 0,
        "kept": 83,
    }


def test_a_star_in_two_rows_becomes_one_by_inverse_variance(tmp_path: Path) -> None:
    columns = stars()
    for name in ("ra", "dec"):
        columns[name][1] = columns[name][0]
    columns["velocity"][:2] = 220.0, 226.0
    columns["velocity_error"][:2] = 1.0, 2.0
    observation = read(write_csv(tmp_path / "a.csv", columns))
    assert len(observation) == 79
    assert observation.velocity[0] == pytest.approx((220 + 226 / 4) / 1.25)
    assert observation.velocity_error[0] == pytest.approx(1.25**-0.5)
    assert len(observation.notes) >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"velocity_error": (3, 0.0)}, r"row 4 column velocity_error.*zero or negative"),
        ({"velocity_error": (3, -1.0)}, r"row 4 column velocity_error: an error of -1"),
        ({"velocity_error": (3, np.nan)}, r"row 4 column velocity_error: nan is no number"),
        ({"ra": (3, np.nan)}, r"row 4 column ra: nan is no number"),
        ({"membership": (3, 1.5)}, r"row 4 column membership: 1.5 is no probability"),
        ({"velocity": (3, 223000.0)}, r"row 4 column velocity: 223000 km/s is no velocity"),
        ({"dec": (3, -100.0)}, r"row 4 column dec: -100 deg lies outside the sky"),
    ],
)
def test_bad_values_are_named_by_file_row_and_column(
    tmp_path: Path, change: dict[str, tuple[int, float]], message: str
) -> None:
    columns = stars()
    for name, (row, value) in change.items():
        columns[name][row] = value
    path = write_csv(tmp_path / "bad.csv", columns)
    with pytest.raises(GalrayError, match=message) as caught:
        read(path)
    assert str(path) in caught.value.what
    assert caught.value.remedy


def test_angles_in_the_wrong_unit_are_caught_by_their_range(tmp_path: Path) -> None:
    columns = stars()
    degrees = write_csv(tmp_path / "deg.csv", columns)
    with pytest.raises(GalrayError, match="degrees were taken for radians"):
        read(degrees, units={"ra": "rad", "dec": "rad"})
    radians = columns | {name: np.radians(columns[name]) for name in ("ra", "dec")}
    with pytest.raises(GalrayError, match="radians were taken for degrees"):
        read(write_csv(tmp_path / "rad.csv", radians))


def test_a_centre_outside_the_data(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", stars())
    with pytest.raises(GalrayError, match="centre of Carina lies outside the data"):
        read(path, replace(CARINA, ra=CARINA.ra + 0.8))
    with pytest.raises(GalrayError, match=r"stars lie .* deg from the centre of Fornax"):
        read(path, GalaxySettings(key="fornax").resolve("x"))
    offsets = {"x": np.linspace(3, 4, 50), "y": np.linspace(-1, 1, 50), "velocity": np.arange(1.0, 51.0)}
    shifted = write_csv(tmp_path / "b.csv", offsets)
    with pytest.raises(GalrayError, match="centre of mock lies outside the data"):
        read(shifted, Galaxy("mock"), velocity_error=1.0)


def test_too_few_members(tmp_path: Path) -> None:
    with pytest.raises(GalrayError, match="25 members with velocities"):
        read(write_csv(tmp_path / "a.csv", stars(26)))
    columns = stars(100)
    columns["membership"][:] = 0.2
    with pytest.raises(GalrayError, match="20 members"):
        read(write_csv(tmp_path / "b.csv", columns))


@pytest.mark.filterwarnings("error")
def test_velocities_that_are_all_absent_or_all_the_same(tmp_path: Path) -> None:
    """A placeholder other than 0 is caught before a fit begins; a column of NaN ends in its error alone."""
    empty = write_csv(tmp_path / "nan.csv", stars() | {"velocity": np.full(80, np.nan)})
    with pytest.raises(GalrayError, match=r"nan\.csv: 0 members with velocities"):
        read(empty, replace(CARINA, velocity=np.nan))
    velocity = stars()["velocity"]
    velocity[:40] = 999.0
    path = write_csv(tmp_path / "same.csv", stars() | {"velocity": velocity})
    config = load_dwarf_config(path, ["galaxy.key=carina"])
    with pytest.raises(GalrayError, match=r"same\.csv: .*40 of 80 velocities are exactly 999 km/s"):
        observe(config)


def test_missing_files_columns_and_errors(tmp_path: Path) -> None:
    with pytest.raises(GalrayError, match="no such file"):
        read(tmp_path / "absent.csv")
    with pytest.raises(GalrayError, match=r"data\.spectroscopy: no file"):
        read_observation(DataSettings(), CARINA)
    columns = stars()
    path = write_csv(tmp_path / "a.csv", {k: v for k, v in columns.items() if k != "velocity_error"})
    with pytest.raises(GalrayError, match="no errors of the velocities"):
        read(path)
    assert read(path, velocity_error=2.0).velocity_error[0] == 2.0
    with pytest.raises(GalrayError, match=r"no column 'vhelio' \(data.columns.velocity\)"):
        read(path, columns={"velocity": "vhelio"})
    with pytest.raises(GalrayError, match="'speed' is no column that galray reads"):
        read(path, columns={"speed": "velocity"})
    with pytest.raises(GalrayError, match="no positions"):
        read(write_csv(tmp_path / "c.csv", {"velocity": columns["velocity"]}))
    with pytest.raises(GalrayError, match="no column of velocities"):
        read(write_csv(tmp_path / "d.csv", {"ra": columns["ra"], "dec": columns["dec"]}))
    with pytest.raises(GalrayError, match=r"galaxy\.ra, galaxy\.dec or galaxy\.distance is not known"):
        read(write_csv(tmp_path / "e.csv", columns), Galaxy("nobody"))
    with pytest.raises(GalrayError, match="velocities are 0"):
        read(write_csv(tmp_path / "f.csv", columns | {"velocity": np.zeros(80)}))


def test_broken_files(tmp_path: Path) -> None:
    ragged = tmp_path / "a.dat"
    ragged.write_text("1 2 3 4 5 6\n1 2 3 4 5\n")
    with pytest.raises(GalrayError, match="row 2 has 5 values, the first 6"):
        read(ragged, Galaxy("mock"))
    odd = tmp_path / "b.dat"
    odd.write_text("1 2 3\n" * 40)
    with pytest.raises(GalrayError, match="3 columns of numbers without names"):
        read(odd, Galaxy("mock"))
    cut = tmp_path / "c.dat.gz"
    cut.write_bytes(gzip.compress(b"1 2 3 4 5 6\n" * 1000)[:30])
    with pytest.raises(GalrayError, match="cannot be read"):
        read(cut, Galaxy("mock"))
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(GalrayError, match="not a table"):
        read(tmp_path / "d.parquet")


# Geometry and light -----------------------------------------------------------------------------------


def test_offsets_agree_with_astropy() -> None:
    from astropy.coordinates import SkyCoord
    from astropy.wcs import WCS

    columns = stars()
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [CARINA.ra, CARINA.dec]
    wcs.wcs.cdelt = [1.0, 1.0]
    east, north = wcs.wcs_world2pix(columns["ra"], columns["dec"], 0)
    xi, eta = sky_offsets(columns["ra"], columns["dec"], CARINA.ra, CARINA.dec)
    assert_allclose(np.degrees(xi), east - (wcs.wcs.crpix[0] - 1), atol=1e-9)
    assert_allclose(np.degrees(eta), north - (wcs.wcs.crpix[1] - 1), atol=1e-9)
    centre = SkyCoord(CARINA.ra, CARINA.dec, unit="deg")
    angle = centre.separation(SkyCoord(columns["ra"], columns["dec"], unit="deg")).rad
    assert_allclose(np.hypot(xi, eta), np.tan(angle), rtol=1e-9)


def test_profiles_of_the_light_hold_half_within_their_half_light_radius() -> None:
    for radii in (sersic_radii(0.3, 0.8, 4001), plummer_radii(0.3, 4001)):
        assert np.median(radii) == pytest.approx(0.3, rel=1e-3)
    # an exponential, n = 1: Σ ∝ exp(−1.678 R/R_e); the light within R_e/2 in closed form
    x = 0.5 * 1.67834699
    inside = 1 - (1 + x) * np.exp(-x)
    assert np.mean(sersic_radii(1.0, 1.0, 4001) < 0.5) == pytest.approx(inside, abs=1e-3)
    radii = king_radii(0.2, 1.0, 4001)
    assert radii.max() <= 1.0
    r = np.linspace(1e-4, 1.0, 20001)
    light = r * (1 / np.sqrt(1 + (r / 0.2) ** 2) - 1 / np.sqrt(26.0)) ** 2
    summed = np.cumsum(light) / light.sum()
    assert_allclose(np.quantile(radii, [0.2, 0.5, 0.8]), np.interp([0.2, 0.5, 0.8], summed, r), rtol=2e-3)


def test_the_published_light_is_circular_in_circularised_radii(test_data: Path) -> None:
    path = test_data / "dwarfs" / "for_justin1_spec.dat.gz"
    galaxy = GalaxySettings(key="fornax").resolve("fornax")
    observation = read(path, galaxy)
    assert galaxy.light is not None
    expected = king_radii(galaxy.light[1], galaxy.light[2], len(observation.light_x))
    assert_allclose(np.sort(observation.light_radius), expected, rtol=1e-9)
    assert "published King profile" in observation.notes[0]
    settings = observation.adapted(HaloFitSettings())
    assert settings.likelihood.ellipticity == pytest.approx(0.29)
    assert settings.likelihood.perspective
    assert settings.likelihood.systemic_motion[0] == pytest.approx(0.381 * K_PROPER_MOTION * 142.56)


# The table --------------------------------------------------------------------------------------------


def test_the_table_of_known_galaxies() -> None:
    table = known_dwarfs()
    assert len(table) >= 40
    classical = [
        "carina_1",
        "draco_1",
        "fornax_1",
        "leo_1",
        "leo_2",
        "sculptor_1",
        "sextans_1",
        "ursa_minor_1",
    ]
    for key in classical:
        dwarf = table[key]
        assert 60 < dwarf.distance < 300
        assert 0.1 < dwarf.r_half_kpc < 1.0
        assert 5 < dwarf.dispersion < 15
        assert all(dwarf.references.values())
    for dwarf in table.values():
        assert -90 < dwarf.dec < 90
        assert 0 <= dwarf.ra < 360
        assert dwarf.distance > 0
        assert dwarf.r_half > 0
        assert dwarf.ref_structure
        assert dwarf.ref_velocity


def test_the_table_agrees_with_its_source(test_data: Path) -> None:
    import polars as pl

    source = pl.read_csv(test_data / "dwarfs/lvdb/dwarf_mw.csv")
    by_key = {row["key"]: row for row in source.iter_rows(named=True)}
    for dwarf in known_dwarfs().values():
        row = by_key[dwarf.key]
        assert (dwarf.ra, dwarf.dec, dwarf.distance) == (row["ra"], row["dec"], row["distance"])
        found = (dwarf.r_half, dwarf.velocity, dwarf.pmra)
        assert found == (row["rhalf"], row["vlos_systemic"], row["pmra"])


@pytest.mark.parametrize("name", ["fornax", "Fornax", "For", "fornax_1", " FORNAX "])
def test_galaxies_are_found_by_any_name(name: str) -> None:
    assert find_dwarf(name).key == "fornax_1"


def test_roman_numbers_and_unknown_names() -> None:
    assert find_dwarf("Leo II").key == "leo_2"
    assert find_dwarf("UMi").key == find_dwarf("Ursa Minor").key == "ursa_minor_1"
    with pytest.raises(GalrayError, match=r"'Fornex'.*\n.*did you mean 'fornax_1'"):
        find_dwarf("Fornex")


def test_published_values() -> None:
    rows = published_haloes("fornax_1")
    read19 = next(row for row in rows if row.label.startswith("Read"))
    assert (read19.quantity, read19.value, read19.minus, read19.plus) == ("rho_150pc", 7.9, 1.9, 2.7)
    assert {row.quantity for row in rows} == {"rho_150pc", "log10_j_0.5deg", "log10_mass_wolf"}
    assert published_haloes("nowhere") == []
