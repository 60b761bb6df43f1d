"""What the readers of files hand over: the parts of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .vocabulary import Vocabulary


class Encoder(Protocol):
    """Text → ids.

    add_special: put before and after what the model wants there. parse_special: control tokens are recognised.
    """

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]: ...


@dataclass(frozen=True)
class Parts:
    """What a model's files say about text.

    join: texts of tokens → text, for files whose tokens have no bytes of their own (whether there is a space
    between two depends on both); None where a text is the bytes of its tokens, one after the other.
    rewrites: `join` may change, at any later token, all that it said before.
    """

    vocabulary: Vocabulary
    encoder: Encoder
    chat_template: str | None
    join: Callable[[list[str]], str] | None = None
    rewrites: bool = False
