"""The ring of bytes that streamed blocks pass through: where each block lies, and what has to leave before it comes.

Pure numbers. `offload.window` carries it out, `schedule` predicts how long that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial


def ring_places(nbytes: int, blocks: Sequence[int]) -> list[int]:
    """Where in a ring of `nbytes` each block of a cycle begins: one behind the other, at the start of the ring again
    where one does not fit, and for the first of the cycle. Or, in a ring with room for few, the largest at the start
    and the others so behind it, if then fewer get the place of one just before them, to be read while nothing is
    computed."""
    either = _in_turn(nbytes, blocks, 0), _in_turn(nbytes, blocks, max(blocks, default=0))
    return min(either, key=partial(_crowding, blocks))


def _in_turn(nbytes: int, blocks: Sequence[int], start: int) -> list[int]:
    """One behind the other from `start` on; at 0 what does not fit behind it."""
    places: list[int] = []
    end = start
    for size in blocks:
        if start + size > nbytes:
            places.append(0)
            continue
        place = end if end + size <= nbytes else start
        places.append(place)
        end = place + size
    return places


def _crowding(blocks: Sequence[int], places: Sequence[int]) -> int:
    """The bytes of blocks that wait for the one just before them."""
    return sum(size for at, size in enumerate(blocks) if _back(places, blocks, at) == 1)


def _back(places: Sequence[int], blocks: Sequence[int], at: int) -> int:
    """How many blocks before one the nearest lies that has a part of its place, itself if no other has."""
    start, end, count = places[at], places[at] + blocks[at], len(blocks)
    return next(
        back
        for back in range(1, count + 1)
        if places[at - back] < end and start < places[at - back] + blocks[at - back]
    )


@lru_cache(16)
def waits_for(nbytes: int, blocks: tuple[int, ...], piece_bytes: int) -> list[list[tuple[int, int]]]:
    """For each block of the cycle its pieces as (bytes, back): a piece can be read when the block that was `back`
    places before its own in the cycle has left, over and over; the nearest such block counts. Pieces one after the
    other that wait for the same block are one."""
    places, count = ring_places(nbytes, blocks), len(blocks)
    pieces: list[list[tuple[int, int]]] = []
    for block, size in enumerate(blocks):
        own: list[tuple[int, int]] = []
        for start in range(places[block], places[block] + size, piece_bytes):
            end = min(start + piece_bytes, places[block] + size)
            back = next(
                back
                for back in range(1, count + 1)
                if places[block - back] < end and start < places[block - back] + blocks[block - back]
            )
            before, _ = own.pop() if own and own[-1][1] == back else (0, back)
            own.append((before + end - start, back))
        pieces.append(own)
    return pieces
