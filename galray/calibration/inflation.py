"""A calibration applied to a run: its errors times the factors that mock galaxies showed to be needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from galray.calibration.mocks import differences, procedure
from galray.calibration.tables import KEY
from galray.catalog.mirror import local_copy
from galray.catalog.storage import is_url
from galray.config import RunConfig
from galray.ensemble import Estimate
from galray.errors import GalrayError
from galray.provenance import file_hash
from galray.results import Places
from galray.tables import read_table

__all__ = ["calibration_table", "inflate", "read_calibration"]


def calibration_table(config: RunConfig) -> Path:
    """The file that `calibration.apply` names; of one at a URL, a fresh copy on this node.

    Raises:
        GalrayError: There is none at the URL.
    """
    return local_copy(config.calibration.apply, config.catalog.storage.signed)


def read_calibration(config: RunConfig) -> Any:
    """The table that `calibration.apply` names, once it is sure that it holds for this run.

    Raises:
        GalrayError: It is absent, no calibration, one of other methods or settings, or of too few mocks.
    """
    path = config.calibration.apply
    table = read_table(calibration_table(config))
    known = table.meta.get(KEY)
    if not isinstance(known, dict):
        raise GalrayError(
            f"calibration.apply: {path} is no calibration",
            "name the calibration.ecsv that `galray calibrate` wrote",
        )
    if "outside" not in known:
        raise GalrayError(
            f"calibration.apply: {path} is of an earlier version, which judged terms that no mock exercises",
            "run `galray calibrate` again: it measures nothing twice",
        )
    theirs = known["procedure"]
    if sorted(config.methods) != theirs["methods"]:
        methods = ", ".join(theirs["methods"])
        raise GalrayError(
            f"calibration.apply: {path} is of {methods}, the run of {', '.join(config.methods)}",
            "calibrate the methods of the run together",
        )
    if keys := differences(theirs, procedure(config)):
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise GalrayError(
            f"calibration.apply: {path} was made with other settings: {', '.join(keys[:3])}{more}",
            "run `galray calibrate` with the configuration of the run",
        )
    if not np.isfinite(table["inflation"]).all():
        raise GalrayError(
            f"calibration.apply: {path} holds no inflation factors: {known['mocks']} mocks are too few",
            "raise calibration.mocks and run `galray calibrate` again",
        )
    return table


def inflate(
    config: RunConfig, places: Places, estimates: Mapping[str, Estimate], num_stars: int
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Multiply the errors of the calibrated quantities.

    Every calibrated term of a budget grows by the same factor; those that the mocks did not exercise stand
    outside and stay as they are, and so does what the mocks were not judged for. A factor holds for all
    places of a quantity.

    Arguments:
        config: The run's.
        places: Where it measured.
        estimates: Of every method and combined.
        num_stars: Stars that were measured.

    Returns:
        The estimates, and the record: the file and its checksum, what it is of, the factors, and the terms
        that they are not for.
    """
    table = read_calibration(config)
    known = table.meta[KEY]
    outside = known["outside"]
    factors = {(str(row["method"]), str(row["quantity"])): float(row["inflation"]) for row in table}
    if len(config.methods) == 1:  # the combined value is that of the one method
        factors |= {("combined", name): factor for (_, name), factor in factors.items()}
    out = {}
    for method, estimate in estimates.items():
        grow = [factors.get((method, quantity.name), 1.0) for quantity in places.quantities]
        out[method] = estimate.inflated(np.array(grow), outside)
    path, apply = calibration_table(config), config.calibration.apply
    keep = ("name", "mocks", "stars", "config_hash", "seed", "created", "galray", "git")
    record = {
        "file": apply if is_url(apply) else str(path.resolve()),
        "sha256": file_hash(path),
        **{key: known[key] for key in keep},
        "factors": [{"method": m, "quantity": q, "factor": f} for (m, q), f in factors.items()],
        "outside": outside,
    }
    headline = factors.get(("combined", "rho_dm_average"), 1.0)
    record["sentence"] = (
        f"Errors are calibrated: those of ρ_DM averaged over heights are multiplied by {headline:.2f}, as "
        f"{known['mocks']} mock galaxies of known truth showed to be needed ({known['name']}, "
        f"{known['stars']:,} stars each, this run {num_stars:,}; {known['created']}, "
        f"galray {known['galray']}, revision {known['git']}; {apply}, sha256 {record['sha256'][:12]}). "
        f"Terms that such mocks do not exercise are left as they are: {', '.join(outside)}."
    )
    return out, record
