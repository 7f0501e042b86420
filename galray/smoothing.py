"""What a run's densities have to do with the width of their kernel: the budget's term "smoothing"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from galray.config import RunConfig
from galray.ensemble import Estimate
from galray.gravity import Kernel, smoothed_density
from galray.results import Places

__all__ = ["with_smoothing"]


def with_smoothing(
    config: RunConfig,
    places: Places,
    baryons: Any,
    estimates: Mapping[str, Estimate],
    fields: Mapping[str, Sequence[Any]],
) -> dict[str, Estimate]:
    """Add to each method's budget what its densities lost or gained by their smoothing.

    A kernel of width h changes a density by c h² to first order, so a narrower one of width w h tells c: the
    whole shift is (ρ_h − ρ_wh) / (1 − w²), one cause, fully correlated between places. Baryons are smoothed
    along; noise of the narrower density is part of the term.

    Arguments:
        config: The run's configuration; its `ensemble.smoothing_widths` are tried.
        places: Where the run measures.
        baryons: What is subtracted.
        estimates: Of each method.
        fields: The fields behind each method's value.
    """
    widths = config.ensemble.smoothing_widths
    x = torch.from_numpy(places.x)
    rows = places.density_rows
    nothing = np.zeros_like(places.x)

    def densities(width: float) -> dict[str, np.ndarray]:
        own = config.gravity.kernel
        narrow = own.model_copy(update={"widths_kpc": tuple(width * h for h in own.widths_kpc)})
        kernel = Kernel.from_settings(narrow)
        subtracted = np.asarray(baryons.smoothed_density(x, kernel))
        found = {}
        for method, members in fields.items():
            density = np.full(len(x), np.nan)
            parts = [np.asarray(smoothed_density(field, x[rows], kernel).detach()) for field in members]
            density[rows] = np.mean(parts, axis=0)
            found[method] = places.values(nothing, density, subtracted)
        return found

    own = densities(1.0)
    narrower = [densities(width) for width in widths]
    out = {}
    for method, estimate in estimates.items():
        pairs = zip(widths, narrower, strict=True)
        shifts = [(own[method] - values[method]) / (1.0 - width**2) for width, values in pairs]
        shift = np.nan_to_num(np.mean(shifts, axis=0))
        out[method] = estimate.with_term("smoothing", np.outer(shift, shift), len(widths), len(widths))
    return out
