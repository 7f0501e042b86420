"""Snapshots of simulations in HDF5 (Gadget, Arepo, GIZMO: FIRE, Auriga) → 6D rows in kpc and km/s.

Numbers are brought to physical units in the way that the file itself tells, in this order: the attributes
that Arepo writes to each dataset (value · to_cgs · a^a_scaling · h^h_scaling); else the units of the
``Header`` or ``Parameters`` group (kpc and km/s where there are none) with Gadget's conventions, lengths in
comoving units divided by h, velocities divided by √a (Springel 2005, the GADGET-2 user guide, section 6). The
scale factor a counts only where ``Time`` is that of ``Redshift``, as it is in cosmological runs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from galray.errors import GalrayError

if TYPE_CHECKING:
    from pathlib import Path

    from galray.catalog.settings import SnapshotSettings, StatesSettings
    from galray.catalog.storage import Storage

__all__ = ["column_names", "frames"]

_KPC_CM = 3.0856775814913673e21
_KM_CM = 1e5
_AGAIN = "write the snapshot again, or set catalog.allow_bad to leave such files out"


def column_names(path: Path | str, states: StatesSettings | None, storage: Storage) -> list[str]:
    """The columns that a snapshot gives: the 6D state, and every dataset of one value per particle.

    Raises:
        GalrayError: The file is broken, has no such particles, or h5py is not installed.
    """
    states = _settings(states)
    with _opened(path, storage) as file:
        group = _group(path, file, states.snapshot)
        count = group[states.snapshot.positions].shape[0]
        others = [name for name, data in group.items() if getattr(data, "shape", None) == (count,)]
        identity = ["source_id"] if states.snapshot.ids in others else []
        return [*states.columns, *identity, *others]


def frames(
    path: Path | str, states: StatesSettings | None, wanted: Sequence[str], rows: int, storage: Storage
) -> Iterator[pl.DataFrame]:
    """The columns `wanted` in the file's order, `rows` particles at a time.

    Positions and velocities come in the units that `states` names (kpc and km/s unless it says otherwise),
    relative to the snapshot's centre, turned by its rotation.

    Raises:
        GalrayError: The file is broken, or has no such particles.
    """
    states = _settings(states)
    snapshot = states.snapshot
    with _opened(path, storage) as file:
        group = _group(path, file, snapshot)
        positions, velocities = group[snapshot.positions], group[snapshot.velocities]
        to_kpc, to_km_s, box_kpc = _scales(path, file, positions, velocities, snapshot)
        length, speed = states.scales()
        rotation = None if snapshot.rotation is None else np.array(snapshot.rotation)
        for start in range(0, positions.shape[0], rows):
            part = slice(start, start + rows)
            columns: dict[str, Any] = {}
            if set(wanted) & set(states.columns):
                x = positions[part].astype(float) * to_kpc - np.array(snapshot.center_kpc)
                if box_kpc:
                    x -= box_kpc * np.round(x / box_kpc)  # the nearest image in the periodic box
                v = velocities[part].astype(float) * to_km_s - np.array(snapshot.center_velocity_km_s)
                if rotation is not None:
                    x, v = x @ rotation.T, v @ rotation.T
                state = np.concatenate([x / length, v / speed], axis=1)
                columns = {name: state[:, i] for i, name in enumerate(states.columns)}
            for name in wanted:
                if name == "source_id" and snapshot.ids:
                    columns[name] = group[snapshot.ids][part].astype(np.int64)
                elif name not in columns:
                    columns[name] = group[name][part]
            yield pl.DataFrame({name: _native(columns[name]) for name in wanted})


def _settings(states: StatesSettings | None) -> StatesSettings:
    from galray.catalog.settings import StatesSettings

    return states or StatesSettings()


@contextmanager
def _opened(path: Path | str, storage: Storage) -> Iterator[Any]:
    try:
        import h5py
    except ImportError:
        raise GalrayError(
            f"{path}: reading HDF5 needs h5py", "pip install 'galray[hdf5]' on every machine"
        ) from None
    try:
        with storage.open(path) as stream, h5py.File(stream, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise GalrayError(f"{path}: the HDF5 file is truncated or corrupt: {text}", _AGAIN) from None


def _group(path: Path | str, file: Any, snapshot: SnapshotSettings) -> Any:
    """The group of the chosen particles, which must hold positions and velocities."""
    name = snapshot.particles
    if name not in file:
        have = ", ".join(file) or "nothing"
        raise GalrayError(
            f"{path}: no group '{name}'; it has {have}", "correct catalog.states.snapshot.particles"
        )
    group = file[name]
    for key in ("positions", "velocities"):
        data = getattr(snapshot, key)
        shape = getattr(group.get(data), "shape", None)
        if shape is None or len(shape) != 2 or shape[1] != 3:
            have = ", ".join(group) or "nothing"
            raise GalrayError(
                f"{path}: {name}/{data} is not a dataset of three values per particle; {name} has {have}",
                f"correct catalog.states.snapshot.{key}",
            )
    if group[snapshot.positions].shape != group[snapshot.velocities].shape:
        raise GalrayError(f"{path}: {name} has more positions than velocities, or fewer", _AGAIN)
    if snapshot.ids and snapshot.ids not in group:
        raise GalrayError(
            f"{path}: no dataset '{name}/{snapshot.ids}'", "correct catalog.states.snapshot.ids"
        )
    return group


def _scales(
    path: Path | str, file: Any, positions: Any, velocities: Any, snapshot: SnapshotSettings
) -> tuple[float, float, float]:
    """Factors to kpc and km/s, and the width of the periodic box in kpc (0 for none)."""
    from astropy import units as u

    header: dict[str, Any] = {}
    for name in ("Parameters", "Header"):
        if name in file:
            header |= {key: value for key, value in file[name].attrs.items() if np.ndim(value) == 0}
    hubble = float(header.get("HubbleParam", 1.0)) or 1.0
    time, redshift = float(header.get("Time", 1.0)), header.get("Redshift")
    is_cosmological = redshift is not None and abs(time * (1 + float(redshift)) - 1) < 1e-4
    a = time if is_cosmological else 1.0
    if snapshot.length_unit is not None:
        to_kpc = float(u.Unit(snapshot.length_unit).to("kpc"))
    else:
        unit = _first(header, ("UnitLength_in_cm", "UnitLength_In_CGS", "UnitLength_in_CGS"), _KPC_CM)
        to_kpc = _from_attributes(positions, a, hubble, unit * a / hubble) / _KPC_CM
    if snapshot.speed_unit is not None:
        to_km_s = float(u.Unit(snapshot.speed_unit).to("km / s"))
    else:
        names = ("UnitVelocity_in_cm_per_s", "UnitVelocity_In_CGS", "UnitVelocity_in_CGS")
        unit = _first(header, names, _KM_CM)
        to_km_s = _from_attributes(velocities, a, hubble, unit * np.sqrt(a)) / _KM_CM
    if not (to_kpc > 0 and to_km_s > 0 and np.isfinite(to_kpc * to_km_s)):
        raise GalrayError(
            f"{path}: its header gives impossible units (HubbleParam {hubble}, Time {time})",
            "name them in catalog.states.snapshot.length_unit and speed_unit",
        )
    # In an isolated run BoxSize is only where the domain ends.
    box = float(header.get("BoxSize", 0.0)) * to_kpc if is_cosmological else 0.0
    return to_kpc, to_km_s, box


def _first(header: Mapping[str, Any], names: Sequence[str], default: float) -> float:
    return next((float(header[name]) for name in names if name in header), default)


def _from_attributes(data: Any, a: float, hubble: float, default: float) -> float:
    """The factor to cgs by the dataset's own attributes, or the default."""
    given = data.attrs
    if float(given.get("to_cgs", 0.0)) == 0.0:
        return default
    scale = a ** float(given.get("a_scaling", 0.0)) * hubble ** float(given.get("h_scaling", 0.0))
    return float(given["to_cgs"]) * scale


def _native(values: np.ndarray) -> np.ndarray:
    """The machine's byte order, which Polars needs."""
    return values if values.dtype.byteorder in "=|<" else values.astype(values.dtype.newbyteorder("="))
