"""Which `tokenizer.json` files this process runs itself: those of known parts, whose memory and time are bounded.

Any other part is the library's too, but what it makes of a text has no bound that could be told beforehand: a chain of
replacements doubles a text at each step, a regex may try for hours, holding the interpreter's lock. Knows the file's
format. Decides only: it reads no text, and whatever is malformed is simply not ordinary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from .long_texts import steps_of
from .vocabulary import MAX_TOKENS
from .word_rules import REGEXES

_MAX_STEPS = 12  # of one of the four parts
_MAX_REWRITES = 2  # of these, steps that put texts in place of others …
_MAX_CONTENT_CHARS = 4  # … which are no longer than this
_MAX_PART_BYTES = 64 << 10
_MAX_NODES = 400  # values within one part
_MAX_TEXT_CHARS = 64
_MAX_LIST = 32
_MAX_TOKEN_CHARS = 4096
_MAX_PIECE_CHARS = 64  # of Unigram, which takes every piece that goes on from a place, at each place
_MAX_ADDED = 200_000
_MAX_WORD_CHARS = 128  # of WordPiece, which tries all parts of a word, longest first
# The library takes about ten times as much for a moment; the largest published file has 34 MB.
_MAX_BYTES = 48 << 20
# Of a file, for each list or object: a merge has more, and what is denser takes far more memory.
_BRACKET_BYTES = 8

_PARTS = {
    "normalizer": {
        *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Nmt"),
        *("ByteLevel", "Prepend", "Replace", "Sequence"),
    },
    "pre_tokenizer": {
        *("ByteLevel", "BertPreTokenizer", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace"),
        *("WhitespaceSplit", "Sequence"),
    },
    "post_processor": {"ByteLevel", "BertProcessing", "RobertaProcessing", "TemplateProcessing", "Sequence"},
    "decoder": {
        *("ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece", "BPEDecoder", "CTC"),
        *("Replace", "Sequence"),
    },
}
_REWRITES = {"Replace", "Prepend"}


class _Added(msgspec.Struct):
    id: int
    content: str
    lstrip: bool = False
    rstrip: bool = False


class _Model(msgspec.Struct):
    vocab: msgspec.Raw
    type: str = "BPE"
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    max_input_chars_per_word: int = 100
    merges: msgspec.Raw = msgspec.Raw(b"[]")


class _Outline(msgspec.Struct, forbid_unknown_fields=True):
    model: _Model
    version: msgspec.Raw = msgspec.Raw(b"null")
    truncation: msgspec.Raw = msgspec.Raw(b"null")
    padding: msgspec.Raw = msgspec.Raw(b"null")
    normalizer: msgspec.Raw = msgspec.Raw(b"null")
    pre_tokenizer: msgspec.Raw = msgspec.Raw(b"null")
    post_processor: msgspec.Raw = msgspec.Raw(b"null")
    decoder: msgspec.Raw = msgspec.Raw(b"null")
    added_tokens: list[_Added] = []


def is_ordinary(data: bytes, added: Sequence[Mapping[str, Any]] = ()) -> bool:
    """Whether a file has nothing but known parts, within bounds. added: fields of tokens that other files add."""
    if len(data) > _MAX_BYTES or data.count(b"[") + data.count(b"{") > 64 + len(data) // _BRACKET_BYTES:
        return False
    try:
        file = msgspec.json.decode(data, type=_Outline)
        model = file.model
        lengths, ids = _vocabulary(model)
        known = all(_is_known(getattr(file, part), types) for part, types in _PARTS.items())
        known = known and _normalises_once(file.normalizer)
        tokens = file.added_tokens + [msgspec.convert({"id": 0, **fields}, _Added) for fields in added]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    affixes = (model.continuing_subword_prefix or "", model.end_of_word_suffix or "")
    added_chars = max((len(token.content) for token in tokens), default=0)
    most_chars = _MAX_PIECE_CHARS if model.type == "Unigram" else _MAX_TOKEN_CHARS
    return (
        known
        and not model.dropout
        # A prefix may end the process: the library cuts a token within a character.
        and not (model.type == "BPE" and model.continuing_subword_prefix)
        and max(map(len, affixes)) <= _MAX_TEXT_CHARS
        and 0 <= model.max_input_chars_per_word <= _MAX_WORD_CHARS
        and max(lengths, default=0) <= most_chars
        and added_chars <= _MAX_TOKEN_CHARS
        and not any(token.content.isspace() and (token.lstrip or token.rstrip) for token in tokens)
        and all(0 <= token_id < MAX_TOKENS for token_id in ids)
        and len(tokens) <= _MAX_ADDED
        and all(0 <= token.id < MAX_TOKENS for token in tokens)
    )


def _vocabulary(model: _Model) -> tuple[Iterator[int], Iterator[int]]:
    """Characters and ids of its tokens."""
    if model.type == "Unigram":
        pieces = msgspec.json.decode(model.vocab, type=list[tuple[str, float]])
        return (len(text) for text, _ in pieces), iter((len(pieces),))
    # Not by msgspec, which keeps hundreds of the keys that it has read, and with each the memory of those around it.
    vocab = json.loads(bytes(model.vocab).decode())
    if not isinstance(vocab, dict) or {*map(type, vocab.values())} - {int}:
        raise ValueError
    return map(len, vocab), iter(vocab.values())


def _is_known(written: msgspec.Raw, types: set[str]) -> bool:
    if len(written) > _MAX_PART_BYTES:
        return False
    part = msgspec.json.decode(written)
    if part is None:
        return True
    nodes: list[Any] = [part]
    steps = rewrites = 0
    for count, node in enumerate(nodes):  # which grows meanwhile
        if count > _MAX_NODES:
            return False
        match node:
            case dict():
                if "type" in node:
                    steps += 1
                    if node["type"] not in types:
                        return False
                    if node["type"] in _REWRITES:
                        rewrites += 1
                        if len(str(node.get("content", node.get("prepend")))) > _MAX_CONTENT_CHARS:
                            return False
                    if node["type"] == "TemplateProcessing" and not _says_a_text_once(node):
                        return False
                nodes += node.values()
            case list():
                if len(node) > _MAX_LIST:
                    return False
                nodes += node
            case str() if len(node) > _MAX_TEXT_CHARS and node not in REGEXES:
                return False
            case int() if not isinstance(node, bool) and not 0 <= node < MAX_TOKENS:
                return False
        if isinstance(node, Mapping) and ("Regex" in node or "String" in node):
            pattern = node.get("Regex")
            if (pattern is not None and pattern not in REGEXES) or node.get("String") == "":
                return False
    return steps <= _MAX_STEPS and rewrites <= _MAX_REWRITES


def _normalises_once(written: msgspec.Raw) -> bool:
    """Whether only replacements come more than once: of two, one may make more of what the other has made."""
    kinds = [step["type"] for step in steps_of(msgspec.json.decode(written)) if step["type"] != "Replace"]
    return len(kinds) == len(set(kinds))


def _says_a_text_once(template: Mapping[str, Any]) -> bool:
    single = template.get("single")
    return isinstance(single, list) and sum("Sequence" in piece for piece in single) <= 1
