"""Machines that are lost in every way: requests go on with who is left, and what was emitted stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.asking import CONFIG, prompt, text_of
from fakes.group.clusters import Cluster, wait_for

from shoal.comm.group.channel import channel_pair
from shoal.comm.messages import Load, Token
from shoal.daemon.cluster import group, member
from shoal.daemon.cluster.control_messages import BEAT_S, FROZEN_S, Attach, Beat
from shoal.daemon.cluster.group import Group
from shoal.daemon.cluster.member import Member
from shoal.daemon.cluster.roster import ROSTER_LOOK_S, Roster
from shoal.daemon.loading import regrouping

SHORT_S = 1.2


@pytest.fixture
def cluster(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(member, "SILENT_S", SHORT_S)
    monkeypatch.setattr(member, "FROZEN_S", SHORT_S)
    monkeypatch.setattr(group, "FROZEN_S", SHORT_S)
    with Cluster(tmp_path, CONFIG, workers=2) as cluster:
        cluster.node.load(Load(model=str(path)))
        wait_for(lambda: cluster.ranks == 3)
        yield cluster


def stop_beating(cluster: Cluster, number: int) -> None:
    """Its sockets stay open, but it says nothing any more: as if the machine were frozen."""
    worker = cluster.workers[number]._worker
    assert worker is not None
    worker._tell = lambda message: None  # type: ignore[method-assign]


def freeze(cluster: Cluster, number: int) -> None:
    """Its compute thread never ends a block again, while beats go on."""
    follower = cluster.shard(number)._follower
    assert follower is not None
    follower._rank.executor.head = follower._rank.executor.forward = _never  # type: ignore[assignment]


def _never(*_: Any) -> Any:
    threading.Event().wait(2.5)


def fail(cluster: Cluster, number: int) -> None:
    """Its next step fails, as when its disk does."""

    def broken(*_: Any) -> Any:
        raise OSError("the disk is on fire")

    follower = cluster.shard(number)._follower
    assert follower is not None
    follower._rank.executor.forward = broken  # type: ignore[assignment]


WAYS = {
    "the process ends": Cluster.stop,
    "it says nothing": stop_beating,
    "its compute thread is frozen": freeze,
    "its step fails": fail,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_goes_on_when_a_machine_is_lost(way: str, cluster: Cluster, alone: list[list[int]]) -> None:
    stream = cluster.node.stream(prompt(0))
    events = [next(stream) for _ in range(4)]
    WAYS[way](cluster, 1)
    events += list(stream)
    assert [token for event in events if isinstance(event, Token) for token in event.ids] == alone[0]
    wait_for(lambda: cluster.ranks in (2, 3))  # 3 again if it has come back by itself
    assert text_of(cluster.node, prompt(1))[1] == alone[1]


def test_a_machine_that_waits_elsewhere_holds_nobody_up(cluster: Cluster, alone: list[list[int]]) -> None:
    """It beats, it is not at work, and its part never comes."""
    stream = cluster.node.stream(prompt(0))
    events = [next(stream) for _ in range(4)]
    follower, over = cluster.shard(1)._follower, threading.Event()
    (stuck,) = [it for it in cluster.roster.members if it.fingerprint == cluster.nodes()[1].fingerprint]
    assert follower is not None
    follower._spoke.allreduce = lambda partial: over.wait(30) and partial  # type: ignore[assignment,method-assign]
    events += list(stream)
    over.set()
    assert [token for event in events if isinstance(event, Token) for token in event.ids] == alone[0]
    assert "waited for its part" in stuck.reason


class Waited:
    """A group's member that the hub waits for since 0 s; the clock is the caller's."""

    def __init__(self) -> None:
        self.reason = ""
        member = SimpleNamespace(fingerprint="f", beat=Beat(), leave=self._leave, name="m", facts=None)
        self.member = member
        seats = [SimpleNamespace(member=member)]
        self._group = Group(Roster(), "m", seats, "keep", None)  # type: ignore[arg-type]
        self.channel = SimpleNamespace(moved=0)
        self._group._hub = SimpleNamespace(awaited={1: 0.0})  # type: ignore[assignment]
        self._group._data = {"f": self.channel}  # type: ignore[dict-item]

    def _leave(self, reason: str) -> None:
        self.reason = reason

    def lost_s(self, change: Callable[[float], None], ends_s: float) -> float | None:
        """When it is lost. `change` is called for each beat."""
        for tick in range(round(ends_s / ROSTER_LOOK_S)):
            now_s = tick * ROSTER_LOOK_S
            if tick % 2 == 0:
                change(now_s)
            self._group.watch(now_s)
            if self.reason:
                return now_s
        return None


def test_when_a_part_is_waited_for_in_vain() -> None:
    it = Waited()

    def stops(now_s: float) -> None:
        if now_s <= BEAT_S:  # the last that it did is told a beat later
            it.member.beat = Beat(blocks=int(10 * now_s))

    found = it.lost_s(stops, 10)
    assert found is not None
    assert FROZEN_S <= found <= 3.0


@pytest.mark.parametrize("what", ["computes", "sends slowly", "receives slowly", "is at work"])
def test_a_slow_machine_is_not_lost(what: str) -> None:
    it = Waited()

    def change(now_s: float) -> None:
        count = int(now_s / 1.5)  # seldom
        if what == "computes":
            it.member.beat = Beat(blocks=count)
        elif what == "receives slowly":
            it.member.beat = Beat(moved=count)
        elif what == "sends slowly":
            it.channel.moved = count
        else:  # whether it is frozen is seen by other means
            it.member.beat = Beat(at_work=True)

    assert it.lost_s(change, 60) is None


def test_a_head_that_was_asleep_loses_nobody() -> None:
    """What its workers said meanwhile, it has not read either."""
    now, at_head = [100.0], channel_pair("control")[0]
    attach = Attach(name="w", version="1", kernels="k", threads=1, memory_bytes=1)
    asleep, silent = (Member(at_head, attach, lambda *_: None, lambda: now[0]) for _ in range(2))
    now[0] += 10
    asleep.excuse(9.75)
    for one in (asleep, silent):
        one.look()
    assert not asleep.reason
    assert "nothing has been heard" in silent.reason
    now[0] += member.SILENT_S
    asleep.look()
    assert asleep.reason


def test_channels_that_have_ended_are_not_kept() -> None:
    """A worker may open and close as many as it likes."""
    attach = Attach(name="w", version="1", kernels="k", threads=1, memory_bytes=1)
    one = Member(channel_pair("control")[0], attach, lambda *_: None, lambda: 0.0)
    for _ in range(20):
        one.add(ended := channel_pair("weights")[0])
        ended.close()
    one.add(going_on := channel_pair("data")[0])
    assert len(one._channels) == 2
    one.leave("it is enough")
    assert going_on.closed


def test_many_streams_go_on_while_machines_come_and_go(cluster: Cluster, alone: list[list[int]]) -> None:
    ended = threading.Event()

    def churn() -> None:
        number = 1
        while not ended.is_set():
            cluster.stop(number)
            time.sleep(0.3)
            cluster.start(number)
            number = 3 - number
            time.sleep(0.7)

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        with ThreadPoolExecutor(6) as threads:
            for _ in range(2):
                found = threads.map(lambda i: text_of(cluster.node, prompt(i))[1], range(6))
                assert list(found) == alone
    finally:
        ended.set()
        churning.join()


@pytest.mark.parametrize("share", [1e9, 1e-9])
def test_a_machine_that_returns_takes_part_though_somebody_always_waits(
    share: float, cluster: Cluster, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If loading anew costs little of the time that the model has been busy for."""
    monkeypatch.setattr(regrouping, "BUSY_SHARE", share)
    ended, found = threading.Event(), list[tuple[int, list[int]]]()

    def ask(number: int) -> None:
        while not ended.is_set():
            found.append((number, text_of(cluster.node, prompt(number))[1]))

    with ThreadPoolExecutor(6) as threads:
        asking = [threads.submit(ask, number) for number in range(6)]
        try:
            cluster.stop(1)
            wait_for(lambda: cluster.ranks == 2)
            cluster.start(1)
            if share > 1:
                wait_for(lambda: cluster.ranks == 3)
            else:
                cluster.wait(2)
                time.sleep(1.5)
                assert cluster.ranks == 2
        finally:
            ended.set()
        for one in asking:
            one.result(timeout=20)
    assert all(ids == alone[number] for number, ids in found)
    wait_for(lambda: cluster.ranks == 3)


