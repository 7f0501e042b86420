"""What makes a folder of tiles a HATS catalogue: its properties, partition table and Parquet metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from galray.catalog.sky_rows import HEALPIX
from galray.provenance import write_atomic

__all__ = ["write_hats_metadata"]


def write_hats_metadata(folder: Path, tiles: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> None:
    """Write ``hats.properties``, ``partition_info.csv`` and ``dataset/_metadata``, ``_common_metadata``.

    The form is that of HATS 1.0 (``_healpix_29`` as spatial index), which hats, lsdb and galray
    read.

    Arguments:
        folder: The catalogue, whose ``dataset`` holds the tiles.
        tiles: The manifest's entries of the tiles, in sky order.
        about: ``name``, ``created`` (ISO time), ``galray`` (version), ``max_rows``.
    """
    footers = []
    schema = None
    for tile in tiles:
        path = folder / tile["file"]
        footer = pq.read_metadata(path)
        footer.set_file_path(tile["file"].removeprefix("dataset/"))
        footers.append(footer)
        schema = schema or pq.read_schema(path)
    pq.write_metadata(schema, folder / "dataset" / "_metadata", metadata_collector=footers)
    pq.write_metadata(schema, folder / "dataset" / "_common_metadata")
    lines = ["Norder,Npix", *(f"{tile['level']},{tile['pixel']}" for tile in tiles)]
    write_atomic(folder / "partition_info.csv", "\n".join(lines) + "\n")
    properties = {
        "obs_collection": about["name"],
        "dataproduct_type": "object",
        "hats_nrows": sum(tile["rows"] for tile in tiles),
        "hats_col_ra": "ra",
        "hats_col_dec": "dec",
        "hats_col_healpix": HEALPIX,
        "hats_col_healpix_order": 29,
        "hats_npix_suffix": ".parquet",
        "hats_max_rows": about["max_rows"],
        "hats_order": max(tile["level"] for tile in tiles),
        "moc_sky_fraction": f"{sum(4.0 ** -tile['level'] for tile in tiles) / 12:.6g}",
        "hats_builder": f"galray {about['galray']}",
        "hats_creation_date": about["created"][:16] + "UTC",
        "hats_estsize": sum(tile["bytes"] for tile in tiles) // 1024,
        "hats_version": "v1.0",
        "obs_regime": "Optical",
    }
    text = "#HATS catalog\n" + "".join(f"{name}={value}\n" for name, value in properties.items())
    write_atomic(folder / "hats.properties", text)
