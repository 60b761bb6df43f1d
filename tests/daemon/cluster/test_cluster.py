"""A head and workers on loopback: they answer as one machine, and go on when machines come and go."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fakes import tiny
from fakes.asking import CONFIG, prompt, text_of
from fakes.group.clusters import Cluster, wait_for

from shoal.comm.group.sums.manners import Manners
from shoal.comm.messages import Load, Unload
from shoal.daemon.cluster.control_messages import Listens
from shoal.daemon.cluster.group import Group
from shoal.daemon.cluster.mesh import fellows
from shoal.daemon.cluster.mesh.fellows import Fellows
from shoal.daemon.cluster.roster import ARRIVE_S, NobodyKnown, Roster
from shoal.daemon.cluster.weights import shard_facts, weight_server
from shoal.daemon.cluster.weights.shard_cache import ShardCache
from shoal.daemon.cluster.weights.weight_messages import WantDigest, WantPiece
from shoal.daemon.cluster.weights.weight_server import WeightServer
from shoal.daemon.errors import DaemonError
from shoal.partition.sum_cost import Means, Network, SumPlan


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, CONFIG, workers=2) as cluster:
        yield cluster


def test_three_machines_answer_as_one(two: Cluster, path: Path, alone: list[list[int]]) -> None:
    two.node.load(Load(model=str(path)))
    assert two.ranks == 3
    assert [text_of(two.node, prompt(i))[1] for i in range(4)] == alone[:4]


@pytest.fixture
def exchanging(monkeypatch: pytest.MonkeyPatch) -> None:
    """By exchange if that is possible, whatever these links are like."""

    def planned(network: Network, means: object, rows: int, numbers: int) -> SumPlan:
        means = Means("exchange" if network.can("exchange") else "star", "f32")
        return SumPlan(means, means, 1)

    monkeypatch.setattr(Network, "plan", planned)


@pytest.mark.usefixtures("exchanging")
def test_workers_are_introduced_to_each_other(two: Cluster, path: Path, alone: list[list[int]]) -> None:
    two.node.load(Load(model=str(path)))
    (model,) = two.node._models
    group = model.main.group
    assert isinstance(group, Group)
    assert [*group.introductions.links] == [(1, 2)]
    assert group.manners is not None
    assert group.manners.few.topology == "exchange"
    assert [text_of(two.node, prompt(i))[1] for i in range(2)] == alone[:2]
    shards = [shard for worker in two.workers.values() for shard in worker._worker.shards]
    assert sorted(rank for shard in shards for rank in shard.fellows.data) == [1, 2]
    two.node.unload(Unload(model=model.name))
    wait_for(lambda: all(not worker._worker.shards for worker in two.workers.values()))
    channels = [channel for shard in shards for channel in shard.fellows.data.values()]
    wait_for(lambda: all(channel.closed for channel in channels))


def test_workers_that_do_not_reach_each_other_compute_by_way_of_the_head(
    two: Cluster, path: Path, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fellows, "listens", property(lambda it: Listens(epoch=it.epoch, addresses=[])))
    monkeypatch.setattr(fellows, "MEET_S", 0.3)
    two.node.load(Load(model=str(path)))
    assert two.ranks == 3
    (model,) = two.node._models
    assert isinstance(model.main.group, Group)
    assert model.main.group.manners == Manners()
    assert [text_of(two.node, prompt(i))[1] for i in range(4)] == alone[:4]


@pytest.mark.usefixtures("exchanging")
def test_workers_that_lose_each_other_go_on_by_way_of_the_head(
    two: Cluster, path: Path, alone: list[list[int]]
) -> None:
    """Both are well: nobody is blamed, and all three compute on."""
    two.node.load(Load(model=str(path)))
    stream = two.node.stream(prompt(0))
    events = [next(stream) for _ in range(4)]
    (shard, *_) = two.workers[1]._worker.shards
    for channel in shard.fellows.data.values():
        channel.close()
    events += list(stream)
    assert [token for event in events for token in getattr(event, "ids", [])] == alone[0]
    (model,) = two.node._models
    assert two.ranks == 3
    assert isinstance(model.main.group, Group)
    assert model.main.group.manners == Manners()
    assert not any(two.roster.faults.left_s(member.fingerprint) for member in two.roster.members)


def test_a_machine_that_goes_and_comes_back(
    two: Cluster, path: Path, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has lost its weights. The other worker lends it some of them, of which the head says the digests."""
    two.node.load(Load(model=str(path)))
    stream = two.node.stream(prompt(0))
    events = [next(stream) for _ in range(4)]
    two.stop(1)
    events += list(stream)
    ids = [token for event in events for token in getattr(event, "ids", [])]
    assert ids == alone[0]
    wait_for(lambda: two.ranks == 2)
    assert text_of(two.node, prompt(1))[1] == alone[1]
    shutil.rmtree(two.home(1).shards)
    lent, original = threading.Event(), WeightServer._answered

    def answered(server: Any, serving: Any, question: Any) -> Any:
        if isinstance(question, WantPiece):
            lent.wait(5)
        elif isinstance(question, WantDigest):
            lent.set()
        return original(server, serving, question)

    monkeypatch.setattr(shard_facts, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(WeightServer, "_answered", answered)
    two.start(1)
    wait_for(lambda: two.ranks == 3)
    assert lent.is_set()
    assert text_of(two.node, prompt(2))[1] == alone[2]


def test_nobody_waits_for_the_weights_of_a_machine_that_has_come(
    two: Cluster, path: Path, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fetches them while the others go on computing."""
    two.stop(1)
    two.stop(2)
    two.wait(0)
    two.node.load(Load(model=str(path)))
    assert two.ranks == 1
    sent, may_send = threading.Event(), threading.Event()

    def slowly(serving: Any) -> None:
        sent.set()
        assert may_send.wait(20)

    with monkeypatch.context() as patch:
        patch.setattr(weight_server._Serving, "_require_unchanged", slowly)
        two.start(1)
        assert sent.wait(20)
        assert [text_of(two.node, prompt(i))[1] for i in range(2)] == alone[:2]
        assert two.ranks == 1
        may_send.set()
    wait_for(lambda: two.ranks == 2)
    assert text_of(two.node, prompt(2))[1] == alone[2]


def test_packs_of_shards_that_are_computed_stay_on_disk(two: Cluster, path: Path) -> None:
    """Also if the shard is all in memory: the next start needs its pack."""
    two.node.load(Load(model=str(path)))
    cache = ShardCache(two.home(1).shards)
    (shard,) = cache.list()
    assert cache.used(shard)
    assert cache.clear() == ([], [shard])
    two.node.unload(Unload(model=path.name))
    wait_for(lambda: not cache.used(shard))
    assert cache.clear() == ([shard], [])


def test_ranks_that_were_asked_for_are_waited_for(two: Cluster, path: Path) -> None:
    """After a head has started, its workers need some seconds to come."""
    two.stop(1)
    wait_for(lambda: len(two.roster.members) == 1)
    coming = threading.Timer(0.3, two.start, [1])
    coming.start()
    two.node.load(Load(model=str(path), ranks=3))
    assert two.ranks == 3
    coming.join()


class TwoPaired(NobodyKnown):
    def paired(self) -> Sequence[str]:
        return ["a", "b"]


def test_nobody_is_waited_for_without_end() -> None:
    now = count()
    roster = Roster(clock=lambda: float(next(now)))
    assert roster.awaited(1) == []  # nobody is paired
    roster.known = TwoPaired()
    assert roster.awaited(3) == []  # so many are not
    assert next(now) < ARRIVE_S
    assert roster.awaited(2) == []
    assert next(now) >= ARRIVE_S
    roster.close()


@pytest.mark.cluster
def test_a_context_that_only_a_group_has_room_for(tmp_path: Path) -> None:
    long = 100_000
    model = tiny.hf_model("llama", max_position_embeddings=long)
    path = tiny.save_gguf(model, tmp_path / "long.gguf")
    with Cluster(tmp_path, replace(CONFIG, kv_tokens=None, max_sequences=1), workers=1) as cluster:
        budget = cluster.node.budget

        def loaded(ranks: int | None, context: int) -> int:
            return cluster.node.load(Load(model=str(path), ranks=ranks, context=context)).model.rank_bytes[0]

        alone_bytes, own_bytes = loaded(1, long), loaded(2, long)
        loaded(1, 96)
        (loaded_model,) = cluster.node._models
        room = budget.free_bytes + loaded_model.peak_bytes
        budget.take("another", room - (alone_bytes + own_bytes) // 2)
        assert loaded(None, long) == own_bytes
        with pytest.raises(DaemonError, match="needs at least"):
            loaded(1, long)
