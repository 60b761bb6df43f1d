"""A client's half of the protocol without its I/O: it makes requests and sorts each reply to its request.

Knows which replies belong to which request, and when a request is complete. Does not know sockets, threads or
clocks: `blocking` and `asynchronous` do the I/O, each in its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from shoal.comm import wire
from shoal.comm.complaints import shorten
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
    Load,
    Message,
    Sampling,
    Stage,
    StreamEvent,
    Token,
    Tokenize,
    Waiting,
)

Frames = list[bytes]
ChatLike = Mapping[str, Any]
M = TypeVar("M", bound=Message)

HELLO = Hello(client="shoal.client")


class Exchange:
    """One request, and those of its replies that have come and were not taken yet."""

    def __init__(self, request_id: bytes) -> None:
        self.request_id = request_id
        self.heard = 0  # replies so far, `waiting` included
        self.finished = False  # nothing more will come
        self.wake: Callable[[], None] = lambda: None  # called when there is news
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
            self._inbox[-1] = message  # the one before was not taken; only the last one counts
        elif not isinstance(message, Waiting):
            self._inbox.append(message)
        self.wake()

    def lose(self, error: CommError) -> None:
        """The connection is gone: the exchange ends with `error`."""
        self.finished = True
        self._error = error
        self.wake()

    def take(self) -> Iterator[Message]:
        """The replies that have come. After the last one it raises the request's error, if it has failed."""
        while self._inbox:
            yield self._inbox.popleft()
        if self._error is not None:
            raise self._error

    def reply(self, kind: type[M], heard: Callable[[Stage], None] | None) -> M | None:
        """The reply that ends the exchange, or None if it has not come. `heard` gets the stages before it.

        Raises as `take`, and ProtocolError for a reply of another kind.
        """
        for message in self.take():
            if isinstance(message, kind):
                return message
            if not isinstance(message, Stage):
                raise ProtocolError(f"reply of type {type(message).__name__}: must be {kind.__name__}")
            if heard is not None:
                heard(message)
        return None

    def events(self) -> Iterator[StreamEvent]:
        """The events of an answer that have come. Raises as `take`, and ProtocolError for other replies."""
        for message in self.take():
            if not isinstance(message, StreamEvent):
                raise ProtocolError(f"reply of type {type(message).__name__} to a streaming request")
            yield message

    @property
    def waits(self) -> bool:
        """Whether nothing can be taken until another reply comes."""
        return not (self._inbox or self.finished)


class Session:
    """The requests in flight of one connection."""

    def __init__(self) -> None:
        self._exchanges: dict[bytes, Exchange] = {}
        self._count = 0

    def open(self, request: Message) -> tuple[Exchange, Frames]:
        """Begin a request. Returns the exchange that will hold its replies, and the frames to send.

        RequestFailed `bad_request`, as the daemon would answer, when it is too large or cannot be encoded.
        """
        request_id = self._next_id()
        try:
            frames = wire.encode(request, request_id, wire.MAX_REQUEST_BYTES)
        except ProtocolError as error:
            raise RequestFailed(error.code, str(error)) from error
        exchange = self._exchanges[request_id] = Exchange(request_id)
        return exchange, frames

    def feed(self, frames: Sequence[bytes]) -> None:
        """Give one message from the daemon to its exchange. ProtocolError for a malformed message.

        Ignores replies that nobody waits for, and types of a newer version.
        """
        envelope = wire.split(frames, wire.MAX_REPLY_BYTES)
        exchange = self._exchanges.get(envelope.request_id)
        if exchange is None or envelope.kind not in REPLIES:
            return
        terminal = envelope.kind not in STREAMING
        if terminal:
            del self._exchanges[envelope.request_id]
        exchange.put(wire.decode(envelope, REPLIES), terminal)

    def abandon(self, exchange: Exchange) -> Frames | None:
        """Stop listening to a request. Returns the frames that cancel it, or None if it has ended."""
        if self._exchanges.pop(exchange.request_id, None) is None:
            return None
        return wire.encode(Cancel(target=exchange.request_id.hex()), self._next_id())

    def lose(self, error: CommError) -> None:
        """The connection is gone: every open request ends with `error`."""
        for exchange in self._exchanges.values():
            exchange.lose(error)
        self._exchanges.clear()

    def _next_id(self) -> bytes:
        self._count += 1
        return self._count.to_bytes(8, "big")


def checked_request(kind: type[wire.Request], fields: Mapping[str, Any]) -> wire.Request:
    """A request with these fields. Raises RequestFailed for what no daemon takes, without asking one."""
    try:
        return wire.checked_request(kind, fields)
    except ProtocolError as error:
        raise RequestFailed("bad_request", str(error)) from error


def generate_request(
    prompt: str | None, prompt_tokens: Sequence[int] | None, fields: dict[str, Any]
) -> Generate:
    """`fields` are those of Generation and, directly, those of Sampling."""
    tokens = None if prompt_tokens is None else list(prompt_tokens)
    fields = _with_sampling(fields)
    with _as_the_daemon():
        return Generate(prompt=prompt, prompt_tokens=tokens, **fields)


def chat_request(messages: Sequence[ChatLike], fields: dict[str, Any]) -> Chat:
    fields = _with_sampling(fields)
    with _as_the_daemon():
        return Chat(messages=_chat_messages(messages), **fields)


def whole_text(events: Sequence[StreamEvent]) -> tuple[str, Done]:
    """The text of a complete answer, and how it ended."""
    end = events[-1]
    assert isinstance(end, Done)  # a stream ends with Done, or raises
    return "".join(event.text for event in events if isinstance(event, Token)), end


def tokenize_request(
    text: str | None,
    tokens: Sequence[int] | None,
    messages: Sequence[ChatLike] | None,
    fields: dict[str, Any],
) -> Tokenize:
    with _as_the_daemon():
        return Tokenize(
            text=text,
            tokens=None if tokens is None else list(tokens),
            messages=None if messages is None else _chat_messages(messages),
            **fields,
        )


@contextmanager
def _as_the_daemon() -> Iterator[None]:
    """What a request's constructor refuses is refused as the daemon would."""
    try:
        yield
    except ValueError as error:
        raise RequestFailed("bad_request", str(error)) from error


def load_request(
    model: str,
    context: int | None,
    least_context: int | None,
    draft: str | None,
    heard: Callable[[Stage], None] | None,
    ranks: int | None,
    keep: bool,
) -> Load:
    """Asks for stages if somebody hears them."""
    progress = heard is not None
    with _as_the_daemon():
        return Load(
            model=model,
            context=context,
            least_context=least_context,
            draft=draft,
            ranks=ranks,
            progress=progress,
            keep=keep,
        )


def _chat_messages(messages: Sequence[ChatLike]) -> list[ChatMessage]:
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            wanted = 'must be a message, {"role": …, "content": …}'
            raise ValueError(f"messages[{place}]={shorten(message)}: {wanted}")
    return [ChatMessage(message) for message in messages]


def _with_sampling(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields`, with those of Sampling moved into `sampling`. TypeError when both are given; RequestFailed for a value
    beyond its limit."""
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
