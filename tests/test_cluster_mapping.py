"""map_shards gives the same answer in one process and on Ray; connections close what they opened."""

from __future__ import annotations

import operator
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from galray.cluster import (
    ClusterExecutor,
    ClusterSettings,
    TaskNeeds,
    connect,
    map_shards,
    mapping,
    node_leaves,
    require,
    resources,
    stream_shards,
)
from galray.errors import GalrayError

SHARDS = [1e16, 1.0, -1e16, 3.0, 1e-3, 7.0]


def _square_sum(shard: float) -> np.ndarray:
    return np.array([shard, shard**2])


def _fail_on_three(shard: float) -> float:
    if shard == 3.0:
        raise ValueError("three is not allowed")
    return shard


def _refuse(shard: float) -> float:
    raise GalrayError("the column is absent", "name another")


def test_in_process_sum_and_progress(monkeypatch):
    monkeypatch.setattr("galray.cluster.mapping.is_connected", lambda: False)
    seen = []
    total = map_shards(_square_sum, SHARDS, progress=lambda done, n: seen.append((done, n)))
    expected = _square_sum(SHARDS[0])
    for shard in SHARDS[1:]:
        expected = expected + _square_sum(shard)
    assert np.array_equal(total, expected)
    assert seen == [(i, 6) for i in range(1, 7)]


def test_reduce_and_stream_keep_the_order():
    assert map_shards(lambda s: [s], SHARDS, reduce=operator.add) == SHARDS
    assert list(stream_shards(lambda s: 2 * s, SHARDS)) == [2 * s for s in SHARDS]


def test_no_shards_is_a_mistake_with_a_remedy():
    with pytest.raises(GalrayError, match="no shard"):
        map_shards(_square_sum, [])


def test_error_names_the_shard():
    with pytest.raises(ValueError, match="three") as caught:
        map_shards(_fail_on_three, SHARDS)
    assert any("3.0" in note for note in caught.value.__notes__)


def test_settings_are_strict():
    with pytest.raises(ValidationError):
        ClusterSettings(adress="auto")
    with pytest.raises(ValidationError):
        ClusterSettings(object_store_mb=10)


def test_switched_off_needs_no_ray():
    with connect(ClusterSettings(enabled=False)) as connection:
        assert not connection.owned
        assert not connection.connected
        assert resources().num_cpus >= 1


def test_on_ray_as_in_process(ray_session):
    lag = 0.05  # an early shard that ends last must not change a sum whose order matters

    def slow_first(shard: float) -> float:
        import time

        time.sleep(lag if shard == 1e16 else 0.0)
        return shard

    in_order = 0.0
    for shard in SHARDS:
        in_order += shard
    assert map_shards(slow_first, SHARDS) == in_order
    assert map_shards(slow_first, SHARDS, max_in_flight=1) == in_order
    assert sum(sorted(SHARDS)) != in_order  # the order does matter here
    assert list(stream_shards(slow_first, SHARDS, max_in_flight=2)) == SHARDS


def test_ray_errors_come_back_as_themselves(ray_session):
    with pytest.raises(ValueError, match="three") as caught:
        map_shards(_fail_on_three, SHARDS)
    assert any("3.0" in note for note in caught.value.__notes__)
    with pytest.raises(GalrayError, match="column is absent"):
        map_shards(_refuse, SHARDS)


def test_impossible_requests_are_refused(ray_session):
    have = resources()
    assert have.connected
    assert have.num_cpus == 2
    assert have.max_node_cpus == 2
    with pytest.raises(GalrayError, match="needs 64 CPUs"):
        map_shards(_square_sum, SHARDS, num_cpus=64)
    with pytest.raises(GalrayError, match="1 GPU"):
        require(1, 1, what="a member")


def test_connect_inside_an_open_session_leaves_it_open(ray_session):
    with connect(ClusterSettings()) as connection:
        assert connection.connected
        assert not connection.owned
    assert ray_session.is_initialized()


def _square(number: float) -> float:
    return number**2


class Sent:
    """A shard that notes when it is sent."""

    def __init__(self, number: int, sent: list[int]) -> None:
        self.number, self.sent = number, sent

    def __reduce__(self):
        self.sent.append(self.number)
        return float, (float(self.number),)


