"""ZMTP spoken by hand, so that a test decides about every byte and when to read."""

from __future__ import annotations

import socket

from shoal.comm import wire
from shoal.comm.messages import Message

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_READY = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
HANDSHAKE = GREETING + bytes([4, len(_READY)]) + _READY


def frames(*contents: bytes, more: bool = False) -> bytes:
    """The bytes of a message; with `more`, of the beginning of one."""
    out = b""
    for number, content in enumerate(contents):
        flag = int(more or number < len(contents) - 1)
        size = len(content)
        out += bytes([flag, size]) if size < 256 else bytes([flag | 2]) + size.to_bytes(8, "big")
        out += content
    return out


def message(body: Message, request_id: bytes) -> bytes:
    return frames(*wire.encode(body, request_id))


def stranger(address: str) -> socket.socket:
    """A connection that has said nothing."""
    if address.startswith("ipc://"):
        end = socket.socket(socket.AF_UNIX)
        end.settimeout(20)
        end.connect(address.removeprefix("ipc://"))
        return end
    host, port = address.removeprefix("tcp://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def acquainted(address: str) -> socket.socket:
    """A connection that may send messages: libzmq wants to have sent its own READY before."""
    end = stranger(address)
    end.sendall(HANDSHAKE)
    receive(end, len(GREETING))
    receive(end, receive(end, 2)[1])
    return end


def receive(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = end.recv(size - len(data))
        assert more, "the connection was closed"
        data += more
    return data


def send_all_it_takes(end: socket.socket, data: bytes, patience_s: float) -> int:
    """Send `data` again and again, until nothing has been taken for so long or the other side closes. → bytes sent"""
    end.settimeout(patience_s)
    sent = at = 0
    try:
        while True:
            count = end.send(data[at:])
            sent += count
            at = (at + count) % len(data)
    except OSError:
        return sent
