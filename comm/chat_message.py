"""One turn of a conversation on the wire: a map that reaches the model's chat template as it was sent.

Knows the fields that every template reads, and checks those. Does not know requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct, ValidationError, convert

from .complaints import explained
from .plain_values import check_plain


class ChatMessage(dict[str, Any]):
    """One turn of a conversation: `role`, `content` and whatever else the template reads, as it was sent."""

    @property
    def role(self) -> str:
        return str(self["role"])

    @property
    def content(self) -> Any:
        return self.get("content")


class KnownFields(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Those fields of a chat message that are checked. Any others reach the template, too."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


ChatMessages = Annotated[Sequence[dict[str, Any]], Meta(min_length=1, max_length=10_000)]


def checked(messages: ChatMessages) -> list[ChatMessage]:
    """The messages, in a list of their own. ValueError, naming message, field, value and limit."""
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        try:
            convert(message, KnownFields)
        except ValidationError as error:
            raise ValueError(explained(str(error), message, where)) from error
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: its keys must be text without lone surrogates") from error
        for key, value in message.items():
            check_plain(value, f"{where}.{key:.40}")
    return [ChatMessage(message) for message in messages]
