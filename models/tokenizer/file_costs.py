"""What tokenizers take of memory: while they are read, and afterwards.

Measured on vocabularies of 32,000 to 256,000 tokens. From a GGUF file, whose merges can be counted beforehand, they
stay within `TOKEN_BYTES` and `MERGE_BYTES`, and ours of SentencePiece, which have no merges, kept 100 to 172 bytes a
token. With a `tokenizer.json`, of the `tokenizers` library, BPE kept 330 to 405 bytes a token and took 820 to 1000 at
the peak, or up to 20 times its file; WordPiece took less. Unigram has a tree of the bytes of
its tokens, of 360 bytes a node: with 2 to 4 nodes a token, as published ones have, it kept 700 to 1500 bytes a token
and took 970 to 1650, or up to 50 times its file. With long tokens that share little it was ten times as much.
"""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from shoal.models.regular_files import read_regular

MAX_TOKENIZER_FILE_BYTES = 64 << 20  # the largest published has 34 MB
TOKEN_BYTES, MERGE_BYTES = 206, 153  # of a vocabulary whose tokens and merges are known
# Bytes of a token's text that are within that; what is longer counts so often.
USUAL_LENGTH, LONGER_TIMES = 24, 2
VOCABULARY_BYTES = 450  # of each token, where nothing is known but how many there are


class FileCost(NamedTuple):
    """In bytes. `reading`, `reading_token`: at the peak, of each byte of the file and each token, whichever is more.
    `token`: of each token that stays."""

    reading: int
    reading_token: int
    token: int


_USUAL, _UNIGRAM = FileCost(22, 1100, VOCABULARY_BYTES), FileCost(50, 1700, 1500)


_NODE_BYTES, _LEAF_BYTES = 380, 300  # of the tree of a Unigram vocabulary, and of each token besides
_MAX_COUNTED = 1 << 20  # no vocabulary has more tokens
_PIECE = re.compile(rb'\[\s*"((?:[^"\\]|\\.)*)"')


def file_cost(data: bytes) -> FileCost:
    """Of a file with these bytes."""
    if b'"Unigram"' not in data:
        return _USUAL
    tokens, nodes = _tree(data)
    token = nodes * _NODE_BYTES // max(1, tokens) + _LEAF_BYTES
    return FileCost(_UNIGRAM.reading, max(_UNIGRAM.reading_token, token + 200), max(_UNIGRAM.token, token))


def _tree(data: bytes) -> tuple[int, int]:
    """Tokens of a Unigram vocabulary, and nodes of the tree of their bytes. Nothing is parsed: an escaped character
    counts as it is written."""
    pieces = sorted(found[1] for found in islice(_PIECE.finditer(data), _MAX_COUNTED))
    nodes, before = 0, b""
    for piece in pieces:
        shared = min(len(piece), len(before))
        differ = int.from_bytes(piece[:shared]) ^ int.from_bytes(before[:shared])
        nodes += len(piece) - shared + (differ.bit_length() + 7) // 8
        before = piece
    return len(pieces), nodes


class TokenizerMemory(NamedTuple):
    """In bytes. `reading`: for a moment, while it is read. `kept`: that stays."""

    reading: int
    kept: int


def vocabulary_memory(tokens: int, merges: int, text_bytes: int) -> TokenizerMemory:
    """What a vocabulary takes that has so many of each, and so many bytes of tokens' texts. While it is read, its lists
    are there as well."""
    longer = LONGER_TIMES * max(0, text_bytes - USUAL_LENGTH * tokens)
    kept = TOKEN_BYTES * tokens + MERGE_BYTES * merges + longer
    return TokenizerMemory(kept * 8 // 5, kept)


def tokenizer_memory(directory: Path, tokens: int) -> TokenizerMemory:
    """What the tokenizer.json of a directory takes, if it has so many tokens; without one that can be read, what a
    tokenizer.model does."""
    path = directory / "tokenizer.json"
    try:
        data = read_regular(path, MAX_TOKENIZER_FILE_BYTES) if os.path.lexists(path) else b""
    except OSError:
        data = b""
    if not data:
        return vocabulary_memory(tokens, 0, 0)
    cost = file_cost(data)
    reading = max(cost.reading * len(data), cost.reading_token * tokens)
    return TokenizerMemory(reading, cost.token * tokens)
