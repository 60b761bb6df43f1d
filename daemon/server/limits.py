"""The limits of one server, and the `welcome` that tells them to clients.

Knows numbers. Does not know who enforces them.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace

from shoal.comm import wire
from shoal.comm.messages import FEATURES, PROTOCOL_VERSION, Error, Hello, Welcome

from .descriptors import left_for_clients

LINK_DESCRIPTORS = 3  # of a connection: the client's, and both ends of that between the front and libzmq


@dataclass(frozen=True)
class ServerLimits:
    """Counts, sizes in bytes (`_bytes`) and times in seconds (`_s`)."""

    message_bytes: int = wire.MAX_REQUEST_BYTES
    requests: int = 1024  # in flight, all clients together
    requests_per_client: int = 64
    clients: int = 256  # with requests in flight
    connections: int = 1024  # where the process may have as many descriptors
    unfinished_bytes: int = 64 << 20  # of messages whose end has not come
    pending_bytes: int = 256 << 20  # request bodies that wait for a worker
    workers: int = 8
    queue_messages: int = 64  # per client within ZeroMQ; tokens are joined behind it
    outbox_bytes: int = 1 << 20  # joined tokens held for a client that does not read
    outbox_s: float = 30.0  # a client that has read nothing for this long loses its requests
    keepalive_s: float = 2.0  # silence on a request after which `waiting` is sent
    handshake_s: float = 5.0  # that a connection has to say what it is
    heartbeat_s: float = 5.0  # between probes of a silent host; one that misses two of them is dead
    drain_s: float = 30.0  # that running requests have after the first SIGTERM
    farewell_s: float = 1.0  # that the last replies have to be sent

    def within(self, descriptors: int) -> ServerLimits:
        """These limits for a process with so many descriptors. At most half of the connections may have requests in
        flight, so that there always are some whose place another can have."""
        connections = min(self.connections, max(4, left_for_clients(descriptors) // LINK_DESCRIPTORS))
        return replace(self, connections=connections, clients=min(self.clients, connections // 2))

    def welcome(self, hello: Hello) -> Welcome | Error:
        """The reply to `hello`: the limits and features, or an error when there is no common version."""
        if not hello.min_version <= PROTOCOL_VERSION <= hello.max_version:
            asked = f"{hello.min_version} to {hello.max_version}"
            return Error(
                code="version", message=f"protocol versions {asked}: this daemon speaks {PROTOCOL_VERSION}"
            )
        return Welcome(
            version=PROTOCOL_VERSION,
            server=f"shoal {importlib.metadata.version('shoal')}",
            features=sorted(FEATURES),
            limits={
                "message_bytes": self.message_bytes,
                "requests": self.requests,
                "requests_per_client": self.requests_per_client,
                "clients": self.clients,
                "keepalive_ms": int(1000 * self.keepalive_s),
            },
        )
