"""Orders as bytes: what other ranks need comes back, token ids do not travel, and no number is believed."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.errors import OrderError
from shoal.engine.order import Order, Segment
from shoal.engine.order_bytes import order_bytes, order_of
from shoal.offload.kv.prefix_cache import Copy
from shoal.partition.plan import KvPlan, Plan

PAGES, PAGE_TOKENS, CONTEXT = 10, 64, 256
PLAN = Plan((), KvPlan(PAGES, PAGE_TOKENS, "f16", 0), CONTEXT, 256, 4, 8, 1, 0)

segments = st.builds(
    lambda start, count, pages, wanted, length: Segment(
        list(range(1000, 1000 + count)), start, pages, min(wanted, count), length
    ),
    st.integers(0, 64),
    st.integers(1, 60),
    st.lists(st.integers(0, PAGES - 1), min_size=2, max_size=4),
    st.integers(0, 60),
    st.integers(0, 300),
)
copies = st.builds(Copy, st.integers(0, PAGES - 1), st.integers(0, PAGES - 1))


@given(st.lists(segments, max_size=4), st.lists(copies, max_size=4))
def test_everything_but_token_ids_comes_back(parts: list[Segment], moves: list[Copy]) -> None:
    data = order_bytes(Order(parts, moves))
    found = order_of(data, PLAN)
    assert [it._replace(tokens=()) for it in found.segments] == [it._replace(tokens=()) for it in parts]
    assert [len(it.tokens) for it in found.segments] == [len(it.tokens) for it in parts]
    assert found.moves == moves


def test_token_ids_do_not_travel() -> None:
    one = order_bytes(Order([Segment([1, 2, 3], 0, [0], 1)]))
    other = order_bytes(Order([Segment([7, 8, 9], 0, [0], 1)]))
    assert one == other


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([[[1, 0, [PAGES], 1, 0]], []], "page"),
        ([[[1, 0, [0], 2, 0]], []], "rows"),
        ([[[0, 0, [0], 0, 0]], []], "no tokens"),
        ([[[65, 0, [0], 1, 0]], []], "end"),
        ([[[1, CONTEXT, [0, 1, 2, 3, 4, 5], 1, 0]], []], "end"),
        ([[[1 << 21, 0, [0], 1, 0]], []], "end"),
        ([[[64, 0, [0], 1, 0]] * 5, []], "number of tokens 320: must be below 269"),
        ([[], [[0, PAGES]]], "copied page"),
        ([[], [[PAGES, 0]]], "copied page"),
        ([[[1, -1, [0], 1, 0]], []], "read"),
        ([[[1, 0, [0], 1, 1 << 30]], []], "length"),
        ([1, 2], "read"),
        ({}, "read"),
    ],
)
def test_no_number_is_believed(wrong: object, said: str) -> None:
    with pytest.raises(OrderError, match=said):
        order_of(msgspec.msgpack.encode(wrong), PLAN)


@given(st.binary(max_size=200))
def test_rubbish_is_refused(data: bytes) -> None:
    with contextlib.suppress(OrderError):
        order_of(data, PLAN)
