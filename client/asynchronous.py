"""The asyncio face of a running daemon: `Client`'s methods as coroutines, and many streams at once.

Knows tasks and how to wait in them. Does not know how replies find their request (`session`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

import zmq
import zmq.asyncio

from shoal.comm.cluster_messages import Forget, Invitation, Invite, Nodes, NodesReply, Rejoin
from shoal.comm.curve_keys import ClientKeys
from shoal.comm.errors import CommError
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
from .session import HELLO, ChatLike, Exchange, Frames, M, load_request, tokenize_request, whole_text

READ_BATCH = 256  # messages that are sorted before other tasks get a turn

AsyncAnswerStream = AsyncGenerator[StreamEvent, None]
T = TypeVar("T")


class AsyncClient(ClientFace[AsyncAnswerStream]):
    """Talks to a daemon from one event loop, with the methods of `Client`. Timeouts and errors: `ClientFace`.

    `aclose` a stream that you leave early (`contextlib.aclosing`): that cancels it at once.
    """

    _dealer: zmq.asyncio.Socket | None = None
    _pump_task: asyncio.Task[None] | None = None

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 30.0, keys: ClientKeys | None = None
    ) -> None:
        super().__init__(address, timeout_s=timeout_s, keys=keys)
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. The daemon cancels the requests in flight. Idempotent."""
        self._disconnect(link.nobody(self.address))
        task, self._pump_task = self._pump_task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # --- requests ------------------------------------------------------------------------------------------

    async def text(
        self, prompt: str | None = None, *, messages: Sequence[ChatLike] | None = None, **fields: Any
    ) -> tuple[str, Done]:
        async with contextlib.aclosing(self._answer(prompt, messages, fields)) as stream:
            return whole_text([event async for event in stream])

    async def tokenize(
        self,
        text: str | None = None,
        *,
        tokens: Sequence[int] | None = None,
        messages: Sequence[ChatLike] | None = None,
        **fields: Any,
    ) -> Tokens:
        return await self._call(tokenize_request(text, tokens, messages, fields), Tokens)

    async def load(
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
        return await self._call(
            load_request(model, context, least_context, draft, heard, ranks, keep), Loaded, heard
        )

    async def unload(self, model: str = "") -> None:
        await self._call(Unload(model=model), Ok)

    async def nodes(self) -> NodesReply:
        """Who is in the cluster."""
        return await self._call(Nodes(), NodesReply)

    async def invite(self, listen: Sequence[str] = ()) -> Invitation:
        """A code with which one more machine can join. From now on the daemon is a head that listens there."""
        return await self._call(Invite(listen=list(listen)), Invitation)

    async def forget(self, node: str) -> None:
        """Let a machine attach no more."""
        await self._call(Forget(node=node), Ok)

    async def rejoin(self) -> None:
        """Have the daemon read anew with whom its machine is paired."""
        await self._call(Rejoin(), Ok)

    async def status(self) -> StatusReply:
        return await self._call(Status(), StatusReply)

    async def ping(self) -> Pong:
        return await self._call(Ping(), Pong)

    async def hello(self) -> Welcome:
        return await self._call(HELLO, Welcome)

    # --- exchanges -----------------------------------------------------------------------------------------

    async def _call(self, request: Message, kind: type[M], heard: Callable[[Stage], None] | None = None) -> M:
        await self._connect()
        return await self._ask(request, kind, self._timeout_s, heard)

    async def _ask(
        self, request: Message, kind: type[M], timeout_s: float, heard: Callable[[Stage], None] | None = None
    ) -> M:
        exchange = self._begin(request)
        try:
            while (reply := exchange.reply(kind, heard)) is None:
                await self._wait(exchange, timeout_s)
            return reply
        finally:
            self._finish(exchange)

    async def stream(self, request: Generate | Chat) -> AsyncAnswerStream:
        await self._connect()
        exchange = self._begin(request)
        try:
            while True:
                while exchange.waits:
                    await self._wait(exchange, self._timeout_s)
                for event in exchange.events():
                    yield event
                    if isinstance(event, Done):
                        return
        finally:
            self._finish(exchange)

    async def _wait(self, exchange: Exchange, timeout_s: float) -> None:
        """Wait until a reply to the exchange comes. TimedOut after `timeout_s` of silence."""
        news = asyncio.Event()
        exchange.wake = news.set
        try:
            async with asyncio.timeout(timeout_s):  # before Python 3.12, wait_for may swallow a cancellation
                await news.wait()
        except TimeoutError:
            raise link.silent(self.address, timeout_s) from None

    # --- the socket ----------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        async with self._connecting:
            if self._dealer is not None:
                return
            dealer = zmq.asyncio.Context(zmq.Context.instance()).socket(zmq.DEALER)
            monitor = dealer.get_monitor_socket(link.VERDICTS)
            self._dealer = dealer
            try:
                link.connect(dealer, self.address, self._keys)
                if not await monitor.poll(int(1000 * link.CONNECT_S)):
                    raise link.nobody(self.address)
                failure = link.verdict(_now(monitor.recv_multipart(zmq.NOBLOCK)), self.address)
                if failure is not None:
                    raise failure
                self._pump_task = asyncio.create_task(self._pump(dealer, monitor))
                await self._ask(HELLO, Welcome, min(self._timeout_s, link.HELLO_S))
            except BaseException:
                await self.close()
                raise

    def _disconnect(self, error: CommError) -> None:
        dealer, self._dealer = self._dealer, None
        if dealer is not None:
            dealer.disable_monitor()
            dealer.close(linger=link.LINGER_MS)
        if self._pump_task is not None and self._pump_task is not asyncio.current_task():
            self._pump_task.cancel()
        self._session.lose(error)

    def _send(self, frames: Frames) -> None:
        assert self._dealer is not None  # every exchange begins with _connect
        try:
            _now(self._dealer.send_multipart(frames, zmq.NOBLOCK))
        except zmq.Again:
            raise link.full(self.address) from None

    async def _pump(self, dealer: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
        """Sort each message that comes to its exchange, until the connection ends."""
        poller = zmq.asyncio.Poller()
        for socket in (dealer, monitor):
            poller.register(socket, zmq.POLLIN)
        failure: CommError | None = None
        while failure is None:
            ready = dict(await poller.poll())
            if monitor in ready:
                failure = link.verdict(_now(monitor.recv_multipart(zmq.NOBLOCK)), self.address)
            try:
                while self._read(dealer) and failure is not None:
                    pass  # read all that came before the connection ended
            except CommError as error:  # nothing on this connection can be trusted any more
                failure = error
        self._disconnect(failure)

    def _read(self, dealer: zmq.asyncio.Socket) -> bool:
        """Sort what has come, at most READ_BATCH messages. Returns whether there may be more."""
        for _ in range(READ_BATCH):
            try:
                self._session.feed(_now(dealer.recv_multipart(zmq.NOBLOCK)))
            except zmq.Again:
                return False
        return True


def _now(settled: Awaitable[T]) -> T:
    """The result of a NOBLOCK call: its future has one as soon as it is returned."""
    return cast("asyncio.Future[T]", settled).result()
