"""The vocabulary: which texts are tokens, of which kind, what bytes they stand for, which of them end a turn.

Knows the GGUF token kinds, the two spellings of bytes (GPT-2's printable alphabet and SentencePiece's
"▁" with `<0xNN>` byte tokens), and the texts by which end-of-turn tokens are recognised. Does not know how text
is cut into tokens (bpe, spm), nor any file format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import chain

from shoal.models.errors import TokenizerError
from shoal.models.texts import Texts

SPACE_MARK = "▁"  # U+2581: how SentencePiece writes a space
MAX_TOKENS = 1 << 20  # the largest published vocabularies have 262,000

# Control tokens with these texts end a turn. The list is that of llama.cpp's EOG detection. It is needed because many
# files name only one of several end tokens. Tokens that a file marks as text are text, whatever they spell: Gemma 3 has
# "</s>" for HTML, and Qwen2.5 has it because it is frequent in programs.
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
# Marks for filling in the middle. Those of the second group end generation, too.
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
# gpt-oss marks its channels inside an answer: the reader sees them as text, and they never end it.
VISIBLE_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_KNOWN_TEXTS = (*END_TEXTS, *chain(*FIM_TEXTS, *FIM_END_TEXTS), *VISIBLE_TEXTS)

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
    """All tokens of a model. Readers of files make it of what these say, and `completed` adds the rest.

    tokens: text of each id, packed. kinds: one `TokenKind` per id, as bytes. stop_ids: all tokens that end generation.
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
    """Text → id, for making mergers; too large to keep. Raises TokenizerError if two tokens share a text."""
    if len(tokens) > MAX_TOKENS:
        raise TokenizerError(f"a vocabulary has 1 to {MAX_TOKENS} tokens, this one has {len(tokens)}")
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(text for token_id, text in enumerate(tokens) if ids[text] != token_id)
        raise TokenizerError(f"the vocabulary holds the token {twice[:60]!r} twice; the file is damaged")
    return ids


def packed(tokens: Iterable[str]) -> Texts:
    """The texts of tokens, packed. Raises TokenizerError for one that is no Unicode text."""
    try:
        return Texts.of(tokens)
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the token {error.object[:60]!a} is no Unicode text; the file is damaged"
        ) from error


def completed(
    vocabulary: Vocabulary, ids: Mapping[str, int], end_ids: Iterable[int] = (), *, marked: bool = False
) -> Vocabulary:
    """The vocabulary, checked, with all tokens that end a turn: those that its files name, and control tokens that are
    known by their text.

    ids: text → id of all its tokens. end_ids: tokens that the files name as ends besides `eos_id`. marked: those are to
    be recognised in texts like `eos_id`. Raises TokenizerError if there are not as many kinds as tokens or if an id is
    outside the vocabulary.
    """
    count = len(vocabulary)
    if not 0 < count <= MAX_TOKENS:
        raise TokenizerError(f"a vocabulary has 1 to {MAX_TOKENS} tokens, this one has {count}")
    kinds = bytearray(vocabulary.kinds)
    if len(kinds) != count:
        raise TokenizerError(f"the vocabulary has {count} tokens but {len(kinds)} token types")
    named = [("BOS", vocabulary.bos_id), ("EOS", vocabulary.eos_id), ("unknown", vocabulary.unk_id)]
    ends = set(end_ids)
    for name, token_id in [*named, *(("end", token_id) for token_id in ends)]:
        if token_id is not None and not 0 <= token_id < count:
            raise TokenizerError(f"the {name} token is {token_id}, outside the vocabulary of {count} tokens")
    recognised = ends if marked else set[int]()
    if vocabulary.eos_id is not None:
        recognised = recognised | {vocabulary.eos_id}
    for token_id in recognised:
        if kinds[token_id] in (TokenKind.NORMAL, TokenKind.UNDEFINED):
            kinds[token_id] = TokenKind.CONTROL
    ends |= recognised | _known_ends(ids, kinds)
    return replace(vocabulary, kinds=bytes(kinds), stop_ids=frozenset(ends))


def _known_ends(ids: Mapping[str, int], kinds: bytearray) -> set[int]:
    """Ids of the control tokens that end generation by their text.

    Where the file says no kind, these texts (and FIM marks) make control tokens.
    """
    for text in _KNOWN_TEXTS:
        if text in ids and kinds[ids[text]] == TokenKind.UNDEFINED:
            kinds[ids[text]] = TokenKind.CONTROL
    control = {text for text in _KNOWN_TEXTS if text in ids and kinds[ids[text]] == TokenKind.CONTROL}
    present = control.intersection(END_TEXTS)
    firsts = (next((text for text in group if text in control), None) for group in FIM_END_TEXTS)
    ends = present.union(text for text in firsts if text is not None)
    for text in control.intersection(VISIBLE_TEXTS):
        kinds[ids[text]] = TokenKind.USER_DEFINED
    if "<|end|>" in present and (
        {"<|return|>", "<|call|>"} <= present or {"<|calls|>", "<|flush|>"} <= present
    ):
        ends.discard("<|end|>")  # there it closes a message, not the answer
        kinds[ids["<|end|>"]] = TokenKind.USER_DEFINED
    if {"</s>", "<|tool_response>"} <= present:
        ends.discard("</s>")  # an HTML tag in that vocabulary
        kinds[ids["</s>"]] = TokenKind.NORMAL
    return {ids[text] for text in ends}
