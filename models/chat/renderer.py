"""One template, compiled and rendered in child processes.

Knows what a rendering may take, and says in one line what went wrong. Does not know conversations, nor what the
sandbox allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from shoal.models.children import ChildKind, Confined, JobFailed, LimitPassed, Limits
from shoal.models.errors import TemplateError, TemplateRefusal, TemplateTooCostly, one_line

MAX_RENDER_S = 5.0
MAX_SOURCE_CHARS = 1 << 20
# The largest published templates take 3 MB to compile, and a rendering about six times its variables.
COMPILE_BYTES = 64 << 20
RENDER_BYTES = 32 << 20
RENDER_BYTES_PER_BYTE = 12
MAX_RENDER_BYTES = 256 << 20

_CHILDREN = ChildKind(Path(__file__).with_name("sandbox.py"), ("jinja2", "markupsafe"))


class Renderer:
    """source: Jinja text. of: the model's name or file, for messages. seconds: for compiling, and for each rendering.

    Raises TemplateError if the source is malformed or too large, and Overloaded as `Confined` does.
    """

    def __init__(self, source: str, of: str = "", seconds: float = MAX_RENDER_S) -> None:
        self._name = f"the chat template of {of}" if of else "the chat template"
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(
                f"{self._name} has {len(source)} characters; at most {MAX_SOURCE_CHARS} are read"
            )
        self._seconds = seconds
        try:
            self._confined = Confined(
                _CHILDREN, source.encode("utf-8", "surrogatepass"), Limits(COMPILE_BYTES, seconds)
            )
        except JobFailed as error:
            raise TemplateError(f"{self._name} is malformed: {error}") from error
        except LimitPassed as error:
            raise TemplateTooCostly(f"{self._name} {error}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for these variables, which are JSON values. Raises TemplateError and Overloaded."""
        try:
            job = _json(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(
                f"the conversation cannot be given to a template: {one_line(error)}"
            ) from error
        memory_bytes = min(RENDER_BYTES + RENDER_BYTES_PER_BYTE * len(job), MAX_RENDER_BYTES)
        try:
            text = self._confined.do(job, Limits(memory_bytes, self._seconds))
        except JobFailed as error:
            if error.kind == "Refusal":
                raise TemplateRefusal(f"{self._name} refuses this conversation: {error}") from error
            raise TemplateError(f"{self._name} failed: {error}") from error
        except LimitPassed as error:
            raise TemplateTooCostly(f"{self._name} {error}") from error
        del job  # as large as the text that is made now
        return text.decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """End the renderings that are under way, and refuse later ones with Overloaded."""
        self._confined.close()


def _json(variables: Mapping[str, Any]) -> bytes:
    """As UTF-8, which takes less than the escapes of what is not ASCII: these are for lone surrogates. Raises
    TypeError, ValueError or RecursionError."""
    try:
        return msgspec.json.encode(variables)
    except (UnicodeEncodeError, OverflowError):
        return json.dumps(variables).encode()
