"""What a search over hyperparameters may choose from, and how long it goes on."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from galray.settings import Settings

__all__ = ["SearchRange", "TuneSettings"]

INCOMPARABLE = (
    *("coordinates", "objective", "smoothing", "velocity_weight", "noise", "conditional"),
    *("validation_fraction", "workers", "device"),
)
"""Keys that change what the held-out loss means or what it is measured on, or that change no number."""


class SearchRange(Settings):
    """What one key may be: one of several values, or a number between two."""

    values: tuple[Any, ...] = ()
    """The choices; a plain list in the configuration means the same."""
    low: float | None = None
    """Smallest number."""
    high: float | None = None
    """Largest number."""
    log: bool = False
    """Draw the logarithm evenly, as suits learning rates."""
    integer: bool = False
    """Whole numbers only."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, given: Any) -> Any:
        return {"values": given} if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _one_kind(self) -> SearchRange:
        bounds = self.low is not None and self.high is not None
        if bool(self.values) == bounds or (self.low is None) != (self.high is None):
            raise ValueError("give a list of values, or both low and high")
        if self.low is not None and self.high is not None:
            if not self.low < self.high:
                raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
            if self.log and self.low <= 0:
                raise ValueError(f"log needs a positive low, not {self.low:g}")
            if self.integer and (self.low % 1 or self.high % 1):
                raise ValueError("integer needs whole numbers as low and high")
        return self

    @property
    def corners(self) -> tuple[Any, ...]:
        """Every value of a list, or both ends: what must be valid if all in between shall be."""
        if self.values:
            return self.values
        ends = (self.low, self.high)
        return tuple(int(end) for end in ends) if self.integer else ends  # type: ignore[arg-type]

    def draw(self, rng: np.random.Generator) -> Any:
        """One choice, as likely as any other."""
        if self.values:
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.low, self.high
        assert low is not None
        assert high is not None
        if self.integer:
            high += 1  # the last whole number is as likely as the others
        value = low * (high / low) ** rng.random() if self.log else rng.uniform(low, high)
        return int(value) if self.integer else float(value)


class TuneSettings(Settings):
    """A search for the hyperparameters with the least held-out loss."""

    family: Literal["flow", "score"] = Field(default="score", description="The family of models to tune.")
    space: dict[str, SearchRange] = Field(
        default_factory=dict,
        description="What to vary: dotted keys of the configuration, such as score.hidden or "
        "training.score.learning_rate, each with a list of values or low and high.",
    )
    trials: int = Field(default=16, ge=1, description="Trials in all.")
    hours: float | None = Field(default=None, gt=0, description="Wall hours after which none is started.")
    search: Literal["optuna", "random"] = Field(
        default="optuna", description="Choose trials by what the others found (TPE), or at random."
    )
    asha: bool = Field(
        default=True,
        description="Stop trials early that are behind others of the same age (asynchronous halving).",
    )
    grace_epochs: int = Field(default=3, ge=1, description="Epochs that every trial may do.")
    reduction: float = Field(
        default=3.0,
        gt=1,
        description="Of so many trials of the same age, one goes on to so many times its age.",
    )
    stars: int | None = Field(
        default=None, ge=1000, description="Train on so many of the stars, for speed; absent: on all."
    )

    @model_validator(mode="after")
    def _own_keys(self) -> TuneSettings:
        """A trial trains one family: other keys would change nothing, and some would change the measure."""
        heads = (f"{self.family}.", f"training.{self.family}.")
        for key in self.space:
            head = next((head for head in heads if key.startswith(head)), None)
            if head is None:
                raise ValueError(f"space: '{key}' does not belong to {heads[0]}* or {heads[1]}*")
            name = key[len(head) :].split(".")[0]
            if name in INCOMPARABLE and not (name == "coordinates" and self.family == "flow"):
                raise ValueError(
                    f"space: '{key}' changes what the held-out loss is measured on: losses do not compare"
                )
        return self
