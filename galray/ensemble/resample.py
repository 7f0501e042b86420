"""Resampling that keeps what belongs together: splits before bootstraps, orbits and sky blocks whole.

A duplicate of a training star in the validation set would make the held-out figure too good, and two
samples of one orbit are not independent stars; so the split comes first and both the split and the
bootstrap move whole groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from galray.errors import GalrayError

__all__ = ["bootstrap_counts", "bootstrap_indices", "split_indices"]


def split_indices(
    num_rows: int, fraction: float, seed: int, groups: NDArray[np.integer] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split rows into training and validation without dividing a group.

    Arguments:
        num_rows: Number of rows.
        fraction: Part of the groups that go to validation, between 0 and 1.
        seed: Seed of the split; the same for every member of a run.
        groups: Group of each row `(num_rows,)`, such as an orbit id; each row its own when absent.

    Returns:
        Sorted row numbers of training and of validation.

    Raises:
        GalrayError: Either part would be empty.
    """
    labels, count = _labels(num_rows, groups)
    num_held = round(fraction * count)
    if not 0 < num_held < count:
        raise GalrayError(
            f"a validation fraction of {fraction:g} of {count} independent stars leaves one part empty",
            "choose training.validation_fraction between 0.05 and 0.5, or a larger selection",
        )
    held = np.zeros(count, dtype=bool)
    held[np.random.default_rng(seed).permutation(count)[:num_held]] = True
    is_held = held if labels is None else held[labels]
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def bootstrap_counts(
    num_rows: int, seed: int, groups: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """Draw how often each row appears in a bootstrap sample.

    Arguments:
        num_rows: Number of rows.
        seed: Seed of the bootstrap.
        groups: Group of each row `(num_rows,)`: groups are drawn with replacement, their rows together.

    Returns:
        Multiplicities `(num_rows,)`, usable as integer weights.
    """
    labels, count = _labels(num_rows, groups)
    times = np.bincount(np.random.default_rng(seed).integers(count, size=count), minlength=count)
    return times if labels is None else times[labels]


def bootstrap_indices(
    num_rows: int, seed: int, groups: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """Draw the rows of a bootstrap sample, sorted, each as often as it was drawn.

    Arguments as in `bootstrap_counts`.
    """
    return np.repeat(np.arange(num_rows), bootstrap_counts(num_rows, seed, groups))


def _labels(num_rows: int, groups: NDArray[np.integer] | None) -> tuple[NDArray[np.int64] | None, int]:
    if num_rows < 1:
        raise GalrayError("there are no stars to resample", "check that the selection keeps any star at all")
    if groups is None:
        return None, num_rows
    groups = np.asarray(groups)
    if groups.shape != (num_rows,):
        raise ValueError(f"groups must have shape ({num_rows},), not {groups.shape}")
    names, labels = np.unique(groups, return_inverse=True)
    return labels, len(names)
