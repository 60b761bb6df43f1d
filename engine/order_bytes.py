"""An order as bytes, for the other ranks of a group.

Token ids stay on rank 0, which embeds them, unless the others have rows of the embedding: of a segment they learn how
many tokens it has, where it begins, and which pages it uses; of a page on disk its slot and a digest. Every number is
checked against the plan that this rank made or was given, whoever sent them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from shoal.models.step import Segment
from shoal.offload.kv.disk_index import DIGEST_BYTES, Slot
from shoal.offload.kv.prefix_cache import Copy, Move, Put
from shoal.partition.plan import Plan

from .errors import OrderError
from .order import Order, Reading

_NUMBER_BYTES = 9  # of an integer, at most
_ITEM_BYTES = 64  # of anything else in an order: its numbers, its digest and the heads of its lists

_Count = Annotated[int, Meta(ge=0, le=1 << 40)]
_TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class _Segment(msgspec.Struct, array_like=True, frozen=True):
    tokens: _Count | list[_TokenId]  # how many; or which, for ranks that embed them
    start: _Count
    pages: list[_Count]
    rows_wanted: _Count
    length: _Count


class _Move(msgspec.Struct, array_like=True, frozen=True):
    """A page goes to another page, or (with a digest) to a slot on disk."""

    source: _Count
    target: _Count
    digest: _Digest | None = None


class _Reading(msgspec.Struct, array_like=True, frozen=True):
    places: list[tuple[_Count, _Digest]]
    pages: list[_Count]


class _Order(msgspec.Struct, array_like=True, frozen=True):
    segments: list[_Segment]
    moves: list[_Move]
    readings: list[_Reading] = []
    sent: list[_Count] = []
    returned: list[_Count] = []


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Order)


def order_bytes(order: Order, *, tokens: bool = False) -> bytes:
    """What the other ranks need of an order, in which it is decided where pages lie on disk (`Rank.placed`), and whose
    readings are of `Slot`s. `tokens`: they need token ids, too."""
    segments = [
        _Segment(
            list(it.tokens) if tokens else len(it.tokens),
            it.start,
            list(it.pages),
            it.rows_wanted,
            it.length,
        )
        for it in order.segments
    ]
    readings = [
        _Reading([(it.slot, it.digest) for it in of.entries], list(of.pages)) for of in order.readings
    ]
    moves, sent, returned = list(_moved(order.moves)), list(order.sent), list(order.returned)
    return _ENCODER.encode(_Order(segments, moves, readings, sent, returned))


def _moved(moves: Sequence[Move]) -> Iterator[_Move]:
    for move in moves:
        if isinstance(move, Copy):
            yield _Move(move.source, move.target)
        else:
            assert isinstance(move, Put), move
            yield _Move(move.page, move.slot, move.digest)


def order_of(data: bytes, plan: Plan, slots: int = 0, *, tokens: bool = False) -> Order:
    """The order that `order_bytes` wrote. Unless this rank is to get `tokens`, these are numbers without a meaning.
    `slots`: of this rank's KV on disk. Raises OrderError."""
    _check("size in bytes", [len(data)], _most_bytes(plan, tokens) + 1)
    try:
        read = _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise OrderError(f"an order that cannot be read: {error}") from error
    copies = [it for it in read.moves if it.digest is None]
    puts = [it for it in read.moves if it.digest is not None]
    _check("copied page", [page for it in copies for page in (it.source, it.target)], plan.kv.pages)
    _check("saved page", [it.source for it in puts], plan.kv.pages)
    _check("slot", [it.target for it in puts], slots)
    for of in read.readings:
        _check("slot", [slot for slot, _ in of.places], slots)
        _check("page", of.pages, plan.kv.pages)
        if len(of.places) != len(of.pages):
            raise OrderError(f"an order that reads {len(of.places)} slots into {len(of.pages)} pages")
    _check("number of pages to read", [sum(len(it.pages) for it in read.readings)], plan.kv.pages + 1)
    for pages in (read.sent, read.returned):
        _check("page", pages, plan.kv.pages)
        _check("number of pages to pass on", [len(pages)], plan.kv.pages + 1)
    segments = [
        Segment(_ids(it.tokens, tokens), it.start, it.pages, it.rows_wanted, it.length)
        for it in read.segments
    ]
    for it in segments:
        count = len(it.tokens)
        end = it.start + count
        _check("page", it.pages, plan.kv.pages)
        _check("length", [it.length], 1 << 27)
        _check("end", [end], min(plan.context_tokens, len(it.pages) * plan.kv.page_tokens) + 1)
        _check("number of wanted rows", [it.rows_wanted], count + 1)
        if not count:
            raise OrderError("an order with a segment of no tokens")
    _check("number of tokens", [sum(len(it.tokens) for it in segments)], plan.step_rows + 1)
    _check("number of segments", [len(segments)], plan.sequences + 1)
    if tokens:  # then this rank makes logits of all these rows
        _check("number of wanted rows", [sum(it.rows_wanted for it in segments)], plan.logit_rows + 1)
    moves = [
        Copy(it.source, it.target) if it.digest is None else Put(it.source, it.target, it.digest)
        for it in read.moves
    ]
    readings = [Reading([Slot(*place) for place in it.places], it.pages) for it in read.readings]
    return Order(segments, moves, readings, read.sent, read.returned)


def _ids(tokens: int | list[int], wanted: bool) -> Sequence[int]:
    if isinstance(tokens, int) == wanted:
        raise OrderError(f"an order {'without' if wanted else 'with'} token ids")
    return range(tokens) if isinstance(tokens, int) else tokens


def _most_bytes(plan: Plan, tokens: bool) -> int:
    """A longer order is none for this plan. What it is decoded to is bounded by this, too."""
    context_pages = -(-plan.context_tokens // plan.kv.page_tokens)
    segments = plan.sequences * (_ITEM_BYTES + context_pages * _NUMBER_BYTES)
    moves = 2 * (plan.sequences + plan.kv.pages) * _ITEM_BYTES
    passed = 2 * plan.kv.pages * _NUMBER_BYTES
    ids = plan.step_rows * _NUMBER_BYTES if tokens else 0
    return segments + ids + moves + passed + plan.kv.pages * _ITEM_BYTES + _ITEM_BYTES


def _check(what: str, values: Sequence[int], limit: int) -> None:
    wrong = next((value for value in values if value >= limit), None)
    if wrong is not None:
        raise OrderError(f"an order with {what} {wrong}: must be below {limit}")
