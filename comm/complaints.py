"""What is wrong with a value, in one line that names field, value and limit.

Knows how msgspec complains. Does not know messages.
"""

from __future__ import annotations

import re
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
    """`repr(value)` in at most `SHOWN` characters, control characters escaped."""
    if isinstance(value, str | bytes):
        value = value[: SHOWN + 1]
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


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
