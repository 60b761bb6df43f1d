"""The Python face of a running daemon, for one thread.

    with Client() as client:
        for message in client.chat([{"role": "user", "content": "Hi"}], temperature=0):
            ...                                  # Accepted, Token…, then Done

Knows waiting on a socket. Does not know how replies find their request (`client_session`). Imports no model
code: it starts in a tenth of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import zmq

from shoal.comm.curve_keys import ClientKeys
from shoal.comm.errors import CommError, TimedOut
from shoal.comm.home import Home
from shoal.comm.messages import (
    Accepted,
    Done,
    Load,
    Loaded,
    Message,
    Ok,
    Ping,
    Pong,
    Stage,
    Status,
    StatusReply,
    Token,
    Tokens,
    Unload,
    Welcome,
)

from . import connection as link
from .session import (
    HELLO,
    ChatLike,
    Exchange,
    Frames,
    M,
    Session,
    chat_request,
    expect_stream,
    generate_request,
    tokenize_request,
)

Stream = Generator[Accepted | Stage | Token | Done, None, None]


class Client:
    """Talks to the daemon at `address` (default: this user's own), connecting at the first request.

    `timeout_s` bounds silence, not work: the daemon says `waiting` every few seconds while it computes.
    Methods raise NoDaemon, TimedOut, RequestFailed (the daemon's `error`), AddressError or ProtocolError.
    After NoDaemon the next request connects anew. Use from one thread; several streams may be read in turns.
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 30.0, keys: ClientKeys | None = None
    ) -> None:
        self.address = address or Home.from_env().address
        self._timeout_s = timeout_s
        self._keys = keys
        self._session = Session()
        self._dealer: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection; the daemon cancels what was in flight. Idempotent."""
        self._disconnect(link.nobody(self.address))

    # --- requests ------------------------------------------------------------------------------------------

    def generate(
        self, prompt: str | None = None, *, prompt_tokens: Sequence[int] | None = None, **fields: Any
    ) -> Stream:
        """Continue a prompt: Accepted, Tokens, Done. The request is sent when the first is asked for.

        `fields`: those of `messages.Generation` and `messages.Sampling`. Closing the generator cancels.
        """
        return self._stream(generate_request(prompt, prompt_tokens, fields))

    def chat(self, messages: Sequence[ChatLike], **fields: Any) -> Stream:
        """Answer a conversation, as `generate` does; also takes `tools` and `template_args`."""
        return self._stream(chat_request(messages, fields))

    def text(
        self, prompt: str | None = None, *, messages: Sequence[ChatLike] | None = None, **fields: Any
    ) -> tuple[str, Done]:
        """The whole answer to a prompt, or to a conversation, and how it ended."""
        stream = self.generate(prompt, **fields) if messages is None else self.chat(messages, **fields)
        parts: list[str] = []
        for message in stream:
            if isinstance(message, Token):
                parts.append(message.text)
            elif isinstance(message, Done):
                return "".join(parts), message
        raise AssertionError("a stream ends with Done or raises")

    def tokenize(
        self,
        text: str | None = None,
        *,
        tokens: Sequence[int] | None = None,
        messages: Sequence[ChatLike] | None = None,
        **fields: Any,
    ) -> Tokens:
        return self._call(tokenize_request(text, tokens, messages, fields), Tokens)

    def load(
        self,
        model: str,
        context: int | None = None,
        draft: str | None = None,
        heard: Callable[[Stage], None] | None = None,
    ) -> Loaded:
        """Load a model and wait for it, however long that takes; `draft` is one that guesses for it, `heard` is
        told each second how far it is."""
        request = Load(model=model, context=context, draft=draft, progress=heard is not None)
        return self._call(request, Loaded, heard)

    def unload(self, model: str = "") -> None:
        self._call(Unload(model=model), Ok)

    def status(self) -> StatusReply:
        return self._call(Status(), StatusReply)

    def ping(self) -> Pong:
        return self._call(Ping(), Pong)

    def hello(self) -> Welcome:
        return self._call(HELLO, Welcome)

    # --- exchanges -----------------------------------------------------------------------------------------

    def _call(self, request: Message, kind: type[M], heard: Callable[[Stage], None] | None = None) -> M:
        self._connect()
        return self._ask(request, kind, self._timeout_s, heard)

    def _ask(
        self,
        request: Message,
        kind: type[M],
        timeout_s: float,
        heard: Callable[[Stage], None] | None = None,
    ) -> M:
        exchange = self._begin(request)
        try:
            while (reply := exchange.reply(kind, heard)) is None:
                self._wait(exchange, timeout_s)
            return reply
        finally:
            self._finish(exchange)

    def _stream(self, request: Message) -> Stream:
        self._connect()
        exchange = self._begin(request)
        try:
            while True:
                while exchange.waits:
                    self._wait(exchange, self._timeout_s)
                for message in map(expect_stream, exchange.take()):
                    yield message
                    if isinstance(message, Done):
                        return
        finally:
            self._finish(exchange)

    def _begin(self, request: Message) -> Exchange:
        exchange, frames = self._session.open(request)
        self._send(frames)
        return exchange

    def _finish(self, exchange: Exchange) -> None:
        """Cancel what has not ended. Late replies are dropped as they come."""
        frames = self._session.abandon(exchange)
        if frames is not None and self._dealer is not None:
            try:
                self._send(frames)
            except CommError:  # unreachable: the daemon sees the connection close, and cancels
                self.close()

    def _wait(self, exchange: Exchange, timeout_s: float) -> None:
        """Until something is heard of the exchange; TimedOut after `timeout_s` of silence."""
        heard, deadline_s = exchange.heard, time.monotonic() + timeout_s
        while exchange.heard == heard and not exchange.finished:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise link.silent(self.address, timeout_s)
            self._pump(left_s)

    # --- the socket ----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._dealer is not None:
            self._watch()  # the daemon may have gone, and another come, since the last request
        if self._dealer is not None:
            return
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._dealer = context.socket(zmq.DEALER)
        self._monitor = self._dealer.get_monitor_socket(link.VERDICTS)
        try:
            link.connect(self._dealer, self.address, self._keys)
            if not self._monitor.poll(int(1000 * link.CONNECT_S)):
                raise link.nobody(self.address)
            failure = link.verdict(self._monitor.recv_multipart(), self.address)
            if failure is not None:
                raise failure
            self._ask(HELLO, Welcome, min(self._timeout_s, link.HELLO_S))
        except BaseException:
            self.close()
            raise

    def _disconnect(self, error: CommError) -> None:
        dealer, self._dealer = self._dealer, None
        monitor, self._monitor = self._monitor, None
        if dealer is not None and monitor is not None:
            dealer.disable_monitor()
            monitor.close()  # not sooner: an event that nobody takes would hold libzmq's thread, and then this one
            dealer.close(linger=link.LINGER_MS)
        self._session.lose(error)

    def _send(self, frames: Frames) -> None:
        assert self._dealer is not None  # every exchange begins with _connect
        try:
            self._dealer.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            raise TimedOut(f"the daemon at {self.address} takes no more requests") from None

    def _pump(self, timeout_s: float) -> None:
        """Wait for traffic and sort what has come to its exchange."""
        poller = zmq.Poller()
        for socket in (self._dealer, self._monitor):
            poller.register(socket, zmq.POLLIN)
        poller.poll(int(1000 * timeout_s) + 1)
        self._read()
        self._watch()

    def _read(self) -> None:
        assert self._dealer is not None
        try:
            while True:
                self._session.feed(self._dealer.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return
        except CommError as error:  # nothing on this connection can be trusted any more
            self._disconnect(error)
            raise

    def _watch(self) -> None:
        """If the connection is gone, end what is in flight with NoDaemon, after what had still come."""
        assert self._monitor is not None
        while self._monitor is not None and self._monitor.poll(0):
            failure = link.verdict(self._monitor.recv_multipart(), self.address)
            if failure is not None:
                self._read()
                self._disconnect(failure)
