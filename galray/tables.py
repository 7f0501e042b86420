"""Tables with units on disk: astropy QTables as ECSV, the same as Parquet with the unit of every column."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from galray.errors import GalrayError

__all__ = ["FORMATS", "read_table", "write_table"]

FORMATS = (".ecsv", ".parquet")
"""File name endings that `write_table` takes."""


def write_table(table: Any, path: str | Path) -> Path:
    """Write a QTable as ``.ecsv`` or ``.parquet``, whole or not at all.

    In Parquet the unit of a column stands in its field's metadata (``unit``), the table's own metadata as
    JSON in the schema's (``galray``); every reader of Parquet takes the numbers as they are.

    Raises:
        GalrayError: Another ending, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise GalrayError(
            f"{path}: ends in '{path.suffix}'", f"give a name that ends in {' or '.join(FORMATS)}"
        )
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ecsv":
            table.write(temporary, format="ascii.ecsv", overwrite=True)
        else:
            _write_parquet(table, temporary)
        temporary.replace(path)
    except OSError as error:
        raise GalrayError(
            f"{path}: cannot be written: {error.strerror or error}", "check the folder and its free space"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _write_parquet(table: Any, path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    fields, arrays = [], []
    for name in table.colnames:
        column = table[name]
        unit = getattr(column, "unit", None)
        values = np.ma.getdata(np.asarray(getattr(column, "value", column)))
        array = pa.array(values.tolist() if values.dtype.kind in "OUS" else values, from_pandas=False)
        metadata = {} if unit is None else {"unit": unit.to_string()}
        fields.append(pa.field(name, array.type, metadata=metadata))
        arrays.append(array)
    meta = json.dumps(
        {key: value for key, value in table.meta.items() if not key.startswith("_")}, default=str
    )
    parquet.write_table(
        pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata={"galray": meta})), path
    )


def read_table(path: str | Path) -> Any:
    """Read an ECSV, CSV, FITS or Parquet table with the units it carries.

    Returns:
        An astropy ``QTable``.

    Raises:
        GalrayError: The file is absent, of another kind or broken.
    """
    from astropy.table import QTable

    path = Path(path).expanduser()
    if not path.is_file():
        raise GalrayError(f"{path}: no such file", "check the path")
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return _read_parquet(path)
        formats = {".ecsv": "ascii.ecsv", ".csv": "ascii.csv", ".fits": "fits"}
        if kind not in formats:
            raise GalrayError(f"{path}: ends in '{kind}'", "give an .ecsv, .csv, .fits or .parquet table")
        return QTable.read(path, format=formats[kind])
    except GalrayError:
        raise
    except Exception as error:  # every reader has its own ways to fail on a broken file
        first = str(error).strip().splitlines()
        raise GalrayError(
            f"{path}: cannot be read as {kind[1:]}: {first[0] if first else type(error).__name__}",
            "check that the file is what its ending says",
        ) from None


def _read_parquet(path: Path) -> Any:
    from astropy import units as u
    from astropy.table import QTable
    from pyarrow import parquet

    content = parquet.read_table(path)
    table = QTable()
    for field in content.schema:
        values = content.column(field.name).to_numpy()
        unit = (field.metadata or {}).get(b"unit")
        table[field.name] = values if unit is None else u.Quantity(values, u.Unit(unit.decode()))
    meta = (content.schema.metadata or {}).get(b"galray")
    if meta is not None:
        table.meta.update(json.loads(meta))
    return table
