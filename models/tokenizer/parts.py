"""The parts of a tokenizer, which the readers of files make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tokenizers import AddedToken

from .vocabulary import Vocabulary

DEFAULT_TEMPLATE, TOOL_TEMPLATE = "default", "tool_use"  # names that transformers gives to chat templates

TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")  # of an AddedToken


class Encoder(Protocol):
    """Text → ids.

    add_special: add the tokens that the model wants before and after a text. parse_special: recognise control tokens.
    Raises TooManyTokens, if it can be told early that there are more than `limit`, and TextTooLarge.
    """

    def encode(self, text: str, add_special: bool, parse_special: bool, limit: int) -> list[int]: ...


@dataclass(frozen=True)
class Stated:
    """What the files beside a tokenizer's own say of its tokens.

    names: role (`bos_token`) → text. added, extra: tokens that are looked for in texts; the first hold even where the
    tokenizer's own file has them with other properties. ends: ids of tokens that end an answer.
    """

    names: Mapping[str, str]
    added: Sequence[AddedToken]
    extra: Sequence[AddedToken]
    ends: Sequence[int]


@dataclass(frozen=True)
class Parts:
    """What a model's files say about text.

    longest_bytes: of a text, in UTF-8, no token stands for more; None where that is not known, because white space or
    unknown characters may be dropped. uncounted: bytes of a text that may be in no token.
    join: texts of tokens → text, for tokens that have no bytes of their own (whether there is a space between two
    depends on both). None where a text is the bytes of its tokens, one after the other.
    rewrites: any later token may make `join` change all of the text before it.
    chat_templates: Jinja sources by name. template_tokens: role → text of the tokens that templates may ask for.
    warnings: what the files say and cannot mean, each in one line.
    nbytes: of memory that all of this takes.
    """

    vocabulary: Vocabulary
    encoder: Encoder
    nbytes: int
    longest_bytes: int | None = None
    uncounted: bytes = b""
    join: Callable[[list[str]], str] | None = None
    rewrites: bool = False
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    template_tokens: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
