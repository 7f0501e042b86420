"""The base of every configuration section: frozen, typed, and strict about unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Settings"]


class Settings(BaseModel):
    """One section of a run's configuration, owned by the package that reads it.

    Unknown keys are errors, values are validated, and instances are immutable and hashable by their
    JSON form, so that a stage can be skipped when its settings have not changed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
