"""Heads on the local network: what is announced is found, and what anybody may have announced does no harm."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time

import pytest
from fakes.group.nodes import begun_threads

from shoal.comm.group.discovery import (
    FINGERPRINT_DIGITS,
    MAX_HEADS,
    SERVICE,
    Announcement,
    FoundHead,
    addresses_of,
    described,
    find_heads,
    read_head,
)
from shoal.comm.group.group_protocol import Speaks
from shoal.comm.group.multicast import GROUPS, MDNS_PORT, hears_itself
from shoal.comm.group.peers import MAX_ADDRESSES

LOOPBACK = ["127.0.0.1"]
LO = {"127.0.0.1": "lo"}
# What is announced on loopback, other processes hear that run these tests just now.
DIGITS, OTHER = (os.urandom(FINGERPRINT_DIGITS // 2).hex() for _ in range(2))
HEAD = FoundHead("pi3", DIGITS * 4, (("192.0.2.5", 7447), ("2001:db8::5", 7447)), Speaks(1, 3))
SHORT = FoundHead("pi3", DIGITS, HEAD.addresses, HEAD.speaks)


def test_what_is_announced_can_be_read() -> None:
    info = described(HEAD)
    assert info.type == SERVICE
    assert read_head(info.port, info.parsed_scoped_addresses(), info.properties) == SHORT


@pytest.mark.parametrize("name", ["", "x" * 64, "a.b", "π" * 64, "-"])
def test_any_name_can_be_announced(name: str) -> None:
    info = described(FoundHead(name, "cd" * 32, HEAD.addresses))
    found = read_head(info.port, info.parsed_scoped_addresses(), info.properties)
    assert found is not None
    assert found.addresses == HEAD.addresses


NOWHERE = [
    *("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"),
    *("0.0.0.0", "0.1.2.3", "::", "224.0.0.251", "ff02::fb", "255.255.255.255", "240.0.0.1"),
    *("fe80::1", "fe80::1%eth0", "::ffff:224.0.0.1"),
    *("", "localhost", "evil.example", "1.2.3", "1" * 5000, "192.0.2.5\n", "192.0.2.5:80", "%", "::%x" * 9),
]


@pytest.mark.parametrize("host", NOWHERE)
def test_addresses_that_lead_to_no_other_machine_are_not_asked(host: str) -> None:
    assert read_head(7447, [host], {}) is None
    found = read_head(7447, [host, "192.0.2.5"], {})
    assert found is not None
    assert found.addresses == (("192.0.2.5", 7447),)


@pytest.mark.parametrize("port", [None, 0, -1, 65536, 1 << 40])
def test_ports_that_are_none(port: int | None) -> None:
    assert read_head(port, ["192.0.2.5"], {}) is None


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {b"name": None, b"fp": None, b"oldest": None, b"newest": None},
        {b"name": b"\xff\xfe\x1b[2J" * 100, b"fp": b"\xff" * 300, b"oldest": b"-1", b"newest": b"9" * 100},
        {b"name": b"\n\n", b"fp": b"ab" * 7 + b"\n", b"oldest": "٣".encode(), b"newest": b"1e9"},
        {b"name": b"", b"fp": b"AB" * 8, b"oldest": b"0x1", b"newest": b" 1"},
        {bytes([number % 256]) * 9: b"x" * 255 for number in range(1000)},
    ],
)
def test_texts_that_mean_nothing(properties: dict[bytes, bytes | None]) -> None:
    found = read_head(7447, ["192.0.2.5"], properties)
    assert found is not None
    assert found.fingerprint == ""
    assert found.speaks == Speaks(1, 1)
    assert found.name.isascii()
    assert found.name.isprintable()
    assert len(found.name) <= 64


def test_one_head_may_not_crowd_out_others() -> None:
    many = [f"10.0.{number // 250}.{number % 250}" for number in range(1, 900)]
    greedy = read_head(7447, many, {})
    assert greedy is not None
    assert len(greedy.addresses) == MAX_ADDRESSES
    both = addresses_of([greedy, HEAD, greedy])
    assert both[:4] == [greedy.addresses[0], HEAD.addresses[0], greedy.addresses[1], HEAD.addresses[1]]
    assert len(both) == len(set(both))
    assert MAX_HEADS * MAX_ADDRESSES < 1000


def multicast_on_loopback() -> bool:
    return hears_itself(LO) == {"127.0.0.1": ""}


loopback = pytest.mark.skipif(not multicast_on_loopback(), reason="no multicast on loopback")


@loopback
def test_a_head_is_found_until_it_goes() -> None:
    left = begun_threads()
    other = FoundHead("pi3", OTHER * 4, (("192.0.2.6", 7448),))  # of the same name
    said = [Announcement(head, LOOPBACK) for head in (HEAD, other)]
    try:
        found = {head.fingerprint: head for head in find_heads(LOOPBACK)}
        assert found[DIGITS] == SHORT
        assert found[OTHER].addresses == other.addresses
    finally:
        for one in said:
            one.close()
    assert not {DIGITS, OTHER} & {head.fingerprint for head in find_heads(LOOPBACK, 1.5)}
    assert not left()


@pytest.mark.parametrize("hosts", [[], ["192.0.2.77"], ["192.0.2.77", "2001:db8::77"]])
def test_machines_without_multicast(hosts: list[str]) -> None:
    """No interface, or one that has gone."""
    with pytest.raises(OSError, match=r".+"):
        Announcement(HEAD, hosts)
    with pytest.raises(OSError, match=r".+"):
        find_heads(hosts, 0.1)


def test_a_port_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    assert hears_itself(LO) == {"127.0.0.1": "Address already in use"}
    with pytest.raises(OSError, match="in use"):
        find_heads(LOOPBACK, 0.1)


def test_an_interface_that_is_not_there_has_no_multicast() -> None:
    assert hears_itself({}) == {}
    nowhere = {"192.0.2.77": "lo", "2001:db8::77": "no-such"}
    assert all(hears_itself(nowhere).values())


def test_nobody_else_imports_the_library() -> None:
    look = "import sys, shoal.daemon.service, shoal.cli.cluster, shoal.cli.doctor; print('zeroconf' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


@loopback
def test_one_that_is_looked_for_is_found_among_many_others() -> None:
    """They answer sooner, and more often."""
    from zeroconf import DNSOutgoing, DNSPointer, DNSService, DNSText, const

    out = DNSOutgoing(const._FLAGS_QR_RESPONSE | const._FLAGS_AA)
    for number in range(2 * MAX_HEADS):
        name = f"x{number}.{SERVICE}"
        out.add_answer_at_time(DNSPointer(SERVICE, 12, 1, 4500, name), 0)
        out.add_answer_at_time(DNSService(name, 33, 1, 4500, 0, 0, 7447, "h.local."), 0)
        out.add_answer_at_time(DNSText(name, 16, 1, 4500, b"\x05fp=ab"), 0)
    stop = threading.Event()

    def shout() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
            sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            while not stop.wait(0.02):
                for packet in out.packets():
                    sending.sendto(packet, (GROUPS[socket.AF_INET], MDNS_PORT))

    said = Announcement(HEAD, LOOPBACK)
    shouting = threading.Thread(target=shout)
    shouting.start()
    try:
        assert find_heads(LOOPBACK, 1.5, HEAD.fingerprint) == [SHORT]
    finally:
        stop.set()
        shouting.join()
        said.close()


@loopback
def test_who_answers_too_much_is_bounded() -> None:
    """Services by the thousand, and packets that are none, from somebody else on the network."""
    from zeroconf import DNSOutgoing, DNSPointer, DNSService, DNSText, const

    stop = threading.Event()

    def shout() -> None:
        source = random.Random(1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
            sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            number = 0
            while not stop.wait(0.002):
                out = DNSOutgoing(const._FLAGS_QR_RESPONSE | const._FLAGS_AA)
                for number in range(number, number + 4):  # noqa: B020
                    name = f"x{number}.{SERVICE}"
                    out.add_answer_at_time(DNSPointer(SERVICE, 12, 1, 4500, name), 0)
                    out.add_answer_at_time(DNSService(name, 33, 1, 4500, 0, 0, 7447, "h.local."), 0)
                    out.add_answer_at_time(DNSText(name, 16, 1, 4500, source.randbytes(40)), 0)
                number += 1
                packet = bytearray(out.packets()[0])
                sending.sendto(packet, (GROUPS[socket.AF_INET], MDNS_PORT))
                for _ in range(8):
                    packet[source.randrange(len(packet))] = source.randrange(256)
                sending.sendto(packet, (GROUPS[socket.AF_INET], MDNS_PORT))

    left = begun_threads()
    shouting = threading.Thread(target=shout)
    shouting.start()
    try:
        began_s = time.monotonic()
        assert len(find_heads(LOOPBACK, 2.0)) <= MAX_HEADS
        assert time.monotonic() - began_s < 4
        said = Announcement(HEAD, LOOPBACK)
        said.close()
    finally:
        stop.set()
        shouting.join()
    assert not left()
