"""FITS, VOTable and ECSV tables, which astropy reads whole, as Polars frames in Gaia's units."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl

from galray.catalog.columns import columns
from galray.catalog.storage import Storage, decompressed
from galray.errors import GalrayError

__all__ = ["frame", "read"]

_AGAIN = "fetch or write the file again, or set catalog.allow_bad to leave such files out"


def read(path: Path | str, form: str, storage: Storage) -> Any:
    """The astropy Table in a file of form fits, votable or ecsv.

    Raises:
        GalrayError: The file is broken.
    """
    import warnings

    from astropy.table import Table

    formats = {"fits": "fits", "votable": "votable", "ecsv": "ascii.ecsv"}
    options: dict[str, Any] = {"use_names_over_ids": True} if form == "votable" else {}
    try:
        # astropy takes a path, or the bytes of an object.
        source: Any = path
        if isinstance(path, str):
            with decompressed(storage.open(path)) as stream:
                source = io.BytesIO(stream.read())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # units and dates that the standards spell otherwise
            return Table.read(source, format=formats[form], **options)
    except GalrayError:
        raise
    except Exception as error:  # astropy raises nearly anything on broken files
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise GalrayError(f"{path}: cannot be read as {form}: {text}", _AGAIN) from None


def frame(
    path: Path | str,
    form: str,
    names: Mapping[str, str],
    wanted: Sequence[str],
    release: str,
    storage: Storage,
) -> pl.DataFrame:
    """The columns `wanted` of a table; units other than Gaia's are converted, masked values are null.

    Arguments:
        path: The file.
        form: fits, votable or ecsv.
        names: Galray's name of each column → the file's own.
        wanted: Galray's names.
        release: Gaia release whose units apply.
        storage: How the file is opened.

    Raises:
        GalrayError: The file is broken, or a column holds arrays.
    """
    import numpy as np
    from astropy import units as u

    table = read(path, form, storage)
    units = {column.name: column.unit for column in columns(release)}
    chosen: dict[str, pl.Series] = {}
    for name in wanted:
        column = table[names[name]]
        mask = np.asarray(getattr(column, "mask", False))
        values = np.ma.getdata(column) if hasattr(column, "mask") else np.asarray(column)
        values = np.asarray(getattr(values, "value", values))
        if values.ndim > 1:
            raise GalrayError(f"{path}: column '{name}' holds arrays, not one value per star")
        if values.dtype.kind == "S":
            values = np.char.decode(values, "utf-8")
        if values.dtype.kind == "f" and column.unit is not None and units.get(name):
            with suppress(u.UnitsError, ValueError, TypeError, AttributeError):
                values = values * column.unit.to(u.Unit(units[name], parse_strict="silent"))
        if values.dtype.byteorder not in "=|":
            values = values.astype(values.dtype.newbyteorder("="))
        series = pl.Series(name, values.tolist() if values.dtype.kind == "O" else values)
        chosen[name] = series.set(pl.Series(mask), None) if mask.ndim and mask.any() else series
    return pl.DataFrame(chosen)
