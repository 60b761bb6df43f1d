"""Conversations → the text a model was trained on, by the model's own Jinja template.

Knows the names that published templates expect (those that transformers gives them) and the limits within
which a stranger's template may run: Jinja's immutable sandbox, bounded source, loops and output.
Deliberately does not know tokens: the result is text, with the special tokens spelled out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.models.errors import TemplateError

MAX_SOURCE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 24

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Message = Mapping[str, Any]


class ChatTemplate:
    """One model's template. source: Jinja text, None for ChatML. bos, eos: texts of those tokens, or ""."""

    def __init__(self, source: str | None, bos: str = "", eos: str = "") -> None:
        source = CHATML if source is None else source
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source)} characters; at most {MAX_SOURCE_CHARS} are read"
            )
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateError(f"the chat template is malformed: {_one_line(error)}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as text, ending where the model is to go on if add_generation_prompt.

        messages: {"role", "content", ...}; content is text or a list of {"type": "text", "text"}. tools:
        JSON schemas as OpenAI has them. variables: whatever else the template reads (enable_thinking).
        Raises TemplateError if the template refuses the conversation or runs past its limits.
        """
        names = {
            **self._tokens,
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _bounded(self._template.generate(names))
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(f"the chat template failed: {_one_line(error)}") from error


def _bounded(parts: Iterator[str]) -> str:
    text, length = [], 0
    for part in parts:
        length += len(part)
        if length > MAX_OUTPUT_CHARS:
            raise TemplateError(
                f"the chat template wrote more than {MAX_OUTPUT_CHARS} characters and was stopped"
            )
        text.append(part)
    return "".join(text)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only passes them through."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise TemplateError(f"the chat template refuses this conversation: {message}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, **options: Any) -> str:
    """Unlike Jinja's own filter, without HTML escapes: the models were trained on plain JSON."""
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, **options)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    to_json: Callable[..., str] = _to_json
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()
