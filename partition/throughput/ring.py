"""The ring of bytes that streamed blocks pass through: where each block lies, and what has to leave before it comes.

Pure numbers. `offload.window` carries it out, `schedule` predicts how long that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


def ring_places(nbytes: int, blocks: Sequence[int]) -> list[int]:
    """Where in a ring of `nbytes` each block of a cycle begins: one behind the other, at the start of the ring again
    where one does not fit, and for the first of the cycle."""
    places: list[int] = []
    end = 0
    for size in blocks:
        start = end if end + size <= nbytes else 0
        places.append(start)
        end = start + size
    return places


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
