"""Join a Ray cluster or start one here, say what it has, and refuse what it can never give.

Ray is imported only when a connection is asked for, so that `import galray.cluster` stays cheap and
the environment variables that Ray reads at its start can still be set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from galray.cluster.needs import TaskNeeds
from galray.cluster.settings import ClusterSettings
from galray.errors import GalrayError

__all__ = [
    "Connection",
    "Resources",
    "connect",
    "is_connected",
    "may_grow",
    "node_leaves",
    "require",
    "resources",
    "task_needs",
    "without_cluster",
]

_TOLERANCE = 1e-6
_current: Connection | None = None
_hidden = False


@dataclass(frozen=True)
class Resources:
    """What a cluster, or without one this machine, has to offer.

    Arguments:
        connected: Whether a Ray cluster stands behind the figures.
        num_nodes: Nodes alive.
        num_cpus: CPUs in all.
        num_gpus: GPUs in all.
        max_node_cpus: CPUs of the largest node: no single task can have more.
        max_node_gpus: GPUs of the largest node.
        free_cpus: CPUs not in use now.
        free_gpus: GPUs not in use now.
        memory_gb: Memory in GB.
        object_store_gb: Shared object store in GB.
    """

    connected: bool
    num_nodes: int
    num_cpus: float
    num_gpus: float
    max_node_cpus: float
    max_node_gpus: float
    free_cpus: float
    free_gpus: float
    memory_gb: float
    object_store_gb: float

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as plain numbers."""
        return asdict(self)


class Connection:
    """A live connection to Ray; closes what it started and nothing else.

    Use as a context manager, or call `disconnect`.

    Arguments:
        settings: The settings it was made from.
        owned: Whether this connection started the cluster or joined it itself.
    """

    def __init__(self, settings: ClusterSettings, *, owned: bool) -> None:
        self.settings = settings
        self.owned = owned

    @property
    def connected(self) -> bool:
        """Whether Ray answers behind this connection (false when the settings switch Ray off)."""
        return self.settings.enabled and is_connected()

    def disconnect(self) -> None:
        """Shut the cluster down if this connection started it; a second call does nothing."""
        global _current
        if self.owned:
            self.owned = False
            import ray

            if ray.is_initialized():
                ray.shutdown()
        if _current is self:
            _current = None

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.disconnect()


def connect(settings: ClusterSettings | None = None) -> Connection:
    """Join the cluster that the settings (or a surrounding Ray job) name, or start one here.

    A connection of this process that is already open is used as it is and is not closed by the result.
    A local start never joins a cluster that another program left behind.

    Arguments:
        settings: The cluster section of the configuration; defaults when absent.

    Returns:
        The connection, also a context manager.

    Raises:
        GalrayError: No cluster answers at the address, or a local one does not come up.
    """
    global _current
    settings = settings or ClusterSettings()
    if not settings.enabled or is_connected():
        connection = Connection(settings, owned=False)
        _current = _current or connection
        return connection
    address = settings.address or os.environ.get("RAY_ADDRESS", "")
    local = address in ("", "local")
    _set_environment(settings, local=local)
    if not local:
        _knock(address)
    import ray

    options: dict[str, Any] = {
        "namespace": settings.namespace,
        "log_to_driver": settings.log_to_driver,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if local:
        # Only a cluster of our own takes sizes: Ray refuses num_cpus when it joins one.
        options |= {
            "address": "local",
            "num_cpus": settings.num_cpus or _usable_cpus(),
            "num_gpus": settings.num_gpus,
            "include_dashboard": settings.dashboard,
            "object_store_memory": settings.object_store_mb * 1024**2,
        }
    else:
        options["address"] = address
    try:
        with _quiet_stderr(enabled=not settings.log_to_driver):
            ray.init(**options)
    except Exception as error:
        # Also a Ray whose start failed half way must leave nothing behind.
        with contextlib.suppress(Exception):
            ray.shutdown()
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if local:
            raise GalrayError(
                f"Ray did not start on this machine: {first}",
                "run `galray doctor`; on a busy machine try again, or do without Ray: cluster.enabled=false",
            ) from error
        raise GalrayError(
            f"no Ray cluster answers at cluster.address = {address!r}: {first}",
            "check the address and RAY_AUTH_MODE, or leave cluster.address empty to start one here",
        ) from error
    _current = Connection(settings, owned=True)
    return _current


def is_connected() -> bool:
    """Tell whether this process has an open connection to Ray, without importing Ray."""
    ray = sys.modules.get("ray")
    return not _hidden and bool(ray is not None and getattr(ray, "is_initialized", lambda: False)())


@contextlib.contextmanager
def without_cluster() -> Iterator[None]:
    """Work in this process alone inside the block: for a task that shall not start tasks of its own."""
    global _hidden
    before, _hidden = _hidden, True
    try:
        yield
    finally:
        _hidden = before


def resources(needs: TaskNeeds | None = None) -> Resources:
    """Measure what the connected cluster has, or this machine when there is none.

    Arguments:
        needs: Count only the nodes that can hold such a task.

    Returns:
        The figures; GPUs of a machine without a cluster are those that torch can use.
    """
    if not is_connected():
        cpus, gpus = float(_usable_cpus()), float(_torch_gpus())
        return Resources(False, 1, cpus, gpus, cpus, gpus, cpus, gpus, _memory_gb(), 0.0)
    import ray

    free = ray.available_resources()
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node["Resources"] for node in alive if needs is None or not needs.missing(node)]

    def total(name: str) -> float:
        return sum(node.get(name, 0.0) for node in nodes)

    return Resources(
        connected=True,
        num_nodes=len(nodes),
        num_cpus=total("CPU"),
        num_gpus=total("GPU"),
        max_node_cpus=max((node.get("CPU", 0.0) for node in nodes), default=0.0),
        max_node_gpus=max((node.get("GPU", 0.0) for node in nodes), default=0.0),
        free_cpus=free.get("CPU", 0.0),
        free_gpus=free.get("GPU", 0.0),
        memory_gb=total("memory") / 1e9,
        object_store_gb=total("object_store_memory") / 1e9,
    )


