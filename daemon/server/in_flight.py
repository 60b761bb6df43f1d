"""Requests in flight: each is a mailbox between the backend's threads and the server's thread.

Knows how the replies to one request are ordered, joined and counted, and that exactly one of them is terminal.
Does not know sockets, frames or models.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec
import zmq

from shoal.comm.messages import Accepted, Done, Error, Message, Stage, Timings, Token, Usage, Waiting
from shoal.daemon.backend import STAGE_S, CancelCall

from .front_link import Link


@dataclass(eq=False)
class Peer:
    """One connection with requests in flight. Only the server's thread touches it. `client` names whom the machine is
    shared with fairly: the client's public key, or without CURVE the connection."""

    router: zmq.Socket[Any]
    identity: bytes
    client: str
    link: Link | None = None  # its connection, while there is one
    flights: dict[bytes, Flight] = field(default_factory=dict)
    refusals: deque[tuple[bytes, Message]] = field(default_factory=deque)  # not yet sent, by request id
    blocked_since_s: float = 0.0  # since then its queue has been full, and nothing could be sent
    sent: int = 0  # messages
    evicted: bool = False  # its requests were ended because it was blocked for too long
    gone: bool = False

    @property
    def held_bytes(self) -> int:
        return sum(flight.held_bytes for flight in self.flights.values())


class FlightState(Enum):
    """Where a request is between its arrival and its end."""

    WAITING = "the backend has not accepted it yet, so it can be ended here at once"
    RUNNING = "the backend has it and will send its terminal reply"
    CANCELLED = "the backend has it and was asked to end it; the backend still sends the terminal reply"
    ENDED = "the backend has sent the terminal reply"
    DROPPED = "it was ended here; the backend has to cancel it, and later replies to it are ignored"


NEXT: dict[FlightState, frozenset[FlightState]] = {
    FlightState.WAITING: frozenset({FlightState.RUNNING, FlightState.ENDED, FlightState.DROPPED}),
    FlightState.RUNNING: frozenset({FlightState.CANCELLED, FlightState.ENDED, FlightState.DROPPED}),
    FlightState.CANCELLED: frozenset({FlightState.ENDED, FlightState.DROPPED}),
    FlightState.ENDED: frozenset(),
    FlightState.DROPPED: frozenset(),
}
"""Which states may follow a state. Nothing follows the last two, so there is only one terminal reply."""


