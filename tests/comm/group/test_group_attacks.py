"""Rubbish at the port of a group: nothing is accepted, nothing crashes, and nothing of it stays."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
import time
from collections import Counter

import msgspec
import psutil
import pytest
from fakes.group.nodes import Machine, back_to, footprint, paired, tls

from shoal.comm.group import listener as listening
from shoal.comm.group.channel import Channel, channel_pair
from shoal.comm.group.errors import ChannelError, GroupError
from shoal.comm.group.greeting import welcome
from shoal.comm.group.group_protocol import Opening, Speaks
from shoal.comm.group.pairing import Claim, admit
from shoal.comm.group.streams import SocketStream, TlsStream
from shoal.comm.group.tls import client_context, stranger_context

ATTEMPTS = 600  # connections
FRAMES = 2000
SECURED = 200  # connections over TLS, with three frames each; others are read without it, which is faster


@pytest.fixture
def machines(tmp_path) -> tuple[Machine, Machine]:
    return paired(tmp_path)


def hello_of_tls(context: ssl.SSLContext) -> bytes:
    """What a client of TLS says first."""
    arrived, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(arrived, leaving).do_handshake()
    return leaving.read()


def rubbish(chance: random.Random, hello: bytes) -> bytes:
    """What scanners, fuzzers and lost programs send."""
    damaged = bytearray(hello)
    for _ in range(chance.randint(1, 8)):
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    return chance.choice(
        [
            b"",
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x00",
            b"SSH-2.0-scan\r\n",
            chance.randbytes(chance.randint(1, 4000)),
            bytes(damaged),
            hello[: chance.randrange(len(hello))],
            hello + chance.randbytes(chance.randint(1, 300)),
            b"\x16\x03\x01\xff\xff" + chance.randbytes(100),
            hello * 3,
        ]
    )


def settled(listener: listening.GroupListener) -> None:
    """Wait until whoever came is gone."""
    deadline = time.monotonic() + 10
    while listener._newcomers and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not listener._newcomers


def still_serves(head: Machine, worker: Machine, listener: listening.GroupListener) -> None:
    with worker.dial(head, listener.addresses) as at_worker, listener.accept(5) as at_head:
        at_worker.send(b"well")
        assert at_head.receive_exactly(4, 5) == b"well"


def test_rubbish_on_the_port_leaves_nothing(machines):
    head, worker = machines
    chance = random.Random(1)
    hello = hello_of_tls(stranger_context())

    def attack(count: int, address) -> None:
        for _ in range(count):
            with socket.create_connection(address, timeout=5) as connection, contextlib.suppress(OSError):
                connection.sendall(rubbish(chance, hello))
                if chance.random() < 0.3:
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(4096)

    with head.listening() as listener:
        # What an allocator and OpenSSL keep for themselves, they have now.
        attack(ATTEMPTS // 6, listener.addresses[0])
        settled(listener)
        before, resident = footprint(), psutil.Process().memory_info().rss
        attack(ATTEMPTS, listener.addresses[0])
        settled(listener)
        assert back_to(before)
        assert psutil.Process().memory_info().rss - resident < 8 << 20
        assert listener.accept(0) is None
        still_serves(head, worker, listener)


def frames(chance: random.Random) -> list[bytes]:
    """Of the first words and of pairing: right ones, altered ones, random ones."""
    right = [
        msgspec.msgpack.encode(Opening(chance.choice(["pair", "control", "data"]), Speaks())),
        msgspec.msgpack.encode(Claim(chance.randbytes(32), chance.randbytes(300), "x")),
        b"\x82\xa4type\xa5proof\xa4hmac\xc4\x20" + chance.randbytes(32),
    ]
    out = []
    for body in right:
        altered = bytearray(body)
        if chance.random() < 0.5:
            altered[chance.randrange(len(altered))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.2:
            altered = bytearray(chance.randbytes(chance.randint(0, 60)))
        length = len(altered) if chance.random() < 0.9 else chance.randrange(1 << 32)
        out.append(length.to_bytes(4, "little") + altered)
    chance.shuffle(out)
    return out if chance.random() < 0.3 else sorted(out, key=len)


def test_fuzzed_frames_over_tls(machines):
    """Of strangers and of a paired node, where the first words and pairing are read. Nobody is paired by them."""
    head, worker = machines
    chance = random.Random(2)
    contexts = [stranger_context(), client_context(worker.identity, head.identity.certificate)]
    head.codes.new()

    def attack(count: int) -> None:
        for number in range(count):
            with contextlib.suppress(GroupError), tls(listener.addresses[0], contexts[number % 2]) as channel:
                for frame in frames(chance):
                    channel.send(frame)
                channel.receive_exactly(1000, 0.0 if chance.random() < 0.9 else 0.05)
            while (channel := listener.accept(0)) is not None:
                assert channel.peer == worker.fingerprint
                with channel, contextlib.suppress(ChannelError):
                    channel.receive_message(Opening, 0.01, 4096)

    with head.listening() as listener:
        attack(SECURED // 5)
        settled(listener)
        before, resident = footprint(), psutil.Process().memory_info().rss
        attack(SECURED)
        settled(listener)
        while (channel := listener.accept(0)) is not None:
            channel.close()
        assert back_to(before)
        assert psutil.Process().memory_info().rss - resident < 8 << 20
        assert [peer.name for peer in head.peers.listed()] == ["worker"]
        still_serves(head, worker, listener)


@pytest.mark.parametrize("peer", [None, "0" * 64])
def test_fuzzed_frames(machines, peer):
    """The same frames to the functions that read them: whatever comes, they raise errors of a group."""
    head, _ = machines
    chance = random.Random(4)
    head.codes.new()
    outcomes: Counter[str] = Counter()
    before = footprint()
    for _ in range(FRAMES // 6):
        one, other = channel_pair()
        other.peer = peer
        with one, other:
            for frame in frames(chance):
                one.send(frame)
            one._stream._socket.shutdown(socket.SHUT_WR)
            try:
                welcome(other, Speaks(), time.monotonic() + 5)
                if other.purpose == "pair":
                    admit(other, head.identity, head.peers, head.codes)
                outcomes["welcome"] += 1
            except GroupError as error:
                outcomes[type(error).__name__] += 1
    assert back_to(before)
    assert [peer.name for peer in head.peers.listed()] == ["worker"]
    assert outcomes["ChannelError"] > FRAMES // 20
    assert bool(outcomes["welcome"]) == (peer is not None)


def test_who_opens_connections_and_says_nothing_keeps_nobody_out(machines):
    head, worker = machines
    before = footprint()
    with head.listening() as listener, contextlib.ExitStack() as stack:
        mute = [stack.enter_context(socket.create_connection(listener.addresses[0])) for _ in range(100)]
        assert len(listener._newcomers) <= 2 * listening.MAX_NEWCOMERS
        still_serves(head, worker, listener)
        assert len([one for one in mute if closed(one)]) >= 100 - listening.MAX_NEWCOMERS - 1
    assert back_to(before)


def closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_of_two_addresses_the_one_with_most_connections_loses_its_place(machines):
    head, _ = machines
    with head.listening() as listener, contextlib.ExitStack() as stack:

        def opened(source: str) -> socket.socket:
            address = listener.addresses[0]
            return stack.enter_context(socket.create_connection(address, source_address=(source, 0)))

        try:
            honest = opened("127.0.0.2")
        except OSError:
            pytest.skip("this system has one loopback address")
        for _ in range(3 * listening.MAX_NEWCOMERS):
            opened("127.0.0.3")
        deadline = time.monotonic() + 5
        while len(listener._newcomers) > listening.MAX_NEWCOMERS and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not closed(honest)


def test_bytes_that_come_one_at_a_time_do_not_lengthen_the_five_seconds(machines, monkeypatch):
    """In the handshake, and in the first words after it."""
    head, worker = machines
    monkeypatch.setattr(listening, "HANDSHAKE_S", 0.3)
    hello = hello_of_tls(stranger_context())
    with head.listening() as listener:
        with socket.create_connection(listener.addresses[0]) as slow:
            assert dripped(slow.send, hello, lambda: closed(slow)) < 4
        with tls(
            listener.addresses[0], client_context(worker.identity, head.identity.certificate)
        ) as channel:
            assert dripped(channel.send, b"\x00\x04\x00\x00" + bytes(1024), lambda: ended(channel)) < 4
        settled(listener)


def dripped(send, data: bytes, over) -> float:
    """Seconds until the other side had enough."""
    started = time.monotonic()
    with contextlib.suppress(OSError, ChannelError):
        for place in range(len(data)):
            send(data[place : place + 1])
            time.sleep(0.01)
            if over() or time.monotonic() - started > 5:
                break
    return time.monotonic() - started


def ended(channel: Channel) -> bool:
    with contextlib.suppress(ChannelError):
        channel.receive_exactly(1, 0)
    return channel.closed


def test_no_descriptors_are_no_end(machines, monkeypatch):
    """Accepting fails for a while, as it does when a process has all the descriptors it may have."""
    head, worker = machines
    failures = iter([OSError(24, "Too many open files")] * 3)
    with head.listening() as listener:

        class Exhausted:
            def __init__(self, inner: socket.socket) -> None:
                self.inner = inner

            def accept(self):
                for error in failures:
                    raise error
                return self.inner.accept()

        take = listener._take
        monkeypatch.setattr(listener, "_take", lambda one: take(Exhausted(one)))
        monkeypatch.setattr(listening, "REST_S", 0.01)
        still_serves(head, worker, listener)


def test_a_paired_node_cannot_open_channels_without_end(machines, monkeypatch):
    head, worker = machines
    monkeypatch.setattr("shoal.comm.group.peers.MAX_CHANNELS", 3)
    with head.listening() as listener, contextlib.ExitStack() as stack:
        greedy = client_context(worker.identity, head.identity.certificate)
        for _ in range(3):
            channel = stack.enter_context(tls(listener.addresses[0], greedy))
            channel.send_message(Opening("data", Speaks()))
            stack.enter_context(listener.accept(5))
        monkeypatch.setattr(worker.peers, "hold", lambda *_: None)
        with pytest.raises(ChannelError, match="too many channels"):
            worker.dial(head, listener.addresses)


def test_a_server_that_sends_rubbish(machines):
    head, worker = machines
    chance = random.Random(3)
    hello = hello_of_tls(stranger_context())
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(60):
                connected, _ = server.accept()
                with connected, contextlib.suppress(OSError):
                    connected.settimeout(5)
                    connected.recv(65536)
                    connected.sendall(rubbish(chance, hello))

        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(60):
            with pytest.raises(GroupError):
                worker.dial(head, (server.getsockname(),), timeout_s=2)
        thread.join(5)


def test_bytes_altered_on_the_way_are_noticed(machines):
    """Any byte, after the handshake: TLS ends the channel."""
    head, worker = machines
    left, right = socket.socketpair()
    near, far = socket.socketpair()
    context = client_context(worker.identity, head.identity.certificate)
    with head.listening() as listener:
        at_head = TlsStream(SocketStream(right), listener._server_context(), server_side=True)
        at_worker = TlsStream(SocketStream(near), context, server_side=False)

        def carry(source: socket.socket, sink: socket.socket, alter: bool) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    if alter and altering.is_set():
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    sink.sendall(data)

        altering = threading.Event()
        carriers = [
            threading.Thread(target=carry, args=ends, daemon=True)
            for ends in ((far, left, True), (left, far, False))
        ]
        for carrier in carriers:
            carrier.start()
        shaking = threading.Thread(target=at_head.handshake, args=(time.monotonic() + 5,))
        shaking.start()
        at_worker.handshake(time.monotonic() + 5)
        shaking.join(5)
        with Channel(at_head) as one, Channel(at_worker) as other:
            other.send(b"good")
            assert one.receive_exactly(4, 5) == b"good"
            altering.set()
            other.send(b"evil")
            with pytest.raises(ChannelError, match="TLS failed"):
                one.receive_exactly(4, 5)
        for end in (left, far):
            end.shutdown(socket.SHUT_RDWR)
        for carrier in carriers:
            carrier.join(5)
        for end in (left, far):
            end.close()
