"""Run one member: find its function, give it a folder, keep what it returns or how it failed."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from galray.catalog.mirror import Mirror, Place
from galray.cluster import node_leaves
from galray.ensemble.members import MemberSpec
from galray.ensemble.store import MemberOutcome, MemberStore, NodeLeavesError, kept
from galray.errors import GalrayError

__all__ = ["MemberFunction", "execute", "limit_threads", "resolve"]

MemberFunction = Callable[[dict[str, Any], str, Mapping[str, Any]], dict[str, Any] | None]
"""`function(spec, folder, context) -> result`: spec as of `MemberSpec.to_dict`, a folder to write into
(which may hold the checkpoints of an interrupted run), what all members share, JSON-ready results."""


def resolve(function: str | MemberFunction) -> MemberFunction:
    """Find the function of the members.

    Arguments:
        function: A callable, or "package.module:callable".

    Raises:
        GalrayError: There is no such module or callable.
    """
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise GalrayError(
            f"the members' function {function!r} cannot be imported on {os.uname().nodename}: {error}",
            'give it as "package.module:callable", installed on every node',
        ) from error
    return found


def execute(
    function: str | MemberFunction, spec: MemberSpec, place: Place, context: Mapping[str, Any]
) -> MemberOutcome:
    """Run one member from its empty (or interrupted) folder to its outcome on disk.

    Whatever ordinary exception the function raises becomes a failed outcome with its traceback beside
    it; an interrupt passes through and leaves the work folder for the next start.

    Arguments:
        function: The members' function.
        spec: The member.
        place: The folder of all members.
        context: What the function's third argument shall be.

    Returns:
        The outcome, already written.
    """
    if not place.folder.is_dir() and not isinstance(place, Mirror):
        raise GalrayError(
            f"the members' folder {place.folder} does not exist on node {os.uname().nodename}",
            "put the run directory on storage that all nodes of the cluster share, or at a URL",
        )
    store = MemberStore(place)
    work = store.begin(spec)
    start = time.monotonic()
    try:
        with kept(store, spec, node_leaves):
            result = resolve(function)(spec.to_dict(), str(work), context)
        if result is not None and not isinstance(result, dict):
            raise TypeError(f"a member's function must return a dict or None, not {type(result).__name__}")
    except NodeLeavesError:
        raise  # neither finished nor failed: it is started again, where there is a node
    except Exception:
        return store.finish(spec, seconds=time.monotonic() - start, traceback=traceback.format_exc())
    finally:
        _release_memory()
    return store.finish(spec, seconds=time.monotonic() - start, result=result)


@contextlib.contextmanager
def limit_threads(threads: int) -> Iterator[None]:
    """Give torch that many threads inside the block, and to libraries that load in it.

    Members run side by side, one per core: more threads than that only fight.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    torch_before = torch.get_num_threads() if torch is not None else None
    if torch is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before
        if torch is not None and torch_before is not None:
            torch.set_num_threads(torch_before)


def _release_memory() -> None:
    """Free what a member held: the next one lives in the same process."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
