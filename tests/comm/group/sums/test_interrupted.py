"""What a spoke does with frames that are half there when an order is given up, and with fellows that are slow."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from shoal.comm.group.channel import Channel, channel_pair
from shoal.comm.group.sums import one_swap
from shoal.comm.group.sums.frames import HEADER, FrameKind
from shoal.comm.group.sums.manners import Manner, Manners
from shoal.comm.group.sums.star import Spoke
from shoal.comm.group.sums.star_errors import GivenUp

EPOCH = 7
EXCHANGE = Manners(Manner("exchange"), Manner("exchange"))
HALF = 100_000  # bytes of a frame


class Rank1(NamedTuple):
    """Of three. The test plays the hub and rank 2."""

    spoke: Spoke
    hub: Channel
    fellow: Channel


def frame(kind: FrameKind, number: int, place: int, data: bytes = b"") -> bytes:
    return HEADER.pack(kind, EPOCH, number, place, len(data)) + data


@pytest.fixture
def rank1() -> Iterator[Rank1]:
    hub, to_hub = channel_pair()
    fellow, to_fellow = channel_pair()
    for channel in (fellow, to_fellow):
        end = socket.socket(fileno=channel.fileno())
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 32 << 10)
        end.detach()
    spoke = Spoke(to_hub, EPOCH, rank=1, ranks=3, fellows={2: to_fellow}, most_bytes=1 << 24, patience_s=20)
    hub.send(frame(FrameKind.MANNERS, 0, 0, EXCHANGE.packed()))
    yield Rank1(spoke, hub, fellow)
    for channel in (hub, to_hub, fellow, to_fellow):
        channel.close()


def test_rows_that_are_coming_for_later_outlast_an_order_that_is_given_up(rank1: Rank1) -> None:
    """Rank 1 still waits for rank 2 while rank 0 gives the next order up and sends half of the rows of another."""
    spoke, hub, fellow = rank1
    row = np.ones((1, 576), np.float32)
    rows = np.arange(512 * 576, dtype=np.float32).reshape(512, 576)
    hub.send(frame(FrameKind.ORDER, 1, 0, b"one") + frame(FrameKind.ROWS, 1, 0, row.tobytes()))
    assert spoke.next() == b"one"
    spoke.broadcast(None, row.shape)
    sums: list[np.ndarray[tuple[int, int], np.dtype[np.float32]]] = []
    adding = threading.Thread(target=lambda: sums.append(spoke.allreduce(row)))
    adding.start()
    coming = frame(FrameKind.ROWS, 3, 0, rows.tobytes())
    for sent in (
        frame(FrameKind.PART, 1, 1, row.tobytes()),
        frame(FrameKind.ORDER, 2, 0, b"two"),
        frame(FrameKind.ROWS, 2, 0, row.tobytes()),
        frame(FrameKind.GIVE_UP, 2, 1),
        frame(FrameKind.ORDER, 3, 0, b"three"),
        coming[:HALF],
    ):
        hub.send(sent)
    time.sleep(0.1)
    fellow.send(frame(FrameKind.PART, 1, 1, row.tobytes()))
    adding.join(10)
    assert np.array_equal(sums[0], 3 * row)
    assert spoke.next() == b"two"
    with pytest.raises(GivenUp):
        spoke.broadcast(None, row.shape)
    rest = threading.Thread(target=hub.send, args=(coming[HALF:],))
    rest.start()
    assert spoke.next() == b"three"
    assert np.array_equal(spoke.broadcast(None, rows.shape), rows)
    rest.join(10)


def test_a_fellow_that_takes_a_part_slowly_is_not_given_up(
    rank1: Rank1, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it takes longer than a standstill may, after rank 0 has got everything and gone on."""
    monkeypatch.setattr(one_swap, "STALLED_S", 0.7)
    spoke, hub, fellow = rank1
    part = np.ones((256, 1024), np.float32)
    hub.send(frame(FrameKind.ORDER, 1, 0, b"one"))
    assert spoke.next() == b"one"

    def lead() -> None:
        hub.send(frame(FrameKind.PART, 1, 0, part.tobytes()))
        hub.receive_exactly(HEADER.size + part.nbytes, 10)
        hub.send(frame(FrameKind.PART, 1, 1))  # of what follows

    def follow() -> None:
        fellow.send(frame(FrameKind.PART, 1, 0, part.tobytes()))

    def take_slowly() -> None:
        for _ in range(16):
            fellow.receive_exactly((HEADER.size + part.nbytes) // 16, 10)
            time.sleep(0.06)

    threads = [threading.Thread(target=it) for it in (lead, follow, take_slowly)]
    for thread in threads:
        thread.start()
    began_s = time.monotonic()
    assert np.array_equal(spoke.allreduce(part), 3 * part)
    assert time.monotonic() - began_s > 0.7
    assert not spoke._swapper.broken
    for thread in threads:
        thread.join(10)
