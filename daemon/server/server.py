"""The daemon's ZeroMQ server: one thread that moves messages between clients and the backend.

Knows listening, admission and its limits, draining and signals. Does not know models or text, nor how
replies reach slow clients (`outbox`); docs/api.md describes what it says on the wire.

Only the thread in `serve` touches the sockets. Other threads put things where it will look, and wake it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import zmq

from shoal.comm import curve_keys, endpoint, wire
from shoal.comm.errors import AddressError, AddressTaken, ProtocolError
from shoal.comm.log_rate import SeldomLog
from shoal.comm.messages import REQUESTS, Cancel, Error, ErrorCode, Hello, Message, Ok, Ping, Pong
from shoal.comm.waker import Waker
from shoal.daemon.backend import Backend
from shoal.daemon.errors import DaemonError

from .calls import OWN_USERS, WORK, Dispatcher
from .descriptors import soft_limit
from .front import Front
from .in_flight import Peer
from .limits import ServerLimits
from .no_front import NoFront
from .outbox import FULL_QUEUE_RETRY_S, Outbox
from .socket_lock import socket_lock

NO_ID = b"?"  # in an `error` about a message whose request id could not be read
RECEIVE_BATCH = 64  # messages read before replies are sent again
QUIET_S = 0.05  # without a message, after which all that was sent has surely been read
HANG_S = 2.0  # after which a backend that should have drained hangs
STOPPING = Error(code="shutting_down", message="the daemon is stopping", hint="start it again")

log = logging.getLogger("shoal.server")


class Server:
    """Serves `backend` at `addresses` until stopped. To learn the real addresses, call `bind` before `serve`.

    TCP beyond loopback needs `server_keys`. `closing` is called when nothing is admitted any more. `serve` closes the
    backend when it returns.
    """

    def __init__(
        self,
        backend: Backend,
        addresses: Sequence[str],
        *,
        server_keys: curve_keys.ServerKeys | None = None,
        limits: ServerLimits | None = None,
        closing: Callable[[], None] = lambda: None,
    ) -> None:
        self.addresses: list[str] = list(addresses)
        self._backend = backend
        self._keys = server_keys
        self._limits = (limits or ServerLimits()).within(soft_limit())
        self._routers: list[zmq.Socket[Any]] = []
        self._private: set[zmq.Socket[Any]] = set()  # of these, those that only the daemon's user can reach
        self._resources = ExitStack()
        self._waker = Waker()
        self._front = (Front if sys.platform == "linux" else NoFront)(self._limits)
        self._outbox = Outbox(self._limits, self._waker, self._front)
        self._dispatcher = Dispatcher(backend, self._limits.workers, self._limits.pending_bytes)
        self._closing = closing
        self._stops = 0
        self._draining = False
        self._ends_s = math.inf  # then draining is over, even if the backend hangs
        self._drained = threading.Event()
        self._seldom = SeldomLog(log)

    def serve(self) -> None:
        """Run in this thread until `stop`. Returns when the last replies have been sent."""
        try:
            self.bind()
            log.info("serving at %s", ", ".join(self.addresses))
            poller = zmq.Poller()
            for socket in (*self._routers, self._waker.fileno()):
                poller.register(socket, zmq.POLLIN)
            while self._stops < 2 and not self._drained.is_set() and time.monotonic() < self._ends_s:
                poller.poll(int(1000 * self._outbox.patience_s))
                self._waker.clear()
                self._receive()
                self._outbox.flush()
                self._outbox.tick(time.monotonic())
                if self._stops and not self._draining:
                    self._drain()
            self._farewell()
        finally:
            self._close()

    def stop(self) -> None:
        """The first call admits nothing more and lets running requests end; the second ends at once. Any thread."""
        self._stops += 1
        self._waker.wake()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within it, SIGTERM and SIGINT call `stop`. Main thread only."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.stop()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        # Python runs handlers only between its own instructions. A signal that comes just before the poll would go
        # unnoticed until the poll ends, unless its byte in the descriptor ends the poll.
        descriptor = signal.set_wakeup_fd(self._waker.sender_fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- begin and end -------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Listen. DaemonError when an address is refused, or taken by another daemon. Idempotent."""
        if self._routers:
            return
        with self._resources.pop_all() as stack:
            try:
                # Locks are taken first, so that they are freed last, when nothing listens any more.
                targets = [endpoint.parse(address) for address in self.addresses]
                for target in targets:
                    if isinstance(target, endpoint.IpcAddress):
                        endpoint.claim_directory(target.path.parent)
                        stack.enter_context(socket_lock(target.path))
                stack.callback(self._front.close)  # after ZeroMQ, as it passes on what that still has to send
                context = zmq.Context()
                stack.callback(context.term)
                if self._keys is not None and any(isinstance(t, endpoint.TcpAddress) for t in targets):
                    stack.enter_context(curve_keys.gate(context, self._keys.ring))
                self.addresses = [self._listen(context, address, stack) for address in self.addresses]
                self._front.start()
            except AddressError as error:
                code: ErrorCode = "busy" if isinstance(error, AddressTaken) else "bad_request"
                raise DaemonError(code, str(error)) from error
            self._resources = stack.pop_all()

    def _listen(self, context: zmq.Context[zmq.Socket[Any]], address: str, stack: ExitStack) -> str:
        """Have the front listen at `address`, and a ZeroMQ socket behind it. Returns the real address."""
        keys = self._keys if isinstance(endpoint.parse(address), endpoint.TcpAddress) else None
        public = endpoint.listen(address, keyed=keys is not None)
        bound = endpoint.address_of(public)
        router = context.socket(zmq.ROUTER)
        stack.callback(router.close, linger=500)
        router.router_mandatory = 1  # sending to a client that is gone raises an error
        router.maxmsgsize = self._limits.message_bytes
        # If a client went while its queue here is full, libzmq would end the process at its next ping
        # (stream_engine_base.cpp: !_io_error). So it sends none, and TCP finds the dead.
        router.sndhwm = self._limits.queue_messages
        router.backlog = 1024
        router.handshake_ivl = int(1000 * self._limits.handshake_s)
        if keys is not None:
            endpoint.require_keys(router, keys)
        self._front.add(public, router)
        self._routers.append(router)
        if isinstance(endpoint.parse(address), endpoint.IpcAddress):
            self._private.add(router)
        return bound

    def _drain(self) -> None:
        log.info("stopping: %d requests in flight", self._outbox.in_flight)
        self._draining = self._dispatcher.draining = True
        self._ends_s = time.monotonic() + self._limits.drain_s + HANG_S

        def wait() -> None:
            try:
                self._backend.drain(self._limits.drain_s)
            finally:
                self._drained.set()
                self._waker.wake()

        threading.Thread(target=wait, name="shoal-drain", daemon=True).start()

    def _farewell(self) -> None:
        """Give every request that was read its terminal reply, if its client still reads."""
        self._closing()
        self._draining = True
        self._front.admit_no_more()
        now_s = time.monotonic()
        deadline_s, quiet_s = now_s + self._limits.farewell_s, now_s + QUIET_S
        # What clients have sent may still be on its way through the front and libzmq.
        while now_s < deadline_s and (self._outbox.clients or now_s < quiet_s):
            if self._receive():
                quiet_s = now_s + QUIET_S
            self._outbox.fail_all(STOPPING)
            self._outbox.flush()
            self._outbox.tick(now_s)
            time.sleep(FULL_QUEUE_RETRY_S)
            now_s = time.monotonic()

    def _close(self) -> None:
        self._outbox.forget_all()
        self._dispatcher.close()
        try:
            self._backend.close()
        finally:
            self._resources.close()
            self._front.close()
            self._waker.close()
            log.info("stopped")

    # --- admission -----------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Whether anything has come."""
        came = False
        now_s = time.monotonic()
        for router in self._routers:
            for _ in range(RECEIVE_BATCH):
                try:
                    message = router.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                came = True
                identity, *frames = (frame.bytes for frame in message)
                peer = self._outbox.peer(router, identity, message[-1])
                if peer.link is not None:
                    self._front.heard(peer.link, len(frames), sum(map(len, frames)), now_s)
                self._admit(peer, frames, now_s)
        return came

    def _admit(self, peer: Peer, frames: list[bytes], now_s: float) -> None:
        """Begin a flight for one message, or refuse it."""
        try:
            envelope = wire.split(frames, self._limits.message_bytes)
            control = None if envelope.kind in WORK else wire.decode(envelope, REQUESTS)
        except ProtocolError as error:
            self._seldom.warning("a client sent %s", error)
            self._outbox.refuse(peer, error.request_id or NO_ID, Error(code=error.code, message=str(error)))
            return
        refusal = self._refusal(peer, envelope)
        if refusal is not None:
            self._outbox.refuse(peer, envelope.request_id, refusal)
            return
        flight = self._outbox.open(peer, envelope.request_id, envelope.kind, now_s)
        if control is None:
            self._dispatcher.start(flight, envelope)
        else:
            flight.emit(self._answer(control, peer))

    def _refusal(self, peer: Peer, envelope: wire.Envelope) -> Error | None:
        """Why there is no room for a request, or None."""
        limits, work = self._limits, envelope.kind in WORK
        if envelope.request_id in peer.flights:
            message = f"request id {envelope.request_id.hex()} is already in flight"
            return Error(code="bad_request", message=message)
        if self._draining and work and envelope.kind != "status":
            return STOPPING
        if envelope.kind in OWN_USERS and peer.router not in self._private:
            message = f"{envelope.kind} is for the user of this machine, over the daemon's own socket"
            return Error(code="bad_request", message=message)
        # These have twice the room: who has used up its own can still cancel, and one can see what others do.
        factor = 1 if work and envelope.kind != "status" else 2
        newcomers = 0 if peer.flights else 1
        for name, wanted, limit in (
            ("requests_per_client", len(peer.flights) + 1, limits.requests_per_client * factor),
            ("requests", self._outbox.in_flight + 1, limits.requests * factor),
            ("clients", self._outbox.clients + newcomers, limits.clients * factor),
        ):
            if wanted > limit:
                return Error(code="busy", message=f"{name}: {limit} in flight, the limit", retry_after_s=1.0)
        return None

    def _answer(self, control: Message, peer: Peer) -> Message:
        """The reply to a control message: it needs no backend, so it does not wait for busy workers."""
        match control:
            case Ping():
                return Pong(time_s=time.time())
            case Hello():
                return self._limits.welcome(control)
            case Cancel():
                with contextlib.suppress(ValueError):  # a target that is not hex names no request
                    target = peer.flights.get(bytes.fromhex(control.target))
                    if target is not None:
                        self._outbox.cancel(target)
                return Ok()
            case _:
                raise AssertionError(f"{type(control).__name__} is not a control message")
