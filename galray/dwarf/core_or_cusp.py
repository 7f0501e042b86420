"""Is a halo cored or cuspy? The posterior of its central slope decides, or says that it cannot."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galray.dwarf.product_settings import ProductSettings

__all__ = ["verdict"]

Array = NDArray[np.float64]


def verdict(slope: Array, settings: ProductSettings, prior: Array | None = None) -> dict[str, Any]:
    """Say whether a halo is cored or cuspy by the posterior of its slope at the central radius.

    Arguments:
        slope: Samples of γ.
        settings: What counts as a core, as a cusp, and as certain.
        prior: Samples of γ from the prior: the evidence is the change of the odds.

    Returns:
        ``verdict``, probabilities of both, and with a prior ln of the Bayes factor of core over cusp. The
        verdict is ``core`` or ``cusp`` where the slope is certainly one, ``no cusp`` or ``no core`` where
        only the opposite is excluded (the rest may lie between the two), else ``undecided``.
    """

    def parts(samples: Array) -> tuple[float, float]:
        n = len(samples)
        core = ((samples < settings.core_below).sum() + 0.5) / (n + 1)
        cusp = ((samples > settings.cusp_above).sum() + 0.5) / (n + 1)
        return float(core), float(cusp)

    core, cusp = parts(slope)
    called = "undecided"
    # where more lies on the core's side: is it certain to be one, or is nothing left for a cusp?
    if core > cusp and 1 - cusp >= settings.certain:
        called = "core" if core >= settings.certain else "no cusp"
    elif cusp > core and 1 - core >= settings.certain:
        called = "cusp" if cusp >= settings.certain else "no core"
    found: dict[str, Any] = {"verdict": called, "core": core, "cusp": cusp}
    found |= {"core_below": settings.core_below, "cusp_above": settings.cusp_above}
    if prior is not None:
        prior_core, prior_cusp = parts(prior)
        found |= {
            "prior_core": prior_core,
            "prior_cusp": prior_cusp,
            "log_bayes_factor": math.log(core / cusp) - math.log(prior_core / prior_cusp),
        }
    return found
