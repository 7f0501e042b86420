"""Snapshots in the forms that GIZMO (FIRE), Gadget and Arepo (Auriga) write."""

import h5py
import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from galray.catalog import CatalogSettings, StatesSettings, ingest, open_source
from galray.errors import GalrayError

A, H = 0.8, 0.7


def snapshot(path, x, v, header, attributes=None, group="PartType4"):
    """A snapshot whose stored numbers are x and v."""
    with h5py.File(path, "w") as file:
        file.create_group("Header").attrs.update(header)
        particles = file.create_group(group)
        particles["Coordinates"], particles["Velocities"] = x, v
        particles["Masses"] = np.arange(len(x), dtype=np.float32)
        particles["ParticleIDs"] = np.arange(len(x), dtype=np.uint32) + 100
        particles["Metallicity"] = np.ones((len(x), 11))
        for name, given in (attributes or {}).items():
            particles[name].attrs.update(given)
    return path


@pytest.fixture
def states():
    rng = np.random.default_rng(3)
    return rng.uniform(-20, 20, (2500, 3)), rng.normal(0, 100, (2500, 3))


def read(path, wanted=("x", "y", "z", "vx", "vy", "vz"), rows=1000, **snapshot_settings):
    source = open_source(path, states=StatesSettings(snapshot=snapshot_settings))
    assert (source.format, source.kind()) == ("hdf5", "states")
    batches = list(source.batches(list(wanted), rows))
    assert [batch.height for batch in batches] == [1000, 1000, 500]
    return pl.concat(batches).to_numpy()


def test_cosmological_run_in_gadget_units(tmp_path, states):
    x, v = states
    header = {
        "HubbleParam": H,
        "Time": A,
        "Redshift": 1 / A - 1,
        "BoxSize": 60_000.0,
        "NumPart_Total": [0] * 6,
    }
    path = snapshot(tmp_path / "s.hdf5", x * H / A, v / np.sqrt(A), header)
    assert np.allclose(read(path), np.concatenate([x, v], axis=1), rtol=1e-12)


def test_units_of_the_header_and_an_isolated_run(tmp_path, states):
    x, v = states
    header = {"HubbleParam": 1.0, "Time": 2.5, "Redshift": 0.0, "BoxSize": 1.0}
    header |= {"UnitLength_in_cm": 3.0856775814913673e24, "UnitVelocity_in_cm_per_s": 1e7}
    path = snapshot(tmp_path / "s.h5", x / 1000, v / 100, header)  # Mpc and 100 km/s
    assert np.allclose(read(path), np.concatenate([x, v], axis=1), rtol=1e-12)


def test_attributes_of_arepo_and_units_of_the_settings(tmp_path, states):
    x, v = states
    header = {"HubbleParam": H, "Time": A, "Redshift": 1 / A - 1}
    attributes = {
        "Coordinates": {"to_cgs": 3.0856775814913673e24, "a_scaling": 1.0, "h_scaling": -1.0},
        "Velocities": {"to_cgs": 1e5, "a_scaling": 0.5, "h_scaling": 0.0},
    }
    path = snapshot(tmp_path / "s.hdf5", x / 1000 * H / A, v / np.sqrt(A), header, attributes)
    assert np.allclose(read(path), np.concatenate([x, v], axis=1), rtol=1e-12)
    named = read(path, length_unit="pc", speed_unit="m / s")
    assert np.allclose(named[:, :3], x / 1000 * H / A / 1000, rtol=1e-12)
    assert np.allclose(named[:, 3:], v / np.sqrt(A) / 1000, rtol=1e-12)


def test_center_rotation_and_the_nearest_image(tmp_path, states):
    x, v = states
    box = 1000.0
    center = np.array([999.0, 3.0, 500.0])
    header = {"HubbleParam": 1.0, "Time": 1.0, "Redshift": 0.0, "BoxSize": box}
    path = snapshot(tmp_path / "s.hdf5", np.mod(x + center, box), v + [5, 6, 7], header)
    turn = ((0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    found = read(path, center_kpc=tuple(center), center_velocity_km_s=(5, 6, 7), rotation=turn)
    assert np.allclose(found[:, :3], np.stack([x[:, 1], -x[:, 0], x[:, 2]], axis=1), atol=1e-10)
    assert np.allclose(found[:, 3:], np.stack([v[:, 1], -v[:, 0], v[:, 2]], axis=1), atol=1e-10)
    with pytest.raises(ValidationError, match="is not a rotation"):
        StatesSettings(snapshot={"rotation": ((1, 0, 0), (0, 1, 0), (0, 0, 2))})


def test_ingest_keeps_datasets_and_takes_ids(tmp_path, states):
    x, v = states
    path = snapshot(tmp_path / "s.hdf5", x, v, {"HubbleParam": 1.0, "Time": 1.0}, group="PartType2")
    given = {"snapshot": {"particles": "PartType2", "ids": "ParticleIDs"}}
    settings = CatalogSettings(files=(str(path),), states=given, keep_columns=("Masses",), num_shards=2)
    store = ingest(settings, tmp_path / "store")
    table = store.table(["source_id", "x", "vz", "Masses"]).sort("source_id")
    assert table["source_id"].to_list() == list(range(100, 2600))
    assert np.allclose(table["x"], x[:, 0], rtol=1e-6)
    assert np.allclose(table["vz"], v[:, 2], rtol=1e-6)
    assert np.array_equal(table["Masses"], np.arange(2500))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"particles": "PartType9"}, "no group 'PartType9'; it has Header, PartType4"),
        ({"velocities": "Masses"}, "PartType4/Masses is not a dataset of three values"),
        ({"ids": "Nothing"}, "no dataset 'PartType4/Nothing'"),
    ],
)
def test_mistakes_are_named(tmp_path, states, given, message):
    path = snapshot(tmp_path / "s.hdf5", *states, {})
    with pytest.raises(GalrayError, match=message):
        open_source(path, states=StatesSettings(snapshot=given))


def test_a_snapshot_cut_short(tmp_path, states):
    path = snapshot(tmp_path / "s.hdf5", *states, {})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(GalrayError, match=r"s\.hdf5: the HDF5 file is truncated or corrupt"):
        open_source(path)
