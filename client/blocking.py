"""The Python face of a running daemon, for one thread.

    with Client() as client:
        for message in client.chat([{"role": "user", "content": "Hi"}], temperature=0):
            ...                                  # Accepted, Token…, then Done

Knows how to wait on a socket. Does not know how replies find their request (`session`). Imports no model
code, so it starts in a tenth of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

import zmq

from shoal.comm.cluster_messages import (
    Forget,
    Invitation,
    Invite,
    LinksReply,
    MeasureLinks,
    Nodes,
    NodesReply,
    Rejoin,
)
from shoal.comm.errors import CommError, RequestFailed
from shoal.comm.messages import (
    Chat,
    Done,
    Generate,
    Loaded,
    Message,
    Ok,
    Ping,
    Pong,
    Stage,
    Status,
    StatusReply,
    StreamEvent,
    Tokens,
    Unload,
    Welcome,
)

from . import connection as link
from .base import ClientFace
from .keep_full import NOTHING_S, keep_full
from .session import HELLO, ChatLike, Exchange, Frames, M, load_request, tokenize_request, whole_text

AnswerStream = Generator[StreamEvent, None, None]
K = TypeVar("K")


class Client(ClientFace[AnswerStream]):
    """Talks to a daemon from one thread; several streams may be read in turns. Timeouts and errors: `ClientFace`."""

    _dealer: zmq.Socket[bytes] | None = None
    _monitor: zmq.Socket[bytes] | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The daemon cancels the requests in flight. Idempotent."""
        self._disconnect(link.nobody(self.address))

    # --- requests ------------------------------------------------------------------------------------------

    def text(
        self, prompt: str | None = None, *, messages: Sequence[ChatLike] | None = None, **fields: Any
    ) -> tuple[str, Done]:
        """The whole answer to a prompt, or to a conversation, and how it ended."""
        return whole_text(list(self._answer(prompt, messages, fields)))

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
        *,
        least_context: int | None = None,
        ranks: int | None = None,
        keep: bool = False,
    ) -> Loaded:
        """Load a model and wait for it, however long that takes. A loaded one is loaded anew if its context is another
        than `context`; it stays as it is whatever `least_context` says. `draft` is a model that guesses ahead for it,
        `ranks` how many machines of the cluster compute it together.
        With `keep`, a loaded model is not loaded anew: what would need that is refused.
        Each second `heard` gets how far loading is."""
        return self._call(
            load_request(model, context, least_context, draft, heard, ranks, keep), Loaded, heard
        )

    def unload(self, model: str = "") -> None:
        self._call(Unload(model=model), Ok)

    def nodes(self) -> NodesReply:
        """Who is in the cluster."""
        return self._call(Nodes(), NodesReply)

    def measure_links(self) -> LinksReply:
        """Measure the links to all workers; takes a second or two for each."""
        return self._call(MeasureLinks(), LinksReply)

    def invite(self, listen: Sequence[str] = ()) -> Invitation:
        """A code with which one more machine can join. From now on the daemon is a head that listens there."""
        return self._call(Invite(listen=list(listen)), Invitation)

    def forget(self, node: str) -> None:
        """Let a machine attach no more."""
        self._call(Forget(node=node), Ok)

    def rejoin(self) -> None:
        """Have the daemon read anew with whom its machine is paired."""
        self._call(Rejoin(), Ok)

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
        self, request: Message, kind: type[M], timeout_s: float, heard: Callable[[Stage], None] | None = None
    ) -> M:
        exchange = self._begin(request)
        try:
            while (reply := exchange.reply(kind, heard)) is None:
                self._wait(exchange, timeout_s)
            return reply
        finally:
            self._finish(exchange)

    def stream(self, request: Generate | Chat) -> AnswerStream:
        self._connect()
        exchange = self._begin(request)
        try:
            while True:
                while exchange.waits:
                    self._wait(exchange, self._timeout_s)
                for event in exchange.events():
                    yield event
                    if isinstance(event, Done):
                        return
        finally:
            self._finish(exchange)

    def many(
        self, requests: Iterator[tuple[K, Generate | Chat] | None], at_once: int
    ) -> Generator[tuple[K, StreamEvent | RequestFailed], None, None]:
        """The events of many answers as they come, each with the key of its request. A request that fails ends with its
        error, and the others go on. `requests` are taken as places get free, so that `at_once` are under way; None
        stands for one that comes later. Closing the generator cancels those under way."""
        self._connect()
        under_way: dict[Exchange, K] = {}

        def begin(key: K, request: Generate | Chat) -> None:
            under_way[self._begin(request)] = key

        try:
            yield from keep_full(requests, at_once, begin, self._of_many(under_way), RequestFailed)
        finally:
            for exchange in under_way:
                self._finish(exchange)

    def _of_many(
        self, under_way: dict[Exchange, K]
    ) -> Generator[tuple[K, StreamEvent | RequestFailed] | None, None, None]:
        """What comes of many answers, without end; None where there was nothing for a while. Those that have ended are
        taken off."""
        heard_s, heard = time.monotonic(), 0
        while True:
            news = [exchange for exchange in under_way if not exchange.waits]
            for exchange in news:
                key = under_way[exchange]
                try:
                    for event in exchange.events():
                        yield key, event
                except RequestFailed as error:
                    yield key, error
                if exchange.finished:
                    del under_way[exchange]
            now = sum(exchange.heard for exchange in under_way)
            if news or now != heard or not under_way:
                heard, heard_s = now, time.monotonic()
            elif time.monotonic() - heard_s > self._timeout_s:
                raise link.silent(self.address, self._timeout_s)
            if not news:
                self._pump(NOTHING_S)
                yield None

    def _wait(self, exchange: Exchange, timeout_s: float) -> None:
        """Wait until a reply to the exchange comes. TimedOut after `timeout_s` of silence."""
        heard, deadline_s = exchange.heard, time.monotonic() + timeout_s
        while exchange.heard == heard and not exchange.finished:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise link.silent(self.address, timeout_s)
            self._pump(left_s)

    # --- the socket ----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._dealer is not None:
            self._watch()  # since the last request the daemon may have ended, and another one started
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
            monitor.close()  # after disabling: libzmq's thread blocks on an event that nobody takes, then this one does
            dealer.close(linger=link.LINGER_MS)
        self._session.lose(error)

    def _send(self, frames: Frames) -> None:
        assert self._dealer is not None  # every exchange begins with _connect
        try:
            self._dealer.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            raise link.full(self.address) from None

    def _pump(self, timeout_s: float) -> None:
        """Wait for messages, and sort each to its exchange."""
        if self._dealer is None:
            raise link.gone(self.address)
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
        """If the connection is gone, sort what had still come, then end the requests in flight with NoDaemon."""
        assert self._monitor is not None
        while self._monitor is not None and self._monitor.poll(0):
            failure = link.verdict(self._monitor.recv_multipart(), self.address)
            if failure is not None:
                self._read()
                self._disconnect(failure)
