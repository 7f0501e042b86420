"""A node of a cluster is lost in the middle of an ensemble: every member ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from galray.ensemble import EnsembleSettings, FamilyDesign, design, run_members

pytestmark = pytest.mark.cluster


def slow_member(spec, folder, context):
    """A member that takes a while and says where it ran."""
    import ray

    calls = Path(context["calls"])
    node = ray.get_runtime_context().get_node_id()
    with open(calls / spec["id"], "a") as handle:
        handle.write(f"{node} {os.getpid()}\n")
    time.sleep(context["sleep"])
    return {"node": node, "value": spec["streams"]["training"] % 1000}


@pytest.fixture
def nodes():
    """Three nodes of one CPU each, with nothing of the session's own cluster in the way."""
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 1024**2}
    )
    workers = [cluster.add_node(num_cpus=1, object_store_memory=80 * 1024**2) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster, workers
    ray.shutdown()
    cluster.shutdown()


def test_a_lost_node_costs_no_member(nodes, tmp_path):
    cluster, workers = nodes
    none = FamilyDesign(seeds=0)
    specs = design(EnsembleSettings(flow=none, moments=none, score=FamilyDesign(seeds=7)), 1)
    calls = tmp_path / "calls"
    calls.mkdir()
    lost: list[str] = []

    def on_done(spec, outcome):
        """When the first members are done, take away the node of a member that runs."""
        if lost or sum(1 for path in (tmp_path / "members").glob("00?/result.json")) < 2:
            return
        running = {path.read_text().split()[-2] for path in calls.iterdir()}
        victim = next(node for node in workers if node.node_id in running)
        lost.append(victim.node_id)
        cluster.remove_node(victim, allow_graceful=False)

    context = {"calls": str(calls), "sleep": 3.0}
    settings = EnsembleSettings(max_crashes=4)
    outcomes = run_members(specs, slow_member, tmp_path / "members", context, settings, on_done=on_done)
    assert lost, "a node was removed"
    assert [o.error for o in outcomes] == [""] * 7
    assert all(o.finished for o in outcomes)
    assert [o.result["value"] for o in outcomes] == [s.streams["training"] % 1000 for s in specs]
    interrupted = [path for path in calls.iterdir() if len(path.read_text().splitlines()) > 1]
    assert interrupted, "a member that ran on the lost node was started again"
    again = run_members(specs, slow_member, tmp_path / "members", context, settings)
    assert all(o.reused for o in again)
