"""Messages ↔ frames: `[b"shoal/1", type, request id, msgpack body, raw buffers…]`, checked against limits.

Knows the frame layout, its limits, and how to say in one line what is wrong with a body. Does not know
sockets, what a message means, or who sent it. Whatever bytes come in, it raises no error but ProtocolError.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, msgpack

from .complaints import explained, shorten
from .errors import ProtocolError
from .messages import REPLIES, REQUESTS, TYPE_NAMES, Message
from .outline import check_free_bytes

PROTOCOL = b"shoal/1"
MAX_FRAMES = 16
MAX_TYPE_BYTES = 32
MAX_ID_BYTES = 64
MAX_REQUEST_BYTES = 16 << 20  # all frames together
MAX_REPLY_BYTES = 64 << 20  # the ids of a whole tokenised request body

_TYPE = re.compile(rb"[a-z][a-z0-9_]{0,31}")
_DECODERS: dict[type[Message], msgpack.Decoder[Any]] = {
    kind: msgpack.Decoder(kind) for kind in (*REQUESTS.values(), *REPLIES.values())
}
_ENCODER = msgpack.Encoder()
_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
_NAMED_LEVELS = 8  # of values within values, in a complaint
_EXPLAIN_BYTES = 64 << 10
Request = TypeVar("Request", bound=Message)


@dataclass(frozen=True, slots=True)
class Envelope:
    """One message whose frames have been checked and whose body has not been decoded."""

    kind: str
    request_id: bytes
    body: bytes


def encode(message: Message, request_id: bytes, limit_bytes: int = MAX_REPLY_BYTES) -> list[bytes]:
    """The frames of `message`. ProtocolError when it cannot be encoded, or is larger than `limit_bytes`."""
    try:
        body = _encoded(message)
    except _UNENCODABLE as error:
        raise ProtocolError(f"cannot encode: {_complaint(message, error)}", request_id=request_id) from error
    if not 1 <= len(request_id) <= MAX_ID_BYTES:
        raise ProtocolError(f"request id of {len(request_id)} bytes: must be 1 to {MAX_ID_BYTES}")
    frames = [PROTOCOL, TYPE_NAMES[type(message)].encode(), request_id, body]
    _check_size(frames, limit_bytes, request_id)
    return frames


def checked_request(kind: type[Request], fields: Mapping[str, Any]) -> Request:
    """A request with these fields. ProtocolError with what a daemon would say, unless it would take this one."""
    try:
        request = msgspec.convert(fields, kind)
        *_, body = encode(request, b"?", MAX_REQUEST_BYTES)
        check_free_bytes(body)
    except msgspec.ValidationError as error:
        raise ProtocolError(explained(str(error), None)) from error
    return request


def _encoded(message: Message) -> bytes:
    """The body. What others wrote (a file's name, a template's complaint) can have lone surrogates, which no UTF-8 has:
    a reply says them as U+FFFD. A request must not be altered."""
    try:
        return _ENCODER.encode(message)
    except UnicodeEncodeError:
        if type(message) not in REPLIES.values():
            raise
        return _ENCODER.encode(_speakable(msgspec.to_builtins(message)))


def _complaint(value: Any, error: Exception) -> str:
    """What is wrong with the innermost value that cannot be encoded, and where it is."""
    path = ""
    for _ in range(_NAMED_LEVELS):
        for step, part in _parts(value):
            try:
                _ENCODER.encode(part)
            except _UNENCODABLE as worse:
                path, value, error = path + step, part, worse
                break
        else:
            break
    where = f"{path.lstrip('.')}={shorten(value)}: " if path else ""
    lone = isinstance(error, UnicodeEncodeError)
    return f"{where}{'must be text without lone surrogates, which no UTF-8 has' if lone else error}"


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    match value:
        case Struct():
            yield from ((f".{name}", getattr(value, name)) for name in value.__struct_fields__)
        case Mapping():
            yield from ((f".{shorten(key)}", key) for key in value)
            yield from ((f".{key}", part) for key, part in value.items())
        case list() | tuple():
            yield from ((f"[{place}]", part) for place, part in enumerate(value))


def _speakable(value: Any) -> Any:
    """A value of maps, lists and texts without lone surrogates."""
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case list() | tuple():
            return [_speakable(item) for item in value]
        case dict():
            return {_speakable(key): _speakable(item) for key, item in value.items()}
    return value


def split(frames: Sequence[bytes], limit_bytes: int = MAX_REQUEST_BYTES) -> Envelope:
    """The envelope in `frames`. ProtocolError says what is wrong, and has the request id if that is readable."""
    if not 4 <= len(frames) <= MAX_FRAMES:
        known = frames[2] if len(frames) > 2 and 1 <= len(frames[2]) <= MAX_ID_BYTES else b""
        raise ProtocolError(f"{len(frames)} frames: must be 4 to {MAX_FRAMES}", request_id=known)
    protocol, kind, request_id, body = frames[:4]  # further frames, raw buffers, have no use yet
    if not 1 <= len(request_id) <= MAX_ID_BYTES:
        raise ProtocolError(f"request id of {len(request_id)} bytes: must be 1 to {MAX_ID_BYTES}")
    if protocol != PROTOCOL:
        code = "version" if protocol.startswith(b"shoal/") else "bad_request"
        raise ProtocolError(f"protocol={shorten(protocol)}: must be {PROTOCOL.decode()}", code, request_id)
    if not _TYPE.fullmatch(kind):
        problem = f"type={shorten(kind)}: must be 1 to {MAX_TYPE_BYTES} characters of a-z, 0-9 and _"
        raise ProtocolError(problem, request_id=request_id)
    _check_size(frames, limit_bytes, request_id)
    return Envelope(kind.decode("ascii"), request_id, body)


def decode(envelope: Envelope, types: Mapping[str, type[Message]]) -> Message:
    """The message in `envelope`, of one of `types`. ProtocolError `unknown_type` or `bad_request`."""
    if envelope.kind not in types:
        problem = f"type={shorten(envelope.kind)}: must be one of {', '.join(types)}"
        raise ProtocolError(problem, "unknown_type", envelope.request_id)
    try:
        if types is REQUESTS:
            check_free_bytes(envelope.body)
        message: Message = _DECODERS[types[envelope.kind]].decode(envelope.body)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(_problem(error, envelope.body), request_id=envelope.request_id) from error
    return message


def _check_size(frames: Sequence[bytes], limit_bytes: int, request_id: bytes) -> None:
    size = sum(map(len, frames))
    if size > limit_bytes:
        raise ProtocolError(f"message of {size} bytes: must be at most {limit_bytes}", request_id=request_id)


def _problem(error: Exception, body: bytes) -> str:
    """What the decoder's `error` says about the body, in one line."""
    if isinstance(error, msgspec.ValidationError):
        return explained(str(error), _quotable(body))
    if isinstance(error, RecursionError):
        return "body: nested too deep"
    # A UnicodeDecodeError of msgspec until 0.22, then a DecodeError like others.
    if isinstance(error, UnicodeDecodeError) or "UTF-8" in str(error):
        return "body: holds text that is not UTF-8"
    return f"body: not msgpack: {error}"


def _quotable(body: bytes) -> Any:
    """The body's value, unless it is too large to be decoded a second time just to be quoted."""
    if len(body) > _EXPLAIN_BYTES:
        return None
    try:
        return msgpack.decode(body)
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None
