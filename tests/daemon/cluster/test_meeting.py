"""Ranks meet in hub and spokes in the middle of steps whose sums travel while they compute: what is given up, fails or
is lost at any moment ends in bounded time, and whoever can goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from fakes import tiny
from fakes.group.clusters import wait_for
from fakes.group.ranks import Group
from fakes.group.streams import PairStream, stream_pair
from fakes.running import Running, relative_error

from shoal.comm.group.sums.star import Hub, Spoke
from shoal.daemon import cgroup
from shoal.daemon.cluster.follower import Follower
from shoal.daemon.cluster.meeting import Led, Meeting
from shoal.daemon.cluster.pulse import Pulse
from shoal.engine.errors import RankLost
from shoal.engine.executor import Abandoned
from shoal.engine.leader import Leader
from shoal.engine.order import Order, Segment
from shoal.engine.rank import Rank
from shoal.kernels import home_of
from shoal.kernels.arrays import Bytes, Floats
from shoal.models.checkpoint.checkpoint import open_checkpoint

PATIENCE_S = 10.0
ORDER = Order([Segment(list(range(90)), 0, [0, 1], 1)])
MOMENTS = range(1, 8)  # of two layers: two halves of three blocks, and the one row of the last that is wanted


class Meetings:
    """A group over hub and spokes: its leader here, each follower in a thread. `ended` has why followers ended."""

    def __init__(self, path: Path, ranks: int) -> None:
        running = Running(path)
        self.alone = Rank(running.executor, lambda: 0.0).run(ORDER).logits
        with open_checkpoint(path) as checkpoint:
            self._group = Group(checkpoint, running.plan, ranks)
        pairs = [stream_pair() for _ in range(ranks - 1)]
        self._streams: list[PairStream] = [end for pair in pairs for end in pair]
        self.ended: SimpleQueue[str] = SimpleQueue()
        self.pulses = [Pulse(1) for _ in range(ranks)]
        self.executors = [rank.executor for rank in self._group.ranks]
        hub = Hub([near for near, _ in pairs], 1, patience_s=PATIENCE_S)
        self.executors[0].collective = Meeting(hub, self.pulses[0])
        self.leader = Leader(self.executors[0], lambda: 0.0, Led(hub))
        for rank, (_, far), pulse in zip(self._group.ranks[1:], pairs, self.pulses[1:], strict=True):
            spoke = Spoke(far, 1, patience_s=PATIENCE_S)
            rank.executor.collective = Meeting(spoke, pulse)
            Follower(rank, spoke, pulse, self.ended.put).start()

    def cut(self, rank: int) -> None:
        for stream in self._streams[2 * rank - 2 : 2 * rank]:
            stream.close()

    def assert_right(self) -> None:
        assert relative_error(self.leader.run(ORDER).logits, self.alone) <= 1e-3

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self._group.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # It has small sums in the middle of blocks, too.
    model = tiny.hf_model("olmo2", seed=3, num_hidden_layers=2)
    return tiny.save_gguf(model, tmp_path_factory.mktemp("model") / "m.gguf", type="F16")


@pytest.fixture(params=[2, 3])
def meetings(path: Path, request: pytest.FixtureRequest) -> Iterator[Meetings]:
    made = Meetings(path, request.param)
    yield made
    made.close()


def at(moment: int, act: Callable[[], Any]) -> Callable[[float], bool]:
    """For `wanted`, which is asked before each half of each block: acts once, and returns what that gave."""
    asked = iter(range(1, 1000))
    return lambda share: bool(act()) if next(asked) == moment else True


def fail() -> bool:
    raise OSError("the disk is on fire")


def test_steps_in_halves_are_right(meetings: Meetings) -> None:
    for _ in range(3):
        meetings.assert_right()
    wait_for(lambda: not any(pulse.at_work for pulse in meetings.pulses[1:]))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_step_that_is_given_up_leaves_the_group_as_it_was(moment: int, meetings: Meetings) -> None:
    with pytest.raises(Abandoned):
        meetings.leader.run(ORDER, at(moment, bool))
    meetings.assert_right()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_step_that_fails_at_rank_0_leaves_the_group_as_it_was(moment: int, meetings: Meetings) -> None:
    with pytest.raises(OSError, match="on fire"):
        meetings.leader.run(ORDER, at(moment, fail))
    meetings.assert_right()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_that_fails_is_lost_with_its_reason(moment: int, meetings: Meetings) -> None:
    meetings.pulses[-1].still_wanted = at(moment, fail)  # type: ignore[method-assign]
    with pytest.raises(RankLost, match="on fire") as lost:
        meetings.leader.run(ORDER)
    assert lost.value.rank == len(meetings.executors) - 1
    assert "on fire" in meetings.ended.get(timeout=PATIENCE_S)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_channel_that_ends_is_a_lost_rank(moment: int, meetings: Meetings) -> None:
    last = len(meetings.executors) - 1
    began_s = time.monotonic()
    with pytest.raises(RankLost) as lost:
        meetings.leader.run(ORDER, at(moment, lambda: meetings.cut(last) or True))
    assert lost.value.rank == last
    assert meetings.ended.get(timeout=PATIENCE_S)
    assert time.monotonic() - began_s < PATIENCE_S / 2


class Slow:
    """An exchange whose sums take until they are let go."""

    def __init__(self) -> None:
        self.goes = threading.Event()
        self.watched = 0

    def watch(self) -> None:
        self.watched += 1

    def allreduce(self, partial: Floats) -> Floats:
        assert self.goes.wait(PATIENCE_S)
        return partial + 1

    def broadcast(self, rows: Floats | None, shape: tuple[int, int]) -> Floats:
        raise NotImplementedError

    def gather(self, columns: Floats) -> Floats:
        raise NotImplementedError

    def deal(self, parts: Sequence[Bytes], into: Bytes | None) -> None:
        raise NotImplementedError

    def collect(self, own: Bytes | None, into: Sequence[Bytes]) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("quota", "looks"), [(None, 1), (2.0, 0)])
def test_who_waits_looks_for_bytes_unless_that_is_charged(
    quota: float | None, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "processors", lambda: quota)
    slow = Slow()
    Meeting(slow, Pulse(1))
    assert slow.watched == looks


def test_a_rank_is_at_work_while_its_sums_travel_and_is_not_while_it_waits_for_them() -> None:
    """So whoever watches its pulse sees that it computes, and does not take waiting for others for standing still."""
    slow, pulse, home = Slow(), Pulse(1, at_work=True), home_of("cpu")
    meeting = Meeting(slow, pulse)
    pending = meeting.start(home, np.ones((1, 4), np.float32))
    assert pulse.at_work

    def let_go() -> None:
        wait_for(lambda: not pulse.at_work)
        slow.goes.set()

    letting_go = threading.Thread(target=let_go)
    letting_go.start()
    assert pending()[0, 0] == 2
    assert pulse.at_work
    meeting.settle()
    meeting.settle()
    letting_go.join()
    assert meeting.allreduce(home, np.zeros((1, 4), np.float32))[0, 0] == 1
