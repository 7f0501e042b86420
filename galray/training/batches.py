"""Which stars go into which batch, on which worker: a function of seed, epoch and stripe alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from galray.errors import GalrayError
from galray.training.settings import TrainingSettings

__all__ = ["Stripes", "split"]


def split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and of held-out stars; at least one of each.

    Raises:
        GalrayError: Fewer than two stars.
    """
    if n < 2:
        raise GalrayError(f"{n} stars cannot be split into training and validation", "select more stars")
    order = np.random.default_rng(np.random.SeedSequence([seed, 0x5B117])).permutation(n)
    held = min(max(round(fraction * n), 1), n - 1)
    return np.sort(order[held:]), np.sort(order[:held])


class Stripes:
    """Draws batches by index: the stars dealt into equal stripes, each batch as many from each.

    Stripe s of S holds every S-th star, and a rank holds the stripes next to each other that fall to it, so
    the global batch of a step is the same set of stars for every number of ranks, and every rank takes as
    many steps. Where S is no multiple of the ranks, shares differ by one stripe, and `weight` makes the mean
    over ranks the mean over stars.

    Arguments:
        n: Training stars on all ranks together.
        settings: Batch size and number of stripes.
        seed: Of the batches.
        rank: This rank.
        world_size: Number of ranks.

    Attributes:
        count: Number of stripes.
        length: Stars of a stripe; up to S − 1 stars are left over.
        take: Stars of a stripe in a batch.
        steps: Batches of an epoch.
        mine: The stripes of this rank.
        weight: This rank's part of a batch, in units of an equal share.

    Raises:
        GalrayError: More ranks than stripes.
    """

    def __init__(self, n: int, settings: TrainingSettings, seed: int, rank: int, world_size: int) -> None:
        self.seed = seed
        self.count = self.number(n, settings)
        if self.count < world_size:
            raise GalrayError(f"{n} stars are too few for {world_size} workers", "use fewer workers")
        self.length = n // self.count
        self.take = min(settings.batch_size // settings.stripes, self.length)
        self.steps = self.length // self.take
        self.mine = self.share(self.count, rank, world_size)
        self.weight = len(self.mine) * world_size / self.count

    @staticmethod
    def number(n: int, settings: TrainingSettings) -> int:
        """Number of stripes of n stars."""
        return min(settings.stripes, max(n // 2, 1))

    @staticmethod
    def share(count: int, rank: int, world_size: int) -> range:
        """The stripes of a rank: near equal shares, the larger ones first."""
        size, larger = divmod(count, world_size)
        start = rank * size + min(rank, larger)
        return range(start, start + size + (rank < larger))

    def rows(self, n: int) -> np.ndarray:
        """The stars this rank needs, in the order `batches` counts them."""
        return np.concatenate([np.arange(s, n, self.count)[: self.length] for s in self.mine])

    def batches(self, epoch: int) -> Tensor:
        """Indices into this rank's rows: shape (steps, batch on this rank)."""
        parts = []
        for local, stripe in enumerate(self.mine):
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, 1, epoch, stripe]))
            order = rng.permutation(self.length)[: self.steps * self.take]
            parts.append(torch.from_numpy(order.reshape(self.steps, self.take) + local * self.length))
        return torch.cat(parts, 1)
