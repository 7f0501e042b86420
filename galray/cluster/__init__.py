"""The Ray cluster: connect, ask what it has, run a function on every shard."""

from galray.cluster.connection import (
    Connection,
    Resources,
    connect,
    is_connected,
    may_grow,
    node_leaves,
    require,
    resources,
    task_needs,
    without_cluster,
)
from galray.cluster.mapping import ClusterExecutor, map_shards, stream_shards, wanted_tasks
from galray.cluster.needs import TaskNeeds
from galray.cluster.settings import ClusterSettings

__all__ = [
    "ClusterExecutor",
    "ClusterSettings",
    "Connection",
    "Resources",
    "TaskNeeds",
    "connect",
    "is_connected",
    "map_shards",
    "may_grow",
    "node_leaves",
    "require",
    "resources",
    "stream_shards",
    "task_needs",
    "wanted_tasks",
    "without_cluster",
]
