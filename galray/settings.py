"""The base of every configuration section: frozen, typed, and strict about unknown keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["Settings"]


class Settings(BaseModel):
    """One section of a run's configuration, owned by the package that reads it.

    Unknown keys are errors, values are validated, and instances are immutable and hashable by their
    JSON form, so that a stage can be skipped when its settings have not changed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        """Refuse the character that ends a path or a name for the operating system."""
        for key, value in given.items() if isinstance(given, Mapping) else ():
            if any(
                "\0" in text
                for text in (value, *(value if isinstance(value, list) else ()))
                if isinstance(text, str)
            ):
                raise ValueError(f"{key}: holds a null character")
        return given
