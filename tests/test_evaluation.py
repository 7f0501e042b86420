"""Positions in, values with errors and units out: forms of files, bad rows, the border, provenance."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy import units as u
from astropy.coordinates import Galactocentric, SkyCoord
from astropy.table import QTable, Table

from galray import cli
from galray.errors import GalrayError
from galray.evaluation import FieldSource, evaluate, open_source
from galray.frame import GalacticFrame
from galray.gravity import (
    Kernel,
    MeanField,
    PotentialSettings,
    Region,
    fit_spline_to_accelerations,
    save_field,
    smooth,
)
from galray.positions import read_positions
from galray.potentials import NFW, Composite, MiyamotoNagai
from galray.tables import read_table, write_table

FRAME = GalacticFrame()
SUN = np.array(FRAME.sun_position)
REGION = Region((SUN[0], SUN[1], SUN[2]), 3.0)
GALAXY = Composite({"disc": MiyamotoNagai(6e10, 3.0, 0.3), "halo": NFW.from_density(8e6, 16.0)})
PLACES = np.array([[-8.0, 0.3, 0.4], [-7.0, -0.5, 0.0], [-8.1, 0.0, 2.85]])


@pytest.fixture(scope="module")
def spline():
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, size=(4000, 3))
    x = x[np.linalg.norm(x, axis=1) < 3] + SUN
    settings = PotentialSettings(base="Rz", base_splines=(10, 15))
    field = fit_spline_to_accelerations(x, GALAXY.acceleration(torch.from_numpy(x)), settings, REGION)
    root = rng.normal(size=(field.basis.size, field.basis.size))
    return field.with_covariance(root @ root.T)


@pytest.fixture
def folder(tmp_path, spline):
    save_field(spline, tmp_path / "field")
    return tmp_path


def write(path: Path, columns, **units) -> Path:
    table = QTable({n: u.Quantity(v, units[n]) if n in units else v for n, v in columns.items()})
    if path.suffix == ".csv":
        Table(table).write(path, format="ascii.csv")
    else:
        write_table(table, path)
    return path


def xyz(scale=1.0):
    return dict(zip("xyz", PLACES.T * scale, strict=True))


def test_every_form_gives_the_same_positions(tmp_path):
    kpc, pc = dict.fromkeys("xyz", "kpc"), dict.fromkeys("xyz", "pc")
    files = {
        write(tmp_path / "a.ecsv", xyz(), **kpc): "pc",  # a column's own unit goes before --unit
        write(tmp_path / "b.ecsv", xyz(1e3), **pc): "kpc",
        write(tmp_path / "c.parquet", xyz(1e3), **pc): "kpc",
        write(tmp_path / "d.csv", xyz()): "kpc",
        write(tmp_path / "e.csv", xyz(1e3)): "pc",
        write(tmp_path / "f.parquet", xyz(1e3)): "pc",
    }
    for path, unit in files.items():
        assert read_positions(path, unit=unit).x == pytest.approx(PLACES), path.name


def test_sky_positions_are_astropys(tmp_path):
    ra, dec, distance = (
        np.array([10.0, 266.4, 83.0]),
        np.array([-60.0, -29.0, 45.0]),
        np.array([0.5, 2.0, 1.2]),
    )
    frame = Galactocentric(
        galcen_coord=SkyCoord(FRAME.galcen_ra_deg, FRAME.galcen_dec_deg, unit="deg"),
        galcen_distance=FRAME.sun_galcen_distance_kpc * u.kpc,
        z_sun=FRAME.sun_height_kpc * u.kpc,
        roll=0 * u.deg,
    )
    sky = SkyCoord(ra * u.deg, dec * u.deg, distance * u.kpc).transform_to(frame)
    columns = {"ra": ra, "dec": dec, "distance": distance}
    bare = read_positions(write(tmp_path / "a.csv", columns))
    assert bare.x == pytest.approx(sky.cartesian.xyz.to_value("kpc").T, abs=1e-9)
    turned = {"ra": np.radians(ra), "dec": np.radians(dec), "distance": 1e3 * distance}
    given = write(tmp_path / "b.ecsv", turned, ra="rad", dec="rad", distance="pc")
    assert read_positions(given).x == pytest.approx(bare.x)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y,z\n-8,0,0\n-8,nan,0\n", "row 2: y = nan"),
        ("x,y,z\n-8,0,0\n-8,here,0\n", "row 2: y = 'here' is not a number"),
        ("x,y,z\n-8,0,\n-8,0,0\n", "row 1: z is empty"),
        ("x,y\n-8,0\n", "has the columns x, y"),
        ("x,y,z\n", "has no rows"),
        ("ra,dec,distance\n1,2,3\n1,95,3\n", "row 2: dec = 95° lies beyond ±90°"),
        ("ra,dec,distance\n1,2,3\n1,5,0\n", "row 2: distance = 0 kpc is not above zero"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(GalrayError, match=message):
        read_positions(path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(GalrayError, match="no such file"):
        read_positions(tmp_path / "absent.csv")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(GalrayError, match=r"ends in '\.txt'"):
        read_positions(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(GalrayError, match="cannot be read as parquet"):
        read_positions(tmp_path / "a.parquet")
    with pytest.raises(GalrayError, match="column y is in 'km / s'"):
        read_positions(write(tmp_path / "b.ecsv", xyz(), x="kpc", y="km/s", z="kpc"))


def test_values_and_errors_of_a_field(tmp_path, spline):
    positions = read_positions(write(tmp_path / "a.csv", xyz()))
    kernel = Kernel()
    found = evaluate(FieldSource(spline, kernel), positions)
    table, x = found.table, torch.from_numpy(PLACES)
    a = spline.acceleration(x).numpy()
    for i, name in enumerate(("a_x", "a_y", "a_z")):
        assert table[name].to_value("km2 / (s2 kpc)") == pytest.approx(a[:, i])
    assert table["a_R"].value == pytest.approx((a[:, :2] * PLACES[:, :2]).sum(1) / np.hypot(*PLACES.T[:2]))
    assert np.abs(table["a_phi"].value) == pytest.approx(0, abs=1e-9)
    sun = float(spline.potential(torch.tensor([FRAME.sun_position], dtype=torch.float64))[0])
    assert table["potential"].to_value("km2/s2") == pytest.approx(spline.potential(x).numpy() - sun)
    # the last place is too near to the border for a smoothed density, not for an acceleration
    assert (found.num_outside, found.num_without_density) == (0, 1)
    rho = table["rho"].to_value("Msun/pc3")
    assert np.isnan(rho[2])
    truth = smooth(GALAXY.mass_density, x[:2], kernel).numpy() / 1e9
    assert rho[:2] == pytest.approx(truth, rel=0.02)
    rows = spline.linear_response(x, "acceleration").numpy()[:, 2]
    expected = np.sqrt(np.einsum("np,pq,nq->n", rows, spline.covariance, rows))
    assert table["a_z_error"].to_value("km2 / (s2 kpc)") == pytest.approx(expected)
    assert np.isfinite(table["rho_error"][:2]).all()


def test_fields_without_errors_or_potential_leave_columns_out(tmp_path, spline):
    class Bare:
        region = REGION

        def acceleration(self, x):
            return GALAXY.acceleration(x)

    positions = read_positions(write(tmp_path / "a.csv", xyz()))
    columns = evaluate(FieldSource(Bare()), positions).table.colnames
    assert "potential" not in columns
    assert "a_x_error" not in columns
    assert "rho" in columns
    mean = evaluate(FieldSource(MeanField([spline, spline])), positions).table
    assert "potential" in mean.colnames
    assert "rho_error" not in mean.colnames


def test_outside_the_ball(tmp_path, spline):
    places = {**xyz(), "y": np.array([0.0, 9.0, 0.0])}
    positions = read_positions(write(tmp_path / "far.csv", places))
    with pytest.raises(GalrayError, match=r"far\.csv: row 2: .* outside the ball of 3 kpc .*1 of 3 rows"):
        evaluate(FieldSource(spline), positions)
    found = evaluate(FieldSource(spline), positions, outside="nan")
    assert found.num_outside == 1
    assert np.isnan(found.table["a_x"][1])
    assert np.isfinite(found.table["a_x"][[0, 2]]).all()


def test_other_columns_are_carried_and_not_overwritten(tmp_path, spline):
    named = write(tmp_path / "a.csv", {"name": ["one", "two", "three"], **xyz()})
    table = evaluate(FieldSource(spline), read_positions(named)).table
    assert list(table["name"]) == ["one", "two", "three"]
    assert table["x"].unit == u.kpc
    taken = write(tmp_path / "b.csv", {**xyz(), "rho": np.ones(3)})
    with pytest.raises(GalrayError, match="has a column 'rho' already"):
        evaluate(FieldSource(spline), read_positions(taken))


@pytest.mark.parametrize("ending", [".ecsv", ".parquet"])
def test_command_writes_units_and_provenance(folder, monkeypatch, capsys, ending):
    at, out = write(folder / "at.ecsv", xyz(1e3), **dict.fromkeys("xyz", "pc")), folder / f"out{ending}"
    words = ["galray", "gravity", "evaluate", str(folder / "field"), "--at", str(at), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    told = capsys.readouterr()
    assert "3 positions in" in told.out
    assert "1 of 3 positions nearer to the border" in told.err
    table = read_table(out)
    assert table["a_R"].unit == u.Unit("km2 / (s2 kpc)")
    assert table["rho_error"].unit == u.Unit("solMass / pc3")
    assert table.meta["kernel_kpc"] == [0.5, 0.5, 0.2]
    assert table.meta["galray"]
    assert table["x"].to_value("kpc") == pytest.approx(PLACES[:, 0])


def test_command_prints_ecsv(folder, monkeypatch, capsys):
    at = write(folder / "at.csv", xyz())
    monkeypatch.setattr(
        sys, "argv", ["galray", "gravity", "evaluate", str(folder / "field"), "--at", str(at)]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert QTable.read(capsys.readouterr().out, format="ascii.ecsv")["a_z"].unit == u.Unit("km2 / (s2 kpc)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--at", "at.csv"], "neither a run directory nor a field"),
        (["field", "--at", "absent.csv"], "absent.csv: no such file"),
        (["field", "--at", "at.csv", "--out", "x.txt"], "--out x.txt: ends in '.txt'"),
        (["field", "--at", "at.csv", "--outside", "guess"], "--outside guess"),
        (["field", "--at", "at.csv", "--unit", "mpc"], "unit 'mpc'"),
        (["field", "--at", "at.csv", "--method", "score"], "holds one field"),
    ],
)
def test_command_errors_are_one_line(folder, monkeypatch, capsys, words, message):
    write(folder / "at.csv", xyz())
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["galray", "gravity", "evaluate", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_a_field_by_its_folder(folder, spline):
    source = open_source(folder / "field")
    assert source.region == REGION
    assert source.meta == {"field": str(folder / "field")}


def test_disturbances_follow_the_direction_of_the_acceleration():
    from galray.evaluation import disturbed
    from galray.frame import GalacticFrame

    frame = GalacticFrame()
    sun = np.array(frame.sun_position)
    turned = np.array([0.0, frame.sun_radius, sun[2] + 1.0])  # a quarter of a turn, 1 kpc above
    sizes = {"a_R": 3.0, "a_phi": 5.0, "a_z": 7.0, "rho": 0.01}
    names = ["a_x", "a_y", "a_z", "a_R", "rho", "potential"]
    found = disturbed(sizes, np.stack([sun, turned]), names, frame).reshape(len(names), 2)
    assert found[0] == pytest.approx([3.0, 5.0])
    assert found[1] == pytest.approx([5.0, 3.0])
    assert found[2:5, 0] == pytest.approx([7.0, 3.0, 0.01])
    around = 5.0 * np.pi / 2 * frame.sun_radius
    assert found[5] == pytest.approx([0.0, np.hypot(7.0, around)], abs=1e-9)
