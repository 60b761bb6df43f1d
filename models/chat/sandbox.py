"""The sandbox in which a stranger's chat template is compiled and rendered: a script for child processes.

Knows Jinja's immutable sandbox, which keeps a template from reaching out, and what transformers gives to templates.
Whatever a template does to memory and time is bounded by its process (`child_main`); here are only rules about what
it may reach and what it gives back. Imports nothing else of Shoal, because the child should start at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARS = 1 << 24


class Refusal(Exception):
    """What a template says of a conversation that it does not take."""


def begin(source: bytes) -> Callable[[bytes], bytes]:
    """Compiles a template, given in UTF-8. The function renders it: JSON object of variables → text in UTF-8, in which
    lone surrogates are encoded as they are."""
    template = Sandbox().from_string(source.decode("utf-8", "surrogatepass"))

    def render(variables: bytes) -> bytes:
        text = template.render(json.loads(variables))
        if len(text) > MAX_CHARS:
            raise OverflowError(
                f"its text would have {len(text)} characters; at most {MAX_CHARS} are allowed"
            )
        return text.encode("utf-8", "surrogatepass")

    return render


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with what transformers adds to it."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here they only pass through it."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """`dict` for templates, without attributes by which a template could leave the sandbox (as in transformers)."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` without underscored names, by which templates have left sandboxes (as in transformers)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *positional = args
        Namespace.__init__(self)
        for name, value in dict(*positional, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"it stores the underscored name {name[:40]!r} in a namespace")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, without HTML escapes: the models were trained on plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
