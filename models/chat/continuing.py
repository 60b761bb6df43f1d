"""Conversations whose last message the model is to go on with instead of answering it.

Knows how transformers does it: a mark at the end of that message shows where its text ends in the rendered text. Does
not know templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.models.errors import TemplateError

_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def marked(messages: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The messages with the mark at the end of the last one's field `name`. Raises TemplateError if it has no text."""
    value = messages[-1].get(name)
    if isinstance(value, str):
        return [*messages[:-1], {**messages[-1], name: value + _MARK}]
    parts = list(value) if isinstance(value, list) else []
    for index in reversed(range(len(parts))):
        if isinstance(parts[index], Mapping) and isinstance(text := parts[index].get("text"), str):
            parts[index] = {**parts[index], "text": text + _MARK}
            return [*messages[:-1], {**messages[-1], name: parts}]
    raise TemplateError(
        f"continue_final_message: the last message has no text in its {name!r:.60} to go on with"
    )


def before_mark(rendered: str) -> str:
    """The rendered text up to the mark. Raises TemplateError if the template has left it out."""
    at = rendered.rfind(_MARK.strip())
    if at < 0:
        raise TemplateError(
            "continue_final_message: the chat template leaves out the end of the last message, so nothing can follow it"
        )
    before = rendered[:at]
    return before if rendered[at:].startswith(_MARK) else before.rstrip()  # the template strips messages
