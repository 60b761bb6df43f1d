"""The server with clients that send rubbish, too many messages, or too large ones."""

from __future__ import annotations

import random
import socket
from dataclasses import replace

import pytest
from fakes.api_fakes import PATIENCE_S, QUICK, RawClient, alive, done, running

from shoal.client import Client
from shoal.comm import wire
from shoal.comm.messages import Cancel, Done, Error, Generate, Hello, Load, Loaded, Ping, Status, Token


@pytest.mark.parametrize(
    ("frames", "code", "request_id"),
    [
        ((b"shoal/1", b"sing", b"1", b"\x80"), "unknown_type", b"1"),
        ((b"shoal/1", b"generate", b"1", b"\xc1"), "bad_request", b"1"),
        ((b"shoal/1", b"ping", b"1", b"\x01"), "bad_request", b"1"),
        ((b"shoal/2", b"ping", b"1", b"\x80"), "version", b"1"),
        ((b"hello",), "bad_request", b"?"),
        ((b"",) * 30, "bad_request", b"?"),
    ],
)
def test_rubbish_is_answered_and_harms_nobody(daemon, raw, frames, code, request_id):
    raw.send_frames(*frames)
    assert raw.error(request_id).code == code
    assert alive(daemon)


def test_an_id_in_flight_cannot_be_used_again(daemon, raw):
    raw.send(Generate(prompt="manual"))
    run = daemon.backend.run("manual")
    raw.send(Generate(prompt="other"))
    error = raw.error()
    assert error.code == "bad_request"
    assert "already in flight" in error.message
    run.emit(Token(text="fine", ids=[1]))
    run.emit(done())
    assert raw.until(Token).text == "fine"
    raw.until(Done)
    assert "other" not in daemon.backend.runs


def test_too_many_requests_are_refused_but_can_be_cancelled(daemon):
    limits = replace(QUICK, requests_per_client=3, requests=5, clients=2)
    with running(limits=limits) as small:
        a, b, c = (RawClient(small.address) for _ in range(3))
        with a, b, c:
            for n in range(4):
                a.send(Generate(prompt=f"manual a{n}"), b"%d" % n)
            assert "requests_per_client: 3" in a.error(b"3").message
            for n in range(3):
                b.send(Generate(prompt=f"manual b{n}"), b"%d" % n)
            error = b.error(b"2")
            assert (error.code, error.retry_after_s) == ("busy", 1.0)
            assert "requests: 5" in error.message
            for n in range(3):
                a.send(Cancel(target=(b"%d" % n).hex()), b"c")
                a.until(Done, b"%d" % n)
            a.send(Generate(prompt="manual again"), b"9")
            small.backend.run("manual again")
            c.send(Generate(prompt="x"))
            assert "clients: 2" in c.error().message


def test_the_bytes_of_waiting_requests_are_bounded():
    with (
        running(limits=replace(QUICK, workers=1, pending_bytes=1000)) as small,
        RawClient(small.address) as raw,
    ):
        raw.send(Load(model="slow"), b"0")
        assert small.backend.loading.wait(PATIENCE_S)
        raw.send(Load(model="x" * 800), b"1")
        raw.send(Load(model="x" * 800), b"2")
        assert "too many bytes" in raw.error(b"2").message
        small.backend.release_load.set()
        raw.until(Loaded, b"1")


def test_an_oversized_message_costs_its_sender_the_connection_only():
    with running(limits=replace(QUICK, message_bytes=10_000)) as small:
        with RawClient(small.address) as raw:
            raw.send(Generate(prompt="x" * 5000))
            raw.until(Done)
            raw.send(Generate(prompt="x" * 20_000))
        assert alive(small)


def test_bytes_that_are_not_zeromq_harm_nobody(daemon):
    host, port = daemon.address.removeprefix("tcp://").split(":")
    random_ = random.Random(3)
    for start in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 48,
        b"\x16\x03\x01",
    ):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as stranger:
            stranger.sendall(start + random_.randbytes(1000))
            assert alive(daemon)


def test_two_thousand_fuzzed_messages(daemon):
    random_ = random.Random(11)
    seeds = [
        wire.encode(message, b"1")
        for message in (
            Generate(prompt="a b"),
            Cancel(target="31"),
            Ping(),
            Hello(),
            Load(model="m"),
            Status(),
        )
    ]
    clients = [RawClient(daemon.address) for _ in range(4)]
    with Client(daemon.address, timeout_s=PATIENCE_S) as probe:
        for n in range(2000):
            frames = [bytearray(frame) for frame in random_.choice(seeds)]
            for _ in range(random_.randrange(1, 6)):
                frame = random_.choice(frames)
                if random_.random() < 0.1:
                    frames.insert(random_.randrange(len(frames)), bytearray(random_.randbytes(20)))
                elif frame and random_.random() < 0.2:
                    del frame[random_.randrange(len(frame)) :]
                elif frame:
                    frame[random_.randrange(len(frame))] = random_.randrange(256)
            client = random_.choice(clients)
            client.send_frames(*map(bytes, frames))
            while client.socket.poll(0):
                wire.split(client.socket.recv_multipart(), wire.MAX_REPLY_BYTES)
            if n % 250 == 0:
                assert probe.text("still fine")[0] == "still fine "
        assert probe.text("to the end")[0] == "to the end "
    for client in clients:
        client.close()


def test_a_backend_bug_is_internal_and_told_without_details(daemon, raw):
    raw.send(Generate(prompt="crash"))
    error = raw.error()
    assert (error.code, "a bug" in error.message) == ("internal", False)
    assert alive(daemon)


def test_a_reply_that_cannot_be_encoded_is_internal(daemon, raw):
    raw.send(Generate(prompt="manual"))
    run = daemon.backend.run("manual")
    run.emit(Error(code="internal", message="too long a time", retry_after_s=1 << 80))
    assert raw.error().message == "the reply cannot be sent"
