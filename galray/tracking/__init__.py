"""MLflow: every run and member recorded, none left running, none stopped by a failing server."""

from galray.tracking.settings import TrackingSettings
from galray.tracking.tracker import Tracker

__all__ = ["Tracker", "TrackingSettings"]
