"""A store in numbers: stars on the sky, magnitudes, distances, velocities, and the fate of every row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from galray.catalog import sky
from galray.catalog.shards import ShardStore

__all__ = ["PROBABILITIES", "Distribution", "StoreSummary", "summarize"]

PROBABILITIES = (0.01, 0.16, 0.5, 0.84, 0.99)
"""Quantiles that a summary gives of every quantity."""

_SHOWN = (0.002, 0.998)
"""The part of a distribution that its histogram shows: far outliers would leave one bin."""

_MAGNITUDE_STEP = 0.25


@dataclass(frozen=True)
class Distribution:
    """One quantity over all stars.

    Arguments:
        name: ``distance``, ``phot_g_mean_mag``, ``v_R``, ``v_phi``, ``v_z``, …
        unit: Its unit; ``""`` without one.
        num_values: Stars that have it.
        quantiles: At `PROBABILITIES`.
        edges: Bin edges of the histogram, (n + 1,).
        counts: Stars between them, (n,).
    """

    name: str
    unit: str
    num_values: int
    quantiles: tuple[float, ...]
    edges: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class StoreSummary:
    """What `summarize` finds.

    Arguments:
        path: The store.
        kind: ``6d`` or ``no_rv``.
        source: ``gaia`` or ``states``.
        num_stars: Stars.
        num_shards: Shards.
        bytes: Size of the shards.
        account: The fate of every row; ``rows_in`` is the sum of all others.
        num_inputs: Files (or parts of files) that were read.
        quarantined: Those that were left out, with their reasons.
        distributions: By name.
        sky_counts: Stars per nested HEALPix pixel in Galactic coordinates.
        sky_level: The pixels' level.
        diagram: Stars over (bp_rp, M_G), or None where there is no photometry.
        diagram_edges: Edges in bp_rp and M_G.
        no_rv: The same of the stars without radial velocity, where they were kept.
    """

    path: str
    kind: str
    source: str
    num_stars: int
    num_shards: int
    bytes: int
    account: dict[str, int]
    num_inputs: int
    quarantined: tuple[dict[str, Any], ...]
    distributions: dict[str, Distribution]
    sky_counts: np.ndarray
    sky_level: int
    diagram: np.ndarray | None
    diagram_edges: tuple[np.ndarray, np.ndarray] | None
    no_rv: StoreSummary | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain values, for JSON."""
        plain = {
            key: getattr(self, key)
            for key in ("path", "kind", "source", "num_stars", "num_shards", "bytes", "account", "num_inputs")
        }
        return {
            **plain,
            "quarantined": list(self.quarantined),
            "distributions": {
                name: {
                    "unit": d.unit,
                    "num_values": d.num_values,
                    "quantiles": dict(zip(map(str, PROBABILITIES), map(_plain, d.quantiles), strict=True)),
                    "edges": d.edges.tolist(),
                    "counts": d.counts.tolist(),
                }
                for name, d in self.distributions.items()
            },
            "sky": {"frame": "galactic", "level": self.sky_level, "counts": self.sky_counts.tolist()},
            "colour_magnitude": None
            if self.diagram is None or self.diagram_edges is None
            else {
                "bp_rp": self.diagram_edges[0].tolist(),
                "absolute_g_mag": self.diagram_edges[1].tolist(),
                "counts": self.diagram.tolist(),
            },
            "no_rv": None if self.no_rv is None else self.no_rv.to_dict(),
        }


