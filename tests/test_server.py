"""The server with a scripted backend: many clients, bad clients, absent clients, and ends."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from api_fakes import PATIENCE_S, QUICK, FakeBackend, RawClient, RunningServer, done, ipc, running

from shoal.comm import wire
from shoal.comm.errors import NoDaemon, RequestFailed
from shoal.comm.keys import KeyRing
from shoal.comm.messages import (
    STREAMING,
    TYPE_NAMES,
    Accepted,
    Cancel,
    Done,
    Error,
    Generate,
    Hello,
    Load,
    Loaded,
    Ok,
    Ping,
    Pong,
    Status,
    StatusReply,
    Token,
    Waiting,
    Welcome,
)
from shoal.daemon.client import Client
from shoal.daemon.errors import DaemonError
from shoal.daemon.server import Server
from shoal.daemon.server_lock import SocketLock, holder_pid, lock_path


@pytest.fixture
def daemon() -> Iterator[RunningServer]:
    with running() as it:
        yield it


@pytest.fixture
def raw(daemon) -> Iterator[RawClient]:
    with RawClient(daemon.address) as it:
        yield it


def alive(daemon: RunningServer) -> bool:
    with Client(daemon.address, timeout_s=PATIENCE_S) as client:
        return client.text("are you there")[0] == "are you there "


def gone(daemon: RunningServer) -> bool:
    """Whether the server soon remembers nothing of any client."""
    outbox, deadline_s = daemon.server._outbox, time.monotonic() + PATIENCE_S
    with RawClient(daemon.address) as probe:
        while time.monotonic() < deadline_s:
            probe.send(Ping())
            probe.until(Pong)
            if outbox.in_flight == 0 and outbox.clients == 0:
                return True
    return False


# --- good clients ---------------------------------------------------------------------------------------


def test_twenty_clients_get_their_own_texts(daemon):
    texts: dict[int, list[str]] = {}

    def talk(n: int) -> None:
        with Client(daemon.address, timeout_s=PATIENCE_S) as client:
            texts[n] = [client.text(" ".join(f"{n}.{turn}.{i}" for i in range(30)))[0] for turn in range(3)]

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    expected = [["".join(f"{n}.{t}.{i} " for i in range(30)) for t in range(3)] for n in range(20)]
    assert [texts[n] for n in range(20)] == expected
    assert gone(daemon)


def test_hello_agrees_on_a_version_or_says_why_not(raw):
    raw.send(Hello(max_version=7))
    welcome = raw.until(Welcome)
    assert welcome.version == 1
    assert welcome.limits["message_bytes"] == wire.MAX_REQUEST_BYTES
    assert "chat" in welcome.features
    raw.send(Hello(min_version=2, max_version=3))
    assert raw.error().code == "version"


def test_every_request_gets_exactly_one_terminal_reply(daemon):
    """Whatever is asked, in whatever order, cancelled or not."""
    random_ = random.Random(5)
    requests = [
        Generate(prompt="a b c"),
        Generate(prompt="forever"),
        Generate(prompt="refuse"),
        Generate(prompt="crash"),
        None,  # a body without a prompt
        Load(model="missing"),
        Load(model="m"),
        Status(),
        Ping(),
    ]
    with RawClient(daemon.address) as raw:
        ids = [f"r{n}".encode() for n in range(60)]
        for request_id in ids:
            request = random_.choice(requests)
            if request is None:
                raw.send_frames(b"shoal/1", b"generate", request_id, b"\x80")
            else:
                raw.send(request, request_id)
        for request_id in ids:
            raw.send(Cancel(target=request_id.hex()), b"c" + request_id)
        ends: Counter[bytes] = Counter()
        while len(ends) < 120:
            request_id, message = raw.receive()
            if TYPE_NAMES[type(message)] not in STREAMING:
                ends[request_id] += 1
        assert set(ends.values()) == {1}
    assert gone(daemon)


def test_cancel_is_idempotent_and_knows_only_own_requests(daemon, raw):
    raw.send(Generate(prompt="manual"))
    run = daemon.backend.run("manual")
    with RawClient(daemon.address) as other:
        other.send(Cancel(target=b"1".hex()))
        other.until(Ok)
    for target in ("", "zz", "31313131", "ff" * 64):
        raw.send(Cancel(target=target), b"c")
        raw.until(Ok, b"c")
    assert not run.cancelled.is_set()
    for _ in range(3):
        raw.send(Cancel(target=b"1".hex()), b"c")
    assert raw.until(Done).finish_reason == "cancelled"
    raw.send(Cancel(target=b"1".hex()), b"d")
    raw.until(Ok, b"d")


def test_cancel_reaches_a_request_whose_submit_has_not_returned(daemon, raw):
    entered, leave = threading.Event(), threading.Event()
    submit = daemon.backend.submit

    def slow_submit(request, emit):
        entered.set()
        assert leave.wait(PATIENCE_S)
        return submit(request, emit)

    daemon.backend.submit = slow_submit
    raw.send(Generate(prompt="forever"))
    assert entered.wait(PATIENCE_S)
    raw.send(Cancel(target=b"1".hex()), b"c")
    raw.until(Ok, b"c")
    leave.set()
    assert raw.until(Done).finish_reason == "cancelled"


def test_pings_and_status_are_answered_while_models_load(daemon, raw):
    raw.send(Load(model="slow"), b"load")
    assert daemon.backend.loading.wait(PATIENCE_S)
    raw.send(Ping(), b"p")
    raw.until(Pong, b"p")
    raw.send(Status(), b"s")
    assert not raw.until(StatusReply, b"s").draining
    waiting = raw.until(Waiting, b"load")
    assert waiting.seconds >= QUICK.keepalive_s
    daemon.backend.release_load.set()
    raw.until(Loaded, b"load")


def test_messages_after_the_terminal_one_are_swallowed(daemon, raw):
    raw.send(Generate(prompt="manual"))
    run = daemon.backend.run("manual")
    run.emit(done())
    run.emit(done())
    run.emit(Token(text="late", ids=[1]))
    raw.until(Done)
    raw.send(Ping(), b"p")
    assert raw.receive()[0] == b"p"


# --- bad clients ----------------------------------------------------------------------------------------


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
    run.emit(Error(code="internal", message="\ud800"))
    assert raw.error().message == "the reply cannot be sent"


# --- absent and slow clients ----------------------------------------------------------------------------


def test_a_client_killed_mid_stream_is_cancelled(daemon):
    raw = RawClient(daemon.address)
    raw.send(Generate(prompt="forever"))
    raw.until(Token)
    raw.close()
    assert daemon.backend.run("forever").cancelled.wait(PATIENCE_S)
    assert gone(daemon)


def test_a_client_killed_while_nothing_is_sent_is_cancelled(daemon):
    raw = RawClient(daemon.address)
    raw.send(Generate(prompt="manual"))
    run = daemon.backend.run("manual")
    raw.close()
    assert run.cancelled.wait(PATIENCE_S)
    assert gone(daemon)


def test_a_slow_reader_stalls_nobody_and_loses_its_requests():
    """Its tokens are joined while they wait, and after a bound its requests end with an error."""
    limits = replace(QUICK, queue_messages=2, outbox_s=PATIENCE_S, outbox_bytes=1 << 20)
    with running(limits=limits) as daemon, RawClient(daemon.address, RCVHWM=2, RCVBUF=4096) as slow:
        slow.send(Generate(prompt="manual"))
        run = daemon.backend.run("manual")
        sent = 0
        with Client(daemon.address, timeout_s=PATIENCE_S) as other:
            while not run.cancelled.is_set():
                for _ in range(100):
                    run.emit(Token(text="x" * 1000, ids=[sent]))
                    sent += 1
                assert other.text("hi")[0] == "hi "
                assert sent < 1_000_000
        ids, messages = [], 0
        while True:
            _, message = slow.receive()
            if isinstance(message, Token):
                assert len(message.text) == 1000 * len(message.ids)
                ids += message.ids
                messages += 1
            if isinstance(message, Error):
                break
        assert "reader too slow" in message.message
        assert ids == list(range(len(ids)))
        assert messages < len(ids)  # some were joined
        assert gone(daemon)


def test_a_reader_that_stops_for_good_is_forgotten():
    limits = replace(QUICK, queue_messages=2, outbox_s=0.2)
    with running(limits=limits) as daemon, RawClient(daemon.address, RCVHWM=2, RCVBUF=4096) as stuck:
        stuck.send(Generate(prompt="manual"))
        run = daemon.backend.run("manual")
        while not run.cancelled.is_set():
            run.emit(Token(text="x" * 10_000, ids=[1]))
            run.cancelled.wait(0.001)
        assert gone(daemon)


def test_a_slow_but_reading_client_gets_everything():
    limits = replace(QUICK, queue_messages=2)
    with running(limits=limits) as daemon, RawClient(daemon.address, RCVHWM=2, RCVBUF=4096) as slow:
        slow.send(Generate(prompt="manual"))
        run = daemon.backend.run("manual")
        run.emit(Accepted(model="m", prompt_tokens=1))
        for n in range(3000):
            run.emit(Token(text=f"{n} " + "x" * 200, ids=[n]))
        run.emit(done())
        ids: list[int] = []
        message: object = None
        while not isinstance(message, Done):
            _, message = slow.receive()
            if isinstance(message, Token):
                ids += message.ids
        assert ids == list(range(3000))


# --- ends -----------------------------------------------------------------------------------------------


def test_draining_lets_requests_end_and_admits_no_new_ones(daemon, raw):
    daemon.backend.released.clear()
    raw.send(Generate(prompt="manual"))
    run = daemon.backend.run("manual")
    daemon.server.stop()
    raw.send(Status(), b"s")
    while not raw.until(StatusReply, b"s").draining:
        raw.send(Status(), b"s")
    raw.send(Generate(prompt="new"), b"2")
    assert raw.error(b"2").code == "shutting_down"
    raw.send(Ping(), b"p")
    raw.until(Pong, b"p")
    run.emit(Token(text="end", ids=[1]))
    run.emit(done())
    assert raw.until(Token).text == "end"
    assert raw.until(Done).finish_reason == "stop"
    daemon.backend.released.set()
    daemon.thread.join(PATIENCE_S)
    assert not daemon.thread.is_alive()
    assert daemon.backend.closed
    assert daemon.backend.drains == [QUICK.drain_s]


def test_requests_that_outlive_the_drain_are_told(daemon, raw):
    raw.send(Generate(prompt="manual"))
    run = daemon.backend.run("manual")
    daemon.server.stop()
    assert raw.error().code == "shutting_down"
    assert run.cancelled.wait(PATIENCE_S)


def test_a_second_stop_ends_at_once(daemon, raw):
    daemon.backend.released.clear()
    raw.send(Generate(prompt="manual"))
    daemon.backend.run("manual")
    daemon.server.stop()
    daemon.server.stop()
    assert raw.error().code == "shutting_down"
    daemon.thread.join(PATIENCE_S)
    assert not daemon.thread.is_alive()


DAEMON = """
import sys
from api_fakes import FakeBackend
from shoal.daemon.server import Server
server = Server(FakeBackend(), [sys.argv[1]])
with server.signals():
    server.bind()
    print("up", flush=True)
    server.serve()
