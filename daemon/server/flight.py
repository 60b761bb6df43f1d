"""Requests in flight: a mailbox between the backend's threads and the server's, and who waits for it.

Knows how replies of one request are ordered, joined and counted, and that exactly one of them is terminal.
Does not know sockets, frames or models.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from shoal.comm.messages import Accepted, Done, Error, Message, Stage, Timings, Token, Usage, Waiting
from shoal.daemon.backend import STAGE_S, CancelCall


@dataclass(eq=False)
class Peer:
    """One connection with requests in flight. Only the server's thread touches it. `client`: who shares with others,
    a key or else the connection."""

    router: zmq.Socket[Any]
    identity: bytes
    client: str
    flights: dict[bytes, Flight] = field(default_factory=dict)
    blocked_since_s: float = 0.0  # its queue is full, and nothing has gone out, since then
    sent: int = 0  # messages
    evicted: bool = False  # blocked for too long: its requests were ended
    gone: bool = False

    @property
    def held_bytes(self) -> int:
        return sum(flight.held_bytes for flight in self.flights.values())


class Flight:
    """One request, from its arrival to the sending of its terminal reply.

    `emit`, `fail`, `attach` and `cancelled` may be used from any thread, the rest from the server's only.
    Tokens that wait are joined into one, so a slow reader costs text, not messages.
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
        self.watch: Callable[[], Stage | None] | None = None  # what it waits for, if the client asks
        self._ready = ready
        self._lock = threading.Lock()
        self._queued = False  # `ready` was called and `take` has not followed yet
        self._accepted: Accepted | None = None
        self._tokens: list[Token] = []
        self._terminal: Message | None = None
        self._begun = kind not in ("generate", "chat")  # the backend has it, and ends it when it is asked to
        self._closed = False
        self._cancel: CancelCall | None = None
        self._cancelled = False
        self._held_bytes = 0

    # --- the backend's side ------------------------------------------------------------------------------

    def emit(self, message: Message) -> None:
        """Add a reply. Ignored once there is a terminal one, or nobody who waits."""
        with self._lock:
            if self._closed:
                return
            match message:
                case Accepted():
                    self._accepted, self._begun = message, True
                case Token():
                    self._tokens.append(message)
                    self._held_bytes += _weight(message)
                case _:
                    self._terminal = message
                    self._closed = True
            notify, self._queued = not self._queued, True
        if notify:
            self._ready(self)

    def attach(self, cancel: CancelCall) -> None:
        """Say how to cancel; done at once if the request was cancelled meanwhile."""
        with self._lock:
            if not self._closed:
                self._cancel, self._begun = cancel, True
            cancelled = self._cancelled
        if cancelled:
            cancel()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    # --- the server's side -------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End the request early: its terminal reply still comes, from the backend if that has it already."""
        with self._lock:
            self._cancelled = True
            cancel, begun = self._cancel, self._begun
        if cancel is not None:
            cancel()
        elif not begun:  # its model may be packed for an hour
            self.emit(Error(code="cancelled", message="cancelled before it began"))

    def expire(self, now_s: float) -> None:
        """End the request if it is past its deadline and its model is not even loaded; else the backend does."""
        with self._lock:
            if self._begun or now_s < self.deadline_s:
                return
            self._cancelled = True
        usage = Usage(prompt_tokens=0, completion_tokens=0)
        self.emit(Done(finish_reason="deadline", usage=usage, timings=Timings()))

    def fail(self, error: Error) -> None:
        """End the request with `error` unless it has ended; tokens that nobody took are dropped."""
        with self._lock:
            self._tokens.clear()
            self._held_bytes = 0
        self.emit(error)
        self.cancel()

    def abandon(self) -> None:
        """Nobody waits any more: cancel, and take nothing further."""
        with self._lock:
            self._closed = True
            self._accepted, self._terminal = None, None
            self._tokens.clear()
            self._held_bytes = 0
        self.outgoing.clear()
        self.cancel()
        self._cancel = None

    def take(self) -> None:
        """Move what the mailbox holds to `outgoing`, at most three messages. Call when that is empty."""
        with self._lock:
            self._queued = False
            if self._accepted is not None:
                self.outgoing.append(self._accepted)
                self._accepted = None
            if self._tokens:
                self.outgoing.append(_join(self._tokens))
                self._tokens = []
                self._held_bytes = 0
            if self._terminal is not None:
                self.outgoing.append(self._terminal)
                self._terminal = None
                self._cancel = None  # it holds what holds `emit`: a ring that would keep a model in memory

    def sign_of_life(self, now_s: float, keepalive_s: float) -> Message | None:
        """What to send to a client that has heard nothing since `sent_s`, if it is time."""
        silent_s = now_s - self.sent_s
        seconds = round(now_s - self.arrived_s, 3)
        if self.watch is not None and silent_s >= STAGE_S and (stage := self.watch()) is not None:
            return msgspec.structs.replace(stage, seconds=seconds)
        return Waiting(seconds=seconds) if silent_s >= keepalive_s else None

    @property
    def held_bytes(self) -> int:
        """About what the mailbox costs."""
        return self._held_bytes


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
