"""An order as bytes, for the other ranks of a group.

Token ids stay on rank 0, which embeds them: of a segment the others learn how many tokens it has, where it begins, and
which pages it uses. Every number is checked against the plan that this rank made or was given, whoever sent them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.models.step import Segment
from shoal.offload.kv.prefix_cache import Copy
from shoal.partition.plan import Plan

from .errors import OrderError
from .order import Order

_Count = Annotated[int, Meta(ge=0, le=1 << 40)]


class _Segment(msgspec.Struct, array_like=True, frozen=True):
    tokens: _Count
    start: _Count
    pages: list[_Count]
    rows_wanted: _Count
    length: _Count


class _Order(msgspec.Struct, array_like=True, frozen=True):
    segments: list[_Segment]
    copies: list[tuple[_Count, _Count]]


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Order)


def order_bytes(order: Order) -> bytes:
    """What the other ranks need of an order."""
    segments = [
        _Segment(len(it.tokens), it.start, list(it.pages), it.rows_wanted, it.length) for it in order.segments
    ]
    copies = [(move.source, move.target) for move in order.moves if isinstance(move, Copy)]
    return _ENCODER.encode(_Order(segments, copies))


def order_of(data: bytes, plan: Plan) -> Order:
    """The order that `order_bytes` wrote. Its tokens are numbers without a meaning. Raises OrderError."""
    try:
        read = _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise OrderError(f"an order that cannot be read: {error}") from error
    _check("copied page", [page for pair in read.copies for page in pair], plan.kv.pages)
    for it in read.segments:
        end = it.start + it.tokens
        _check("page", it.pages, plan.kv.pages)
        _check("length", [it.length], 1 << 27)
        _check("end", [end], min(plan.context_tokens, len(it.pages) * plan.kv.page_tokens) + 1)
        _check("number of wanted rows", [it.rows_wanted], it.tokens + 1)
        if not it.tokens:
            raise OrderError("an order with a segment of no tokens")
    _check("number of tokens", [sum(it.tokens for it in read.segments)], plan.step_rows + 1)
    segments = [
        Segment(range(it.tokens), it.start, it.pages, it.rows_wanted, it.length) for it in read.segments
    ]
    return Order(segments, [Copy(*pair) for pair in read.copies])


def _check(what: str, values: Sequence[int], limit: int) -> None:
    wrong = next((value for value in values if value >= limit), None)
    if wrong is not None:
        raise OrderError(f"an order with {what} {wrong}: must be below {limit}")
