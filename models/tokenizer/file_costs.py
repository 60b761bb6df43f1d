"""What tokenizers take of memory: while they are read, and afterwards.

Measured on vocabularies of 32,000 to 256,000 tokens. The `tokenizers` library keeps a BPE as three hash tables, which
grow by doubling, and each token's text twice; a GGUF file tells how many tokens and merges there are, and a
`tokenizer.json` about, of which 2 to 5 MB more are kept. While it was read, it took 560 to 960 bytes a
token, or up to 20 times its file. Ours of SentencePiece, which have no merges, kept 100 to 172 bytes a token; WordPiece
took less than 450. Unigram has a tree of the bytes of its tokens, of 360 bytes a node: with 2 to 4 nodes a token, as
published ones have, it kept 700 to 1500 bytes a token and took 970 to 1650, or up to 50 times its file. With long
tokens that share little it was ten times as much.
"""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from shoal.models.regular_files import read_regular

MAX_TOKENIZER_FILE_BYTES = 64 << 20  # the largest published has 34 MB
SPM_TOKEN_BYTES = 206  # of a vocabulary of SentencePiece
# Bytes of a token's text that are within what a token takes; what is longer counts so often.
USUAL_LENGTH, LONGER_TIMES = 24, 2
VOCABULARY_BYTES = 450  # of each token, where nothing is known but how many there are
# Of the library's BPE: a place in the table from texts to ids, or in the one back; a place in that of merges; a text of
# usual length.
_PLACE_BYTES, _MERGE_PLACE_BYTES, _TEXT_BYTES = 33, 17, 32
_END_BYTES = 4  # of where a text of ours ends
# Python's objects for a token, which are gone when it is read, leave some of its arenas behind, and some more where a
# file was parsed: for each token, and at most.
_ARENA_BYTES, _MOST_ARENA_BYTES = 100, 4 << 20
_PARSED_BYTES, _MOST_PARSED_BYTES = 125, 5 << 20
_READING_BYTES = 250  # of each token while a GGUF's are read


class FileCost(NamedTuple):
    """In bytes. `reading`, `reading_token`: at the peak, of each byte of the file and each token, whichever is more.
    `token`: of each token that stays. A BPE with so many `merges` takes its tables, and up to `_MOST_PARSED_BYTES` for
    all tokens besides."""

    reading: int
    reading_token: int
    token: int
    merges: int | None = None

    def kept(self, tokens: int) -> int:
        """What stays of so many tokens."""
        if self.merges is None:
            return self.token * tokens
        return _bpe_memory(tokens, self.merges) + min(self.token * tokens, _MOST_PARSED_BYTES)


_USUAL, _UNIGRAM = FileCost(22, 1100, VOCABULARY_BYTES), FileCost(50, 1700, 1500)
_BPE = _USUAL._replace(token=_PARSED_BYTES)
_NODE_BYTES, _LEAF_BYTES = 380, 300  # of the tree of a Unigram vocabulary, and of each token besides
_MAX_COUNTED = 1 << 20  # no vocabulary has more tokens
_MERGES = re.compile(rb'"merges"\s*:\s*\[\s*(\[?)')
_PIECE = re.compile(rb'\[\s*"((?:[^"\\]|\\.)*)"')


def file_cost(data: bytes) -> FileCost:
    """Of a file with these bytes."""
    if b'"Unigram"' not in data:
        merges = _MERGES.search(data)
        if merges is None or b'"BPE"' not in data:
            return _USUAL
        quotes = data.count(b'"', merges.end()) - data.count(rb"\"", merges.end())
        return _BPE._replace(merges=quotes // (4 if merges[1] else 2))
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
    if merges:
        kept = _bpe_memory(tokens, merges) + text_bytes + longer
        return TokenizerMemory(kept + longer + _READING_BYTES * tokens, kept)
    kept = SPM_TOKEN_BYTES * tokens + longer
    return TokenizerMemory(kept * 8 // 5, kept)


def _bpe_memory(tokens: int, merges: int) -> int:
    """What any BPE takes: texts and tables of the library's, and what Python keeps for itself."""
    texts = (2 * _TEXT_BYTES + _END_BYTES) * tokens
    tables = 2 * _PLACE_BYTES * _places(tokens) + _MERGE_PLACE_BYTES * _places(merges)
    return texts + tables + min(_ARENA_BYTES * tokens, _MOST_ARENA_BYTES)


def _places(entries: int) -> int:
    """Of a hash table with so many entries: a power of two, of which seven eighths are filled at most."""
    return 1 << (8 * entries // 7).bit_length() if entries else 0


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
    return TokenizerMemory(reading, cost.kept(tokens))
