"""One connection of a client, as the front keeps it."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from .zmtp_meter import ZmtpMeter


@dataclass(eq=False)
class Link:
    """One connection of a client. Only the front's thread touches the sockets; the server sets what it knows of the
    client: `used_s`, when it last sent a message, and `busy`, whether it has requests in flight."""

    client: socket.socket
    inner: socket.socket
    host: str
    opened_s: float
    meter: ZmtpMeter
    used_s: float = 0.0  # 0: it has not sent any
    busy: bool = False
    paused: bool = False  # nothing is read from it
    dropped: bool = False
    met: bool = False  # libzmq has accepted it
    to_client: bytes = b""  # read already, and not taken yet
    to_server: bytes = b""
    heard: int = 0  # weight of the messages that the server has taken
    ahead: bool = False  # it has sent more than that, and waits
    forwarded_s: float = 0.0
    begun_s: float = 0.0  # when its unfinished message began
    armed: dict[int, int] = field(default_factory=dict)  # what is waited for, per descriptor