def task_needs() -> TaskNeeds:
    """What a task of a pass over stars needs by the settings of this process's connection."""
    return _current.settings.tasks if _current is not None else TaskNeeds()


def may_grow() -> bool:
    """Whether the cluster of this process's connection adds nodes when they are asked for."""
    return _current is not None and _current.settings.autoscaling


def require(
    num_cpus: float = 1, num_gpus: float = 0, *, needs: TaskNeeds | None = None, what: str = "a task"
) -> Resources:
    """Refuse at once what Ray would let wait for ever.

    Arguments:
        num_cpus: CPUs that one task needs on one node.
        num_gpus: GPUs that one task needs on one node.
        needs: Both, with memory and labels, in their place.
        what: What needs them, for the message.

    Returns:
        The cluster's resources.

    Raises:
        GalrayError: No node can ever hold the task; not raised for a cluster that may grow
            (`cluster.autoscaling = true`).
    """
    needs = needs or TaskNeeds(cpus=num_cpus, gpus=num_gpus)
    have = resources()
    growing = may_grow()
    for name, need, most in (
        ("CPU", needs.cpus, have.max_node_cpus),
        ("GPU", needs.gpus, have.max_node_gpus),
    ):
        if need > most + _TOLERANCE and not growing:
            where = "the largest node of the Ray cluster" if have.connected else "this machine"
            raise GalrayError(
                f"{what} needs {need:g} {name}s on one node, {where} has {most:g}",
                f"ask for at most {most:g}, join a larger cluster with cluster.address, or set "
                "cluster.autoscaling=true if this one will grow",
            )
    if have.connected and not growing:
        import ray

        lacking = [needs.missing(node) for node in ray.nodes() if node["Alive"]]
        if lacking and all(lacking):
            raise GalrayError(
                f"{what} fits on none of the Ray cluster's {len(lacking)} nodes: one lacks {lacking[0]}",
                "ask for less, correct the labels, or set cluster.autoscaling=true if the cluster will grow",
            )
    return have


def node_leaves() -> bool:
    """Whether the node of this process has been given notice, as spot nodes are before they are taken away.

    False without a cluster, and where the cluster does not tell.
    """
    if not is_connected():
        return False
    import ray

    try:
        # Ray Train's own watcher looks there; there is no public way.
        leaving = ray._private.state.state.get_draining_nodes()
        return ray.get_runtime_context().get_node_id() in leaving
    except Exception:
        return False


def _knock(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and other forms that only Ray can resolve
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise GalrayError(
            f"nothing listens at cluster.address = {address!r}: {error.strerror or error}",
            "check host, port and firewall, or leave cluster.address empty to start a cluster here",
        ) from error


def _set_environment(settings: ClusterSettings, *, local: bool) -> None:
    """Set what Ray reads from the environment when it is imported and started."""
    if settings.auth:
        os.environ["RAY_AUTH_MODE"] = settings.auth
    elif local:
        # Since 2.59 a local start without the variable writes ~/.ray/auth_token and needs a home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    elif os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Under `uv run` Ray would upload the working directory and rebuild the environment on every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@contextlib.contextmanager
def _quiet_stderr(*, enabled: bool) -> Any:
    """Raise the level of Ray's own loggers while it starts: its notes are not the user's concern."""
    names = ("ray", "ray._private.worker", "ray._private.services")
    before = {name: logging.getLogger(name).level for name in names}
    if enabled:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level if not enabled else max(level, logging.WARNING))


def _usable_cpus() -> int:
    """Count the CPUs this process may run on, which a container or taskset may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return max(len(os.sched_getaffinity(0)), 1)
    return os.cpu_count() or 1


def _torch_gpus() -> int:
    """Count the GPUs that torch can use; 0 without torch or without drivers."""
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count()


def _memory_gb() -> float:
    """Give the machine's memory in GB."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):
        return 0.0
