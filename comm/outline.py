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


class _Content(Struct, frozen=True):
    content: str | ContentParts | None = None


class _Sampling(Struct, frozen=True):
    logit_bias: Raw = Raw()


class _Outline(Struct, frozen=True):
    messages: Annotated[list[Raw], Meta(max_length=10_000)] | None = None
    sampling: _Sampling = _Sampling()
    tools: Raw = Raw()
    template_args: Raw = Raw()


_DECODER = msgpack.Decoder(_Outline)
_CONTENT = msgpack.Decoder(_Content)
_NULL = Raw(b"\xc0")
_MESSAGE = msgpack.Decoder(Annotated[dict[str, Raw], Meta(max_length=1024)])


def check_free_bytes(body: bytes) -> None:
    """Raises ValidationError when free-form values take too much of a request's body; also msgspec's other errors."""
    if len(body) <= MAX_FREE_BYTES:
        return
    outline = _DECODER.decode(body)
    fields = (outline.tools, outline.template_args, outline.sampling.logit_bias)
    size = sum(map(len, fields)) + sum(map(_free_bytes, outline.messages or []))
    if size > MAX_FREE_BYTES:
        raise ValidationError(f"free-form values of {size} bytes: must be at most {MAX_FREE_BYTES}")


def _free_bytes(message: Raw) -> int:
    """How much of a message could grow: all but texts, also those in the parts of its content."""
    fields = _MESSAGE.decode(message)
    content = None if _is_text(fields.pop("content", _NULL)) else _CONTENT.decode(message).content
    parts = content if isinstance(content, list) else []
    return sum(map(_weight, [*fields.values(), *(value for part in parts for value in part.values())]))


def _is_text(value: Raw) -> bool:
    """Seen without decoding it, which would take four bytes for each character of some texts."""
    first = bytes(memoryview(value)[:1])
    return b"\xa0" <= first <= b"\xbf" or b"\xd9" <= first <= b"\xdb"


def _weight(value: Raw) -> int:
    """The bytes of a value that could grow: none if it is text."""
    return 0 if _is_text(value) else len(value)
