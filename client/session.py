"""A client's half of the protocol without its I/O: requests out, frames in, replies sorted to their request.

Knows which replies belong to which request and when one is complete. Does not know sockets, threads or
clocks: `blocking` and `asynchronous` are two shells around it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from shoal.comm import wire
from shoal.comm.errors import CommError, ProtocolError, RequestFailed
from shoal.comm.messages import (
    REPLIES,
    STREAMING,
    Cancel,
    Chat,
    ChatMessage,
    Done,
    Error,
    Generate,
    Hello,
    Message,
    Sampling,
    Stage,
    StreamEvent,
    Token,
    Tokenize,
    Waiting,
)

Frames = list[bytes]
ChatLike = ChatMessage | dict[str, Any]
M = TypeVar("M", bound=Message)

HELLO = Hello(client="shoal.client")


class Exchange:
    """One request and the replies to it that have come and are not yet taken."""

    def __init__(self, request_id: bytes) -> None:
        self.request_id = request_id
        self.heard = 0  # replies so far, `waiting` included: a sign of life
        self.finished = False  # nothing more will come
        self._inbox: deque[Message] = deque()
        self._error: CommError | None = None

    def put(self, message: Message, terminal: bool) -> None:
        self.heard += 1
        self.finished = terminal
        if isinstance(message, Error):
            self._error = RequestFailed(
                message.code, message.message, message.hint, retry_after_s=message.retry_after_s
            )
        elif isinstance(message, Stage) and self._inbox and isinstance(self._inbox[-1], Stage):
            self._inbox[-1] = message  # nobody has looked: only the last one counts
        elif not isinstance(message, Waiting):
            self._inbox.append(message)

    def lose(self, error: CommError) -> None:
        """The connection is gone."""
        self.finished = True
        self._error = error

    def take(self) -> Iterator[Message]:
        """The replies that have come; after the last one raises RequestFailed or NoDaemon if it failed."""
        while self._inbox:
            yield self._inbox.popleft()
        if self._error is not None:
            raise self._error

    def reply(self, kind: type[M], heard: Callable[[Stage], None] | None) -> M | None:
        """The reply that ends the exchange, if it has come; `heard` is told of the stages before it.

        Raises as `take`, and ProtocolError for a reply of another kind.
        """
        for message in self.take():
            if not isinstance(message, Stage):
                return _expected(message, kind)
            if heard is not None:
                heard(message)
        return None

    @property
    def waits(self) -> bool:
        """Whether there is nothing to take yet."""
        return not (self._inbox or self.finished)


class Session:
    """The requests in flight of one connection."""

    def __init__(self) -> None:
        self._exchanges: dict[bytes, Exchange] = {}
        self._count = 0

    def open(self, request: Message) -> tuple[Exchange, Frames]:
        """Begin a request: what will hold its replies, and what to send.

        RequestFailed `bad_request`, as the daemon would answer, when it is too large or no message at all.
        """
        self._count += 1
        request_id = self._count.to_bytes(8, "big")
        try:
            frames = wire.encode(request, request_id, wire.MAX_REQUEST_BYTES)
        except ProtocolError as error:
            raise RequestFailed(error.code, str(error)) from error
        exchange = self._exchanges[request_id] = Exchange(request_id)
        return exchange, frames

    def feed(self, frames: Sequence[bytes]) -> Exchange | None:
        """Put one message from the daemon where it belongs. ProtocolError when it makes no sense.

        None for replies nobody waits for, and for types from a newer version.
        """
        envelope = wire.split(frames, wire.MAX_REPLY_BYTES)
        exchange = self._exchanges.get(envelope.request_id)
        if exchange is None or envelope.kind not in REPLIES:
            return None
        terminal = envelope.kind not in STREAMING
        if terminal:
            del self._exchanges[envelope.request_id]
        exchange.put(wire.decode(envelope, REPLIES), terminal)
        return exchange

    def abandon(self, exchange: Exchange) -> Frames | None:
        """Stop listening to a request; what to send so that the daemon stops too, if it has not."""
        if self._exchanges.pop(exchange.request_id, None) is None:
            return None
        self._count += 1
        request_id = self._count.to_bytes(8, "big")
        return wire.encode(Cancel(target=exchange.request_id.hex()), request_id)

    def lose(self, error: CommError) -> None:
        """The connection is gone: every open request ends with `error`."""
        for exchange in self._exchanges.values():
            exchange.lose(error)
        self._exchanges.clear()


def generate_request(
    prompt: str | None, prompt_tokens: Sequence[int] | None, fields: dict[str, Any]
) -> Generate:
    """`fields` are those of Generation and, directly, those of Sampling."""
    tokens = None if prompt_tokens is None else list(prompt_tokens)
    return Generate(prompt=prompt, prompt_tokens=tokens, **_with_sampling(fields))


def chat_request(messages: Sequence[ChatLike], fields: dict[str, Any]) -> Chat:
    return Chat(messages=_chat_messages(messages), **_with_sampling(fields))


def text_request(
    prompt: str | None, messages: Sequence[ChatLike] | None, fields: dict[str, Any]
) -> Generate | Chat:
    """`fields` may have `prompt_tokens`, where neither of the others is given."""
    if messages is not None:
        return chat_request(messages, fields)
    fields = dict(fields)
    return generate_request(prompt, fields.pop("prompt_tokens", None), fields)


def whole_text(events: Sequence[StreamEvent]) -> tuple[str, Done]:
    """A complete answer's text, and how it ended."""
    end = events[-1]
    assert isinstance(end, Done)  # a stream ends with it or raises
    return "".join(event.text for event in events if isinstance(event, Token)), end


def tokenize_request(
    text: str | None,
    tokens: Sequence[int] | None,
    messages: Sequence[ChatLike] | None,
    fields: dict[str, Any],
) -> Tokenize:
    return Tokenize(
        text=text,
        tokens=None if tokens is None else list(tokens),
        messages=None if messages is None else _chat_messages(messages),
        **fields,
    )


def _expected(message: Message, kind: type[M]) -> M:
    """The reply as the type that answers the request."""
    if not isinstance(message, kind):
        raise ProtocolError(f"reply of type {type(message).__name__}: must be {kind.__name__}")
    return message


def expect_stream(message: Message) -> StreamEvent:
    if not isinstance(message, StreamEvent):
        raise ProtocolError(f"reply of type {type(message).__name__} to a streaming request")
    return message


def _chat_messages(messages: Sequence[ChatLike]) -> list[ChatMessage]:
    return [m if isinstance(m, ChatMessage) else ChatMessage(**m) for m in messages]


def _with_sampling(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with those of Sampling moved into `sampling`; one must not give both. RequestFailed beyond a limit."""
    chosen = {name: fields[name] for name in fields if name in Sampling.__struct_fields__}
    if not chosen:
        return fields
    if "sampling" in fields:
        raise TypeError(f"sampling and {', '.join(chosen)}: give one of the two")
    try:
        sampling = Sampling(**chosen)
    except ValueError as error:  # as the daemon would answer
        raise RequestFailed("bad_request", f"sampling.{error}") from error
    return {k: v for k, v in fields.items() if k not in chosen} | {"sampling": sampling}
