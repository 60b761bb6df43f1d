"""The vocabulary: which texts are tokens, of which kind, what bytes they stand for, which of them end a turn.

Knows the GGUF token kinds, the two spellings of bytes (GPT-2's printable alphabet and SentencePiece's
"▁" with `<0xNN>` byte tokens), and the texts by which end-of-turn tokens are recognised. Deliberately does
not know how text is cut into tokens (bpe, spm) nor any file format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from shoal.models.errors import TokenizerError
from shoal.models.texts import Texts

SPACE_MARK = "▁"  # U+2581: how SentencePiece writes a space
MAX_TOKENS = 4_000_000

# Texts that end a turn wherever they stand in a vocabulary (the same list as llama.cpp's EOG detection,
# because many files name only one of several end tokens).
END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)
# Fill-in-the-middle marks: control tokens by nature, and the second group also ends generation.
FIM_TEXTS = (
    ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
    ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
    ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
)
FIM_END_TEXTS = (
    ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("<|file_sep|>",),
)
# gpt-oss marks its channels inside an answer: they are text to the reader, never the end of it.
VISIBLE_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenKind(IntEnum):
    """Kinds of tokens; the values are GGUF's `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_KINDS = frozenset({TokenKind.UNKNOWN, TokenKind.CONTROL})


def _printable_bytes() -> dict[str, int]:
    """GPT-2's alphabet: every byte as one printable character (source: openai/gpt-2 encoder.py)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF_CHAR = _printable_bytes()


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """All tokens of a model.

    tokens: text of each id, packed. kinds: one `TokenKind` per id, as bytes.
    byte_level: texts are in GPT-2's byte alphabet; otherwise they are text with "▁" for spaces.
    add_space_prefix: a text begins with an invisible space that decoding takes away again (SentencePiece).
    """

    tokens: Texts
    kinds: bytes
    byte_level: bool
    add_space_prefix: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    stop_ids: frozenset[int] = frozenset()
    _bytes: dict[int, bytes] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def kind(self, token_id: int) -> TokenKind:
        """Kind of a token; ids outside the vocabulary (padding rows of a model) are UNUSED."""
        return TokenKind(self.kinds[token_id]) if 0 <= token_id < len(self.kinds) else TokenKind.UNUSED

    def is_special(self, token_id: int) -> bool:
        return self.kind(token_id) in SPECIAL_KINDS

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token stands for; b"" for control tokens and ids outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        kind = self.kind(token_id)
        if kind in SPECIAL_KINDS or not 0 <= token_id < len(self.tokens):
            return b""
        text = self.tokens[token_id]
        if kind is TokenKind.BYTE and (match := BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        if kind is TokenKind.USER_DEFINED:
            # SentencePiece files write spaces of user-defined tokens either way.
            return (text if self.byte_level else text.replace(SPACE_MARK, " ")).encode()
        if not self.byte_level:
            return text.replace(SPACE_MARK, " ").encode()
        try:
            return bytes([BYTE_OF_CHAR[char] for char in text])
        except KeyError:  # a token added as plain text
            return text.encode()


def inverse(tokens: Texts | list[str]) -> dict[str, int]:
    """Text → id. Large, so nothing keeps it: mergers are made from it. TokenizerError if two tokens share a text."""
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(text for token_id, text in enumerate(tokens) if ids[text] != token_id)
        raise TokenizerError(f"the vocabulary holds the token {twice[:60]!r} twice; the file is damaged")
    return ids


def packed(tokens: Iterable[str]) -> Texts:
    """The texts of tokens in little memory. Raises TokenizerError for one that is no Unicode text."""
    try:
        return Texts.of(tokens)
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the token {error.object[:60]!a} is no Unicode text; the file is damaged"
        ) from error


def vocabulary(
    tokens: Texts,
    ids: Mapping[str, int],
    kinds: Iterable[int],
    *,
    byte_level: bool,
    add_space_prefix: bool = False,
    bos_id: int | None = None,
    eos_id: int | None = None,
    unk_id: int | None = None,
    end_ids: Iterable[int] = (),
) -> Vocabulary:
    """Check and complete a vocabulary: end-of-turn tokens are found by text and become control tokens.

    ids: text → id of all tokens. end_ids: tokens that the files name as ends besides `eos_id`. Raises TokenizerError
    if a number differs or an id is outside the vocabulary.
    """
    count = len(tokens)
    if not 0 < count <= MAX_TOKENS:
        raise TokenizerError(f"a vocabulary has 1 to {MAX_TOKENS} tokens, this one has {count}")
    kind_of = bytearray(kinds)
    if len(kind_of) != count:
        raise TokenizerError(f"the vocabulary has {count} tokens but {len(kind_of)} token types")
    end_ids = set(end_ids)
    for name, token_id in [
        ("BOS", bos_id),
        ("EOS", eos_id),
        ("unknown", unk_id),
        *[("end", i) for i in end_ids],
    ]:
        if token_id is not None and not 0 <= token_id < count:
            raise TokenizerError(f"the {name} token is {token_id}, outside the vocabulary of {count} tokens")
    stops = _mark_ends(ids, kind_of) | end_ids
    if eos_id is not None:
        stops.add(eos_id)
    return Vocabulary(
        tokens=tokens,
        kinds=bytes(kind_of),
        byte_level=byte_level,
        add_space_prefix=add_space_prefix,
        bos_id=bos_id,
        eos_id=eos_id,
        unk_id=unk_id,
        stop_ids=frozenset(stops),
    )


def _mark_ends(ids: Mapping[str, int], kinds: bytearray) -> set[int]:
    """Ids of the tokens that end generation by their text; marks them (and FIM marks) as control tokens."""
    ends = {ids[text] for text in END_TEXTS if text in ids}
    marks = set()
    for group in (*FIM_TEXTS, *FIM_END_TEXTS):
        found = next((ids[text] for text in group if text in ids), None)
        if found is not None:
            marks.add(found)
            if group in FIM_END_TEXTS:
                ends.add(found)
    for token_id in ends | marks:
        kinds[token_id] = TokenKind.CONTROL
    for text in VISIBLE_TEXTS:
        if text in ids:
            kinds[ids[text]] = TokenKind.USER_DEFINED
    present = {text for text in END_TEXTS if text in ids}
    if "<|end|>" in present and (
        {"<|return|>", "<|call|>"} <= present or {"<|calls|>", "<|flush|>"} <= present
    ):
        ends.discard(ids["<|end|>"])  # there it closes a message, not the answer
        kinds[ids["<|end|>"]] = TokenKind.USER_DEFINED
    if "</s>" in present and "<|tool_response>" in present:
        ends.discard(ids["</s>"])  # an HTML tag in that vocabulary
        kinds[ids["</s>"]] = TokenKind.NORMAL
    return ends
