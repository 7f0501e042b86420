"""Calibration: a measurement repeated on mock galaxies of known truth, and what that says of its errors."""

from galray.calibration.settings import CalibrationSettings, PriorSettings
from galray.calibration.statistics import LEVELS, Claims, Coverage, coverage, fit_inflation

__all__ = [
    "LEVELS",
    "CalibrationSettings",
    "Claims",
    "Coverage",
    "PriorSettings",
    "coverage",
    "fit_inflation",
]
