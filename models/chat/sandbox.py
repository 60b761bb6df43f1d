"""The sandbox in which a stranger's chat template runs.

Knows Jinja's immutable sandbox, what transformers gives to templates, and the limits added to it: time, and the size
of every text, list and number that a template makes. They are needed because Jinja's sandbox keeps a template from
reaching out, but not from running for hours or filling the memory. Every round of a loop looks at the clock, and
operations that can make something large out of something small are checked before they run. Does not know
conversations. Not bounded is the rendering of nested lists that share their parts, for which somebody has to write a
template by hand.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import partial, wraps
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from shoal.models.errors import TemplateError

MAX_RENDER_S = 5.0
MAX_CHARS = 1 << 24
MAX_TOTAL_CHARS = 1 << 28
MAX_ITEMS = 1 << 20
MAX_WIDTH = 1 << 20
MAX_NUMBER_BITS = 4096

# Chat templates have no use for these, and each can make something large out of something small.
_REMOVED_FILTERS = ("batch", "center", "pprint", "slice", "urlize", "wordwrap", "xmlattr")
_REMOVED_GLOBALS = ("lipsum",)
_WIDE_FORMAT = re.compile(r"\d{6}")
_NESTED_FORMAT = re.compile(r"\{[^{}]*:[^{}]*\{")


@dataclass
class _Spent:
    """How long one rendering may take, and how many characters it has made so far."""

    deadline_s: float
    chars: int = 0


_spent: ContextVar[_Spent] = ContextVar("spent")


@contextmanager
def limits(render_s: float) -> Iterator[None]:
    """Templates that are compiled and rendered within this context raise TemplateError at the limits."""
    token = _spent.set(_Spent(time.monotonic() + render_s))
    try:
        yield
    finally:
        _spent.reset(token)


def _tick() -> str:
    """Templates call this in every round of a loop and at every call of a macro."""
    if time.monotonic() > _spent.get().deadline_s:
        raise TemplateError("the chat template did not end in time and was stopped")
    return ""


def _sized(value: Any) -> Any:
    """Gives the value back if it is within the limits, else raises TemplateError."""
    if isinstance(value, (str, bytes)):
        _limit("characters", len(value), MAX_CHARS)
        spent = _spent.get()
        spent.chars += len(value)
        _limit("characters in all", spent.chars, MAX_TOTAL_CHARS)
    elif isinstance(value, (list, tuple, dict)):
        _limit("items", len(value), MAX_ITEMS)
    elif isinstance(value, int):
        _limit("bits in a number", value.bit_length(), MAX_NUMBER_BITS)
    return value


def _limit(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise TemplateError(f"the chat template makes {count} {what}; at most {limit} are allowed")


def _check_format(text: Any) -> None:
    """Refuse widths and precisions that would write more than anybody reads."""
    if isinstance(text, (str, bytes)) and _WIDE_FORMAT.search(
        text if isinstance(text, str) else text.decode("latin1")
    ):
        raise TemplateError("the chat template formats with a width of more than five digits")


def _check_widths(values: Iterator[Any]) -> None:
    for value in values:
        if isinstance(value, int):
            _limit("columns", abs(value), MAX_WIDTH)


def _check_replace(text: Any, old: Any, new: Any, *_: Any) -> None:
    if isinstance(text, (str, bytes)) and isinstance(new, (str, bytes)):
        # An empty `old` matches between all characters.
        count = len(text) + 1 if not old else text.count(old)
        _limit("characters", len(text) + count * len(new), MAX_CHARS)


def _check_join(separator: Any, values: Any) -> None:
    if isinstance(separator, (str, bytes)) and isinstance(values, Sized):
        _limit("characters", len(separator) * len(values), MAX_CHARS)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with limits; compiling and rendering need `limits` around them."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Meter, _Generation, loopcontrols])
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        for name in _REMOVED_GLOBALS:
            del self.globals[name]
        checks: dict[str, Callable[..., None]] = {
            "replace": _check_replace,
            "join": lambda values, separator="", *_: _check_join(separator, values),
            "format": _check_formatting,
            "indent": _check_indent,
        }
        self.filters["tojson"] = _to_json
        for name, function in self.filters.items():
            self.filters[name] = _checked(function, checks.get(name))
        self.filters["sized"] = _sized
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """How Jinja joins what a macro, a captured block or the whole template has written."""
        texts = list(parts)
        _limit("characters", sum(map(len, texts)), MAX_CHARS)
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _tick()
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int):
                    _limit("characters or items", len(many) * times, MAX_ITEMS)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _limit("bits in a number", left.bit_length() * abs(right), MAX_NUMBER_BITS)
        elif operator == "%":
            _check_format(left)
            if isinstance(left, (str, bytes)):
                _check_widths(iter(right if isinstance(right, tuple) else (right,)))
        return _sized(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes. Only methods of texts and numbers can make something large."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, (str, bytes, int)):
            if name == "translate":
                raise TemplateError("the chat template calls translate(), which is not allowed")
            if name == "join" and args:
                values = args[0] if isinstance(args[0], Sized) else list(args[0])
                args = (values, *args[1:])
                _check_join(owner, values)
            elif name == "replace" and len(args) >= 2:
                _check_replace(owner, args[0], args[1])
            _check_widths(iter([*args, *kwargs.values()]))
        return _sized(super().call(context, obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        if value.__name__ == "format_map" or _NESTED_FORMAT.search(value.__self__):
            raise TemplateError("the chat template takes format widths from values, which is not allowed")
        return _checked(wrapped, partial(_check_formatting, value.__self__))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metered(self).visit(super()._parse(source, name, filename))
        return tree


class _Meter(Extension):
    """Gives the tree transformer names that a template cannot redefine."""

    def tick(self) -> str:
        return _tick()

    def joined(self, *parts: Any) -> str:
        return Sandbox.concat(map(str, parts))


class _Metered(NodeTransformer):
    """Puts a tick into every loop and macro, and limits what `~` and slices make."""

    def __init__(self, environment: Sandbox) -> None:
        self._meter = environment.extensions[_Meter.identifier]

    def _ticking(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._meter.call_method("tick"), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _ticking  # noqa: N815  (names that Jinja looks up)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._meter.call_method("joined", node.nodes, lineno=node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return nodes.Filter(node, "sized", [], [], None, None, lineno=node.lineno)
        return node


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
            raise TemplateError(f"the chat template stores the underscored name {name[:40]!r} in a namespace")
        super().__setitem__(name, value)


def _checked(function: Callable[..., Any], check: Callable[..., None] | None) -> Callable[..., Any]:
    """A filter whose arguments are checked before it runs, and its result afterwards."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if check is not None:
            check(*args[skipped:], **kwargs)
        return _sized(function(*args, **kwargs))

    return checked


def _check_formatting(text: Any, *args: Any, **kwargs: Any) -> None:
    _check_format(text)
    _check_widths(iter([*args, *kwargs.values()]))


def _check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    columns = width if isinstance(width, int) else len(width)
    if isinstance(text, str):
        _limit("characters", len(text) + (text.count("\n") + 1) * columns, MAX_CHARS)


def _raise_exception(message: str) -> None:
    reason = " ".join(str(message).split())[:300]
    raise TemplateError(f"the chat template refuses this conversation: {reason}")


def _strftime_now(pattern: str) -> str:
    _check_format(pattern)
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, without HTML escapes: the models were trained on plain JSON."""
    if indent is not None:
        _limit("columns of indent", indent if isinstance(indent, int) else len(indent), 64)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def plain(value: Any) -> Any:
    """The value as plain JSON types, which have no methods that a template could misuse; else TemplateError."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise TemplateError(f"a conversation holds JSON values only, not {type(value).__name__}")


ENVIRONMENT = Sandbox()
