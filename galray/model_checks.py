"""The checks without truth of a run's models: each family's own, and one family against the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from galray.catalog import ShardStore
from galray.config import RunConfig
from galray.ensemble import MemberSpec, split_indices
from galray.rundir import read_json
from galray.seeds import seed_for

__all__ = ["AGREEMENT", "member_checks"]

AGREEMENT = "flow and score"
"""Under this name the agreement of the two families stands among the checks."""


def member_checks(
    config: RunConfig, folder: Path, store: ShardStore, specs: list[MemberSpec]
) -> dict[str, dict[str, Any]]:
    """Checks of each family's base member, and whether the families' scores agree on stars neither has seen.

    Arguments:
        config: The run's configuration.
        folder: The run directory.
        store: Its shards.
        specs: Its design.

    Returns:
        Rows by name, by family; see `galray.phasespace.run_checks`.
    """
    bases: dict[str, MemberSpec] = {}
    for spec in specs:
        if spec.varied == "base" and (_home(folder, spec) / "checks.json").is_file():
            bases.setdefault(spec.family, spec)
    found = {family: read_json(_home(folder, spec) / "checks.json") for family, spec in bases.items()}
    models = [_home(folder, bases[family]) / "model" for family in ("flow", "score") if family in bases]
    if len(models) == 2 and all(model.is_dir() for model in models):
        from galray.member_stars import noisy_states
        from galray.phasespace import load_model, posterior_stars
        from galray.phasespace.checks import check_agreement

        states = store.states(dtype=np.float32)
        seed = seed_for(config.seed, "split")  # one for the whole run
        flow, score = (
            split_indices(len(states), settings.validation_fraction, seed)[1]
            for settings in (config.training.flow, config.training.score)
        )
        held = np.intersect1d(flow, score)
        w = torch.from_numpy(states[held]).double()
        first, second = (load_model(model) for model in models)
        if first.settings.noise.treatment == second.settings.noise.treatment == "deconvolve":
            # Models of f before the errors are compared where its stars are, not where errors put them.
            rows = torch.from_numpy(noisy_states(store, {"draw": 0})[held])
            w = posterior_stars(first, rows, first.settings.noise, seed=config.seed)
        found[AGREEMENT] = check_agreement(first, second, w, seed=config.seed)
    return found


def _home(folder: Path, spec: MemberSpec) -> Path:
    return folder / "members" / f"{spec.index:03d}"
