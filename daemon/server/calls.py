"""From requests to backend calls, on worker threads; every outcome becomes one terminal reply.

Knows which backend method answers which message. Does not know sockets or clients.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

import msgspec

from shoal.comm import wire
from shoal.comm.cluster_messages import Forget, Invite, MeasureLinks, Nodes, Rejoin
from shoal.comm.errors import ProtocolError
from shoal.comm.log_rate import SeldomLog
from shoal.comm.messages import REQUESTS, Chat, Error, Generate, Load, Message, Status, Tokenize, Unload
from shoal.daemon.backend import Backend
from shoal.daemon.errors import DaemonError
from shoal.models.turns import TurnPool

from .in_flight import Flight

OWN_USERS = frozenset({"invite", "forget", "rejoin", "measure_links"})
"""The request types that change who may compute with this machine, or keep its network busy."""

WORK = frozenset({"generate", "chat", "tokenize", "load", "unload", "status", "nodes"}) | OWN_USERS
"""The request types that need the backend. The server answers the others by itself."""

log = logging.getLogger("shoal.server")


class Dispatcher:
    """Runs backend calls: prompts on `workers` threads, prompts whose model is not loaded yet on as many other threads,
    loading, status and measuring links on one thread each. So no request waits behind another that waits for a model to
    load, unless it needs one loaded, too. Clients take turns in all of them.

    `pending_bytes` bounds the bodies that wait for a worker; beyond it requests are answered `busy`. For clients that
    have none among them there is half as much besides.
    """

    def __init__(self, backend: Backend, workers: int, pending_bytes: int) -> None:
        self._backend = backend
        prompts = TurnPool(workers, "shoal-prompt")
        self._patient = TurnPool(workers, "shoal-patient")
        loads = TurnPool(1, "shoal-load")
        status = TurnPool(1, "shoal-status")
        self._pools = {"load": loads, "unload": loads, "status": status}
        self._pools |= dict.fromkeys(("nodes", *OWN_USERS), status)
        self._pools["measure_links"] = TurnPool(1, "shoal-links")
        self._pools |= dict.fromkeys(("generate", "chat", "tokenize"), prompts)
        self._limit_bytes = pending_bytes
        self._lock = threading.Lock()
        self._pending_bytes = Counter[str]()  # by client
        self._seldom = SeldomLog(log)
        self.draining = False

    def start(self, flight: Flight, envelope: wire.Envelope) -> None:
        """Queue the request; its replies come through `flight.emit`. Never blocks."""
        size, client = len(envelope.body), flight.peer.client
        with self._lock:
            total = self._pending_bytes.total()
            limit = self._limit_bytes if client in self._pending_bytes else self._limit_bytes * 3 // 2
        if total and total + size > limit:
            flight.emit(Error(code="busy", message="too many bytes of requests wait", retry_after_s=1.0))
            return
        self._queue(self._pools[envelope.kind], flight, lambda: self._run(flight, envelope), size)

    def close(self) -> None:
        """Start nothing more. Calls that are running go on in their threads."""
        for pool in (*self._pools.values(), self._patient):
            pool.close()

    def _queue(self, pool: TurnPool, flight: Flight, act: Callable[[], None], size: int) -> None:
        """Have `pool` call `act`. Until it returns, `size` bytes count as pending."""
        client = flight.peer.client
        with self._lock:
            self._pending_bytes[client] += size

        def call() -> None:
            try:
                self._call(flight, act)
            finally:
                with self._lock:
                    self._pending_bytes[client] -= size
                    if not self._pending_bytes[client]:
                        del self._pending_bytes[client]

        pool.submit(client, call)

    def _call(self, flight: Flight, act: Callable[[], None]) -> None:
        try:
            if flight.cancelled:
                flight.emit(Error(code="cancelled", message="cancelled before it began"))
                return
            act()
        except ProtocolError as error:
            flight.emit(Error(code=error.code, message=str(error)))
        except DaemonError as error:
            flight.emit(error.to_message())
        # The backend reads files that nobody has vouched for. Whatever it raises must end this request only.
        except Exception as error:
            self._seldom.warning("%s failed: %r", flight.kind, error, error=error)
            hint = "the daemon's log says more"
            flight.emit(Error(code="internal", message=f"{flight.kind} failed", hint=hint))

    def _run(self, flight: Flight, envelope: wire.Envelope) -> None:
        request = wire.decode(envelope, REQUESTS)
        if isinstance(request, Generate | Chat) and request.deadline_s is not None:
            flight.deadline_s = flight.arrived_s + request.deadline_s
        if isinstance(request, Generate | Chat | Load) and request.progress:
            model = request.model
            flight.watch = lambda: self._backend.stage(model)
        if isinstance(request, Generate | Chat | Tokenize) and not self._backend.has(request.model):
            self._queue(self._patient, flight, lambda: self._answer(flight, request), len(envelope.body))
        else:
            self._answer(flight, request)

    def _answer(self, flight: Flight, request: Message) -> None:
        match request:
            case Generate() | Chat():
                submitted = self._backend.submit(request, flight.emit, flight.peer.client)
                flight.attach(submitted.cancel, submitted.stage if request.progress else None)
            case Tokenize():
                flight.emit(self._backend.tokenize(request))
            case Load():
                flight.emit(self._backend.load(request))
            case Unload():
                flight.emit(self._backend.unload(request))
            case Status():
                status = self._backend.status()
                draining = self.draining or status.draining
                flight.emit(msgspec.structs.replace(status, draining=draining))
            case Invite() | Nodes() | MeasureLinks() | Forget() | Rejoin():
                flight.emit(self._backend.cluster(request))
            case _:
                raise AssertionError(f"{type(request).__name__} is not the backend's")
