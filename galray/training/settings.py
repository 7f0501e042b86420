"""The settings of a training run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from galray.settings import Settings

__all__ = ["ScoreTrainingSettings", "TrainingSettings"]

Count = Annotated[int, Field(ge=1)]


class TrainingSettings(Settings):
    """How any model is trained."""

    epochs: int = Field(default=30, ge=1)
    """Most passes over the training stars."""
    batch_size: int = Field(default=2048, ge=1)
    """Stars per step, over all workers together."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    """Rise over `warmup` and cosine fall (onecycle), cosine fall alone, or neither."""
    warmup: float = Field(default=0.15, ge=0, lt=1)
    """Part of all steps over which the learning rate of ``onecycle`` rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    grad_clip: float = Field(default=5.0, ge=0)
    """Largest norm of the gradient; 0 turns clipping off."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay per step of the moving average of weights that is validated and kept; 0 turns it off."""
    patience: int = Field(default=0, ge=0)
    """Epochs without a better held-out loss before training stops; 0 never stops early."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Part of the stars held out."""
    workers: Count | tuple[Count, Count] = 1
    """Processes that share a training run; more than 1 uses Ray Train. A pair (least, most) is elastic: the
    run starts with what the cluster has, goes on with fewer when a node is lost, and grows again."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of the steps: tf32 rounds the factors of matrix products on GPUs that can, bf16 is automatic mixed
    precision. Weights, sums and the held-out loss stay float32."""
    compile: bool = False
    """Compile the loss with torch.compile: a minute of start-up for faster steps on a GPU. Where that fails,
    training goes on without it, with a warning."""
    threads: int = Field(default=1, ge=0)
    """CPU threads per worker; 0 leaves torch's own choice."""
    checkpoint_every: int = Field(default=1, ge=1)
    """Epochs between checkpoints."""
    stripes: int = Field(default=8, ge=1)
    """Equal parts the stars are dealt into; every batch takes as many from each, so that any number of
    workers up to it sees the same global batches as one worker."""

    @property
    def min_workers(self) -> int:
        """Fewest workers the training runs with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers the training runs with."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while it trains."""
        return self.min_workers < self.max_workers

    @model_validator(mode="after")
    def _divisible(self) -> TrainingSettings:
        if self.batch_size % self.stripes:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of stripes {self.stripes}")
        if self.min_workers > self.max_workers:
            raise ValueError(f"workers {self.workers}: give (least, most), the smaller number first")
        if self.stripes % self.max_workers:
            # In between, elastic workers take unequal shares; at full strength none waits for another.
            raise ValueError(f"stripes {self.stripes} must be a multiple of workers {self.max_workers}")
        return self


class ScoreTrainingSettings(TrainingSettings):
    """How score networks are trained: smaller batches and longer steps than a likelihood takes.

    On Plummer spheres they lower the error of the score by a quarter and more at equal cost.
    """

    batch_size: int = Field(default=1024, ge=1)
    """Stars per step, over all workers together."""
    learning_rate: float = Field(default=6e-3, gt=0)
    """Peak learning rate of AdamW."""