def test_nodes_that_come_are_put_to_work(ray_session, monkeypatch):
    """As many tasks wait as the nodes of the moment can run twice: what asks a growing cluster to grow."""
    cpus = 1.0
    monkeypatch.setattr(mapping, "resources", lambda needs: replace(resources(needs), num_cpus=cpus))
    for growing, then in ((False, 3), (True, 7)):
        cpus, sent = 1.0, []
        with connect(ClusterSettings(autoscaling=growing)):
            results = stream_shards(_square, [Sent(number, sent) for number in range(9)])
            assert next(results) == 0.0
            assert set(sent) == {0, 1}
            cpus = 3.0
            assert next(results) == 1.0
            assert len(set(sent)) == then
            assert sum(results) == sum(number**2 for number in range(2, 9))


def test_a_growing_cluster_is_not_refused(ray_session):
    with connect(ClusterSettings(autoscaling=True)):
        assert require(64, 8).connected
    with pytest.raises(GalrayError):
        require(64, 8)


@pytest.mark.cluster
def test_connect_starts_and_stops_its_own_and_names_a_dead_address(tmp_path):
    """Own process: the session's cluster must not be disturbed."""
    import os
    import subprocess
    import sys

    script = (
        "from galray.cluster import *\n"
        "from galray.errors import GalrayError\n"
        "import ray\n"
        "with connect(ClusterSettings(num_cpus=1, object_store_mb=100)) as c:\n"
        "    assert c.owned and resources().num_cpus == 1\n"
        "    assert map_shards(lambda s: s + 1, [1, 2, 3]) == 9\n"
        "assert not ray.is_initialized()\n"
        "try:\n"
        "    connect(ClusterSettings(address='127.0.0.1:1'))\n"
        "except GalrayError as error:\n"
        "    assert 'cluster.address' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('joined a cluster that does not exist')\n"
        "print('well')\n"
    )
    env = {key: value for key, value in os.environ.items() if key not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    env["HOME"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.stdout.strip().endswith("well"), done.stderr
    assert not (tmp_path / ".ray" / "auth_token").exists()


def _scaled(values, factor):
    values *= factor  # in place: what arrives must be writable
    return values.sum()


def test_executor_maps_in_order_with_and_without_a_cluster(ray_session):
    values = [np.arange(4.0) + i for i in range(5)]
    expected = [v.sum() * 2 for v in values]
    assert list(ClusterExecutor().map(_scaled, values, [2.0] * 5)) == expected
    assert values[0].tolist() == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(TypeError, match="timeout"):
        ClusterExecutor().map(_scaled, values, [2.0] * 5, timeout=3)


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"memory_gb": 1e6}, "1e\\+06 GB of memory"),
        ({"labels": {"kind": "big"}}, "the label kind = big"),
        ({"cpus": 2, "labels": {"kind": "in(big, huge)"}}, "the label kind"),
    ],
)
def test_what_no_node_has_is_refused_at_once(ray_session, needs, words):
    with pytest.raises(GalrayError, match=words):
        require(needs=TaskNeeds(**needs), what="a member")
    assert require(needs=TaskNeeds(cpus=2, memory_gb=0.1, labels={"kind": "!big"})).connected


def test_needs_become_what_ray_takes():
    needs = TaskNeeds(cpus=2, gpus=0.25, memory_gb=3, labels={"kind": "big"})
    assert needs.options() == {
        "num_cpus": 2, "num_gpus": 0.25, "memory": 3_000_000_000, "label_selector": {"kind": "big"},
    }  # fmt: skip
    assert needs.bundle() == {"CPU": 2, "GPU": 0.25, "memory": 3_000_000_000}
    node = {"Resources": {"CPU": 2, "GPU": 1, "memory": 4e9}, "Labels": {"kind": "big"}}
    assert needs.missing(node) == ""
    assert "0.25 GPUs" in needs.missing({"Resources": {"CPU": 2, "memory": 4e9}})


def test_a_node_that_stays_is_not_told_to_leave(ray_session):
    assert not node_leaves()
