"""What the meter counts, however the bytes are cut."""

from __future__ import annotations

import itertools

from fakes.zmtp import GREETING, frames
from hypothesis import given
from hypothesis import strategies as st

from shoal.daemon.server.zmtp_meter import ZmtpMeter, weight

MESSAGES = st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=5), max_size=6)
PING = b"\x04\x07\x04PING\0\0"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(MESSAGES, st.lists(st.integers(0, 1 << 20), max_size=20), st.binary(min_size=1, max_size=300))
def test_messages_and_what_is_unfinished(
    messages: list[list[bytes]], places: list[int], begun: bytes
) -> None:
    meter = ZmtpMeter(1000)
    whole = GREETING + b"".join(frames(*parts) + PING for parts in messages)
    for piece in cut(whole, places):
        assert meter.take(piece) is None
    assert meter.weight == sum(weight(len(parts), sum(map(len, parts))) for parts in messages)
    assert meter.unfinished_bytes == 0
    before = meter.weight
    for piece in cut(frames(begun, more=True), places):
        assert meter.take(piece) is None
    assert (meter.weight, meter.unfinished_bytes) == (before, len(begun))


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=10))
def test_any_bytes_are_judged_alike_however_they_are_cut(data: bytes, places: list[int]) -> None:
    def verdict(pieces: list[bytes]) -> str | None:
        meter = ZmtpMeter(100)
        return next((problem for piece in pieces if (problem := meter.take(piece))), None)

    for stream in (data, GREETING + data):
        assert verdict([stream]) == verdict(cut(stream, places))


def test_curve_is_seen_and_its_overhead_is_not_counted() -> None:
    meter = ZmtpMeter(1000)
    assert meter.take(GREETING.replace(b"NULL\0", b"CURVE") + frames(b"x" * 133)) is None
    assert meter.encrypted
    assert meter.weight == weight(1, 100)