class Flight:
    """One request, from its arrival until its terminal reply is sent.

    `emit`, `attach` and `cancelled` may be used from any thread, all else only from the server's.
    Tokens that wait are joined into one, so a slow reader costs memory for text but not for messages.
    """

    def __init__(
        self, peer: Peer, request_id: bytes, kind: str, now_s: float, ready: Callable[[Flight], None]
    ) -> None:
        self.peer = peer
        self.request_id = request_id
        self.kind = kind
        self.arrived_s = now_s
        self.sent_s = now_s  # when something was last sent
        self.deadline_s = math.inf
        self.outgoing: deque[Message] = deque()  # taken from the mailbox, not yet sent
        self.watch: Callable[[], Stage | None] | None = None  # tells what it waits for, if the client asked
        self.held_bytes = 0  # about what the mailbox takes
        self._ready = ready
        self._lock = threading.Lock()
        # Only answers can be ended here: for other kinds nobody tells when the backend has begun.
        self._state = FlightState.WAITING if kind in ("generate", "chat") else FlightState.RUNNING
        self._cancel: CancelCall | None = None  # until it is called
        self._noted = False  # whether `ready` was called after the last `take`
        self._accepted: Accepted | None = None
        self._tokens: list[Token] = []
        self._terminal: Message | None = None

    def _enter(self, state: FlightState) -> bool:
        """Change the state if that is allowed. Call it under the lock."""
        allowed = state in NEXT[self._state]
        if allowed:
            self._state = state
        return allowed

    def _note(self) -> bool:
        """Whether `ready` has to be called now that the mailbox holds something. Call it under the lock."""
        noted, self._noted = self._noted, True
        return not noted

    # --- the backend's side ------------------------------------------------------------------------------

    def emit(self, message: Message) -> None:
        """Add a reply. It is ignored after a terminal one, and when nobody waits any more."""
        with self._lock:
            if not NEXT[self._state]:
                return
            match message:
                case Accepted():
                    self._accepted = message
                    self._enter(FlightState.RUNNING)
                case Token():
                    self._tokens.append(message)
                    self.held_bytes += _weight(message)
                case _:
                    self._terminal = message
                    self._enter(FlightState.ENDED)
                    # They refer back to this flight, and the cycle would keep a model in memory.
                    self._take_cancel()
                    self.watch = None
            notify = self._note()
        if notify:
            self._ready(self)

    def attach(self, cancel: CancelCall, watch: Callable[[], Stage | None] | None = None) -> None:
        """Set how to cancel the request, and from now on `watch`. Calls `cancel` at once if it was cancelled or dropped
        meanwhile."""
        with self._lock:
            self.watch = None
            if self._enter(FlightState.RUNNING) or self._state is FlightState.RUNNING:
                self._cancel, self.watch = cancel, watch
            cancelled = self.cancelled
        if cancelled:
            cancel()

    @property
    def cancelled(self) -> bool:
        return self._state in (FlightState.CANCELLED, FlightState.DROPPED)

    # --- the server's side -------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End the request early. Its terminal reply still comes, from the backend if that has the request already."""
        # Packing a model may take an hour, so a request that waits for it is answered here.
        if not self._drop(Error(code="cancelled", message="cancelled before it began"), waiting=True):
            with self._lock:
                cancel = self._take_cancel() if self._enter(FlightState.CANCELLED) else None
            if cancel is not None:
                cancel()

    def expire(self, now_s: float) -> None:
        """End the request if it is past its deadline and still waits for its model; later the backend does that."""
        if now_s >= self.deadline_s:
            usage = Usage(prompt_tokens=0, completion_tokens=0)
            self._drop(Done(finish_reason="deadline", usage=usage, timings=Timings()), waiting=True)

    def fail(self, error: Error) -> None:
        """End the request with `error` unless it has ended. Tokens that were not taken are dropped."""
        self._drop(error)

    def abandon(self) -> None:
        """The client is gone: cancel the request and hold nothing for it."""
        self.outgoing.clear()
        try:
            self._drop(None)
        finally:
            with self._lock:
                self._empty()

    def _drop(self, reply: Message | None, *, waiting: bool = False) -> bool:
        """End the request here with `reply`, and have the backend cancel it. With `waiting`, only if the backend has
        not accepted it. Returns whether it was ended."""
        with self._lock:
            if (waiting and self._state is not FlightState.WAITING) or not self._enter(FlightState.DROPPED):
                return False
            self._tokens, self.held_bytes = [], 0
            self._terminal = reply
            cancel = self._take_cancel()
            notify = reply is not None and self._note()
        if notify:
            self._ready(self)
        if cancel is not None:
            cancel()
        return True

    def _take_cancel(self) -> CancelCall | None:
        """What cancels the request, at most once. Call it under the lock."""
        cancel, self._cancel = self._cancel, None
        return cancel

    def _empty(self) -> None:
        self._accepted, self._terminal = None, None
        self._tokens, self.held_bytes = [], 0

    def take(self) -> None:
        """Move what the mailbox holds to `outgoing`, at most three messages. Call it when `outgoing` is empty."""
        with self._lock:
            self._noted = False
            joined = _join(self._tokens) if self._tokens else None
            held = (self._accepted, joined, self._terminal)
            self.outgoing.extend(message for message in held if message is not None)
            self._empty()

    def sign_of_life(self, now_s: float, keepalive_s: float) -> Message | None:
        """What to send to a client that has heard nothing since `sent_s`; None if it is too early."""
        silent_s = now_s - self.sent_s
        seconds = round(now_s - self.arrived_s, 3)
        watch = self.watch
        if watch is not None and silent_s >= STAGE_S and (stage := watch()) is not None:
            return msgspec.structs.replace(stage, seconds=seconds)
        return Waiting(seconds=seconds) if silent_s >= keepalive_s else None


def _join(tokens: list[Token]) -> Token:
    if len(tokens) == 1:
        return tokens[0]
    return Token(
        text="".join(token.text for token in tokens),
        ids=[id_ for token in tokens for id_ in token.ids],
        logprobs=[entry for token in tokens for entry in token.logprobs],
    )


def _weight(token: Token) -> int:
    return 64 + len(token.text) + 8 * len(token.ids) + sum(128 * (1 + len(e.top)) for e in token.logprobs)
