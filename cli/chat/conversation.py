"""A conversation as data: its turns, how many of them fit the context, and their form on disk.

Pure: knows no terminal, daemon or file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from shoal.comm.messages import ChatMessage

SAVED_FORMAT = 1
QUOTES = '"""'  # begins and ends a block of lines


class Turn(Struct):
    """What was asked and answered. `complete` is False for an answer that was stopped or broke off."""

    user: str
    assistant: str
    complete: bool = True


class SavedConversation(Struct):
    """The JSON of /save."""

    turns: list[Turn]
    model: str = ""
    system: str = ""
    format: Annotated[int, Meta(ge=1, le=SAVED_FORMAT)] = SAVED_FORMAT


class Conversation:
    """Answered turns in order, and perhaps a system message. `unanswered`: what was asked without an answer yet."""

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.turns: list[Turn] = []
        self.unanswered = ""

    def so_far(self) -> list[ChatMessage]:
        """System message and turns, as a request takes them."""
        found = [ChatMessage(role="system", content=self.system)] if self.system else []
        for turn in self.turns:
            found.append(ChatMessage(role="user", content=turn.user))
            found.append(ChatMessage(role="assistant", content=turn.assistant))
        return found

    def messages(self, asked: str) -> list[ChatMessage]:
        """`so_far`, and then `asked`."""
        return [*self.so_far(), ChatMessage(role="user", content=asked)]

    def answered(self, asked: str, answer: str, *, complete: bool = True) -> None:
        """Add a turn, unless the answer is empty: templates want user and assistant to alternate."""
        if answer:
            self.turns.append(Turn(asked, answer, complete))
            self.unanswered = ""
        else:
            self.unanswered = asked

    def take_back(self) -> str:
        """What was asked last, for asking again; its turn is dropped. "" when nothing was."""
        if self.unanswered:
            asked, self.unanswered = self.unanswered, ""
            return asked
        return self.turns.pop().user if self.turns else ""

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()
        self.unanswered = ""

    def fit(self, asked: str, count: Callable[[list[ChatMessage]], int], room_tokens: int) -> int | None:
        """Drop as few of the oldest turns as make the prompt fit `room_tokens`; returns how many.

        None when `asked` alone does not fit; nothing is dropped then. count: tokens of messages.
        """
        kept, dropped = self.turns, 0
        while count(self.messages(asked)) > room_tokens:
            if not self.turns:
                self.turns = kept
                return None
            dropped += 1
            self.turns = kept[dropped:]
        return dropped

    def to_json(self, model: str) -> bytes:
        saved = SavedConversation(self.turns, model, self.system)
        return msgspec.json.format(msgspec.json.encode(saved))

    def load_json(self, data: bytes) -> str:
        """Take over a saved conversation; returns its model. Raises msgspec.MsgspecError, or RecursionError."""
        saved = msgspec.json.decode(data, type=SavedConversation)
        self.system, self.turns, self.unanswered = saved.system, saved.turns, ""
        return saved.model


def quoted(text: str) -> bool:
    """Whether typed lines are a block between three quotation marks, or the beginning of one."""
    text = text.strip()
    return text.startswith(QUOTES) and (text.endswith(QUOTES) or text.count(QUOTES) % 2 == 1)


def unfinished(text: str) -> bool:
    """Whether typed lines ask for another: an open \"\"\" block, or a backslash at the end."""
    return text.count(QUOTES) % 2 == 1 if quoted(text) else text.endswith("\\")


def finished(text: str) -> str:
    """Typed lines as the text that is meant: without the marks of `unfinished`, and otherwise as it is."""
    if not quoted(text):
        return text.replace("\\\n", "\n")
    inner = text.strip().removeprefix(QUOTES).removesuffix(QUOTES)
    return inner.removeprefix("\n").removesuffix("\n")


def encodable(text: str) -> str:
    """`text` with U+FFFD for each part of a character that stands alone, as bytes that are no UTF-8 are read by Python
    and `\\ud800` by JSON: neither a message nor a file can have it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
