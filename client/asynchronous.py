"""The asyncio face of a running daemon: `Client`'s methods to await, and many streams at once.

Knows tasks and waiting. Does not know how replies find their request (`client_session`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

import zmq
import zmq.asyncio

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

READ_BATCH = 256  # messages sorted before other tasks get a turn

Stream = AsyncGenerator[Accepted | Stage | Token | Done, None]
T = TypeVar("T")


class AsyncClient:
    """Talks to the daemon at `address` from one event loop; see `Client` for timeouts and errors.

    `aclose` a stream that is left early (`contextlib.aclosing`): that cancels it at once.
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 30.0, keys: ClientKeys | None = None
    ) -> None:
        self.address = address or Home.from_env().address
        self._timeout_s = timeout_s
        self._keys = keys
        self._session = Session()
        self._events: dict[bytes, asyncio.Event] = {}  # set when something is heard of a request
        self._dealer: zmq.asyncio.Socket | None = None
        self._pump_task: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop the connection; the daemon cancels what was in flight. Idempotent."""
        self._disconnect(link.nobody(self.address))
        task, self._pump_task = self._pump_task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # --- requests ------------------------------------------------------------------------------------------

    def generate(
        self, prompt: str | None = None, *, prompt_tokens: Sequence[int] | None = None, **fields: Any
    ) -> Stream:
        return self._stream(generate_request(prompt, prompt_tokens, fields))

    def chat(self, messages: Sequence[ChatLike], **fields: Any) -> Stream:
        return self._stream(chat_request(messages, fields))

    async def text(
        self, prompt: str | None = None, *, messages: Sequence[ChatLike] | None = None, **fields: Any
    ) -> tuple[str, Done]:
        stream = self.generate(prompt, **fields) if messages is None else self.chat(messages, **fields)
        parts: list[str] = []
        async with contextlib.aclosing(stream):
            async for message in stream:
                if isinstance(message, Token):
                    parts.append(message.text)
                elif isinstance(message, Done):
                    return "".join(parts), message
        raise AssertionError("a stream ends with Done or raises")

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
    ) -> Loaded:
        request = Load(model=model, context=context, draft=draft, progress=heard is not None)
        return await self._call(request, Loaded, heard)

    async def unload(self, model: str = "") -> None:
        await self._call(Unload(model=model), Ok)

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
        self,
        request: Message,
        kind: type[M],
        timeout_s: float,
        heard: Callable[[Stage], None] | None = None,
    ) -> M:
        exchange = self._begin(request)
        try:
            while (reply := exchange.reply(kind, heard)) is None:
                await self._wait(exchange, timeout_s)
            return reply
        finally:
            self._finish(exchange)

    async def _stream(self, request: Message) -> Stream:
        await self._connect()
        exchange = self._begin(request)
        try:
            while True:
                while exchange.waits:
                    await self._wait(exchange, self._timeout_s)
                for message in map(expect_stream, exchange.take()):
                    yield message
                    if isinstance(message, Done):
                        return
        finally:
            self._finish(exchange)

    def _begin(self, request: Message) -> Exchange:
        exchange, frames = self._session.open(request)
        self._events[exchange.request_id] = asyncio.Event()
        self._send(frames)
        return exchange

    def _finish(self, exchange: Exchange) -> None:
        """Cancel what has not ended, without awaiting: this runs while tasks are being cancelled, too."""
        self._events.pop(exchange.request_id, None)
        frames = self._session.abandon(exchange)
        if frames is not None and self._dealer is not None:
            try:
                self._send(frames)
            except CommError as error:  # unreachable: the daemon sees the connection close, and cancels
                self._disconnect(error)

    async def _wait(self, exchange: Exchange, timeout_s: float) -> None:
        """Until something is heard of the exchange; TimedOut after `timeout_s` of silence."""
        event = self._events[exchange.request_id]
        event.clear()
        try:
            async with asyncio.timeout(timeout_s):  # wait_for may swallow a cancellation before Python 3.12
                await event.wait()
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
        """Close the socket and end what is in flight with `error`."""
        dealer, self._dealer = self._dealer, None
        if dealer is not None:
            dealer.disable_monitor()
            dealer.close(linger=link.LINGER_MS)
        if self._pump_task is not None and self._pump_task is not asyncio.current_task():
            self._pump_task.cancel()
        self._session.lose(error)
        for event in self._events.values():
            event.set()

    def _send(self, frames: Frames) -> None:
        assert self._dealer is not None  # every exchange begins with _connect
        try:
            _now(self._dealer.send_multipart(frames, zmq.NOBLOCK))
        except zmq.Again:
            raise TimedOut(f"the daemon at {self.address} takes no more requests") from None

    async def _pump(self, dealer: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
        """Sort what comes to its exchange until the connection ends."""
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
                    pass  # what had still come before the connection ended counts
            except CommError as error:  # nothing on this connection can be trusted any more
                failure = error
        self._disconnect(failure)

    def _read(self, dealer: zmq.asyncio.Socket) -> bool:
        """Sort what has come, at most READ_BATCH messages; whether there may be more."""
        for _ in range(READ_BATCH):
            try:
                frames = _now(dealer.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return False
            exchange = self._session.feed(frames)
            if exchange is not None and (event := self._events.get(exchange.request_id)) is not None:
                event.set()
        return True


def _now(settled: Awaitable[T]) -> T:
    """The result of a NOBLOCK call, whose future is settled when it is returned."""
    return cast("asyncio.Future[T]", settled).result()
