"""The parts of a tokenizer, which the readers of files make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .vocabulary import Vocabulary


class Encoder(Protocol):
    """Text → ids.

    add_special: add the tokens that the model wants before and after a text. parse_special: recognise control tokens.
    """

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]: ...


@dataclass(frozen=True)
class Parts:
    """What a model's files say about text.

    join: texts of tokens → text, for tokens that have no bytes of their own (whether there is a space between two
    depends on both). None where a text is the bytes of its tokens, one after the other.
    rewrites: any later token may make `join` change all of the text before it.
    """

    vocabulary: Vocabulary
    encoder: Encoder
    chat_template: str | None
    join: Callable[[list[str]], str] | None = None
    rewrites: bool = False
