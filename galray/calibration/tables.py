"""The tables of a calibration: one row per quantity, and one per quantity and mock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from galray.calibration.statistics import LEVELS
from galray.tables import write_table

if TYPE_CHECKING:
    from galray.calibration.run import Calibration, Judgement

__all__ = ["KEY", "write_tables"]

KEY = "galray_calibration"
"""Where calibration.ecsv says in its metadata what it is of."""


def write_tables(calibration: Calibration) -> None:
    """Write ``calibration.ecsv``, which runs may apply, and ``mocks.ecsv`` with every single measurement."""
    from astropy.table import QTable

    judged = QTable(rows=[_row(j) for j in calibration.judgements])
    judged.meta = {
        "description": "galray calibration: bias in the unit of each row; inflation is the factor on errors",
        KEY: calibration.identity,
    }
    write_table(judged, calibration.table)
    numbers = {index: calibration.truth(index) for index in calibration.records}
    mocks = QTable(
        rows=[
            {
                "mock": int(index),
                "method": j.method,
                "quantity": j.name,
                "where": j.where,
                "unit": j.unit,
                "truth": truth,
                "value": value,
                "error": error,
                "dof": dof,
                "pit": pit,
                **numbers[int(index)],
            }
            for j in calibration.judgements
            for index, truth, value, error, dof, pit in zip(
                j.claims.mock, j.claims.truth, j.claims.value, j.claims.error, j.claims.dof, j.claims.pit,
                strict=True,
            )
        ]
    )  # fmt: skip
    mocks.meta = {
        "description": "galray calibration: every measurement of every mock, with what it was drawn from"
    }
    write_table(mocks, calibration.folder / "mocks.ecsv")


def _row(j: Judgement) -> dict[str, Any]:
    row: dict[str, Any] = {
        "method": j.method,
        "quantity": j.name,
        "where": j.where,
        "unit": j.unit,
        "named": j.named,
        "mocks": j.raw.number,
    }
    for level, fraction, error in zip(LEVELS, j.raw.fractions, j.raw.errors, strict=True):
        row |= {f"held_{100 * level:.0f}": fraction, f"held_{100 * level:.0f}_error": error}
    names = ("bias", "bias_error", "mean_pull", "width", "width_error")
    row |= {name: getattr(j.raw, name) for name in names}
    row |= {"inflation": j.inflation, "fitted": j.fitted, "inflation_error": j.inflation_error}
    tested = j.tested
    row |= {
        "tested_mocks": 0 if tested is None else tested.number,
        "tested_68": np.nan if tested is None else tested.fractions[LEVELS.index(0.68)],
        "tested_90": np.nan if tested is None else tested.fractions[LEVELS.index(0.90)],
        "tested_width": np.nan if tested is None else tested.width,
    }
    return row
