"""What a run behind dust leaves: ε in space from all members, slices, the sky, a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from galray import gravity
from galray.catalog import ShardStore
from galray.config import RunConfig
from galray.errors import GalrayError
from galray.gravity import StarCounts

__all__ = ["combine_dust", "compare_with_map", "dust_maps"]

_FEWEST = 10  # stars in a cell whose ε is drawn
_LEAST = 0.02  # ε below it corrects nothing: 1/ε would be noise


def dust_maps(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The maps of ε that the moments and the finished members of a run left, by name.

    Arguments:
        folder: The run directory.
    """
    from safetensors.numpy import load_file

    found = {}
    moments = folder / "fields" / "moments" / "dust.safetensors"
    if moments.is_file():
        found["moments"] = load_file(moments)
    for path in sorted(folder.glob("members/[0-9]*/dust.safetensors")):
        if (path.parent / "result.json").is_file():
            found[f"member {path.parent.name}"] = load_file(path)
    return found


def combine_dust(
    config: RunConfig, folder: Path, store: ShardStore, truth: Mapping[str, Any] | None
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Write ``results/dust.parquet`` and ``results/dust_sky.parquet``.

    The value of log ε in a cell is the mean over all maps; its error holds what they scatter by and the
    counting error.

    Arguments:
        config: The run's configuration.
        folder: The run directory.
        store: Its shards.
        truth: Of a mock.

    Returns:
        What the summary says of the dust, None for a run that did not correct for any; and rows of
        ``maps.parquet``.
    """
    import polars as pl

    maps = dust_maps(folder)
    if not maps:
        return None, []
    assert store.ball is not None
    first = next(iter(maps.values()))
    region = gravity.Region(store.ball.center, store.ball.radius)
    stars = StarCounts(region, float(first["cell"][0]), first["counts"])
    same = [m for m in maps.values() if m["efficiency"].shape == stars.counts.shape]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.array([m["efficiency"] for m in same]))
        value = np.minimum(np.exp(logs.mean(0)), 1.0)
        spread = logs.std(0, ddof=1) if len(same) > 1 else np.zeros(value.shape)
        error = np.sqrt(spread**2 + 1 / stars.counts)
    loss = np.mean([m["loss"] for m in same], axis=0)
    density = np.mean([m["density"] for m in same], axis=0)
    rows = np.isfinite(value) & np.isfinite(error)
    place = stars.centres[rows]
    columns: dict[str, Any] = dict(zip(("x", "y", "z"), place.T, strict=True))
    columns |= {
        "counts": stars.counts[rows],
        "efficiency": value[rows],
        "log_efficiency_error": error[rows],
        "loss_mag_per_kpc": loss[rows],
        "density_before_dust": density[rows],
    }
    known = truth["dust"] if truth is not None and "dust" in truth else None
    numbers: dict[str, float] = {}
    if known is not None:
        from galray.mocks import DustMap

        columns["truth"] = DustMap.from_dict(known).efficiency(place)
        good = stars.counts[rows] >= 50
        if good.sum() > 2:
            pair = columns["efficiency"][good], columns["truth"][good]
            numbers["correlation_with_truth"] = float(np.corrcoef(*pair)[0, 1])
    results = folder / "results"
    pl.DataFrame(columns).write_parquet(results / "dust.parquet")

    w = store.states(dtype=np.float64)
    weight = _corrections(stars, value)(w)
    told = gravity.identifiability(w, region)
    settings = config.gravity.dust or gravity.DustSettings()
    distance = settings.sky_distance_kpc
    if distance < 0.95 * region.radius:
        write_sky(results / "dust_sky.parquet", w, weight, region, distance)
    inside = rows & (stars.counts >= _FEWEST)
    summary = {
        "sentence": str(told),
        "degenerate": told.degenerate(settings.max_degeneracy),
        "maps": list(maps),
        "cell_kpc": stars.cell,
        "cells": int(rows.sum()),
        "stars_seen": float(stars.counts.sum()),
        "stars_before_dust": float(np.nansum(weight)),
        "median_efficiency": float(np.median(value[inside])) if inside.any() else None,
        "sky_distance_kpc": distance,
        **numbers,
    }
    return summary, _slices(stars, value, loss, columns.get("truth"), rows)


def write_sky(path: Path, w: np.ndarray, weight: np.ndarray, region: Any, distance: float) -> None:
    """Stars per square degree of a shell as seen and corrected: l, b (deg), ``before``, ``after``."""
    import polars as pl

    longitude, latitude, before = gravity.sky_map(w, np.ones(len(w)), region.center, distance)
    after = gravity.sky_map(w, weight, region.center, distance)[2]
    grid = np.meshgrid(*((e[1:] + e[:-1]) / 2 for e in (longitude, latitude)), indexing="ij")
    columns = {"l": grid[0], "b": grid[1], "before": before, "after": after}
    pl.DataFrame({name: values.ravel() for name, values in columns.items()}).write_parquet(path)


def compare_with_map(
    found: gravity.EfficiencyMap, query: Callable[[Any], Any] | str, *, min_stars: int = 50
) -> dict[str, float]:
    """ε beside the extinction of a 3D dust map that knows nothing of motions.

    Arguments:
        found: The map of ε.
        query: A query of the package ``dustmaps`` (``pip install galray[dustmaps]``), or the name of one:
            ``bayestar``, ``decaps``, …; anything that gives the reddening of a SkyCoord with distances.
        min_stars: Cells with fewer stars are left out.

    Returns:
        Spearman's ``correlation`` of −2.5 log₁₀ ε with the map, the ``slope`` of one on the other (the slope
        of the counts at the limit times A_G/E), and the number of ``cells``.

    Raises:
        GalrayError: The package or a map of that name is absent, or the map covers too few of the cells.
    """
    import astropy.units as u
    from astropy.coordinates import SkyCoord
    from scipy import stats

    if isinstance(query, str):
        query = _named_query(query)
    good = (found.stars.counts >= min_stars) & (found.efficiency > 0)
    offset = found.stars.centres[good] - np.array(found.stars.region.center)
    distance = np.linalg.norm(offset, axis=1)
    place = SkyCoord(
        l=np.degrees(np.arctan2(offset[:, 1], offset[:, 0])) * u.deg,
        b=np.degrees(np.arcsin(offset[:, 2] / np.maximum(distance, 1e-9))) * u.deg,
        distance=distance * u.kpc,
        frame="galactic",
    )
    reddening = np.asarray(query(place), dtype=float)
    dimming = -2.5 * np.log10(found.efficiency[good])
    both = np.isfinite(reddening) & np.isfinite(dimming)
    if both.sum() < 10:
        raise GalrayError(
            f"the dust map knows {int(both.sum())} of {len(both)} cells", "take a map of this part of the sky"
        )
    slope = np.polyfit(reddening[both], dimming[both], 1)[0]
    correlation = stats.spearmanr(reddening[both], dimming[both]).statistic
    return {"correlation": float(correlation), "slope": float(slope), "cells": float(both.sum())}


def _named_query(name: str) -> Callable[[Any], Any]:
    import importlib

    try:
        module = importlib.import_module(f"dustmaps.{name}")
    except ImportError:
        raise GalrayError(
            f"no 3D dust map '{name}': the package dustmaps is not installed, or has no such map",
            "pip install galray[dustmaps], then fetch the map as its documentation says",
        ) from None
    classes = [c for n, c in vars(module).items() if n.endswith("Query") and c.__module__ == module.__name__]
    try:
        query: Callable[[Any], Any] = classes[0]()
    except (IndexError, OSError) as error:
        raise GalrayError(f"the dust map '{name}' cannot be read: {error}", "fetch its data first") from None
    return query


def _corrections(stars: StarCounts, efficiency: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """1/ε of the cell of each star, 1 where it is not known."""
    bounded = np.where(np.isfinite(efficiency), np.maximum(efficiency, _LEAST), 1.0)
    return lambda w: stars.weights(w, bounded)


def _slices(
    stars: StarCounts, value: np.ndarray, loss: np.ndarray, truth: np.ndarray | None, rows: np.ndarray
) -> list[dict[str, Any]]:
    """Rows of ``maps.parquet``: ε and the loss per kpc in the layers next to z = 0 and to y = 0."""
    grids = {"efficiency": {"dust": value}, "loss": {"dust": loss}}
    if truth is not None:
        grids["efficiency"]["truth"] = np.full(value.shape, np.nan)
        grids["efficiency"]["truth"][rows] = truth
    x, y, z = ((e[1:] + e[:-1]) / 2 for e in stars.edges)
    out = []
    for name, (u, v), cut in (
        ("x-y", (x, y), np.s_[:, :, int(np.argmin(np.abs(z)))]),
        ("x-z", (x, z), np.s_[:, int(np.argmin(np.abs(y))), :]),
    ):
        enough = stars.counts[cut] >= _FEWEST
        for quantity, methods in grids.items():
            for method, grid in methods.items():
                for i, j in np.argwhere(enough & np.isfinite(grid[cut])):
                    row: dict[str, Any] = {"map": name, "quantity": quantity, "method": method}
                    row |= {"u": float(u[i]), "v": float(v[j]), "value": float(grid[cut][i, j])}
                    out.append(row | {"error": float("nan")})
    return out
