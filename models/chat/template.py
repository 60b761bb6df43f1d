"""Conversations → the text a model was trained on, by the model's own Jinja template.

Knows the names that published templates read and what conversations look like. Does not know tokens (the result is
text, with the special tokens spelled out), nor how a stranger's template is kept within bounds (renderer, sandbox).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.models.errors import TemplateError

from .renderer import MAX_RENDER_S, Renderer

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

    source: Jinja text; None or an empty text for ChatML. bos, eos: texts of those tokens, or "". of: the model's name,
    for messages. max_render_s: how long one conversation may take. Raises TemplateError if the source is malformed or
    too long, and Overloaded if it cannot be compiled now.
    """

    def __init__(
        self,
        source: str | None,
        bos: str = "",
        eos: str = "",
        *,
        of: str = "",
        max_render_s: float = MAX_RENDER_S,
    ) -> None:
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._takes_parts: bool | None = None
        self._reads_tools = False  # as far as is known
        self._renderer = Renderer(source or CHATML, of, max_render_s)

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
        runs past its limits, and Overloaded if it would have to wait for long.
        """
        conversation = plain(messages)
        if not all(isinstance(message, dict) for message in conversation):
            raise TemplateError("a conversation is a list of messages, each an object with role and content")
        if (
            any(isinstance(message.get("content"), list) for message in conversation)
            and not self._reads_parts()
        ):
            conversation = [_joined(message, f"messages[{at}]") for at, message in enumerate(conversation)]
        return self._render(
            {**plain(variables), "tools": plain(tools), "add_generation_prompt": add_generation_prompt},
            conversation,
        )

    def ignores_tools(self, rendered: str, messages: Sequence[TemplateMessage], /, **variables: Any) -> bool:
        """Whether the text that it made of a conversation with tools is the same without them. A template that fails
        or refuses then reads them, too. One that has read tools once is not tried again. Raises Overloaded."""
        if not self._reads_tools:
            try:
                self._reads_tools = rendered != self.render(messages, **variables)
            except TemplateError:
                self._reads_tools = True
        return not self._reads_tools

    def close(self) -> None:
        """End the renderings that are under way, and refuse later ones with Overloaded."""
        self._renderer.close()

    def _render(self, variables: dict[str, Any], conversation: list[dict[str, Any]]) -> str:
        return self._renderer.render({**self._tokens, **variables, "messages": conversation})

    def _reads_parts(self) -> bool:
        """Whether the template takes content in parts, found out by trying once."""
        if self._takes_parts is None:  # without a lock: several threads may try, and find the same
            self._takes_parts = self._tried_parts()
        return self._takes_parts

    def _tried_parts(self) -> bool:
        parts = [{"type": "text", "text": "probe"}]
        try:
            text = self._render({"add_generation_prompt": False}, [{"role": "user", "content": parts}])
        except TemplateError:
            return False
        return "probe" in text and "'text'" not in text and '"text"' not in text


def _joined(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with its parts as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    for at, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise TemplateError(
                f"{where}.content[{at}] is {part!r:.80}: a message's content is text or a list of "
                "{'type': 'text', 'text': ...}"
            )
    return {**message, "content": "".join(part["text"] for part in content)}


def plain(value: Any) -> Any:
    """The value as plain JSON types; else TemplateError."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise TemplateError(f"a conversation holds JSON values only, not {type(value).__name__}")