print("ended")
"""


def spawn(address: str) -> subprocess.Popen[str]:
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.Popen(
        [sys.executable, "-c", DAEMON, address], env=paths, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    return child


def test_sigterm_drains_and_a_killed_daemon_leaves_nothing_that_matters(tmp_path):
    address, path = ipc(tmp_path), tmp_path / "d.sock"
    child = spawn(address)
    assert holder_pid(path) == child.pid
    with Client(address, timeout_s=PATIENCE_S) as client:
        assert client.text("a b")[0] == "a b "
        child.send_signal(signal.SIGTERM)
        assert child.communicate(timeout=PATIENCE_S)[0] == "ended\n"
    assert child.returncode == 0
    assert not path.exists()
    assert holder_pid(path) is None

    child = spawn(address)
    child.kill()
    child.communicate(timeout=PATIENCE_S)
    assert path.exists()  # the killed daemon's
    assert holder_pid(path) is None
    with pytest.raises(NoDaemon), Client(address) as client:
        client.ping()
    with running(address) as daemon:
        assert holder_pid(path) == os.getpid()
        assert alive(daemon)


def test_two_interrupts_end_a_daemon_with_running_requests(tmp_path):
    child = spawn(ipc(tmp_path))
    with RawClient(ipc(tmp_path)) as raw:
        raw.send(Generate(prompt="forever"))
        raw.until(Token)
        child.send_signal(signal.SIGINT)
        raw.send(Status(), b"s")
        while not raw.until(StatusReply, b"s").draining:
            raw.send(Status(), b"s")
        child.send_signal(signal.SIGINT)
        assert raw.error().code == "shutting_down"
    assert child.communicate(timeout=PATIENCE_S)[0] == "ended\n"


def test_a_second_daemon_is_refused_and_the_first_unharmed(tmp_path):
    with running(ipc(tmp_path)) as daemon:
        second = Server(FakeBackend(), [ipc(tmp_path)])
        with pytest.raises(DaemonError, match=rf"already listens at .*d\.sock \(pid {os.getpid()}\)"):
            second.serve()
        assert alive(daemon)
    with running(ipc(tmp_path)) as daemon:
        assert alive(daemon)


def test_a_taken_tcp_port_is_refused(daemon):
    with pytest.raises(DaemonError, match="cannot listen"):
        Server(FakeBackend(), [daemon.address]).serve()
    assert alive(daemon)


def test_a_socket_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "d.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(DaemonError, match="no Shoal daemon listens"):
            SocketLock(path).acquire()
    assert path.exists()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(DaemonError, match="is not a socket"):
        SocketLock(path).acquire()
    assert path.read_text() == "precious"
    assert lock_path(path).exists()


# --- CURVE ----------------------------------------------------------------------------------------------


def test_only_authorised_keys_come_in_over_curve(tmp_path):
    ring = KeyRing(tmp_path / "server")
    friend, stranger = KeyRing(tmp_path / "friend"), KeyRing(tmp_path / "stranger")
    ring.authorise("friend", friend.client().public)
    server_key = ring.server().public
    with running("tcp://127.0.0.1:0", ipc(tmp_path), server_keys=ring.server_keys()) as daemon:
        with Client(daemon.address, keys=friend.client_keys(server_key)) as client:
            assert client.text("a b")[0] == "a b "
        with pytest.raises(NoDaemon, match="does not know this client's key"):
            Client(daemon.address, keys=stranger.client_keys(server_key)).ping()
        with pytest.raises(NoDaemon, match="handshake"):
            Client(daemon.address).ping()
        with pytest.raises(NoDaemon, match="handshake"):
            Client(daemon.address, keys=friend.client_keys(stranger.server().public)).ping()
        with Client(ipc(tmp_path)) as local:
            assert local.text("c")[0] == "c "
        ring.authorise("stranger", stranger.client().public)
        with Client(daemon.address, keys=stranger.client_keys(server_key)) as client:
            client.ping()


def test_an_open_address_without_keys_is_refused():
    with pytest.raises(DaemonError, match="in plain text"):
        Server(FakeBackend(), ["tcp://0.0.0.0:0"]).serve()


def test_client_errors_name_the_daemons_words(daemon):
    with Client(daemon.address) as client, pytest.raises(RequestFailed) as failed:
        client._call(msgspec.structs.replace(Load(model="x"), context=0), Loaded)
    assert str(failed.value) == "context=0: must be int >= 1"
