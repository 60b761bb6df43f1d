"""The SentencePiece model file (`tokenizer.model`).

Knows the few protobuf fields that a BPE vocabulary needs (source: sentencepiece_model.proto): pieces with score
and type, the trainer's model type and special ids, the normaliser's space prefix. Does not know unigram models or
character maps: it refuses them, because it would tokenise them wrongly.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from shoal.models.errors import TokenizerError

from .vocabulary import MAX_TOKENS, TokenKind

_BPE = 2
# GGUF copied its token types from ModelProto.SentencePiece, so the numbers are the same.
_KINDS = {int(kind) for kind in TokenKind} - {TokenKind.UNDEFINED}


@dataclass(frozen=True)
class SentencePieceModel:
    """A vocabulary as it was trained. bos_id, eos_id, unk_id: None where training had none."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: bytes
    add_space_prefix: bool
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None


def read_model(data: bytes) -> SentencePieceModel:
    """Parse a ModelProto; raises TokenizerError if it is damaged or not a plain BPE model."""
    try:
        return _read_model(data)
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, ValueError) as error:
        raise TokenizerError(f"tokenizer.model is damaged: {' '.join(str(error).split())[:100]}") from error


def _read_model(data: bytes) -> SentencePieceModel:
    tokens: list[str] = []
    scores: list[float] = []
    kinds = bytearray()
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            kind = _int(piece.get(3, TokenKind.NORMAL))
            if kind not in _KINDS or len(tokens) >= MAX_TOKENS:
                raise TokenizerError(f"tokenizer.model is damaged: piece {len(tokens)} has type {kind}")
            tokens.append(_bytes(piece.get(1, b"")).decode() or f"[EMPTY_{len(tokens)}]")
            scores.append(struct.unpack("<f", _bytes(piece.get(2, b"\0\0\0\0")))[0])
            kinds.append(kind)
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if _int(trainer.get(3, 1)) != _BPE:
        raise TokenizerError("tokenizer.model is not a BPE model (unigram?); use the model's tokenizer.json")
    if _bytes(normalizer.get(2, b"")):
        raise TokenizerError("tokenizer.model maps characters before cutting; use the model's tokenizer.json")
    if _int(normalizer.get(4, 1)) or not _int(normalizer.get(5, 1)) or _int(trainer.get(24, 0)):
        raise TokenizerError(
            "tokenizer.model rewrites white space before cutting; use the model's tokenizer.json"
        )
    if not tokens:
        raise TokenizerError("tokenizer.model holds no pieces; the file is damaged")
    unk, bos, eos = (
        _signed(_int(trainer.get(number, default))) for number, default in ((40, 0), (41, 1), (42, 2))
    )
    return SentencePieceModel(
        tokens=tuple(tokens),
        scores=tuple(scores),
        kinds=bytes(kinds),
        add_space_prefix=bool(_int(normalizer.get(3, 1))),
        bos_id=bos,
        eos_id=eos,
        unk_id=unk,
    )


def _signed(value: int) -> int | None:
    """An id, which is an int32 written as a 64-bit varint. None for -1, by which training says that there is none."""
    return None if value >= 1 << 31 else value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) for each field of a protobuf message; varints become int, everything else bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        value: int | bytes
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            if wire == 2:
                size, at = _varint(data, at)
            else:
                size = 8 if wire == 1 else 4
            if size > len(data) - at:
                raise ValueError(f"a field of {size} bytes runs past the end")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number runs past 64 bits at byte {at}")


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise TypeError("a number was expected")
    return value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("bytes were expected")
    return value
