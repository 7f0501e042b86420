"""Additive sums over stars: what a shard contributes to the moment equations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from galray.errors import GalrayError
from galray.gravity.splines import Array

__all__ = ["MomentSums", "add_up", "fold"]


@dataclass
class MomentSums:
    """Sums over a block of stars; add blocks with ``+``.

    Attributes:
        matrix: Σ w (∂ᵥg_k · ∇B_p), and −Σ w g_k v·∇S_q beside it where a selection is solved for: shape
            (moments, splines).
        vector: Σ w (v·∂ₓg_k), with Σ w g_k v·∇log ε of a known selection, shape (moments,).
        spin: Σ w ∂g_k/∂φ, the change of g_k as its star is turned along Galactic rotation, with Σ w g_k
            ∂log ε/∂φ of a known selection: what a frame that turns takes from `vector`, per unit of Ω.
            Shape (moments,).
        scatter: Σ w² ψ ψᵀ of the residual moments ψ under a pilot solution, (moments, moments): the
            covariance of ``vector − matrix @ θ``. None where another block holds it.
        counts: Stars under each test function, shape (moments,).
        num_stars: Stars inside the ball.
        num_outside: Stars given that lie outside it.
        key: Identifies the settings and the ball; only equal keys add.
    """

    matrix: Array
    vector: Array
    spin: Array
    scatter: Array | None
    counts: Array
    num_stars: int
    num_outside: int
    key: str

    def __add__(self, other: MomentSums) -> MomentSums:
        if self.key != other.key:
            raise GalrayError(
                "sums of moments with different settings or balls cannot be added",
                "make both with one Moments",
            )
        return MomentSums(
            self.matrix + other.matrix,
            self.vector + other.vector,
            self.spin + other.spin,
            _plus(self.scatter, other.scatter),
            self.counts + other.counts,
            self.num_stars + other.num_stars,
            self.num_outside + other.num_outside,
            self.key,
        )

    def __radd__(self, other: Any) -> MomentSums:
        return self if isinstance(other, int) and other == 0 else NotImplemented


def _plus(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def add_up(sums: Iterable[MomentSums]) -> MomentSums:
    """The sum of at least one block."""
    total: MomentSums | None = None
    for block in sums:
        total = block if total is None else total + block
    if total is None:
        raise GalrayError("no sums to solve", "give at least one block of stars")
    return total


def fold(sums: Iterable[MomentSums], num_blocks: int) -> list[MomentSums]:
    """Add a stream of blocks up to at most `num_blocks`, number i to block i mod `num_blocks`.

    Memory stays flat however many shards there are: the scatter, of which the total alone is needed, is kept
    once, in the first block.
    """
    blocks: list[MomentSums] = []
    scatter: Array | None = None
    for i, one in enumerate(sums):
        scatter = _plus(scatter, one.scatter)
        bare = replace(one, scatter=None)
        if i < num_blocks:
            blocks.append(bare)
        else:
            blocks[i % num_blocks] = blocks[i % num_blocks] + bare
    if blocks:
        blocks[0] = replace(blocks[0], scatter=scatter)
    return blocks
