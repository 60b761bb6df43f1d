"""What stands in for the front where the system is not Linux: ZeroMQ listens itself.

Then nothing bounds connections, and nobody can be closed or is read from more slowly. Knows ZeroMQ's options. Does not
know connections.
"""

from __future__ import annotations

import socket
from typing import Any

import zmq

from shoal.comm import endpoint

from .front import Front
from .front_link import Link
from .limits import ServerLimits

QUEUE_MESSAGES = 16  # of up to `message_bytes`, per client


class NoFront(Front):
    """A front that has no connections, so that `heard`, `pause` and `drop` are never called."""

    def __init__(self, limits: ServerLimits) -> None:
        self._heartbeat_s = limits.heartbeat_s

    def add(self, public: socket.socket, router: zmq.Socket[Any]) -> None:
        """Have `router` listen at a public socket, which is then libzmq's."""
        router.rcvhwm = QUEUE_MESSAGES
        router.tcp_keepalive = 1  # a host that vanished without closing is noticed
        router.tcp_keepalive_idle = router.tcp_keepalive_intvl = max(1, round(self._heartbeat_s))
        address = endpoint.address_of(public)
        router.setsockopt(zmq.USE_FD, public.detach())
        router.bind(address)

    def start(self) -> None:
        """Nothing to do."""

    def admit_no_more(self) -> None:
        """Nothing to do: libzmq accepts until its sockets are closed."""

    def close(self) -> None:
        """Nothing to do: libzmq closes what it listens at."""

    def link(self, descriptor: int) -> Link | None:
        return None
