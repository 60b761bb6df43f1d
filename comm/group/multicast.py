"""Whether multicast works, as mDNS needs it: a question is sent at an interface, and must be heard there again."""

from __future__ import annotations

import secrets
import selectors
import socket
import struct
import time
from collections.abc import Sequence

GROUP = "224.0.0.251"  # mDNS, RFC 6762
MDNS_PORT = 5353
HEAR_S = 0.6


def hears_itself(hosts: Sequence[str], seconds: float = HEAR_S) -> dict[str, str]:
    """For each numeric IPv4 address of this machine: why it does not hear what it sends, "" if it does."""
    found = dict.fromkeys(hosts, "what is sent is not heard")
    waiting: dict[socket.socket, tuple[str, bytes]] = {}
    with selectors.DefaultSelector() as selector:
        try:
            for host in hosts:
                try:
                    listening, question = _asked(host)
                except OSError as error:
                    found[host] = error.strerror or str(error)
                    continue
                waiting[listening] = host, question
                selector.register(listening, selectors.EVENT_READ)
            ends_s = time.monotonic() + seconds
            while (
                any(found[host] for host, _ in waiting.values()) and (left_s := ends_s - time.monotonic()) > 0
            ):
                for key, _ in selector.select(left_s):
                    assert isinstance(key.fileobj, socket.socket)
                    host, question = waiting[key.fileobj]
                    if key.fileobj.recv(4096) == question:
                        found[host] = ""
        except OSError as error:
            found |= {host: error.strerror or str(error) for host in hosts if found[host]}
        finally:
            for one in waiting:
                one.close()
    return found


def _asked(host: str) -> tuple[socket.socket, bytes]:
    """A socket that listens at `host`'s interface, and the question that was sent there. Raises OSError."""
    # For a service that nobody has, with an id that is nobody else's.
    name = b"\x06_shoal\x04_udp\x05local\x00"
    question = secrets.token_bytes(2) + struct.pack("!5H", 0, 1, 0, 0, 0) + name + struct.pack("!2H", 12, 1)
    listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("", MDNS_PORT))
        interface = socket.inet_aton(host)
        listening.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(GROUP) + interface)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
            sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
            sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
            sending.sendto(question, (GROUP, MDNS_PORT))
    except BaseException:
        listening.close()
        raise
    return listening, question
