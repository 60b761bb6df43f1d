"""Large bodies, looked over before they are read: free-form values may not swell.

A byte of msgpack can become an object of 60 bytes (an empty array), and reading holds Python's lock: 16 MiB of
them would stop the daemon for seconds. A map is as bad. Text and token ids do not swell like that and may fill a body.
Knows which fields are free-form. Does not judge anything else about a body.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Raw, Struct, msgpack

MAX_FREE_BYTES = 1 << 20  # of all free-form values in a body, texts in content parts not counted


ContentPart = Annotated[dict[str, Raw], Meta(max_length=64)]
ContentParts = Annotated[list[ContentPart], Meta(max_length=1024)]


class _Message(Struct, frozen=True):
    content: str | ContentParts | None = None
    tool_calls: Raw = Raw()

    @property
    def free_bytes(self) -> int:
        parts = self.content if isinstance(self.content, list) else []
        return len(self.tool_calls) + sum(_weight(value) for part in parts for value in part.values())


class _Sampling(Struct, frozen=True):
    logit_bias: Raw = Raw()


class _Outline(Struct, frozen=True):
    messages: Annotated[list[_Message], Meta(max_length=10_000)] | None = None
    sampling: _Sampling = _Sampling()
    tools: Raw = Raw()
    template_args: Raw = Raw()


_DECODER = msgpack.Decoder(_Outline)


def free_bytes(body: bytes) -> int:
    """How many bytes of a request's body could swell; 0 where it is too small to matter. msgspec's errors."""
    if len(body) <= MAX_FREE_BYTES:
        return 0
    outline = _DECODER.decode(body)
    fields = (outline.tools, outline.template_args, outline.sampling.logit_bias)
    return sum(map(len, fields)) + sum(message.free_bytes for message in outline.messages or [])


def _weight(value: Raw) -> int:
    """Bytes of a value that could swell: text does not."""
    first = bytes(memoryview(value)[:1])
    is_text = b"\xa0" <= first <= b"\xbf" or b"\xd9" <= first <= b"\xdb"
    return 0 if is_text else len(value)
