"""Stars to leave out: regions on the sky (clusters, clouds, streams) and lists of source_ids (binaries)."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from pydantic import Field

from galray.catalog.joins import join_table, matching_files
from galray.errors import GalrayError
from galray.settings import Settings

__all__ = ["MaskSettings", "mask_file", "masked_by_list", "masked_by_regions"]

_RANGES = {"distance": "kpc", "pmra": "mas/yr", "pmdec": "mas/yr"}
_SHIPPED = ("magellanic_clouds",)


class MaskSettings(Settings):
    """One mask: stars that it holds are cut and counted under its name."""

    file: str = Field(
        description="regions: CSV or ECSV with ra, dec, radius (deg), and where wanted <q>_min and <q>_max "
        "for q of distance (kpc), pmra, pmdec (mas/yr), or the name of a shipped one (magellanic_clouds); "
        "source_ids: Parquet or CSV.",
    )
    kind: Literal["regions", "source_ids"] = Field(
        default="regions", description="Cones on the sky, or a list of source_ids."
    )
    key: str = Field(default="source_id", description="Column of a list that holds Gaia's source_id.")


def mask_file(where: str, settings: MaskSettings) -> list[Path]:
    """The files of a mask: the user's, or a shipped one by name."""
    if settings.kind == "regions" and settings.file in _SHIPPED:
        return [Path(str(files("galray.catalog") / "data" / f"{settings.file}.csv"))]
    return matching_files(where, settings.file)


@lru_cache(maxsize=32)
def _regions(where: str, path: Path, state: tuple[int, int]) -> pl.DataFrame:
    try:
        table = pl.read_csv(path, comment_prefix="#", null_values=["null", ""], glob=False)
        ranges = [f"{name}_{end}" for name in _RANGES for end in ("min", "max")]
        wanted = ["ra", "dec", "radius", *(name for name in ranges if name in table.columns)]
        table = table.select(pl.col(wanted).cast(pl.Float64))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise GalrayError(
            f"{where}: {path}: {str(error).splitlines()[0]}",
            "give a comma-separated table with ra, dec and radius in deg",
        ) from None
    bad = table.with_row_index("row", 1).filter(
        ~(
            pl.col("dec").is_between(-90, 90) & pl.col("ra").is_finite() & pl.col("radius").is_between(0, 180)
        ).fill_null(False)
    )
    if bad.height:
        raise GalrayError(f"{where}: {path}: row {bad['row'][0]}: not a cone on the sky", "correct that row")
    return table


def masked_by_regions(where: str, settings: MaskSettings, stars: pl.DataFrame) -> pl.Series:
    """Which stars lie in one of the cones, and in that cone's ranges where it has any.

    Arguments:
        where: The configuration's key, for messages.
        settings: The mask.
        stars: With ``ra``, ``dec``, ``pmra``, ``pmdec`` and ``distance`` (kpc).

    Returns:
        A boolean series; a star without the quantity of a range is not in it.
    """
    path = mask_file(where, settings)[0]
    status = path.stat()
    regions = _regions(where, path, (status.st_size, status.st_mtime_ns))
    ra, dec = (np.radians(stars[name].to_numpy()) for name in ("ra", "dec"))
    unit = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], -1)
    tree = None
    if len(regions) > 32 and len(unit):
        from scipy.spatial import cKDTree

        tree = cKDTree(unit)
    values = {
        name: stars[name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        for name in _RANGES
        if {f"{name}_min", f"{name}_max"} & {*regions.columns}
    }
    masked = np.zeros(len(unit), dtype=bool)
    for region in regions.iter_rows(named=True):
        a, d = np.radians(region["ra"]), np.radians(region["dec"])
        centre = np.array([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)])
        chord = 2 * np.sin(np.radians(region["radius"]) / 2)
        if tree is not None:
            inside = np.asarray(tree.query_ball_point(centre, chord), dtype=np.int64)
        else:
            # By the chord: its square keeps its digits for small cones, the cosine does not.
            inside = np.flatnonzero(np.sum((unit - centre) ** 2, -1) <= chord**2)
        for name, value in values.items():
            low, high = region.get(f"{name}_min"), region.get(f"{name}_max")
            if low is not None:
                inside = inside[value[inside] >= low]
            if high is not None:
                inside = inside[value[inside] <= high]
        masked[inside] = True
    return pl.Series("masked", masked)


def masked_by_list(where: str, settings: MaskSettings, stars: pl.DataFrame) -> pl.Series:
    """Which stars' source_ids the list holds; a list may name a star several times."""
    table = join_table(where, settings.file, {}, settings.key, unique=False)
    return stars["source_id"].is_in(table.look_up(stars["source_id"])["source_id"].implode())
