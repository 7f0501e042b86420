"""A node of a cluster is lost in the middle of an ensemble: every member ends."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from galray.catalog.mirror import Place
from galray.cluster import ClusterSettings, TaskNeeds, connect, stream_shards
from galray.config import load_config
from galray.ensemble import (
    EnsembleSettings,
    FamilyDesign,
    SearchRange,
    TuneSettings,
    design,
    run_members,
    run_search,
)
from galray.errors import GalrayError
from galray.pipeline import Pipeline
from galray.provenance import write_atomic
from tests.chain_config import write_config

pytestmark = pytest.mark.cluster

RATE = "training.score.learning_rate"


def slow_member(spec, folder, context):
    """A member that takes a while and says where it ran."""
    import ray

    calls = Path(context["calls"])
    node = ray.get_runtime_context().get_node_id()
    with open(calls / spec["id"], "a") as handle:
        handle.write(f"{node} {os.getpid()}\n")
    time.sleep(context["sleep"])
    return {"node": node, "value": spec["streams"]["training"] % 1000}


@pytest.fixture(scope="module")
def nodes():
    """A head of one CPU and two nodes of two, with nothing of the session's own cluster in the way."""
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 1024**2}
    )
    workers = [
        cluster.add_node(num_cpus=2, object_store_memory=80 * 1024**2, labels={"kind": kind})
        for kind in ("small", "big")
    ]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster, workers
    ray.shutdown()
    cluster.shutdown()


def where(shard: int) -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def trial(choices, folder, context, report):
    """A trial of one epoch that says where it ran."""
    write_atomic(Path(folder) / "curve.json", [{"epoch": 0, "validation": choices[RATE], "seconds": 0.0}])
    report({"epoch": 0, "validation": choices[RATE]})
    return {"node": where(0)}


def test_stages_run_on_the_nodes_that_they_ask_for(nodes, tmp_path):
    """Tasks over shards, members and trials go to the node with their label, free as the others are."""
    small, big = (node.node_id for node in nodes[1])
    with connect(ClusterSettings(tasks=TaskNeeds(labels={"kind": "big"}))):
        assert set(stream_shards(where, range(6))) == {big}

    none = FamilyDesign(seeds=0)
    settings = EnsembleSettings(
        flow=none,
        moments=none,
        score=FamilyDesign(seeds=3),
        labels={"kind": "small"},
        memory_gb_per_member=0.1,
    )
    (tmp_path / "calls").mkdir()
    context = {"calls": str(tmp_path / "calls"), "sleep": 0.0}
    outcomes = run_members(design(settings, 1), slow_member, tmp_path / "members", context, settings)
    assert {outcome.result["node"] for outcome in outcomes} == {small}

    tuning = TuneSettings(
        space={RATE: SearchRange(values=(1e-3, 1e-2))}, trials=2, search="random", asha=False
    )
    found = run_search(
        trial, tuning, Place(tmp_path / "search"), {}, seed=1, epochs=1, start={RATE: 1e-3},
        needs=TaskNeeds(labels={"kind": "!small"}), concurrent=2,
    )  # fmt: skip
    assert small not in [json.loads((one.folder / "outcome.json").read_text())["node"] for one in found]


def test_workers_of_a_training_go_to_the_nodes_that_carry_their_label(nodes, tmp_path):
    """By the configuration alone; what no node, or no node with that label, can hold is refused at once."""
    import ray

    path = write_config(tmp_path, num_stars=6000)

    def train(kind, *more):
        asked = ['methods=["score"]', "tracking.enabled=false", "training.score.workers=2"]
        Pipeline(load_config(path, [*asked, f'ensemble.labels={{kind="{kind}"}}', *more])).run(
            until="members"
        )

    def placed():
        """Nodes of all workers of trainings, by the order of their start."""
        actors = ray._private.state.actors().values()
        workers = [actor for actor in actors if "TrainWorker" in actor["ActorClassName"]]
        return [actor["Address"]["NodeID"] for actor in sorted(workers, key=lambda a: a["StartTime"])]

    small, big = (node.node_id for node in nodes[1])
    train("small", "ensemble.score.seeds=1")
    assert placed() == [small] * 2
    train("big", "ensemble.score.seeds=2")  # the second member alone is missing
    assert placed() == [small] * 2 + [big] * 2
    curves = sorted((tmp_path / "tiny" / "members").glob("*/curve.json"))
    assert [{row["workers"] for row in json.loads(curve.read_text())} for curve in curves] == [{2}, {2}]

    lacking = "a worker of a member's training fits on none of .* 3 nodes: .* the label kind = huge"
    with pytest.raises(GalrayError, match=lacking):
        train("huge", "ensemble.score.seeds=3")
    small_ones = "on 4 workers, the Ray cluster with the labels kind = big has 2 CPUs"
    with pytest.raises(GalrayError, match=small_ones):
        train("big", "name=other", "training.score.workers=4")


def test_a_lost_node_costs_no_member(nodes, tmp_path):
    cluster, workers = nodes
    none = FamilyDesign(seeds=0)
    specs = design(EnsembleSettings(flow=none, moments=none, score=FamilyDesign(seeds=7)), 1)
    calls, members = tmp_path / "calls", tmp_path / "members"
    calls.mkdir()
    lost: list[str] = []

    def take_away(patience=120.0):
        """Once two members are done, take away the node of a member that has just begun its 3 s."""
        victims = {node.node_id: node for node in workers}
        end = time.monotonic() + patience
        while not lost and time.monotonic() < end:
            time.sleep(0.05)
            if sum(1 for _ in members.glob("00?/result.json")) < 2:
                continue
            young = (path for path in calls.iterdir() if time.time() - path.stat().st_mtime < 1.0)
            running = (path.read_text().split() for path in young)
            found = next((words[-2] for words in running if words and words[-2] in victims), None)
            if found:
                lost.append(found)
                cluster.remove_node(victims[found], allow_graceful=False)

    context = {"calls": str(calls), "sleep": 3.0}
    settings = EnsembleSettings(max_crashes=4)
    thief = threading.Thread(target=take_away)
    thief.start()
    outcomes = run_members(specs, slow_member, members, context, settings)
    thief.join()
    assert lost, "a node was removed"
    assert [o.error for o in outcomes] == [""] * 7
    assert all(o.finished for o in outcomes)
    assert [o.result["value"] for o in outcomes] == [s.streams["training"] % 1000 for s in specs]
    interrupted = [path for path in calls.iterdir() if len(path.read_text().splitlines()) > 1]
    assert interrupted, "a member that ran on the lost node was started again"
    again = run_members(specs, slow_member, members, context, settings)
    assert all(o.reused for o in again)
