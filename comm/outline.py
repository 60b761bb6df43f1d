"""A first look at a large body, before it is decoded: how much of it free-form values take.

One byte of msgpack can become an object of 60 bytes (an empty array), and decoding holds the GIL: 16 MiB of such
bytes would stop the daemon for seconds. Maps are as bad. Text and token ids do not grow like that and may fill a body.
Knows which fields are free-form. Does not check anything else about a body.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Raw, Struct, ValidationError, msgpack

MAX_FREE_BYTES = 1 << 20  # of all free-form values in a body; texts in content parts do not count

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


def check_free_bytes(body: bytes) -> None:
    """Raises ValidationError when free-form values take too much of a request's body; also msgspec's other errors."""
    if len(body) <= MAX_FREE_BYTES:
        return
    outline = _DECODER.decode(body)
    fields = (outline.tools, outline.template_args, outline.sampling.logit_bias)
    size = sum(map(len, fields)) + sum(message.free_bytes for message in outline.messages or [])
    if size > MAX_FREE_BYTES:
        raise ValidationError(f"free-form values of {size} bytes: must be at most {MAX_FREE_BYTES}")


def _weight(value: Raw) -> int:
    """The bytes of a value that could grow: none if it is text."""
    first = bytes(memoryview(value)[:1])
    is_text = b"\xa0" <= first <= b"\xbf" or b"\xd9" <= first <= b"\xdb"
    return 0 if is_text else len(value)
