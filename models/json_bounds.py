"""JSON from outside, measured before it is decoded: how deep it is nested, and how much memory its objects may take.

A decoder stops only where the interpreter's stack ends, so what it takes would depend on who calls it, and what it
made could be too deep for whoever gets it. And three bytes can become an object of 200. Knows strings, brackets and
what separates values. Does not decode, nor see whether a text is JSON at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

MAX_NESTING = 64  # lists and objects within each other; conversations and configurations stay far below
_PIECE_BYTES = 1 << 16
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
# What CPython 3.11 to 3.13 take at most: 232 bytes for an object of up to five fields, and, beside the place in what
# holds it, 56 for a number or the frame of a short text.
CONTAINER_BYTES, VALUE_BYTES = 256, 64
_NBYTES = np.zeros(256, np.int64)
_NBYTES[list(b"[{")], _NBYTES[list(b",:")] = CONTAINER_BYTES, VALUE_BYTES


def check_nesting(text: bytes) -> None:
    """Raises ValueError if lists and objects are nested more than MAX_NESTING deep."""
    if text.count(b"[") + text.count(b"{") <= MAX_NESTING:
        return
    depth = 0
    for piece in _outside_texts(text):
        depths = depth + np.cumsum(_STEPS[piece], dtype=np.int64)
        if depths.max() > MAX_NESTING:
            raise ValueError(f"is nested too deep: must be at most {MAX_NESTING} deep")
        depth = int(depths[-1])


def utf_8(data: bytes) -> str:
    """The text of JSON from outside; a byte order mark is left out. Raises ValueError for other encodings, in which
    quotes and brackets have other bytes than those that are measured."""
    return data.decode("utf-8-sig")


def decoded_bytes(text: bytes) -> int:
    """How much memory the objects of JSON take at most when it is decoded, beside the characters of its texts."""
    return sum(int(_NBYTES[piece].sum()) for piece in _outside_texts(text))


def _outside_texts(text: bytes) -> Iterator[Any]:
    """The text in pieces (N,) u8, with zeros for all that is within quotes."""
    text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    quotes = 0
    for start in range(0, len(text), _PIECE_BYTES):
        piece = np.frombuffer(text, np.uint8, min(_PIECE_BYTES, len(text) - start), start)
        within = (np.cumsum(piece == ord('"'), dtype=np.int64) + quotes) & 1
        yield np.where(within, 0, piece)
        quotes = int(within[-1])
