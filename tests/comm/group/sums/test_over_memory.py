"""Sums whose ranks are on one machine and reach each other through memory: the same bits, however large; and ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest

from shoal.comm.group.channel import Channel
from shoal.comm.group.shared_stream import RING_BYTES, can_share, shared_pair
from shoal.comm.group.sums.manners import Manner, Manners, SumTopology
from shoal.comm.group.sums.star import Hub, Spoke
from shoal.comm.group.sums.star_errors import Departed, GivenUp

pytestmark = pytest.mark.skipif(not can_share(), reason="the native part is not there")
RANKS = 3
LARGE = RING_BYTES // 1024  # rows of 512 numbers: twice what a ring holds


class Beside:
    """A hub and its spokes, every two of which share memory."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, int], Channel] = {}
        for one in range(RANKS):
            for other in range(one + 1, RANKS):
                self.ends[one, other], self.ends[other, one] = map(Channel, shared_pair())
        self.hub = Hub([self.ends[0, rank] for rank in range(1, RANKS)], 1, patience_s=20)
        self.spokes = [
            Spoke(
                self.ends[rank, 0],
                1,
                patience_s=20,
                rank=rank,
                ranks=RANKS,
                fellows={it: self.ends[rank, it] for it in range(1, RANKS) if it != rank},
                most_bytes=1 << 24,
            )
            for rank in range(1, RANKS)
        ]
        for member in (self.hub, *self.spokes):
            member.watch()


@pytest.fixture
def beside() -> Iterator[Beside]:
    made = Beside()
    yield made
    for end in made.ends.values():
        end.close()


@pytest.mark.parametrize("topology", get_args(SumTopology))
@pytest.mark.parametrize("rows", [1, LARGE])
def test_all_ranks_get_the_same_bits(topology: SumTopology, rows: int, beside: Beside) -> None:
    parts = np.random.default_rng(rows).standard_normal((RANKS, rows, 512), np.float32)
    beside.hub.decide(Manners(Manner(topology), Manner(topology)))
    beside.hub.begin(b"order")

    def follow(spoke: Spoke, part: np.ndarray) -> list[np.ndarray]:
        assert spoke.next() == b"order"
        shown = spoke.broadcast(None, (rows, 512))
        return [shown, *(spoke.allreduce(part) for _ in range(3))]

    with ThreadPoolExecutor(RANKS) as threads:
        others = [threads.submit(follow, *each) for each in zip(beside.spokes, parts[1:], strict=True)]
        first = [beside.hub.broadcast(parts[0], (rows, 512))]
        first += [beside.hub.allreduce(parts[0]) for _ in range(3)]
        found = [first, *(other.result(20) for other in others)]
    expected = parts[0] + parts[1] + parts[2]
    for shown, *totals in found:
        assert shown.tobytes() == parts[0].tobytes()
        assert all(total.tobytes() == expected.tobytes() for total in totals)


@pytest.mark.parametrize("topology", ["star", "exchange"])
def test_giving_up_is_heard_while_others_are_waited_for(topology: SumTopology, beside: Beside) -> None:
    beside.hub.decide(Manners(Manner(topology), Manner(topology)))
    beside.hub.begin(b"order")
    spoke = beside.spokes[0]
    assert spoke.next() == b"order"
    timer = threading.Timer(0.05, beside.hub.give_up)
    timer.start()
    with pytest.raises(GivenUp):
        spoke.allreduce(np.ones((LARGE, 512), np.float32))
    timer.join()


def test_a_rank_that_goes_is_named(beside: Beside) -> None:
    beside.hub.decide(Manners(Manner("exchange"), Manner("exchange")))
    beside.hub.begin(b"order")
    timer = threading.Timer(0.05, beside.ends[2, 0].close)
    timer.start()
    with pytest.raises(Departed) as caught:
        beside.hub.allreduce(np.ones((LARGE, 512), np.float32))
    assert caught.value.rank == 2
    timer.join()