def test_all_machines_lost_at_once(cluster: Cluster, alone: list[list[int]]) -> None:
    stream = cluster.node.stream(prompt(0))
    events = [next(stream) for _ in range(4)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(cluster.stop, [1, 2]))
    events += list(stream)
    assert [token for event in events if isinstance(event, Token) for token in event.ids] == alone[0]
    assert cluster.ranks == 1


def test_a_machine_lost_while_nothing_runs(cluster: Cluster, alone: list[list[int]]) -> None:
    cluster.stop(1)
    wait_for(lambda: cluster.ranks == 2)
    assert text_of(cluster.node, prompt(1))[1] == alone[1]


def test_a_forgotten_machine_leaves_at_once_and_cannot_come_back(
    cluster: Cluster, alone: list[list[int]]
) -> None:
    from shoal.comm.cluster_messages import Forget

    gone = cluster.nodes()[1]
    cluster.head.answer(Forget(node=gone.name))
    wait_for(lambda: cluster.ranks == 2)
    assert text_of(cluster.node, prompt(1))[1] == alone[1]
    time.sleep(1.0)
    assert len(cluster.roster.members) == 1


def test_a_cancelled_request_gives_its_step_up_everywhere(cluster: Cluster, alone: list[list[int]]) -> None:
    for number in range(6):
        stream = cluster.node.stream(prompt(number))
        next(stream)
        stream.close()
    assert text_of(cluster.node, prompt(2))[1] == alone[2]
