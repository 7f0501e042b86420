"""A run's report: one page with figures, and a short table for the terminal."""

from galray.report.console import table
from galray.report.html import build
from galray.report.published import PublishedValue, published

__all__ = ["PublishedValue", "build", "published", "table"]
