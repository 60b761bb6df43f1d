"""Pieces from several sources: all of them, in order, in bounded memory, whoever fails or is slow."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from shoal.comm.group.errors import ChannelError
from shoal.daemon.cluster.weights import piece_stream
from shoal.daemon.cluster.weights.piece_stream import PieceStream
from shoal.kernels.arrays import Bytes
from shoal.models.checkpoint.weight_source import Piece
from shoal.partition.spec import BlockId

NBYTES = 8


class Source:
    """Has pieces whose numbers are in `has_numbers` (None: all), takes `piece_s` for one, and fails at number `fails`
    of those that it is asked for; `stalls`: it says nothing from then on instead."""

    def __init__(
        self,
        numbers: frozenset[int] | None = None,
        piece_s: float = 0.0,
        fails: int = -1,
        stalls: bool = False,
    ) -> None:
        self._numbers, self._piece_s, self._fails, self._stalls = numbers, piece_s, fails, stalls
        self._asked: deque[Piece] = deque()
        self._closed = threading.Event()
        self.received = 0

    def has(self, piece: Piece) -> bool:
        return self._numbers is None or piece.start in self._numbers

    def ask(self, piece: Piece) -> None:
        assert self.has(piece)
        self._asked.append(piece)

    def receive(self, piece: Piece, into: Bytes) -> None:
        assert self._asked.popleft() == piece
        failing = self.received == self._fails
        if failing and self._stalls:
            self._closed.wait(10)
        if (self._piece_s and self._closed.wait(self._piece_s)) or self._closed.is_set() or failing:
            raise ChannelError("it is gone")
        into[:] = piece.start % 251
        self.received += 1

    def close(self) -> None:
        self._closed.set()


def pieces(count: int, first: int = 0) -> Sequence[Piece]:
    return [Piece(BlockId("ffn", 0), "up", number, number + 1) for number in range(first, first + count)]


def take(stream: PieceStream, wanted: Sequence[Piece], pause_s: float = 0.0) -> None:
    into = np.empty(NBYTES, np.uint8)
    for piece in wanted:
        stream.look()
        stream.take(piece, into)
        assert (into == piece.start % 251).all()
        if pause_s:
            time.sleep(pause_s)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(piece_stream, "UNDER_WAY", 2)
    monkeypatch.setattr(piece_stream, "SPARE", 0)
    monkeypatch.setattr(piece_stream, "LENT", 2)
    monkeypatch.setattr(piece_stream, "LENDER_LOOK_S", 0.02)
    before = threading.enumerate()  # some of an earlier test may end meanwhile
    yield
    assert [thread for thread in threading.enumerate() if thread not in before] == []


@pytest.mark.parametrize("seed", range(30))
def test_whatever_lenders_do_all_pieces_come_in_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more memory is taken than each may have."""
    chance = random.Random(seed)
    monkeypatch.setattr(piece_stream, "LENDER_PATIENCE_S", 0.05)
    count, made = 120, 0
    original = PieceStream._buffer

    def buffer(self: PieceStream, nbytes: int) -> Bytes:
        nonlocal made
        made += not self._free
        return original(self, nbytes)

    monkeypatch.setattr(PieceStream, "_buffer", buffer)
    head = [Source(piece_s=chance.choice([0, 0.0005])) for _ in range(2)]
    stream = PieceStream(head, lambda piece: NBYTES)
    lenders = [
        Source(
            frozenset(chance.sample(range(2 * count), chance.randrange(2 * count))),
            chance.choice([0, 0, 0.0005, 0.02]),
            chance.choice([-1, 0, chance.randrange(40)]),
            chance.random() < 0.5,
        )
        for _ in range(chance.randrange(4))
    ]
    for lender in lenders[:2]:
        stream.lend(lender)
    stream.expect(iter(pieces(count)))
    take(stream, pieces(count // 2), chance.choice([0, 0.0005]))
    for lender in lenders[2:]:
        stream.lend(lender)
    stream.expect(iter(pieces(count, count)))  # in the middle
    take(stream, pieces(count, count))
    stream.close()
    assert made <= 2 * 2 + 2 * len(lenders)
    assert all(lender._closed.is_set() for lender in lenders)
    assert not any(source._closed.is_set() for source in head)


def test_a_lender_that_is_as_quick_as_the_head_brings_half() -> None:
    stream = PieceStream([Source(piece_s=0.004)], lambda piece: NBYTES)
    stream.lend(Source(frozenset(range(60)), 0.004))
    stream.expect(iter(pieces(60)))
    take(stream, pieces(60))
    stream.close()
    assert 0.3 < stream.lent_bytes / (60 * NBYTES) < 0.7


def test_a_slow_lender_is_given_up_and_one_that_is_quicker_than_the_head_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What counts is whether the reader waits for it longer than it saves."""
    for patience_s, head_s, lender_s, kept in ((0.1, 0.0, 0.04, False), (0.5, 0.1, 0.05, True)):
        monkeypatch.setattr(piece_stream, "LENDER_PATIENCE_S", patience_s)
        lender = Source(frozenset(range(100)), lender_s)
        stream = PieceStream([Source(piece_s=head_s)], lambda piece: NBYTES)
        stream.lend(lender)
        stream.expect(iter(pieces(50)))
        take(stream, pieces(50))
        assert lender._closed.is_set() is not kept
        assert (lender.received < 25) is not kept
        stream.close()


def test_a_head_that_fails_ends_it_though_others_lend() -> None:
    stream = PieceStream([Source(fails=5)], lambda piece: NBYTES)
    stream.lend(Source(frozenset(range(100)), 0.001))
    stream.expect(iter(pieces(100)))
    with pytest.raises(ChannelError, match="it is gone"):
        take(stream, pieces(100))
    stream.close()
