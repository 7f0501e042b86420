"""The Ray cluster: connect, ask what it has, run a function on every shard."""

from galray.cluster.connection import (
    Connection,
    Resources,
    connect,
    is_connected,
    require,
    resources,
    without_cluster,
)
from galray.cluster.mapping import ClusterExecutor, map_shards, stream_shards
from galray.cluster.settings import ClusterSettings

__all__ = [
    "ClusterExecutor",
    "ClusterSettings",
    "Connection",
    "Resources",
    "connect",
    "is_connected",
    "map_shards",
    "require",
    "resources",
    "stream_shards",
    "without_cluster",
]
