"""What both clients share: the daemon's address, and how requests begin and end.

Knows which messages ask for a stream. Does not wait: `blocking` and `asynchronous` do, each in its way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import zmq

from shoal.comm.curve_keys import ClientKeys
from shoal.comm.errors import CommError, RequestFailed
from shoal.comm.home import Home
from shoal.comm.messages import Chat, Generate, Message

from .connection import gone
from .session import ChatLike, Exchange, Frames, Session, chat_request, generate_request

S = TypeVar("S")  # a stream of an answer's events: a generator, or an asynchronous one


class ClientFace(ABC, Generic[S]):
    """Talks to the daemon at `address` (default: this user's own). Connects at the first request.

    `timeout_s` bounds silence, not work: the daemon sends `waiting` every few seconds while it computes.
    Methods raise NoDaemon, TimedOut, RequestFailed (the daemon's `error`), AddressError or ProtocolError.
    After NoDaemon the next request connects again.
    """

    _dealer: zmq.Socket[Any] | None = None

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 30.0, keys: ClientKeys | None = None
    ) -> None:
        self.address = address or Home.from_env().address
        self._timeout_s = timeout_s
        self._keys = keys
        self._session = Session()

    @abstractmethod
    def stream(self, request: Generate | Chat) -> S:
        """The events of an answer: Accepted, Tokens, Done. Asking for the first one sends the request.

        With `progress` in the request, also Stages. Closing the stream cancels the request.
        """

    def generate(
        self, prompt: str | None = None, *, prompt_tokens: Sequence[int] | None = None, **fields: Any
    ) -> S:
        """Continue a prompt, as `stream` does. `fields`: those of `messages.Generation` and `messages.Sampling`."""
        return self.stream(generate_request(prompt, prompt_tokens, fields))

    def chat(self, messages: Sequence[ChatLike], **fields: Any) -> S:
        """Answer a conversation, as `generate` does. `fields` may also have `tools` and `template_args`."""
        return self.stream(chat_request(messages, fields))

    def _answer(self, prompt: str | None, messages: Sequence[ChatLike] | None, fields: dict[str, Any]) -> S:
        """What `text` collects: the answer to a prompt or to `messages`."""
        told = [prompt, messages, fields.get("prompt_tokens")]
        if (given := sum(value is not None for value in told)) != 1:
            raise RequestFailed(
                "bad_request",
                f"prompt, messages: exactly one of them must be given, not {'both' if given else 'neither'}",
            )
        return self.generate(prompt, **fields) if messages is None else self.chat(messages, **fields)

    def _begin(self, request: Message) -> Exchange:
        if self._dealer is None:  # the connection ended right after the reply to `hello`
            raise gone(self.address)
        exchange, frames = self._session.open(request)
        self._send(frames)
        return exchange

    def _finish(self, exchange: Exchange) -> None:
        """Cancel the request if it has not ended. Does not wait; late replies are dropped as they come."""
        frames = self._session.abandon(exchange)
        if frames is not None and self._dealer is not None:
            try:
                self._send(frames)
            except CommError as error:  # when the connection closes, the daemon cancels the request itself
                self._disconnect(error)

    @abstractmethod
    def _send(self, frames: Frames) -> None:
        """Give frames to the socket without waiting. TimedOut when it takes no more."""

    @abstractmethod
    def _disconnect(self, error: CommError) -> None:
        """Close the socket, if there is one, and end the requests in flight with `error`."""
