"""Where a run finds its Ray cluster and how much of this machine it may use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from galray.cluster.needs import TaskNeeds
from galray.settings import Settings

__all__ = ["ClusterSettings"]


class ClusterSettings(Settings):
    """The Ray cluster of a run: an existing one by its address, or one started on this machine."""

    enabled: bool = Field(
        default=True,
        description="Use Ray at all; false runs everything inside one process, slowly but simply.",
    )
    address: str = Field(
        default="",
        description='Cluster to join: "" starts one here (inside a Ray job it joins the cluster of '
        'the job), "auto" joins the one that runs here, "host:6379" a head node.',
    )
    num_cpus: int | None = Field(
        default=None,
        ge=1,
        description="CPUs of a cluster started here; absent: all that this process may use.",
    )
    num_gpus: int | None = Field(
        default=None, ge=0, description="GPUs of a cluster started here; absent: all that Ray finds."
    )
    object_store_mb: int = Field(
        default=512,
        ge=80,
        description="Shared memory of a cluster started here in MiB; galray sends paths and small arrays.",
    )
    dashboard: bool = Field(default=False, description="Start Ray's dashboard (adds about ten seconds).")
    namespace: str = Field(default="galray", description="Ray namespace of the run's actors.")
    auth: Literal["", "disabled", "token"] = Field(
        default="",
        description='Value of RAY_AUTH_MODE; "" keeps that of the environment, and without one is "disabled" '
        'for a cluster started here and "token" where a token is at hand for a cluster joined.',
    )
    autoscaling: bool = Field(
        default=False,
        description="The cluster may grow: requests that its present nodes cannot hold wait, not fail.",
    )
    tasks: TaskNeeds = Field(
        default=TaskNeeds(),
        description="What a worker of the ingest, and a task of the moments or a mock, needs; members have "
        "their own in [ensemble].",
    )
    log_to_driver: bool = Field(
        default=False, description="Print the workers' output on the driver's terminal."
    )
