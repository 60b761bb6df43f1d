"""Conversations → the text a model was trained on, by the model's own Jinja template.

Knows the names that published templates read and what conversations look like. Does not know tokens (the result is
text, with the special tokens spelled out), nor how a stranger's template is kept within bounds (sandbox).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from shoal.models.errors import TemplateError, one_line

from .sandbox import ENVIRONMENT, MAX_RENDER_S, limits, plain

MAX_SOURCE_CHARS = 1 << 20

# The template of a model that has none: the form that most small chat models were trained on.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TemplateMessage = Mapping[str, Any]


class ChatTemplate:
    """One model's template.

    source: Jinja text; None or an empty text for ChatML. bos, eos: texts of those tokens, or "".
    max_render_s: how long one conversation may take. Raises TemplateError if the source is malformed or too long.
    """

    def __init__(
        self, source: str | None, bos: str = "", eos: str = "", *, max_render_s: float = MAX_RENDER_S
    ) -> None:
        source = source or CHATML
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source)} characters; at most {MAX_SOURCE_CHARS} are read"
            )
        self._max_render_s = max_render_s
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            with limits(max_render_s):
                self._template = ENVIRONMENT.from_string(source)
        except Exception as error:  # Jinja's own errors and, for deep nesting, those of Python's compiler
            raise TemplateError(f"the chat template is malformed: {one_line(error, 300)}") from error

    def render(
        self,
        messages: Sequence[TemplateMessage],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as text; with add_generation_prompt it ends where the model's answer begins.

        messages: {"role", "content", ...}; content is text or a list of {"type": "text", "text"}, whose texts are
        joined for a template that knows only text. tools: JSON schemas as OpenAI has them. variables: whatever else
        the template reads (enable_thinking). Raises TemplateError if the template refuses the conversation, fails or
        runs past its limits.
        """
        conversation = plain(messages)
        if not all(isinstance(message, dict) for message in conversation):
            raise TemplateError("a conversation is a list of messages, each an object with role and content")
        if (
            any(isinstance(message.get("content"), list) for message in conversation)
            and not self._reads_parts
        ):
            conversation = [_joined(message) for message in conversation]
        return self._render(
            {**plain(variables), "tools": plain(tools), "add_generation_prompt": add_generation_prompt},
            conversation,
        )

    def _render(self, variables: dict[str, Any], conversation: list[dict[str, Any]]) -> str:
        try:
            with limits(self._max_render_s):
                return self._template.render({**self._tokens, **variables, "messages": conversation})
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(f"the chat template failed: {one_line(error, 300)}") from error

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template takes content in parts, found out by trying."""
        parts = [{"type": "text", "text": "probe"}]
        try:
            text = self._render({"add_generation_prompt": False}, [{"role": "user", "content": parts}])
        except TemplateError:
            return False
        return "probe" in text and "'text'" not in text and '"text"' not in text


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its parts as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise TemplateError("a message's content is text or a list of {'type': 'text', 'text': ...}")
    return {**message, "content": "".join(part["text"] for part in content)}
