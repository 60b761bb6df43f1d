"""What is wrong with a value, in one line that names field, value and limit.

Knows how msgspec complains. Does not know messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

SHOWN = 40  # characters of a value, at most
_COMPLAINT = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<index>\d+)\]")


def explained(complaint: str, value: Any, where: str = "") -> str:
    """`max_tokens=0: must be int >= 1` from msgspec's "Expected `int` >= 1 - at `$.max_tokens`".

    value: what msgspec complains about, for a quotation. where: the path to it.
    """
    match = _COMPLAINT.fullmatch(complaint)
    assert match is not None  # `what` alone matches anything
    what, path = match["what"].replace("`", ""), f"{where}{match['path'] or ''}".lstrip(".")
    if what.startswith("Object missing required field "):
        field = what.removeprefix("Object missing required field ")
        return f"{path}.{field}: is required" if path else f"{field}: is required"
    if not what.startswith("Expected "):  # from a check in messages.py, which names its field itself
        return f"{path}.{what}" if path else what
    must = what.removeprefix("Expected ").replace(", got ", ", not ")
    if match["key"]:
        return f"{path or 'body'}: its keys must be {must}"
    if not path:
        return f"body: must be {must}"
    return f"{path}{_quote(match['path'] or '', value)}: must be {must}"


def shorten(value: object) -> str:
    """The value as JSON has it, in at most `SHOWN` characters, however large and deep it is."""
    text = ""
    for piece in _spelled(value):
        text += piece
        if len(text) > SHOWN:
            return text[: SHOWN - 1] + "…"
    return text


def _spelled(value: object) -> Iterator[str]:
    """Its JSON in pieces, none of which is empty. What JSON has not is spelled as Python has it."""
    match value:
        case str():
            text = value[: SHOWN + 1]
            yield json.dumps(text, ensure_ascii=not text.isprintable())
        case bytes():
            yield repr(value[: SHOWN + 1])
        case None | bool() | float():
            yield json.dumps(value)
        case Mapping():
            yield "{"
            for place, (key, item) in enumerate(value.items()):
                yield from [","] if place else []
                yield from _spelled(key)
                yield ":"
                yield from _spelled(item)
            yield "}"
        case list() | tuple():
            yield "["
            for place, item in enumerate(value):
                yield from [","] if place else []
                yield from _spelled(item)
            yield "]"
        case _:
            yield repr(value)


def _quote(path: str, value: Any) -> str:
    """`=value` of the field at `path`, or "" where the value cannot be found."""
    if "[...]" in path:
        return ""
    try:
        for step in _STEP.finditer(path):
            value = value[step["name"] if step["name"] is not None else int(step["index"])]
    except (TypeError, LookupError):
        return ""
    return f"={shorten(value)}"
