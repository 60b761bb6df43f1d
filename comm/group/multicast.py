"""Whether multicast works, as mDNS needs it: a question is sent at an interface, and must be heard there again."""

from __future__ import annotations

import secrets
import selectors
import socket
import struct
import time
from collections.abc import Mapping

GROUPS = {socket.AF_INET: "224.0.0.251", socket.AF_INET6: "ff02::fb"}  # of mDNS, RFC 6762
MDNS_PORT = 5353
HEAR_S = 0.6


def hears_itself(places: Mapping[str, str]) -> dict[str, str]:
    """places: numeric addresses of this machine → their interfaces. For each why what is sent there is not heard, "" if
    it is."""
    found = dict.fromkeys(places, "what is sent is not heard")
    waiting: dict[socket.socket, tuple[str, bytes]] = {}
    with selectors.DefaultSelector() as selector:
        try:
            for host, interface in places.items():
                try:
                    listening, question = _asked(host, interface)
                except OSError as error:
                    found[host] = error.strerror or str(error)
                    continue
                waiting[listening] = host, question
                selector.register(listening, selectors.EVENT_READ)
            ends_s = time.monotonic() + HEAR_S
            while (
                any(found[host] for host, _ in waiting.values()) and (left_s := ends_s - time.monotonic()) > 0
            ):
                for key, _ in selector.select(left_s):
                    assert isinstance(key.fileobj, socket.socket)
                    host, question = waiting[key.fileobj]
                    if key.fileobj.recv(4096) == question:
                        found[host] = ""
        except OSError as error:
            found |= {host: error.strerror or str(error) for host in places if found[host]}
        finally:
            for one in waiting:
                one.close()
    return found


def _asked(host: str, interface: str) -> tuple[socket.socket, bytes]:
    """A socket that listens at that interface, and the question that was sent there. Raises OSError."""
    # For a service that nobody has, with an id that is nobody else's.
    name = b"\x06_shoal\x04_udp\x05local\x00"
    question = secrets.token_bytes(2) + struct.pack("!5H", 0, 1, 0, 0, 0) + name + struct.pack("!2H", 12, 1)
    six = ":" in host
    family, level = (socket.AF_INET6, socket.IPPROTO_IPV6) if six else (socket.AF_INET, socket.IPPROTO_IP)
    group = GROUPS[family]
    index = struct.pack("@I", socket.if_nametoindex(interface)) if six else socket.inet_aton(host)
    listening = socket.socket(family, socket.SOCK_DGRAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if six:
            listening.setsockopt(level, socket.IPV6_V6ONLY, 1)
        listening.bind(("", MDNS_PORT))
        join = socket.IPV6_JOIN_GROUP if six else socket.IP_ADD_MEMBERSHIP
        listening.setsockopt(level, join, socket.inet_pton(family, group) + index)
        with socket.socket(family, socket.SOCK_DGRAM) as sending:
            sending.setsockopt(level, socket.IPV6_MULTICAST_IF if six else socket.IP_MULTICAST_IF, index)
            sending.setsockopt(level, socket.IPV6_MULTICAST_LOOP if six else socket.IP_MULTICAST_LOOP, 1)
            sending.setsockopt(level, socket.IPV6_MULTICAST_HOPS if six else socket.IP_MULTICAST_TTL, 1)
            sending.sendto(question, (group, MDNS_PORT))
    except BaseException:
        listening.close()
        raise
    return listening, question
