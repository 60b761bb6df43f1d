"""A client's socket: its options, and what the socket's monitor says about the connection.

Knows ZeroMQ's options and events. Does not know messages, nor whether the caller waits or awaits.
"""

from __future__ import annotations

import sys
from typing import Any

import zmq

from shoal.comm import endpoint, wire
from shoal.comm.curve_keys import ClientKeys
from shoal.comm.errors import CommError, NoDaemon, TimedOut

# For the handshake, which threads answer that compute nothing; where nobody listens it fails at once.
CONNECT_S = 3.0
HELLO_S = 10.0  # for the reply to `hello`, which comes from the daemon's server thread
HEARTBEAT_MS = 10_000  # three of these are the silence after which a daemon counts as dead anyway
NEVER_MS = 1_000_000_000  # nobody keeps a connection that has dropped for so long
LINGER_MS = 200  # so that a last `cancel` is still sent
VERDICTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
)
START_HINT = "start one with: shoal serve"


def connect(dealer: zmq.Socket[Any], address: str, keys: ClientKeys | None) -> None:
    """Set the socket up and begin to connect. AddressError when the address is refused."""
    dealer.linger = LINGER_MS
    dealer.maxmsgsize = wire.MAX_REPLY_BYTES
    # When the connection drops the daemon forgets our requests, so reconnecting silently would be no use. To forbid it
    # (-1) would be worse: libzmq then drops what has come and was not read, such as the last reply of a daemon that
    # stops (reconnect, send_term_endpoint, pipe_t::terminate without delay).
    dealer.reconnect_ivl = NEVER_MS
    endpoint.set_heartbeat(dealer, HEARTBEAT_MS)
    endpoint.connect(dealer, address, keys)


def verdict(monitor_frames: list[bytes], address: str) -> CommError | None:
    """What a monitor event in VERDICTS means: None when connected, else why there is no connection."""
    # Frame 0 is uint16 event, uint32 value, in machine order (zmq_socket_monitor(3)). pyzmq's own parser
    # imports asyncio.
    match int.from_bytes(monitor_frames[0][:2], sys.byteorder):
        case zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return None
        case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return NoDaemon(
                f"the daemon at {address} does not know this client's key; have it authorised there"
            )
        case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return NoDaemon(f"handshake with {address} failed: wrong or missing keys, or no Shoal daemon")
        case zmq.EVENT_CLOSED:
            return nobody(address)
        case _:
            return gone(address)


def gone(address: str) -> NoDaemon:
    return NoDaemon(f"the daemon at {address} closed the connection")


def nobody(address: str) -> NoDaemon:
    return NoDaemon(f"no daemon answers at {address} ({START_HINT})")


def full(address: str) -> TimedOut:
    return TimedOut(f"the daemon at {address} takes no more requests")


def silent(address: str, timeout_s: float) -> TimedOut:
    return TimedOut(f"the daemon at {address} has been silent for {timeout_s:g} s")
