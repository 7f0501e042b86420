"""Named random streams from one root seed."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["seed_for", "seed_sequence"]


def seed_sequence(root: int, *names: object) -> np.random.SeedSequence:
    """The stream of a named purpose: same root and names, same stream, whatever else was drawn.

    Arguments:
        root: The run's root seed.
        names: What the stream is for, for example ``("member", 3, "bootstrap")``.
    """
    digest = hashlib.sha256("/".join(str(name) for name in names).encode()).digest()
    return np.random.SeedSequence([root, *np.frombuffer(digest[:16], dtype=np.uint32).tolist()])


def seed_for(root: int, *names: object) -> int:
    """A 63-bit seed for the named purpose, for libraries that take one integer (torch, optuna)."""
    return int(seed_sequence(root, *names).generate_state(1, np.uint64)[0] >> 1)