def summarize(store: ShardStore | Path | str) -> StoreSummary:
    """Count, bin and average a store through Dask: on Ray where it is connected, else on threads.

    Distances are from the Sun, velocities Galactocentric and cylindrical (v_phi positive along Galactic
    rotation), absolute magnitudes without extinction.

    Raises:
        GalrayError: It is no finished store, or a shard is gone or broken.
    """
    store = store if isinstance(store, ShardStore) else ShardStore(store)
    quantities = _quantities(store)
    # The finest pixels that would hold some fifty stars each, if they were spread evenly.
    level = int(np.clip(np.log2(max(store.num_rows, 1) / 600) // 2, 1, 7))
    probabilities = [*PROBABILITIES, *_SHOWN]
    views = [sky.quantiles(store, sql, probabilities) for sql, _ in quantities.values()]
    counted, *found = sky.compute(sky.healpix_map(store, level, frame="galactic"), *views)
    edges = {
        name: _edges(name, q[len(PROBABILITIES) :])
        for name, q in zip(quantities, found, strict=True)
        if np.isfinite(q).all()
    }
    if "phot_g_mean_mag" in edges:
        ((low, high),) = sky.compute(sky.extent(store, "phot_g_mean_mag"))
        step = _MAGNITUDE_STEP
        edges["phot_g_mean_mag"] = np.arange(np.floor(low / step), np.ceil(high / step) + 1.5) * step
    views = [sky.histogram(store, quantities[name][0], bins) for name, bins in edges.items()]
    views += [sky.counts(store, f"({quantities[name][0]}) IS NOT NULL") for name in edges]
    colour, absolute = (edges.get(name) for name in ("bp_rp", "absolute_g_mag"))
    pair = None
    if colour is not None and absolute is not None:
        pair = (np.linspace(colour[0], colour[-1], 141), np.linspace(absolute[0], absolute[-1], 161))
        views.append(sky.cross_histogram(store, ["bp_rp", quantities["absolute_g_mag"][0]], pair))
    numbers = sky.compute(*views)
    at = dict(zip(quantities, found, strict=True))
    distributions = {
        name: Distribution(
            name,
            quantities[name][1],
            int(numbers[len(edges) + i]),
            tuple(map(float, at[name][: len(PROBABILITIES)])),
            edges[name],
            numbers[i],
        )
        for i, name in enumerate(edges)
    }
    manifest = store.manifest
    return StoreSummary(
        path=store.location,
        kind=str(manifest["kind"]),
        source=str(manifest["source"]),
        num_stars=store.num_rows,
        num_shards=len(store.shards),
        bytes=sum(int(entry["bytes"]) for entry in manifest["shards"]),
        account=store.row_account,
        num_inputs=len(manifest["inputs"]),
        quarantined=tuple(manifest["quarantined"]),
        distributions=distributions,
        sky_counts=counted,
        sky_level=level,
        diagram=None if pair is None else numbers[-1],
        diagram_edges=pair,
        no_rv=None if store.no_rv is None else summarize(store.no_rv),
    )


def _quantities(store: ShardStore) -> dict[str, tuple[str, str]]:
    """Name → (SQL expression, unit) of what the store's columns allow."""
    sun = store.frame.sun_position
    square = " + ".join(
        f"({name} - ({c!r})) * ({name} - ({c!r}))" for name, c in zip("xyz", sun, strict=True)
    )
    distance, radius = f"sqrt({square})", "sqrt(x * x + y * y)"
    found = {"distance": (distance, "kpc"), "R": (radius, "kpc"), "z": ("z", "kpc")}
    if store.manifest["kind"] == "6d":
        found |= {
            "v_R": (f"(x * vx + y * vy) / {radius}", "km/s"),
            "v_phi": (f"(y * vx - x * vy) / {radius}", "km/s"),
            "v_z": ("vz", "km/s"),
        }
    if "phot_g_mean_mag" in store.columns:
        found["phot_g_mean_mag"] = ("phot_g_mean_mag", "mag")
        found["absolute_g_mag"] = (f"phot_g_mean_mag - 5 * log10({distance}) - 10", "mag")
    if "bp_rp" in store.columns:
        found["bp_rp"] = ("bp_rp", "mag")
    return found


def _edges(name: str, shown: np.ndarray, bins: int = 80) -> np.ndarray:
    """Even bins over the part that is shown; distances begin at 0."""
    low, high = (0.0 if name == "distance" else shown[0]), shown[1]
    return np.linspace(low, high if high > low else low + 1.0, bins + 1)


def _plain(value: float) -> float | None:
    return value if np.isfinite(value) else None
