"""A node of a cluster is lost in the middle of an ensemble: every member ends."""

from __future__ import annotations

import json
import threading
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
from tests.waiting import wait_for

pytestmark = pytest.mark.cluster

RATE = "training.score.learning_rate"


def member(spec, folder, context):
    """A member that says where it ran; where there is a node to be lost, all but two wait until it is."""
    node = where(0)
    with open(Path(context["calls"]) / spec["id"], "a") as handle:
        handle.write(f"{node}\n")
    if "lost" in context and spec["index"] >= 2:
        lost = Path(context["lost"])
        # Who runs there never comes further: it is not he who ends in the end.
        wait_for(lambda: lost.exists() and lost.read_text() != node, "the loss of another node")
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
    context = {"calls": str(tmp_path / "calls")}
    outcomes = run_members(design(settings, 1), member, tmp_path / "members", context, settings)
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
    calls, members, lost = tmp_path / "calls", tmp_path / "members", tmp_path / "lost"
    calls.mkdir()
    victims = {node.node_id: node for node in workers}

    def taken():
        """A node on which a member is at work: none but the first two come further before it is lost."""
        begun = (calls / spec.id for spec in specs[2:])
        places = (path.read_text().strip() for path in begun if path.exists())
        return next((place for place in places if place in victims), None)

    def take_away():
        wait_for(lambda: len(list(members.glob("00?/result.json"))) == 2, "the end of two members")
        node = wait_for(taken, "a member on a node that can be lost")
        cluster.remove_node(victims[node], allow_graceful=False)
        write_atomic(lost, node)

    context = {"calls": str(calls), "lost": str(lost)}
    settings = EnsembleSettings(max_crashes=4)
    thief = threading.Thread(target=take_away, daemon=True)
    thief.start()
    outcomes = run_members(specs, member, members, context, settings)
    assert lost.exists(), "a node was removed"
    assert [o.error for o in outcomes] == [""] * 7
    assert all(o.finished for o in outcomes)
    assert [o.result["value"] for o in outcomes] == [s.streams["training"] % 1000 for s in specs]
    interrupted = [path for path in calls.iterdir() if len(path.read_text().splitlines()) > 1]
    assert interrupted, "a member that ran on the lost node was started again"
    again = run_members(specs, member, members, context, settings)
    assert all(o.reused for o in again)
