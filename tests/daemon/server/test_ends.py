"""How a server begins and ends: draining, signals, one daemon per address, keys."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest
from fakes.api_fakes import (
    PATIENCE_S,
    QUICK,
    FakeBackend,
    RawClient,
    alive,
    done,
    ipc,
    running,
)

from shoal.client import Client
from shoal.comm.curve_keys import KeyRing
from shoal.comm.errors import NoDaemon, RequestFailed
from shoal.comm.messages import Done, Generate, Load, Loaded, Ping, Pong, Status, StatusReply, Token
from shoal.daemon.errors import DaemonError
from shoal.daemon.server import server
from shoal.daemon.server.in_flight import Flight, Peer
from shoal.daemon.server.server import Server
from shoal.daemon.server.socket_lock import holder_pid, lock_path, socket_lock


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


def test_what_was_sent_while_it_ends_is_answered(monkeypatch):
    ending, sent = threading.Event(), threading.Event()

    def closing() -> None:
        ending.set()
        sent.wait(PATIENCE_S)

    # What was sent needs longer than usual to come here where other programs have the processors.
    monkeypatch.setattr(server, "QUIET_S", 1.0)
    slow = replace(QUICK, farewell_s=PATIENCE_S)
    with running(closing=closing, limits=slow) as daemon, RawClient(daemon.address) as raw:
        raw.send(Ping(), b"p")
        raw.until(Pong, b"p")
        daemon.server.stop()
        daemon.server.stop()
        assert ending.wait(PATIENCE_S)
        for number in range(20):
            raw.send(Generate(prompt="late"), b"%d" % number)
        sent.set()
        for number in range(20):
            assert raw.error(b"%d" % number).code == "shutting_down"


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
from fakes.api_fakes import FakeBackend
from shoal.daemon.server.server import Server
server = Server(FakeBackend(), [sys.argv[1]])
with server.signals():
    server.bind()
    print("up", flush=True)
    server.serve()
print("ended")
"""


ELSEWHERE = """
import signal, sys, threading
from shoal.daemon.server.outbox import Outbox
Outbox.patience_s = 3600.0  # only the signal can wake the server

def interrupt():
    sys.stdin.readline()
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=interrupt, daemon=True).start()
"""


def spawn(address: str, program: str = DAEMON) -> subprocess.Popen[str]:
    paths = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    child = subprocess.Popen(
        [sys.executable, "-c", program, address],
        stdin=subprocess.PIPE,
        env=paths,
        stdout=subprocess.PIPE,
        text=True,
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
    assert path.exists()  # the killed daemon left it
    assert holder_pid(path) is None
    with pytest.raises(NoDaemon), Client(address) as client:
        client.ping()
    with running(address) as daemon:
        assert holder_pid(path) == os.getpid()
        assert alive(daemon)


def test_a_signal_is_heard_at_once_wherever_it_arrives(tmp_path):
    """Also when it comes just before the poll begins, or in another thread, where it does not interrupt the poll."""
    child = spawn(ipc(tmp_path), ELSEWHERE + DAEMON)
    with Client(ipc(tmp_path), timeout_s=PATIENCE_S) as client:
        client.ping()
        assert child.communicate("go\n", timeout=PATIENCE_S)[0] == "ended\n"


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
        with pytest.raises(DaemonError, match="no Shoal daemon listens"), socket_lock(path):
            pass
    assert path.exists()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(DaemonError, match="is not a socket"), socket_lock(path):
        pass
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


def test_a_key_is_one_client_however_often_it_connects(tmp_path):
    ring, friend = KeyRing(tmp_path / "server"), KeyRing(tmp_path / "friend")
    ring.authorise("friend", friend.client().public)
    keys = friend.client_keys(ring.server().public)
    with running("tcp://127.0.0.1:0", ipc(tmp_path), server_keys=ring.server_keys()) as daemon:
        for address, known_by in ((daemon.address, keys), (ipc(tmp_path), None)):
            for prompt in ("a", "b"):
                with Client(address, keys=known_by) as client:
                    client.text(f"{prompt} {known_by is None}")
        a, b, c, d = (
            daemon.backend.runs[f"{p} {plain}"].client for plain in (False, True) for p in ("a", "b")
        )
    assert a == b == friend.client().public
    assert len({a, c, d}) == 3


def test_an_open_address_without_keys_is_refused():
    with pytest.raises(DaemonError, match="in plain text"):
        Server(FakeBackend(), ["tcp://0.0.0.0:0"]).serve()


def test_client_errors_name_the_daemons_words(daemon):
    with Client(daemon.address) as client, pytest.raises(RequestFailed) as failed:
        client._call(msgspec.structs.replace(Load(model="x"), context=0), Loaded)
    assert str(failed.value) == "context=0: must be int >= 1"


@pytest.mark.parametrize("course", ["as usual", "over at once", "abandoned", "abandoned before"])
def test_an_ended_request_holds_nothing_of_its_model(course: str):
    class Model:
        pass

    def take_its_course() -> weakref.ref[Model]:
        model = Model()
        flight = Flight(Peer(Mock(), b"c", "c"), b"1", "generate", 0.0, lambda flight: None)
        steps = {
            "attach": lambda holding=(model, flight.emit): flight.attach(lambda: holding),
            "end": lambda: flight.emit(done()),
            "take": flight.take,
            "abandon": flight.abandon,
        }
        for step in {
            "as usual": ("attach", "end", "take"),
            "over at once": ("end", "attach", "take"),
            "abandoned": ("attach", "abandon"),
            "abandoned before": ("abandon", "attach"),
        }[course]:
            steps[step]()
        return weakref.ref(model)

    gc.disable()  # the collector would free a cycle of request and model, but many models later
    try:
        assert take_its_course()() is None
    finally:
        gc.enable()
