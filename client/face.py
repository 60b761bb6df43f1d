"""What both clients share: whom they talk to, and requests as they begin and end.

Knows which messages ask for a stream. Does not know waiting: `blocking` and `asynchronous` do, each in its way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import zmq

from shoal.comm.curve_keys import ClientKeys
from shoal.comm.errors import CommError
from shoal.comm.home import Home
from shoal.comm.messages import Chat, Generate, Message

from .session import ChatLike, Exchange, Frames, Session, chat_request, generate_request

S = TypeVar("S")  # how the events of an answer come: to iterate over, or to await


class ClientFace(ABC, Generic[S]):
    """Talks to the daemon at `address` (default: this user's own), connecting at the first request.

    `timeout_s` bounds silence, not work: the daemon says `waiting` every few seconds while it computes.
    Methods raise NoDaemon, TimedOut, RequestFailed (the daemon's `error`), AddressError or ProtocolError.
    After NoDaemon the next request connects anew.
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
        """The events of an answer: Accepted, Tokens, Done. The request is sent when the first is asked for.

        With `progress` in the request, also Stages. Closing the stream cancels.
        """

    def generate(
        self, prompt: str | None = None, *, prompt_tokens: Sequence[int] | None = None, **fields: Any
    ) -> S:
        """Continue a prompt, as `stream` does. `fields`: those of `messages.Generation` and `messages.Sampling`."""
        return self.stream(generate_request(prompt, prompt_tokens, fields))

    def chat(self, messages: Sequence[ChatLike], **fields: Any) -> S:
        """Answer a conversation, as `generate` does; also takes `tools` and `template_args`."""
        return self.stream(chat_request(messages, fields))

    def _begin(self, request: Message) -> Exchange:
        exchange, frames = self._session.open(request)
        self._send(frames)
        return exchange

    def _finish(self, exchange: Exchange) -> None:
        """Cancel what has not ended, without waiting. Late replies are dropped as they come."""
        frames = self._session.abandon(exchange)
        if frames is not None and self._dealer is not None:
            try:
                self._send(frames)
            except CommError as error:  # unreachable: the daemon sees the connection close, and cancels
                self._disconnect(error)

    @abstractmethod
    def _send(self, frames: Frames) -> None:
        """Hand frames to the socket, at once. TimedOut when it takes no more."""

    @abstractmethod
    def _disconnect(self, error: CommError) -> None:
        """Close the socket, if there is one, and end what is in flight with `error`."""
