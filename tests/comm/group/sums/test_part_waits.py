"""A hub knows for whose parts it waits, and its memory of that does not grow."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes.group.streams import stream_pair

from shoal.comm.group.sums.frames import FrameKind
from shoal.comm.group.sums.part_waits import LATEST, PartWaits, WaitSummary
from shoal.comm.group.sums.star import Hub, Spoke

LATE_S = 0.02


def wait_for(condition: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.001)


def test_the_latest_count_and_no_more() -> None:
    waits = PartWaits()
    assert waits.summary() is None
    waits.note(3.0, 10)
    assert waits.summary() == WaitSummary(1, 3.0, 3.0, 10)
    for number in range(5 * LATEST):
        waits.note(0.5 if number % 2 else 1.5, 20)
    assert waits.summary() == WaitSummary(LATEST, 1.0, 1.5, 20)


def test_a_hub_that_computes_longer_than_others_waits_for_nobody_but_the_late() -> None:
    pairs = [stream_pair() for _ in range(3)]
    hub = Hub([near for near, _ in pairs], 1)
    late, others = 1, [near for place, (near, _) in enumerate(pairs) if place != 1]

    def follow(place: int, stream: Any) -> None:
        spoke = Spoke(stream, 1)
        spoke.next()
        for _ in range(5):
            if place == late:
                wait_for(lambda: [*hub.awaited] == [1 + late])
                time.sleep(LATE_S)
            spoke.allreduce(np.ones((1, 8), np.float32))

    threads = [threading.Thread(target=follow, args=(place, far)) for place, (_, far) in enumerate(pairs)]
    for thread in threads:
        thread.start()
    hub.begin(b"order")
    for _ in range(5):  # it computes until the others' parts are there
        wait_for(lambda: len(select.select(others, [], [], 0)[0]) == len(others))
        hub.allreduce(np.ones((1, 8), np.float32))
    for thread in threads:
        thread.join()
    found = [waits.summary() for waits in hub.waits]
    assert [it and (it.parts, it.part_bytes) for it in found] == [(5, 32)] * 3
    medians = [it.median_s for it in found if it]
    assert medians[late] > LATE_S / 2
    assert max(medians[0], medians[2]) < LATE_S / 2


@pytest.mark.parametrize("send", ["deal", "broadcast", "give_up"])
def test_a_rank_that_has_got_all_is_not_waited_for_while_another_takes_it_slowly(send: str) -> None:
    pairs = [stream_pair(buffer_bytes=32 << 10) for _ in range(3)]
    hub = Hub([near for near, _ in pairs], 1, patience_s=20)
    hub.begin(b"order")
    rows, slow = np.ones((256, 1024), np.float32), 1
    numbers = rows.reshape(-1).view(np.uint8)
    acts: dict[str, Callable[[], Any]] = {
        "deal": lambda: hub.deal([numbers] * 3),
        "broadcast": lambda: hub.broadcast(rows, rows.shape),
        "give_up": lambda: [link.begin(FrameKind.ROWS, 1, 0, numbers) for link in links] and hub.give_up(),
    }
    links = list(hub._swapper.links.values())
    go_on = threading.Event()

    def take(place: int, stream: Any) -> None:
        memory = memoryview(bytearray(rows.nbytes))
        if place == slow:
            stream.receive_into(memory[:100_000], 10)
            assert go_on.wait(10)
            stream.receive_into(memory[100_000:], 10)
        else:
            stream.receive_into(memory, 10)

    threads = [threading.Thread(target=take, args=(place, far)) for place, (_, far) in enumerate(pairs)]
    threads.append(threading.Thread(target=acts[send]))
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: [*hub.awaited] == [1 + slow])
    finally:
        go_on.set()
    for thread in threads[:3]:
        thread.join()
    threads[3].join()


def test_noting_costs_next_to_nothing() -> None:
    waits = PartWaits()
    began_s = time.process_time()
    for _ in range(10_000):
        waits.note(0.001, 16384)
    assert (time.process_time() - began_s) / 10_000 < 20e-6  # it takes about 0.2 µs
