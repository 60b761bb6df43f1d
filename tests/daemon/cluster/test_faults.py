"""Machines that stay attached and spoil every group that they are in: answers are given without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.asking import CONFIG, prompt, text_of
from fakes.group.clusters import Cluster, wait_for
from msgspec.structs import replace

from shoal.comm.messages import Load
from shoal.daemon.cluster import faults, group
from shoal.daemon.cluster.control_messages import Ready, ShardRefused
from shoal.daemon.cluster.faults import Faults
from shoal.daemon.cluster.follower import Follower
from shoal.daemon.cluster.served_shard import ServedShard
from shoal.daemon.cluster.weights import weight_server
from shoal.daemon.cluster.worker import MOST_SHARDS
from shoal.daemon.errors import DaemonError

Patch = pytest.MonkeyPatch


def no_room(patch: Patch) -> None:
    def start(shard: ServedShard) -> None:
        raise OSError(28, "No space left on device")

    patch.setattr(ServedShard, "_start", start)


def no_data_channel(patch: Patch) -> None:
    patch.setattr(group, "SHARD_MOTIONLESS_S", 1.0)
    patch.setattr(
        ServedShard, "_load", lambda shard: shard._tell(Ready(epoch=shard.request.epoch, peak_bytes=1))
    )


def no_end_of_loading(patch: Patch) -> None:
    patch.setattr(group, "SHARD_MOTIONLESS_S", 1.0)
    patch.setattr(ServedShard, "_load", lambda shard: None)


def every_step_fails(patch: Patch) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("the disk is on fire")

    start = Follower.start

    def started(follower: Follower) -> None:
        follower._rank.executor.forward = broken  # type: ignore[method-assign]
        start(follower)

    patch.setattr(Follower, "start", started)


def every_sum_is_too_short(patch: Patch) -> None:
    start = Follower.start

    def started(follower: Follower) -> None:
        spoke = follower._spoke
        allreduce = spoke.allreduce
        spoke.allreduce = lambda partial: allreduce(partial[:, 1:])  # type: ignore[method-assign]
        start(follower)

    patch.setattr(Follower, "start", started)


WAYS: list[Callable[[Patch], None]] = [
    no_room,
    no_data_channel,
    no_end_of_loading,
    every_step_fails,
    every_sum_is_too_short,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_answers_come_without_a_machine_that_spoils_every_group(
    way: Callable[[Patch], None], tmp_path: Path, path: Path, alone: list[list[int]], monkeypatch: Patch
) -> None:
    way(monkeypatch)
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        cluster.node.load(Load(model=str(path)))
        assert text_of(cluster.node, prompt(0))[1] == alone[0]
        assert cluster.ranks == 1
        assert len(cluster.roster.members) == 1


def test_who_asks_for_a_number_of_ranks_is_told_why_there_are_fewer(
    tmp_path: Path, path: Path, monkeypatch: Patch
) -> None:
    no_room(monkeypatch)
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        for why in (
            r"cannot take its part.*No space left",
            r"did not take its part lately and is not asked for \d+ s more",
        ):
            with pytest.raises(DaemonError, match=why):
                cluster.node.load(Load(model=str(path), ranks=2))


def test_a_machine_has_room_for_a_shard_beside_its_own_work_and_other_shards(
    tmp_path: Path, path: Path
) -> None:
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        (member,) = cluster.roster.members
        wait_for(lambda: member.beat.free_bytes > 0)
        assert member.room_bytes("a") == member.facts.memory_bytes
        cluster.node.load(Load(model=str(path)))
        held = next(iter(member._asked.values())).held_bytes
        wait_for(lambda: member.beat.shard_bytes == held)
        assert member.room_bytes("tiny.gguf") == member.facts.memory_bytes
        assert member.room_bytes("another") == member.facts.memory_bytes - held
        member.beat = replace(member.beat, free_bytes=1000)  # it computes a model of its own, too
        assert member.room_bytes("tiny.gguf") == 1000 + held
        assert member.room_bytes("another") == 1000


def test_pauses_get_longer_and_end() -> None:
    now_s = [1e6]
    found = Faults(lambda: now_s[0])
    found.lost("a")
    assert not found.passed_over("a"), "it may have been restarted"
    found.lost("a")
    assert found.passed_over("a")
    assert not found.passed_over("b")
    assert found.over == 0
    now_s[0] += faults.FIRST_PAUSE_S
    assert not found.passed_over("a")
    assert found.over == 1
    found.lost("a")
    now_s[0] += faults.FIRST_PAUSE_S
    assert found.passed_over("a")
    for _ in range(100):
        found.refused("a")
    now_s[0] += faults.LONGEST_PAUSE_S
    assert not found.passed_over("a")
    now_s[0] += faults.FORGOTTEN_S
    found.lost("a")
    assert not found.passed_over("a"), "it was good for long"
    found.refused("b")
    assert found.passed_over("b"), "it would refuse again"


def test_a_worker_serves_a_bounded_number_of_shards_and_none_twice(tmp_path: Path, path: Path) -> None:
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        cluster.node.load(Load(model=str(path)))
        (member,) = cluster.roster.members
        worker = cluster.workers[1]._worker
        assert worker is not None
        (shard,) = worker.shards
        asked = shard.request
        member.serve(asked)
        wait_for(lambda: worker.shards not in ([], [shard]))
        assert [it.request.epoch for it in worker.shards] == [asked.epoch]
        assert shard._closed
        last = asked.epoch + MOST_SHARDS
        for number in range(asked.epoch + 1, last + 1):
            member.serve(replace(asked, epoch=number, model=str(number)))
        wait_for(lambda: isinstance(member.loading(last), ShardRefused))
        wait_for(lambda: len(worker.shards) == MOST_SHARDS)


@pytest.mark.parametrize("change", [{"scratch_bytes": -(1 << 60)}, {"scratch_bytes": 0}, {"threads": -1}])
def test_a_worker_refuses_a_plan_that_it_cannot_trust(
    change: dict[str, int], tmp_path: Path, path: Path, monkeypatch: Patch
) -> None:
    honest = group.Serve

    def lying(**facts: Any) -> Any:
        request = honest(**facts)
        return replace(request, plan=dataclasses.replace(request.plan, **change))  # type: ignore[arg-type]

    monkeypatch.setattr(group, "Serve", lying)
    with Cluster(tmp_path, CONFIG, workers=1) as cluster:
        with pytest.raises(DaemonError, match="cannot take its part") as refused:
            cluster.node.load(Load(model=str(path), ranks=2))
        assert "bug" not in str(refused.value)
        (member,) = cluster.roster.members
        wait_for(lambda: cluster.workers[1]._budget.held_bytes == 0)
        assert not member.reason


def test_a_head_that_cannot_send_blames_nobody(tmp_path: Path, path: Path, monkeypatch: Patch) -> None:
    """Its files have changed while they were sent, say."""

    def changed(serving: Any) -> None:
        raise DaemonError("corrupt", "m.gguf: was changed while it was sent", "load it again")

    with Cluster(tmp_path, CONFIG, workers=2) as cluster:
        with monkeypatch.context() as patch:
            patch.setattr(weight_server._Serving, "_require_unchanged", changed)
            with pytest.raises(DaemonError, match="was changed while it was sent") as failed:
                cluster.node.load(Load(model=str(path)))
            assert failed.value.code == "corrupt"
        assert len(cluster.roster.usable) == 2
        cluster.node.load(Load(model=str(path)))
        assert cluster.ranks == 3
